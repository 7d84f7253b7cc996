"""Errors in a robot's units, and what tokens hold, against formulas worked by hand and SciPy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.metrics import (
    action_errors,
    entropy_bits,
    level_counts,
    rotation_distance_deg,
    units_of,
)
from rfsq.evidence.settings import OscPose

ONES = np.ones(7)


def test_a_millimetre_is_a_fiftieth_of_a_position_unit() -> None:
    expected = np.zeros((1, 7), np.float32)
    decoded = expected.copy()
    decoded[0, :3] = [0.02 * 2, 0.02 * 1, 0.02 * 2]  # 2, 1 and 2 mm: 3 mm in all

    errors = action_errors(expected, decoded, ONES, OscPose())

    assert errors["position_mm"] == pytest.approx(3.0, rel=1e-6)
    assert errors["rotation_deg"] == pytest.approx(0.0, abs=1e-9)


def test_rotations_are_compared_as_rotations_not_as_vectors() -> None:
    """Half a turn one way and half a turn the other way are the same orientation."""
    half = np.array([[np.pi, 0.0, 0.0]])

    assert rotation_distance_deg(half, -half) == pytest.approx(0.0, abs=1e-5)
    assert rotation_distance_deg(np.zeros((1, 3)), np.array([[0.0, np.pi / 6, 0.0]])) == pytest.approx(30.0)


@given(hnp.arrays(np.float64, (5, 3), elements=st.floats(-1, 1)), st.integers(0, 2), st.floats(-0.5, 0.5))
def test_turns_about_one_axis_differ_by_their_angles(start: np.ndarray, axis: int, angle: float) -> None:
    first = np.zeros((5, 3))
    first[:, axis] = start[:, axis]
    second = first.copy()
    second[:, axis] += angle

    assert rotation_distance_deg(first, second) == pytest.approx(np.degrees(abs(angle)), abs=1e-5)


def test_a_gripper_that_opens_instead_of_closing_counts() -> None:
    expected = np.zeros((4, 7), np.float32)
    expected[:, 6] = [0.9, -0.9, 0.1, -0.1]
    decoded = expected.copy()
    decoded[:, 6] = [0.1, 0.1, 0.9, -0.9]

    assert action_errors(expected, decoded, ONES, OscPose())["gripper_sign_errors"] == 0.25


def test_errors_are_measured_in_the_given_units() -> None:
    expected, decoded = np.zeros((2, 2), np.float32), np.array([[0.5, 0.0], [0.0, 30.0]], np.float32)

    errors = action_errors(expected, decoded, np.array([1.0, 100.0]), None)

    assert errors["action_mse"] == pytest.approx((0.25 + 0.09) / 4)
    assert errors["max_error"] == 0.5
    assert "position_mm" not in errors


def test_two_arms_are_14_dimensions_and_4_are_none() -> None:
    assert OscPose().arms(np.zeros((3, 14), np.float32)).shape == (3, 2, 7)
    with pytest.raises(EvidenceError, match=r"4 action dimensions.*expected 7 for each arm"):
        OscPose().arms(np.zeros((3, 4), np.float32))


@given(hnp.arrays(np.int64, (3, 7), elements=st.integers(0, 50)).filter(lambda counts: (counts.sum(axis=1) > 0).all()))
def test_entropy_equals_scipys(counts: np.ndarray) -> None:
    from scipy.stats import entropy

    assert entropy_bits(counts) == pytest.approx(entropy(counts, base=2, axis=1), abs=1e-12)


def test_evenly_used_levels_hold_log2_of_their_number() -> None:
    assert entropy_bits(np.full((1, 7), 3)) == pytest.approx(np.log2(7))
    assert entropy_bits(np.array([[0, 9, 0]])).tolist() == [0.0]


@given(hnp.arrays(np.int64, (20, 3), elements=st.integers(0, 6)))
def test_every_token_is_counted_once(tokens: np.ndarray) -> None:
    counts = level_counts(tokens, 7)

    assert counts.shape == (3, 7)
    assert counts.sum() == tokens.size
    assert counts[1, 4] == (tokens[:, 1] == 4).sum()


def test_actions_in_the_unit_range_keep_their_units() -> None:
    assert units_of(np.array([[0.1, -1.0], [0.2, 0.3]], np.float32)).tolist() == [1.0, 1.0]


def test_other_actions_are_measured_by_half_their_range() -> None:
    """A dimension that never moves has no range; it keeps its own unit."""
    actions = np.array([[0.0, 100.0, 7.0], [255.0, 100.5, 7.0]], np.float32)

    assert units_of(actions) == pytest.approx([127.5, 0.25, 1.0])
