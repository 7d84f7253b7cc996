"""LeRobot v2 and v3: Parquet files of steps, one episode each or many, and what meta/ says of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.paths import shortlist
from ..bundle.reading import read_file
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
    natural,
    opened,
    optional,
    readable,
    shown_name,
    source_file,
)

#: meta/info.json takes a few KB.
_META_SIZE_LIMIT = 2**26
PARQUET_KIND, PARQUET_MAGIC = "a Parquet file", b"PAR1"
_NUMBERING = ("episode_index", "frame_index")
_VERSIONS = ("v2.", "v3.")
_BATCH_STEPS = 65_536
#: Columns are read through a buffer of so many bytes, so that a row group of any size needs no more memory.
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class ParquetSource:
    """first_rows: int64 [files + 1], the row of the whole dataset with which each file begins."""

    name: str
    root: Path
    key: str
    paths: tuple[Path, ...]
    files: tuple[SourceFile, ...]
    first_rows: Int64Array
    stated_episodes: EpisodeTable | None

    @property
    def num_steps(self) -> int:
        return int(self.first_rows[-1])

    def open(self, width: int) -> _ParquetReader:
        return _ParquetReader(self, width)

    def check(self) -> None:
        """Nothing to do: every page is decoded, and held against its sum where it has one, on the way."""

    def file_of(self, row: int) -> str:
        return self.files[int(np.searchsorted(self.first_rows, row, side="right")) - 1].name

    def episode_names(self, episodes: Int64Array) -> list[str]:
        return [f"episode_{number}" for number in episodes.tolist()]


def parquet_files(folder: Path, pattern: str = "data/*/*.parquet") -> list[Path]:
    names = (path.relative_to(folder).as_posix() for path in folder.glob(pattern))
    return [folder / name for name in sorted(names, key=natural) if not is_hidden(name)]


def open_parquet(path: Path, key: str | None) -> ParquetSource:
    """One .parquet file, or a LeRobot folder; the footers are read, and held against meta/."""
    key = key or "action"
    is_folder = path.is_dir()
    paths = parquet_files(path) if is_folder else [path]
    rows = [_rows(file, key) for file in paths]
    first_rows = lengths_to_starts(np.array(rows))
    stated = stated_episodes(path / "meta", int(first_rows[-1])) if is_folder else None
    root = path if is_folder else path.parent
    files = tuple(source_file(file, root) for file in paths)
    return ParquetSource(shown_name(path), root, key, tuple(paths), files, first_rows, stated)


def _rows(path: Path, key: str) -> int:
    parquet = optional("pyarrow.parquet")
    with opened(path, PARQUET_KIND, PARQUET_MAGIC), parquet.ParquetFile(path) as file:
        return check_columns(file, path.name, key, needed=_NUMBERING)


def check_columns(file: Any, name: str, key: str, *, needed: Sequence[str]) -> int:
    """The number of steps of an open Parquet file. needed: the columns that it must have beside the actions, `key`.

    Raises SourceError.
    """
    arrow_types = optional("pyarrow.types")
    # Not metadata.schema: it and the metadata hold each other, and those of large files would fill the memory.
    schema, rows = file.schema_arrow, file.metadata.num_rows
    for column in (key, *needed):
        if schema.get_field_index(column) < 0:
            raise SourceError(
                f"{name} has no column {column!r}; found {shortlist(schema.names)}; expected LeRobot columns: "
                "name the action column with --key (key=)"
            )
    kind = schema.field(key).type
    if not arrow_types.is_floating(getattr(kind, "value_type", kind)):
        raise SourceError(
            f"{name}: column {key!r} is {kind}; expected lists of floating-point numbers: convert them if these are "
            "actions, or name another column with --key (key=)"
        )
    for column in _NUMBERING:
        if column in schema.names and not arrow_types.is_integer(schema.field(column).type):
            raise SourceError(f"{name}: column {column!r} is {schema.field(column).type}; expected integers")
    if not rows:
        raise SourceError(f"{name} has no rows; expected at least one step: remove the file")
    return int(rows)


def as_integers(column: Any, label: str, name: str) -> Int64Array:
    """A column of integers, all there. Raises SourceError."""
    if column.null_count:
        raise SourceError(f"{name}: column {label!r} has a missing value; expected an integer in every row")
    return as_int64(column.to_numpy(zero_copy_only=False), f"{name}: column {label!r}")


# meta/ ----------------------------------------------------------------------------------------------------------------


def stated_episodes(meta: Path, found_steps: int) -> EpisodeTable | None:
    """All episodes by meta/episodes*; raises SourceError where meta/ contradicts the files."""
    info = meta / "info.json"
    stated: dict[str, Any] = {}
    if info.exists():
        with readable(info.name, "JSON"):
            stated = json.loads(read_file(info, _META_SIZE_LIMIT))
            version = str(stated.get("codebase_version", "v2."))
        if not version.startswith(_VERSIONS):
            raise SourceError(
                f"meta/info.json states the layout {version}; expected v2 or v3: convert the dataset with LeRobot"
            )
    episodes = _listed(meta)
    counts = {
        "meta/info.json (total_frames)": stated.get("total_frames"),
        "meta/episodes": None if episodes is None else int(episodes.starts[-1]),
    }
    for where, count in counts.items():
        if count is not None and count != found_steps:
            raise SourceError(
                f"{where} states {count} steps, the files in data/ have {found_steps}; expected the same: files are "
                "missing, or were not finished; copy the dataset again"
            )
    if episodes is not None and stated.get("total_episodes", len(episodes.numbers)) != len(episodes.numbers):
        raise SourceError(
            f"meta/info.json states {stated['total_episodes']} episodes, meta/episodes lists {len(episodes.numbers)}; "
            "expected the same: copy the dataset again"
        )
    return episodes


def _listed(meta: Path) -> EpisodeTable | None:
    listed = meta / "episodes.jsonl"
    numbers: list[int] = []
    lengths: list[int] = []
    if listed.exists():
        with opened(listed, "JSON lines") as lines:
            for line in lines:
                if line.strip():
                    entry = json.loads(line)
                    numbers.append(int(entry["episode_index"]))
                    lengths.append(int(entry["length"]))
    else:
        parquet = None
        for path in parquet_files(meta, "episodes/*/*.parquet"):
            parquet = parquet or optional("pyarrow.parquet")
            with opened(path, PARQUET_KIND, PARQUET_MAGIC), parquet.ParquetFile(path) as file:
                table = file.read(columns=["episode_index", "length"])
                numbers += table.column("episode_index").to_pylist()
                lengths += table.column("length").to_pylist()
    if not numbers:
        return None
    with readable("meta/episodes", "integers"):
        listed_numbers, listed_lengths = np.array(numbers, np.int64), np.array(lengths, np.int64)
    order = np.argsort(listed_numbers, kind="stable")
    return EpisodeTable(lengths_to_starts(listed_lengths[order]), listed_numbers[order])


# Reading --------------------------------------------------------------------------------------------------------------


class _ParquetReader:
    def __init__(self, source: ParquetSource, width: int) -> None:
        self._source, self._width = source, width
        self._parquet = optional("pyarrow.parquet")
        self._file: Any = None
        self._file_index = -1
        self._group_ends: Int64Array = np.empty(0, np.int64)
        self._batches: Iterator[Any] = iter(())
        self._rest: Any = None
        self._row = -1

    def read(self, start: int, stop: int) -> Steps:
        parts: list[Steps] = []
        while start < stop:
            index = int(np.searchsorted(self._source.first_rows, start, side="right")) - 1
            with readable(self._source.files[index].name, PARQUET_KIND):
                self._seek(index, start)
                batch = self._take(min(stop, int(self._source.first_rows[index + 1])) - start)
                parts.append(self._steps(batch, self._source.files[index].name))
            start += len(parts[-1])
        return Steps.joined(parts)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file, self._file_index, self._rest, self._batches = None, -1, None, iter(())

    def _seek(self, index: int, row: int) -> None:
        """Make `row`, in file `index`, the next one; a row group is decoded from its beginning."""
        if index != self._file_index:
            self.close()
            # Not mapped: mapped pages would count as memory of this process.
            with opened(self._source.paths[index], PARQUET_KIND, PARQUET_MAGIC, name=self._source.files[index].name):
                self._file = self._parquet.ParquetFile(
                    self._source.paths[index],
                    buffer_size=_BUFFER_BYTES,
                    pre_buffer=False,
                    memory_map=False,
                    page_checksum_verification=True,
                )
            self._file_index = index
            groups = self._file.metadata
            rows = [groups.row_group(group).num_rows for group in range(groups.num_row_groups)]
            self._group_ends = int(self._source.first_rows[index]) + np.cumsum(rows, dtype=np.int64)
            self._row = -1
            if self._group_ends[-1] != self._source.first_rows[index + 1]:
                raise SourceError(f"{self._source.files[index].name} has changed since the job began; start it again")
        if row == self._row:
            return
        group, here = (int(np.searchsorted(self._group_ends, at, side="right")) for at in (row, self._row))
        if row < self._row or group != here or self._row < 0:
            groups = range(group, len(self._group_ends))
            columns = [self._source.key, *_NUMBERING]
            self._batches = self._file.iter_batches(_BATCH_STEPS, groups, columns, use_threads=False)
            self._rest = None
            self._row = int(self._group_ends[group - 1]) if group else int(self._source.first_rows[index])
        while self._row < row:
            self._take(row - self._row)

    def _take(self, at_most: int) -> Any:
        if self._rest is None or not len(self._rest):
            self._rest = next(self._batches)
        taken, self._rest = self._rest.slice(0, at_most), self._rest.slice(at_most)
        self._row += len(taken)
        return taken

    def _steps(self, batch: Any, name: str) -> Steps:
        actions, episode, frame = (batch.column(column) for column in (self._source.key, *_NUMBERING))
        numbers = [as_integers(column, label, name) for column, label in zip((episode, frame), _NUMBERING, strict=True)]
        return Steps(self._values(actions, numbers, name), *numbers)

    def _values(self, column: Any, numbers: Sequence[Int64Array], name: str) -> AnyArray:
        if column.null_count:
            self._refuse_missing(int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0]), numbers, name)
        # LeRobot writes a one-dimensional action as a plain number.
        if not hasattr(column.type, "value_type"):
            check_width(1, self._width, name)
            return as_float32(column.to_numpy(zero_copy_only=False)).reshape(-1, 1)
        values = column.flatten()
        if hasattr(column.type, "list_size"):
            check_width(column.type.list_size, self._width, name)
        else:
            lengths = optional("pyarrow.compute").list_value_length(column).to_numpy()
            wrong = np.flatnonzero(lengths != self._width)
            if wrong.size:
                row = int(wrong[0])
                where = f"{name}, episode {numbers[0][row]}, step {numbers[1][row]}"
                check_width(int(lengths[row]), self._width, where)
        if values.null_count:
            first = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            self._refuse_missing(first // self._width, numbers, name)
        return as_float32(values.to_numpy(zero_copy_only=False)).reshape(-1, self._width)

    def _refuse_missing(self, row: int, numbers: Sequence[Int64Array], name: str) -> None:
        raise SourceError(
            f"{name}, episode {numbers[0][row]}, step {numbers[1][row]}: column {self._source.key!r} has a missing "
            "value; expected an action in every row: repair or drop this episode"
        )
