"""The guard against bounds in plain Python; settings that make no sense, and places that cannot be, are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rfsq.runtime.control.config import ControlConfig, Status, slew_margin
from rfsq.runtime.control.errors import ControlConfigError
from rfsq.runtime.control.guard import ActionGuard

T = 3
VALUES: dict[str, object] = {
    "period_s": 0.05,
    "action_low": [-1.0, -2.0, 0.0],
    "action_high": [1.0, 2.0, 0.1],
    "max_relative_step": [0.3, 0.5, float("inf")],
    "action_kind": ["delta", "absolute", "delta"],
    "gripper": [2],
}
START = (0.0, 1.0, 0.1)
NUMBERS = st.floats(-3, 3, width=32)
ROW = st.lists(NUMBERS, min_size=3, max_size=3)


class GuardMachine(RuleBasedStateMachine):
    """Whatever is asked for, what leaves is inside limits and slew; standing still keeps places and ends motions."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ControlConfig.from_values(VALUES)
        self.guard = ActionGuard(self.config, T, START)
        self.before = self.sent = np.array(self.guard.sent, np.float32)

    def _send(self) -> None:
        out = self.guard.actions
        assert self.guard.values == out.tolist()
        self.before, self.sent = self.sent, out
        self.guard.sent = self.guard.values

    def _bounds(self, index: int) -> tuple[float, float]:
        step = self.config.max_relative_step[index]
        low = max(self.config.action_low[index], float(self.sent[index]) - step)
        return low, min(self.config.action_high[index], float(self.sent[index]) + step)

    @rule(wanted=ROW)
    def send(self, wanted: list[float]) -> None:
        given = np.array(wanted, np.float32)
        is_limited = self.guard.limit(given)
        assert given.tolist() == np.array(wanted, np.float32).tolist()
        assert is_limited is (self.guard.values != given.tolist())
        for index, value in enumerate(wanted):
            low, high = self._bounds(index)
            assert self.guard.values[index] == pytest.approx(min(max(value, low), high), abs=1e-5)
        self._send()

    @rule(wanted=ROW, instead=st.none() | ROW)
    def think_again(self, wanted: list[float], instead: list[float] | None) -> None:
        """What was chosen and not sent leaves nothing behind."""
        self.guard.limit(np.array(wanted, np.float32))
        if instead is None:
            self.hold()
        else:
            self.send(instead)

    @rule(part=st.lists(st.floats(-1, 1), min_size=3, max_size=3))
    def send_what_is_near(self, part: list[float]) -> None:
        wanted = []
        for index, share in enumerate(part):
            low, high = self._bounds(index)
            middle, half = (low + high) / 2, (high - low) / 2 * 0.999
            wanted.append(middle + share * half)
        out = np.array(wanted, np.float32)
        assert not self.guard.limit(out)
        assert self.guard.values == out.tolist()
        self._send()

    @rule(place=st.integers(0, 2), value=st.sampled_from([np.nan, np.inf, -np.inf]))
    def refuse(self, place: int, value: float) -> None:
        target = self.sent.copy()
        target[place] = value
        chunk = np.tile(target, (T, 1))
        assert self.guard.check_chunk(chunk) is Status.NONFINITE
        if np.isnan(value):
            with pytest.raises(ValueError, match="expected numbers"):
                self.guard.limit(target)

    @rule(wanted=ROW, is_held=st.booleans())
    def one_that_changes_its_copy_changes_nothing(self, wanted: list[float], is_held: bool) -> None:
        if is_held:
            self.guard.hold()
        else:
            self.guard.limit(np.array(wanted, np.float32))
        given = self.guard.actions
        self._send()
        self.sent = given.copy()
        given[:] = 1e9
        given.flags.writeable = False
        self.hold()

    @rule()
    def hold(self) -> None:
        after = self.guard.held_after(self.guard.sent)
        self.guard.hold()
        out = self.guard.actions
        assert out.tolist() == after
        assert out[1] == self.sent[1]
        assert out[2] == self.sent[2]
        assert abs(out[0]) == pytest.approx(max(0.0, abs(float(self.sent[0])) - 0.3), abs=1e-5)
        self._send()

    @rule(place=st.none() | st.floats(-2, 2, width=32))
    def start_anew(self, place: float | None) -> None:
        """Motions are those that were sent, also where a place is given."""
        position = None if place is None else (0.5, place, 0.0)
        values = self.guard.start(position)
        assert values == (self.sent.tolist() if place is None else [float(self.sent[0]), place, 0.0])
        self.guard.sent = values
        self.sent = np.array(values, np.float32)
        self.before = self.sent

    @invariant()
    def inside(self) -> None:
        sent = self.sent.astype(np.float64)
        assert (sent >= self.config.action_low).all()
        assert (sent <= self.config.action_high).all()
        assert (np.abs(sent - self.before) <= self.config.max_relative_step).all()


GuardMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
GuardMachine.TestCase.pytestmark = [pytest.mark.slow]
TestGuard = GuardMachine.TestCase


@given(rows=st.lists(ROW, min_size=T, max_size=T), limits=st.booleans())
def test_a_chunk_is_inside_is_refused_or_is_brought_inside(rows: list[list[float]], limits: bool) -> None:
    changes = {"out_of_range": "limit" if limits else "reject", "range_tolerance": 0}
    config = ControlConfig.from_values({**VALUES, **changes})
    guard = ActionGuard(config, T, START)
    chunk = np.array(rows, np.float32)
    before, low, high = chunk.astype(np.float64), np.array(config.action_low), np.array(config.action_high)
    is_inside = bool(((before >= low) & (before <= high)).all())
    status = guard.check_chunk(chunk)
    assert status is (Status.OK if is_inside else Status.OUT_OF_RANGE)
    if limits:
        np.testing.assert_allclose(chunk, np.clip(before, low, high), atol=1e-7)
        assert (chunk.astype(np.float64) <= high).all()
        assert is_inside or guard.outside.startswith("actions[")
        assert is_inside or "it was brought there" in guard.outside
    else:
        np.testing.assert_array_equal(chunk, before)
    if not is_inside:
        step, index = next((s, i) for s in range(T) for i in range(3) if not low[i] <= before[s, i] <= high[i])
        assert guard.outside.startswith(f"actions[{step}, {index}] is {np.float32(before[step, index])}; expected")


def test_settings_are_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "control.toml"
    path.write_text("\n".join(f"{name} = {value!r}" for name, value in VALUES.items()), encoding="utf-8")
    assert ControlConfig.from_toml(path) == ControlConfig.from_values(VALUES)
    assert ControlConfig.from_values(ControlConfig.from_values(VALUES).to_values()) == ControlConfig.from_values(VALUES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 1}, "unknown keys speed"),
        ({"period_s": 0}, "period_s is 0.0; expected from 1e-06 to 1e\\+06 seconds"),
        ({"period_s": 1e300}, "period_s is 1e\\+300; expected from"),
        ({"stale_after_s": float("nan")}, "stale_after_s is nan"),
        ({"deadline_us": 0}, "deadline_us is 0.0; expected above 0, at most"),
        ({"deadline_us": 1e18}, "deadline_us is 1e\\+18"),
        ({"action_low": [-(10**400), -2.0, 0.0]}, r"action_low\[0\] is -10*…; expected a number with a point"),
        ({"action_low": ["-1", -2.0, 0.0]}, r"action_low\[0\] is '-1'; expected a number"),
        ({"action_low": -1.0}, "action_low is -1.0; expected a list"),
        ({"action_kind": [["delta"], "delta", "delta"]}, r"action_kind\[0\] is \['delta'\]; expected one of"),
        ({"gripper": [[2]]}, r"gripper\[0\] is \[2\]; expected an integer"),
        ({"gripper": [2, 2]}, "expected different dimensions"),
        ({"ensemble_chunks": 257}, "expected an integer from 1 to 256"),
        ({"record_folder": 1}, "record_folder is 1"),
        ({"action_low": [0.1, -2.0, 0.0]}, "expected 0 among them"),
        ({"action_high": [1.0, 2.0]}, "action_high has 2 values and action_low 3"),
        ({"action_high": [1.0, float("nan"), 0.1]}, "dimension 1 has the limits"),
        ({"max_relative_step": [0.0, 0.5, 1.0]}, "max_relative_step of dimension 0 is 0.0"),
        ({"on_fault": "repeat"}, "on_fault is 'repeat'; expected one of hold_last, stop, raise"),
        ({"gripper": [3]}, "expected different dimensions from 0 to 2"),
        ({"use_worker": True}, "use_worker is true without deadline_us"),
        ({"max_consecutive_faults": True}, "max_consecutive_faults is True"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ControlConfigError, match=message):
        ControlConfig.from_values({**VALUES, **change})


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.1), (-0.3, 0.3), (-0.5, 0.5), (0.0, 0.7), (-0.7, 0.0)])
def test_what_is_brought_inside_is_inside_the_limits_as_they_were_given(low: float, high: float) -> None:
    """float32 of -0.1 lies below -0.1, that of -0.7 above; the nearest inside is at most one rounding away."""
    values = {"action_low": [low], "action_high": [high], "max_relative_step": [9.0], "action_kind": ["delta"]}
    config = ControlConfig.from_values({"period_s": 0.05, "out_of_range": "limit", **values})
    guard, chunk = ActionGuard(config, 2), np.array([[-5.0], [5.0]], np.float32)
    assert guard.check_chunk(chunk) is Status.OUT_OF_RANGE
    for limit, found, away in ((low, float(chunk[0, 0]), -np.inf), (high, float(chunk[1, 0]), np.inf)):
        assert low <= found <= high
        beyond = float(np.nextafter(np.float32(found), np.float32(away)))
        assert found == limit or not low <= beyond <= high


