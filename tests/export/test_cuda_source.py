"""The generated CUDA compiles for every kind of GPU, mode and size, and its latents in fixed point are the latents.

What the kernels compute, test_cuda_on_cpu.py and tests/gpu say.
"""

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.export.c_tables import number
from rfsq.export.cuda_source import FixedPoint, fixed_point
from rfsq.export.plan import Affine, DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.runtime.bundle.errors import BackendUnavailableError
from rfsq.runtime.bundle.manifest import kernel_name, token_types
from tests.bundles import SMALL, Recipe, compile_cuda, deploy, generate_cuda
from tests.export.plan_numpy import CODES, without_numbers

pytest.importorskip("cuda.bindings", reason="cuda-python is not installed: pip install '.[gpu]'")

from rfsq.runtime.backends.gpu.kernels import KernelError, KernelLibrary, compile_kernels, nvrtc_version

#: Sizes that no vector divides, that need more threads than one warp, and tokens that no byte takes.
SIZES = {
    "published": ModelConfig(action_dim=7, latent_dim=16, hidden_width=64, num_layers=8, num_levels=7),
    "small": SMALL,
    "odd": ModelConfig(action_dim=5, latent_dim=3, hidden_width=13, num_layers=3, num_levels=2),
    "wide": ModelConfig(action_dim=14, latent_dim=40, hidden_width=130, num_layers=5, num_levels=9),
    "wider than shared memory": ModelConfig(
        action_dim=13, latent_dim=13, hidden_width=1030, num_layers=2, num_levels=9
    ),
    "prefix in whole words": ModelConfig(action_dim=3, latent_dim=6, hidden_width=10, num_layers=3, num_levels=4),
    "fine": ModelConfig(action_dim=2, latent_dim=4, hidden_width=8, num_layers=2, num_levels=1001),
}


def source(mode: DeployMode, config: ModelConfig) -> str:
    layers = (max(1, config.num_layers - 1), config.num_layers)
    return generate_cuda(deploy(Recipe(mode=mode, config=config, prefixes=layers)))


@pytest.fixture(autouse=True)
def nvrtc() -> None:
    try:
        nvrtc_version()
    except KernelError as error:
        pytest.skip(str(error))


#: Every code of sizes that suit vectors and of sizes that do not; of the others, what layers and tokens of every code
#: have in common, and one more of the codes.
MODES = {
    "published": CODES,
    "small": CODES,
    "odd": CODES,
    "wide": (DeployMode.CALIBRATED, DeployMode.RECOVERED),
    "wider than shared memory": (DeployMode.CALIBRATED, DeployMode.DYNAMIC),
    "prefix in whole words": (DeployMode.CALIBRATED, DeployMode.RECOVERED),
    "fine": (DeployMode.CALIBRATED, DeployMode.DYNAMIC),
}


@pytest.mark.parametrize(
    ("size", "mode"),
    [
        pytest.param(size, mode, marks=[pytest.mark.slow] * (size != "small"))
        for size, modes in MODES.items()
        for mode in modes
    ],
)
def test_every_mode_and_size_compiles_and_has_the_kernels_that_are_launched(size: str, mode: DeployMode) -> None:
    config = SIZES[size]
    # The least GPU has the largest kernels to hold.
    image = compile_cuda(source(mode, config), "7.5" if size == "published" else "9.0")
    for prefix in (None, config.num_layers):
        for token_type in token_types(config.num_levels):
            assert kernel_name(prefix, token_type, "few").encode() in image


@pytest.mark.slow
@pytest.mark.parametrize("compute_capability", ["8.0", "8.7", "8.9", "9.0", "10.0", "12.0"])
def test_it_compiles_for_every_kind_of_gpu(compute_capability: str) -> None:
    """8.7 is the Jetson Orin's, and 7.5 is above. By every instruction, of kernels of both kinds."""
    code = source(DeployMode.CALIBRATED, ModelConfig(3, 8, 20, 1, 7))
    assert all(f" {kernel_name(None, 'int32', kind)}(" in code for kind in ("few", "many"))
    assert compile_cuda(code, compute_capability)[:4] == b"\x7fELF"


