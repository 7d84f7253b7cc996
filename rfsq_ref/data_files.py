"""Files of robot actions, read whole: .npz and .npy, .pt, HDF5, LeRobot v2 and v3.

What a file holds is found and refused as runtime/datasets/sources.py does it, which reads the same files in slices.
Here rows may also come in any order, and episodes have tasks. Everything but numpy is imported only when a file needs
it.
"""

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rfsq.runtime.bundle.paths import shortlist
from rfsq.runtime.datasets.array_layouts import (
    NUMBERS_NAME,
    Described,
    are_comparable,
    begins_of_episodes,
    check_actions,
    choose_arrays,
    require_agreement,
    require_integers,
    stated_starts,
)
from rfsq.runtime.datasets.errors import SourceError
from rfsq.runtime.datasets.hdf5 import HDF5_KIND, HDF5_MAGIC, HDF5_SUFFIXES, hdf5_files
from rfsq.runtime.datasets.hdf5_layouts import find_episodes
from rfsq.runtime.datasets.hdf5_storage import follow
from rfsq.runtime.datasets.lerobot import (
    PARQUET_KIND,
    PARQUET_MAGIC,
    as_integers,
    check_columns,
    parquet_files,
    stated_episodes,
)
from rfsq.runtime.datasets.npz import npz_arrays
from rfsq.runtime.datasets.steps import Int64Array, as_int64, is_hidden, opened, optional

_AnyArray = npt.NDArray[Any]
#: Whoever reads whole files calibrates or trains with them: a robot reads in slices.
_optional = partial(optional, extra="export")

# pandas writes an index that bears no name under the second one; LeRobot keeps its task texts in the index.
_TASK_COLUMNS = ("task", "__index_level_0__")
_NO_TASK = -1


class Episode(NamedTuple):
    """actions: as the file has them; name: "" where the file is the episode; task: "" where it is not known;
    has_borders: False where the file does not say where episodes end."""

    name: str
    task: str
    actions: _AnyArray
    has_borders: bool = True


def read_episodes(path: Path, key: str | None, filter_key: str | None) -> list[Episode]:
    """Every episode of a file or folder, as `load_actions` describes it. Raises DatasetError."""
    if not path.exists():
        raise SourceError(f"{path} does not exist; give an action file ({', '.join(_READERS)}) or a folder of them")
    suffix = path.suffix.lower()
    if path.is_dir():
        return _read_folder(path, key, filter_key)
    if suffix in HDF5_SUFFIXES:
        return _read_hdf5(path, key, filter_key)
    if filter_key:
        raise SourceError(f"{path.name} is no HDF5 file, and has no filter keys; leave --filter-key (filter_key=) out")
    if suffix not in _READERS:
        raise SourceError(
            f"{path.name} has the suffix {path.suffix!r}; expected one of {', '.join(_READERS)}, or a folder"
        )
    return _READERS[suffix](path, key)


# numpy and torch files: named arrays ---------------------------------------------------------------------------------


def _read_npz(path: Path, key: str | None) -> list[Episode]:
    # Nothing is read before it is known to be plain numbers.
    stored = npz_arrays(path, key)
    if path.suffix.lower() == ".npy":
        check_actions(stored, tuple(stored), path.name)
    with opened(path, f"a {path.suffix.lower()} file") as file:
        loaded = np.load(file, allow_pickle=False)
        arrays = {"actions": loaded} if isinstance(loaded, np.ndarray) else loaded

        def are_equal(one: str, other: str) -> bool:
            return are_comparable(stored[one], stored[other]) and _are_equal([arrays[one]], [arrays[other]])

        chosen = choose_arrays(stored, key, path.name, are_equal)
        return _from_arrays(arrays, stored, chosen, path.name)


