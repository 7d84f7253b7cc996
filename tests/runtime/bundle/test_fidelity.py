"""How well decoded actions match, in the robot's units, what grade that gets, and what people are told."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfsq.runtime.bundle.fidelity import POOR_SHARE, Fidelity, FidelitySums, Grade, fidelity

OFFSET, UNIT = (0.0, 300.0, 0.0), (1.5, 60.0, 3.0)


def some_actions(steps: int = 500) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.normal([0, 300, 0], [0.5, 20.0, 1.0], (steps, 3)).astype(np.float32)


def judged(actions: np.ndarray, decoded: np.ndarray) -> Fidelity:
    return fidelity(actions, decoded, UNIT, OFFSET)


def test_each_dimension_is_judged_in_its_own_unit() -> None:
    actions = some_actions().astype(np.float64)
    decoded = actions + np.array([0.01, -0.2, 0.0])
    decoded[7, 1] += 5
    found = judged(actions, decoded)
    error = decoded - actions
    assert found.rmse == pytest.approx(np.sqrt((error**2).mean(0)))
    assert found.largest == pytest.approx(np.abs(error).max(0))
    assert found.deviation == pytest.approx(actions.std(0))
    assert (found.low, found.high) == (tuple(actions.min(0)), tuple(actions.max(0)))
    assert found.lost == pytest.approx((error**2).mean(0) / actions.var(0))
    assert (found.warning_in("calibrated"), found.grade) == ("", Grade.GOOD)
    assert found.line.startswith("good; in robot units: RMS error at most 0.293 (dimension 1)")
    assert "robot units" in found.text("all layers", "calibrated")


def test_a_poor_model_is_warned_of_by_its_worst_dimensions() -> None:
    actions = some_actions()
    found = judged(actions, actions + np.array([0.11, 0.0, 0.2]))
    assert found.grades == (Grade.POOR, Grade.GOOD, Grade.POOR)
    assert found.warning_in("calibrated").startswith(
        "WARNING: the tokens are poor: decoded actions lose more than 1% of the variance in 2 of 3 dimensions (0, 2); "
        "worst is dimension 0: 5."
    )
    assert "RMS error 0.11" in found.warning_in("calibrated")
    assert "train it longer" in found.warning_in("calibrated")
    assert found.warning_in("calibrated") in found.text("all layers", "calibrated")
    assert "at most" in found.line


@pytest.mark.parametrize("mode", ["none", "recovered"])
def test_poor_tokens_of_a_mode_that_loses_more_are_first_told_to_change_it(mode: str) -> None:
    actions = some_actions()
    warning = judged(actions, actions + np.array([0.11, 0.0, 0.2])).warning_in(mode)
    assert f"The mode '{mode}' is the likely cause" in warning
    assert warning.index("--conditioning calibrated") < warning.index("train it longer")


@given(st.floats(0.01, 100))
def test_the_thresholds_do_not_depend_on_units(scale: float) -> None:
    actions = some_actions().astype(np.float64)
    for share, grade in (
        (0.9 * POOR_SHARE, Grade.GOOD),
        (1.1 * POOR_SHARE, Grade.POOR),
        (0.9, Grade.POOR),
        (1.1, Grade.WORTHLESS),
    ):
        units = (scale * np.array(column) for column in (UNIT, OFFSET))
        found = fidelity(scale * actions, scale * (actions + np.sqrt(share) * actions.std(0)), *units)
        assert found.grades == (grade,) * 3


def test_worse_than_the_mean_is_worthless_and_asks_for_the_units_before_it_asks_for_training() -> None:
    """Degrees where the model was trained in radians: what it decodes stays in its own range."""
    actions = some_actions() * np.array([57.3, 1, 1])
    # Of what lies around zero at least the sign comes back: a little better than the mean.
    decoded = np.clip(actions, [-1.5, 0, -9], [1.5, 999, 9])
    found = judged(actions, decoded)
    assert 0.8 < found.lost[0] < 1
    assert found.grades == (Grade.WORTHLESS, Grade.GOOD, Grade.GOOD)
    assert found.grade is Grade.WORTHLESS
    assert found.warning_in("calibrated").startswith(
        "WARNING: the tokens are worthless: always sending the mean would do better, or about as well, in 1 of 3 "
        "dimensions (0)"
    )
    assert found.far_outside == (0,)
    assert "in dimensions 0: dimension 0 runs from " in found.warning_in("calibrated")
    assert "the model knows about -1.5 to 1.5" in found.warning_in("calibrated")
    asked = ["the units", "its order", "its robot", "train it longer"]
    assert sorted(asked, key=found.warning_in("calibrated").index) == asked


def test_data_within_the_range_are_not_called_outside_of_it() -> None:
    actions = some_actions()
    found = judged(actions, -actions)
    assert found.far_outside == ()
    assert "outside" not in found.warning_in("calibrated")


def test_chunk_tokens_clip_what_lies_beyond_their_range_and_others_do_not() -> None:
    actions = some_actions().clip([-1.5, 240, -3], [1.5, 360, 3])
    assert judged(actions, actions).clipping_in("chunk") == ""
    actions[7, 1] = 390
    found = judged(actions, actions)
    assert found.clipping_in("chunk", ("pan", "lift", "gripper")).startswith(
        "WARNING: actions lie beyond the range of the tokens, and decode as its ends, where no bound holds: dimension "
        f"1 (lift) runs from {found.low[1]:.4g} to 390, the range from 240 to 360. Fit them again to actions that reach"
    )
    assert found.clipping_in("calibrated") == ""


def test_poor_tokens_that_clip_are_told_of_their_range_and_others_of_more_tokens() -> None:
    actions = some_actions().clip([-1.5, 240, -3], [1.5, 360, 3])
    off = actions + np.array([0.0, 4.0, 0.0])
    assert "or take more tokens if a chunk can use more" in judged(actions, off).warning_in("chunk")
    actions[7, 1] = 390
    assert "or to the limits of the robot" in judged(actions, off).warning_in("chunk")
    assert "more tokens" not in judged(actions, off).warning_in("chunk")


def test_what_is_many_times_the_variance_is_no_percentage() -> None:
    actions = some_actions()
    found = judged(actions, actions + np.float32([50, 0, 0]))
    assert "worst is dimension 0: 10,4" in found.warning_in("calibrated")
    assert " times its variance" in found.warning_in("calibrated")


# At rest -------------------------------------------------------------------------------------------------------------


def test_a_dimension_at_rest_is_held_against_the_slower_ones_that_move() -> None:
    """Of no variance no share can be lost; but a locked joint that trembles is no good joint."""
    actions = some_actions()
    actions[:, 1] = 300
    for error, grade in ((0.04, Grade.GOOD), (0.06, Grade.POOR), (59.0, Grade.POOR), (61.0, Grade.WORTHLESS)):
        found = judged(actions, actions.astype(np.float64) + np.array([0, error, 0]))
        assert found.at_rest == (False, True, False)
        # Dimension 0 deviates by 0.5; 60 is the unit of the dimension itself.
        assert found.yardstick[1] == found.deviation[0] == pytest.approx(0.5, rel=0.05)
        assert found.grades == (Grade.GOOD, grade, Grade.GOOD)
    assert "RMS error 61 where the actions rest at 300, judged as if they moved by 0.49" in found.warning_in(
        "calibrated"
    )
    assert "* at rest" in found.table("all layers")


def test_neither_a_fast_dimension_nor_the_slowest_alone_decides_on_one_at_rest() -> None:
    """Joints by radians, a gripper that counts to 100, a joint that only jitters, and one at rest."""
    moves = np.array([0.2, 0.3, 45.0, 1e-5, 0.4, 0.0])
    actions = np.random.default_rng(0).normal(0, 1, (500, 6)) * moves
    found = fidelity(actions, actions + np.array([0, 0, 0, 0, 0, 0.03]), [1.0] * 6, [0.0] * 6)
    assert found.yardstick[5] == pytest.approx(0.2, rel=0.1)
    assert found.grades[5] is Grade.POOR


def test_where_nothing_moves_it_is_held_against_the_units() -> None:
    actions = np.full((50, 1), 1e4, np.float32)
    found = fidelity(actions, actions + 1, [100.0], [1e4])
    assert (found.rmse, found.yardstick) == ((1.0,), (100.0,))
    assert found.grade is Grade.GOOD
    assert fidelity(actions, actions + 11, [100.0], [1e4]).grade is Grade.POOR


def test_float32_alone_moves_nothing() -> None:
    actions = np.float32(1e4) + np.arange(50, dtype=np.float32)[:, None] % 2 * np.float32(1e-3)
    assert fidelity(actions, actions, [1.0], [0.0]).at_rest == (True,)


# Recorded ------------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1e300))
def test_any_share_takes_little_room(share: float) -> None:
    found = Fidelity(5, (share**0.5,), (1.0,), (1.0,), (-1.0,), (1.0,), (1.0,), (0.0,))
    ((shown, unit),) = re.findall(r"([0-9.,e+-]+)(%| times)", found.table("all layers").splitlines()[1])
    assert len(shown) <= len("1.23e+100")
    assert float(shown.replace(",", "")) == pytest.approx(share * (100 if unit == "%" else 1), rel=0.05, abs=0.001)


def test_batches_give_what_the_whole_gives() -> None:
    actions = some_actions()
    decoded = actions + np.float32(0.1)
    sums = FidelitySums(UNIT, OFFSET)
    for start in range(0, 500, 123):
        sums.add(actions[start : start + 123], decoded[start : start + 123])
    whole, found = judged(actions, decoded), sums.result()
    assert found.rmse == pytest.approx(whole.rmse)
    assert found.deviation == pytest.approx(actions.astype(np.float64).std(0), rel=1e-9)
    assert (found.low, found.high, found.largest) == (whole.low, whole.high, whole.largest)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rmse": (0.1, 0.1)},
        {"largest": (-1.0, 0.0, 0.0)},
        {"low": (9e9, 0.0, 0.0)},
        {"unit": (1.0, 1.0, 1.0)},
        {"steps": 0},
    ],
)
def test_what_cannot_be_the_errors_of_a_model_is_told(wrong: dict[str, tuple[float, ...]]) -> None:
    found = judged(some_actions(), some_actions())
    assert found.is_possible(UNIT, OFFSET)
    assert not dataclasses.replace(found, **wrong).is_possible(UNIT, OFFSET)
