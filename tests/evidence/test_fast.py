"""FAST: held against the cosines written out, Parseval's theorem and byte-pair coding's losslessness."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rfsq.evidence.fast import VOCABULARY, FastCodec, fast_codecs, fit_fast
from rfsq.evidence.metrics import Array
from rfsq.evidence.schemes import Codec
from rfsq.rfsq_ref.data import EpisodeSplit, FloatArray, chunk

_LENGTH = 8
_CHUNKS = arrays(np.float32, (4, _LENGTH, 3), elements=st.floats(-1, 1, width=32))


def _motions(count: int, length: int = _LENGTH, dimensions: int = 3) -> FloatArray:
    """Smooth chunks [count, length, dimensions] in [-1, 1], the last dimension one that never moves."""
    generator = np.random.default_rng(count)
    phase, speed = generator.uniform(0, 6, (2, count, 1, dimensions))
    chunks: Array = np.sin(phase + speed * np.arange(length)[:, None] / length)
    chunks[..., -1] = 0.25
    return chunks.astype(np.float32)


@pytest.fixture(scope="module")
def fitted() -> FastCodec:
    return fit_fast(_motions(400), 20.0)


def _cosines(length: int) -> Array:
    """The orthonormal DCT-II as a matrix [frequency, step]."""
    steps = np.arange(length)
    matrix: Array = np.sqrt(2 / length) * np.cos(np.pi * (2 * steps + 1) * steps[:, None] / (2 * length))
    matrix[0] /= np.sqrt(2)
    return matrix


@pytest.mark.parametrize("length", [_LENGTH, 3, 1])
def test_reconstruction_is_the_rounded_cosine_transform_and_coding_loses_nothing(
    fitted: FastCodec, length: int
) -> None:
    chunks = _motions(50, length)
    matrix = _cosines(length)

    frequencies = matrix @ ((chunks - fitted.offset) / fitted.units) * fitted.scale
    rounded = np.clip(np.rint(frequencies), fitted.least, fitted.most)
    expected = (matrix.T @ rounded / fitted.scale) * fitted.units + fitted.offset

    # A coefficient half-way between two integers may be rounded either way.
    sure = (np.abs(frequencies - np.floor(frequencies) - 0.5) > 1e-6).all(axis=(1, 2))
    assert sure.mean() > 0.9
    np.testing.assert_allclose(fitted.reconstruct(chunks)[sure], expected[sure], atol=1e-6)


@settings(max_examples=30)
@given(chunks=_CHUNKS)
def test_the_error_is_at_most_half_a_coefficient_where_the_range_was_seen(
    fitted: FastCodec, chunks: FloatArray
) -> None:
    chunks = chunks * np.float32(0.3)

    error = (fitted.reconstruct(chunks) - chunks) / fitted.units

    # The transform keeps lengths, so what rounding costs there is what it costs here.
    moving = error[..., :2]
    assert np.sqrt((moving**2).sum(axis=1)).max() <= math.sqrt(_LENGTH) * 0.5 / fitted.scale + 1e-5


def test_a_finer_scale_takes_more_bits_and_errs_less(split: EpisodeSplit) -> None:
    train = np.concatenate([chunk(episode, _LENGTH) for episode in split.train.episodes])
    test = np.concatenate([chunk(episode, _LENGTH) for episode in split.test.episodes])
    codecs = [fit_fast(train, scale) for scale in (2.0, 10.0, 50.0)]

    bits = [codec.bits_per_step(test) for codec in codecs]
    errors = [float(np.mean((codec.reconstruct(test) - test) ** 2)) for codec in codecs]

    assert bits == sorted(bits)
    assert errors == sorted(errors, reverse=True)
    # Rounding noise is uniform: variance 1/12 of a step, except where a coefficient is almost always 0.
    assert errors[-1] <= np.mean(codecs[-1].units ** 2) / 12 / 50.0**2 * 1.1


def test_bits_are_the_tokens_of_a_chunk_over_its_steps(fitted: FastCodec) -> None:
    chunks = _motions(20)

    tokens = fitted.tokens(chunks)

    expected = sum(map(len, tokens)) / 20 * math.log2(fitted.tokenizer.get_vocab_size()) / _LENGTH
    assert isinstance(fitted, Codec)
    assert fitted.bits_per_step(chunks) == pytest.approx(expected)
    assert max(map(len, tokens)) <= _LENGTH * 3
    assert not fitted.partial


def test_bits_of_a_step_times_all_steps_are_the_bits_of_all_tokens(fitted: FastCodec) -> None:
    """Chunks of different cost, as real ones and those filled up with one action are."""
    still = np.repeat(_motions(5)[:, :1], _LENGTH, axis=1)
    parts = [_motions(20), still]

    bits = [fitted.bits_per_step(part) * len(part) * _LENGTH for part in parts]

    assert bits[0] / 20 > 2 * bits[1] / 5
    assert fitted.bits_per_step(np.concatenate(parts)) * 25 * _LENGTH == pytest.approx(sum(bits))


def test_the_first_tokens_hold_the_lowest_frequencies(fitted: FastCodec) -> None:
    chunks = _motions(50)
    first = fitted.first_tokens(2)

    assert first.partial
    assert first.tokens(chunks) == [ids[:2] for ids in fitted.tokens(chunks)]
    assert first.bits_per_step(chunks) < fitted.bits_per_step(chunks)
    errors = [
        float(np.mean((fitted.first_tokens(count).reconstruct(chunks) - chunks) ** 2))
        for count in range(1, 2 + _LENGTH)
    ]
    assert errors[0] > 2 * errors[-1]


def test_all_tokens_are_the_whole(fitted: FastCodec) -> None:
    chunks = _motions(50)

    np.testing.assert_array_equal(fitted.first_tokens(_LENGTH * 3).reconstruct(chunks), fitted.reconstruct(chunks))


def test_what_is_left_out_counts_as_coefficients_of_zero(fitted: FastCodec) -> None:
    nothing = fitted.decode([[]], _LENGTH)

    np.testing.assert_allclose(nothing, np.broadcast_to(fitted.offset, (1, _LENGTH, 3)), atol=1e-7)


def test_actions_far_beyond_training_are_clamped_not_lost(fitted: FastCodec) -> None:
    chunks = np.full((2, _LENGTH, 3), 100.0, np.float32)

    decoded = fitted.reconstruct(chunks)

    assert np.isfinite(decoded).all()
    assert (decoded[..., :2] > 0.5).all()
    assert (decoded < 100).all()


def test_a_dimension_that_never_moves_stays(fitted: FastCodec) -> None:
    np.testing.assert_allclose(fitted.reconstruct(_motions(30))[..., 2], 0.25, atol=1e-6)


def test_a_dimension_that_hardly_ever_moves_does_not_blow_up_the_vocabulary() -> None:
    chunks = _motions(400)
    chunks[..., 2] = np.random.default_rng(0).normal(0, 1e-6, chunks.shape[:2])
    chunks[0, 0, 2] = 1.0

    codec = fit_fast(chunks, 10.0)

    assert codec.most - codec.least < VOCABULARY
    assert np.abs(codec.reconstruct(chunks) - chunks).max() < 0.3


def test_many_different_coefficients_get_a_larger_vocabulary() -> None:
    codec = fit_fast(_motions(400), 1000.0)

    assert codec.most - codec.least >= VOCABULARY
    assert codec.tokenizer.get_vocab_size() > codec.most - codec.least
    assert np.abs(codec.reconstruct(_motions(400)) - _motions(400)).max() < 2e-3


def test_fitting_twice_gives_the_same_tokens() -> None:
    chunks = _motions(300)

    first, second = fit_fast(chunks, 30.0), fit_fast(chunks, 30.0)

    assert first.tokenizer.to_str() == second.tokenizer.to_str()


def test_scales_are_found_whose_tokens_take_the_bits_of_a_budget() -> None:
    windows, judged, vocabulary = _motions(300), _motions(50), 2 * VOCABULARY
    budgets = [6.0, 14.0]

    codecs = fast_codecs(windows, judged, budgets, vocabulary)

    assert [codec.scale for codec in codecs] == sorted(codec.scale for codec in codecs)
    for codec, bits in zip(codecs, budgets, strict=True):
        assert 0.8 * bits < codec.bits_per_step(judged) <= 1.005 * bits
        assert codec.name.startswith(f"FAST, 8 steps, vocabulary {vocabulary}, scale ")


def test_a_budget_that_no_scale_is_within_is_missing() -> None:
    windows = _motions(600)
    assert fast_codecs(windows, windows, [0.01]) == []
