"""What the generated CUDA makes of probabilities of chunk tokens, on the processor: the definition's answers, decode's
bits where all is certain, marks for what is illegal."""

from collections.abc import Callable

import numpy as np
import pytest

from rfsq.rfsq_ref.beliefs import chunk_belief
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.runtime.bundle.comparison import action_errors
from tests.export.chunk_c_library import random_tokens
from tests.export.test_c_beliefs import ACTION_ERROR, DEVIATION_ERROR, one_hot
from tests.export.test_chunk_c_beliefs import (
    Given,
    certain_pair,
    known,
    least_tokens,
    num_bits,
    part_of,
    probabilities,
    random_pair,
    random_words,
    rounded,
)
from tests.export.test_chunk_cuda_on_cpu import ANY_ERROR, RECIPES, Case, case, pytestmark  # noqa: F401  # the same models and machine

FORMS = pytest.mark.parametrize("form", [0, 1], ids=["words", "pair"])
#: Few, where the processor takes long for the many words of a token or the many classes.
COUNT = 3
CaseOf = Callable[[str], Case]


def logits_of(sizes: ChunkSizes, form: int, count: int, length: int, spread: float) -> Given:
    return (random_words, random_pair)[form](sizes, count, length, spread)


def lengths(sizes: ChunkSizes) -> set[int]:
    return {least_tokens(sizes), (sizes.num_tokens + 2) // 2, sizes.num_tokens}


def assert_believed(here: Case, found: list[np.ndarray], exact: tuple, keeps_mode: bool) -> None:
    model = here.deployed.reference.model
    mode = "likeliest mode" if keeps_mode else "expected"
    belief = chunk_belief(model, known(model.sizes, exact), mode, None)
    actions, std, mode_probability, classes = found
    worst = action_errors(belief.actions.numpy(), actions, model.units.numpy())
    # Sums of so many random numbers: decoding errs as much.
    assert worst.value <= (ACTION_ERROR if actions[0].size < 300 else ANY_ERROR), worst
    expected = belief.std.numpy()
    # Where nearly all is certain, float64 itself loses it: of a probability p it holds 1 - p to 1e-16.
    limit = DEVIATION_ERROR * expected.max((1, 2), keepdims=True) + 1e-7 * model.units.numpy()
    assert (np.abs(std - expected) <= limit).all(), (np.abs(std - expected) / limit).max()
    np.testing.assert_allclose(mode_probability, belief.mode_probability.numpy(), rtol=1e-6)
    assert np.array_equal(classes, belief.mode.numpy())


@FORMS
@pytest.mark.parametrize("name", RECIPES)
def test_beliefs_are_those_of_the_definition(case: CaseOf, name: str, form: int) -> None:  # noqa: F811
    here = case(name)
    sizes = here.deployed.checkpoint.sizes
    for length in lengths(sizes):
        for spread in (0.1, 2.0, 20.0):
            logits = logits_of(sizes, form, COUNT, length, spread)
            given, exact = rounded(probabilities(logits))
            places = length if len(logits) == 1 else 1 + num_bits(sizes, length)
            sharpness = np.random.default_rng(8).uniform(0.5, 2, places).astype(np.float32)
            for keeps_mode in (False, True):
                found = here.kernels.beliefs(logits, is_logits=True, keeps_mode=keeps_mode, sharpness=sharpness)
                assert_believed(here, found, probabilities(logits, sharpness), keeps_mode)
                found = here.kernels.beliefs(given, is_logits=False, keeps_mode=keeps_mode)
                assert_believed(here, found, exact, keeps_mode)


@FORMS
@pytest.mark.parametrize("name", RECIPES)
def test_a_chunk_has_the_same_bits_however_many_blocks_it_has(case: CaseOf, name: str, form: int) -> None:  # noqa: F811
    here = case(name)
    sizes = here.deployed.checkpoint.sizes
    logits = logits_of(sizes, form, COUNT, sizes.num_tokens, 2.0)
    expected = here.kernels.beliefs(logits, is_logits=True, consumers=1)
    for consumers in {2, sizes.num_classes}:
        for is_backwards in (False, True):
            found = here.kernels.beliefs(logits, is_logits=True, consumers=consumers, is_backwards=is_backwards)
            assert all(map(np.array_equal, found, expected))
    alone = here.kernels.beliefs(part_of(logits, slice(1, 2)), is_logits=True)
    assert all(np.array_equal(one, other[1:2]) for one, other in zip(alone, expected, strict=True))
    [actions] = here.kernels.beliefs(logits, is_logits=True, has_all=False)
    assert np.array_equal(actions, expected[0])


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_certain_gives_the_bits_of_decode(case: CaseOf, name: str) -> None:  # noqa: F811
    here = case(name)
    sizes = here.deployed.checkpoint.sizes
    for length in lengths(sizes):
        tokens = random_tokens(sizes, 6, length, seed=9)
        decoded = here.kernels.decode(tokens, "few")
        for is_logits in (False, True):
            words = (one_hot(tokens, 1 << sizes.token_bits, is_logits=is_logits),)
            for given in (words, certain_pair(sizes, tokens, is_logits=is_logits)):
                for keeps_mode in (False, True):
                    actions, std, probability, _ = here.kernels.beliefs(
                        given, is_logits=is_logits, keeps_mode=keeps_mode
                    )
                    assert np.array_equal(actions.view(np.int32), decoded.view(np.int32))
                    assert not std.any()
                    assert (probability == 1).all()


@FORMS
@pytest.mark.parametrize("name", ["small", "class alone", "least"])
def test_what_is_no_distribution_marks_its_chunk_and_no_other(case: CaseOf, name: str, form: int) -> None:  # noqa: F811
    here = case(name)
    sizes = here.deployed.checkpoint.sizes
    logits = logits_of(sizes, form, 8, sizes.num_tokens, 1.0)
    legal, _ = rounded(probabilities(logits))
    for is_logits, values in ((True, (np.nan, np.inf, -np.nan)), (False, (np.nan, -1e-3, 1.5, np.inf))):
        given = logits if is_logits else legal
        for index in range(len(given)):
            wrong = tuple(part.copy() for part in given)
            expected = here.kernels.beliefs(given, is_logits=is_logits)
            for turn, value in enumerate(values):
                wrong[index][2 * turn].flat[turn * 37 % wrong[index][0].size] = value
                for output, mark in zip(expected, (np.nan, np.nan, np.nan, -1), strict=True):
                    output[2 * turn] = mark
            for consumers in (1, 3):
                found = here.kernels.beliefs(wrong, is_logits=is_logits, consumers=consumers)
                for part, wanted in zip(found, expected, strict=True):
                    assert np.array_equal(part, wanted, equal_nan=part.dtype == np.float32)


def test_distributions_that_allow_nothing_or_miss_their_sum_are_none(case: CaseOf) -> None:  # noqa: F811
    here = case("small")
    sizes = here.deployed.checkpoint.sizes
    for form in (0, 1):
        logits = logits_of(sizes, form, 1, 9, 1.0)
        legal, _ = rounded(probabilities(logits))
        forbidden = logits[0].copy()
        forbidden.reshape(-1, forbidden.shape[-1])[-1] = -np.inf
        assert np.isnan(here.kernels.beliefs((forbidden, *logits[1:]), is_logits=True)[0]).all()
        for factor, is_legal in ((1.005, False), (1.0035, True)):
            given = (legal[0] * np.float32(factor), *legal[1:])
            assert np.isfinite(here.kernels.beliefs(given, is_logits=False)[0]).all() == is_legal


@FORMS
def test_logits_of_any_finite_size_do_not_overflow(case: CaseOf, form: int) -> None:  # noqa: F811
    here = case("small")
    largest = np.finfo(np.float32).max
    choices = np.float32([-largest, -1e30, -100, 0, 1e-45, 90, 1e30, largest])
    shapes = [part.shape for part in logits_of(here.deployed.checkpoint.sizes, form, 12, 9, 1.0)]
    logits = tuple(np.random.default_rng(10).choice(choices, shape) for shape in shapes)
    assert_believed(here, here.kernels.beliefs(logits, is_logits=True), probabilities(logits), False)
