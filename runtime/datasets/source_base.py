"""What all sources have in common: pieces that follow one another, and a reader that opens one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from .errors import SourceError
from .steps import (
    EpisodeTable,
    Int64Array,
    SourceFile,
    Steps,
    has_changed,
    lengths_to_starts,
    readable,
    shown_name,
    source_file,
)

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
        return cls(
            name=shown_name(path),
            root=root,
            files=tuple(source_file(file, root) for file in files),
            first_rows=lengths_to_starts(np.array(rows)),
            width=_common_width(widths, places),
            **own,
        )

    @property
    def num_steps(self) -> int:
        return int(self.first_rows[-1])

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


def _common_width(widths: Sequence[int], places: Sequence[str]) -> int:
    """The action dimensions of all places, 0 where unknown. Raises SourceError where they differ."""
    known = [(width, place) for width, place in zip(widths, places, strict=True) if width]
    for width, place in known:
        check_width(width, known[0][0], place, known[0][1])
    return known[0][0] if known else 0


def check_width(found: int, expected: int, place: str, other: str) -> None:
    """other: the place that has `expected` dimensions. Raises SourceError."""
    if found != expected:
        raise SourceError(
            f"{place} has {found} action dimensions, but {other} has {expected}; expected the same everywhere: keep "
            "one robot's actions per dataset, or name another array with --key"
        )
