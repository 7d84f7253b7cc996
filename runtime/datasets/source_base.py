"""What all sources have in common: steps and their episodes, files, and a reader that opens one piece at a time."""

from __future__ import annotations

import errno
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np

from ..bundle.advice import install
from ..bundle.arrays import AnyArray, Float32Array, Int64Array
from ..bundle.paths import LINKS_IN_A_CIRCLE
from ..bundle.reading import UnfitFileError, regular_file
from .errors import DatasetError, SourceError, reason


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when a job began. Another size or time of writing means that it has changed.

    stamp: device, inode and the time of the last change of any kind, which nothing can set back. It changes also where
    the file was only moved, copied or linked: the steps have to be compared then.
    """

    name: str
    size: int
    mtime_ns: int
    stamp: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Steps:
    """n rows. values: actions float32 [n, A], or what else a row holds (`rows.py`); episode and frame: int64 [n]."""

    values: AnyArray
    episode: Int64Array
    frame: Int64Array

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def joined(cls, parts: Sequence[Steps]) -> Steps:
        """One after the other; a single part is not copied."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.episode for part in parts]),
            np.concatenate([part.frame for part in parts]),
        )


@dataclass(frozen=True, eq=False)
class EpisodeTable:
    """Episodes that follow one another: starts int64 [E + 1], the last is the number of steps; numbers int64 [E]."""

    starts: Int64Array
    numbers: Int64Array

    @classmethod
    def of_lengths(cls, lengths: AnyArray, numbers: Int64Array) -> Self:
        """lengths: how many steps each episode has, [E]."""
        return cls(lengths_to_starts(lengths), numbers)

    def steps(self, values: AnyArray, start: int) -> Steps:
        """`values` of the rows from `start` on, with their episodes and frames."""
        episode, frame = self.places(start, start + len(values))
        return Steps(values, self.numbers[episode], frame)

    def places(self, start: int, stop: int) -> tuple[Int64Array, Int64Array]:
        """Of rows start ... stop - 1: the place of the episode among all, and of the row within it."""
        rows = np.arange(start, stop, dtype=np.int64)
        episode = np.searchsorted(self.starts, rows, side="right") - 1
        return episode, rows - self.starts[episode]

    @property
    def lengths(self) -> Int64Array:
        """[E]"""
        return np.diff(self.starts)


def lengths_to_starts(lengths: AnyArray) -> Int64Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def shown_name(path: Path) -> str:
    """The name as UTF-8 text; other bytes are escaped."""
    return path.name.encode("utf-8", "backslashreplace").decode()


def source_file(path: Path, root: Path) -> SourceFile:
    status = path.stat()
    stamp = (status.st_dev, status.st_ino, status.st_ctime_ns)
    return SourceFile(path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns, stamp)


def has_changed(file: SourceFile) -> SourceError:
    return SourceError(
        f"{file.name} has changed while it was read; expected the same to the end: run the command again when nothing "
        "writes to it"
    )


def unreadable(name: str, error: OSError) -> SourceError:
    why = LINKS_IN_A_CIRCLE if error.errno == errno.ELOOP else f"{error}; check its permissions"
    return SourceError(f"{name} cannot be read: {why}")


_HIDDEN = ("Thumbs.db", "desktop.ini", "__MACOSX")


def is_hidden(name: str) -> bool:
    """Whether systems or editors left this file, which is no data. name: its path in the dataset.

    `._x` and `.DS_Store` of macOS, `.ipynb_checkpoints`, `.nfs…`, `Thumbs.db` and the like.
    """
    return any((part.startswith(".") and part != ".") or part in _HIDDEN for part in name.split("/"))


