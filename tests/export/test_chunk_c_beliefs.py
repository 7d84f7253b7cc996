"""The generated C of beliefs, chunk tokens: the reference's expected actions, decode's where all is certain."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsq.export.c_builder import C_FLAGS, SOURCE_NAME
from rfsq.rfsq_ref.beliefs import BitProbabilities, bits_of_tokens, chunk_belief
from rfsq.rfsq_ref.chunk_bits import binary
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.bundle.backend_specs import BACKENDS
from rfsq.runtime.bundle.comparison import action_errors
from tests.export.c_library import FOLDER, ILLEGAL_VALUE, OK, UNTOUCHED, Array, run
from tests.export.chunk_c_library import Library, random_tokenizer, random_tokens, write_code
from tests.export.test_c_beliefs import ACTION_ERROR, DEVIATION_ERROR, one_hot, softmax
from tests.export.test_c_compilers import COMPILERS, SANITIZERS, needs
from tests.export.test_c_source import NATIVE, QUICK, with_value
from tests.rfsq_ref.test_chunk_code import any_sizes

CHECKED_STEPS = BACKENDS["c"].checked_steps
SIZES = ChunkSizes(3, 4, num_classes=6, token_bits=7, num_tokens=12)
Given = tuple[Array, ...]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("code"), random_tokenizer(SIZES, seed=1), NATIVE)


def num_bits(sizes: ChunkSizes, length: int) -> int:
    return length * sizes.token_bits - sizes.class_bits


def random_words(sizes: ChunkSizes, count: int, length: int, spread: float) -> Given:
    """Logits of the first tokens."""
    shape = (count, length, 1 << sizes.token_bits)
    return ((np.random.default_rng(6).normal(size=shape) * spread).astype(np.float32),)


def random_pair(sizes: ChunkSizes, count: int, length: int, spread: float) -> Given:
    """Logits of classes and bits; some classes cannot be."""
    generator = np.random.default_rng(7)
    classes = generator.normal(size=(count, sizes.num_classes)) * spread
    classes[:, 1:][generator.random((count, sizes.num_classes - 1)) < 0.2] = -np.inf
    bits = generator.normal(size=(count, num_bits(sizes, length))) * spread
    return classes.astype(np.float32), bits.astype(np.float32)


def probabilities(logits: Given, sharpness: Array | None = None) -> tuple[torch.Tensor, ...]:
    """In float64."""
    if len(logits) == 1:
        return (softmax(logits[0], sharpness),)
    own = np.ones(1 + logits[1].shape[1], np.float32) if sharpness is None else sharpness
    bits = torch.from_numpy(logits[1]).double() * torch.from_numpy(own[1:]).double()
    return (torch.from_numpy(logits[0]).double() * float(own[0])).softmax(-1), bits.sigmoid()


def rounded(exact: tuple[torch.Tensor, ...]) -> tuple[Given, tuple[torch.Tensor, ...]]:
    """To float32, and what these numbers say in float64."""
    given = tuple(part.float().numpy() for part in exact)
    first, *rest = (torch.from_numpy(part).double() for part in given)
    return given, (first / first.sum(-1, keepdim=True), *rest)


def known(sizes: ChunkSizes, exact: tuple[torch.Tensor, ...]) -> BitProbabilities:
    if len(exact) == 1:
        return bits_of_tokens(exact[0], sizes)
    return BitProbabilities(exact[0], exact[1].unsqueeze(1).expand(-1, sizes.num_classes, -1))


def check(
    library: Library,
    found: tuple[int, Array, Array, Array],
    exact: tuple[torch.Tensor, ...],
    *,
    keeps_mode: bool = False,
) -> None:
    """Against the definition in float64, of the probabilities that were given."""
    tokenizer = library.tokenizer
    way = "likeliest mode" if keeps_mode else "expected"
    belief = chunk_belief(tokenizer, known(library.sizes, exact), way, None)
    status, actions, deviations, mode_probability, mode = found
    assert status == OK
    worst = action_errors(belief.actions.numpy(), actions, tokenizer.units.numpy())
    assert worst.value <= ACTION_ERROR, worst
    std = belief.std.numpy()
    # Where nearly all is certain, float64 itself loses it: of a probability p it holds 1 - p to 1e-16.
    limit = DEVIATION_ERROR * std.max((1, 2), keepdims=True) + 1e-7 * tokenizer.units.numpy()
    assert (np.abs(deviations - std) <= limit).all()
    np.testing.assert_allclose(mode_probability, belief.mode_probability.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(mode, belief.mode.numpy())


def check_all(library: Library, count: int, length: int, spread: float) -> None:
    sizes = library.sizes
    for logits in (random_words(sizes, count, length, spread), random_pair(sizes, count, length, spread)):
        given, exact = rounded(probabilities(logits))
        # One for each token; or of the class and of each bit.
        places = length if len(logits) == 1 else 1 + num_bits(sizes, length)
        sharpness = np.random.default_rng(8).uniform(0.5, 2, places).astype(np.float32)
        for keeps_mode in (False, True):
            found = library.believe(logits, is_logits=True, keeps_mode=keeps_mode, sharpness=sharpness)
            check(library, found, probabilities(logits, sharpness), keeps_mode=keeps_mode)
            found = library.believe(given, is_logits=False, keeps_mode=keeps_mode)
            check(library, found, exact, keeps_mode=keeps_mode)


def least_tokens(sizes: ChunkSizes) -> int:
    """The fewest that say more than the class."""
    return 1 + (sizes.class_bits == sizes.token_bits)


@given(
    sizes=any_sizes(), seed=st.integers(0, 2**32), count=st.integers(1, 20), spread=st.sampled_from([0.1, 2.0, 20.0])
)
@settings(max_examples=15)
def test_a_code_of_any_size_gives_the_references_answers(
    sizes: ChunkSizes, seed: int, count: int, spread: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    library = Library(tmp_path_factory.mktemp("code"), random_tokenizer(sizes, seed))
    for length in {least_tokens(sizes), (sizes.num_tokens + 2) // 2, sizes.num_tokens}:
        check_all(library, count, length, spread)
        check_certain(library, count, length)


@pytest.mark.parametrize(
    "sizes",
    [
        ChunkSizes(1, 1, num_classes=2, token_bits=4, num_tokens=1),
        ChunkSizes(1, 1, num_classes=2, token_bits=16, num_tokens=1),
        ChunkSizes(2, 64, num_classes=3, token_bits=12, num_tokens=5),
        ChunkSizes(3, 1, num_classes=256, token_bits=8, num_tokens=4),
        ChunkSizes(64, 1, num_classes=3, token_bits=9, num_tokens=20),
        # More tokens than latents can use, and as many as escape can.
        ChunkSizes(3, 5, num_classes=4, token_bits=8, num_tokens=33),
    ],
    ids=str,
)
def test_the_ends_of_what_sizes_may_be(sizes: ChunkSizes, tmp_path: Path) -> None:
    library = Library(tmp_path, random_tokenizer(sizes, seed=1))
    for length in {least_tokens(sizes), sizes.num_tokens}:
        check_all(library, 4, length, 2.0)
        check_certain(library, 20, length)


@pytest.mark.parametrize("target", [target for target in host_targets() if target.startswith("x86-64")])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_target_gives_the_references_answers(compiler: str, target: str, tmp_path: Path) -> None:
    library = Library(tmp_path, random_tokenizer(SIZES, seed=2), (*C_FLAGS, f"-march={target}"), compiler)
    for length in (1, 5, 12):
        check_all(library, 30, length, 2.0)
        check_certain(library, 100, length)


# --- what is certain --------------------------------------------------------------------------------------------------


def certain_pair(sizes: ChunkSizes, tokens: Array, *, is_logits: bool) -> Given:
    """Classes and bits that the tokens name."""
    bits = binary(torch.from_numpy(tokens).long(), sizes.token_bits).flatten(1).numpy()
    number = tokens[:, 0] >> sizes.token_bits - sizes.class_bits
    classes = one_hot(np.minimum(number, sizes.escape), sizes.num_classes, is_logits=is_logits)
    certain = np.where(bits, 1e30, -np.inf) if is_logits else bits
    return classes, np.ascontiguousarray(certain[:, sizes.class_bits :], np.float32)


def check_certain(library: Library, count: int, length: int) -> None:
    """Of every class and escape, and of the numbers behind it."""
    sizes = library.sizes
    tokens = random_tokens(sizes, count, length, seed=9)
    expected = library.decode(tokens)[1]
    for is_logits in (False, True):
        words = (one_hot(tokens, 1 << sizes.token_bits, is_logits=is_logits),)
        for certain in (words, certain_pair(sizes, tokens, is_logits=is_logits)):
            status, actions, deviations, mode_probability, _ = library.believe(certain, is_logits=is_logits)
            assert status == OK
            np.testing.assert_array_equal(actions, expected)
            assert (deviations == 0).all()
            assert (mode_probability == 1).all()


@pytest.mark.parametrize("flags", [QUICK, C_FLAGS, NATIVE], ids=["unoptimised", "baseline", "native"])
def test_certain_tokens_give_the_bits_of_decode(flags: tuple[str, ...], tmp_path: Path) -> None:
    library = Library(tmp_path, random_tokenizer(SIZES, seed=3), flags)
    for length in range(1, 13):
        check_certain(library, 100, length)


def check_ties(library: Library) -> None:
    """The class that is named is the one that is decoded; of classes as likely, the first."""
    count, bits = library.sizes.num_classes, np.full((1, num_bits(library.sizes, 3)), 0.75, np.float32)
    near = 1 + np.random.default_rng(11).integers(-4, 5, (40, count)) * np.finfo(np.float32).eps
    for classes in near.astype(np.float32)[:, None]:
        for own, is_logits in ((classes, True), (classes / count, False)):
            tied = library.believe((own, bits), is_logits=is_logits, keeps_mode=True)
            [mode] = tied[4]
            assert own[0, mode] == pytest.approx(own.max(), rel=1e-6)
            assert own[0, mode] > own[0, :mode].max(initial=-np.inf) or is_logits
            certain = one_hot(np.int32([mode]), count, is_logits=is_logits)
            alone = library.believe((certain, bits), is_logits=is_logits)
            for one, other in zip(tied[:3], alone[:3], strict=True):
                np.testing.assert_array_equal(one, other)
    tied = library.believe((np.ones((1, count), np.float32), bits), is_logits=True)
    assert tied[4] == [0]


def test_the_class_that_is_named_is_the_one_that_is_decoded(library: Library) -> None:
    check_ties(library)


# --- one bit ----------------------------------------------------------------------------------------------------------


def test_the_last_of_many_bits_alone_spreads_as_exactly_as_the_first(tmp_path: Path) -> None:
    sizes = ChunkSizes(1, 1, num_classes=2, token_bits=16, num_tokens=1)
    library = Library(tmp_path, random_tokenizer(sizes, seed=1), NATIVE)
    classes = one_hot(np.zeros(100, np.int32), 2, is_logits=False)
    bits = np.random.default_rng(12).integers(2, size=(100, 15)).astype(np.float32)
    bits[:, -1] = 0.5
    _, actions, deviations, _, _ = library.believe((classes, bits), is_logits=False)
    exact = known(sizes, (torch.from_numpy(classes).double(), torch.from_numpy(bits).double()))
    belief = chunk_belief(library.tokenizer, exact, "expected", None)
    np.testing.assert_allclose(deviations, belief.std, rtol=DEVIATION_ERROR)
    np.testing.assert_allclose(actions, belief.actions, atol=1e-5)


# --- batches, sizes of numbers ----------------------------------------------------------------------------------------


def logits_of_both(count: int) -> list[Given]:
    return [random_words(SIZES, count, 5, 2), random_pair(SIZES, count, 5, 2)]


def part_of(given: Given, part: slice) -> Given:
    return tuple(np.ascontiguousarray(array[part]) for array in given)


@pytest.mark.parametrize("form", [0, 1], ids=["words", "pair"])
def test_a_chunk_has_the_same_bits_whatever_stands_beside_it_and_is_wanted(form: int, library: Library) -> None:
    logits = logits_of_both(CHECKED_STEPS // 4 + 3)[form]
    _, *expected = library.believe(logits, is_logits=True)
    for part in (slice(0, 1), slice(3, 10), slice(20, None)):
        for one, other in zip(library.believe(part_of(logits, part), is_logits=True)[1:], expected, strict=True):
            np.testing.assert_array_equal(one, other[part])
    _, actions, *others = library.believe(logits, is_logits=True, wants_all=False)
    np.testing.assert_array_equal(actions, expected[0])
    assert all((other == UNTOUCHED).all() for other in others)
    assert library.believe(part_of(logits, slice(0, 0)), is_logits=True)[0] == OK


@pytest.mark.parametrize("form", [0, 1], ids=["words", "pair"])
def test_logits_of_any_finite_size_do_not_overflow(form: int, library: Library) -> None:
    largest = np.finfo(np.float32).max
    choices = np.float32([-largest, -1e30, -100, 0, 1e-45, 90, 1e30, largest])
    generator = np.random.default_rng(10)
    logits = tuple(generator.choice(choices, part.shape) for part in logits_of_both(20)[form])
    check(library, library.believe(logits, is_logits=True), probabilities(logits))


# --- illegal values ---------------------------------------------------------------------------------------------------


def check_refused(library: Library, given: Given, *, is_logits: bool) -> None:
    status, *outputs = library.believe(given, is_logits=is_logits)
    assert status == ILLEGAL_VALUE
    assert all((output == UNTOUCHED).all() for output in outputs)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, 0, -1, 1e-40])
@pytest.mark.parametrize("form", [0, 1], ids=["words", "pair"])
def test_a_sharpness_that_no_temperature_has_is_refused(form: int, value: float, library: Library) -> None:
    logits = logits_of_both(2)[form]
    sharpness = np.ones(1 + logits[-1].shape[1], np.float32)
    for place in (0, logits[-1].shape[1] - 1):
        wrong = with_value(sharpness, place, value)
        status, *outputs = library.believe(logits, is_logits=True, sharpness=wrong)
        assert status == ILLEGAL_VALUE
        assert all((output == UNTOUCHED).all() for output in outputs)


@pytest.mark.parametrize("place", [0, 5, -1])
@pytest.mark.parametrize("form", [0, 1], ids=["words", "pair"])
def test_illegal_values_are_refused_and_nothing_is_written(form: int, place: int, library: Library) -> None:
    logits = logits_of_both(CHECKED_STEPS // 4)[form]
    legal, _ = rounded(probabilities(logits))
    assert library.believe(legal, is_logits=False)[0] == OK
    for index in range(len(logits)):
        for value in (np.nan, -np.nan, np.inf, -np.inf, -1e-45, 1.5):
            wrong = [with_value(part, place, value) if i == index else part for i, part in enumerate(legal)]
            check_refused(library, tuple(wrong), is_logits=False)
        for value in (np.nan, -np.nan, np.inf):
            wrong = [with_value(part, place, value) if i == index else part for i, part in enumerate(logits)]
            check_refused(library, tuple(wrong), is_logits=True)
    forbidden = logits[0].copy()
    forbidden.reshape(-1, forbidden.shape[-1])[place] = -np.inf
    check_refused(library, (forbidden, *logits[1:]), is_logits=True)
    check_refused(library, (legal[0] * np.float32(1.005), *legal[1:]), is_logits=False)
    assert library.believe((legal[0] * np.float32(1.0035), *legal[1:]), is_logits=False)[0] == OK


def test_numbers_of_tokens_and_bits_that_no_chunk_has_are_refused(library: Library) -> None:
    words = np.zeros((2, 13, 128), np.float32)
    for length in (0, 13):
        check_refused(library, (np.ascontiguousarray(words[:, :length]),), is_logits=True)
    classes = np.zeros((2, 6), np.float32)
    for count in (0, 3, 5, 10, num_bits(SIZES, 12) + 1, num_bits(SIZES, 13)):
        check_refused(library, (classes, np.zeros((2, count), np.float32)), is_logits=True)
    for count in (4, 11, num_bits(SIZES, 12)):
        assert library.believe((classes, np.zeros((2, count), np.float32)), is_logits=True)[0] == OK


@needs("gcc", "gcc")
@pytest.mark.parametrize("sizes", [ChunkSizes(2, 3, 5, 6, 9), ChunkSizes(3, 16, 3, 8, 4)], ids=str)
def test_sanitizers_find_nothing(sizes: ChunkSizes, tmp_path: Path) -> None:
    """In arrays of exactly their size, legal values and illegal ones."""
    write_code(tmp_path, random_tokenizer(sizes, seed=1))
    flags = ("-std=c11", "-O1", *SANITIZERS)
    run(["gcc", *flags, "-I.", FOLDER / "chunk_beliefs_misuse.c", SOURCE_NAME, "-lm", "-o", "misuse"], tmp_path)
    assert run([tmp_path / "misuse"], tmp_path) == "nothing found\n"
