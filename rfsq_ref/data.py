"""Robot action data: read it episode by episode from the usual formats, and split it by episode.

`.npz` and `.npy`, `.pt`, HDF5 in the layouts of runtime/hdf5_layouts.py, LeRobot v2 and v3. Nothing here unpickles:
what a file holds besides plain arrays is refused. Everything but numpy is imported only when a file needs it.
"""

import hashlib
import importlib
import json
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rfsq_ref.errors import DataError
from runtime.dataset_errors import SourceError
from runtime.dataset_hdf5 import HDF5_SUFFIXES, hdf5_files
from runtime.dataset_npz import OF_OBJECTS
from runtime.dataset_steps import is_hidden, natural
from runtime.hdf5_layouts import find_episodes
from runtime.paths import as_path, shortlist

FloatArray = npt.NDArray[np.float32]
_AnyArray = npt.NDArray[Any]

#: Simulated demonstrations, made by `python rfsq_ref/generate_demonstrations.py`.
DEMONSTRATIONS = Path(__file__).resolve().parent / "assets" / "demonstrations.npz"

# In order of preference; the names with a slash are those of diffusion-policy replay buffers.
_ACTION_NAMES = ("actions", "action", "data/actions", "data/action", "data")
_END_NAMES = ("episode_ends", "meta/episode_ends")
# pandas writes an index that bears no name under the second one; LeRobot keeps its task texts in the index.
_TASK_COLUMNS = ("task", "__index_level_0__")
_NO_TASK = -1


