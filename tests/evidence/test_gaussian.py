"""Reverse water-filling: cases that can be worked out by hand, and a bound that no code of Gaussian chunks beats."""

import numpy as np
import pytest

from rfsq.evidence.gaussian import least_distortion, principal_variances
from rfsq.evidence.schemes import BinRange, fit_bins


def test_each_bit_of_one_value_quarters_its_error() -> None:
    for bits in range(5):
        assert least_distortion(np.array([9.0]), bits) == pytest.approx(9.0 / 4**bits)


def test_bits_go_where_most_is_to_be_gained() -> None:
    # One bit lets the larger value fall to the smaller one: below, both share what comes.
    assert least_distortion(np.array([4.0, 1.0]), 1.0) == pytest.approx(1.0)
    assert least_distortion(np.array([4.0, 1.0]), 3.0) == pytest.approx(0.25)
    assert least_distortion(np.array([4.0, 1e-12]), 1.0) == pytest.approx(0.5)


def test_values_that_never_move_cost_nothing() -> None:
    assert least_distortion(np.array([1.0, 0.0]), 2.0) == pytest.approx(1 / 32)
    assert least_distortion(np.array([0.0, -1e-20]), 2.0) == 0


def test_principal_variances_are_in_units_and_do_not_depend_on_the_axes() -> None:
    rng = np.random.default_rng(0)
    chunks = (rng.standard_normal((20_000, 2, 1)) * [[3.0], [1.0]]).astype(np.float32)
    turned = np.stack([chunks[:, 0] + chunks[:, 1], chunks[:, 0] - chunks[:, 1]], axis=1) / np.sqrt(2)

    for found in (chunks, turned):
        variances = principal_variances(found, np.array([2.0]))
        np.testing.assert_allclose(sorted(variances), [0.25, 2.25], rtol=0.05)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_bins_of_gaussian_actions_stay_above_the_bound(bits: int) -> None:
    chunks = np.random.default_rng(1).standard_normal((5_000, 1, 1)).astype(np.float32)
    variances = principal_variances(chunks, np.ones(1))
    error = np.square(fit_bins(chunks[:, 0], BinRange.FULL, bits).reconstruct(chunks) - chunks).mean()

    assert error > least_distortion(variances, bits)
