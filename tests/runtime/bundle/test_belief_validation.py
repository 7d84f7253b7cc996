"""Distributions that are none are refused by name and place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfsq.runtime import InvalidInputError, UnbuiltPrefixError
from rfsq.runtime.bundle.belief_validation import BeliefValidator, check_probabilities
from rfsq.runtime.bundle.models import ChunkModel, ModelEntry, StepModel
from tests.bundles import Recipe, deploy, model_entry
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens

STEPS: StepModel = model_entry(deploy(Recipe()))
CHUNKS: ChunkModel = deployed_chunk_tokens(ChunkRecipe()).model


def uniform(*shape: int) -> Any:
    return np.full(shape, 1 / shape[-1], np.float32)


def changed(array: Any, place: tuple[int, ...], value: float) -> Any:
    array = array.copy()
    array[place] = value
    return array


def refuse(model: ModelEntry, value: Any, message: str, *, is_logits: bool = False) -> None:
    with pytest.raises(InvalidInputError, match=message):
        BeliefValidator(model).given(value, is_logits=is_logits)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (uniform(2, 2, 4, 3, 4), r"probabilities have shape \[2, 2, 4, 3, 4\]; .* = \[B, 2, 4, l, 5\]"),
        (uniform(2, 4, 3, 5), r"have shape \[2, 4, 3, 5\]; .*; for a single chunk pass probabilities\[None\]$"),
        (uniform(2, 3, 5), r"have shape \[2, 3, 5\]; expected \[B, T, D, l, K\] = \[B, 2, 4, l, 5\]$"),
        (uniform(2, 2, 4, 3, 5).astype(np.float64), r"have type float64; expected float32.*astype\(np.float32\)"),
        (uniform(2, 2, 4, 3, 5).tolist(), r"is a builtins.list; expected a numpy.ndarray"),
        ((uniform(2, 6), uniform(2, 5)), "are a tuple; expected one array"),
        (changed(uniform(2, 2, 4, 3, 5), (1, 0, 3, 2, 4), np.nan), r"probabilities\[1, 0, 3, 2, 4\] is nan"),
        (changed(uniform(2, 2, 4, 3, 5), (1, 0, 3, 2, 4), -1e-9), r"probabilities\[1, 0, 3, 2, 4\] is -9\.9"),
        (changed(uniform(2, 2, 4, 3, 5), (1, 0, 3, 2, 4), np.inf), r"probabilities\[1, 0, 3, 2\] sum to inf"),
        (changed(uniform(2, 2, 4, 3, 5), (1, 0, 3, 2, 4), 0.205), r"\[1, 0, 3, 2\] sum to 1\.005; .* 0\.00390625"),
    ],
)
def test_steps_that_are_no_distributions_are_refused(value: Any, message: str) -> None:
    refuse(STEPS, value, message)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((0, 1, 2, 1, 3), np.nan, r"logits\[0, 1, 2, 1, 3\] is nan"),
        ((0, 1, 2, 1, 3), np.inf, r"logits\[0, 1, 2, 1, 3\] is inf; expected a finite number, or -inf"),
        ((0, 1, 2, 1), -np.inf, r"logits\[0, 1, 2, 1\] are all -inf"),
    ],
)
def test_logits_that_mean_nothing_are_refused(place: tuple[int, ...], value: float, message: str) -> None:
    refuse(STEPS, changed(np.zeros((1, 2, 4, 2, 5), np.float32), place, value), message, is_logits=True)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([7, 64, 1024]),
    st.floats(-3, 2).map(lambda power: 10**power),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.booleans(),
)
def test_what_softmax_gives_in_half_precision_is_a_distribution(
    seed: int, words: int, scale: float, dtype: torch.dtype, are_logits_half: bool
) -> None:
    logits = scale * torch.randn(200, words, generator=torch.Generator().manual_seed(seed))
    shares = logits.to(dtype).softmax(-1) if are_logits_half else logits.softmax(-1).to(dtype)
    check_probabilities("probabilities", shares.float().numpy())


def test_so_is_one_whose_parts_all_round_the_same_way() -> None:
    """1/255 is 1.0039 times a power of 2, and its neighbours in bfloat16 are 1 and 1.0078 times that."""
    worst = 0.0
    for words in range(2, 2049):
        shares = torch.full((1, words), 1 / words, dtype=torch.bfloat16).float().numpy()
        worst = max(worst, abs(float(shares.sum()) - 1))
        check_probabilities("probabilities", shares)
    assert worst > 0.99 * 2**-8


@pytest.mark.parametrize("words", [7, 64, 1024])
def test_what_no_rounding_explains_is_none(words: int) -> None:
    shares = torch.full((1, words), 1 / words, dtype=torch.bfloat16).float().numpy()
    for factor in (1 - 2**-7, 1 + 2**-7):
        with pytest.raises(InvalidInputError, match="expected a distribution, whose sum is 1 within"):
            check_probabilities("probabilities", shares / shares.sum() * np.float32(factor))


def test_the_largest_logits_are_taken() -> None:
    largest = np.full((1, 2, 4, 3, 5), np.finfo(np.float32).max, np.float32)
    (found,) = BeliefValidator(STEPS).given(largest, is_logits=True)
    assert found is largest


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (uniform(2, 3, 255), r"have shape \[2, 3, 255\]; expected \[B, l, V\] = \[B, l, 256\], or a pair of classes"),
        (uniform(3, 256), r"have shape \[3, 256\]; .*; for a single chunk pass probabilities\[None\]$"),
        ([uniform(2, 6), uniform(2, 5)], r"probabilities are a list; .*, or a pair as a tuple: \(classes, bits\)"),
        ((uniform(2, 6),), "a tuple of 1 was given"),
        ((uniform(2, 5), uniform(2, 5)), r"classes have shape \[2, 5\]; expected \[B, C\] = \[B, 6\]"),
        ((uniform(2, 6), uniform(3, 5)), r"bits have shape \[3, 5\]; expected \[B, n\] = \[2, n\]"),
        ((uniform(2, 6), uniform(2, 6)), r"bits have shape \[2, 6\]; .*, 5 and then 8 more .*, 69 at most"),
        ((uniform(2, 6), np.empty((2, 0), np.float32)), r"bits have shape \[2, 0\]"),
        ((uniform(2, 6), uniform(2, 77)), r"bits have shape \[2, 77\]"),
        (([[0.5] * 6] * 2, uniform(2, 5)), r"^classes is a builtins.list; expected a numpy.ndarray"),
        ((uniform(2, 6), [[0.5] * 5] * 2), r"^bits is a builtins.list; expected a numpy.ndarray"),
        ((uniform(2, 6).astype(complex), uniform(2, 5)), r"^classes have type complex128"),
        ((uniform(2, 6), uniform(2, 5).astype(complex)), r"^bits have type complex128"),
        ((uniform(2, 6) / 2, uniform(2, 5)), r"classes\[0\] sum to 0\.5"),
        ((uniform(2, 6), changed(uniform(2, 5), (1, 3), 1.01)), r"bits\[1, 3\] is 1\.0"),
        ((uniform(2, 6), changed(uniform(2, 5), (1, 3), np.nan)), r"bits\[1, 3\] is nan"),
    ],
)
def test_chunks_that_are_no_distributions_are_refused(value: Any, message: str) -> None:
    refuse(CHUNKS, value, message)


def test_bits_of_infinite_logits_are_refused_but_those_that_forbid() -> None:
    classes, bits = np.zeros((1, 6), np.float32), np.zeros((1, 5), np.float32)
    refuse(CHUNKS, (classes, changed(bits, (0, 2), np.inf)), r"bits\[0, 2\] is inf", is_logits=True)
    refuse(CHUNKS, (classes, changed(bits, (0, 2), np.nan)), r"bits\[0, 2\] is nan", is_logits=True)
    BeliefValidator(CHUNKS).given((classes, changed(bits, (0, 2), -np.inf)), is_logits=True)


@pytest.mark.parametrize("is_logits", [False, True])
@pytest.mark.parametrize(
    ("model", "shape", "found"),
    [
        (STEPS, (1, 2, 4, 1, 5), r"\[1, 2, 4, 1, 5\], of l = 1 layers; this bundle decodes 2, 3 layers.*--prefixes 1"),
        (CHUNKS, (1, 10, 256), r"\[1, 10, 256\], of l = 10 tokens; this bundle decodes any first of 9 tokens"),
        (CHUNKS, (1, 0, 256), r"\[1, 0, 256\], of l = 0 tokens"),
    ],
)
def test_layers_and_tokens_that_do_not_decode_are_refused(
    model: ModelEntry, shape: tuple[int, ...], found: str, is_logits: bool
) -> None:
    name = "logits" if is_logits else "probabilities"
    with pytest.raises(UnbuiltPrefixError, match=rf"{name} have shape {found}") as caught:
        BeliefValidator(model).given(uniform(*shape), is_logits=is_logits)
    assert f"{name}[..., :l, :]" in str(caught.value)


def test_arrays_of_another_layout_are_copied_and_others_are_not() -> None:
    given = uniform(2, 2, 4, 3, 5)
    (same,) = BeliefValidator(STEPS).given(given, is_logits=False)
    assert same is given
    (copied,) = BeliefValidator(STEPS).given(np.asfortranarray(given), is_logits=False)
    assert copied.flags.c_contiguous
    np.testing.assert_array_equal(copied, given)
    (swapped,) = BeliefValidator(STEPS).given(given.astype(">f4"), is_logits=False)
    assert swapped.dtype == np.float32
    np.testing.assert_array_equal(swapped, given)


def test_values_that_a_backend_checks_are_left_to_it() -> None:
    wrong = changed(uniform(2, 2, 4, 3, 5), (1, 0, 3, 2, 4), np.nan)
    BeliefValidator(STEPS).given(wrong, is_logits=False, unchecked=2)
    with pytest.raises(InvalidInputError, match="is nan"):
        BeliefValidator(STEPS).given(wrong, is_logits=False, unchecked=1)


@pytest.mark.parametrize(
    "temperature",
    [0, -1.0, np.nan, np.inf, 1e-39, 1e-31, 1e31, 1e60, 1e308, "warm", None, [1.0, 2.0], [[1.0, 1.0, 1.0]], [1, 1, 0]],
)
def test_temperatures_are_positive_finite_and_as_many_as_layers(temperature: Any) -> None:
    given = BeliefValidator(STEPS).given(uniform(1, 2, 4, 3, 5), is_logits=False)
    with pytest.raises(InvalidInputError, match="temperature"):
        BeliefValidator(STEPS).sharpness(temperature, given)


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        ("2", "is a builtins.str of type <U1; expected a float, or 3 of them"),
        (b"2", r"is a builtins.bytes of type \|S1"),
        (["2", 1.0, 1.0], "is a builtins.list of type <U"),
        (True, "is a builtins.bool of type bool"),
        ([True, 2.0, 2.0], "is a builtins.list of type bool"),
        ((1.0, np.True_, 1.0), "is a builtins.tuple of type bool"),
        (1 + 0j, "is a builtins.complex of type complex128"),
        (10**400, "is a builtins.int of type object"),
        (np.datetime64("2020-01-01"), "is a numpy.datetime64 of type datetime64"),
        (np.ma.masked_array([1.0, 2.0, 3.0], [0, 1, 0]), "is a numpy.ma.*MaskedArray of type float64"),
        (torch.nn.Parameter(torch.ones(3)), "is a torch.nn.parameter.Parameter; expected a float"),
        ([[1.0], [1.0, 2.0]], "is a builtins.list; expected a float"),
    ],
)
def test_temperatures_that_are_no_real_numbers_are_refused(temperature: Any, message: str) -> None:
    given = BeliefValidator(STEPS).given(uniform(1, 2, 4, 3, 5), is_logits=False)
    with pytest.raises(InvalidInputError, match=f"temperature {message}"):
        BeliefValidator(STEPS).sharpness(temperature, given)


@pytest.mark.parametrize("one", [2, 2.0, np.float16(2), np.int64(2), np.array(2.0, np.longdouble)])
def test_temperatures_of_every_type_of_real_number_are_taken(one: Any) -> None:
    given = BeliefValidator(STEPS).given(uniform(1, 2, 4, 3, 5), is_logits=False)
    for temperature in (one, [one] * 3, (one,) * 3, np.array([one] * 3)):
        assert BeliefValidator(STEPS).sharpness(temperature, given).tolist() == [0.5] * 3


def test_a_temperature_is_one_for_all_or_one_for_each() -> None:
    steps, chunks = BeliefValidator(STEPS), BeliefValidator(CHUNKS)
    given = steps.given(uniform(1, 2, 4, 3, 5), is_logits=False)
    assert steps.sharpness(2, given).tolist() == [0.5, 0.5, 0.5]
    assert steps.sharpness([1, 2, 4], given).tolist() == [1, 0.5, 0.25]
    np.testing.assert_array_equal(steps.sharpness([1e-30, 1, 1e30], given), np.float32([1e30, 1, 1e-30]))
    pair = chunks.given((uniform(1, 6), uniform(1, 5)), is_logits=False)
    assert chunks.sharpness(1.0, pair).tolist() == [1] * 6
    with pytest.raises(InvalidInputError, match=r"\[6\], one for each class and bit"):
        chunks.sharpness([1, 1], pair)
