"""The generated CUDA compiles for every kind of GPU, mode and size; what it computes is for tests/gpu to say."""

import pytest

from export.cuda_flags import CUDA_FLAGS
from export.cuda_source import cuda_tokenizer
from export.plan import DeployMode, plan_decoder, plan_encoder
from rfsq_ref.autoencoder import ModelConfig
from runtime.errors import BackendUnavailableError
from runtime.kernel_names import kernel_name, token_types
from tests.bundles import SMALL, Recipe, deploy

pytest.importorskip("cuda.bindings", reason="cuda-python is not installed: pip install '.[gpu]'")

from runtime.cuda_kernels import KernelError, KernelLibrary, compile_kernels, nvrtc_version

#: Sizes that no vector divides, that need more threads than one warp, and tokens that no byte takes.
SIZES = {
    "published": ModelConfig(action_dim=7, latent_dim=16, hidden_width=64, num_layers=8, num_levels=7),
    "small": SMALL,
    "odd": ModelConfig(action_dim=5, latent_dim=3, hidden_width=13, num_layers=3, num_levels=2),
    "wide": ModelConfig(action_dim=14, latent_dim=40, hidden_width=130, num_layers=5, num_levels=9),
    "fine": ModelConfig(action_dim=2, latent_dim=4, hidden_width=8, num_layers=2, num_levels=1001),
}


def source(mode: DeployMode, config: ModelConfig) -> str:
    layers = (max(1, config.num_layers - 1), config.num_layers)
    model = deploy(Recipe(mode=mode, config=config, prefixes=layers)).reference
    return cuda_tokenizer(plan_encoder(model, mode, 2), [plan_decoder(model, mode, 2, layer) for layer in layers])


@pytest.fixture(autouse=True)
def nvrtc() -> None:
    try:
        nvrtc_version()
    except KernelError as error:
        pytest.skip(str(error))


def compiled(text: str, compute_capability: str) -> bytes:
    return compile_kernels(text, "rfsq_tokenizer.cu", compute_capability, CUDA_FLAGS)


@pytest.mark.parametrize("mode", DeployMode)
@pytest.mark.parametrize("size", SIZES)
def test_every_mode_and_size_compiles_and_has_the_kernels_that_are_launched(mode: DeployMode, size: str) -> None:
    config = SIZES[size]
    image = compiled(source(mode, config), "9.0")
    for prefix in (None, config.num_layers):
        for token_type in token_types(config.num_levels):
            assert kernel_name(prefix, token_type, "few").encode() in image


@pytest.mark.parametrize("compute_capability", ["7.5", "8.0", "8.7", "8.9", "9.0", "10.0", "12.0"])
def test_it_compiles_for_every_kind_of_gpu(compute_capability: str) -> None:
    """8.7 is the Jetson Orin's."""
    assert compiled(source(DeployMode.CALIBRATED, SIZES["published"]), compute_capability)[:4] == b"\x7fELF"


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
    image = compiled(source(DeployMode.CALIBRATED, SMALL), "9.0")
    for spoiled in (image[: len(image) // 2], image[:-1], image[:40], b"", b"not an engine"):
        with pytest.raises(BackendUnavailableError, match="no image of CUDA kernels"):
            KernelLibrary(spoiled)
