"""Reads files of robot actions as a whole: all that runtime/datasets/sources.py opens, and .pt.

Everything but numpy is imported only when a file needs it.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from rfsq.runtime.bundle.paths import shortlist
from rfsq.runtime.datasets.array_layouts import (
    are_comparable,
    array_tasks,
    check_actions,
    choose_arrays,
    episode_table,
)
from rfsq.runtime.datasets.episodes import Run, check_values, extend_runs, join_runs
from rfsq.runtime.datasets.errors import SourceError
from rfsq.runtime.datasets.pieces import Source
from rfsq.runtime.datasets.sources import open_source
from rfsq.runtime.datasets.steps import EpisodeTable, opened, optional, readable

_AnyArray = npt.NDArray[Any]
_SLICE_STEPS = 65_536


class Episodes(NamedTuple):
    """actions: [steps, A] each, as the file has them or float32; names, tasks: one for each, "" where not known;
    has_borders: False where the file does not say where episodes end."""

    actions: Sequence[_AnyArray]
    names: Sequence[str]
    tasks: Sequence[str]
    has_borders: bool


def read_episodes(path: Path, key: str | None, filter_key: str | None) -> Episodes:
    """Every episode of a file or folder, as `load_actions` describes it. Raises DatasetError."""
    if path.suffix.lower() == ".pt" and path.exists() and not path.is_dir() and not filter_key:
        return _read_pt(path, key)
    source = open_source(path, key, filter_key)
    actions, table = _read_whole(source)
    names = source.episode_names(table.numbers)
    if path.is_file():
        # Of a single file, its name says nothing.
        names = [name.removeprefix(f"{path.stem}/") for name in names]
    return Episodes(np.split(actions, table.starts[1:-1]), names, source.tasks(table), source.has_borders)


def _read_whole(source: Source) -> tuple[npt.NDArray[np.float32], EpisodeTable]:
    """All actions, float32 [steps, A], and their episodes, with every check of a conversion. Raises SourceError."""
    source.check()
    with readable(source.name, source.kind):
        actions = np.empty((source.num_steps, source.width), np.float32)
    runs: list[Run] = []
    with closing(source.open(source.width)) as reader:
        for start, steps in reader.slices(0, source.num_steps, _SLICE_STEPS):
            extend_runs(runs, steps, source, start)
            check_values(steps, source, start, np.finfo(np.float32).max)
            actions[start : start + len(steps)] = steps.values
    table = join_runs(runs, source)
    source.touched_file()
    actions.flags.writeable = False
    return actions, table


def _read_pt(path: Path, key: str | None) -> Episodes:
    with opened(path, "a .pt file of tensors") as file:
        content = _load_tensors(file, path.name)
        # A tensor alone, or one for each episode.
        found = {name: value if isinstance(value, list) else [value] for name, value in content.items()}
        chosen = choose_arrays(found, key, path.name, lambda one, other: _are_equal(found[one], found[other]))
        arrays = {name: value for name, value in content.items() if not isinstance(value, list)}
        if isinstance(content[chosen[0]], list):
            episodes = {f"episode_{place}": one for place, one in enumerate(found[chosen[0]])}
            arrays, chosen = {**arrays, **episodes}, tuple(episodes)
        return _from_arrays(arrays, chosen, path.name)


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
        if isinstance(value, torch.Tensor):
            found[str(name)] = _array(value)
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


def _from_arrays(arrays: Mapping[str, _AnyArray], chosen: Sequence[str], source: str) -> Episodes:
    """Episodes of arrays by their names. chosen: the arrays of actions. Raises SourceError."""

    def read(name: str) -> Iterator[_AnyArray]:
        yield arrays[name]

    check_actions(arrays, chosen, source)
    table, stated = episode_table(arrays, chosen, source, read)
    tasks = array_tasks(arrays, len(table.numbers), source, read)
    parts = [arrays[name] for name in chosen]
    if len(parts) == 1:
        parts = np.split(parts[0].reshape(-1, parts[0].shape[-1]), table.starts[1:-1])
        chosen = [f"episode_{number}" for number in table.numbers.tolist()]
    return Episodes(parts, chosen, tasks, bool(stated))
