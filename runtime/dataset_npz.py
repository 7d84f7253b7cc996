"""`.npz` and `.npy`: arrays read in slices where they lie in the file, never whole and never unpickled."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from runtime.dataset_errors import SourceError
from runtime.dataset_steps import (
    AnyArray,
    EpisodeTable,
    Int64Array,
    SourceFile,
    Steps,
    as_float32,
    check_start,
    check_width,
    is_hidden,
    lengths_to_starts,
    natural,
    readable,
    shown_name,
    source_file,
)
from runtime.paths import shortlist

# In order of preference; the names with a slash are those of diffusion-policy replay buffers.
_ACTION_NAMES = ("actions", "action", "data/actions", "data/action", "data")
#: Of an array whose numbers lie in other objects, as numpy makes of a list of episodes of different lengths.
OF_OBJECTS = (
    "is an array of Python objects, such as episodes of different lengths, and reading those could run code; expected "
    "plain numbers: save one array [steps, A] for each episode with np.savez(path, demo_0=..., demo_1=...)"
)
_END_NAMES = ("episode_ends", "meta/episode_ends")
_NUMBERS_NAME = "episode_index"
_SLICE_STEPS = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True, eq=False)
class _Array:
    """An array in the file: `begins` is where its numbers start, in the member if compressed, else in the file."""

    name: str
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    begins: int
    is_compressed: bool
    is_fortran: bool

    @property
    def width(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        """Steps, or numbers where there is one dimension."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]


@dataclass(frozen=True, eq=False)
class NpzSource:
    """arrays: one after the other they are the steps; first_rows: int64 [arrays + 1]; members: all that is read."""

    name: str
    path: Path
    files: tuple[SourceFile, ...]
    arrays: tuple[_Array, ...]
    first_rows: Int64Array
    members: tuple[str, ...]
    table: EpisodeTable

    @property
    def root(self) -> Path:
        return self.path.parent

    @property
    def num_steps(self) -> int:
        return int(self.first_rows[-1])

    @property
    def stated_episodes(self) -> None:
        return None

    def open(self, width: int) -> _NpzReader:
        for array in self.arrays:
            check_width(array.width, width, f"{self.name}, {array.name!r}")
        return _NpzReader(self)

    def check(self) -> None:
        """The sums of the archive: slices are read past them."""
        if self.path.suffix.lower() != ".npz":
            return
        with readable(self.name, "a .npz file"), zipfile.ZipFile(self.path) as archive:
            for name in self.members:
                with archive.open(name) as member:
                    while member.read(1 << 20):
                        pass

    def file_of(self, row: int) -> str:
        del row
        return self.name

    def episode_names(self, episodes: Int64Array) -> list[str]:
        if len(self.arrays) > 1:
            return [self.arrays[number].name for number in episodes.tolist()]
        return [f"episode_{number}" for number in episodes.tolist()]


def open_npz(path: Path, key: str | None) -> NpzSource:
    """Episodes from one array, [N, A] or [episodes, steps, A], or from [steps, A] arrays numbered under one name."""
    if path.suffix.lower() == ".npy":
        if key is not None:
            raise SourceError(
                f"{path.name} holds one array without a name, so --key {key} cannot be found; leave it out"
            )
        arrays = _npy_array(path)
    else:
        arrays = _npz_arrays(path)
    chosen = _choose(arrays, key, path.name)
    for array in chosen:
        _check_actions(array, path.name)
        if len(chosen) > 1 and len(array.shape) != 2:
            raise SourceError(
                f"{path.name}: {array.name!r} is one of {len(chosen)} arrays of episodes and has the shape "
                f"{list(array.shape)}; expected [steps, A]: join them into one [episodes, steps, A]"
            )
    first_rows = lengths_to_starts(np.array([array.rows for array in chosen]))
    files, numbering = (source_file(path, path.parent),), None
    if len(chosen) > 1:
        table = EpisodeTable(first_rows, np.arange(len(chosen), dtype=np.int64))
    else:
        numbering = _numbering(chosen[0], arrays)
        table = _table(path, chosen[0], numbering)
    members = tuple(array.member for array in (*chosen, numbering) if array is not None)
    return NpzSource(shown_name(path), path, files, chosen, first_rows, members, table)


