"""One action per tick from chunks of T: what was decoded, where on the tick line it lies, and how chunks are joined.

Arrays, and views of their rows, are made once: to index makes a new view each time. To assign to one takes half as long
as to call numpy.copyto.
"""

from __future__ import annotations

import math

import numpy as np

from runtime.contract import Float32Array
from runtime.control_config import ControlConfig, Strategy

_add, _multiply = np.add, np.multiply
_LONG_AGO = -(2**62)


def action_queue(config: ControlConfig, chunk_length: int) -> ActionQueue:
    """The queue of the strategy that the settings name."""
    kinds = {Strategy.WEIGHTED_AVERAGE: WeightedQueue, Strategy.TEMPORAL_ENSEMBLE: EnsembleQueue}
    return kinds.get(config.strategy, ActionQueue)(config, chunk_length)


class ActionQueue:
    """Serves the newest chunk, whose row i is for tick start + i. For one thread."""

    def __init__(self, config: ControlConfig, chunk_length: int) -> None:
        self._length, self._grippers = chunk_length, config.gripper
        self._start: int | None = None
        self._chunk = np.zeros((chunk_length, config.action_dim), np.float32)
        self._rows = list(self._chunk)

    @property
    def is_empty(self) -> bool:
        return self._start is None

    def clear(self) -> None:
        self._start = None

    def push(self, chunk: Float32Array, start: int, *, is_swap: bool = False) -> None:  # noqa: ARG002  # others need it
        """Take in a copy of chunk [T, A]. start: of its first row, at most the tick that is taken next.

        is_swap: it is the newest chunk again, decoded better.
        """
        self._chunk[...] = chunk
        self._start = start

    def take(self, tick: int, out: Float32Array) -> bool:
        """The action of this tick into `out`; False where the newest chunk has none."""
        start = self._start
        if start is None or not 0 <= tick - start < self._length:
            return False
        out[...] = self._rows[tick - start]
        return True


class WeightedQueue(ActionQueue):
    """Joins the newest chunk, where they overlap, with what would have been served without it; but for grippers: half
    open is no mean of open and closed.
    """

    def __init__(self, config: ControlConfig, chunk_length: int) -> None:
        super().__init__(config, chunk_length)
        #: What was served before the newest chunk, so that a better decode joins it anew.
        self._old = np.zeros_like(self._chunk)
        self._old_rows, self._old_start = list(self._old), self._start
        new_weight = np.full_like(self._chunk, config.new_weight)
        new_weight[:, list(config.gripper)] = 1.0
        old_weight = (1.0 - new_weight).astype(np.float32)
        scratch = np.empty_like(self._chunk)
        # By how many ticks the newest begins later, a negative number if earlier: what is joined with what.
        shifts = [*range(chunk_length), *range(1 - chunk_length, 0)]
        self._joins, self._old_joins = (
            [_Join(old, new, new_weight, old_weight, scratch, shift) for shift in shifts]
            for old, new in ((self._old, self._chunk), (self._chunk, self._old))
        )

    def clear(self) -> None:
        self._start = self._old_start = None

    def push(self, chunk: Float32Array, start: int, *, is_swap: bool = False) -> None:
        if not is_swap:
            self._chunk, self._old = self._old, self._chunk
            self._rows, self._old_rows = self._old_rows, self._rows
            self._joins, self._old_joins = self._old_joins, self._joins
            self._old_start = self._start
        self._start, old_start = start, self._old_start
        if old_start is None or not -self._length < start - old_start < self._length:
            self._chunk[...] = chunk
            return
        join = self._joins[start - old_start]
        _multiply(chunk, join.new_weight, self._chunk)
        _multiply(join.old, join.old_weight, join.part)
        _add(join.fresh, join.part, join.fresh)


class _Join:
    """Views of where a chunk that begins `shift` ticks later than the old one overlaps it; beside, its weight is 1."""

    def __init__(
        self,
        old: Float32Array,
        new: Float32Array,
        new_weight: Float32Array,
        old_weight: Float32Array,
        scratch: Float32Array,
        shift: int,
    ) -> None:
        length = len(new)
        fresh, past = slice(max(-shift, 0), length - max(shift, 0)), slice(max(shift, 0), length + min(shift, 0))
        self.old, self.fresh = old[past], new[fresh]
        self.old_weight, self.part = old_weight[fresh], scratch[fresh]
        self.new_weight = np.ones_like(new_weight)
        self.new_weight[fresh] = new_weight[fresh]


class EnsembleQueue(ActionQueue):
    """Averages what the last chunks say of a tick, the oldest weighted most, as ACT does; but for grippers."""

    def __init__(self, config: ControlConfig, chunk_length: int) -> None:
        super().__init__(config, chunk_length)
        count = config.ensemble_chunks
        # By tick, modulo T, then by chunk: what all chunks say of a tick lies together.
        ring = np.zeros((chunk_length, count, config.action_dim), np.float32)
        self._says, self._by_slot = list(ring), [list(row) for row in ring]
        #: Of slot and first row, where a chunk goes: to the end of the ring, and on from its beginning.
        self._places = [
            [(ring[first:, slot], ring[:first, slot]) for first in range(chunk_length)] for slot in range(count)
        ]
        self._starts = [_LONG_AGO] * count
        #: By the slot of the newest: all of them, the oldest first.
        self._orders = [[(newest + 1 + age) % count for age in range(count)] for newest in range(count)]
        self._newest = 0
        weights = [math.exp(-config.ensemble_decay * index) for index in range(count)]
        #: By number of chunks, of the oldest first; their sum is 1.
        self._shares = [[weight / sum(weights[:found]) for weight in weights[:found]] for found in range(count + 1)]
        # The same twice over, and by the slot of the newest which part of it says slot by slot what that one gets.
        self._turned = [
            np.array(2 * ([0.0] * (count - found) + shares), np.float32) for found, shares in enumerate(self._shares)
        ]
        self._turns = [slice(count - 1 - newest, 2 * count - 1 - newest) for newest in range(count)]
        self._share = np.zeros(count, np.float32)

    def clear(self) -> None:
        self._start = None
        for slot in range(len(self._starts)):
            self._starts[slot] = _LONG_AGO

    def push(self, chunk: Float32Array, start: int, *, is_swap: bool = False) -> None:
        if not is_swap:
            self._newest = (self._newest + 1) % len(self._starts)
        first = start % self._length
        end, beginning = self._places[self._newest][first]
        end[...] = chunk[: self._length - first]
        beginning[...] = chunk[self._length - first :]
        self._start = self._starts[self._newest] = start

    def take(self, tick: int, out: Float32Array) -> bool:
        start, length, starts = self._start, self._length, self._starts
        if start is None or not 0 <= tick - start < length:
            return False
        place, newest, passed = tick % length, self._newest, tick - length
        order = self._orders[newest]
        found = [slot for slot in order if starts[slot] > passed]
        number = len(found)
        if found[0] == order[-number]:
            share = self._turned[number][self._turns[newest]]
        else:
            # One between them began so early that it has ended before an older one.
            share = self._share
            share[:] = 0
            share[found] = self._shares[number]
        share.dot(self._says[place], out)
        for index in self._grippers:
            out[index] = self._by_slot[place][newest][index]
        return True