@dataclass(frozen=True, eq=False)
class ActionDataset:
    """Episodes of one action space.

    episodes: float32 [steps, A] each, finite, at least one step, C-contiguous and read-only (other floating-point
    arrays are converted); names and tasks: one per episode, task "" when unknown; source: the file's or folder's name.
    Raises DataError for episodes that cannot be made so.
    """

    episodes: tuple[FloatArray, ...]
    names: tuple[str, ...]
    tasks: tuple[str, ...]
    source: str

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

    @cached_property
    def sha256(self) -> str:
        """Hash over shapes and bytes of all episodes in order; names, tasks and source do not count."""
        digest = hashlib.sha256()
        for episode in self.episodes:
            digest.update(f"{episode.shape[0]}x{episode.shape[1]};".encode())
            digest.update(episode.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    def steps(self) -> FloatArray:
        """All episodes one after the other, float32 [num_steps, A]; a copy."""
        return np.concatenate(self.episodes)

    def select(self, indices: Iterable[int]) -> "ActionDataset":
        """The episodes at these indices, in this order. Raises IndexError, and DataError when there are none."""
        chosen = list(indices)
        return ActionDataset(
            tuple(self.episodes[index] for index in chosen),
            tuple(self.names[index] for index in chosen),
            tuple(self.tasks[index] for index in chosen),
            self.source,
        )


def _checked(actions: _AnyArray, label: str) -> FloatArray:
    """The same actions as ActionDataset keeps them, or DataError."""
    if isinstance(actions, np.ma.MaskedArray):
        raise DataError(
            f"{label}: a masked array, whose hidden values are no actions; expected all of them: repair or drop this "
            "episode"
        )
    actions = np.asarray(actions)
    if actions.dtype.kind in "iu":
        raise DataError(
            f"{label}: dtype {actions.dtype}; expected floating-point actions: convert them with "
            ".astype(np.float32) if these are actions, or name the action array with key="
        )
    if actions.dtype.kind != "f":
        raise DataError(
            f"{label}: dtype {actions.dtype}, not real numbers; expected floating-point actions [steps, action "
            "dimensions]: save them as such, or name the action array with key="
        )
    if actions.ndim != 2:
        raise DataError(f"{label}: shape {actions.shape}; expected [steps, action dimensions]")
    if not actions.size:
        raise DataError(
            f"{label}: shape {actions.shape} is empty; expected at least one step and one dimension: drop it"
        )
    _require_finite(actions, label, "expected finite numbers: repair or drop this episode")
    if actions.flags.writeable or actions.dtype != np.float32 or not actions.flags.c_contiguous:
        with np.errstate(over="ignore"):
            narrowed = np.array(actions, np.float32, order="C")
        _require_finite(narrowed, label, f"too large for float32 (it was {actions.dtype}): scale the data")
        narrowed.flags.writeable = False
        actions = narrowed
    return actions


def _require_finite(actions: _AnyArray, label: str, advice: str) -> None:
    finite = np.isfinite(actions)
    if not finite.all():
        step, dimension = map(int, np.argwhere(~finite)[0])
        raise DataError(f"{label}, step {step}, dimension {dimension}: {actions[step, dimension]}; {advice}")


# Reading ------------------------------------------------------------------------------------------------------------


class _Episode(NamedTuple):
    name: str
    task: str
    actions: _AnyArray


def load_actions(
    path: str | os.PathLike[str], *, key: str | None = None, filter_key: str | None = None
) -> ActionDataset:
    """Read every episode of a file or folder.

    path: .npz, .npy, .pt, .hdf5, .h5, .parquet, a folder of HDF5 files (as LIBERO and ALOHA have them) or a LeRobot
    v2 or v3 dataset folder. key: the action array or column where its name is not `actions` or `action`. filter_key: of
    robomimic's HDF5 files, such as `train`, to read the episodes alone that it lists.
    Raises DataError for everything that cannot be used as it is, missing files and packages included.
    """
    path = as_path(path, "the data", DataError)
    if not path.exists():
        raise DataError(f"{path} does not exist; give an action file ({', '.join(_READERS)}) or a folder of them")
    suffix = path.suffix.lower()
    reader = _read_folder if path.is_dir() else _READERS.get(suffix)
    if filter_key and (path.is_dir() or suffix in HDF5_SUFFIXES):
        reader = partial(_read_folder if path.is_dir() else _read_hdf5, filter_key=filter_key)
    elif filter_key:
        raise DataError(f"{path.name} is no HDF5 file, and has no filter keys; leave --filter-key (filter_key=) out")
    if reader is None:
        raise DataError(
            f"{path.name} has the suffix {path.suffix!r}; expected one of {', '.join(_READERS)}, or a folder"
        )
    found = reader(path, key)
    return ActionDataset(
        tuple(episode.actions for episode in found),
        tuple(episode.name or path.stem for episode in found),
        tuple(episode.task for episode in found),
        path.name or path.absolute().name,
    )


def load_demonstrations() -> ActionDataset:
    """The embedded demonstrations: 7-D Panda actions in [-1, 1], several tasks, 20 steps a second."""
    return load_actions(DEMONSTRATIONS)


@contextmanager
def _readable(path: Path, kind: str, magic: bytes = b"") -> Iterator[None]:
    """Turn whatever the format's library raises on a damaged file into a DataError."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
        if not start:
            raise DataError(f"{path.name} is empty (0 bytes); expected {kind}: copy or download it again")
        if start.startswith(b"version https://git-lfs"):
            raise DataError(f"{path.name} is a Git LFS pointer, not the data; fetch it with `git lfs pull`")
        # numpy takes any unknown bytes for a pickle and advises to allow it.
        if not start.startswith(magic):
            raise DataError(
                f"{path.name} starts with {start[: len(magic)]!r} instead of {magic!r}: not {kind} but a damaged file "
                "or a pickle, which could run code; save plain arrays"
            )
        yield
    except DataError:
        raise
    # torch's own message advises to load it all the same.
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path.name} is damaged or pickles more than tensors, which could run code; expected {kind}: save tensors "
            "alone, in a list or dict, with torch.save"
        ) from error
    # Parsers raise nearly anything on damaged bytes: zlib.error, BadZipFile, ArrowInvalid, KeyError, MemoryError, ...
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{path.name} cannot be read as {kind} ({type(error).__name__}: {reason}); "
            "expected an undamaged file of plain arrays: copy it again or save it anew"
        ) from error


def _optional(module: str) -> Any:
    """Import a package that only some formats need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DataError(
            f"this format needs {package}, which cannot be imported ({error}); pip install '.[export]'"
        ) from error


def _missing(source: str, key: str | None, found: Iterable[object]) -> DataError:
    wanted = repr(key) if key else "action array"
    listed = shortlist(found) or "nothing"
    return DataError(
        f"{source} has no {wanted}; found {listed}; expected `actions`: name the right one with --key (key=)"
    )


# numpy and torch files: named arrays ---------------------------------------------------------------------------------


def _read_npz(path: Path, key: str | None) -> list[_Episode]:
    with _readable(path, "a .npz file", b"PK"), _plain(path.name), np.load(path, allow_pickle=False) as arrays:
        return _from_arrays(arrays, key, path.name)


def _read_npy(path: Path, key: str | None) -> list[_Episode]:
    if key is not None:
        raise DataError(f"{path.name} holds one array without a name, so key={key!r} cannot be found; leave key out")
    with _readable(path, "a .npy file", b"\x93NUMPY"), _plain(path.name):
        return _from_arrays({"actions": np.load(path, allow_pickle=False)}, None, path.name)


@contextmanager
def _plain(source: str) -> Iterator[None]:
    """An array of Python objects is no damage, and is not read: it could run code."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Object arrays cannot be loaded"):
            raise
        raise DataError(f"{source} {OF_OBJECTS}") from error


def _read_pt(path: Path, key: str | None) -> list[_Episode]:
    torch = _optional("torch")

    def array(tensor: Any) -> _AnyArray:
        # numpy has no bfloat16
        return np.asarray((tensor.float() if tensor.dtype is torch.bfloat16 else tensor.detach()).numpy())

    with _readable(path, "a .pt file of tensors"):
        content = torch.load(path, weights_only=True, map_location="cpu")
        if isinstance(content, Mapping):
            listed = content.get(key or next((name for name in _ACTION_NAMES if name in content), ""))
            if isinstance(listed, list | tuple):
                content, key = listed, None
        if isinstance(content, torch.Tensor):
            content = {"actions": content}
        elif isinstance(content, list | tuple):
            others = sorted({type(part).__name__ for part in content if not isinstance(part, torch.Tensor)})
            if others:
                raise DataError(
                    f"{path.name} holds a list with {', '.join(others)} in it; expected tensors alone, one [steps, A] "
                    "for each episode: save such as [episode['action'] for episode in episodes]"
                )
            content = {f"episode_{index}": tensor for index, tensor in enumerate(content)}
        if not isinstance(content, Mapping):
            raise DataError(
                f"{path.name} holds a {type(content).__name__}; expected a tensor, a list or a dict of tensors"
            )
        tensors = {str(name): array(value) for name, value in content.items() if isinstance(value, torch.Tensor)}
        if content and not tensors:
            kinds = [f"{name} ({type(value).__name__})" for name, value in content.items()]
            raise DataError(
                f"{path.name} holds no tensor; found {shortlist(kinds)}; expected `actions`, a tensor or a list of "
                "tensors"
            )
        return _from_arrays(tensors, key, path.name)


def _from_arrays(arrays: Mapping[str, _AnyArray], key: str | None, source: str) -> list[_Episode]:
    """Episodes from one action array, [N, A] or [episodes, steps, A], or from 2-D arrays numbered under one name."""
    names = sorted((name for name in arrays if not is_hidden(name)), key=natural)
    name = key or next((name for name in _ACTION_NAMES if name in names), names[0] if len(names) == 1 else None)
    if name is None and len({name.rstrip("0123456789") for name in names}) == 1:
        return [_Episode(name, "", arrays[name]) for name in names]
    if name is None or name not in names:
        raise _missing(source, name, names)
    actions = arrays[name]
    if actions.ndim not in (2, 3):
        raise DataError(
            f"{source}: {name!r} has shape {actions.shape}; expected [N, A] or [episodes, steps, A]: name another "
            "array with key= or reshape it"
        )
    ends = next((arrays[end] for end in _END_NAMES if end in names), None)
    if actions.ndim == 3:
        episodes = list(actions)
    elif ends is not None:
        episodes = _cut_at(actions, ends, source)
    elif "episode_index" in names:
        rows = _rows_by_episode(len(actions), arrays["episode_index"], np.arange(len(actions)), source)
        episodes = [actions[part] for part in rows.values()]
    else:
        episodes = [actions]
    tasks = _array_tasks(arrays, len(episodes), source)
    return [
        _Episode(f"episode_{index}", task, rows) for index, (rows, task) in enumerate(zip(episodes, tasks, strict=True))
    ]


def _cut_at(actions: _AnyArray, ends: _AnyArray, source: str) -> list[_AnyArray]:
    """Cut actions [N, A] at the exclusive episode ends, ascending integers of which the last is N."""
    if ends.ndim != 1 or ends.dtype.kind not in "iu" or not ends.size or (np.diff(ends.astype(np.int64)) < 0).any():
        raise DataError(
            f"{source}: episode_ends of shape {ends.shape}, {ends.dtype}; expected ascending integers [episodes]"
        )
    if ends[0] < 0 or ends[-1] != len(actions):
        raise DataError(
            f"{source}: episode_ends run from {ends[0]} to {ends[-1]} for {len(actions)} steps; expected the exclusive "
            "end of every episode, the last being the number of steps"
        )
    return np.split(actions, ends[:-1].astype(np.int64))


def _rows_by_episode(steps: int, episode: _AnyArray, order: _AnyArray, source: str) -> dict[int, npt.NDArray[np.intp]]:
    """Row numbers by episode number [steps], ascending, within each by `order` [steps]."""
    if any(column.shape != (steps,) or column.dtype.kind not in "iu" for column in (episode, order)):
        raise DataError(
            f"{source}: {steps} steps, but episode_index is {episode.dtype} {episode.shape} and frame_index "
            f"{order.dtype} {order.shape}; expected one integer per step"
        )
    rows = np.lexsort((order, episode))
    same_episode = np.diff(episode[rows]) == 0
    repeated = same_episode & (np.diff(order[rows]) == 0)
    if repeated.any():
        row = rows[int(np.argmax(repeated))]
        raise DataError(
            f"{source}: episode {episode[row]} has frame {order[row]} twice; expected every frame once: remove the "
            "duplicate file or row"
        )
    parts = np.split(rows, np.flatnonzero(~same_episode) + 1)
    return {int(episode[part[0]]): part for part in parts if part.size}


def _array_tasks(arrays: Mapping[str, _AnyArray], episodes: int, source: str) -> list[str]:
    if "task_index" not in arrays:
        return [""] * episodes
    index = arrays["task_index"]
    if index.shape != (episodes,) or index.dtype.kind not in "iu":
        raise DataError(
            f"{source}: task_index {index.dtype} {index.shape}; expected one integer for each of {episodes} episodes"
        )
    names = dict(enumerate(map(str, arrays["task_names"]))) if "task_names" in arrays else {}
    return [_task(names, int(number)) for number in index]


def _task(names: Mapping[int, str], index: int) -> str:
    # A number still tells the tasks apart, which is what stratifying needs.
    return names.get(index, f"task_{index}")


# HDF5 and LeRobot ----------------------------------------------------------------------------------------------------


def _read_folder(path: Path, key: str | None, filter_key: str | None = None) -> list[_Episode]:
    files = sorted(file for file in path.glob("data/*/*.parquet") if not is_hidden(file.relative_to(path).as_posix()))
    if files and not filter_key:
        return _from_parquet(files, path, key)
    if files := hdf5_files(path):
        return [
            episode._replace(name=f"{file.stem}/{episode.name}".rstrip("/"))
            for file in files
            for episode in _read_hdf5(file, key, filter_key)
        ]
    listed = shortlist(sorted(file.name for file in path.iterdir() if not is_hidden(file.name))) or "nothing"
    raise DataError(
        f"folder {path.name} holds {listed}; expected HDF5 files, or a LeRobot dataset "
        "(data/chunk-000/*.parquet and meta/)"
    )


def _read_hdf5(path: Path, key: str | None, filter_key: str | None = None) -> list[_Episode]:
    h5py = _optional("h5py")
    with _readable(path, "an HDF5 file"), h5py.File(path, "r") as file:
        try:
            episodes = find_episodes(file, path.name, (h5py.Group, h5py.Dataset), key, filter_key)
        except SourceError as error:
            raise DataError(str(error)) from error
        attributes = file["data"].attrs if "data" in file else file.attrs
        return [
            # ALOHA's episodes of one task lie in a folder.
            _Episode(
                found.name,
                _hdf5_task(attributes, path if found.name else path.absolute().parent),
                file[found.place][()],
            )
            for found in episodes
        ]


def _hdf5_task(attributes: Mapping[str, Any], path: Path) -> str:
    """LIBERO's instruction, else robomimic's environment, else the file's name."""
    for attribute, name in (("problem_info", "language_instruction"), ("env_args", "env_name")):
        with suppress(KeyError, TypeError, ValueError):
            task = json.loads(attributes[attribute])[name]
            # Some LIBERO files hold the instruction as a list of words, some in quotation marks.
            return (task if isinstance(task, str) else " ".join(task)).strip().strip('"')
    return path.stem.removesuffix("_demo")


def _read_parquet(path: Path, key: str | None) -> list[_Episode]:
    return _from_parquet([path], path, key)


def _from_parquet(files: list[Path], path: Path, key: str | None) -> list[_Episode]:
    """LeRobot episodes: one file each (v2) or many in a file (v3); their task is that of their first frame."""
    tables = [_read_columns(file, key or "action") for file in files]
    widths = [actions.shape[1] for actions, _, _, _ in tables]
    if len(set(widths)) > 1:
        other = next(index for index, width in enumerate(widths) if width != widths[0])
        raise DataError(
            f"{files[0].name} has {widths[0]} action dimensions, {files[other].name} has {widths[other]}; expected the "
            "same everywhere: keep one robot's actions per folder"
        )
    actions, episode, frame, task = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    names = {_NO_TASK: "", **(_lerobot_tasks(path / "meta") if path.is_dir() else {})}
    rows = _rows_by_episode(len(actions), episode, frame, path.name)
    return [
        _Episode(f"episode_{number}", _task(names, int(task[part[0]])), actions[part]) for number, part in rows.items()
    ]


def _read_columns(path: Path, key: str) -> tuple[_AnyArray, _AnyArray, _AnyArray, _AnyArray]:
    """Actions [N, A], episode, frame and task numbers [N] of one file, in the file's order."""
    parquet = _optional("pyarrow.parquet")
    with _readable(path, "a .parquet file"), parquet.ParquetFile(path) as file:
        columns = file.schema_arrow.names
        for needed in (key, "episode_index"):
            if needed not in columns:
                raise DataError(
                    f"{path.name} has no column {needed!r}; found {shortlist(columns)}; expected LeRobot columns: name "
                    "the action column with key="
                )
        table = file.read(columns=[key, *({"episode_index", "frame_index", "task_index"} & set(columns))])
        rows = np.arange(table.num_rows)
        integers = [
            table.column(name).to_numpy() if name in columns else default
            for name, default in (
                ("episode_index", rows),
                ("frame_index", rows),
                ("task_index", np.full_like(rows, _NO_TASK)),
            )
        ]
        episode, frame, task = integers
        column = table.column(key)
        if not len(column):
            raise DataError(f"{path.name} has no rows; expected at least one step: remove the file")
        missing = _missing_rows(column)
        if missing.size:
            row = int(missing[0])
            raise DataError(
                f"{path.name}: column {key!r} has a missing value in episode {episode[row]}, step "
                f"{int(((episode == episode[row]) & (frame < frame[row])).sum())} (row {row} of the file); expected "
                "an action in every row: repair or drop this episode"
            )
        return _action_rows(column, path, key), episode, frame, task


def _missing_rows(column: Any) -> _AnyArray:
    """Rows without an action or with one that lacks a number: pandas writes NaN so."""
    compute = _optional("pyarrow.compute")
    rows: _AnyArray = np.flatnonzero(column.is_null().to_numpy())
    if hasattr(column.type, "value_type"):
        numbers = column.combine_chunks()
        parents = compute.list_parent_indices(numbers).to_numpy()
        rows = np.union1d(rows, parents[numbers.flatten().is_null().to_numpy(zero_copy_only=False)])
    return rows


def _action_rows(column: Any, path: Path, key: str) -> _AnyArray:
    """A column of equally long lists or of plain numbers, none missing, as [N, A]."""
    # LeRobot writes a one-dimensional action as a plain number.
    is_list = hasattr(column.type, "value_type")
    values = column.combine_chunks().flatten() if is_list else column.combine_chunks()
    if is_list:
        lengths = np.unique(_optional("pyarrow.compute").list_value_length(column).to_numpy())
        if len(lengths) > 1:
            raise DataError(
                f"{path.name}: column {key!r} has {lengths[0]} action dimensions in one row, {lengths[1]} in another; "
                "expected the same everywhere"
            )
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(len(column), -1)


def _lerobot_tasks(meta: Path) -> dict[int, str]:
    """Task texts by number: meta/tasks.jsonl (v2), meta/tasks.parquet (v3)."""
    if (path := meta / "tasks.jsonl").exists():
        with _readable(path, "JSON lines"):
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            return {int(line["task_index"]): str(line["task"]) for line in lines}
    if (path := meta / "tasks.parquet").exists():
        with _readable(path, "a .parquet file"), _optional("pyarrow.parquet").ParquetFile(path) as file:
            table = file.read()
            texts = [name for name in _TASK_COLUMNS if name in table.column_names]
            if not texts or "task_index" not in table.column_names:
                raise DataError(f"{path.name} has {shortlist(table.column_names)}; expected task_index and task")
            return dict(zip(table.column("task_index").to_pylist(), table.column(texts[0]).to_pylist(), strict=True))
    return {}


_READERS: Mapping[str, Callable[[Path, str | None], list[_Episode]]] = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".pt": _read_pt,
    **dict.fromkeys(HDF5_SUFFIXES, _read_hdf5),
    ".parquet": _read_parquet,
}


