"""Which arrays of a .npz, .npy or .pt file are actions, and where their episodes end. Nothing is guessed.

- one array [N, A] under a name of actions, cut by `episode_ends` or `episode_index`, or one episode
- one array [episodes, steps, A]
- an array [steps, A] for each episode: demo_0, demo_1, ...
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from ..bundle.arrays import AnyArray, Int64Array
from ..bundle.paths import shortlist
from .errors import SourceError
from .source_base import EpisodeTable, as_int64, in_order, is_hidden, lengths_to_starts, natural

#: The names with a slash are those of diffusion-policy replay buffers.
_ACTION_NAMES = ("actions", "action", "data/actions", "data/action")
#: Too vague a name: it counts only where none of the others is there.
_VAGUE_NAME = "data"
#: What numpy calls the array that nobody named.
_NAMELESS = ["arr_0"]
_EPISODE_NAMES = ("actions", "action", "episode", "ep", "demo", "traj", "trajectory")
_END_NAMES = ("episode_ends", "meta/episode_ends")
_NUMBERS_NAME = "episode_index"
#: Arrays that say where the episodes of one array end.
BORDER_NAMES = (*_END_NAMES, _NUMBERS_NAME)
#: A number for each episode, and the text of each number.
TASK_NAMES = ("task_index", "task_names")

#: What to do with an array of actions that is no such thing.
AS_FLOATS = ", not empty: convert them with .astype(np.float32) if these are actions, or name another array with --key"


class Described(Protocol):
    """An array, or its header alone."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


def unfit(where: str, array: Described, expected: str) -> SourceError:
    return SourceError(f"{where} is {array.dtype} {list(array.shape)}; expected {expected}")


def choose_arrays(
    names: Iterable[str], key: str | None, source: str, are_equal: Callable[[str, str], bool]
) -> tuple[str, ...]:
    """The name of the action array, or those of one array for each episode in natural order.

    key: the array's name, or what numbered ones have in common; are_equal: whether two arrays hold the same.
    Raises SourceError where none is named like actions, or several are that differ.
    """
    listed = sorted((name for name in names if not is_hidden(name)), key=natural)
    chosen: Sequence[str]
    if key is not None:
        chosen = [key] if key in listed else _numbered(listed, [key])
    else:
        chosen = require_equal(_ACTION_NAMES, listed, source, are_equal)[:1]
        numbered = numbered_alike(listed)
        require_one_way([chosen, *numbered], source)
        chosen = chosen or [name for name in listed if name == _VAGUE_NAME and not numbered]
        if not chosen and (listed == _NAMELESS or listed in numbered):
            chosen = listed
    if not chosen:
        wanted = "action array" if key is None else repr(key)
        raise SourceError(
            f"{source} has no {wanted}; found {shortlist(listed) or 'nothing'}; expected `actions`, or one array for "
            "each episode (demo_0, demo_1, ...): name the right one with --key"
        )
    return tuple(in_order(chosen, source))


def are_comparable(one: Described, other: Described) -> bool:
    """Whether two arrays may hold the same: only then is it worth reading them."""
    return one.dtype == other.dtype and not one.dtype.hasobject and one.shape == other.shape != ()


def require_equal(
    wanted: Iterable[str], found: Collection[str], where: str, are_equal: Callable[[str, str], bool]
) -> list[str]:
    """The wanted names that were found. Raises SourceError unless their arrays all hold the same."""
    present = [name for name in wanted if name in found]
    for name in present[1:]:
        if not are_equal(present[0], name):
            raise SourceError(
                f"{where} has {present[0]!r} and {name!r}, which differ; expected one array of actions: name the right "
                "one with --key"
            )
    return present


def numbered_alike(names: Sequence[str]) -> list[list[str]]:
    """The names that are a usual word for an episode and a number, those of each word together."""
    return [found for word in _EPISODE_NAMES if (found := _numbered(names, [word]))]


