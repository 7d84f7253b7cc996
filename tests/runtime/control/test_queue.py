"""The queue against lists of rows by tick."""

import itertools

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rfsq.runtime.control.config import ControlConfig
from rfsq.runtime.control.queue import ActionQueue, action_queue
from tests.runtime.control.test_guard import ROW, VALUES, T

CHUNKS = st.lists(ROW, min_size=T, max_size=T)


#: How old what is averaged may be, in ticks.
STALE = 2


class QueueMachine(RuleBasedStateMachine):
    """Against lists of rows by tick. A chunk was observed so many ticks before it came, never before an older one."""

    strategy = "latest_only"

    def __init__(self) -> None:
        super().__init__()
        self.config = ControlConfig.from_values({**VALUES, "strategy": self.strategy, "ensemble_chunks": 3})
        self.queue = action_queue(self.config, T)
        self.tick = self.observed = 0
        #: When it was observed, and what it says by tick.
        self.chunks: list[tuple[int, dict[int, np.ndarray]]] = []

    @rule(rows=CHUNKS, delay=st.integers(0, 2), age=st.integers(0, STALE))
    def push(self, rows: list[list[float]], delay: int, age: int) -> None:
        self.tick += 1
        # A newer chunk may begin before an older one: ticks and delays are rounded.
        self.start, self.observed = self.tick - delay, max(self.observed, self.tick - age)
        self.chunks.append((0, {}))
        self._put(rows, is_swap=False)

    @rule(rows=CHUNKS)
    def swap(self, rows: list[list[float]]) -> None:
        if self.chunks:
            self._put(rows, is_swap=True)

    def _put(self, rows: list[list[float]], *, is_swap: bool) -> None:
        self.queue.push(np.array(rows, np.float32), self.start, self.observed, is_swap=is_swap)
        line = {self.start + index: np.array(row, np.float32) for index, row in enumerate(rows)}
        self.chunks[-1] = self.observed, line

    @rule()
    def clear(self) -> None:
        self.queue.clear()
        self.chunks = []

    @rule(ticks=st.integers(1, 4))
    def wait(self, ticks: int) -> None:
        self.tick += ticks

    @invariant()
    def serves_what_is_specified(self) -> None:
        found = self.queue.take(self.tick, self.tick - STALE)
        is_there = bool(self.chunks) and self.tick in self.chunks[-1][1]
        assert (found is not None) is is_there
        if found is not None:
            np.testing.assert_allclose(found, self._expected(), atol=1e-5)
            assert self.queue.first_observed_ns >= min(self.tick - STALE, self.observed)

    def _expected(self) -> np.ndarray:
        *others, (_, newest) = self.chunks
        rows = [
            line[self.tick] if self.tick in line and observed >= self.tick - STALE else None
            for observed, line in others
        ]
        rows.append(newest[self.tick])
        if self.strategy == "latest_only":
            return rows[-1]
        if self.strategy == "weighted_average":
            mean, weight = None, np.array([0.7, 0.7, 1.0])
            for row in rows:
                mean = row if row is None or mean is None else weight * row + (1 - weight) * mean
            return np.asarray(mean)
        rows = [row for row in rows[-3:] if row is not None]
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
    machine.TestCase.pytestmark = [pytest.mark.slow]
TestLatestOnly, TestWeightedAverage, TestTemporalEnsemble = (
    machine.TestCase for machine in (QueueMachine, WeightedMachine, EnsembleMachine)
)


def _queue(strategy: str, **changes: object) -> ActionQueue:
    values = {**VALUES, "strategy": strategy, "new_weight": 0.75, **changes}
    return action_queue(ControlConfig.from_values(values), T)


def _served(queue: ActionQueue, tick: int, oldest: int = 0) -> list[float] | None:
    found = queue.take(tick, oldest)
    return None if found is None else found.tolist()


@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
def test_chunks_are_averaged_where_they_overlap_whichever_begins_first(shift: int) -> None:
    for tick in range(6, 16):
        queue = _queue("weighted_average")
        queue.push(np.zeros((T, 3), np.float32), 10, 0, is_swap=False)
        queue.push(np.ones((T, 3), np.float32), 10 + shift, 0, is_swap=False)
        is_new, is_old = 0 <= tick - 10 - shift < T, tick - 10 < T
        # What has not begun is never asked for.
        if is_new and tick < 10:
            continue
        expected = None if not is_new else [0.75, 0.75, 1.0] if is_old else [1.0, 1.0, 1.0]
        assert _served(queue, tick) == expected, tick


