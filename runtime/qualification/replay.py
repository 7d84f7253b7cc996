"""Replay a flight record on a bundle: each tick is decided again, from its tokens and what the tick before it left.

What backends, clock and deadlines did is not in the tokens and taken from the record: a chunk that a backend has failed
on fails again, an action that was late is late again; what follows from it is decided and compared. Where the ring had
wrapped, the first ticks serve to fill the queue and are not compared; the last `record_ticks` always are. The exit
status is 0 where nothing differs, 1 where something does, 2 where nothing is compared.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle.arrays import Float32Array
from ..bundle.console import printable
from ..bundle.errors import TokenizerError
from ..control.chain import FAILURES
from ..control.config import ControlConfig, Status
from ..control.decoder import ControlDecoder
from ..control.errors import FlightRecordError
from ..control.recorder import (
    ACCEPTED,
    BEGUN,
    HELD,
    INTERNAL,
    LATCHED,
    NO_NUMBER,
    QUEUED,
    RESET,
    UNKEPT,
    WRONG_NUMBER,
    FlightRecord,
    read_record,
)
from ..control.result import LoopState
from ..tokenizer import ActionTokenizer

#: Of |action|, between backends and processors.
_TOLERANCE = 1e-4
_LATE_NS = 10**12


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args(arguments)
    try:
        record = read_record(options.record)
        with ActionTokenizer.load(
            options.bundle, backend=options.backend, expect_fingerprint=record.meta["fingerprint"]
        ) as tokenizer:
            compared, differences = replay(record, tokenizer)
    except TokenizerError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    print("\n".join([*differences, f"{'✗' if differences else '✓'} {_summary(record, compared, differences)}"]))
    return 1 if differences else 0


def replay(record: FlightRecord, tokenizer: ActionTokenizer) -> tuple[int, list[str]]:
    """How many ticks were compared, and a line for each that differs. Raises FlightRecordError for none."""
    # Of a record that does not say it, the decoder had no tolerance.
    values = {
        "range_tolerance": 0,
        **record.meta["config"],
        "record_ticks": 0,
        "use_worker": False,
        "record_folder": None,
    }
    values.update(on_fault="stop" if values.get("on_fault") == "stop" else "hold_last")
    values.pop("deadline_us", None)
    config = ControlConfig.from_values(values, "the record")
    rows = [_Row(record, index) for index in range(len(record))]
    if not rows or record.actions.shape[1] != config.action_dim:
        raise FlightRecordError(
            f"the record has actions {list(record.actions.shape)}; expected some, with {config.action_dim} dimensions"
        )
    position = np.clip(np.nan_to_num(record.actions[0]), config.action_low, config.action_high).tolist()
    compared, differences = 0, []
    with _Replay(tokenizer, config, position) as decoder:
        # Nothing is known of the queue before the first row, but where the decoder was started on it.
        known_from = 0
        for before, row in pairwise(rows):
            if before.has(RESET):
                decoder.reset()
                known_from = before.number
            elif before is rows[0]:
                known_from = before.number + tokenizer.model.chunk_length
            if row.has(RESET):
                continue
            decoder.again(before, row)
            if row.number < known_from:
                continue
            compared += 1
            if difference := row.difference(decoder):
                differences.append(difference)
    if not compared:
        raise FlightRecordError(
            f"the record has {len(record)} rows; expected more than the {tokenizer.model.chunk_length} ticks of a "
            "chunk, or a start among them: nothing can be compared"
        )
    return compared, differences


@dataclass(frozen=True)
class _Row:
    """One tick of a record."""

    record: FlightRecord
    index: int

    def __getitem__(self, name: str) -> int:
        return int(self.record.columns[name][self.index])

    def has(self, flag: int) -> bool:
        return bool(self["flags"] & flag)

    @property
    def number(self) -> int:
        return self["tick"]

    @property
    def status(self) -> Status:
        return Status(self["status"])

    @property
    def actions(self) -> Float32Array:
        sent: Float32Array = self.record.actions[self.index]
        return sent

    @property
    def state(self) -> LoopState:
        """What it left to the next tick."""
        return LoopState(
            line=(self["tick"], self["time_ns"]),
            service=(self["sequence"], self["observed_ns"], self["service_layers"], self["start"]),
            faults=self["faults"],
            latched=self.status if self.has(LATCHED) else None,
            has_begun=self.has(BEGUN),
            is_queued=self.has(QUEUED),
        )

    @property
    def is_failure(self) -> bool:
        """The chunk was refused for what a backend did, in time or at all."""
        return self.status in FAILURES and not self.has(ACCEPTED)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `step`; what did not fit into the record is wrong in another way."""
        wrong = object()
        tokens, stats = self.record.tokens_of(self.index), self.record.stats_of(self.index)
        numbers = {
            name: None if (value := self[f"given_{name}"]) == NO_NUMBER else wrong if value == WRONG_NUMBER else value
            for name in ("sequence", "observed_ns")
        }
        return {
            "tokens": wrong if self["token_state"] == UNKEPT else tokens,
            "stats": wrong if self["stats_state"] == UNKEPT else stats,
            "deadline_us": 1.0 if self.status is Status.DEADLINE_MISS else None,
            **numbers,
        }

    def difference(self, decoder: ControlDecoder) -> str:
        """From what the decoder has made of it, in words; empty for none."""
        found = decoder.result
        distance = float(np.abs(found.actions - self.actions).max())
        is_same = (found.status, found.is_held, found.is_latched) == (self.status, self.has(HELD), self.has(LATCHED))
        if is_same and distance <= _TOLERANCE:
            return ""
        return (
            f"tick {self.number}: recorded {self.status.name}{_how(self.has(HELD))} {self.actions.tolist()}; replayed "
            f"{found.status.name}{_how(found.is_held)} {found.actions.tolist()}"
            + (f": {found.detail}" if found.detail else "")
        )


