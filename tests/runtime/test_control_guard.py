"""Guard and queue against a specification in plain Python; settings that make no sense are refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.control_config import ControlConfig, Status
from runtime.control_errors import ControlConfigError
from runtime.control_guard import ActionGuard
from runtime.control_queue import ActionQueue

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
CHUNKS = st.lists(st.lists(NUMBERS, min_size=3, max_size=3), min_size=T, max_size=T)


class GuardMachine(RuleBasedStateMachine):
    """Whatever is asked for, what leaves is inside limits and slew; standing still keeps places and ends motions."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ControlConfig.from_values(VALUES)
        self.guard = ActionGuard(self.config, T, START)
        self.out = np.zeros(3, np.float32)
        self.before = self.sent = self.guard.last.copy()

    def _commit(self) -> None:
        self.guard.commit(self.out)
        self.before, self.sent = self.sent, self.out.copy()

    @rule(wanted_values=st.lists(NUMBERS, min_size=3, max_size=3))
    def send(self, wanted_values: list[float]) -> None:
        assert self.guard.limit(np.array(wanted_values, np.float32), self.out)
        for index, wanted in enumerate(wanted_values):
            step = self.config.max_relative_step[index]
            low = max(self.config.action_low[index], float(self.sent[index]) - step)
            high = min(self.config.action_high[index], float(self.sent[index]) + step)
            assert self.out[index] == pytest.approx(min(max(wanted, low), high), abs=1e-5)
        self._commit()

    @rule(place=st.integers(0, 2), value=st.sampled_from([np.nan, np.inf, -np.inf]))
    def refuse(self, place: int, value: float) -> None:
        target = self.sent.copy()
        target[place] = value
        if np.isnan(value):
            assert not self.guard.limit(target, self.out)
        chunk = np.tile(target, (T, 1))
        assert self.guard.check_chunk(chunk) is Status.NONFINITE

    @rule()
    def hold(self) -> None:
        self.guard.hold(self.out)
        assert self.out[1] == self.sent[1]
        assert self.out[2] == self.sent[2]
        assert abs(self.out[0]) == pytest.approx(max(0.0, abs(float(self.sent[0])) - 0.3), abs=1e-5)
        self._commit()

    @invariant()
    def inside(self) -> None:
        sent = self.sent.astype(np.float64)
        assert (sent >= self.config.action_low).all()
        assert (sent <= self.config.action_high).all()
        assert (np.abs(sent - self.before) <= self.config.max_relative_step).all()


class QueueMachine(RuleBasedStateMachine):
    """Against lists of rows by tick."""

    strategy = "latest_only"

    def __init__(self) -> None:
        super().__init__()
        self.config = ControlConfig.from_values({**VALUES, "strategy": self.strategy, "ensemble_chunks": 2})
        self.queue = ActionQueue(self.config, T)
        self.tick = self.start = 0
        self.chunks: list[dict[int, np.ndarray]] = []
        self.blended: dict[int, np.ndarray] = {}
        self.base: dict[int, np.ndarray] = {}

    @rule(rows=CHUNKS, delay=st.integers(0, 2))
    def push(self, rows: list[list[float]], delay: int) -> None:
        self.start = max(self.start, self.tick - delay)
        self.base = self.blended
        self.chunks.append({})
        self._put(rows, is_swap=False)

    @rule(rows=CHUNKS)
    def swap(self, rows: list[list[float]]) -> None:
        if self.chunks:
            self._put(rows, is_swap=True)

    def _put(self, rows: list[list[float]], *, is_swap: bool) -> None:
        chunk = {self.start + index: np.array(row, np.float32) for index, row in enumerate(rows)}
        self.queue.push(np.array(rows, np.float32), self.start, is_swap=is_swap)
        self.chunks[-1] = chunk
        weight = np.array([0.7, 0.7, 1.0])
        self.blended = {
            tick: weight * row + (1 - weight) * self.base[tick] if tick in self.base else row
            for tick, row in chunk.items()
        }

    @rule()
    def clear(self) -> None:
        self.queue.clear()
        self.chunks, self.blended, self.base = [], {}, {}

    @rule(ticks=st.integers(1, 4))
    def wait(self, ticks: int) -> None:
        self.tick += ticks

    @invariant()
    def serves_what_is_specified(self) -> None:
        out = np.zeros(3, np.float32)
        is_there = bool(self.chunks) and self.tick in self.chunks[-1]
        assert self.queue.take(self.tick, out) is is_there
        if is_there:
            np.testing.assert_allclose(out, self._expected(), atol=1e-5)

    def _expected(self) -> np.ndarray:
        if self.strategy == "latest_only":
            return self.chunks[-1][self.tick]
        if self.strategy == "weighted_average":
            return self.blended[self.tick]
        rows = [chunk[self.tick] for chunk in self.chunks[-2:] if self.tick in chunk]
        weights = np.exp(-self.config.ensemble_decay * np.arange(len(rows)))
        mean = np.average(rows, axis=0, weights=weights)
        mean[2] = rows[-1][2]
        return np.asarray(mean)


class WeightedMachine(QueueMachine):
    strategy = "weighted_average"


class EnsembleMachine(QueueMachine):
    strategy = "temporal_ensemble"


for machine in (GuardMachine, QueueMachine, WeightedMachine, EnsembleMachine):
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestGuard, TestLatestOnly = GuardMachine.TestCase, QueueMachine.TestCase
TestWeightedAverage, TestTemporalEnsemble = WeightedMachine.TestCase, EnsembleMachine.TestCase


def test_settings_are_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "control.toml"
    path.write_text("\n".join(f"{name} = {value!r}" for name, value in VALUES.items()), encoding="utf-8")
    assert ControlConfig.from_toml(path) == ControlConfig.from_values(VALUES)
    assert ControlConfig.from_values(ControlConfig.from_values(VALUES).to_values()) == ControlConfig.from_values(VALUES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 1}, "unknown keys speed"),
        ({"period_s": 0}, "period_s is 0; expected a finite number above 0"),
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


@pytest.mark.parametrize("position", [None, (0.0, 2.5, 0.0), (0.0, float("nan"), 0.0), (0.0, 0.0)])
def test_a_robot_whose_place_is_not_known_is_not_moved(position: tuple[float, ...] | None) -> None:
    with pytest.raises(ControlConfigError, match="position"):
        ActionGuard(ControlConfig.from_values(VALUES), T, position)