def test_a_better_decode_takes_the_place_of_its_draft_in_the_average() -> None:
    queue = _queue("weighted_average")
    queue.push(np.zeros((T, 3), np.float32), 0, 0, is_swap=False)
    queue.push(np.full((T, 3), 9.0, np.float32), 1, 0, is_swap=False)
    queue.push(np.ones((T, 3), np.float32), 1, 0, is_swap=True)
    assert _served(queue, 1) == [0.75, 0.75, 1.0]


@pytest.mark.parametrize(("strategy", "both"), [("weighted_average", 0.75), ("temporal_ensemble", 0.5)])
def test_what_is_too_old_has_no_part_in_an_average_any_more(strategy: str, both: float) -> None:
    queue = _queue(strategy, ensemble_decay=0.0)
    queue.push(np.zeros((T, 3), np.float32), 0, 100, is_swap=False)
    queue.push(np.ones((T, 3), np.float32), 1, 200, is_swap=False)
    assert _served(queue, 1, 100) == [both, both, 1.0]
    assert queue.first_observed_ns == 100
    assert _served(queue, 1, 101) == [1.0, 1.0, 1.0]
    assert queue.first_observed_ns == 200
    # The newest is the caller's affair.
    assert _served(queue, 1, 201) == [1.0, 1.0, 1.0]


def test_the_queue_keeps_a_copy() -> None:
    queue, chunk = _queue("latest_only"), np.ones((T, 3), np.float32)
    queue.push(chunk, 0, 0, is_swap=False)
    chunk[:] = 9
    assert _served(queue, 0) == [1.0, 1.0, 1.0]
    queue.clear()
    assert _served(queue, 0) is None


@pytest.mark.parametrize("strategy", ["weighted_average", "temporal_ensemble"])
def test_wherever_chunks_begin_each_tick_is_of_those_that_speak_of_it(strategy: str) -> None:
    """Four chunks in a row, each up to 9 T after the one before, or a little before it: every tick from each on."""
    gaps = [-2, -1, 0, 1, 2, 3, *range(4, 9 * T)]
    length, queue = 4, action_queue(ControlConfig.from_values({**VALUES, "strategy": strategy, "new_weight": 0.75}), 4)
    for first, second, third in itertools.product(gaps, gaps[:8], [*gaps[:7], 11, 13, 17]):
        queue.clear()
        starts = list(itertools.accumulate((100, first, second, third)))
        asked = 0
        for number, start in enumerate(starts):
            queue.push(np.full((length, 3), 2.0**number, np.float32), start, 0, is_swap=False)
            last = start + length if number + 1 == len(starts) else max(start + 1, starts[number + 1])
            for tick in range(max(asked, start), last):
                said = [2.0**index if 0 <= tick - other < length else None for index, other in enumerate(starts)]
                expected = _mean(strategy, said[: number + 1])
                assert _first(queue, tick) == (None if expected is None else pytest.approx(expected)), (starts, tick)
                asked = tick


def _mean(strategy: str, said: list[float | None]) -> float | None:
    """Of what the chunks say of a tick, in their order; None where the newest says nothing."""
    if said[-1] is None:
        return None
    if strategy == "temporal_ensemble":
        values = [value for value in said if value is not None]
        return float(np.average(values, weights=np.exp(-0.01 * np.arange(len(values)))))
    mean = None
    for value in said:
        mean = value if value is None or mean is None else 0.75 * value + 0.25 * mean
    return mean


def _first(queue: ActionQueue, tick: int) -> float | None:
    found = queue.take(tick, 0)
    return None if found is None else float(found[0])


def test_what_is_just_young_enough_has_a_part_and_so_has_what_came_after_what_is_not() -> None:
    queue = _queue("weighted_average")
    for number, observed in enumerate((100, 200, 300)):
        queue.push(np.full((T, 3), [1.0, 2.0, 4.0][number], np.float32), 0, observed, is_swap=False)
    assert _first(queue, 0) == 0.75 * 4 + 0.25 * (0.75 * 2 + 0.25 * 1)
    assert _first(queue, 1) == 0.75 * 4 + 0.25 * (0.75 * 2 + 0.25 * 1)
    for tick, oldest, expected in ((1, 200, 0.75 * 4 + 0.25 * 2), (2, 201, 4.0)):
        found = queue.take(tick, oldest)
        assert found is not None
        assert found[0] == expected