class _Replay(ControlDecoder):
    """A decoder that lets its backend, its clock and itself fail where they did in the record."""

    def __init__(self, tokenizer: ActionTokenizer, config: ControlConfig, position: Sequence[float]) -> None:
        self._row: _Row | None = None
        self._is_later = False
        super().__init__(tokenizer, config, position=position, clock=self._read_clock)
        self.warmup()
        # Nobody needs to hear of it again.
        if self._books.reporter is not None:
            self._books.reporter.close()
            self._books.reporter = None

    def again(self, before: _Row, row: _Row) -> None:
        self.resume(before.actions, before.state)
        self._row, self._is_later = row, False
        self.step(**row.arguments)

    def _read_clock(self) -> int:
        if self._row is None:
            return 0
        if not self._is_later:
            self._is_later = True
            return self._row["time_ns"]
        if self._row.status is Status.DEADLINE_MISS:
            return self._row["time_ns"] + _LATE_NS
        # Of a chunk that became old while it was decoded; otherwise it decides nothing.
        return self._row["time_ns"] + self._row["latency_ns"] * (self._row.status is Status.STALE)

    def _decide(self, begin: int, tokens: object, stats: object, stamps: tuple[int, int]) -> Status:
        if self._row is not None and self._row["backend"] == INTERNAL and self._row.status is Status.BACKEND_FAULT:
            raise FlightRecordError("as recorded")
        return super()._decide(begin, tokens, stats, stamps)

    def _decode(self, tokens: npt.NDArray[Any], stats: object) -> tuple[Status, Float32Array]:
        if self._row is None or not self._row.is_failure:
            return super()._decode(tokens, stats)
        self._out.detail = "as recorded"
        return self._row.status, self._row.actions


def _how(is_held: bool) -> str:
    return ", held," if is_held else ""


def _summary(record: FlightRecord, compared: int, differences: list[str]) -> str:
    return f"{compared} of {len(record)} rows compared, {len(differences)} differ"
