"""Replays flight records: each tick is decided again, from its tokens and what the tick before it left.

What backends, clock and deadlines did is not in the tokens and taken from the record: a chunk that a backend has failed
on fails again, an action that was late is late again; what follows from it is decided and compared. So is what a belief
decoded to, for logits are too large to be kept. Where the ring had
wrapped, the first ticks serve to fill the queue and are not compared; the last `record_ticks` always are.
"""

import functools
from itertools import pairwise
from typing import Any

import numpy as np

from ..bundle.arrays import AnyArray
from ..bundle.models import ModelEntry
from ..control.beliefs import GivenBelief
from ..control.chain import FAILURES, BackendChain
from ..control.config import ControlConfig, Status
from ..control.decoder import ControlDecoder
from ..control.errors import ClockFaultError, FlightRecordError
from ..control.recorder import ACCEPTED, BELIEVED, HELD, LATCHED, RESET, UNKEPT, FlightRecord, state_after
from ..control.result import INTERNAL, NO_NUMBER, WRONG_NUMBER
from ..tokenizer import ActionTokenizer

#: Of |action|, between backends and processors.
_TOLERANCE = 1e-4
_LATE_NS = 10**12


def replay_flight(record: FlightRecord, tokenizer: ActionTokenizer) -> tuple[int, list[str]]:
    """How many ticks were compared, and a line for each that differs. Raises FlightRecordError for none."""
    rows = [_Row(record, index, tokenizer.model) for index in range(len(record))]
    config = _config_of(record, tokenizer.model)
    position = np.clip(np.nan_to_num(record.actions[0]), config.action_low, config.action_high).tolist()
    compared, differences = 0, []
    around = _Surroundings()
    with ControlDecoder(tokenizer, config, position=position, clock=around.read_clock) as decoder:
        # Nobody needs to hear of it again.
        decoder.warmup(functools.partial(_RecordedChain, around), reports=False)
        # Nothing is known of the queue before the first row, but where the decoder was started on it.
        known_from = shown = 0
        for before, row in pairwise(rows):
            # A tick without a clock is not counted, but shown as the next one: the ticks after it are.
            shown = 0 if before.has(RESET) else max(before.number, shown + 1)
            if before.has(RESET):
                decoder.reset()
                known_from = before.number
            elif before is rows[0]:
                known_from = before.number + tokenizer.model.chunk_length
            if row.has(RESET):
                continue
            decoder.resume(before.actions, shown, state_after(before.numbers))
            around.set(row)
            decoder.step(**row.arguments())
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


def _config_of(record: FlightRecord, model: ModelEntry) -> ControlConfig:
    """The settings of a record, without what depends on time. Raises FlightRecordError for none of this model."""
    # Of a record that does not say it, the decoder had no tolerance.
    values = {"range_tolerance": 0, **record.meta["config"]}
    values |= {"record_ticks": 0, "use_worker": False, "record_folder": None, "deadline_us": None}
    if isinstance(beliefs := values.get("beliefs"), dict):
        # What was decoded is in the record, with its scale.
        values["beliefs"] = {**beliefs, "temperature": 1.0, "settings": None}
    values["on_fault"] = "stop" if values.get("on_fault") == "stop" else "hold_last"
    config = ControlConfig.from_values(values, "the record")
    believed = record.beliefs["chunks"].shape[1]
    if believed not in (0, model.chunk_length * config.action_dim):
        raise FlightRecordError(
            f"the record has chunks of {believed} numbers that beliefs decoded to; expected "
            f"{model.chunk_length * config.action_dim}: give the bundle that flew"
        )
    if not len(record) or record.actions.shape[1] != config.action_dim:
        raise FlightRecordError(
            f"the record has actions {list(record.actions.shape)}; expected some, with {config.action_dim} dimensions"
        )
    return config


class _Row:
    """One tick of a record."""

    def __init__(self, record: FlightRecord, index: int, model: ModelEntry) -> None:
        self._record, self._index, self._model = record, index, model
        self.numbers = record.row(index)
        self.number, self.status = self.numbers["tick"], Status(self.numbers["status"])
        self.actions = record.actions[index]

    def has(self, flag: int) -> bool:
        return bool(self.numbers["flags"] & flag)

    def arguments(self) -> dict[str, Any]:
        """Of `step`; what did not fit into the record is wrong in another way."""
        wrong, numbers, model = object(), self.numbers, self._model
        given = {name: numbers[f"given_{name}"] for name in ("sequence", "observed_ns")}
        return {
            "tokens": wrong if numbers["token_state"] == UNKEPT else self._record.tokens_of(self._index),
            "logits": np.zeros((1, *model.token_grid, numbers["layers"], model.vocabulary), np.float32)
            if numbers["token_state"] == BELIEVED
            else None,
            "stats": wrong if numbers["stats_state"] == UNKEPT else self._record.stats_of(self._index),
            "deadline_us": 1.0 if self.status is Status.DEADLINE_MISS else None,
            **{name: {NO_NUMBER: None, WRONG_NUMBER: wrong}.get(value, value) for name, value in given.items()},
        }

    def belief(self) -> dict[str, AnyArray]:
        """What the belief that came decoded to."""
        return self._record.belief_of(self._index)

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


class _Surroundings:
    """What a decoder has around it, as it was on the tick under way; nothing happens before the first."""

    row: _Row | None = None

    def set(self, row: _Row) -> None:
        self.row, self._is_later = row, False

    def read_clock(self) -> int:
        """Raises ClockFaultError on a tick on which clock or decoder have failed."""
        if self.row is None:
            return 0
        status, begin = self.row.status, self.row.numbers["time_ns"]
        if status is Status.BACKEND_FAULT and self.row.numbers["backend"] == INTERNAL:
            raise ClockFaultError("as recorded")
        if not self._is_later:
            self._is_later = True
            return begin
        if status is Status.DEADLINE_MISS:
            return begin + _LATE_NS
        # Of a chunk that became old while it was decoded; otherwise it decides nothing.
        return begin + self.row.numbers["latency_ns"] * (status is Status.STALE)


class _RecordedChain(BackendChain):
    """Fails on the chunks on which a backend failed, in time or at all; decodes the others, but beliefs: of these it
    hands out what they decoded to."""

    def __init__(self, around: _Surroundings, *parts: Any) -> None:
        super().__init__(*parts)
        self._around = around

    def decode(self, tokens: AnyArray | GivenBelief, stats: object, deadline_ns: int | None) -> Status:
        row = self._around.row
        if row is not None and isinstance(tokens, GivenBelief):
            return self._recorded(row)
        if row is None or row.status not in FAILURES or row.has(ACCEPTED):
            return super().decode(tokens, stats, deadline_ns)
        self.fell_back, self.detail = False, "as recorded"
        return row.status

    def _recorded(self, row: _Row) -> Status:
        self.fell_back, self.detail, self.decoded = False, "as recorded", None
        if not row.has(ACCEPTED):
            return row.status
        slots = self.warm[0].beliefs
        assert slots is not None  # the settings of the record have beliefs
        for name, values in row.belief().items():
            # Which mode it was decides nothing.
            if name != "mode":
                slots.answers[name].reshape(-1)[...] = values
        self.chunk, self.decoded = self.warm[0].chunk, slots
        # Of a chunk that was brought inside its limits already.
        return row.status if row.status is Status.OUT_OF_RANGE else Status.OK


def _how(is_held: bool) -> str:
    return ", held," if is_held else ""
