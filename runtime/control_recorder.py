"""The flight recorder: the last ticks in a ring made once, written to .npz off the loop, read without pickle."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtime.contract import Float32Array
from runtime.control_errors import FlightRecordError

SCHEMA = 1
#: Of the tokens of a tick: none came; they are in the record; they came but are no array that fits into it.
NO_TOKENS, KEPT_TOKENS, UNKEPT_TOKENS = 0, 1, 2
_NUMBERS = {
    "tick": np.int64,
    "time_ns": np.int64,
    "latency_ns": np.int64,
    "sequence": np.int64,
    "observed_ns": np.int64,
    "status": np.int8,
    "flags": np.int8,
    "backend": np.int8,
    "faults": np.int32,
    "token_state": np.int8,
    "layers": np.int16,
}
HELD, LATCHED, FELL_BACK = 1, 2, 4


class FlightRecorder:
    """The loop writes; one other thread may copy at any time: rows overwritten while it copies are left out."""

    def __init__(self, ticks: int, token_shape: tuple[int, int, int], action_dim: int) -> None:
        steps, latents, layers = token_shape
        self._size, self._per_layer = ticks, steps * latents
        # One call packs a tick's numbers; assigning them to arrays one by one takes three times as long.
        self._numbers = np.zeros((ticks, len(_NUMBERS)), np.int64)
        self._bytes = self._numbers.data.cast("B")
        self._pack = struct.Struct(f"={len(_NUMBERS)}q").pack_into
        self._actions = np.zeros((ticks, action_dim), np.float32)
        self._tokens = np.zeros((ticks, steps * latents * layers), np.int32)
        self._action_rows = list(self._actions)
        #: Per number of layers and tick a view of the shape that tokens have.
        self._token_rows = {
            count: [row[: self._per_layer * count].reshape(1, steps, latents, count) for row in self._tokens]
            for count in range(1, layers + 1)
        }
        self._shape = token_shape
        self.written = 0

    def add(self, actions: Float32Array, tokens: object, *numbers: int) -> None:
        """numbers: the columns from `tick` to `faults`, in their order."""
        index = self.written % self._size
        state = layers = 0
        if tokens is not None:
            state = UNKEPT_TOKENS
            if type(tokens) is np.ndarray and tokens.ndim == 4 and tokens.dtype.kind in "iu":
                rows = self._token_rows.get(tokens.shape[3])
                if rows is not None and tokens.shape == rows[index].shape:
                    # Wrapped around, an illegal token of another type could become a legal one.
                    legal = tokens if tokens.dtype == np.int32 else np.clip(tokens, -1, 2**31 - 1)
                    np.copyto(rows[index], legal, "unsafe")
                    state, layers = KEPT_TOKENS, tokens.shape[3]
        self._pack(self._bytes, index * 8 * len(_NUMBERS), *numbers, state, layers)
        np.copyto(self._action_rows[index], actions)
        self.written += 1

    def copy(self) -> dict[str, npt.NDArray[Any]]:
        """The ticks in their order."""
        before = self.written
        numbers = self._numbers.copy()
        arrays: dict[str, npt.NDArray[Any]] = {
            name: numbers[:, place].astype(kind) for place, (name, kind) in enumerate(_NUMBERS.items())
        }
        arrays["actions"], arrays["tokens"] = self._actions.copy(), self._tokens.copy()
        # The tick under way may have written into its row already.
        overwritten = self.written + 1 - before
        first = max(0, before - self._size + overwritten)
        order = np.arange(first, before) % self._size
        return {name: array[order] for name, array in arrays.items()}


@dataclass(frozen=True, eq=False)
class FlightRecord:
    """A record as read; `columns` by name, each with one entry per tick."""

    meta: dict[str, Any]
    columns: dict[str, npt.NDArray[Any]]
    actions: Float32Array
    tokens: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.actions)

    def tokens_of(self, index: int) -> npt.NDArray[np.int32] | None:
        """int32 [1, T, D, l] of the chunk that arrived on this tick, if it is in the record."""
        if self.columns["token_state"][index] != KEPT_TOKENS:
            return None
        steps, latents, _ = self.meta["token_shape"]
        layers = int(self.columns["layers"][index])
        return np.ascontiguousarray(self.tokens[index, : steps * latents * layers].reshape(1, steps, latents, layers))


def write_record(path: Path, arrays: dict[str, npt.NDArray[Any]], meta: dict[str, Any]) -> None:
    """Whole or not at all. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text = np.frombuffer(json.dumps({"schema": SCHEMA, **meta}).encode(), np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez_compressed(file, **{"meta": text, **arrays})  # type: ignore[arg-type]  # no array is named allow_pickle
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def read_record(path: str | Path) -> FlightRecord:
    """Raises FlightRecordError for a file that is missing, damaged or no flight record."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(arrays.pop("meta").tobytes())
        schema, shape = meta["schema"], tuple(meta["token_shape"])
        columns = {name: arrays[name].astype(kind, casting="same_kind") for name, kind in _NUMBERS.items()}
        actions, tokens = arrays["actions"], arrays["tokens"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise FlightRecordError(
            f"{path} is no flight record: {type(error).__name__}: {error}; pass a .npz that a decoder wrote"
        ) from error
    if schema != SCHEMA:
        raise FlightRecordError(f"{path} has schema {schema}; expected {SCHEMA}: replay it with the version it is of")
    ticks = len(actions)
    is_whole = (
        len(shape) == 3
        and actions.ndim == 2
        and actions.dtype == np.float32
        and tokens.dtype == np.int32
        and tokens.shape == (ticks, int(np.prod(shape)))
        and all(column.shape == (ticks,) for column in columns.values())
        and not np.any((columns["layers"] < 0) | (columns["layers"] > shape[-1]))
    )
    if not is_whole:
        raise FlightRecordError(f"{path} has arrays that do not fit together; it is damaged: take another record")
    return FlightRecord(meta, columns, actions, tokens)