def test_the_code_of_none_is_that_of_calibrated_with_other_numbers() -> None:
    for config in (SIZES[size] for size in ("published", "small", "odd", "fine")):
        none, calibrated, recovered = (
            without_numbers(source(mode, config))
            for mode in (DeployMode.NONE, DeployMode.CALIBRATED, DeployMode.RECOVERED)
        )
        assert none == calibrated != recovered


def test_kernels_for_many_steps_exist_where_the_sizes_suit_them() -> None:
    many = kernel_name(8, "uint8", "many")
    assert f" {many}(" in source(DeployMode.CALIBRATED, SIZES["published"])
    for mode, size in (
        (DeployMode.DYNAMIC, "published"),
        (DeployMode.CALIBRATED, "wide"),
        (DeployMode.CALIBRATED, "fine"),
    ):
        assert f" {kernel_name(None, 'int32', 'many')}(" not in source(mode, SIZES[size])


def test_levels_that_no_byte_holds_beside_the_mark_have_no_kernels_for_bytes() -> None:
    assert token_types(255) == ("int32", "uint8")
    assert token_types(256) == ("int32",)
    assert "uint8_few" not in source(DeployMode.CALIBRATED, SIZES["fine"])


def test_a_source_that_does_not_compile_is_quoted() -> None:
    with pytest.raises(KernelError, match=r"(?s)NVRTC refuses broken\.cu.*identifier"):
        compile_kernels("__global__ void f() { nothing; }", "broken.cu", "9.0")


