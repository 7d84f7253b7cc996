"""`.npz` and `.npy` files: arrays are read in slices, never whole, and never unpickled."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..bundle.arrays import AnyArray, Int64Array
from ..bundle.reading import regular_file
from .array_layouts import (
    TASK_NAMES,
    Described,
    are_comparable,
    array_tasks,
    check_actions,
    choose_arrays,
    episode_table,
)
from .errors import SourceError
from .source_base import EpisodeTable, Source, StepReader, Steps, as_float32, is_hidden, opened, readable

_ARRAYS, _NPZ, _NPY = "a file of arrays", "a .npz file", "a .npy file"
_SLICE_STEPS = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True, eq=False)
class StoredArray:
    """An array in the file: `begins` is where its numbers start, in the member if compressed, else in the file.

    held: all of it, of a file that cannot be read in slices.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    member: str = ""
    begins: int = 0
    is_compressed: bool = False
    is_fortran: bool = False
    held: AnyArray | None = None


class _ArrayReader(StepReader):
    _source: ArraySource

    def _open(self, index: int) -> _Stream:
        return _Stream(self._source.path, self._source.arrays[index])

    def _read(self, piece: int, start: int, stop: int) -> Steps:
        first = int(self._source.first_rows[piece])
        return self._source.table.steps(as_float32(self._at(piece).read(start - first, stop - first)), start)


@dataclass(frozen=True, eq=False, kw_only=True)
class ArraySource(Source):
    """arrays: one after the other they are the steps; members: all that is read; episode_tasks: one for each."""

    kind = _ARRAYS
    reader = _ArrayReader
    arrays: tuple[StoredArray, ...]
    members: tuple[str, ...]
    table: EpisodeTable
    episode_tasks: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.root / self.files[0].name

    def check(self) -> None:
        """Compare the checksums of the archive; reading slices does not."""
        if self.path.suffix.lower() != ".npz":
            return
        with opened(self.path, _NPZ, name=self.name) as file, zipfile.ZipFile(file) as archive:
            for name in self.members:
                with archive.open(name) as member:
                    while member.read(1 << 20):
                        pass

    def episode_names(self, episodes: Int64Array) -> list[str]:
        if len(self.arrays) > 1:
            return [self.arrays[number].name for number in episodes.tolist()]
        return super().episode_names(episodes)

    def tasks(self, episodes: EpisodeTable) -> list[str]:
        del episodes
        return list(self.episode_tasks)


def open_npz(path: Path, key: str | None) -> ArraySource:
    """Episodes in one array or in many, found by runtime/datasets/array_layouts.py."""
    arrays = _arrays(path, key)
    chosen = choose_arrays(arrays, key, path.name, lambda one, other: _are_equal(path, arrays[one], arrays[other]))
    for name in chosen:
        if arrays[name].is_fortran and len(arrays[name].shape) > 2:
            raise SourceError(
                f"{path.name}: {name!r} is stored column by column; save np.ascontiguousarray of it, to be read in "
                "slices"
            )
    return array_source(path, arrays, chosen)


def array_source(path: Path, arrays: Mapping[str, StoredArray], chosen: Sequence[str]) -> ArraySource:
    """chosen: the arrays of actions, by their names. Raises SourceError where they are none, or where others that say
    where episodes end do not fit them."""

    def read(name: str) -> Iterator[AnyArray]:
        return _slices(path, arrays[name])

    check_actions(arrays, chosen, path.name)
    table, stated = episode_table(arrays, chosen, path.name, read)
    return ArraySource.from_pieces(
        path,
        [path],
        [(_rows(arrays[name]), arrays[name].shape[-1], f"{path.name}, {name!r}") for name in chosen],
        arrays=tuple(arrays[name] for name in chosen),
        members=tuple(array.member for name, array in arrays.items() if name in (*chosen, *stated, *TASK_NAMES)),
        table=table,
        has_borders=bool(stated),
        episode_tasks=tuple(array_tasks(arrays, len(table.numbers), path.name, read)),
    )


def _rows(array: Described) -> int:
    """The number of steps, or of numbers in an array of one dimension."""
    return math.prod(array.shape[:-1]) if len(array.shape) > 1 else array.shape[0]


def _arrays(path: Path, key: str | None) -> dict[str, StoredArray]:
    """What a .npz or .npy file holds, by name; an array of a .npy file has none and is called `actions`.

    Nothing but headers is read. Raises SourceError.
    """
    if path.suffix.lower() == ".npz":
        return _archived(path)
    if key is not None:
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
    """Read an array's header. Raises SourceError where the array is cut off."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if any(size is True or size is False or size < 0 for size in shape):
        raise SourceError(f"{name!r} has the shape {list(shape)}; expected sizes of 0 or more: save it anew")
    begins = file.tell()
    expected = begins + math.prod(shape) * dtype.itemsize
    if size != expected and not dtype.hasobject:
        raise SourceError(f"{name!r} has {size} bytes; expected {expected} for its shape {list(shape)}: copy it again")
    return StoredArray(name, shape, dtype, member, begins, is_compressed, is_fortran)


def _are_equal(path: Path, one: StoredArray, other: StoredArray) -> bool:
    if not are_comparable(one, other):
        return False
    pairs = zip(_slices(path, one), _slices(path, other), strict=True)
    return all(mine.tobytes() == theirs.tobytes() for mine, theirs in pairs)


def _slices(path: Path, array: StoredArray) -> Iterator[AnyArray]:
    """All rows, in slices."""
    rows = _rows(array)
    with readable(path.name, _ARRAYS), closing(_Stream(path, array)) as stream:
        for start in range(0, max(rows, 1), _SLICE_STEPS):
            yield stream.read(start, min(start + _SLICE_STEPS, rows))


# Reading --------------------------------------------------------------------------------------------------------------


class _Stream:
    """The rows of one array. Reading on is cheap; going back in a compressed one reads it again from its beginning."""

    def __init__(self, path: Path, array: StoredArray) -> None:
        self._array = array
        with ExitStack() as stack:
            self._file: IO[bytes] = io.BytesIO()
            if array.held is None:
                self._file = stack.enter_context(regular_file(path))[0]
            if array.is_compressed:
                self._file = stack.enter_context(stack.enter_context(zipfile.ZipFile(self._file)).open(array.member))
            self._stack = stack.pop_all()

    def read(self, start: int, stop: int) -> AnyArray:
        """Rows [n, width], or [n] of an array of one dimension."""
        array = self._array
        if array.held is not None:
            return array.held.reshape(-1, *array.shape[1:][-1:])[start:stop]
        if len(array.shape) == 1:
            return self._numbers(start, stop - start)
        width = array.shape[-1]
        if array.is_fortran:
            columns = (self._numbers(column * array.shape[0] + start, stop - start) for column in range(width))
            return np.stack([*columns], axis=1)
        return self._numbers(start * width, (stop - start) * width).reshape(-1, width)

    def _numbers(self, place: int, count: int) -> AnyArray:
        array = self._array
        self._file.seek(array.begins + place * array.dtype.itemsize)
        content = self._file.read(count * array.dtype.itemsize)
        if len(content) != count * array.dtype.itemsize:
            raise EOFError(f"{array.name!r} ends early")
        return np.frombuffer(content, array.dtype)

    def close(self) -> None:
        self._stack.close()
