"""Queues that give one action per tick from chunks of T, and join chunks where they overlap.

Arrays and views of their rows are made once, since indexing makes a new view each time.
"""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np

from ..bundle.arrays import Float32Array
from .config import ControlConfig, Strategy


def action_queue(config: ControlConfig, chunk_length: int) -> ActionQueue:
    """The queue of the strategy that the settings name."""
    kinds = {Strategy.WEIGHTED_AVERAGE: WeightedQueue, Strategy.TEMPORAL_ENSEMBLE: EnsembleQueue}
    return kinds.get(config.strategy, ActionQueue)(config, chunk_length)


class ActionQueue:
    """Serves the newest chunk, whose row i is for tick start + i. For one thread."""

    #: When the oldest chunk that has a part in the last action was observed.
    first_observed_ns: int

    def __init__(self, config: ControlConfig, chunk_length: int) -> None:
        self._length = chunk_length
        self._start: int | None = None
        self._chunk = np.zeros((chunk_length, config.action_dim), np.float32)
        self._rows = list(self._chunk)

    def clear(self) -> None:
        self._start = None

    def push(self, chunk: Float32Array, start: int, observed_ns: int, *, is_swap: bool) -> None:  # noqa: ARG002  # others need it
        """Take in a copy of chunk, float32 [T, A]. start: the tick of its first row, at most the tick taken next.

        observed_ns: at least that of the chunk before. is_swap: this is the newest chunk again, decoded in full.
        """
        self._chunk[...] = chunk
        self._start, self.first_observed_ns = start, observed_ns

    def take(self, tick: int, oldest_ns: int) -> Float32Array | None:  # noqa: ARG002  # others need it
        """The action of this tick, float32 [A], to be read before the next call; None if the newest chunk has none.

        oldest_ns: chunks observed before have no part in it; the caller checks the newest one itself. Ticks and
        oldest_ns never decrease until `clear`.
        """
        start = self._start
        if start is None or not 0 <= tick - start < self._length:
            return None
        return self._rows[tick - start]


_LONG_AGO = -sys.maxsize
#: A chunk that has a part in the mean: its slot, the tick after its last action, and when it was observed.
_Part = tuple[int, int, int]