def _npy_array(path: Path) -> dict[str, _Array]:
    check_start(path, "a .npy file", b"\x93NUMPY")
    with readable(path.name, "a .npy file"), path.open("rb") as file:
        array = _header(file, "actions", "", path.stat().st_size, is_compressed=False)
    return {"actions": array}


def _npz_arrays(path: Path) -> dict[str, _Array]:
    check_start(path, "a .npz file", b"PK")
    found = {}
    with readable(path.name, "a .npz file"), zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if is_hidden(info.filename):
                continue
            name = info.filename.removesuffix(".npy")
            if name in found:
                raise SourceError(f"{path.name} holds {name!r} twice; expected every array once: save it anew")
            with archive.open(info) as member:
                array = _header(member, name, info.filename, info.file_size, is_compressed=True)
            if info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset)
                fields = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                data = info.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1]
                array = _Array(
                    name, array.member, array.shape, array.dtype, data + array.begins, False, array.is_fortran
                )
            found[name] = array
    return found


def _header(file: IO[bytes], name: str, member: str, size: int, *, is_compressed: bool) -> _Array:
    """Raises SourceError for what is cut off."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    begins = file.tell()
    expected = begins + math.prod(shape) * dtype.itemsize
    if size != expected and not dtype.hasobject:
        raise SourceError(f"{name!r} has {size} bytes; expected {expected} for its shape {list(shape)}: copy it again")
    return _Array(name, member, shape, dtype, begins, is_compressed, is_fortran)


def _choose(arrays: Mapping[str, _Array], key: str | None, source: str) -> tuple[_Array, ...]:
    names = sorted(arrays, key=natural)
    name = key or next((name for name in _ACTION_NAMES if name in arrays), names[0] if len(names) == 1 else None)
    if name is None and names and len({name.rstrip("0123456789") for name in names}) == 1:
        return tuple(arrays[name] for name in names)
    if name is None or name not in arrays:
        wanted = f"array {key!r}" if key else "action array"
        raise SourceError(
            f"{source} has no {wanted}; found {shortlist(names) or 'nothing'}; expected `actions`: name the right one "
            "with --key"
        )
    return (arrays[name],)


def _check_actions(array: _Array, source: str) -> None:
    if array.dtype.hasobject:
        raise SourceError(f"{source}: {array.name!r} {OF_OBJECTS}")
    if array.dtype.kind != "f" or len(array.shape) not in (2, 3) or not all(array.shape):
        raise SourceError(
            f"{source}: {array.name!r} is {array.dtype} {list(array.shape)}; expected floating-point numbers [N, A] or "
            "[episodes, steps, A], not empty: convert it, or name another array with --key"
        )
    if array.is_fortran:
        raise SourceError(
            f"{source}: {array.name!r} is stored column by column; save np.ascontiguousarray of it, to be read in "
            "slices"
        )


def _numbering(actions: _Array, arrays: Mapping[str, _Array]) -> _Array | None:
    """What cuts the steps into episodes, where anything does."""
    if len(actions.shape) == 3:
        return None
    return next((arrays[name] for name in (*_END_NAMES, _NUMBERS_NAME) if name in arrays), None)


def _table(path: Path, actions: _Array, numbering: _Array | None) -> EpisodeTable:
    if len(actions.shape) == 3:
        starts = np.arange(actions.shape[0] + 1, dtype=np.int64) * actions.shape[1]
    elif numbering is None:
        starts = np.array([0, actions.rows], np.int64)
    elif numbering.name == _NUMBERS_NAME:
        return _table_by_numbers(path, numbering, actions.rows)
    else:
        ends = np.concatenate([np.empty(0, np.int64), *_integers(path, numbering)])
        starts = _starts_by_ends(ends, actions.rows, path.name)
    return EpisodeTable(starts, np.arange(len(starts) - 1, dtype=np.int64))


def _integers(path: Path, array: _Array) -> Iterator[Int64Array]:
    """In slices, the last of which may be shorter."""
    if array.dtype.kind not in "iu" or len(array.shape) != 1:
        raise SourceError(
            f"{path.name}: {array.name!r} is {array.dtype} {list(array.shape)}; expected integers in one dimension"
        )
    with readable(path.name, "a .npz file"), _Stream(path, array) as stream:
        for start in range(0, array.rows, _SLICE_STEPS):
            yield stream.read(start, min(start + _SLICE_STEPS, array.rows)).astype(np.int64)


def _starts_by_ends(ends: Int64Array, steps: int, source: str) -> Int64Array:
    starts = np.concatenate([np.zeros(1, np.int64), ends])
    if not ends.size or ends[-1] != steps or (np.diff(starts) <= 0).any():
        raise SourceError(
            f"{source}: episode_ends of {ends.size} episodes for {steps} steps; expected the exclusive end of every "
            "episode, ascending, each with at least one step, the last being the number of steps"
        )
    return starts


def _table_by_numbers(path: Path, numbers: _Array, steps: int) -> EpisodeTable:
    """From one episode number for each step, without holding them all."""
    if numbers.shape != (steps,):
        raise SourceError(f"{path.name}: {steps} steps, but episode_index {list(numbers.shape)}; expected one for each")
    starts: list[Int64Array] = []
    found: list[Int64Array] = []
    last: Int64Array = np.empty(0, np.int64)
    for index, part in enumerate(_integers(path, numbers)):
        start = index * _SLICE_STEPS
        before = np.concatenate([last if last.size else part[:1] - 1, part[:-1]])
        begins = np.flatnonzero(part != before)
        if (part < before).any():
            row = start + int(np.argmax(part < before))
            raise SourceError(
                f"{path.name}: episode_index falls at step {row} of the file; expected ascending numbers, each episode "
                "in one piece: sort the file by episode"
            )
        starts.append(begins + start)
        found.append(part[begins])
        last = part[-1:]
    return EpisodeTable(np.concatenate([*starts, np.array([steps])]), np.concatenate(found))


# Reading --------------------------------------------------------------------------------------------------------------


class _Stream:
    """One array's rows; forwards is cheap, backwards in a compressed one means to begin again."""

    def __init__(self, path: Path, array: _Array) -> None:
        self._array = array
        self._archive = zipfile.ZipFile(path) if array.is_compressed else None
        self._file: IO[bytes] = path.open("rb") if self._archive is None else self._archive.open(array.member)

    def read(self, start: int, stop: int) -> AnyArray:
        array = self._array
        row_bytes = array.width * array.dtype.itemsize
        self._file.seek(array.begins + start * row_bytes)
        content = self._file.read((stop - start) * row_bytes)
        if len(content) != (stop - start) * row_bytes:
            raise EOFError(f"{array.name!r} ends early")
        values = np.frombuffer(content, array.dtype)
        return values if len(array.shape) == 1 else values.reshape(-1, array.width)

    def close(self) -> None:
        self._file.close()
        if self._archive is not None:
            self._archive.close()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _NpzReader:
    def __init__(self, source: NpzSource) -> None:
        self._source = source
        self._stream: _Stream | None = None
        self._index = -1

    def read(self, start: int, stop: int) -> Steps:
        source, row = self._source, start
        actions = np.empty((stop - start, source.arrays[0].width), np.float32)
        with readable(source.name, "a .npz file"):
            while row < stop:
                index = int(np.searchsorted(source.first_rows, row, side="right")) - 1
                first = int(source.first_rows[index])
                end = min(stop, int(source.first_rows[index + 1]))
                if index != self._index or self._stream is None:
                    self.close()
                    self._stream, self._index = _Stream(source.path, source.arrays[index]), index
                actions[row - start : end - start] = as_float32(self._stream.read(row - first, end - first))
                row = end
        return source.table.steps(actions, start)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream, self._index = None, -1