def require_one_way(ways: Iterable[Sequence[str]], where: str) -> None:
    """ways: the places of actions, by each way to store episodes. Raises SourceError where more than one has some."""
    found = [shortlist(places, 2) for places in ways if places]
    if len(found) > 1:
        raise SourceError(
            f"{where} has actions in {found[0]} and in {found[1]}; expected one set of episodes: save them in files of "
            "their own, or name the right array with --key"
        )


def _numbered(names: Sequence[str], stems: Iterable[str]) -> list[str]:
    pattern = re.compile(f"({'|'.join(map(re.escape, stems))})[_/]?[0-9]+")
    return [name for name in names if pattern.fullmatch(name)]


def check_actions(arrays: Mapping[str, Described], chosen: Sequence[str], source: str) -> None:
    """Raises SourceError unless these are floating-point numbers, not empty, of the shapes that episodes have."""
    for name in chosen:
        array = arrays[name]
        if array.dtype.hasobject:
            raise SourceError(
                f"{source}: {name!r} is an array of Python objects, such as episodes of different lengths, and reading "
                "those could run code; expected plain numbers: save one array [steps, A] for each episode with "
                "np.savez(path, demo_0=..., demo_1=...)"
            )
        if array.dtype.kind != "f" or len(array.shape) not in (2, 3) or not all(array.shape):
            raise unfit(
                f"{source}: {name!r}", array, f"floating-point numbers [N, A] or [episodes, steps, A]{AS_FLOATS}"
            )
        if len(chosen) > 1 and len(array.shape) != 2:
            raise SourceError(
                f"{source}: {name!r} is one of {len(chosen)} arrays of episodes and has the shape "
                f"{list(array.shape)}; expected [steps, A]: join them into one [episodes, steps, A]"
            )


# Where episodes end ---------------------------------------------------------------------------------------------------


def episode_table(
    arrays: Mapping[str, Described], chosen: Sequence[str], source: str, read: Callable[[str], Iterator[AnyArray]]
) -> tuple[EpisodeTable, list[str]]:
    """Where episodes begin, and the names of the arrays that say it. Where none does, all steps are one episode.

    read: gives the numbers of an array, by its name, in slices. Raises SourceError where an episode would have no step,
    and where two arrays contradict each other.
    """
    shapes = [arrays[name].shape for name in chosen]
    steps = sum(int(np.prod(shape[:-1], dtype=object)) for shape in shapes)
    stated: dict[str, Int64Array] = {}
    numbers: Int64Array | None = None
    if len(shapes) > 1:
        stated["the arrays"] = lengths_to_starts(np.array([shape[0] for shape in shapes]))
    elif len(shapes[0]) == 3:
        starts = np.arange(shapes[0][0] + 1, dtype=np.int64) * shapes[0][1]
        stated[f"the shape {list(shapes[0])} of {chosen[0]!r}"] = starts
    for name in _END_NAMES:
        if name in arrays:
            _require_integers(name, arrays[name], source)
            # Their own check says more of negative ones.
            parts = (as_int64(part, f"{source}: {name!r}", -(2**63)) for part in read(name))
            ends = np.concatenate([*parts])
            stated[name] = _starts_by_ends(ends, steps, f"{source}: {name}")
    if _NUMBERS_NAME in arrays:
        _require_integers(_NUMBERS_NAME, arrays[_NUMBERS_NAME], source, steps)
        table = table_by_numbers(read(_NUMBERS_NAME), source)
        stated[_NUMBERS_NAME], numbers = table.starts, table.numbers
    _require_agreement(stated, source)
    starts = next(iter(stated.values()), np.array([0, steps]))
    if numbers is None or len(chosen) > 1:
        numbers = np.arange(len(starts) - 1, dtype=np.int64)
    return EpisodeTable(starts, numbers), list(stated)


