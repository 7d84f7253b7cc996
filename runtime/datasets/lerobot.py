"""LeRobot v2 and v3: Parquet files of steps, one episode each or many, and what meta/ says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..bundle.arrays import AnyArray, Int64Array
from ..bundle.paths import shortlist, shown
from ..bundle.reading import read_file
from .array_layouts import TASK_NAMES, require_equal, table_by_numbers, task_name
from .episodes import check_stated
from .errors import SourceError
from .format import INFO_NAME, read_info
from .source_base import (
    EpisodeTable,
    Source,
    StepReader,
    Steps,
    as_float32,
    as_int64,
    check_width,
    opened,
    optional,
    readable,
    require_stated,
    visible_files,
)

#: meta/info.json takes a few KB.
_META_SIZE_LIMIT = 2**26
_KIND, _MAGIC = "a Parquet file", b"PAR1"
_NUMBERING = ("episode_index", "frame_index")
_TASK = TASK_NAMES[0]
_INDEX = "__index_level_0__"
_VERSIONS = ("v2.", "v3.")
_FILES_HAVE = "the files in data/ have"
#: How many steps and episodes there are, by the names of the files that state it.
_TOTALS = {"meta/info.json": ("total_frames", "total_episodes"), INFO_NAME: ("num_steps", "num_episodes")}
_BATCH_STEPS = 65_536
#: Size of the buffer through which columns are read: a large row group then needs no more memory than a small one.
_BUFFER_BYTES = 1 << 20


class _Stated(NamedTuple):
    """What meta/ says. name: of the file that states num_episodes, any JSON; episodes: in order; tasks: texts by their
    numbers; action_names: of all dimensions, or empty."""

    name: str = ""
    episodes: EpisodeTable | None = None
    num_episodes: Any = None
    tasks: Mapping[int, str] = {}
    action_names: tuple[str, ...] = ()


class _ParquetReader(StepReader):
    _source: ParquetSource
    # All of the open file.
    _group_ends: Int64Array
    _batches: Iterator[Any]
    _batch: Any
    _begin: int

    def _open(self, index: int) -> Any:
        source = self._source
        name = source.files[index].name
        options = {"buffer_size": _BUFFER_BYTES, "pre_buffer": False, "page_checksum_verification": True}
        with opened(source.root / name, _KIND, _MAGIC, name=name):
            # Not mapped: mapped pages would count as memory of this process.
            file = optional("pyarrow.parquet").ParquetFile(source.root / name, memory_map=False, **options)
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._group_ends = int(source.first_rows[index]) + np.cumsum(rows, dtype=np.int64)
        self._batch = None
        if self._group_ends[-1] != source.first_rows[index + 1]:
            raise SourceError(f"{name} has changed since the job began; start it again")
        return file

    def _read(self, piece: int, start: int, stop: int) -> Steps:
        batch, name = self._batch_from(piece, start).slice(0, stop - start), self._source.files[piece].name
        column = batch.column(self._source.key)
        if self._source.table is None:
            numbers = (_as_integers(batch.column(label), label, name) for label in _NUMBERING)
            rows = Steps(column, *numbers)
        else:
            rows = self._source.table.steps(column, start)
        return Steps(self._values(column, rows, name), rows.episode, rows.frame)

    def _batch_from(self, index: int, row: int) -> Any:
        """At least one row of file `index`, from `row` on. A row group can only be read from its beginning."""
        file = self._at(index)
        group = int(np.searchsorted(self._group_ends, row, side="right"))
        group_begin = int(self._group_ends[group - 1] if group else self._source.first_rows[index])
        if self._batch is None or row < self._begin or self._begin + len(self._batch) < group_begin:
            columns = [self._source.key, *(_NUMBERING if self._source.table is None else ())]
            groups = range(group, len(self._group_ends))
            self._batches = file.iter_batches(_BATCH_STEPS, groups, columns, use_threads=False)
            self._batch, self._begin = next(self._batches), group_begin
        while row >= self._begin + len(self._batch):
            self._begin += len(self._batch)
            self._batch = next(self._batches)
        return self._batch.slice(row - self._begin)

    def _values(self, column: Any, rows: Steps, name: str) -> AnyArray:
        """Actions float32 [n, A]; rows: episodes and frames of the same rows, for messages. Raises SourceError."""
        key, width = self._source.key, self._source.width

        def place(row: int) -> str:
            return f"{name}, episode {rows.episode[row]}, step {rows.frame[row]}"

        def require_all(array: Any, per_row: int) -> None:
            if array.null_count:
                first = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
                raise SourceError(
                    f"{place(first // per_row)}: column {key!r} has a missing value; expected an action in every row: "
                    "repair or drop this episode"
                )

        require_all(column, 1)
        # LeRobot writes a one-dimensional action as a plain number.
        values = column.flatten() if hasattr(column.type, "value_type") else column
        if not hasattr(column.type, "list_size") and values is not column:
            lengths = optional("pyarrow.compute").list_value_length(column).to_numpy()
            for row in np.flatnonzero(lengths != width)[:1].tolist():
                check_width(int(lengths[row]), width, place(row), "another step")
        require_all(values, width)
        return as_float32(values.to_numpy(zero_copy_only=False)).reshape(len(column), -1)


@dataclass(frozen=True, eq=False, kw_only=True)
class ParquetSource(Source):
    """key: the column of actions; table: of the episodes where no column numbers the frames."""

    kind = _KIND
    reader = _ParquetReader
    key: str
    stated: _Stated
    table: EpisodeTable | None

    @property
    def action_names(self) -> tuple[str, ...]:
        return self.stated.action_names

    def check_episodes(self, found: EpisodeTable) -> None:
        if self.stated.episodes is not None:
            check_stated(self.name, self.stated.episodes, found)
        else:
            stated = self.stated
            require_stated(stated.name, stated.num_episodes, "episodes", _FILES_HAVE, len(found.numbers))

    def file_of(self, row: int) -> str:
        return self.files[self.piece_of(row)].name

    def tasks(self, episodes: EpisodeTable) -> list[str]:
        """By the task number in the first step of each episode."""
        numbers: list[int | None] = []
        starts = episodes.starts[:-1]
        by_file = np.split(starts, np.searchsorted(starts, self.first_rows[1:-1]))
        for file, first, rows in zip(self.files, self.first_rows[:-1], by_file, strict=True):
            with _opened(self.root / file.name, file.name) as content:
                if _TASK in content.schema_arrow.names:
                    numbers += content.read(columns=[_TASK]).column(0).take(rows - first).to_pylist()
                else:
                    numbers += [None] * len(rows)
        return ["" if number is None else task_name(self.stated.tasks, number) for number in numbers]


def parquet_files(folder: Path, pattern: str = "data/*/*.parquet") -> list[Path]:
    return visible_files(folder, folder.glob(pattern))


def open_parquet(path: Path, key: str | None) -> ParquetSource:
    """One .parquet file, or a LeRobot folder. The footers are read, and compared with meta/."""
    keys = ("action", "actions") if key is None else (key,)
    key = keys[0]
    paths = parquet_files(path) if path.is_dir() else [path]
    footers = [_footer(file, keys) for file in paths]
    if numbers_frames := any(_NUMBERING[1] in footer.columns for footer in footers):
        for file, footer in zip(paths, footers, strict=True):
            _require_column(file.name, footer.columns, _NUMBERING[1])
    width = max(footer.width for footer in footers) or _listed_width(paths[0], key)
    return ParquetSource.from_pieces(
        path,
        paths,
        [(footer.rows, footer.width or width, file.name) for file, footer in zip(paths, footers, strict=True)],
        key=key,
        stated=_read_meta(path, key, width, footers) if path.is_dir() else _Stated(),
        table=None if numbers_frames else table_by_numbers(_episode_numbers(paths), path.name),
    )


@contextmanager
def _opened(path: Path, name: str = "", **options: Any) -> Iterator[Any]:
    """name: for messages; options: of `ParquetFile`."""
    parquet = optional("pyarrow.parquet")
    with opened(path, _KIND, _MAGIC, name=name), parquet.ParquetFile(path, **options) as file:
        yield file


class _Footer(NamedTuple):
    """width: action dimensions, 0 where only the rows tell; dtype: of actions, as numpy names it."""

    rows: int
    width: int
    dtype: str
    columns: Sequence[str]


def _footer(path: Path, keys: Sequence[str]) -> _Footer:
    """Raises SourceError unless the file has steps, numbers of episodes, and actions in the first of these columns."""
    types, key = optional("pyarrow.types"), keys[0]
    with _opened(path) as file:
        # Not metadata.schema: it and the metadata hold each other, and those of large files would fill the memory.
        schema, rows, name = file.schema_arrow, file.metadata.num_rows, path.name
        for column in (key, _NUMBERING[0]):
            _require_column(name, schema.names, column)
        require_equal(keys, schema.names, name, lambda *both: _are_equal(file, both))
        kind = schema.field(key).type
        number = getattr(kind, "value_type", kind)
        if not types.is_floating(number):
            raise SourceError(
                f"{name}: column {key!r} is {kind}; expected lists of floating-point numbers: convert them if these "
                "are actions, or name another column with --key"
            )
        for column in (*_NUMBERING, _TASK):
            if column in schema.names and not types.is_integer(schema.field(column).type):
                raise SourceError(f"{name}: column {column!r} is {schema.field(column).type}; expected integers")
        if not rows:
            raise SourceError(f"{name} has no rows; expected at least one step: remove the file")
        width = getattr(kind, "list_size", 0 if hasattr(kind, "value_type") else 1)
        return _Footer(int(rows), int(width), np.dtype(number.to_pandas_dtype()).name, schema.names)


def _are_equal(file: Any, columns: Sequence[str]) -> bool:
    return all(batch.column(0).equals(batch.column(1)) for batch in file.iter_batches(_BATCH_STEPS, columns=[*columns]))


def _listed_width(path: Path, key: str) -> int:
    """Action dimensions of the first list, 0 where every one is missing. Raises SourceError for an empty one."""
    with _opened(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
        for batch in file.iter_batches(1024, columns=[key]):
            for values in batch.column(0).drop_null():
                if len(values):
                    return len(values)
                raise SourceError(
                    f"{path.name}: column {key!r} begins with an empty list; expected an action in every row: repair "
                    "or drop this episode"
                )
    return 0


def _require_column(name: str, columns: Sequence[str], wanted: str) -> None:
    if wanted not in columns:
        raise SourceError(
            f"{name} has no column {wanted!r}; found {shortlist(columns)}; expected LeRobot columns: name the action "
            "column with --key"
        )


def _episode_numbers(paths: Sequence[Path]) -> Iterator[Int64Array]:
    for path in paths:
        with _opened(path) as file:
            for batch in file.iter_batches(_BATCH_STEPS, columns=[_NUMBERING[0]]):
                yield _as_integers(batch.column(0), _NUMBERING[0], path.name)


def _as_integers(column: Any, label: str, name: str) -> Int64Array:
    """A column of integers. Raises SourceError where one is missing."""
    if column.null_count:
        raise SourceError(f"{name}: column {label!r} has a missing value; expected an integer in every row")
    return as_int64(column.to_numpy(zero_copy_only=False), f"{name}: column {label!r}")


# meta/ ----------------------------------------------------------------------------------------------------------------


def _read_meta(folder: Path, key: str, width: int, footers: Sequence[_Footer]) -> _Stated:
    """Raises SourceError where meta/ contradicts itself or the files."""
    meta, (name, stated) = folder / "meta", _info(folder)
    with readable(name, "JSON"):
        column = stated.get("features", {}).get(key, {})
        for footer in footers:
            found = {"dtype": footer.dtype, "shape": [width]}
            expected = {name: column.get(name, value) for name, value in found.items()}
            if found != expected:
                raise SourceError(
                    f"{name} states that {key!r} is {expected['dtype']} {expected['shape']}, the files in "
                    f"data/ have {footer.dtype} {[width]}; expected the same: copy the dataset again"
                )
    steps, total_episodes = _TOTALS[name]
    found_steps = sum(footer.rows for footer in footers)
    episodes = _listed(meta)
    counts = {
        f"{name} ({steps})": stated.get(steps),
        "meta/episodes": None if episodes is None else int(episodes.starts[-1]),
    }
    for where, count in counts.items():
        require_stated(where, count, "steps", _FILES_HAVE, found_steps)
    num_episodes = stated.get(total_episodes)
    if episodes is not None:
        require_stated(name, num_episodes, "episodes", "meta/episodes lists", len(episodes.numbers))
    tasks = dict(_rows(meta, "tasks", "tasks.parquet", task_index=index, task=str))
    return _Stated(name, episodes, num_episodes, tasks, _action_names(column.get("names"), width))


def _action_names(stated: Any, width: int) -> tuple[str, ...]:
    """A list, a list in a list, or lists below words such as `motors`. Names are for people: odd ones count as none."""
    groups = list(stated.values()) if isinstance(stated, dict) else stated
    if not isinstance(groups, list):
        return ()
    names = [name for group in groups for name in (group if isinstance(group, list) else [group])]
    is_whole = len(names) == width and all(isinstance(name, str) and name.strip() for name in names)
    return tuple(names) if is_whole else ()


def _info(folder: Path) -> tuple[str, dict[str, Any]]:
    """The file that describes the dataset, and its content; decoded actions have one of ours. Raises SourceError."""
    info = folder / "meta/info.json"
    if not info.exists():
        if (folder / INFO_NAME).exists():
            return INFO_NAME, vars(read_info(folder))
        raise SourceError(
            f"{folder.name} has no meta/info.json; expected all of a LeRobot folder, v2 or v3: copy the dataset again, "
            "or give one of its .parquet files alone"
        )
    with readable("meta/info.json", "JSON"):
        stated = json.loads(read_file(info, _META_SIZE_LIMIT))
    if not isinstance(stated, dict):
        raise SourceError(
            f"meta/info.json holds {shown(stated)}; expected an object with codebase_version and more: copy the "
            "dataset again"
        )
    version = stated.get("codebase_version")
    if not str(version).startswith(_VERSIONS):
        layout = "no codebase_version" if version is None else f"the layout {version}"
        raise SourceError(f"meta/info.json states {layout}; expected v2 or v3: convert the dataset with LeRobot")
    return "meta/info.json", stated


def _listed(meta: Path) -> EpisodeTable | None:
    rows = _rows(meta, "episodes", "episodes/*/*.parquet", episode_index=index, length=index)
    if not rows:
        return None
    with readable("meta/episodes", "integers"):
        numbers, lengths = np.array(rows, np.int64).T
    order = np.argsort(numbers, kind="stable")
    return EpisodeTable.of_lengths(lengths[order], numbers[order])


def _rows(meta: Path, name: str, pattern: str, **columns: Callable[[Any], Any]) -> list[tuple[Any, ...]]:
    """The values of these columns in each row of a table, of NAME.jsonl (v2) or of Parquet (v3). Raises SourceError."""
    if (lines := meta / f"{name}.jsonl").exists():
        with opened(lines, "JSON lines") as file:
            entries = [json.loads(line) for line in file if line.strip()]
            return [tuple(kind(entry[column]) for column, kind in columns.items()) for entry in entries]
    rows: list[tuple[Any, ...]] = []
    for path in parquet_files(meta, pattern):
        with _opened(path) as file:
            there = file.schema_arrow.names
            # LeRobot keeps the texts of tasks in the index of a table, which pandas writes so where it has no name.
            found = [_INDEX if column not in there and column == "task" else column for column in columns]
            if not set(found) <= set(there):
                raise SourceError(f"{path.name} has {shortlist(there)}; expected {' and '.join(columns)}")
            table = file.read(columns=found)
            values = (table.column(column).to_pylist() for column in found)
            rows += zip(*map(map, columns.values(), values), strict=True)
    return rows
