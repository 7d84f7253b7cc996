"""One action per tick from chunks of T: what was decoded, where on the tick line it lies, and how chunks are joined."""

from __future__ import annotations

import math

import numpy as np

from runtime.contract import Float32Array
from runtime.control_config import ControlConfig, Strategy


class ActionQueue:
    """Chunks on the line of ticks: row i of a chunk is for tick start + i. For one thread.

    latest_only serves the newest chunk. weighted_average joins the newest, where they overlap, with what would have
    been served without it. temporal_ensemble averages what the last chunks say of a tick, as ACT does. Grippers are
    never averaged: half open is no mean of open and closed.
    """

    def __init__(self, config: ControlConfig, chunk_length: int) -> None:
        self._length, size = chunk_length, config.action_dim
        self._strategy = config.strategy
        count = {Strategy.LATEST_ONLY: 1, Strategy.WEIGHTED_AVERAGE: 2}.get(config.strategy, config.ensemble_chunks)
        self._chunks = [np.zeros((chunk_length, size), np.float32) for _ in range(count)]
        # Views made once: indexing makes a new one each time.
        self._rows = [list(chunk) for chunk in self._chunks]
        #: Tick of row 0, by chunk; None for no chunk.
        self._starts: list[int | None] = [None] * count
        self._order = list(range(count))
        self._new_weight = np.full(size, config.new_weight, np.float32)
        self._new_weight[list(config.gripper)] = 1.0
        self._old_weight = (1.0 - self._new_weight).astype(np.float32)
        self._weights = [np.float32(math.exp(-config.ensemble_decay * index)) for index in range(count)]
        totals = np.cumsum(np.array(self._weights, np.float64))
        self._inverse_totals = [np.float32(1.0 / total) for total in totals]
        self._is_gripper = np.zeros(size, np.bool_)
        self._is_gripper[list(config.gripper)] = True
        self._has_gripper = bool(config.gripper)
        self._part = np.empty(size, np.float32)
        self._scratch = np.empty((chunk_length, size), np.float32)

    @property
    def is_empty(self) -> bool:
        return self._starts[self._order[-1]] is None

    def clear(self) -> None:
        for index in range(len(self._starts)):
            self._starts[index] = None

    def push(self, chunk: Float32Array, start: int, *, is_swap: bool = False) -> None:
        """Take in a copy of chunk [T, A]. is_swap: it is the newest chunk again, decoded better."""
        order, starts = self._order, self._starts
        if self._strategy is Strategy.WEIGHTED_AVERAGE:
            self._push_weighted(chunk, start, is_swap)
            return
        if not is_swap and len(order) > 1:
            order.append(order.pop(0))
        newest = order[-1]
        np.copyto(self._chunks[newest], chunk)
        starts[newest] = start

    def take(self, tick: int, out: Float32Array) -> bool:
        """The action of this tick into `out`; False where no chunk has one."""
        newest = self._order[-1]
        start = self._starts[newest]
        if start is None or not 0 <= tick - start < self._length:
            return False
        row = self._rows[newest][tick - start]
        if self._strategy is not Strategy.TEMPORAL_ENSEMBLE:
            np.copyto(out, row)
            return True
        self._average(tick, out)
        if self._has_gripper:
            np.copyto(out, row, where=self._is_gripper)
        return True

    def _average(self, tick: int, out: Float32Array) -> None:
        found, part = 0, self._part
        for index in self._order:
            start = self._starts[index]
            if start is None or not 0 <= tick - start < self._length:
                continue
            row = self._rows[index][tick - start]
            if found:
                np.multiply(row, self._weights[found], part)
                np.add(out, part, out)
            else:
                np.copyto(out, row)
            found += 1
        np.multiply(out, self._inverse_totals[found - 1], out)

    def _push_weighted(self, chunk: Float32Array, start: int, is_swap: bool) -> None:
        """The older buffer keeps what was served before the newest chunk, so that a better decode joins it anew."""
        if not is_swap:
            self._order.reverse()
        old, new = self._order
        target, old_start = self._chunks[new], self._starts[old]
        np.copyto(target, chunk)
        self._starts[new] = start
        if old_start is None:
            return
        shift, length = start - old_start, self._length
        if not 0 <= shift < length:
            return
        overlap = length - shift
        part = self._scratch[:overlap]
        np.multiply(self._chunks[old][shift:], self._old_weight, part)
        fresh = target[:overlap]
        np.multiply(fresh, self._new_weight, fresh)
        np.add(fresh, part, fresh)