def as_float32(values: AnyArray) -> Float32Array:
    """Floating-point numbers as float32. Those too large become infinite, and are refused later as illegal actions."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, np.float32)


def as_int64(values: AnyArray, label: str, least: int = 0) -> Int64Array:
    """Integers of any type as int64. Raises SourceError for those below `least`, and those that do not fit."""
    for found in (values.min(), values.max()) if values.size else ():
        if not least <= int(found) < 2**63:
            expected = "below 2**63" if found > 0 else f"of {least} or more"
            raise SourceError(f"{label} holds {found}; expected integers {expected}: number from 0")
    return values.astype(np.int64)


def natural(name: str) -> list[tuple[Decimal, str]]:
    """Sort key that puts demo_2 before demo_10, the same for demo_1 and demo_01.

    >>> sorted(["demo_10", "demo_2"], key=natural)
    ['demo_2', 'demo_10']
    """
    # An integer of more than 4300 digits would be refused.
    return [(Decimal(number or -1), text) for text, number in re.findall(r"(\D*)(\d*)", name)]


#: How one number can be written after a name, and one name before a suffix.
_WAYS = re.compile(r"(?<=[^\d_/])[_/](?=\d)|\.(hdf5|h5)$", re.IGNORECASE)


def in_order(names: Iterable[str], where: str) -> list[str]:
    """In natural order. Raises SourceError where one number is written in two ways, which leaves the order open."""
    ordered, found = sorted(names, key=natural), dict[Any, str]()
    for name in ordered:
        other = found.setdefault(tuple(natural(_WAYS.sub("", name))), name)
        if other != name:
            raise SourceError(
                f"{where} has {other!r} and {name!r}, which bear the same number or name; expected each once: remove "
                "or rename one of them"
            )
    return ordered


def require_stated(where: str, stated: Any, unit: str, holder: str, found: int) -> None:
    """Raises SourceError where a place states another number of steps or episodes than the holder has."""
    if stated not in (None, found):
        raise SourceError(
            f"{where} states {stated} {unit}, {holder} {found}; expected the same: some are missing, or were not "
            "finished; copy the dataset again"
        )


def visible_files(folder: Path, paths: Iterable[Path]) -> list[Path]:
    """Those of these paths in a folder that are data, in natural order. Raises SourceError as `in_order` does."""
    names = (path.relative_to(folder).as_posix() for path in paths)
    return [folder / name for name in in_order((name for name in names if not is_hidden(name)), folder.name)]


def optional(module: str, extra: str = "datasets") -> Any:
    """Import a package that only some files need. extra: of this project, which installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DatasetError(f"this needs {package}, which cannot be imported ({error}); {install(extra)}") from error


@contextmanager
def readable(name: str, kind: str) -> Iterator[None]:
    """Turn whatever a format's library raises on a damaged file into a SourceError."""
    try:
        yield
    except DatasetError:
        raise
    # Parsers raise nearly anything on damaged bytes: zlib.error, BadZipFile, ArrowInvalid, KeyError, MemoryError, ...
    except Exception as error:
        raise SourceError(
            f"{name} cannot be read as {kind} ({reason(error)}); expected an undamaged file: copy it again or save it "
            "anew"
        ) from error


@contextmanager
def opened(path: Path, kind: str, magic: bytes = b"", *, name: str = "") -> Iterator[BinaryIO]:
    """The one way to open a file of demonstrations: it must be a regular file that begins as its kind does.

    magic: its first bytes; name: for messages. Libraries that open a file by its name are called inside. Raises
    SourceError, also for whatever is raised inside.
    """
    name = name or path.name
    with readable(name, kind), ExitStack() as stack:
        try:
            file, _ = stack.enter_context(regular_file(path))
        except UnfitFileError as error:
            raise SourceError(f"{name} is no regular file; expected {kind}") from error
        except OSError as error:
            raise unreadable(name, error) from error
        start = file.read(max(32, len(magic)))
        if not start:
            raise SourceError(f"{name} is empty (0 bytes); expected {kind}: copy or download it again")
        if start.startswith(b"version https://git-lfs"):
            raise SourceError(f"{name} is a Git LFS pointer, not the data; fetch it with `git lfs pull`")
        # numpy takes unknown bytes for a pickle, and advises to allow it.
        if not start.startswith(magic):
            raise SourceError(
                f"{name} starts with {start[: len(magic)]!r} instead of {magic!r}: not {kind} but a damaged file, "
                "another format or a pickle, which could run code; save plain arrays"
            )
        file.seek(0)
        yield file


# Sources --------------------------------------------------------------------------------------------------------------

