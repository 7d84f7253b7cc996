"""The generated C says nothing but the model: the reference's answers, on any sizes, and nothing where it refuses."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsq.export.c_builder import C_FLAGS
from rfsq.export.plan import AffineQuantizer, DeployMode, action_limit
from rfsq.rfsq_ref.autoencoder import ModelConfig
from rfsq.runtime.bundle.comparison import action_errors
from tests.bundles import Deployed, Recipe, deploy, fingerprint_of, generate_c, random_actions, reference_decode
from tests.export.c_library import ILLEGAL_VALUE, OK, UNTOUCHED, Array, Library, plans
from tests.export.plan_numpy import CODES, MODES, check_tokens, is_step_coupled, without_numbers

ROOT = Path(__file__).parents[2]
#: Compiles in a sixth of the time; vector instructions have tests of their own.
QUICK = ("-std=c11", "-O0", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
#: With the longest vectors of this processor.
NATIVE = (*C_FLAGS, "-march=native")
#: In normalised units; the gates allow ten times as much.
DECODE_ERROR = 1e-6

LibraryOf = Callable[..., Library]


@pytest.fixture(scope="module")
def library_of(tmp_path_factory: pytest.TempPathFactory) -> LibraryOf:
    """The compiled model of a recipe."""
    root, built = tmp_path_factory.mktemp("c"), {}

    def get(recipe: Recipe, flags: tuple[str, ...] = QUICK) -> Library:
        if (recipe, flags) not in built:
            built[recipe, flags] = Library(root / str(len(built)), deploy(recipe), flags=flags)
        return built[recipe, flags]

    return get


def compiled(deployed: Deployed, factory: pytest.TempPathFactory) -> Library:
    return Library(factory.mktemp("model"), deployed, flags=QUICK)


# --- answers ----------------------------------------------------------------------------------------------------------


def random_tokens(recipe: Recipe, num_chunks: int, prefix: int, *, seed: int = 2) -> Array:
    shape = (num_chunks, recipe.chunk_length, recipe.config.latent_dim, prefix)
    return np.random.default_rng(seed).integers(recipe.config.num_levels, size=shape, dtype=np.int32)


def random_stats(tokens: Array) -> Array:
    shape = (*tokens.shape[:2], tokens.shape[-1], 2)
    return np.random.default_rng(3).uniform((-0.5, 1e-5), (0.5, 0.5), shape).astype(np.float32)


def check_encoder(library: Library, actions: Array) -> None:
    status, tokens, stats = library.encode(actions)
    assert status == OK
    compared = check_tokens(library.deployed, actions, tokens)
    if stats is not None:
        expected = library.deployed.reference.encode(torch.from_numpy(actions).double())[1].numpy()
        np.testing.assert_allclose(stats[~compared.flipped], expected[~compared.flipped], rtol=0, atol=1e-5)


def check_decoders(library: Library, num_chunks: int) -> None:
    """Of any tokens, not only of those that an encoder gives."""
    reference = library.deployed.reference
    for prefix in library.deployed.prefixes:
        tokens = random_tokens(library.recipe, num_chunks, prefix)
        stats = random_stats(tokens) if library.recipe.mode.has_stats else None
        status, actions = library.decode(tokens, stats)
        assert status == OK
        expected = reference_decode(
            reference, torch.from_numpy(tokens), None if stats is None else torch.from_numpy(stats)
        )
        worst = action_errors(expected, actions, reference.units.numpy())
        assert worst.value <= DECODE_ERROR, worst


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any mode and sizes; few enough layers that the last bins stay above float32's rounding."""
    mode = draw(st.sampled_from(MODES))
    config = ModelConfig(
        action_dim=draw(st.integers(1, 9)),
        # One latent alone has no deviation.
        latent_dim=draw(st.integers(2 if is_step_coupled(mode) else 1, 20)),
        hidden_width=draw(st.sampled_from([1, 3, 8, 20, 64])),
        num_layers=draw(st.integers(1, 5)),
        num_levels=draw(st.integers(2, 9)),
    )
    return Recipe(
        mode=mode,
        config=config,
        chunk_length=draw(st.sampled_from([1, 2, 3, 8, 11])),
        prefixes=tuple(draw(st.sets(st.integers(1, config.num_layers)))),
        has_normaliser=draw(st.booleans()),
        has_engine=False,
        seed=draw(st.integers(0, 99)),
    )


