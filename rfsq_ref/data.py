"""Robot actions, episode by episode: read from the usual formats, and split by episode.

Nothing here unpickles: what a file holds besides plain arrays is refused.
"""

import hashlib
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from rfsq.rfsq_ref.errors import DataError
from rfsq.runtime.bundle.paths import as_path, counted, shortlist
from rfsq.runtime.datasets.array_layouts import BORDER_NAMES, are_comparable, choose_arrays
from rfsq.runtime.datasets.episodes import LARGEST_ACTION, WholePass
from rfsq.runtime.datasets.errors import DatasetError, SourceError
from rfsq.runtime.datasets.npz import StoredArray, array_source
from rfsq.runtime.datasets.source_base import Source, opened, optional, readable
from rfsq.runtime.datasets.sources import open_source

FloatArray = npt.NDArray[np.float32]
_AnyArray = npt.NDArray[Any]

#: Simulated demonstrations, made by `python rfsq_ref/generate_demonstrations.py`.
DEMONSTRATIONS = Path(__file__).resolve().parent / "assets" / "demonstrations.npz"


@dataclass(frozen=True, eq=False)
class ActionDataset:
    """Episodes of one action space.

    episodes: float32 [steps, A] each, finite, at least one step, C-contiguous and read-only (other floating-point
    arrays are converted); names and tasks: one per episode, task "" when unknown; source: the file's or folder's name;
    has_borders: False where the file does not say where episodes end, so that all its steps are taken for one;
    dimensions: the name of each, or none.
    Raises DataError for episodes that cannot be made so.
    """

    episodes: tuple[FloatArray, ...]
    names: tuple[str, ...]
    tasks: tuple[str, ...]
    source: str
    has_borders: bool = True
    dimensions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.episodes:
            raise DataError(f"{self.source} holds no episodes; expected at least one, of at least one step")
        if not len(self.episodes) == len(self.names) == len(self.tasks):
            raise DataError(
                f"{self.source}: {len(self.episodes)} episodes, {len(self.names)} names and {len(self.tasks)} tasks; "
                "expected one name and one task per episode"
            )
        labels = [f"{self.source}, episode {name!r}" for name in self.names]
        object.__setattr__(self, "episodes", tuple(map(_checked, self.episodes, labels)))
        for name, episode in zip(self.names, self.episodes, strict=True):
            if episode.shape[1] != self.action_dim:
                raise DataError(
                    f"{self.source}: episode {self.names[0]!r} has {self.action_dim} action dimensions, episode "
                    f"{name!r} has {episode.shape[1]}; expected the same everywhere: keep one robot's actions per file"
                )

    @property
    def action_dim(self) -> int:
        return int(self.episodes[0].shape[1])

    @property
    def num_steps(self) -> int:
        return sum(map(len, self.episodes))

    def dimension(self, index: int) -> str:
        """Such as `dimension 5`, or `dimension 5 (gripper)`, for people."""
        return f"dimension {index} ({self.dimensions[index]})" if self.dimensions else f"dimension {index}"

    @cached_property
    def sha256(self) -> str:
        """Hash over shapes and bytes of all episodes in order; names, tasks and source do not count."""
        digest = hashlib.sha256()
        for episode in self.episodes:
            digest.update(f"{episode.shape[0]}x{episode.shape[1]};".encode())
            digest.update(episode.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    @property
    def missing_borders(self) -> str:
        """Where has_borders is False, what that means and what to do; else empty."""
        if self.has_borders:
            return ""
        return (
            f"no episode_ends and no episode_index was found in {self.source}, so all {self.num_steps} steps count as "
            "one episode. If they are several, say where each ends: numpy.savez(FILE, actions=actions, "
            "episode_ends=ends), with the number of steps up to the end of each episode, or episode_index, the number "
            "of each step's episode"
        )

    def steps(self) -> FloatArray:
        """All episodes one after the other, float32 [num_steps, A]; a copy."""
        return np.concatenate(self.episodes)

    def select(self, indices: Iterable[int]) -> "ActionDataset":
        """The episodes at these indices, in this order. Raises IndexError, and DataError when there are none."""
        chosen = list(indices)
        return replace(
            self,
            episodes=tuple(self.episodes[index] for index in chosen),
            names=tuple(self.names[index] for index in chosen),
            tasks=tuple(self.tasks[index] for index in chosen),
        )


def _checked(actions: _AnyArray, label: str) -> FloatArray:
    """The same actions as ActionDataset keeps them: float32, C-contiguous, read-only. Raises DataError."""
    if isinstance(actions, np.ma.MaskedArray):
        raise DataError(
            f"{label}: a masked array, whose hidden values are no actions; expected all of them: repair or drop this "
            "episode"
        )
    actions = np.asarray(actions)
    if actions.dtype.kind != "f" or actions.ndim != 2 or not actions.size:
        raise DataError(
            f"{label}: {actions.dtype} {list(actions.shape)}; expected floating-point numbers [steps, action "
            "dimensions], at least one step: convert them with .astype(np.float32) if these are actions, or name the "
            "action array with key="
        )
    kept = actions
    if actions.flags.writeable or actions.dtype != np.float32 or not actions.flags.c_contiguous:
        with np.errstate(over="ignore"):
            kept = np.array(actions, np.float32, order="C")
        kept.flags.writeable = False
    legal = np.abs(kept) <= LARGEST_ACTION
    if not legal.all():
        step, dimension = map(int, np.argwhere(~legal)[0])
        raise DataError(
            f"{label}, step {step}, dimension {dimension}: {actions[step, dimension]}; expected finite numbers of at "
            f"most {LARGEST_ACTION:g}: repair or drop this episode"
        )
    return kept


# Reading ------------------------------------------------------------------------------------------------------------


def load_actions(
    path: str | os.PathLike[str], *, key: str | None = None, filter_key: str | None = None
) -> ActionDataset:
    """Read every episode of a file or folder.

    path: .npz, .npy, .pt, .hdf5, .h5, .parquet, a folder of HDF5 files (as LIBERO and ALOHA have them) or a LeRobot
    v2 or v3 dataset folder. key: the action array or column where its name is not `actions` or `action`. filter_key: of
    robomimic's HDF5 files, such as `train`, to read the episodes alone that it lists.
    Raises DataError for everything that cannot be used as it is, missing files and packages included.

    >>> dataset = load_actions(DEMONSTRATIONS)
    >>> len(dataset.episodes), dataset.num_steps, dataset.action_dim
    (125, 22016, 7)
    """
    path = as_path(path, "the data", DataError)
    try:
        return _load_source(path, open_source(path, key, filter_key, {".pt": _open_pt}))
    except DatasetError as error:
        raise DataError(str(error)) from error


def load_demonstrations() -> ActionDataset:
    """The embedded demonstrations: 7-D Panda actions in [-1, 1], several tasks, 20 steps a second."""
    return load_actions(DEMONSTRATIONS)


def _load_source(path: Path, source: Source) -> ActionDataset:
    """The whole of an open source, with every check of a conversion. path: what was opened. Raises SourceError."""
    whole = WholePass(source, source.width)
    with readable(source.name, source.kind):
        actions = np.empty((source.num_steps, source.width), np.float32)
    for start, steps in whole:
        actions[start : start + len(steps)] = steps.values
    table = whole.episodes
    actions.flags.writeable = False
    names = source.episode_names(table.numbers)
    if path.is_file():
        # All episodes of a single file would begin with its name.
        names = [name.removeprefix(f"{path.stem}/") for name in names]
    return ActionDataset(
        tuple(np.split(actions, table.starts[1:-1])),
        tuple(names),
        tuple(source.tasks(table)),
        path.name or path.absolute().name,
        source.has_borders,
        source.action_names,
    )


def _open_pt(path: Path, key: str | None) -> Source:
    """The tensors of a .pt file, which cannot be read in slices. Raises SourceError."""
    with opened(path, "a .pt file of tensors") as file:
        content = _load_tensors(file, path.name)
        # A tensor alone, or one for each episode.
        found = {name: value if isinstance(value, list) else [value] for name, value in content.items()}
        chosen = choose_arrays(found, key, path.name, lambda one, other: _are_equal(found[one], found[other]))
        arrays = {name: value for name, value in content.items() if not isinstance(value, list)}
        lists = [name for name in chosen if isinstance(content[name], list)]
        if lists and len(chosen) > 1:
            raise SourceError(f"{path.name}: {lists[0]!r} is a list; expected a tensor [steps, A]: use torch.cat")
        if lists:
            episodes = {f"episode_{place}": one for place, one in enumerate(found[chosen[0]])}
            arrays, chosen = {**arrays, **episodes}, tuple(episodes)
        held = {name: StoredArray(name, values.shape, values.dtype, held=values) for name, values in arrays.items()}
        return array_source(path, held, chosen)


def _load_tensors(file: BinaryIO, source: str) -> dict[str, _AnyArray | list[_AnyArray]]:
    """What a .pt file holds that are tensors, or lists of tensors, by name. Raises SourceError."""
    torch = optional("torch", "export")
    # Not above: few formats need torch.
    from rfsq.rfsq_ref.tensor_files import load_torch

    try:
        content = load_torch(file)
    # Not torch's own message, which advises to run the code.
    except pickle.UnpicklingError as error:
        raise SourceError(
            f"{source} is damaged or pickles more than tensors, which could run code; expected tensors alone: "
            "save them in a list or dict with torch.save"
        ) from error
    if isinstance(content, list | tuple):
        others = sorted({type(part).__name__ for part in content if not isinstance(part, torch.Tensor)})
        if others:
            raise SourceError(
                f"{source} holds a list with {', '.join(others)} in it; expected tensors alone, one [steps, A] "
                "for each episode: save such as [episode['action'] for episode in episodes]"
            )
    if isinstance(content, torch.Tensor | list | tuple):
        content = {"actions": content}
    if not isinstance(content, Mapping):
        raise SourceError(f"{source} holds a {type(content).__name__}; expected a tensor, a list or a dict of tensors")
    found: dict[str, _AnyArray | list[_AnyArray]] = {}
    for name, value in content.items():
        if isinstance(value, torch.Tensor) or name in BORDER_NAMES:
            found[str(name)] = _array(torch.as_tensor(value))
        elif isinstance(value, list | tuple) and any(isinstance(part, torch.Tensor) for part in value):
            found[str(name)] = _all_arrays(value, torch.Tensor, f"{source}: {name!r}")
    if content and not found:
        kinds = [f"{name} ({type(value).__name__})" for name, value in content.items()]
        raise SourceError(
            f"{source} holds no tensor; found {shortlist(kinds)}; expected `actions`, a tensor or a list of tensors"
        )
    return found


def _array(tensor: Any) -> _AnyArray:
    tensor = tensor.detach()
    # numpy has no bfloat16.
    return np.asarray((tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy())


def _all_arrays(values: Sequence[Any], kind: type, label: str) -> list[_AnyArray]:
    for place, value in enumerate(values):
        if not isinstance(value, kind):
            raise SourceError(
                f"{label} has a {type(value).__name__} at place {place}; expected tensors alone, one for each episode"
            )
    return [_array(value) for value in values]


def _are_equal(ones: Sequence[_AnyArray], others: Sequence[_AnyArray]) -> bool:
    return len(ones) == len(others) and all(
        are_comparable(one, other) and one.tobytes() == other.tobytes() for one, other in zip(ones, others, strict=True)
    )


# Splitting -----------------------------------------------------------------------------------------------------------


#: Shares of the episodes for train, validation, calibration and test. Calibration finds the episodes of a training by
#: splitting again, so that they must never change.
SPLIT_SHARES = (0.6, 0.1, 0.15, 0.15)


@dataclass(frozen=True, eq=False)
class EpisodeSplit:
    """Parts that share no episode."""

    train: ActionDataset
    validation: ActionDataset
    calibration: ActionDataset
    test: ActionDataset


def split_episodes(dataset: ActionDataset, *, seed: int = 0) -> EpisodeSplit:
    """Split by episode, every task in proportion; the same parts for the same data order and seed, anywhere.

    Within a part the tasks take turns, so that its first n episodes cover them evenly. Of each task a part gets its
    exact share rounded up or down, except that a part that would stay empty takes an episode from the largest.
    Raises DataError when there are fewer episodes than parts.

    >>> split = split_episodes(load_demonstrations())
    >>> [len(part.episodes) for part in (split.train, split.validation, split.calibration, split.test)]
    [75, 12, 19, 19]
    """
    shares = np.array(SPLIT_SHARES)
    total = len(dataset.episodes)
    if total < len(shares):
        raise DataError(
            f"{dataset.source} has {counted(total, 'episode')}; {len(shares)} are needed, one for each of train, "
            f"validation, calibration and test: {dataset.missing_borders or 'record more'}"
        )
    by_task: dict[str, list[int]] = {}
    for index, task in enumerate(dataset.tasks):
        by_task.setdefault(task, []).append(index)
    rounded: list[npt.NDArray[np.int64]] = []
    for indices in by_task.values():
        # By what each part should have of the tasks so far: the next task makes up for the rounding of this one.
        done = sum(map(np.sum, rounded)) + len(indices)
        exact = shares * len(indices)
        counts = np.floor(exact + 1e-9).astype(np.int64)
        owed = np.where(exact > counts + 1e-9, shares * done - sum(rounded) - counts, -np.inf)
        counts[np.argsort(-owed, kind="stable")[: len(indices) - counts.sum()]] += 1
        rounded.append(counts)
    parts: list[list[tuple[int, int]]] = [[] for _ in shares]
    for indices, counts in zip(by_task.values(), _balanced(np.array(rounded), shares), strict=True):
        indices.sort(key=lambda index: _shuffle_key(seed, index))
        for part, chosen in zip(parts, np.split(indices, np.cumsum(counts)[:-1]), strict=True):
            part.extend(enumerate(map(int, chosen)))
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    chosen_parts = (dataset.select(index for _, index in sorted(part, key=lambda turn: turn[0])) for part in parts)
    return EpisodeSplit(*chosen_parts)


def _balanced(counts: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Episodes [tasks, parts], each a share rounded up or down, so that the parts have their shares of all so, too.

    A part that has not gets an episode of a task whose share was rounded down, or gives one that was rounded up, maybe
    through other parts. Such a way is always there (Causey, Cox and Ernst 1985, controlled rounding).
    """
    exact = counts.sum(axis=1, keepdims=True) * shares
    ways = [way for length in range(2, len(shares) + 1) for way in permutations(range(len(shares)), length)]
    while (np.abs(owed := counts.sum() * shares - counts.sum(axis=0)) > 1 - 1e-9).any():
        worst = int(np.abs(owed).argmax())
        for way in ways:
            moves = [
                (
                    ((counts[:, giver] > exact[:, giver] + 1e-9) & (counts[:, taker] < exact[:, taker] - 1e-9)),
                    giver,
                    taker,
                )
                for giver, taker in pairwise(way)
            ]
            ends = owed[way[0]] < -1e-9 and owed[way[-1]] > 1e-9 and worst in (way[0], way[-1])
            if ends and all(tasks.any() for tasks, *_ in moves):
                for tasks, giver, taker in moves:
                    counts[tasks.argmax(), [giver, taker]] += (-1, 1)
                break
    return counts


def _shuffle_key(seed: int, index: int) -> bytes:
    # numpy may change its random streams between versions; calibration must find the training episodes again.
    return hashlib.sha256(f"{seed}/{index}".encode()).digest()


def chunk(actions: FloatArray, length: int) -> FloatArray:
    """[N, A] to [N // length, length, A], a view; the last N % length steps are dropped. DataError for other shapes.

    >>> chunk(np.zeros((20, 7), np.float32), 8).shape
    (2, 8, 7)
    """
    if actions.ndim != 2 or length < 1:
        raise DataError(f"cannot cut shape {actions.shape} into chunks of {length}; expected [N, A] and at least 1")
    count = len(actions) // length
    return actions[: count * length].reshape(count, length, actions.shape[1])
