"""BEAST: splines that are what they say, levels that cover what they should, and budgets that are kept."""

import math

import numpy as np
import pytest

from rfsq.evidence.beast import DEGREE, BeastCodec, beast_codecs, chosen_splines, coefficients, spline_values
from rfsq.rfsq_ref.data import FloatArray

_LENGTH = 8


def _cubics(count: int, length: int = _LENGTH) -> FloatArray:
    """Random polynomials of degree 3 [count, length, 2] within [-1, 1], the second dimension a step."""
    rng = np.random.default_rng(count)
    time = np.linspace(-1, 1, length)
    curves = np.polynomial.polynomial.polyval(time, rng.uniform(-0.25, 0.25, (4, count)))
    steps = np.where(np.arange(length) < length // 2, *rng.choice([-1.0, 1.0], (2, count, 1)))
    return np.stack([curves, steps], axis=2).astype(np.float32)


@pytest.mark.parametrize("count", range(1, _LENGTH + 1))
@pytest.mark.parametrize("degree", [DEGREE, 0])
def test_splines_are_never_negative_and_sum_to_one(count: int, degree: int) -> None:
    values = spline_values(_LENGTH, count, degree)

    assert values.shape == (_LENGTH, count)
    assert (values >= 0).all()
    np.testing.assert_allclose(values.sum(axis=1), 1)


@pytest.mark.parametrize("count", range(DEGREE + 1, _LENGTH + 1))
def test_a_spline_of_degree_three_is_every_polynomial_of_degree_three(count: int) -> None:
    curves = _cubics(20)[..., :1]
    splines = spline_values(_LENGTH, count, DEGREE)[None]

    fitted = np.einsum("atn,bna->bta", splines, coefficients(splines, curves))

    np.testing.assert_allclose(fitted, curves, atol=1e-6)


def test_a_dimension_that_steps_gets_a_spline_of_degree_zero() -> None:
    smooth, stepping = chosen_splines(_cubics(50), 4)

    np.testing.assert_array_equal(smooth, spline_values(_LENGTH, 4, DEGREE))
    np.testing.assert_array_equal(stepping, np.repeat(np.eye(4), 2, axis=0))


def _within(bits: float) -> list[BeastCodec]:
    return list(beast_codecs(_cubics(200), [bits]))


@pytest.mark.parametrize("bits", [2.0, 8.0, 20.0])
def test_every_setting_is_within_its_budget(bits: float) -> None:
    chunks = _cubics(30)
    codecs = _within(bits)

    assert codecs
    assert len({codec.name for codec in codecs}) == len(codecs)
    for codec in codecs:
        assert codec.bits_per_step(chunks) <= bits + 1e-9
        tokens = codec.tokens(chunks)
        assert codec.bits_per_step(chunks) == pytest.approx(tokens.shape[1] * math.log2(codec.levels) / _LENGTH)
        assert tokens.min() >= 0
        assert tokens.max() < codec.vocabulary


def test_more_bits_err_less_and_many_err_by_no_more_than_rounding() -> None:
    chunks = _cubics(200)

    errors = [
        min(np.square(codec.reconstruct(chunks) - chunks).mean() for codec in _within(bits)) for bits in (2, 6, 12)
    ]

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


def test_a_single_coefficient_holds_a_chunk_of_a_single_step() -> None:
    steps = _cubics(50)[:, :1]
    (codec,) = {codec.splines.shape: codec for codec in beast_codecs(steps, [20.0])}.values()

    np.testing.assert_allclose(codec.reconstruct(steps), steps, atol=2 / codec.levels)