def test_an_image_that_was_cut_off_never_reaches_the_driver() -> None:
    image = compile_cuda(source(DeployMode.CALIBRATED, SMALL), "9.0")
    for spoiled in (image[: len(image) // 2], image[:-1], image[:40], b"", b"not an engine"):
        with pytest.raises(BackendUnavailableError, match="no image of CUDA kernels"):
            KernelLibrary(spoiled)


# --- latents in fixed point -------------------------------------------------------------------------------------------


@st.composite
def fixed_points(draw: st.DrawFn) -> tuple[FixedPoint, np.ndarray, np.ndarray]:
    """With the weights [D, l] and the bias [D] that it is made from: of any size, and of very different sizes."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    num_levels = draw(st.sampled_from([2, 3, 7, 100, 128, 129, 1001, 65537, 2**24]))
    spread = draw(st.sampled_from([0.0, 1.0, 20.0]))
    size = 2.0 ** draw(st.integers(-80, 80))
    weight = size * random.standard_normal(shape) * np.exp2(-spread * random.random(shape))
    bias = draw(st.sampled_from([0.0, 1.0, num_levels])) * size * random.standard_normal(shape[0])
    weight, bias = weight.astype(np.float32), bias.astype(np.float32)
    return fixed_point(weight, bias, num_levels), weight, bias


def some_tokens(fixed: FixedPoint) -> np.ndarray:
    """[N, D, l]: random ones, and those that make every latent largest and smallest."""
    random = np.random.default_rng(0)
    highest = np.where(fixed.weight > 0, fixed.num_levels - 1, 0)
    return np.concatenate(
        (
            random.integers(fixed.num_levels, size=(50, *fixed.weight.shape)),
            [highest, fixed.num_levels - 1 - highest],
        )
    )


@given(fixed_points())
def test_sums_in_fixed_point_fit_and_are_the_latents(given: tuple[FixedPoint, np.ndarray, np.ndarray]) -> None:
    fixed, weight, bias = given
    tokens = some_tokens(fixed)
    # Python's numbers neither overflow nor round.
    sums = (tokens.astype(object) * fixed.weight.astype(object)).sum(-1) + fixed.start.astype(object)
    assert max(map(abs, sums.flat)) < 2 ** (fixed.bits - 1)
    assert np.abs(fixed.weight).max() < 2 ** (fixed.bits - 2)
    exact = (tokens * weight.astype(np.float64)).sum(-1) + bias
    # Half of a step for each weight, times at most half of the levels, and half of one for the start.
    steps_off = np.abs(sums.astype(np.float64) - exact / fixed.step)
    rounding = 2.0**-50 * (np.abs(weight.astype(np.float64)).sum(1) * fixed.num_levels + np.abs(bias)) / fixed.step
    assert (steps_off <= weight.shape[1] * (fixed.num_levels - 1) / 4 + 0.5 + rounding).all()
    # A step is as small as it may be: so that is far below what float32 holds of the largest latent.
    largest = (np.abs(bias) + np.abs(weight.astype(np.float64)).sum(1) * (fixed.num_levels - 1)).max()
    assert largest / fixed.step <= 2.0 ** (fixed.bits - 3)
    # But for what float32 holds no smaller step for.
    assert largest / fixed.step >= 2.0 ** (fixed.bits - 4) or fixed.step == 2.0**-126
    assert steps_off.max() * fixed.step <= largest * 2.0**-20


@given(fixed_points())
def test_words_of_weights_add_up_to_them(given: tuple[FixedPoint, np.ndarray, np.ndarray]) -> None:
    """As the kernels do it, four tokens at a time, wherever a latent's begin within a word."""
    fixed, weight, _ = given
    latent_dim, layers = weight.shape
    hypothesis.assume(fixed.bits == 32)
    tokens = some_tokens(fixed)
    row = tokens.reshape(len(tokens), -1)
    row = np.pad(row, [(0, 0), (0, 8 - row.shape[1] % 4)])
    words = fixed.words().astype(np.int32).view(np.int8).reshape(latent_dim, -1, 4, 4)
    for d in range(latent_dim):
        first, last = d * layers // 4, ((d + 1) * layers - 1) // 4
        sums = fixed.start[d] + sum(
            (row[:, 4 * (first + i) :][:, :4] @ words[d, i, byte].astype(np.int64)) << 8 * byte
            for i in range(last - first + 1)
            for byte in range(4)
        )
        assert (sums == tokens[:, d] @ fixed.weight[d] + fixed.start[d]).all()


@given(fixed_points(), st.integers(0, 2**32 - 1))
def test_no_sum_of_a_hidden_unit_is_larger_than_what_is_promised(
    given: tuple[FixedPoint, np.ndarray, np.ndarray], seed: int
) -> None:
    fixed, _, _ = given
    random = np.random.default_rng(seed)
    hidden = Affine(
        random.standard_normal((6, len(fixed.start))).astype(np.float32), random.standard_normal(6).astype(np.float32)
    )
    scale = np.float32(np.log2(np.e))
    latents = (
        ((some_tokens(fixed) * fixed.weight).sum(-1) + fixed.start).astype(np.float32) * np.float32(fixed.step)
    ).astype(np.float32)
    # As the kernels add them up; a product that is rounded as well is off by more.
    sums = np.broadcast_to(hidden.bias * scale, (len(latents), 6))
    for d in range(latents.shape[1]):
        sums = (sums + latents[:, d, None] * (hidden.weight[:, d] * scale)).astype(np.float32)
    assert (sums / np.log2(np.e) <= fixed.largest_sum(hidden)).all()


@pytest.mark.parametrize("size", [np.finfo(np.float32).max, np.finfo(np.float32).tiny, 0.0])
@pytest.mark.parametrize("num_levels", [2, 128, 2**24])
def test_the_largest_and_the_smallest_weights_have_a_step_that_float32_holds(size: float, num_levels: int) -> None:
    weight = np.full((2, 9), size, np.float32)
    fixed = fixed_point(weight, -weight[:, 0], num_levels)
    assert float(np.float32(fixed.step)) == fixed.step > 0
    np.testing.assert_allclose(fixed.weight * fixed.step, weight, rtol=1e-4)


def test_a_number_that_float32_does_not_hold_is_no_constant() -> None:
    for value in (np.inf, -np.inf, np.nan, 3.5e38):
        with pytest.raises(ValueError, match="float32 does not hold"):
            number(value)