def table_by_numbers(slices: Iterable[AnyArray], source: str) -> EpisodeTable:
    """Episodes by the number in each step, ascending; slices are not held together. Raises SourceError.

    >>> table = table_by_numbers([np.array([3, 3, 5]), np.array([5, 5])], "the file")
    >>> table.starts.tolist(), table.numbers.tolist()
    ([0, 2, 5], [3, 5])
    """
    starts: list[Int64Array] = []
    numbers: list[Int64Array] = []
    row, last = 0, np.empty(0, np.int64)
    for values in slices:
        part = as_int64(values, f"{source}: {_NUMBERS_NAME}")
        before = np.concatenate([last if row else part[:1], part[:-1]])
        falls = np.flatnonzero(part < before)
        if falls.size:
            raise SourceError(
                f"{source}: {_NUMBERS_NAME} falls at step {row + falls[0]} of the file; expected ascending numbers, "
                "each episode in one piece: sort the file by episode"
            )
        begins = part != before
        # The first step of all begins an episode, whatever its number.
        begins[:1] |= row == 0
        starts.append(np.flatnonzero(begins) + row)
        numbers.append(part[begins])
        row, last = row + len(part), part[-1:]
    return EpisodeTable(np.concatenate([*starts, [row]]).astype(np.int64), np.concatenate(numbers))


def array_tasks(
    arrays: Mapping[str, Described], episodes: int, source: str, read: Callable[[str], Iterator[AnyArray]]
) -> list[str]:
    """The task of each episode by `task_index` and `task_names`, "" where they are not there. Raises SourceError."""
    index_name, names_name = TASK_NAMES
    if index_name not in arrays:
        return [""] * episodes
    index = arrays[index_name]
    if index.shape != (episodes,) or index.dtype.kind not in "iu":
        raise unfit(f"{source}: {index_name}", index, f"one integer for each of {episodes} episodes")
    names: dict[int, str] = {}
    if names_name in arrays:
        texts = arrays[names_name]
        if len(texts.shape) != 1 or texts.dtype.hasobject:
            raise unfit(f"{source}: {names_name}", texts, "one text for each task number")
        names = dict(enumerate(str(text) for part in read(names_name) for text in part))
    return [task_name(names, number) for part in read(index_name) for number in part.tolist()]


def task_name(names: Mapping[int, str], index: int) -> str:
    """The text of a task; a task without one is named by its number, which still tells tasks apart."""
    return names.get(index, f"task_{index}")


def _require_integers(name: str, array: Described, source: str, steps: int | None = None) -> None:
    """steps: how many integers are expected, where that is known. Raises SourceError."""
    if array.dtype.kind not in "iu" or len(array.shape) != 1:
        raise unfit(f"{source}: {name!r}", array, "integers in one dimension")
    if steps is not None and array.shape != (steps,):
        raise SourceError(f"{source}: {steps} steps, but {name} {list(array.shape)}; expected one for each")


def _starts_by_ends(ends: Int64Array, steps: int, label: str) -> Int64Array:
    starts = np.concatenate([np.zeros(1, np.int64), ends])
    # Compared, not subtracted: a difference may not fit into int64.
    if not ends.size or ends[-1] != steps or (starts[1:] <= starts[:-1]).any():
        raise SourceError(
            f"{label} of {ends.size} episodes for {steps} steps; expected the exclusive end of every episode, "
            "ascending, each with at least one step, the last being the number of steps"
        )
    return starts


def _require_agreement(stated: Mapping[str, Int64Array], source: str) -> None:
    """Raises SourceError where two statements of where episodes begin, each int64 [E + 1], contradict each other."""
    for (name, starts), (other, others) in pairwise(stated.items()):
        if not np.array_equal(starts, others):
            raise SourceError(
                f"{source}: {name} and {other} say different ends of episodes ({len(starts) - 1} and "
                f"{len(others) - 1} episodes); expected the same: save the file without the wrong one"
            )
