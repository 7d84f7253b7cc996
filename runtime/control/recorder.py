"""The flight recorder: a ring of the last ticks, written to .npz off the loop and read without pickle."""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.beliefs import mode_shape
from ..bundle.arrays import AnyArray, Float32Array, Int32Array
from ..bundle.models import ModelEntry
from ..bundle.paths import as_path, replacing
from ..bundle.reading import regular_file
from ..bundle.validation import token_types
from .beliefs import GivenBelief
from .config import Status
from .errors import FlightRecordError
from .result import NONE_YET, RUN_OUT, LoopState, TickOutcome

#: 2 has no beliefs, and is read as well.
SCHEMA, _BEFORE_BELIEFS = 3, 2
#: Tokens or stats of a tick: none came; they are in the record; they came but do not fit into it; of tokens alone: a
#: belief came in their place, which is too large to be kept: what it decoded to is, if it did.
ABSENT, KEPT, UNKEPT, BELIEVED = 0, 1, 2, 3
#: Flags of a tick. ACCEPTED: its chunk was. QUEUED: something may be served after it. BEGUN: a chunk has come since the
#: start. RESET: the row is no tick, but says where the robot was when the decoder was started or reset.
HELD, LATCHED, FELL_BACK, ACCEPTED, QUEUED, BEGUN, RESET = 1, 2, 4, 8, 16, 32, 64
#: The numbers of a row in their order, and their types in a file. From `given_sequence` on they describe the chunk that
#: came on this tick, accepted or refused.
COLUMNS = {
    "tick": np.int64,
    "time_ns": np.int64,
    "latency_ns": np.int64,
    "status": np.int8,
    "flags": np.int16,
    "backend": np.int8,
    "faults": np.int32,
    "sequence": np.int64,
    "observed_ns": np.int64,
    "service_layers": np.int16,
    "start": np.int64,
    "given_sequence": np.int64,
    "given_observed_ns": np.int64,
    "token_state": np.int8,
    "layers": np.int16,
    "stats_state": np.int8,
    "doubt": np.int32,
}
#: What a belief decoded to, by name; their rows are empty where the loop takes none.
BELIEF_ARRAYS = {"chunks": np.float32, "std": np.float32, "mode_probability": np.float32, "mode": np.int32}
#: The bytes that the arrays of a record may take: enough for a million ticks.
_SIZE_LIMIT = 2**32
#: What reading a damaged file raises, or one that is no record.
_DAMAGE = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, NotImplementedError, RuntimeError),
    *(struct.error, zipfile.BadZipFile, zlib.error, MemoryError),
)
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
_Array = np.ndarray


