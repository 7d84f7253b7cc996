"""What all datasets have in common here: a long row of steps, each of one episode, read slice by slice."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.dataset_errors import DatasetError, SourceError

Int64Array = npt.NDArray[np.int64]
AnyArray = npt.NDArray[Any]


@dataclass(frozen=True)
class SourceFile:
    """As it was when a job began: another size or time means that it has changed."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, eq=False)
class Steps:
    """values: actions float32 [n, A] or tokens uint8 [n, D*L]; episode and frame: int64 [n]."""

    values: AnyArray
    episode: Int64Array
    frame: Int64Array

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def joined(cls, parts: Sequence[Steps]) -> Steps:
        """One after the other; a single one as it is."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.episode for part in parts]),
            np.concatenate([part.frame for part in parts]),
        )


class StepReader(Protocol):
    """One reader for each thread. It remembers where it is: slices in ascending order are the cheap ones."""

    def read(self, start: int, stop: int) -> Steps:
        """Rows start ... stop - 1 of the whole dataset. Raises SourceError or TokenDatasetError."""

    def close(self) -> None: ...


class Source(Protocol):
    """A dataset that was found whole by its tables of contents; can be pickled, and holds no step in memory."""

    @property
    def name(self) -> str:
        """The file's or folder's name."""

    @property
    def num_steps(self) -> int: ...

    @property
    def root(self) -> Path:
        """Where `files` lie."""

    @property
    def files(self) -> tuple[SourceFile, ...]: ...

    @property
    def stated_episodes(self) -> EpisodeTable | None:
        """All episodes in order, where the dataset says so beside its steps."""

    def open(self, width: int) -> StepReader:
        """A reader that refuses values of another width."""

    def check(self) -> None:
        """Read through what only a whole pass can show to be damaged."""

    def file_of(self, row: int) -> str:
        """Where this step lies, for messages."""

    def episode_names(self, episodes: Int64Array) -> list[str]: ...


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


def source_file(path: Path, root: Path) -> SourceFile:
    status = path.stat()
    return SourceFile(path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)


def check_unchanged(source: Source) -> None:
    """Raises SourceError where a file is not the one that was opened."""
    for file in source.files:
        path = source.root / file.name
        if not path.exists() or source_file(path, source.root) != file:
            raise SourceError(
                f"{file.name} has changed while it was read; expected the same size and time to the end: run the "
                "command again with --restart when nothing writes to it"
            )


def as_float32(values: AnyArray) -> npt.NDArray[np.float32]:
    """Other floating-point numbers are rounded; those too large become infinite and are refused with the illegal."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, np.float32)


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts demo_2 before demo_10."""
    return [(int(number or 0), text) for text, number in re.findall(r"(\D*)(\d*)", name)]


def optional(module: str) -> Any:
    """Import a package that only datasets need."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DatasetError(
            f"this needs {package}, which cannot be imported ({error}); pip install '.[datasets]'"
        ) from error


@contextmanager
def readable(name: str, kind: str) -> Iterator[None]:
    """Turn whatever a format's library raises on a damaged file into a SourceError."""
    try:
        yield
    except DatasetError:
        raise
    # Parsers raise nearly anything on damaged bytes: zlib.error, BadZipFile, ArrowInvalid, KeyError, MemoryError, ...
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise SourceError(
            f"{name} cannot be read as {kind} ({type(error).__name__}: {reason}); expected an undamaged file: copy it "
            "again or save it anew"
        ) from error


def check_start(path: Path, kind: str, magic: bytes) -> None:
    """Refuse what is clearly something else, before a parser guesses."""
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise SourceError(f"{path.name} is empty (0 bytes); expected {kind}: copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise SourceError(f"{path.name} is a Git LFS pointer, not the data; fetch it with `git lfs pull`")
    if not start.startswith(magic):
        raise SourceError(
            f"{path.name} starts with {start[: len(magic)]!r} instead of {magic!r}: not {kind} but a damaged file or "
            "another format; save plain arrays"
        )


def check_width(found: int, expected: int, name: str) -> None:
    if found != expected:
        raise SourceError(
            f"{name} has {found} action dimensions; the bundle's model has {expected}: give demonstrations of the "
            "robot that it was made for, or name another array with --key"
        )
