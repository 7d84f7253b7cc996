"""One action per tick from chunks of T: what was decoded, where on the tick line it lies, and how chunks are joined.

Arrays, and views of their rows, are made once: to index makes a new view each time. To assign to one takes half as long
as to call numpy.copyto.
"""

from __future__ import annotations

import math
import struct

import numpy as np

from runtime.contract import Float32Array
from runtime.control_config import ControlConfig, Strategy

_add, _multiply = np.add, np.multiply


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
        """Take in a copy of chunk [T, A]. is_swap: it is the newest chunk again, decoded better."""
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
        self._new_weight = np.full_like(self._chunk, config.new_weight)
        self._new_weight[:, list(config.gripper)] = 1.0
        self._old_weight = (1.0 - self._new_weight).astype(np.float32)
        self._scratch = np.empty_like(self._chunk)

    def clear(self) -> None:
        self._start = self._old_start = None

    def push(self, chunk: Float32Array, start: int, *, is_swap: bool = False) -> None:
        if not is_swap:
            self._chunk, self._old = self._old, self._chunk
            self._rows, self._old_rows = self._old_rows, self._rows
            self._old_start = self._start
        target, old_start = self._chunk, self._old_start
        target[...] = chunk
        self._start = start
        if old_start is None:
            return
        first, end = max(start, old_start), min(start, old_start) + self._length
        if first >= end:
            return
        part, fresh = self._scratch[: end - first], target[first - start : end - start]
        _multiply(self._old[first - old_start : end - old_start], self._old_weight[: end - first], part)
        _multiply(fresh, self._new_weight[: end - first], fresh)
        _add(fresh, part, fresh)


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
        self._starts: list[int | None] = [None] * count
        self._order = list(range(count))
        weights = [math.exp(-config.ensemble_decay * index) for index in range(count)]
        #: By number of chunks, of the oldest first; their sum is 1.
        self._shares = [[weight / sum(weights[:found]) for weight in weights[:found]] for found in range(count + 1)]
        self._none = [0.0] * count
        self._share = np.zeros(count, np.float32)
        self._bytes, self._pack = self._share.data.cast("B"), struct.Struct(f"={count}f").pack_into

    def clear(self) -> None:
        self._start = None
        for index in range(len(self._starts)):
            self._starts[index] = None

    def push(self, chunk: Float32Array, start: int, *, is_swap: bool = False) -> None:
        order = self._order
        if not is_swap:
            order.append(order.pop(0))
        first = start % self._length
        end, beginning = self._places[order[-1]][first]
        end[...] = chunk[: self._length - first]
        beginning[...] = chunk[self._length - first :]
        self._start = self._starts[order[-1]] = start

    def take(self, tick: int, out: Float32Array) -> bool:
        newest, length, starts = self._start, self._length, self._starts
        if newest is None or not 0 <= tick - newest < length:
            return False
        place, order = tick % length, self._order
        found = [slot for slot in order if (start := starts[slot]) is not None and 0 <= tick - start < length]
        shares = self._none[:]
        for slot, share in zip(found, self._shares[len(found)], strict=True):
            shares[slot] = share
        self._pack(self._bytes, 0, *shares)
        self._share.dot(self._says[place], out)
        for index in self._grippers:
            out[index] = self._by_slot[place][order[-1]][index]
        return True
