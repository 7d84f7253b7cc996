"""Steps and their episodes, and what the readers of all formats share."""

from __future__ import annotations

import errno
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..bundle.advice import install
from ..bundle.paths import LINKS_IN_A_CIRCLE
from ..bundle.reading import UnfitFileError, regular_file
from .errors import DatasetError, SourceError, reason

Int64Array = npt.NDArray[np.int64]
AnyArray = npt.NDArray[Any]


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
    """n steps. values: actions float32 [n, A] or tokens uint8 [n, D*L]; episode and frame: int64 [n]."""

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

    def steps(self, values: AnyArray, start: int) -> Steps:
        """`values` of the rows from `start` on, with their episodes and frames."""
        rows = np.arange(start, start + len(values), dtype=np.int64)
        place = np.searchsorted(self.starts, rows, side="right") - 1
        return Steps(values, self.numbers[place], rows - self.starts[place])


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


def as_float32(values: AnyArray) -> npt.NDArray[np.float32]:
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


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts demo_2 before demo_10, the same for demo_1 and demo_01.

    >>> sorted(["demo_10", "demo_2"], key=natural)
    ['demo_2', 'demo_10']
    """
    return [(int(number or -1), text) for text, number in re.findall(r"(\D*)(\d*)", name)]


def in_order(names: Iterable[str], where: str) -> list[str]:
    """In natural order. Raises SourceError where one number is written in two ways, which leaves the order open."""
    ordered = sorted(names, key=natural)
    for one, other in pairwise(ordered):
        if natural(one) == natural(other):
            raise SourceError(
                f"{where} has {one!r} and {other!r}, which bear the same number; expected each number once: remove or "
                "rename one of them"
            )
    return ordered


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
