"""HDF5 files of demonstrations in every layout of runtime/datasets/hdf5_layouts.py, one file or a folder of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .hdf5_layouts import FoundEpisode, find_episodes
from .steps import (
    EpisodeTable,
    Int64Array,
    SourceFile,
    Steps,
    as_float32,
    check_width,
    is_hidden,
    lengths_to_starts,
    natural,
    opened,
    optional,
    readable,
    shown_name,
    source_file,
)

HDF5_SUFFIXES = (".hdf5", ".h5")
HDF5_KIND, HDF5_MAGIC = "an HDF5 file", b"\x89HDF"


@dataclass(frozen=True, eq=False)
class Hdf5Source:
    """file_of_episode: int64 [E]; episodes: where they are in the files, [E]; both in the order of the steps."""

    name: str
    root: Path
    paths: tuple[Path, ...]
    files: tuple[SourceFile, ...]
    file_of_episode: Int64Array
    episodes: tuple[FoundEpisode, ...]
    table: EpisodeTable

    @property
    def num_steps(self) -> int:
        return int(self.table.starts[-1])

    @property
    def stated_episodes(self) -> None:
        return None

    def open(self, width: int) -> _Hdf5Reader:
        return _Hdf5Reader(self, width)

    def check(self) -> None:
        """Nothing to do: HDF5 checks what it has sums for on the way."""

    def file_of(self, row: int) -> str:
        episode = int(np.searchsorted(self.table.starts, row, side="right")) - 1
        return f"{self.files[self.file_of_episode[episode]].name}, {self.episodes[episode].place.rpartition('/')[0]}"

    def episode_names(self, episodes: Int64Array) -> list[str]:
        return [
            f"{shown_name(Path(self.files[self.file_of_episode[number]].name).with_suffix(''))}/"
            f"{self.episodes[number].name}".rstrip("/")
            for number in episodes.tolist()
        ]


def hdf5_files(folder: Path) -> list[Path]:
    found = (path for path in folder.iterdir() if path.suffix.lower() in HDF5_SUFFIXES and not is_hidden(path.name))
    return sorted(found, key=lambda path: natural(path.name))


def open_hdf5(path: Path, key: str | None, filter_key: str | None = None) -> Hdf5Source:
    """One file, or a folder of them in natural order; episodes are numbered on from 0 as they come."""
    paths = hdf5_files(path) if path.is_dir() else [path]
    episodes: list[FoundEpisode] = []
    lengths: list[int] = []
    owners: list[int] = []
    for index, file in enumerate(paths):
        for episode in hdf5_episodes(file, key, filter_key):
            episodes.append(episode)
            lengths.append(episode.steps)
            owners.append(index)
    table = EpisodeTable(lengths_to_starts(np.array(lengths)), np.arange(len(lengths), dtype=np.int64))
    root = path if path.is_dir() else path.parent
    files = tuple(source_file(file, root) for file in paths)
    return Hdf5Source(shown_name(path), root, tuple(paths), files, np.array(owners), tuple(episodes), table)


def hdf5_episodes(path: Path, key: str | None, filter_key: str | None = None) -> list[FoundEpisode]:
    """Those of one file, in natural order. Raises SourceError."""
    h5py = optional("h5py")
    with opened(path, HDF5_KIND, HDF5_MAGIC), h5py.File(path, "r") as file:
        return find_episodes(file, path.name, key, filter_key)


class _Hdf5Reader:
    def __init__(self, source: Hdf5Source, width: int) -> None:
        self._source, self._width = source, width
        self._h5py = optional("h5py")
        self._file: Any = None
        self._file_index = -1

    def read(self, start: int, stop: int) -> Steps:
        source, starts = self._source, self._source.table.starts
        actions = np.empty((stop - start, self._width), np.float32)
        row = start
        while row < stop:
            episode = int(np.searchsorted(starts, row, side="right")) - 1
            index, first = int(source.file_of_episode[episode]), int(starts[episode])
            end = min(stop, int(starts[episode + 1]))
            if index != self._file_index:
                self.close()
                with opened(source.paths[index], HDF5_KIND, HDF5_MAGIC, name=source.files[index].name):
                    self._file = self._h5py.File(source.paths[index], "r")
                self._file_index = index
            with readable(source.file_of(row), HDF5_KIND):
                dataset = self._file[source.episodes[episode].place]
                check_width(dataset.shape[1], self._width, source.file_of(row))
                actions[row - start : end - start] = as_float32(dataset[row - first : end - first])
            row = end
        return source.table.steps(actions, start)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file, self._file_index = None, -1