# Splitting -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitFractions:
    """Shares of the episodes; positive, adding up to 1 (DataError otherwise)."""

    train: float = 0.6
    validation: float = 0.1
    calibration: float = 0.15
    test: float = 0.15

    def __post_init__(self) -> None:
        shares = astuple(self)
        if not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1):
            raise DataError(
                f"split fractions {shares} add up to {sum(shares):g}; expected positive ones adding up to 1"
            )


@dataclass(frozen=True, eq=False)
class EpisodeSplit:
    """Parts that share no episode."""

    train: ActionDataset
    validation: ActionDataset
    calibration: ActionDataset
    test: ActionDataset


def split_episodes(
    dataset: ActionDataset, *, seed: int = 0, fractions: SplitFractions = SplitFractions()
) -> EpisodeSplit:
    """Split by episode, every task in proportion; the same parts for the same data order and seed, anywhere.

    Within a part the tasks take turns, so that its first n episodes cover them evenly. Of each task a part gets its
    exact share rounded up or down, except that a part that would stay empty takes an episode from the largest.
    Raises DataError when there are fewer episodes than parts.
    """
    shares = np.array(astuple(fractions))
    total = len(dataset.episodes)
    if total < len(shares):
        raise DataError(
            f"{dataset.source} has {total} episodes; {len(shares)} are needed, one for each of train, validation, "
            "calibration and test: record more"
        )
    by_task: dict[str, list[int]] = {}
    for index, task in enumerate(dataset.tasks):
        by_task.setdefault(task, []).append(index)
    parts: list[list[tuple[int, int]]] = [[] for _ in shares]
    for indices in by_task.values():
        indices.sort(key=lambda index: _shuffle_key(seed, index))
        # What every part is owed so far: the rounding of one task is made good by the next.
        done = sum(map(len, parts)) + len(indices)
        exact = shares * len(indices)
        counts = np.floor(exact + 1e-9).astype(int)
        owed = np.where(exact > counts + 1e-9, shares * done - [len(part) for part in parts] - counts, -np.inf)
        counts[np.argsort(-owed, kind="stable")[: len(indices) - counts.sum()]] += 1
        for part, chosen in zip(parts, np.split(indices, np.cumsum(counts)[:-1]), strict=True):
            part.extend(enumerate(map(int, chosen)))
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    chosen_parts = (dataset.select(index for _, index in sorted(part, key=lambda turn: turn[0])) for part in parts)
    return EpisodeSplit(*chosen_parts)


def _shuffle_key(seed: int, index: int) -> bytes:
    # numpy may change its random streams between versions; calibration must find the training episodes again.
    return hashlib.sha256(f"{seed}/{index}".encode()).digest()


def chunk(actions: FloatArray, length: int) -> FloatArray:
    """[N, A] to [N // length, length, A], a view; the last N % length steps are dropped. DataError for other shapes."""
    if actions.ndim != 2 or length < 1:
        raise DataError(f"cannot cut shape {actions.shape} into chunks of {length}; expected [N, A] and at least 1")
    count = len(actions) // length
    return actions[: count * length].reshape(count, length, actions.shape[1])