#: Steps, values of a step or 0 where nothing says it, and what to call it in messages.
Piece = tuple[int, int, str]


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """A dataset whose tables of contents were read. It can be pickled, and holds no step in memory.

    A piece is read by itself: an array, an episode, a file or a block. name: of the file or folder;
    root: where `files` lie; first_rows: int64 [pieces + 1], the row of the whole dataset with which each piece begins;
    width: values of a step, 0 where no step says it; has_borders: whether the files say where episodes end.
    """

    kind: ClassVar[str]
    reader: ClassVar[type[StepReader]]
    name: str
    root: Path
    files: tuple[SourceFile, ...]
    first_rows: Int64Array
    width: int
    has_borders: bool = True

    @classmethod
    def from_pieces(cls, path: Path, files: Iterable[Path], pieces: Iterable[Piece], **own: Any) -> Self:
        """The source at this path, a file or a folder. own: fields of the format. Raises SourceError."""
        root = path if path.is_dir() else path.parent
        rows, widths, places = zip(*pieces, strict=True)
        known = [(width, place) for width, place in zip(widths, places, strict=True) if width]
        for width, place in known:
            check_width(width, known[0][0], place, known[0][1])
        return cls(
            name=shown_name(path),
            root=root,
            files=tuple(source_file(file, root) for file in files),
            first_rows=lengths_to_starts(np.array(rows)),
            width=known[0][0] if known else 0,
            **own,
        )

    @property
    def num_steps(self) -> int:
        return int(self.first_rows[-1])

    @property
    def action_names(self) -> tuple[str, ...]:
        """Of all action dimensions, where the files name them; else empty."""
        return ()

    def open(self, width: int) -> StepReader:
        """A reader for one thread. Raises SourceError unless steps have `width` values."""
        if self.width not in (0, width):
            raise SourceError(
                f"{self.name} has {self.width} action dimensions; the bundle's model has {width}: give demonstrations "
                "of the robot that it was made for, or name another array with --key"
            )
        return self.reader(self)

    def check(self) -> None:
        """Compare checksums that reading slices does not. Raises SourceError."""

    def check_episodes(self, found: EpisodeTable) -> None:
        """Raises SourceError where the dataset states other episodes than its steps have."""

    def touched_file(self) -> SourceFile | None:
        """A file that may have changed, which only its steps can tell; None where no file was touched.

        Raises SourceError where a file is certainly not the one that was opened.
        """
        touched = None
        for file in self.files:
            try:
                found = source_file(self.root / file.name, self.root)
            except FileNotFoundError as error:
                raise has_changed(file) from error
            if (found.size, found.mtime_ns) != (file.size, file.mtime_ns):
                raise has_changed(file)
            if found.stamp != file.stamp:
                touched = touched or file
        return touched

    def piece_of(self, row: int) -> int:
        return int(np.searchsorted(self.first_rows, row, side="right")) - 1

    def file_of(self, row: int) -> str:
        """The file of this step, for messages."""
        del row
        return self.name

    def episode_names(self, episodes: Int64Array) -> list[str]:
        return [f"episode_{number}" for number in episodes.tolist()]

    def tasks(self, episodes: EpisodeTable) -> list[str]:
        """The task of each episode, "" where nothing says it. episodes: all of the dataset."""
        return [""] * len(episodes.numbers)


class StepReader(ABC):
    """Reads slices, for one thread. It keeps one file open: slices in ascending order are read fastest."""

    _source: Any

    def __init__(self, source: Source) -> None:
        self._source = source
        self._opened: Any = None
        self._index = -1

    def read(self, start: int, stop: int) -> Steps:
        """Rows start … stop - 1 of the whole dataset. Raises SourceError or TokenDatasetError."""
        source, parts = self._source, []
        while start < stop:
            piece = source.piece_of(start)
            with readable(source.file_of(start), source.kind):
                parts.append(self._read(piece, start, min(stop, int(source.first_rows[piece + 1]))))
            start += len(parts[-1])
        return Steps.joined(parts)

    def slices(self, start: int, stop: int, size: int) -> Iterator[tuple[int, Steps]]:
        """The same rows in slices of `size`: the first row of each slice, and the slice."""
        for row in range(start, stop, size):
            yield row, self.read(row, min(row + size, stop))

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened, self._index = None, -1

    def _at(self, index: int) -> Any:
        """What `_open` gives for this index. What was open before is closed."""
        if index != self._index:
            self.close()
            self._opened, self._index = self._open(index), index
        return self._opened

    @abstractmethod
    def _open(self, index: int) -> Any: ...

    @abstractmethod
    def _read(self, piece: int, start: int, stop: int) -> Steps:
        """Rows start … stop - 1 of the whole dataset, all in this piece, or only the first of them, at least one."""


def check_width(found: int, expected: int, place: str, other: str) -> None:
    """other: the place that has `expected` dimensions. Raises SourceError."""
    if found != expected:
        raise SourceError(
            f"{place} has {found} action dimensions, but {other} has {expected}; expected the same everywhere: keep "
            "one robot's actions per dataset, or name another array with --key"
        )
