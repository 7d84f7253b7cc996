"""The queue against lists of rows by tick."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from runtime.control_config import ControlConfig
from runtime.control_queue import ActionQueue, action_queue
from tests.runtime.test_control_guard import ROW, VALUES, T

CHUNKS = st.lists(ROW, min_size=T, max_size=T)


class QueueMachine(RuleBasedStateMachine):
    """Against lists of rows by tick."""

    strategy = "latest_only"

    def __init__(self) -> None:
        super().__init__()
        self.config = ControlConfig.from_values({**VALUES, "strategy": self.strategy, "ensemble_chunks": 3})
        self.queue = action_queue(self.config, T)
        self.tick = self.start = 0
        self.chunks: list[dict[int, np.ndarray]] = []
        self.blended: dict[int, np.ndarray] = {}
        self.base: dict[int, np.ndarray] = {}

    @rule(rows=CHUNKS, delay=st.integers(0, 2))
    def push(self, rows: list[list[float]], delay: int) -> None:
        # A newer chunk may begin before an older one: ticks and delays are rounded.
        self.start = self.tick - delay
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
        rows = [chunk[self.tick] for chunk in self.chunks[-3:] if self.tick in chunk]
        weights = np.exp(-self.config.ensemble_decay * np.arange(len(rows)))
        mean = np.average(rows, axis=0, weights=weights)
        mean[2] = rows[-1][2]
        return np.asarray(mean)


class WeightedMachine(QueueMachine):
    strategy = "weighted_average"


class EnsembleMachine(QueueMachine):
    strategy = "temporal_ensemble"


for machine in (QueueMachine, WeightedMachine, EnsembleMachine):
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestLatestOnly, TestWeightedAverage, TestTemporalEnsemble = (
    machine.TestCase for machine in (QueueMachine, WeightedMachine, EnsembleMachine)
)


def _queue(strategy: str) -> ActionQueue:
    return action_queue(ControlConfig.from_values({**VALUES, "strategy": strategy, "new_weight": 0.75}), T)


def _served(queue: ActionQueue, tick: int) -> list[float] | None:
    out = np.full(3, np.nan, np.float32)
    return out.tolist() if queue.take(tick, out) else None


@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
def test_chunks_are_averaged_where_they_overlap_whichever_begins_first(shift: int) -> None:
    queue = _queue("weighted_average")
    queue.push(np.zeros((T, 3), np.float32), 10)
    queue.push(np.ones((T, 3), np.float32), 10 + shift)
    for tick in range(6, 16):
        is_new, is_old = 0 <= tick - 10 - shift < T, 0 <= tick - 10 < T
        expected = None if not is_new else [0.75, 0.75, 1.0] if is_old else [1.0, 1.0, 1.0]
        assert _served(queue, tick) == expected, tick


def test_a_better_decode_takes_the_place_of_its_draft_in_the_average() -> None:
    queue = _queue("weighted_average")
    queue.push(np.zeros((T, 3), np.float32), 0)
    queue.push(np.full((T, 3), 9.0, np.float32), 1)
    queue.push(np.ones((T, 3), np.float32), 1, is_swap=True)
    assert _served(queue, 1) == [0.75, 0.75, 1.0]


def test_the_queue_keeps_a_copy() -> None:
    queue, chunk = _queue("latest_only"), np.ones((T, 3), np.float32)
    queue.push(chunk, 0)
    chunk[:] = 9
    assert _served(queue, 0) == [1.0, 1.0, 1.0]
    assert not queue.is_empty
    queue.clear()
    assert queue.is_empty
    assert _served(queue, 0) is None