class FlightRecorder:
    """The loop writes; another thread may copy at any time, which leaves out rows that are overwritten meanwhile.

    Keeps a chunk's length more than `ticks`: to replay the first of them, those before have to fill the queue.
    """

    def __init__(self, ticks: int, model: ModelEntry, *, has_beliefs: bool = False) -> None:
        size = ticks + model.chunk_length + 1
        self._size = size
        # One call packs all numbers of a tick; assigning them one by one takes three times as long.
        self._numbers = np.zeros((size, len(COLUMNS)), np.int64)
        self._bytes, self._stride = self._numbers.data.cast("B"), 8 * len(COLUMNS)
        self._pack = struct.Struct(f"={len(COLUMNS)}q").pack_into
        # Made once, since indexing makes a new view each time.
        self._actions = np.zeros((size, model.action_dim), np.float32)
        self._action_rows = list(self._actions)
        # A row begins with what came, as bytes in memory order: numpy takes longer for numbers in a part of a row.
        self._tokens = np.zeros((size, math.prod(model.tokens_shape(1))), np.int32)
        self._stats = np.zeros((size, math.prod(model.stats_shape(1)) * model.has_stats), np.float32)
        self._token_bytes, self._token_stride = _bytes_of(self._tokens), self._tokens.strides[0]
        self._stats_bytes, self._stats_stride = _bytes_of(self._stats), self._stats.strides[0]
        self._token_types = token_types(model)
        #: Shapes of tokens, and of the stats beside them, with the length of the last axis of tokens.
        self._depths = {model.tokens_shape(1, count): count for count in range(1, model.depth + 1)}
        self._stats_depths = {model.stats_shape(1, count): count for count in self._depths.values() if model.has_stats}
        numbers = math.prod(model.actions_shape(1)) * has_beliefs
        sizes = numbers, numbers, int(has_beliefs), math.prod(mode_shape(model, 1)) * has_beliefs
        self._beliefs = {
            name: np.zeros((size, number), kind)
            for (name, kind), number in zip(BELIEF_ARRAYS.items(), sizes, strict=True)
        }
        self.written = 0

    def add(  # noqa: C901  # a call for the flags would take longer than they do
        self, out: TickOutcome, state: LoopState, tokens: Any = None, stats: Any = None, flags: int = 0
    ) -> None:
        """Write the row of a tick. out: what it was answered with; tokens, stats: as they came; flags: further ones."""
        # Multiplying truth values takes three times as long as asking for them.
        if out.is_held:
            flags |= HELD
        if out.is_latched:
            flags |= LATCHED
        if out.fell_back:
            flags |= FELL_BACK
        if out.is_accepted:
            flags |= ACCEPTED
        if state.is_queued:
            flags |= QUEUED
        if state.has_begun:
            flags |= BEGUN
        index = self.written % self._size
        token_state = layers = stats_state = ABSENT
        if isinstance(tokens, GivenBelief):
            token_state, layers = self._add_belief(tokens, index)
        elif tokens is not None:
            token_state = UNKEPT
            # What the loop refuses by its form is not kept, or a replay would accept it as the int32 in the record.
            depth = self._depths.get(tokens.shape) if type(tokens) is _Array else None
            if depth is not None and tokens.dtype in self._token_types:
                layers, token_state = depth, KEPT
                given = (tokens if tokens.dtype is _INT32 else _as_int32(tokens)).tobytes()
                place = index * self._token_stride
                self._token_bytes[place : place + len(given)] = given
        if stats is not None and tokens is not None:
            stats_state = UNKEPT
            depth = self._stats_depths.get(stats.shape) if type(stats) is _Array else None
            if depth is not None and depth == layers and stats.dtype.newbyteorder("=") == _FLOAT32:
                stats_state = KEPT
                given, place = stats.astype(_FLOAT32, copy=False).tobytes(), index * self._stats_stride
                self._stats_bytes[place : place + len(given)] = given
        # Named one by one: making a tuple of them takes longer.
        (tick, begin), (sequence, observed, service_layers, start) = state.line, state.service
        given_sequence, given_observed = out.stamps
        self._pack(
            self._bytes, index * self._stride, tick, begin, out.latency_ns, out.status, flags, state.used, state.faults,
            sequence, observed, service_layers, start, given_sequence, given_observed, token_state, layers, stats_state,
            state.doubt,
        )  # fmt: skip
        self._action_rows[index][...] = out.actions
        self.written += 1

    def _add_belief(self, given: GivenBelief, index: int) -> tuple[int, int]:
        """State and layers of a belief; where it did not decode, the row has NaN."""
        if not given.layers:
            return UNKEPT, 0
        decoded = given.decoded
        for name, rows in self._beliefs.items():
            if decoded is not None:
                rows[index] = decoded.answers[name].reshape(-1)
            elif name != "mode":
                rows[index] = np.nan
        return BELIEVED, given.layers

    def copy(self) -> dict[str, AnyArray]:
        """The rows in the order of their ticks, by name of the column or array."""
        before = self.written
        numbers = self._numbers.copy()
        arrays: dict[str, AnyArray] = {
            name: numbers[:, place].astype(kind) for place, (name, kind) in enumerate(COLUMNS.items())
        }
        arrays.update(actions=self._actions.copy(), tokens=self._tokens.copy(), stats=self._stats.copy())
        arrays.update({name: rows.copy() for name, rows in self._beliefs.items()})
        # The tick under way may have written into its row already.
        overwritten = self.written + 1 - before
        first = max(0, before - self._size + overwritten)
        order = np.arange(first, before) % self._size
        return {name: array[order] for name, array in arrays.items()}


@dataclass(frozen=True, eq=False)
class FlightRecord:
    """A flight record as read. columns: by name, each with one entry per tick; beliefs: `BELIEF_ARRAYS`, likewise."""

    meta: dict[str, Any]
    columns: dict[str, AnyArray]
    actions: Float32Array
    tokens: Int32Array
    stats: Float32Array
    beliefs: dict[str, AnyArray]

    def __len__(self) -> int:
        return len(self.actions)

    def row(self, index: int) -> dict[str, int]:
        """The numbers of one tick, by name of the column."""
        return {name: int(column[index]) for name, column in self.columns.items()}

    def tokens_of(self, index: int) -> Int32Array | None:
        """The tokens, int32 [1, T, D, l] or [1, l], that came on this tick; None if they are not in the record."""
        if self.columns["token_state"][index] != KEPT:
            return None
        *grid, _ = self.meta["token_shape"]
        return _cut(self.tokens[index], (1, *grid, int(self.columns["layers"][index]))).copy()

    def belief_of(self, index: int) -> dict[str, AnyArray]:
        """What the belief that came on this tick decoded to, by name, flat; NaN where it did not."""
        return {name: rows[index] for name, rows in self.beliefs.items()}

    def stats_of(self, index: int) -> Float32Array | None:
        """The stats, float32 [1, T, l, 2], that came with the tokens; None if they are not in the record."""
        if self.columns["stats_state"][index] != KEPT:
            return None
        steps, layers = self.meta["token_shape"][0], int(self.columns["layers"][index])
        return _cut(self.stats[index], (1, steps, layers, 2)).copy()


def _as_int32(tokens: AnyArray) -> Int32Array:
    # Clipped, since an illegal int64 could wrap around to a legal token.
    return np.clip(tokens.astype(np.int64), -1, 2**31 - 1).astype(np.int32)


