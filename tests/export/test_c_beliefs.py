"""The generated C of beliefs, per-step tokens: the reference's expected actions, decode's where all is certain."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsq.export.c_builder import C_FLAGS
from rfsq.export.plan import DeployMode
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.rfsq_ref.beliefs import step_belief
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.backend_specs import BACKENDS
from rfsq.runtime.bundle.comparison import action_errors
from tests.bundles import Recipe, deploy, generate_c
from tests.export.c_library import (
    FOLDER,
    ILLEGAL_VALUE,
    OK,
    UNTOUCHED,
    Array,
    Library,
    compile_program,
    run,
    write_code,
)
from tests.export.test_c_compilers import COMPILERS, SANITIZERS, needs
from tests.export.test_c_source import NATIVE, QUICK, random_tokens, recipes, with_value

CHECKED_STEPS = BACKENDS["c"].checked_steps
MODES = [mode for mode in DeployMode if not mode.has_stats]
#: In normalised units, and of the largest standard deviation in a chunk.
ACTION_ERROR, DEVIATION_ERROR = 1e-6, 1e-4

LibraryOf = Callable[..., Library]


@pytest.fixture(scope="module")
def library_of(tmp_path_factory: pytest.TempPathFactory) -> LibraryOf:
    """The compiled model of a recipe."""
    root, built = tmp_path_factory.mktemp("c"), {}

    def get(recipe: Recipe, flags: tuple[str, ...] = QUICK, compiler: str = "gcc") -> Library:
        key = recipe, flags, compiler
        if key not in built:
            built[key] = Library(root / str(len(built)), deploy(recipe), flags=flags, compiler=compiler)
        return built[key]

    return get


def default_sizes(mode: DeployMode = DeployMode.CALIBRATED) -> Recipe:
    return Recipe(mode, ModelConfig(), chunk_length=8, prefixes=(1, 3), has_engine=False)


def random_logits(recipe: Recipe, num_chunks: int, prefix: int, spread: float, seed: int = 4) -> Array:
    config = recipe.config
    shape = (num_chunks, recipe.chunk_length, config.latent_dim, prefix, config.num_levels)
    return (np.random.default_rng(seed).normal(size=shape) * spread).astype(np.float32)


def softmax(logits: Array, sharpness: Array | None = None) -> torch.Tensor:
    """[..., l, K] in float64."""
    scale = 1 if sharpness is None else torch.from_numpy(sharpness).double()[:, None]
    return (torch.from_numpy(logits).double() * scale).softmax(-1)


def one_hot(tokens: Array, num_levels: int, *, is_logits: bool) -> Array:
    certain, impossible = (0, -np.inf) if is_logits else (1, 0)
    return np.where(tokens[..., None] == np.arange(num_levels), certain, impossible).astype(np.float32)


def check(
    library: Library, found: tuple[int, Array, Array, Array], expected: torch.Tensor, keeps_mode: bool, coarse: int
) -> None:
    """Against the definition in float64, of the probabilities that were given."""
    model = library.deployed.reference
    belief = step_belief(model, expected, "likeliest mode" if keeps_mode else "expected", coarse, None)
    status, actions, deviations, mode_probability = found
    assert status == OK
    worst = action_errors(belief.actions.numpy(), actions, model.units.numpy())
    assert worst.value <= ACTION_ERROR, worst
    exact = belief.std.numpy()
    # A millionth of the action's unit is what float32 resolves of it.
    limit = DEVIATION_ERROR * exact.max((1, 2), keepdims=True) + 1e-9 * model.units.numpy()
    assert (np.abs(deviations - exact) <= limit).all()
    np.testing.assert_allclose(mode_probability, belief.mode_probability.numpy(), rtol=1e-6)


def check_all(library: Library, num_chunks: int, spread: float) -> None:
    for prefix in library.deployed.prefixes:
        logits = random_logits(library.recipe, num_chunks, prefix, spread)
        sharpness = np.random.default_rng(5).uniform(0.5, 2, prefix).astype(np.float32)
        rounded = softmax(logits).float().numpy()
        exact = torch.from_numpy(rounded).double()
        for coarse in {1, prefix}:
            for keeps_mode in (False, True):
                found = library.believe(
                    logits, is_logits=True, keeps_mode=keeps_mode, coarse=coarse, sharpness=sharpness
                )
                check(library, found, softmax(logits, sharpness), keeps_mode, coarse)
                found = library.believe(rounded, is_logits=False, keeps_mode=keeps_mode, coarse=coarse)
                check(library, found, exact / exact.sum(-1, keepdim=True), keeps_mode, coarse)


@given(recipe=recipes(), num_chunks=st.integers(1, 40), spread=st.sampled_from([0.1, 2.0, 30.0]))
@settings(max_examples=15)
def test_a_model_of_any_size_gives_the_references_answers(
    recipe: Recipe, num_chunks: int, spread: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if recipe.mode not in MODES:
        recipe = replace(recipe, mode=DeployMode.CALIBRATED)
    check_all(Library(tmp_path_factory.mktemp("model"), deploy(recipe), flags=QUICK), num_chunks, spread)


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("mode", MODES)
def test_the_default_sizes_as_they_are_deployed(mode: DeployMode, spread: float, library_of: LibraryOf) -> None:
    check_all(library_of(default_sizes(mode), NATIVE), 40, spread)


@pytest.mark.parametrize("target", [target for target in host_targets() if target.startswith("x86-64")])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_target_gives_the_references_answers(compiler: str, target: str, library_of: LibraryOf) -> None:
    library = library_of(default_sizes(), (*C_FLAGS, f"-march={target}"), compiler)
    check_all(library, 20, 3.0)
    check_certain(library, 50)


@pytest.mark.parametrize("gain", [-1e18, -100.0, 100.0, 1e18])
@pytest.mark.parametrize("mode", MODES)
def test_no_sum_is_too_large_for_mish_and_its_slope(
    gain: float, mode: DeployMode, tmp_path_factory: pytest.TempPathFactory
) -> None:
    deployed = deploy(Recipe(mode))
    deployed.reference.decoder[0].weight.abs_().mul_(gain)
    deployed.reference.decoder[2].weight.div_(abs(gain))
    deployed.exported = deployed.reference
    check_all(Library(tmp_path_factory.mktemp("model"), deployed, flags=NATIVE), 50, 2.0)


# --- what is certain --------------------------------------------------------------------------------------------------


def check_certain(library: Library, num_chunks: int) -> None:
    for prefix in library.deployed.prefixes:
        tokens = random_tokens(library.recipe, num_chunks, prefix)
        expected = library.decode(tokens)[1]
        for is_logits in (False, True):
            certain = one_hot(tokens, library.recipe.config.num_levels, is_logits=is_logits)
            status, actions, deviations, mode_probability = library.believe(certain, is_logits=is_logits)
            assert status == OK
            np.testing.assert_array_equal(actions, expected)
            assert (deviations == 0).all()
            assert (mode_probability == 1).all()


@pytest.mark.parametrize("flags", [QUICK, C_FLAGS, NATIVE], ids=["unoptimised", "baseline", "native"])
@pytest.mark.parametrize("mode", MODES)
def test_certain_tokens_give_the_bits_of_decode(
    mode: DeployMode, flags: tuple[str, ...], library_of: LibraryOf
) -> None:
    check_certain(library_of(default_sizes(mode), flags), 100)
    # Chunks that blocks of eight steps cut.
    check_certain(library_of(Recipe(mode, chunk_length=3), flags), 50)


@pytest.mark.parametrize("chunk_length", [3, 8])
def test_also_beside_what_is_not_certain(chunk_length: int, library_of: LibraryOf) -> None:
    library = library_of(Recipe(chunk_length=chunk_length), NATIVE)
    tokens = random_tokens(library.recipe, 40, 3)
    logits = random_logits(library.recipe, 40, 3, 2)
    logits[::2] = one_hot(tokens[::2], 5, is_logits=True)
    _, actions, deviations, _ = library.believe(logits, is_logits=True)
    np.testing.assert_array_equal(actions[::2], library.decode(tokens)[1][::2])
    assert (deviations[::2] == 0).all()
    assert (deviations[1::2] > 0).all()


@pytest.mark.parametrize("is_logits", [False, True])
def test_the_likeliest_mode_of_all_layers_is_decoded_as_its_tokens_are(is_logits: bool, library_of: LibraryOf) -> None:
    library = library_of(default_sizes(), NATIVE)
    logits = random_logits(library.recipe, 50, 3, 2)
    given = logits if is_logits else softmax(logits).float().numpy()
    _, actions, deviations, _ = library.believe(given, is_logits=is_logits, keeps_mode=True, coarse=3)
    np.testing.assert_array_equal(actions, library.decode(given.argmax(-1).astype(np.int32))[1])
    assert (deviations == 0).all()


@pytest.mark.parametrize("is_logits", [False, True])
def test_of_levels_as_likely_the_lowest_is_the_mode(is_logits: bool, library_of: LibraryOf) -> None:
    library = library_of(Recipe())
    given = np.full((3, 2, 4, 2, 5), 0.0 if is_logits else 0.2, np.float32)
    given[..., 0] = -1 if is_logits else 0
    given[..., 1:] += 0 if is_logits else 0.05
    _, actions, _, _ = library.believe(given, is_logits=is_logits, keeps_mode=True, coarse=2)
    np.testing.assert_array_equal(actions, library.decode(np.ones((3, 2, 4, 2), np.int32))[1])


# --- batches, sizes of numbers ----------------------------------------------------------------------------------------


def test_a_chunk_has_the_same_bits_whatever_stands_beside_it_and_is_wanted(library_of: LibraryOf) -> None:
    library = library_of(Recipe(chunk_length=3), C_FLAGS)
    logits = random_logits(library.recipe, 2 * CHECKED_STEPS // 3 + 1, 2, 2)
    _, *expected = library.believe(logits, is_logits=True)
    for start, size in ((0, 1), (4, 2), (7, 5), (40, 20), (60, len(logits) - 60)):
        part = slice(start, start + size)
        for one, other in zip(library.believe(logits[part], is_logits=True)[1:], expected, strict=True):
            np.testing.assert_array_equal(one, other[part])
    _, actions, *others = library.believe(logits, is_logits=True, wants_all=False)
    np.testing.assert_array_equal(actions, expected[0])
    assert all((other == UNTOUCHED).all() for other in others)
    assert library.believe(logits[:0], is_logits=True)[0] == OK


def test_logits_of_any_finite_size_do_not_overflow(library_of: LibraryOf) -> None:
    library = library_of(Recipe())
    largest = np.finfo(np.float32).max
    logits = np.random.default_rng(6).choice(
        np.float32([-largest, -1e30, -100, 0, 1e-45, 90, 1e30, largest]), (20, 2, 4, 2, 5)
    )
    for sharpness in (np.float32([1, 1]), np.float32([1e-30, 1e30])):
        found = library.believe(logits, is_logits=True, sharpness=sharpness)
        check(library, found, softmax(logits, sharpness), False, 1)


def test_what_is_the_same_for_all_levels_changes_nothing(library_of: LibraryOf) -> None:
    """Sums that are whole numbers, which float32 holds."""
    library = library_of(Recipe(), NATIVE)
    logits = np.round(random_logits(library.recipe, 20, 3, 3))
    for one, other in zip(
        library.believe(logits, is_logits=True), library.believe(logits + 1000, is_logits=True), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_sum_that_half_precision_has_rounded_is_divided_by(library_of: LibraryOf) -> None:
    library = library_of(Recipe())
    exact = softmax(random_logits(library.recipe, 20, 3, 2))
    for factor in (0.9965, 1.0035):
        given = (exact * factor).float().numpy()
        check(library, library.believe(given, is_logits=False), exact, False, 1)


# --- illegal values ---------------------------------------------------------------------------------------------------


def check_refused(library: Library, given: Array, *, is_logits: bool) -> None:
    """Also in a token of the mode, whose likeliest level alone is decoded."""
    for keeps_mode in (False, True):
        status, *outputs = library.believe(given, is_logits=is_logits, keeps_mode=keeps_mode, coarse=given.shape[3])
        assert status == ILLEGAL_VALUE
        assert all((output == UNTOUCHED).all() for output in outputs)


@pytest.mark.parametrize("place", [0, 7, -1])
def test_numbers_that_are_no_probability_are_refused_and_nothing_is_written(place: int, library_of: LibraryOf) -> None:
    library = library_of(Recipe())
    legal = softmax(random_logits(library.recipe, 5, 3, 1)).float().numpy()
    for value in (np.nan, -np.nan, np.inf, -np.inf, -1e-3, 1.5, 3.4e38, 1e-45 + legal.flat[place] + 5e-3):
        check_refused(library, with_value(legal, place, value), is_logits=False)
    negative = one_hot(np.zeros(legal.shape[:-1]), 5, is_logits=False)
    negative[..., 1] = -0.0
    assert library.believe(negative, is_logits=False)[0] == OK
    negative[-1, -1, -1, -1, 1] = -1e-45
    check_refused(library, negative, is_logits=False)
    check_refused(library, np.zeros_like(legal), is_logits=False)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, 0, -1, 1e-40])
def test_a_sharpness_that_no_temperature_has_is_refused_and_nothing_is_written(
    value: float, library_of: LibraryOf
) -> None:
    logits = random_logits(Recipe(), 5, 3, 1)
    for layer in range(3):
        sharpness = np.ones(3, np.float32)
        sharpness[layer] = value
        status, *outputs = library_of(Recipe()).believe(logits, is_logits=True, sharpness=sharpness)
        assert status == ILLEGAL_VALUE
        assert all((output == UNTOUCHED).all() for output in outputs)


@pytest.mark.parametrize("place", [0, 7, -1])
def test_logits_that_are_no_distribution_are_refused_and_nothing_is_written(place: int, library_of: LibraryOf) -> None:
    library = library_of(Recipe())
    legal = random_logits(library.recipe, 5, 3, 1)
    hostile = np.uint32([0x7FC12345, 0xFFC54321, 0x7F800001, 0xFF812345]).view(np.float32)
    for value in (np.nan, np.inf, *hostile):
        check_refused(library, with_value(legal, place, value), is_logits=True)
    forbidden = legal.copy()
    forbidden.reshape(-1, 5)[place // 5] = -np.inf
    check_refused(library, forbidden, is_logits=True)
    forbidden.reshape(-1, 5)[place // 5, 3] = -1e30
    assert library.believe(forbidden, is_logits=True)[0] == OK


def test_a_mode_of_more_layers_than_there_are_is_refused(library_of: LibraryOf) -> None:
    library = library_of(Recipe())
    logits = random_logits(library.recipe, 2, 2, 1)
    for coarse in (-1, 3):
        assert library.believe(logits, is_logits=True, coarse=coarse)[0] == ILLEGAL_VALUE
    assert library.believe(logits, is_logits=True, coarse=0)[0] == OK


def test_of_a_long_batch_nothing_is_written_from_the_block_on_that_holds_the_illegal_value(
    library_of: LibraryOf,
) -> None:
    library = library_of(Recipe(chunk_length=2), C_FLAGS)
    chunks = CHECKED_STEPS // 2
    logits = random_logits(library.recipe, 3 * chunks, 2, 1)
    _, *expected = library.believe(logits, is_logits=True)
    status, *found = library.believe(with_value(logits, logits[: 2 * chunks].size - 1, np.nan), is_logits=True)
    assert status == ILLEGAL_VALUE
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one[:chunks], other[:chunks])
        assert (one[chunks:] == UNTOUCHED).all()


# --- what it is made of -----------------------------------------------------------------------------------------------


def test_a_dynamic_model_has_none() -> None:
    generated = generate_c(deploy(Recipe(DeployMode.DYNAMIC)))
    assert "belief" not in generated.source + generated.header
    assert "rfsq_decode_beliefs_l3" in generate_c(deploy(Recipe())).header


@needs("gcc", "gcc")
@pytest.mark.parametrize("mode", MODES)
def test_sanitizers_find_nothing(mode: DeployMode, tmp_path: Path) -> None:
    """In arrays of exactly their size, whole groups and last tokens, legal values and illegal ones."""
    recipe = Recipe(mode, chunk_length=3)
    folder = write_code(tmp_path, deploy(recipe))
    program = compile_program(folder, FOLDER / "beliefs_misuse.c", recipe, flags=("-std=c11", "-O1", *SANITIZERS))
    assert run([program], folder) == "nothing found\n"
