"""Uniform bins: held against numpy's own binning and against the closed form of their error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.schemes import BinCodec, BinRange, Codec, action_range, fit_bins
from rfsq.rfsq_ref.data import ActionDataset, FloatArray
from rfsq.rfsq_ref.normaliser import fit_normaliser
from rfsq.rfsq_ref.settings import NormaliserKind

_VALUES = st.floats(-4, 4, width=32)
_CHUNKS = arrays(np.float32, (3, 5, 2), elements=_VALUES)
_LOW, _HIGH = np.array([-1.0, -3.0]), np.array([1.0, 2.0])


def _codec(bits: int) -> BinCodec:
    return BinCodec("bins", _LOW, _HIGH, bits)


@given(_CHUNKS, st.integers(1, 16))
def test_a_bin_is_off_by_half_its_width_at_most_and_clips_outside(chunks: FloatArray, bits: int) -> None:
    clipped = np.clip(chunks, _LOW, _HIGH)

    error = np.abs(_codec(bits).reconstruct(chunks) - clipped)

    assert (error <= (_HIGH - _LOW) / 2**bits / 2 + 1e-6).all()


@given(_CHUNKS, st.integers(1, 10))
def test_tokens_are_those_of_numpy_digitize(chunks: FloatArray, bits: int) -> None:
    found = _codec(bits).tokens(chunks)

    for dimension in range(2):
        edges = _LOW[dimension] + (_HIGH - _LOW)[dimension] * np.arange(1, 2**bits) / 2**bits
        # Where an action lies on an edge but for rounding, either bin is right.
        distance = np.abs(chunks[..., dimension, None] - edges).min(axis=-1)
        wrong = found[..., dimension] != np.digitize(chunks[..., dimension], edges)
        assert not wrong[distance > 1e-6].any()


@given(_CHUNKS, st.integers(2, 16), st.data())
def test_the_first_bits_of_a_token_are_the_coarser_codec(chunks: FloatArray, bits: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, bits))

    first_bits = _codec(bits).tokens(chunks) >> (bits - kept)

    np.testing.assert_array_equal(first_bits, _codec(kept).tokens(chunks))
    np.testing.assert_array_equal(_codec(kept).decode(first_bits), _codec(kept).reconstruct(chunks))


def test_uniform_actions_have_the_error_of_uniform_noise() -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (100_000, 1, 1)).astype(np.float32)
    codec = BinCodec("bins", np.array([-1.0]), np.array([1.0]), 6)

    assert np.mean((codec.reconstruct(actions) - actions) ** 2) == pytest.approx((2 / 64) ** 2 / 12, rel=0.02)


def test_a_dimension_that_never_moves_stays_exactly() -> None:
    steps = np.stack([np.linspace(-1, 1, 50), np.full(50, 0.3)], axis=1).astype(np.float32)

    for kind in BinRange:
        decoded = fit_bins(steps, kind, 3).reconstruct(steps[None])
        np.testing.assert_array_equal(decoded[..., 1], steps[None, :, 1])


def test_quantile_bins_cover_what_the_quantile_normaliser_covers(demonstrations_steps: FloatArray) -> None:
    low, high = action_range(demonstrations_steps, BinRange.QUANTILE)

    normaliser = fit_normaliser(demonstrations_steps, NormaliserKind.QUANTILE, untouched=())

    np.testing.assert_allclose((low + high) / 2, normaliser.offset, atol=1e-7)
    np.testing.assert_allclose((high - low) / 2, normaliser.scale, rtol=1e-6)


def test_a_gripper_that_rarely_closes_keeps_both_its_positions() -> None:
    steps = np.ones((1000, 1), np.float32)
    steps[:3] = -1

    decoded = fit_bins(steps, BinRange.QUANTILE, 8).reconstruct(steps[None])

    assert np.abs(decoded - steps).max() <= 1 / 256 + 1e-6


def test_a_step_takes_one_token_for_each_dimension() -> None:
    codec = _codec(8)

    assert isinstance(codec, Codec)
    assert codec.bits_per_step(np.zeros((1, 8, 2), np.float32)) == 16
    assert not codec.partial


@pytest.mark.parametrize("bits", [0, 25])
def test_bits_out_of_reason_are_refused(bits: int) -> None:
    with pytest.raises(EvidenceError, match=f"{bits} bits"):
        _codec(bits)


def test_a_range_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(EvidenceError, match="nowhere lower"):
        BinCodec("bins", _HIGH, _LOW, 8)


@pytest.fixture(scope="module")
def demonstrations_steps(demonstrations: ActionDataset) -> FloatArray:
    return demonstrations.steps()
