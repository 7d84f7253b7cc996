"""Checks that need a pass over all steps of a dataset: the order of its episodes, and the values of its actions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing

import numpy as np

from ..bundle.arrays import Float64Array, Int64Array
from ..bundle.fidelity import FAR
from .errors import IllegalActionError, SourceError
from .format import Outlier
from .source_base import EpisodeTable, Source, Steps

_SLICE_STEPS = 65_536
#: |action| that recorded data may hold at most. Larger ones are damage: those that a bundle knows end at 2e19, by the
#: units and offsets that it may have (`bundle/folder.py`).
LARGEST_ACTION = 1e20

#: Steps of one episode that follow one another: its number, the first and the last frame, and how many steps.
Run = tuple[int, int, int, int]


def extend_runs(runs: list[Run], steps: Steps, source: Source, first_row: int) -> None:
    """Add the runs of the next slice. Raises SourceError for steps that are not in order.

    runs: of the slices before; first_row: the slice's, in the whole dataset.
    """
    before = np.array(runs[-1:], np.int64).reshape(-1, 4).T
    # Every step is a run of its own, to begin with.
    singles = (steps.episode, steps.frame, steps.frame, np.ones_like(steps.frame))
    columns = [np.concatenate(pair) for pair in zip(before, singles, strict=True)]
    runs[-1:] = _joined(columns, source, first_row - int(before[3].sum()))


def join_runs(runs: Sequence[Run], source: Source) -> EpisodeTable:
    """All episodes, by the runs of all slices.

    Raises SourceError for runs that are not in order, and where the source states other episodes.
    """
    episode, _, _, count = np.array(_joined(np.array(runs, np.int64).T, source, 0), np.int64).T
    found = EpisodeTable.of_lengths(count, episode)
    source.check_episodes(found)
    return found


def _joined(runs: Iterable[Int64Array], source: Source, first_row: int) -> list[Run]:
    """One run for each episode. runs: its four numbers, int64 [n] each; first_row: of the first. Raises SourceError."""
    episode, first, last, count = runs
    is_same = episode[1:] == episode[:-1]
    wrong = np.flatnonzero((episode[1:] < episode[:-1]) | (is_same & (first[1:] <= last[:-1])))
    if wrong.size:
        place = int(wrong[0])
        raise SourceError(
            f"{source.file_of(first_row + int(count[: place + 1].sum()))}: episode {episode[place + 1]}, step "
            f"{first[place + 1]} follows episode {episode[place]}, step {last[place]}; expected ascending episodes, "
            "each in one piece, with ascending steps: sort them, or remove the duplicate file or row"
        )
    begins = np.concatenate([[0], np.flatnonzero(~is_same) + 1])
    ends = np.append(begins[1:], len(episode)) - 1
    columns = (episode[begins], first[begins], last[ends], np.add.reduceat(count, begins))
    return list(zip(*(column.tolist() for column in columns), strict=True))


def check_stated(name: str, stated: EpisodeTable, found: EpisodeTable) -> None:
    """Raises SourceError where a dataset states other episodes than its steps have. name: of the dataset."""
    if not (np.array_equal(stated.numbers, found.numbers) and np.array_equal(stated.starts, found.starts)):
        raise SourceError(
            f"{name} states {len(stated.numbers)} episodes, its steps make {len(found.numbers)}"
            + _first_difference(stated, found)
            + "; expected the same: copy the dataset again"
        )


def _first_difference(stated: EpisodeTable, found: EpisodeTable) -> str:
    rows = (zip(table.numbers.tolist(), np.diff(table.starts).tolist(), strict=True) for table in (stated, found))
    for (number, steps), (found_number, found_steps) in zip(*rows, strict=False):
        if number != found_number:
            return f", and episode {found_number} stands where {number} is stated"
        if steps != found_steps:
            return f", and episode {number} has {found_steps} steps where {steps} are stated"
    return ""


def check_values(steps: Steps, source: Source, first_row: int, limit: float) -> None:
    """Raises IllegalActionError for an action that is not finite or beyond the limit, or beyond LARGEST_ACTION."""
    values, most = steps.values, min(float(limit), LARGEST_ACTION)
    # A NaN is the maximum of any array that holds one, and no comparison with it is true.
    if np.maximum.reduce(values, None, initial=0) <= most and np.minimum.reduce(values, None, initial=0) >= -most:
        return
    row, dimension = map(int, np.argwhere(~(np.abs(values) <= most))[0])
    raise IllegalActionError(
        f"{source.file_of(first_row + row)}, episode {steps.episode[row]}, step {steps.frame[row]}, dimension "
        f"{dimension}: {values[row, dimension]}; expected finite numbers of at most {most:g}: repair or drop this "
        "episode"
    )


def farthest(steps: Steps, unit: Float64Array, offset: Float64Array, least: float = FAR) -> Outlier | None:
    """The action farthest outside of what a normaliser [A] maps to about -1 to 1, None where none is beyond `least`."""
    values = steps.values
    most = max(float(values.max()), -float(values.min()))
    # Of most data this says enough, in a tenth of the time.
    if ((most + np.abs(offset)) / unit).max() <= least:
        return None
    reach = np.abs(values - offset) / unit
    row, dimension = divmod(int(reach.argmax()), len(unit))
    places = (int(steps.episode[row]), int(steps.frame[row]), dimension)
    found = Outlier(float(reach[row, dimension]), float(values[row, dimension]), *places)
    return found if found.reach > least else None


class WholePass:
    """All slices of a source in ascending order, the first row of each and its steps, with every check of a conversion.

    Iterate once. width: values of a step; limit: of a legal action, where a model has one; episodes: all of them, after
    the last slice. Raises SourceError, to begin with and on the way, and IllegalActionError.
    """

    episodes: EpisodeTable

    def __init__(self, source: Source, width: int, limit: float = LARGEST_ACTION) -> None:
        source.check()
        self._source, self._width, self._limit = source, width, limit

    def __iter__(self) -> Iterator[tuple[int, Steps]]:
        source, runs = self._source, list[Run]()
        with closing(source.open(self._width)) as reader:
            for row, steps in reader.slices(0, source.num_steps, _SLICE_STEPS):
                extend_runs(runs, steps, source, row)
                check_values(steps, source, row, self._limit)
                yield row, steps
        self.episodes = join_runs(runs, source)
        source.touched_file()