def _bytes_of(rows: AnyArray) -> memoryview:
    """The memory of an array; of an empty one none, which no view shows."""
    return rows.data.cast("B") if rows.size else memoryview(bytearray())


def _cut(row: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """A view of the beginning of a row."""
    return row[: math.prod(shape)].reshape(shape)


def write_record(path: Path, arrays: dict[str, AnyArray], meta: dict[str, Any]) -> None:
    """Write a record, whole or not at all. Raises OSError."""
    text = np.frombuffer(json.dumps({"schema": SCHEMA, **meta}).encode(), np.uint8)
    with replacing(path, is_synced=True) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **{"meta": text, **arrays})  # type: ignore[arg-type]  # no array is named allow_pickle


def state_after(row: dict[str, int]) -> LoopState:
    """The state that the tick of this row left: the reverse of what `FlightRecorder.add` packs."""
    flags = row["flags"]
    return LoopState(
        line=(row["tick"], row["time_ns"]),
        service=(row["sequence"], row["observed_ns"], row["service_layers"], row["start"]),
        used=row["backend"],
        faults=row["faults"],
        latched=Status(row["status"]) if flags & LATCHED else None,
        has_begun=bool(flags & BEGUN),
        is_queued=bool(flags & QUEUED),
        why_empty=RUN_OUT if flags & BEGUN else NONE_YET,
        doubt=row["doubt"],
    )


def read_record(path: str | os.PathLike[str]) -> FlightRecord:
    """Read a record. Raises FlightRecordError for a file that is missing, damaged or no flight record."""
    path = as_path(path, "the flight record", FlightRecordError)
    if not path.exists():
        raise FlightRecordError(f"{path} is no flight record: it does not exist; pass a .npz that a decoder wrote")
    try:
        with regular_file(path) as (stream, _), np.load(stream, allow_pickle=False) as file:
            size = sum(member.file_size for member in file.zip.infolist())
            if size > _SIZE_LIMIT:
                raise ValueError(f"its arrays take {size} bytes; expected at most {_SIZE_LIMIT}")
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        schema = meta["schema"]
        if schema == _BEFORE_BELIEFS:
            ticks = len(arrays["actions"])
            arrays["doubt"] = np.zeros(ticks, np.int32)
            arrays |= {name: np.zeros((ticks, 0), kind) for name, kind in BELIEF_ARRAYS.items()}
        if schema in (_BEFORE_BELIEFS, SCHEMA):
            return _checked(path, meta, arrays)
    except _DAMAGE as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise FlightRecordError(f"{path} is no flight record: {reason}; pass a .npz that a decoder wrote") from error
    raise FlightRecordError(
        f"{path} has schema {schema}; expected {_BEFORE_BELIEFS} or {SCHEMA}: replay it with the version it is of"
    )


def _checked(path: Path, meta: dict[str, Any], arrays: dict[str, AnyArray]) -> FlightRecord:
    *grid, depth = sizes = meta["token_shape"]
    columns = {name: arrays[name].astype(kind, casting="same_kind") for name, kind in COLUMNS.items()}
    actions, tokens, stats = arrays["actions"], arrays["tokens"], arrays["stats"]
    beliefs = {name: arrays[name] for name in BELIEF_ARRAYS}
    ticks = len(actions)
    is_whole = (
        all(type(number) is int and number > 0 for number in sizes)
        and len(grid) in (0, 2)
        and isinstance(meta["config"], dict)
        and isinstance(meta["fingerprint"], str)
        and actions.ndim == 2
        and actions.dtype == np.float32
        and tokens.dtype == np.int32
        and tokens.shape == (ticks, math.prod(sizes))
        and stats.dtype == np.float32
        and stats.shape in ((ticks, 0), *((ticks, steps * depth * 2) for steps in grid[:1]))
        and all(column.shape == (ticks,) for column in columns.values())
        and not np.any((columns["layers"] < 0) | (columns["layers"] > depth))
        and not np.any((columns["status"] < 0) | (columns["status"] >= len(Status)))
        and not (np.any(columns["stats_state"] == KEPT) and not stats.size)
        and _have_beliefs(beliefs, actions, bool(np.any(columns["token_state"] == BELIEVED)))
    )
    if not is_whole:
        raise FlightRecordError(f"{path} has arrays that do not fit together; it is damaged: take another record")
    return FlightRecord(meta, columns, actions, tokens, stats, beliefs)


def _have_beliefs(beliefs: dict[str, AnyArray], actions: AnyArray, are_needed: bool) -> bool:
    """Whether these arrays fit together, and are there where they are needed."""
    ticks, action_dim = actions.shape
    are_rows = all(
        rows.dtype == kind and rows.ndim == 2 and len(rows) == ticks
        for rows, kind in zip(beliefs.values(), BELIEF_ARRAYS.values(), strict=True)
    )
    if not are_rows:
        return False
    chunks, std, probability, mode = (rows.shape[1] for rows in beliefs.values())
    if not chunks:
        return not (std or probability or mode or are_needed)
    are_chunks: bool = chunks == std and chunks % action_dim == 0
    return are_chunks and probability == 1 and mode > 0
