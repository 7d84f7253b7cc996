"""What a whole pass over the steps of a dataset shows: where its episodes lie, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import IllegalActionError, SourceError
from .pieces import Source
from .steps import EpisodeTable, Steps, lengths_to_starts

#: What a slice has of one episode: its number, the first and the last frame, and the number of steps.
Run = tuple[int, int, int, int]


def extend_runs(runs: list[Run], steps: Steps, source: Source, first_row: int) -> None:
    """Add what a slice has of every episode. Raises SourceError for steps that are not in order.

    runs: of the slices before; first_row: the slice's, in the whole dataset.
    """
    begins = np.concatenate([[0], np.flatnonzero(np.diff(steps.episode)) + 1])
    ends = np.concatenate([begins[1:], [len(steps)]])
    falls = np.flatnonzero((np.diff(steps.episode) == 0) & (np.diff(steps.frame) <= 0))
    if falls.size:
        before, after = ((int(steps.episode[row]), int(steps.frame[row])) for row in (falls[0], falls[0] + 1))
        raise _out_of_order(source, first_row + int(falls[0]) + 1, before, after)
    columns = (steps.episode[begins], steps.frame[begins], steps.frame[ends - 1], ends - begins)
    for begin, (episode, first, last, count) in zip(
        begins.tolist(), zip(*(column.tolist() for column in columns), strict=True), strict=True
    ):
        last_run = runs[-1] if runs else None
        if last_run is None or last_run[0] < episode:
            runs.append((episode, first, last, count))
        elif last_run[0] == episode and last_run[2] < first:
            runs[-1] = (episode, last_run[1], last, last_run[3] + count)
        else:
            raise _out_of_order(source, first_row + begin, (last_run[0], last_run[2]), (episode, first))


def join_runs(runs: Sequence[Run], source: Source) -> EpisodeTable:
    """All episodes by the runs of all slices, joined where an episode goes on in the next.

    Raises SourceError for runs that are not in order, and where the source states other episodes.
    """
    episode, first, last, count = np.array(runs, np.int64).T
    is_same = np.diff(episode) == 0
    wrong = np.flatnonzero((np.diff(episode) < 0) | (is_same & (first[1:] <= last[:-1])))
    if wrong.size:
        place = int(wrong[0])
        before, after = (int(episode[place]), int(last[place])), (int(episode[place + 1]), int(first[place + 1]))
        raise _out_of_order(source, int(count[: place + 1].sum()), before, after)
    begins = np.concatenate([[0], np.flatnonzero(~is_same) + 1])
    found = EpisodeTable(lengths_to_starts(np.add.reduceat(count, begins)), episode[begins])
    source.check_episodes(found)
    return found


def _out_of_order(source: Source, row: int, before: tuple[int, int], after: tuple[int, int]) -> SourceError:
    """row: of `after`; before and after: episode and frame."""
    return SourceError(
        f"{source.file_of(row)}: episode {after[0]}, step {after[1]} follows episode {before[0]}, step {before[1]}; "
        "expected ascending episodes, each in one piece, with ascending steps: sort them, or remove the duplicate file "
        "or row"
    )


def check_stated(name: str, stated: EpisodeTable, found: EpisodeTable) -> None:
    """Raises SourceError where the dataset of this name states other episodes than were found."""
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


def check_values(steps: Steps, source: Source, first_row: int, limit: np.float32) -> None:
    """Raises IllegalActionError for an action that is not finite or beyond the limit."""
    illegal = np.argwhere(~(np.abs(steps.values) <= limit))
    if illegal.size:
        row, dimension = (int(place) for place in illegal[0])
        raise IllegalActionError(
            f"{source.file_of(first_row + row)}, episode {steps.episode[row]}, step {steps.frame[row]}, dimension "
            f"{dimension}: {steps.values[row, dimension]}; expected finite numbers of at most {float(limit):g}: repair "
            "or drop this episode"
        )