def _read_pt(path: Path, key: str | None) -> list[Episode]:
    torch = _optional("torch")
    # Not above: few formats need torch.
    from rfsq.rfsq_ref.tensor_files import load_torch

    def array(tensor: Any) -> _AnyArray:
        tensor = tensor.detach()
        # numpy has no bfloat16
        return np.asarray((tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy())

    with opened(path, "a .pt file of tensors") as file:
        try:
            content = load_torch(file)
        # torch's own message advises to load it all the same.
        except pickle.UnpicklingError as error:
            raise SourceError(
                f"{path.name} is damaged or pickles more than tensors, which could run code; expected tensors alone: "
                "save them in a list or dict with torch.save"
            ) from error
        if isinstance(content, list | tuple):
            others = sorted({type(part).__name__ for part in content if not isinstance(part, torch.Tensor)})
            if others:
                raise SourceError(
                    f"{path.name} holds a list with {', '.join(others)} in it; expected tensors alone, one [steps, A] "
                    "for each episode: save such as [episode['action'] for episode in episodes]"
                )
        if isinstance(content, torch.Tensor | list | tuple):
            content = {"actions": content}
        if not isinstance(content, Mapping):
            raise SourceError(
                f"{path.name} holds a {type(content).__name__}; expected a tensor, a list or a dict of tensors"
            )
        lists: dict[str, list[_AnyArray]] = {}
        arrays: dict[str, _AnyArray] = {}
        for name, value in content.items():
            if isinstance(value, torch.Tensor):
                arrays[str(name)] = array(value)
            elif isinstance(value, list | tuple) and any(isinstance(part, torch.Tensor) for part in value):
                lists[str(name)] = [array(part) for part in _all_tensors(value, torch.Tensor, f"{path.name}: {name!r}")]
        parts = {**{name: [one] for name, one in arrays.items()}, **lists}
        if content and not parts:
            kinds = [f"{name} ({type(value).__name__})" for name, value in content.items()]
            raise SourceError(
                f"{path.name} holds no tensor; found {shortlist(kinds)}; expected `actions`, a tensor or a list of "
                "tensors"
            )
        chosen = choose_arrays(parts, key, path.name, lambda one, other: _are_equal(parts[one], parts[other]))
        if chosen[0] in lists:
            episodes = {f"episode_{place}": one for place, one in enumerate(lists[chosen[0]])}
            arrays, chosen = {**arrays, **episodes}, tuple(episodes)
        return _from_arrays(arrays, arrays, chosen, path.name)


def _all_tensors(values: Sequence[Any], kind: type, label: str) -> Sequence[Any]:
    for place, value in enumerate(values):
        if not isinstance(value, kind):
            raise SourceError(
                f"{label} has a {type(value).__name__} at place {place}; expected tensors alone, one for each episode"
            )
    return values


def _are_equal(ones: Sequence[_AnyArray], others: Sequence[_AnyArray]) -> bool:
    return len(ones) == len(others) and all(
        are_comparable(one, other) and one.tobytes() == other.tobytes() for one, other in zip(ones, others, strict=True)
    )


def _from_arrays(
    arrays: Mapping[str, _AnyArray], stored: Mapping[str, Described], chosen: Sequence[str], source: str
) -> list[Episode]:
    """stored: what is known of the arrays before they are read; chosen: the names of those that are actions."""
    check_actions(stored, chosen, source)
    parts = [arrays[name] for name in chosen]
    steps = sum(part.size // part.shape[-1] for part in parts)
    stated = stated_starts(stored, chosen, source, arrays.__getitem__)
    numbers = None
    if NUMBERS_NAME in stored:
        require_integers(NUMBERS_NAME, stored[NUMBERS_NAME], source, steps)
        numbers = as_int64(arrays[NUMBERS_NAME], f"{source}: {NUMBERS_NAME}")
    if stated and numbers is not None:
        stated[NUMBERS_NAME] = np.append(begins_of_episodes(numbers, source), steps)
    require_agreement(stated, source)
    if len(parts) == 1:
        rows = parts[0].reshape(steps, -1)
        if stated:
            parts = np.split(rows, next(iter(stated.values()))[1:-1])
        elif numbers is not None:
            parts = [rows[part] for part in _rows_by_episode(numbers, np.arange(steps), source).values()]
    names = chosen if len(chosen) > 1 else [f"episode_{index}" for index in range(len(parts))]
    tasks = _array_tasks(arrays, len(parts), source)
    has_borders = bool(stated) or numbers is not None
    return [Episode(*found, has_borders) for found in zip(names, tasks, parts, strict=True)]


def _rows_by_episode(episode: Int64Array, order: Int64Array, source: str) -> dict[int, npt.NDArray[np.intp]]:
    """Row numbers by episode number [steps], ascending, within each by `order` [steps]."""
    rows = np.lexsort((order, episode))
    same_episode = np.diff(episode[rows]) == 0
    repeated = same_episode & (np.diff(order[rows]) == 0)
    if repeated.any():
        row = rows[int(np.argmax(repeated))]
        raise SourceError(
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
        raise SourceError(
            f"{source}: task_index {index.dtype} {index.shape}; expected one integer for each of {episodes} episodes"
        )
    names = dict(enumerate(map(str, arrays["task_names"]))) if "task_names" in arrays else {}
    return [_task(names, int(number)) for number in index]


def _task(names: Mapping[int, str], index: int) -> str:
    # A number still tells the tasks apart, which is what stratifying needs.
    return names.get(index, f"task_{index}")


# HDF5 and LeRobot ----------------------------------------------------------------------------------------------------


def _read_folder(path: Path, key: str | None, filter_key: str | None) -> list[Episode]:
    if (files := parquet_files(path)) and not filter_key:
        return _from_parquet(files, path, key)
    if files := hdf5_files(path):
        return [
            episode._replace(name=f"{file.stem}/{episode.name}".rstrip("/"))
            for file in files
            for episode in _read_hdf5(file, key, filter_key)
        ]
    if filter_key:
        raise SourceError(
            f"folder {path.name} holds no HDF5 files, and has no filter keys; leave --filter-key (filter_key=) out"
        )
    listed = shortlist(sorted(file.name for file in path.iterdir() if not is_hidden(file.name))) or "nothing"
    raise SourceError(
        f"folder {path.name} holds {listed}; expected HDF5 files, or a LeRobot dataset "
        "(data/chunk-000/*.parquet and meta/)"
    )


def _read_hdf5(path: Path, key: str | None, filter_key: str | None) -> list[Episode]:
    h5py = _optional("h5py")
    with opened(path, HDF5_KIND, HDF5_MAGIC), h5py.File(path, "r") as file:
        episodes = find_episodes(file, path.name, key, filter_key)
        data = follow(file, "data", path.name)
        attributes = (file if data is None else data).attrs
        return [
            # ALOHA's episodes of one task lie in a folder.
            Episode(
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


def _read_parquet(path: Path, key: str | None) -> list[Episode]:
    return _from_parquet([path], path, key)


def _from_parquet(files: list[Path], path: Path, key: str | None) -> list[Episode]:
    """LeRobot episodes: one file each (v2) or many in a file (v3); their task is that of their first frame."""
    tables = [_read_columns(file, key or "action") for file in files]
    widths = [actions.shape[1] for actions, _, _, _ in tables]
    if len(set(widths)) > 1:
        other = next(index for index, width in enumerate(widths) if width != widths[0])
        raise SourceError(
            f"{files[0].name} has {widths[0]} action dimensions, {files[other].name} has {widths[other]}; expected the "
            "same everywhere: keep one robot's actions per folder"
        )
    actions, episode, frame, task = (np.concatenate(parts) for parts in zip(*tables, strict=True))
    names = {_NO_TASK: "", **(_lerobot_tasks(path / "meta") if path.is_dir() else {})}
    rows = _rows_by_episode(episode, frame, path.name)
    if path.is_dir():
        stated_episodes(path / "meta", len(actions))
    return [
        Episode(f"episode_{number}", _task(names, int(task[part[0]])), actions[part]) for number, part in rows.items()
    ]


def _read_columns(path: Path, key: str) -> tuple[_AnyArray, _AnyArray, _AnyArray, _AnyArray]:
    """Actions [N, A], episode, frame and task numbers [N] of one file, in the file's order."""
    parquet = _optional("pyarrow.parquet")
    with opened(path, PARQUET_KIND, PARQUET_MAGIC), parquet.ParquetFile(path) as file:
        check_columns(file, path.name, key, needed=("episode_index",))
        columns = file.schema_arrow.names
        table = file.read(columns=[key, *({"episode_index", "frame_index", "task_index"} & set(columns))])
        rows = np.arange(table.num_rows)
        episode, frame, task = (
            as_integers(table.column(name), name, path.name) if name in columns else default
            for name, default in (
                ("episode_index", rows),
                ("frame_index", rows),
                ("task_index", np.full_like(rows, _NO_TASK)),
            )
        )
        column = table.column(key)
        missing = _missing_rows(column)
        if missing.size:
            row = int(missing[0])
            raise SourceError(
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
            raise SourceError(
                f"{path.name}: column {key!r} has {lengths[0]} action dimensions in one row, {lengths[1]} in another; "
                "expected the same everywhere"
            )
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(len(column), -1)


def _lerobot_tasks(meta: Path) -> dict[int, str]:
    """Task texts by number: meta/tasks.jsonl (v2), meta/tasks.parquet (v3)."""
    if (path := meta / "tasks.jsonl").exists():
        with opened(path, "JSON lines") as file:
            lines = [json.loads(line) for line in file if line.strip()]
            return {int(line["task_index"]): str(line["task"]) for line in lines}
    if (path := meta / "tasks.parquet").exists():
        parquet = _optional("pyarrow.parquet")
        with opened(path, PARQUET_KIND, PARQUET_MAGIC), parquet.ParquetFile(path) as file:
            table = file.read()
            texts = [name for name in _TASK_COLUMNS if name in table.column_names]
            if not texts or "task_index" not in table.column_names:
                raise SourceError(f"{path.name} has {shortlist(table.column_names)}; expected task_index and task")
            return dict(zip(table.column("task_index").to_pylist(), table.column(texts[0]).to_pylist(), strict=True))
    return {}


_READERS: Mapping[str, Callable[[Path, str | None], list[Episode]]] = {
    ".npz": _read_npz,
    ".npy": _read_npz,
    ".pt": _read_pt,
    **dict.fromkeys(HDF5_SUFFIXES, partial(_read_hdf5, filter_key=None)),
    ".parquet": _read_parquet,
}
