"""Which chunks of a dataset are shown and which are counted: spread over all of it, whatever its size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..bundle.arrays import Float32Array, Int32Array, Int64Array
from ..bundle.errors import InvalidInputError
from ..bundle.models import ModelEntry
from ..bundle.paths import shortlist
from ..datasets.episodes import WholePass
from ..datasets.source_base import EpisodeTable, Source

_Integers = TypeVar("_Integers", Int32Array, Int64Array)
#: Chunks that errors and shares are counted over: the 99th percentile has 20 beyond it.
MOST_COUNTED = 2_000
#: Chunks that are shown, and the decoded numbers that the page holds at most: about 1 MB.
MOST_SHOWN, _MOST_NUMBERS = 32, 150_000
#: Episodes that are shown where none is asked for.
_EPISODES = 4


@dataclass(frozen=True, eq=False)
class Samples:
    """S chunks of a dataset, in its order, none over the end of an episode.

    actions: float32 [S, T, A], in the robot's units; episode, step: int64 [S], the number of the episode, and how many
    of its steps come before; shown: int64, places in 0 ... S - 1 of those that the page shows; low, high: float32 [A],
    the range of the whole dataset; num_chunks: how many chunks it has, one behind the other.
    """

    actions: Float32Array
    episode: Int64Array
    step: Int64Array
    shown: Int64Array
    low: Float32Array
    high: Float32Array
    num_chunks: int

    @property
    def largest(self) -> Float32Array:
        """The largest |action| of the whole dataset, [A]."""
        return np.maximum(-self.low, self.high)


def choose_samples(source: Source, model: ModelEntry, episodes: Sequence[int] | None = None) -> Samples:
    """Read the samples. episodes: the numbers of those that are shown; None for a few, spread over the dataset.

    Raises SourceError, IllegalActionError, and InvalidInputError where the dataset has no such episode, or an episode
    no whole chunk.
    """
    length = model.chunk_length
    low, high = np.full(model.action_dim, np.inf, np.float32), np.full(model.action_dim, -np.inf, np.float32)
    whole = WholePass(source, model.action_dim, float(np.float32(model.action_limit)))
    for _, steps in whole:
        np.minimum(low, steps.values.min(axis=0), out=low)
        np.maximum(high, steps.values.max(axis=0), out=high)
    first_rows, owner = _chunk_rows(whole.episodes, length)
    if not len(first_rows):
        raise InvalidInputError(
            f"no episode of {source.name} has {length} steps, as many as a chunk; expected one at least: give longer "
            "episodes, or a bundle of shorter chunks"
        )
    chosen = _chosen_episodes(whole.episodes, owner, length, episodes)
    most = min(MOST_SHOWN, _MOST_NUMBERS // (len(model.prefixes) * length * model.action_dim))
    each = max(1, most // len(chosen))
    shown = np.concatenate([spread(np.flatnonzero(owner == place), each) for place in chosen])
    places = np.union1d(spread(np.arange(len(first_rows)), MOST_COUNTED), shown)
    with closing(source.open(model.action_dim)) as reader:
        actions = np.stack([reader.read(row, row + length).values for row in first_rows[places].tolist()])
    return Samples(
        actions=np.ascontiguousarray(actions, np.float32),
        episode=whole.episodes.numbers[owner[places]],
        step=first_rows[places] - whole.episodes.starts[owner[places]],
        shown=np.searchsorted(places, shown),
        low=low,
        high=high,
        num_chunks=len(first_rows),
    )


def _chunk_rows(episodes: EpisodeTable, length: int) -> tuple[Int64Array, Int64Array]:
    """The first row of every chunk, and the place of its episode in the table: int64 [n] each."""
    counts = np.diff(episodes.starts) // length
    owner = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    return episodes.starts[owner] + (np.arange(len(owner)) - before[owner]) * length, owner


def _chosen_episodes(
    episodes: EpisodeTable, owner: Int64Array, length: int, wanted: Sequence[int] | None
) -> Sequence[int]:
    """Places in the table, each of an episode with a chunk. Raises InvalidInputError."""
    with_chunk = np.unique(owner)
    if wanted is None:
        return [int(place) for place in spread(with_chunk, _EPISODES)]
    return list(dict.fromkeys(_places(episodes, {*with_chunk.tolist()}, length, wanted)))


def _places(episodes: EpisodeTable, with_chunk: set[int], length: int, wanted: Sequence[int]) -> Iterator[int]:
    numbers = episodes.numbers.tolist()
    for number in wanted:
        if number not in numbers:
            raise InvalidInputError(f"--episode {number} is not in the data; expected of {shortlist(numbers)}")
        place = numbers.index(number)
        if place not in with_chunk:
            raise InvalidInputError(
                f"--episode {number} is shorter than a chunk of {length} steps; choose a longer episode"
            )
        yield place


def spread(values: _Integers, most: int) -> _Integers:
    """At most so many of the values [n], evenly spread, the first and the last among them.

    >>> spread(np.arange(10), 4).tolist()
    [0, 3, 6, 9]
    """
    if len(values) <= most:
        return values
    return values[np.linspace(0, len(values) - 1, most).round().astype(np.int64)]
