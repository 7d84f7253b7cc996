"""HDF5 files of demonstrations, one or a folder of them; runtime/datasets/hdf5_layouts.py has the layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.arrays import Int64Array
from .hdf5_layouts import FoundEpisode, find_episodes
from .hdf5_storage import follow
from .source_base import (
    EpisodeTable,
    Source,
    StepReader,
    Steps,
    as_float32,
    opened,
    optional,
    shown_name,
    visible_files,
)

HDF5_SUFFIXES = (".hdf5", ".h5")
_KIND, _MAGIC = "an HDF5 file", b"\x89HDF"


class _Hdf5Reader(StepReader):
    _source: Hdf5Source

    def _open(self, index: int) -> Any:
        file = self._source.files[index].name
        path = self._source.root / file
        with opened(path, _KIND, _MAGIC, name=file):
            return optional("h5py").File(path, "r")

    def _read(self, piece: int, start: int, stop: int) -> Steps:
        source, first = self._source, int(self._source.first_rows[piece])
        episode = source.episodes[piece]
        values = self._at(episode.file)[episode.place][start - first : stop - first]
        return source.table.steps(as_float32(values), start)


@dataclass(frozen=True, eq=False, kw_only=True)
class Hdf5Source(Source):
    """episodes: where they are in the files, [E]; file_tasks: one for each file."""

    kind = _KIND
    reader = _Hdf5Reader
    episodes: tuple[FoundEpisode, ...]
    file_tasks: tuple[str, ...]

    @cached_property
    def table(self) -> EpisodeTable:
        return EpisodeTable(self.first_rows, np.arange(len(self.episodes), dtype=np.int64))

    def file_of(self, row: int) -> str:
        episode = self.episodes[self.piece_of(row)]
        return ", ".join(filter(None, (self.files[episode.file].name, episode.place.rpartition("/")[0])))

    def episode_names(self, episodes: Int64Array) -> list[str]:
        files = [shown_name(Path(file.name).with_suffix("")) for file in self.files]
        chosen = (self.episodes[number] for number in episodes.tolist())
        return [f"{files[episode.file]}/{episode.name}".rstrip("/") for episode in chosen]

    def tasks(self, episodes: EpisodeTable) -> list[str]:
        return [self.file_tasks[self.episodes[number].file] for number in episodes.numbers.tolist()]


def hdf5_files(folder: Path) -> list[Path]:
    return visible_files(folder, (path for path in folder.iterdir() if path.suffix.lower() in HDF5_SUFFIXES))


def open_hdf5(path: Path, key: str | None, filter_key: str | None = None) -> Hdf5Source:
    """One file, or a folder of them in natural order; episodes are numbered from 0 in this order."""
    h5py = optional("h5py")
    paths = hdf5_files(path) if path.is_dir() else [path]
    episodes: list[FoundEpisode] = []
    tasks: list[str] = []
    for index, one in enumerate(paths):
        with opened(one, _KIND, _MAGIC), h5py.File(one, "r") as file:
            found = find_episodes(file, one.name, key, filter_key)
            data = follow(file, "data", one.name)
            # ALOHA has a folder for each task.
            tasks.append(_task((file if data is None else data).attrs, one if found[0].name else one.parent))
        episodes += [replace(episode, file=index) for episode in found]
    pieces = [(found.steps, found.width, f"{paths[found.file].name}, {found.place}") for found in episodes]
    return Hdf5Source.from_pieces(path, paths, pieces, episodes=tuple(episodes), file_tasks=tuple(tasks))


def _task(attributes: Mapping[str, Any], path: Path) -> str:
    """LIBERO's instruction, else robomimic's environment, else the file's name."""
    for attribute, name in (("problem_info", "language_instruction"), ("env_args", "env_name")):
        with suppress(KeyError, TypeError, ValueError):
            task = json.loads(attributes[attribute])[name]
            # Some LIBERO files hold the instruction as a list of words, some in quotation marks.
            return (task if isinstance(task, str) else " ".join(task)).strip().strip('"')
    return path.stem.removesuffix("_demo")