def test_what_is_at_a_limit_or_a_whole_step_away_is_sent_as_it_is() -> None:
    # A rounding is taken off the step: what is left is 0.25.
    step = 0.25 + slew_margin(-1.0, 1.0)
    values = {"action_low": [-1.0], "action_high": [1.0], "max_relative_step": [step], "action_kind": ["delta"]}
    guard = ActionGuard(ControlConfig.from_values({"period_s": 0.05, **values}), 1)
    beyond = 2.0**-20
    for before, wanted, sent in (
        *((0.875, 1.0, 1.0), (-0.875, -1.0, -1.0), (0.875, 1.0 + beyond, 1.0), (-0.875, -1.0 - beyond, -1.0)),
        *((0.5, 0.75, 0.75), (0.5, 0.25, 0.25), (0.5, 0.75 + beyond, 0.75), (0.5, 0.25 - beyond, 0.25)),
    ):
        guard.sent = [before]
        assert guard.limit(np.array([wanted], np.float32)) is (wanted != sent)
        assert (guard.values, guard.actions.tolist()) == ([sent], [sent])


def test_what_a_mask_hides_is_no_place() -> None:
    position = np.ma.masked_array([0.0, 1.0, 0.05], [False, False, True])
    with pytest.raises(ControlConfigError, match="position is no list of numbers: what a mask hides is no value; exp"):
        ActionGuard(ControlConfig.from_values(VALUES), T, position)


@pytest.mark.parametrize(
    "position",
    [None, (0.0, 2.5, 0.0), (0.0, float("nan"), 0.0), (0.0, 0.0), "abc", (0.0, "x", 0.0), (0.0, 10**400, 0.0), 1.0],
)
def test_a_robot_whose_place_is_not_known_is_not_moved(position: Any) -> None:
    with pytest.raises(ControlConfigError, match="position"):
        ActionGuard(ControlConfig.from_values(VALUES), T, position)


def test_a_dimension_that_may_not_stand_still_is_refused_where_standing_still_is_0() -> None:
    for low, high in ((0.0, 1.0), (-1.0, 0.0)):
        ControlConfig.from_values({**VALUES, "action_low": [low, -2.0, 0.0], "action_high": [high, 2.0, 0.1]})
    # Of places and grippers it is the last command.
    ControlConfig.from_values({**VALUES, "action_low": [-1.0, 0.5, 0.05]})
    for low, high in ((0.01, 1.0), (-1.0, -0.01)):
        with pytest.raises(ControlConfigError, match="expected 0 among them"):
            ControlConfig.from_values({**VALUES, "action_low": [low, -2.0, 0.0], "action_high": [high, 2.0, 0.1]})


def test_only_the_place_of_what_is_kept_must_be_known_and_inside() -> None:
    with pytest.raises(ControlConfigError, match=r"dimensions \[1, 2\] are absolute"):
        ActionGuard(ControlConfig.from_values(VALUES), T)
    guard = ActionGuard(ControlConfig.from_values(VALUES), T, (50.0, 1.0, 0.0))
    assert guard.sent == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(("tolerance", "step", "room"), [(0.05, 50.0, 5.0), (0.05, 0.2, 0.2), (0.0, 50.0, 0.0)])
def test_a_place_that_is_measured_a_little_outside_is_the_limit(tolerance: float, step: float, room: float) -> None:
    changes = {"action_high": [0.5, 100.0, 0.1], "action_low": [-0.5, 0.0, 0.0], "range_tolerance": tolerance}
    config = ControlConfig.from_values({**VALUES, **changes, "max_relative_step": [0.25, step, 0.05]})
    guard = ActionGuard(config, T, (0.0, 50.0, 0.05))
    for limit, away in ((0.0, -room), (100.0, room)):
        assert guard.start((0.0, limit + 0.99 * away, 0.05))[1] == limit
        with pytest.raises(ControlConfigError, match=r"position\[1\] is .*, or up to .* outside: bring the robot"):
            guard.start((0.0, limit + 1.01 * away + np.sign(away or limit - 50) * 1e-3, 0.05))


def test_a_place_is_outside_from_one_rounding_on() -> None:
    guard = ActionGuard(ControlConfig.from_values({**VALUES, "range_tolerance": 0}), T, START)
    rounding = float(np.spacing(np.float32(2.0)))
    for limit, away in ((-2.0, -rounding), (2.0, rounding)):
        assert guard.start((0.0, limit + away, 0.1))[1] == limit
        assert guard.start((0.0, limit - away, 0.1))[1] == limit - away
        with pytest.raises(ControlConfigError, match=r"position\[1\]"):
            guard.start((0.0, limit + 1.5 * away, 0.1))
