"""`.npz` and `.npy`: arrays read in slices where they lie in the file, never whole and never unpickled."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from ..bundle.reading import regular_file
from .array_layouts import (
    NUMBERS_NAME,
    are_comparable,
    begins_of_episodes,
    check_actions,
    choose_arrays,
    require_agreement,
    require_integers,
    stated_starts,
)
from .errors import SourceError
from .steps import (
    AnyArray,
    EpisodeTable,
    Int64Array,
    SourceFile,
    Steps,
    as_float32,
    as_int64,
    check_width,
    is_hidden,
    lengths_to_starts,
    opened,
    readable,
    shown_name,
    source_file,
)

_NPZ, _NPY = "a .npz file", "a .npy file"
_SLICE_STEPS = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True, eq=False)
class StoredArray:
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
    arrays: tuple[StoredArray, ...]
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
        with opened(self.path, _NPZ, name=self.name) as file, zipfile.ZipFile(file) as archive:
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
    """Episodes of one array or of many, as runtime/datasets/array_layouts.py finds them."""
    arrays = npz_arrays(path, key)
    chosen = choose_arrays(arrays, key, path.name, lambda one, other: _are_equal(path, arrays[one], arrays[other]))
    check_actions(arrays, chosen, path.name)
    for name in chosen:
        if arrays[name].is_fortran:
            raise SourceError(
                f"{path.name}: {name!r} is stored column by column; save np.ascontiguousarray of it, to be read in "
                "slices"
            )
    first_rows = lengths_to_starts(np.array([arrays[name].rows for name in chosen]))
    stated = stated_starts(arrays, chosen, path.name, lambda name: np.concatenate([*_slices(path, arrays[name])]))
    numbers = _numbers(path, arrays, int(first_rows[-1]))
    if numbers is not None:
        stated[NUMBERS_NAME] = numbers.starts
    require_agreement(stated, path.name)
    starts = next(iter(stated.values()), first_rows)
    table = numbers if numbers is not None and len(chosen) == 1 else None
    table = table or EpisodeTable(starts, np.arange(len(starts) - 1, dtype=np.int64))
    members = tuple(array.member for name, array in arrays.items() if name in (*chosen, *stated))
    files = (source_file(path, path.parent),)
    return NpzSource(shown_name(path), path, files, tuple(arrays[name] for name in chosen), first_rows, members, table)


def npz_arrays(path: Path, key: str | None = None) -> dict[str, StoredArray]:
    """What a .npz or .npy file holds, by name; an array of a .npy file has none and is called `actions`.

    Nothing but headers is read. Raises SourceError.
    """
    if path.suffix.lower() == ".npz":
        return _archived(path)
    if key:
        raise SourceError(f"{path.name} holds one array without a name, so --key {key} cannot be found; leave key out")
    with opened(path, _NPY, b"\x93NUMPY") as file:
        array = _header(file, "actions", "", path.stat().st_size, is_compressed=False)
    return {"actions": array}


def _archived(path: Path) -> dict[str, StoredArray]:
    found: dict[str, StoredArray] = {}
    with opened(path, _NPZ, b"PK") as file, zipfile.ZipFile(file) as archive:
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
                array = replace(array, begins=data + array.begins, is_compressed=False)
            found[name] = array
    return found


def _header(file: IO[bytes], name: str, member: str, size: int, *, is_compressed: bool) -> StoredArray:
    """Raises SourceError for what is cut off."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    begins = file.tell()
    expected = begins + math.prod(shape) * dtype.itemsize
    if size != expected and not dtype.hasobject:
        raise SourceError(f"{name!r} has {size} bytes; expected {expected} for its shape {list(shape)}: copy it again")
    return StoredArray(name, member, shape, dtype, begins, is_compressed, is_fortran)


def _are_equal(path: Path, one: StoredArray, other: StoredArray) -> bool:
    if not are_comparable(one, other) or one.is_fortran != other.is_fortran:
        return False
    pairs = zip(_slices(path, one), _slices(path, other), strict=True)
    return all(mine.tobytes() == theirs.tobytes() for mine, theirs in pairs)


def _slices(path: Path, array: StoredArray) -> Iterator[AnyArray]:
    """All of it, in slices of which the last may be shorter."""
    with readable(path.name, _NPZ), _Stream(path, array) as stream:
        for start in range(0, max(array.rows, 1), _SLICE_STEPS):
            yield stream.read(start, min(start + _SLICE_STEPS, array.rows))


def _numbers(path: Path, arrays: Mapping[str, StoredArray], steps: int) -> EpisodeTable | None:
    """By one episode number for each step, where there are such, without holding them all."""
    numbers = arrays.get(NUMBERS_NAME)
    if numbers is None:
        return None
    require_integers(NUMBERS_NAME, numbers, path.name, steps)
    starts: list[Int64Array] = []
    found: list[Int64Array] = []
    before: Int64Array | None = None
    for index, values in enumerate(_slices(path, numbers)):
        row, part = index * _SLICE_STEPS, as_int64(values, f"{path.name}: {NUMBERS_NAME}")
        starts.append(begins_of_episodes(part, path.name, row, before))
        found.append(part[starts[-1] - row])
        before = part[-1:]
    return EpisodeTable(np.concatenate([*starts, np.array([steps])]), np.concatenate(found))


# Reading --------------------------------------------------------------------------------------------------------------


class _Stream:
    """One array's rows; forwards is cheap, backwards in a compressed one means to begin again."""

    def __init__(self, path: Path, array: StoredArray) -> None:
        self._array = array
        with ExitStack() as stack:
            file: IO[bytes] = stack.enter_context(regular_file(path))[0]
            if array.is_compressed:
                file = stack.enter_context(stack.enter_context(zipfile.ZipFile(file)).open(array.member))
            self._file, self._stack = file, stack.pop_all()

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
        self._stack.close()

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
        with readable(source.name, _NPZ):
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
