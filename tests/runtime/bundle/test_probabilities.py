"""Probabilities in numpy: what logits mean, chunk tokens taken apart into classes and bits, and samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfsq.rfsq_ref.beliefs import bits_of_tokens
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.runtime.bundle.models import ChunkModel
from rfsq.runtime.bundle.probabilities import (
    chunk_probabilities,
    class_of_tokens,
    drawn,
    logits_of,
    num_tokens,
    one_hot,
    softmax,
    tokens_of,
)
from tests.chunk_bundles import ChunkRecipe, deployed_chunk_tokens
from tests.rfsq_ref.test_chunk_code import any_sizes

#: Six classes, whose numbers have three bits: 6 and 7 mean the last.
SIZES = ChunkRecipe().sizes
MODEL: ChunkModel = deployed_chunk_tokens(ChunkRecipe()).model


def sharpness(value: float, count: int) -> Any:
    return np.full(count, value, np.float32)


def model_of(sizes: ChunkSizes) -> ChunkModel:
    return deployed_chunk_tokens(ChunkRecipe(sizes=sizes)).model


def test_a_softmax_is_sharpened_layer_by_layer_and_forbids() -> None:
    logits = np.array([[[0, 1, -np.inf], [3e38, -3e38, 0]]], np.float32)
    found = softmax(logits, np.array([2, 0.5], np.float32))
    twice = np.exp([0, 2]) / np.exp([0, 2]).sum()
    np.testing.assert_allclose(found, [[[*twice, 0], [1, 0, 0]]], rtol=1e-15)


@settings(max_examples=20)
@given(any_sizes(), st.integers(0, 2**32), st.integers(1, 3))
def test_tokens_are_taken_apart_as_the_definition_does(sizes: ChunkSizes, seed: int, length: int) -> None:
    model, length = model_of(sizes), min(length, sizes.num_tokens)
    logits = np.random.default_rng(seed).normal(scale=4, size=(2, length, model.vocabulary)).astype(np.float32)
    expected = bits_of_tokens(torch.from_numpy(logits).double().softmax(-1), sizes)
    found = chunk_probabilities((logits,), sharpness(1, length), model, is_logits=True)
    np.testing.assert_allclose(found.classes, expected.classes, rtol=1e-12)
    for index in range(model.num_classes):
        zeros, ones = found.of_class(np.full(2, index, np.int32)).swapaxes(0, 1)
        np.testing.assert_allclose(ones, expected.bits[:, index], rtol=1e-12)
        np.testing.assert_allclose(zeros, 1 - expected.bits[:, index], atol=1e-14)


def test_of_a_bit_that_is_nearly_certain_the_other_side_keeps_its_digits() -> None:
    bits = np.array([[40, -40, 0, 800, -np.inf]], np.float32)
    found = chunk_probabilities((np.zeros((1, 6), np.float32), bits), sharpness(1, 6), MODEL, is_logits=True)
    zeros, ones = found.of_class(np.zeros(1, np.int32))[0]
    tiny = np.exp(-40.0)
    np.testing.assert_allclose(zeros, [tiny, 1, 0.5, 0, 1], rtol=1e-12)
    np.testing.assert_allclose(ones, [1, tiny, 0.5, 1, 0], rtol=1e-12)


@given(st.integers(0, 2**32))
def test_a_temperature_of_probabilities_is_one_of_their_logits(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(3, 2, 5)).astype(np.float32)
    shares = softmax(logits, 1.0)
    shares[0, 0] = [0, 0, 1, 0, 0]
    warm = shares**0.25
    (found,) = logits_of((shares.astype(np.float32),))
    np.testing.assert_allclose(softmax(found, 0.25), warm / warm.sum(-1, keepdims=True), rtol=1e-5)
    ones = np.array([[0, 1, 0.5, 0.2, 1 - 2**-20]], np.float32)
    classes, bits = logits_of((np.full((1, 6), 1 / 6, np.float32), ones))
    assert (bits < np.inf).all()
    again = chunk_probabilities((classes, bits), sharpness(1, 6), MODEL, is_logits=True)
    np.testing.assert_allclose(again.of_class(np.zeros(1, np.int32))[0, 1], ones[0], rtol=1e-5)


@given(st.lists(st.integers(0, 255), min_size=1, max_size=9))
def test_tokens_are_their_class_and_bits(numbers: list[int]) -> None:
    tokens = np.array([numbers], np.int32)
    classes = class_of_tokens(tokens, MODEL)
    assert classes.tolist() == [min(numbers[0] >> 5, 5)]
    digits = (tokens[..., None] >> np.arange(7, -1, -1) & 1).reshape(1, -1)
    again = tokens_of(classes, digits[:, 3:], MODEL)
    # Of all numbers that mean the last class it has one.
    expected = [classes[0] << 5 | numbers[0] & 31, *numbers[1:]]
    assert again.tolist() == [expected]
    assert num_tokens((one_hot(classes, 6), digits[:, 3:].astype(np.float32)), MODEL) == len(numbers)


def test_samples_come_as_often_as_they_are_likely_and_never_where_forbidden() -> None:
    shares = np.array([0.0, 0.25, 0.0, 0.75, 0.0])
    uniform = np.random.default_rng(0).random((200, 200))
    found = drawn(np.broadcast_to(shares, (200, 200, 5)), uniform)
    counts = np.bincount(found.reshape(-1), minlength=5) / found.size
    np.testing.assert_allclose(counts, shares, atol=0.01)
    assert (counts[[0, 2, 4]] == 0).all()


@pytest.mark.parametrize("certain", [0, 4])
def test_a_sample_of_what_is_certain_is_that(certain: int) -> None:
    uniform = np.append(np.random.default_rng(1).random(1000), [0.0, np.nextafter(1, 0)])
    assert (drawn(one_hot(np.full(1002, certain), 5).astype(np.float64), uniform) == certain).all()