@given(recipe=recipes(), num_chunks=st.integers(1, 40))
@settings(max_examples=25)
def test_a_model_of_any_size_and_mode_gives_the_references_answers(
    recipe: Recipe, num_chunks: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    library = compiled(deploy(recipe), tmp_path_factory)
    check_encoder(library, random_actions(recipe, num_chunks))
    check_decoders(library, num_chunks)


SMALLEST = ModelConfig(action_dim=1, latent_dim=1, hidden_width=1, num_layers=1, num_levels=2)


@pytest.mark.parametrize("chunk_length", [1, 3, 11])
@pytest.mark.parametrize("mode", CODES)
def test_the_smallest_model_of_all(mode: DeployMode, chunk_length: int, library_of: LibraryOf) -> None:
    config = SMALLEST if mode is DeployMode.CALIBRATED else replace(SMALLEST, latent_dim=2)
    library = library_of(Recipe(mode, config, chunk_length, prefixes=(), has_engine=False))
    check_encoder(library, random_actions(library.recipe, 200))
    check_decoders(library, 200)


def default_sizes(mode: DeployMode) -> Recipe:
    return Recipe(mode, ModelConfig(), chunk_length=8, prefixes=(1, 3), has_engine=False)


@pytest.mark.parametrize("mode", CODES)
def test_the_default_sizes_as_they_are_deployed(mode: DeployMode, library_of: LibraryOf) -> None:
    library = library_of(default_sizes(mode), NATIVE)
    _, tokens, _ = library.encode(random_actions(library.recipe, 200))
    assert len(np.unique(tokens)) >= 3
    check_encoder(library, random_actions(library.recipe, 200))
    check_decoders(library, 200)


@pytest.mark.parametrize("mode", CODES)
@pytest.mark.parametrize("gain", [10.0, 100.0, 1e18])
def test_no_sum_is_too_large_for_mish(gain: float, mode: DeployMode, tmp_path_factory: pytest.TempPathFactory) -> None:
    """exp of a hidden unit overflows float32 from 88 on, its square from 44: no token and no action may do that."""
    deployed = deploy(Recipe(mode))
    for layer in (deployed.reference.encoder[0], deployed.reference.decoder[0]):
        layer.weight.abs_().mul_(gain)
    for layer in (deployed.reference.encoder[2], deployed.reference.decoder[2]):
        layer.weight.div_(gain)
    deployed.exported = deployed.reference
    library = compiled(deployed, tmp_path_factory)
    check_encoder(library, random_actions(deployed.recipe, 50))
    check_decoders(library, 50)


@pytest.mark.parametrize("mode", CODES)
@pytest.mark.parametrize("num_levels", [2, 5, 8])
def test_a_latent_on_an_edge_goes_to_the_lower_level(
    num_levels: int, mode: DeployMode, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Zero weights make every latent exactly zero, which is an edge where K is even; sigma is zero in `dynamic`."""
    deployed = deploy(Recipe(mode, ModelConfig(3, 4, 8, 3, num_levels)))
    for parameter in deployed.exported.encoder.parameters():
        parameter.zero_()
    deployed.exported.quantizer.mean.zero_()
    _, tokens, _ = compiled(deployed, tmp_path_factory).encode(random_actions(deployed.recipe, 3))
    assert (tokens[..., 0] == (num_levels - 1) // 2).all()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("mode", CODES)
def test_the_largest_legal_actions_have_the_references_tokens(
    mode: DeployMode, sign: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Where all hidden units are far below zero, Mish is zero: nothing large may be left of them."""
    deployed = deploy(Recipe(mode))
    deployed.reference.encoder[0].weight.abs_()
    deployed.exported = deployed.reference
    sizes = sign * action_limit(plans(deployed)[0]) * np.array([1, 0.5, 0.1, 1e-2, 1e-3, 1e-10, 1e-20, 1e-30])
    actions = np.broadcast_to(sizes[:, None, None], (8, 2, 3)).astype(np.float32)
    status, tokens, _ = compiled(deployed, tmp_path_factory).encode(actions.copy())
    assert status == OK
    # Not by `check_tokens`: float32's own error, bounded by the size of the sums, would excuse anything here.
    np.testing.assert_array_equal(tokens, deployed.reference.encode(torch.from_numpy(actions.copy()).double())[0])


# --- batches and places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", CODES)
def test_a_chunk_has_the_same_bits_whatever_stands_beside_it(mode: DeployMode, library_of: LibraryOf) -> None:
    """Whole blocks and the last few steps alike."""
    library = library_of(Recipe(mode, chunk_length=3), C_FLAGS)
    actions = random_actions(library.recipe, 21)
    _, tokens, stats = library.encode(actions)
    _, decoded = library.decode(tokens, stats)
    for size in (1, 2, 3, 5, 7, 20):
        for start in range(0, 21 - size + 1, size):
            part = slice(start, start + size)
            status, few_tokens, few_stats = library.encode(actions[part])
            assert status == OK
            np.testing.assert_array_equal(few_tokens, tokens[part])
            if stats is not None and few_stats is not None:
                np.testing.assert_array_equal(few_stats, stats[part])
            status, few_decoded = library.decode(few_tokens, few_stats)
            assert status == OK
            np.testing.assert_array_equal(few_decoded, decoded[part])


@pytest.mark.parametrize("mode", MODES)
def test_no_chunk_at_all_is_nothing_to_do(mode: DeployMode, library_of: LibraryOf) -> None:
    library = library_of(Recipe(mode))
    status, tokens, stats = library.encode(random_actions(library.recipe, 0))
    assert status == OK
    assert library.decode(tokens, stats)[0] == OK


@pytest.mark.parametrize("mode", CODES)
def test_arrays_need_no_more_alignment_than_their_type(mode: DeployMode, library_of: LibraryOf) -> None:
    """All but the library's outputs, which stand like this in every test."""
    library = library_of(default_sizes(mode), NATIVE)
    aligned = random_actions(library.recipe, 5)
    actions = library.place(aligned.shape, np.float32)
    actions[...] = aligned
    assert actions.ctypes.data % 64 == 4
    found, expected = library.encode(actions), library.encode(aligned)
    for one, other in zip(found[1:], expected[1:], strict=True):
        if one is not None and other is not None:
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(library.decode(*found[1:])[1], library.decode(*expected[1:])[1])


def test_nobody_need_want_statistics(library_of: LibraryOf) -> None:
    library = library_of(Recipe(DeployMode.DYNAMIC))
    actions = random_actions(library.recipe, 5)
    status, tokens, stats = library.encode(actions, wants_stats=False)
    assert status == OK
    assert stats is not None
    assert (stats == UNTOUCHED).all()
    np.testing.assert_array_equal(tokens, library.encode(actions)[1])


# --- illegal values ---------------------------------------------------------------------------------------------------

#: The first, one within a block, and the last, behind all whole blocks.
PLACES = [0, 4, -1]


def with_value(array: Array, place: int, value: object) -> Array:
    changed = array.copy()
    changed.reshape(-1)[place] = value
    return changed


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES)
def test_illegal_actions_are_refused_and_nothing_is_written(
    mode: DeployMode, place: int, library_of: LibraryOf
) -> None:
    library = library_of(Recipe(mode))
    actions = random_actions(library.recipe, 5)
    limit = np.float32(action_limit(plans(library.deployed)[0]))
    above = np.nextafter(limit, np.float32(np.inf))
    for value in (np.nan, np.inf, -np.inf, above, -above, np.finfo(np.float32).max):
        status, tokens, stats = library.encode(with_value(actions, place, value))
        assert status == ILLEGAL_VALUE, value
        assert (tokens == UNTOUCHED).all()
        assert stats is None or (stats == UNTOUCHED).all()
    for value in (limit, -limit, 0.0, 1e-45):
        assert library.encode(with_value(actions, place, value))[0] == OK, value


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", MODES)
def test_illegal_tokens_are_refused_and_nothing_is_written(mode: DeployMode, place: int, library_of: LibraryOf) -> None:
    library = library_of(Recipe(mode))
    for prefix in (2, 3):
        tokens = random_tokens(library.recipe, 5, prefix)
        stats = random_stats(tokens) if mode.has_stats else None
        for value in (-1, 5, 6, 2**31 - 1, -(2**31), -(2**31) + 1, 2**24, 256):
            status, actions = library.decode(with_value(tokens, place, value), stats)
            assert status == ILLEGAL_VALUE, value
            assert (actions == UNTOUCHED).all()
        for value in (0, 4):
            assert library.decode(with_value(tokens, place, value), stats)[0] == OK, value


@pytest.mark.parametrize("mode", MODES)
def test_of_a_long_batch_nothing_is_written_from_the_block_on_that_holds_the_illegal_value(
    mode: DeployMode, library_of: LibraryOf
) -> None:
    """Blocks of as many steps as the header says; what stands before them is right, and what follows untouched."""
    chunk_length = 3
    library = library_of(Recipe(mode, chunk_length=chunk_length), C_FLAGS)
    (checked,) = re.findall(r"#define RFSQ_CHECKED_STEPS (\d+)", generate_c(library.deployed).header)
    block = int(checked)
    num_chunks = 3 * block // chunk_length + 1
    steps = num_chunks * chunk_length
    actions = random_actions(library.recipe, num_chunks)
    _, tokens, stats = library.encode(actions)
    _, decoded = library.decode(tokens, stats)
    for step in (0, block - 1, block, 2 * block + 1, steps - 1):
        first = step // block * block
        wrong_actions = with_value(actions, step * 3 + 2, np.nan)
        status, found, _ = library.encode(wrong_actions)
        assert status == ILLEGAL_VALUE
        check_written_before(found, tokens, first)
        status, found = library.decode(with_value(tokens, step * 12 + 11, 5), stats)
        assert status == ILLEGAL_VALUE
        check_written_before(found, decoded, first)


def check_written_before(found: Array, expected: Array, first: int) -> None:
    found, expected = (array.reshape(-1, *array.shape[2:]) for array in (found, expected))
    np.testing.assert_array_equal(found[:first], expected[:first])
    assert (found[first:] == UNTOUCHED).all()


@pytest.mark.parametrize("place", [0, 4, -2], ids=["first", "within", "last"])
def test_statistics_that_no_encoder_gives_are_refused_and_nothing_is_written(place: int, library_of: LibraryOf) -> None:
    library = library_of(Recipe(DeployMode.DYNAMIC))
    for prefix in (2, 3):
        tokens = random_tokens(library.recipe, 5, prefix)
        stats = random_stats(tokens)
        wrong = [(0, value) for value in (np.nan, np.inf, -np.inf, 5, -5)]
        wrong += [(1, value) for value in (np.nan, np.inf, -np.inf, 5, -1, 0, -0.0)]
        for part, value in wrong:
            status, actions = library.decode(tokens, with_value(stats, place + part, value))
            assert status == ILLEGAL_VALUE, (part, value)
            assert (actions == UNTOUCHED).all()
        for part, value in ((0, 4), (0, -4), (0, 0), (1, 4), (1, 1e-5)):
            assert library.decode(tokens, with_value(stats, place + part, value))[0] == OK, (part, value)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_text_holds_nothing_that_is_not_the_model(mode: DeployMode) -> None:
    generated = generate_c(deploy(Recipe(mode)))
    for text in (generated.header, generated.source):
        assert text.isascii()
        assert "@" not in re.sub(r"@(file|brief|param|return)", "", text)
        assert str(ROOT) not in text
    included = set(re.findall(r"#include (\S+)", generated.source))
    # The last one where the processor has what it is for.
    beliefs = set() if mode.has_stats else {"<immintrin.h>"}
    assert included == {'"rfsq_tokenizer.h"', "<math.h>", "<string.h>"} | beliefs
    assert set(re.findall(r"#include (\S+)", generated.header)) == {"<stddef.h>", "<stdint.h>"}
    assert f'#define RFSQ_FINGERPRINT "{fingerprint_of(Recipe(mode))}"' in generated.header
    assert not re.search(r"\b(malloc|calloc|alloca|printf|fopen|double)\b", generated.source)
    # No state: what is static is constant, or a function.
    assert not re.search(r"^\s*static (?!_Alignas\(64\) const |inline |int |void )", generated.source, re.MULTILINE)


def test_the_code_of_none_is_that_of_calibrated_with_other_numbers() -> None:
    """So that what is seen of one mode's code, by any compiler, holds for both."""
    for recipe in (Recipe(), Recipe(config=ModelConfig(5, 3, 13, 3, 2)), default_sizes(DeployMode.CALIBRATED)):
        none, calibrated, recovered = (
            without_numbers(generate_c(deploy(replace(recipe, mode=mode))).source)
            for mode in (DeployMode.NONE, DeployMode.CALIBRATED, DeployMode.RECOVERED)
        )
        assert none == calibrated != recovered


def tables(source: str) -> dict[str, Array]:
    """Every constant array by its name, from the digits that stand there."""
    found = {}
    for name, shape, body in re.findall(
        r"static _Alignas\(64\) const float (\w+)((?:\[\d+\])+) = \{(.*?)\n\};", source, re.DOTALL
    ):
        sizes = [int(size) for size in re.findall(r"\d+", shape)]
        texts = re.findall(r"[^\s,{}]+", body)
        assert all(text.endswith("f") for text in texts)
        numbers = np.array([float.fromhex(text[:-1]) for text in texts])
        # No compiler has anything to round.
        np.testing.assert_array_equal(numbers, numbers.astype(np.float32))
        found[name] = numbers.astype(np.float32).reshape(sizes)
    return found


def is_padded(table: Array, expected: Array, lanes: int = 8) -> bool:
    """Whether the table holds exactly these numbers, and zeros behind its rows up to whole groups of `lanes`."""
    if table.size == expected.size:
        return bool(np.array_equal(table.ravel(), expected.ravel()))
    columns = expected.shape[-1]
    return (
        table.shape == (*expected.shape[:-1], columns + -columns % lanes)
        and bool(np.array_equal(table[..., :columns], expected))
        and not table[..., columns:].any()
    )


def own_tokens_alone(weight: Array, layers: int) -> Array:
    """[D, l] of a weight [D, D * l] that is zero elsewhere; or, where it is not, the weight as it is stored."""
    latents = np.arange(len(weight))
    whole = weight.reshape(len(weight), len(weight), layers)
    own = whole[latents, latents]
    rest = whole.copy()
    rest[latents, latents] = 0
    return weight.T if rest.any() else own


@given(recipe=recipes())
@settings(max_examples=30)
def test_every_number_is_the_plans_own_to_the_last_bit(recipe: Recipe) -> None:
    deployed = deploy(recipe)
    encoder, decoders = plans(deployed)
    expected = {"ENCODER_FIRST": encoder.first, "ENCODER_SECOND": encoder.second}
    found = tables(generate_c(deployed).source)
    for decoder in decoders:
        name = f"L{decoder.prefix}"
        assert is_padded(found.pop(f"{name}_HIDDEN_WEIGHT"), decoder.hidden.weight.T, 16), name
        assert is_padded(found.pop(f"{name}_HIDDEN_BIAS"), decoder.hidden.bias, 16), name
        # Its inputs are the lanes.
        assert is_padded(found.pop(f"{name}_SECOND_WEIGHT"), decoder.second.weight, 16), name
        np.testing.assert_array_equal(found.pop(f"{name}_SECOND_BIAS"), decoder.second.bias)
        if decoder.latents is not None:
            # The same once more, for how much each latent moves a hidden unit, and each token a latent.
            assert is_padded(found.pop(f"{name}_HIDDEN_BY_UNIT"), decoder.hidden.weight), name
            if decoder.own_tokens is None:
                assert is_padded(found.pop(f"{name}_LATENTS_BY_TOKEN"), decoder.latents.weight), name
    for name, layer in expected.items():
        assert is_padded(found.pop(f"{name}_WEIGHT"), layer.weight.T), name
        assert is_padded(found.pop(f"{name}_BIAS"), layer.bias), name
    for decoder in decoders:
        if decoder.latents is not None:
            name = f"L{decoder.prefix}_TO_LATENTS"
            weight = own_tokens_alone(decoder.latents.weight, decoder.prefix)
            assert is_padded(found.pop(f"{name}_WEIGHT"), weight), name
            assert is_padded(found.pop(f"{name}_BIAS"), decoder.latents.bias), name
    if isinstance(encoder.quantizer, AffineQuantizer):
        assert is_padded(found.pop("BIN_RATIO"), encoder.quantizer.ratio)
        assert is_padded(found.pop("BIN_SHIFT"), encoder.quantizer.shift)
    if encoder.offset.any():
        # For every step of a block, so that one loop runs over all of them.
        np.testing.assert_array_equal(found.pop("OFFSETS"), np.tile(encoder.offset, 8))
    assert found == {}


def test_numbers_that_are_neither_round_nor_normal_are_written_exactly() -> None:
    deployed = deploy(Recipe())
    odd = [1e-45, -1e-40, 0.1, -0.0, np.pi, 1 / 3, 16777217.0, -1e-38]
    with torch.no_grad():
        deployed.exported.encoder[2].bias[:] = torch.tensor(odd[:4])
        deployed.exported.encoder[2].weight[0, :] = torch.tensor(odd)
    found = tables(generate_c(deployed).source)
    np.testing.assert_array_equal(found["ENCODER_SECOND_BIAS"][:4], np.array(odd[:4], np.float32))
    np.testing.assert_array_equal(found["ENCODER_SECOND_WEIGHT"][:, 0], np.array(odd, np.float32))
    assert np.signbit(found["ENCODER_SECOND_BIAS"][3])


@pytest.mark.parametrize("mode", MODES)
def test_many_levels_are_counted_exactly(mode: DeployMode, library_of: LibraryOf) -> None:
    """Of 20,001 levels in one layer; float32 resolves them no finer."""
    config = ModelConfig(action_dim=3, latent_dim=4, hidden_width=8, num_layers=1, num_levels=20_001)
    library = library_of(Recipe(mode, config, prefixes=(), has_engine=False))
    check_decoders(library, 50)
    status, tokens, _ = library.encode(random_actions(library.recipe, 50))
    assert status == OK
    assert tokens.min() >= 0
    assert tokens.max() < 20_001
    assert len(np.unique(tokens)) > 200