class EnsembleQueue(ActionQueue):
    """Averages what the last chunks have for a tick, the oldest weighted most, as ACT does.

    Grippers follow the newest chunk: half open is no mean of open and closed.
    """

    #: From the oldest to the newest chunk.
    _parts: list[_Part]
    #: Whether they end in the order in which they came.
    _is_sorted: bool
    #: The first tick for which one of them has no action any more.
    _first_end: int
    #: The tick of the first line.
    _base: int
    #: The slot of the newest chunk, and the weight of each slot in the mean.
    _newest: int
    _share: Float32Array

    def __init__(self, config: ControlConfig, chunk_length: int) -> None:
        super().__init__(config, chunk_length)
        # A locked dimension has one value, which a mean could miss by a rounding.
        self._unmixed = (*config.gripper, *config.locked)
        #: Weights by number of chunks, the oldest first; their sum is 1.
        self._shares = [np.array(shares, np.float32) for shares in self._weights(config)]
        self._most = count = len(self._shares) - 1
        self._slots = itertools.cycle(range(count))
        # By tick, then by chunk: the actions of all chunks for a tick lie together. With room for four chunk lengths,
        # what is left has to be moved to the beginning only once in two chunks' time.
        self._room = 4 * chunk_length
        self._lines = np.zeros((self._room, count, config.action_dim), np.float32)
        self._says = list(self._lines)
        self._last_first = self._room - chunk_length
        #: Where a chunk goes, by slot and first line.
        self._places = [
            [self._lines[first : first + chunk_length, slot] for first in range(self._last_first + 1)]
            for slot in range(count)
        ]
        # The weights twice in a row: a window of it has the weights in the order of slots, wherever the newest one is.
        padded = [np.append(np.zeros(count - len(shares), np.float32), shares) for shares in self._shares]
        turned = [np.append(shares, shares) for shares in padded]
        self._turned = [
            [shares[count - 1 - newest : 2 * count - 1 - newest] for newest in range(count)] for shares in turned
        ]
        self._out = np.zeros(config.action_dim, np.float32)
        # Reading a single number from these takes half the time.
        self._out_numbers, self._numbers = self._out.data, self._lines.data
        self.clear()

    def _weights(self, config: ControlConfig) -> list[list[float]]:
        """Of 0, 1 … chunks, up to the most that are averaged; of each number the oldest first."""
        most = config.ensemble_chunks
        weights = [math.exp(-config.ensemble_decay * age) for age in range(most)]
        return [[weight / sum(weights[:number]) for weight in weights[:number]] for number in range(most + 1)]

    def _remaining(self, tick: int, oldest_ns: int) -> list[_Part]:
        """The chunks that still have a part in the mean; the newest always has."""
        *others, newest = self._parts
        return [*(part for part in others if part[1] > tick and part[2] >= oldest_ns), newest]

    def clear(self) -> None:
        self._start = None
        self._parts, self._is_sorted, self._base = [], True, _LONG_AGO

    def push(self, chunk: Float32Array, start: int, observed_ns: int, *, is_swap: bool) -> None:
        if not is_swap:
            self._newest = slot = next(self._slots)
            parts, before = self._parts, self._start
            if parts and parts[0][0] == slot:
                del parts[0]
            if before is not None and start < before:
                self._is_sorted = False
            parts.append((slot, start + self._length, observed_ns))
            self._settle(parts)
        first = start - self._base
        if first > self._last_first:
            first = self._move_up(start)
        self._places[self._newest][first][...] = chunk
        self._start = start

    def _move_up(self, start: int) -> int:
        """Make room for a chunk that begins on this tick; returns its first line.

        Later chunks begin less than T before it, since the tick to be served next lies less than T after it: T lines
        before it are enough. The lines from it on are kept.
        """
        length = self._length
        kept = self._lines[start - self._base :]
        self._base = start - length
        self._lines[length : length + len(kept)] = kept
        return length

    def take(self, tick: int, oldest_ns: int) -> Float32Array | None:
        start = self._start
        if start is None or not 0 <= tick - start < self._length:
            return None
        if tick >= self._first_end or oldest_ns > self.first_observed_ns:
            self._settle(self._remaining(tick, oldest_ns))
        line, out = tick - self._base, self._out
        self._share.dot(self._says[line], out)
        for index in self._unmixed:
            self._out_numbers[index] = self._numbers[line, self._newest, index]
        return out

    def _settle(self, parts: list[_Part]) -> None:
        """Average these from now on, the oldest first."""
        self._parts, number = parts, len(parts)
        _, self._first_end, self.first_observed_ns = parts[0]
        if self._is_sorted:
            # They end in the order in which they came, so those that are left came one after another.
            self._share = self._turned[number][self._newest]
            return
        self._first_end = min([end for _, end, _ in parts])
        self._share = np.zeros(self._most, np.float32)
        self._share[[slot for slot, _, _ in parts]] = self._shares[number]


class WeightedQueue(EnsembleQueue):
    """Averages the newest chunk with what would have been served without it; grippers follow the newest chunk."""

    def _weights(self, config: ControlConfig) -> list[list[float]]:
        new, old = config.new_weight, 1 - config.new_weight
        # At most one chunk arrives per tick, so at most T of them have an action for the same tick.
        return [
            [(new if place else 1.0) * old ** (number - 1 - place) for place in range(number)]
            for number in range(self._length + 1)
        ]

    def _remaining(self, tick: int, oldest_ns: int) -> list[_Part]:
        """The chunks after the last one that has no action: without the later ones nothing would have been served."""
        first = 0
        for place, part in enumerate(self._parts[:-1], start=1):
            if part[1] <= tick or part[2] < oldest_ns:
                first = place
        return self._parts[first:]
