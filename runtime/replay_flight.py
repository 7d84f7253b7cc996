#!/usr/bin/env python3
"""Replay a flight record on a bundle: every chunk that was decoded is decoded again, through the same guard and queue.

Each tick starts from the action that was sent before it. What the backend or the clock did to a tick (BACKEND_FAULT,
DEADLINE_MISS) is not in the tokens and not replayed. Compared from the tick on by which all chunks from before the
record have run out. The exit status is 0 where nothing differs, 1 where something does, 2 where nothing is compared.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
from collections.abc import Sequence

import numpy as np

from runtime.console import prepare_console, printable
from runtime.control_config import ControlConfig, Status
from runtime.control_decoder import ControlDecoder
from runtime.control_errors import FlightRecordError
from runtime.control_recorder import HELD, NO_TOKENS, FlightRecord, read_record
from runtime.errors import TokenizerError
from runtime.tokenizer import ActionTokenizer

#: Of |action|, between backends and processors.
_TOLERANCE = 1e-4
_NOT_IN_TOKENS = (Status.BACKEND_FAULT, Status.DEADLINE_MISS, Status.NOT_READY)


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
    print("\n".join(differences))
    print(f"{'✗' if differences else '✓'} {compared} of {len(record)} ticks compared, {len(differences)} differ")
    return 1 if differences else 0


def replay(record: FlightRecord, tokenizer: ActionTokenizer) -> tuple[int, list[str]]:
    """How many ticks were compared, and a line for each that differs. Raises FlightRecordError for none."""
    columns, now = record.columns, [0]
    values = {**record.meta["config"], "record_ticks": 0, "use_worker": False, "max_consecutive_faults": 0}
    values.update(on_fault="hold_last")
    values.pop("deadline_us", None)
    config = ControlConfig.from_values(values, "the record")
    length = tokenizer.model.chunk_length
    if len(record) <= length:
        raise FlightRecordError(f"the record has {len(record)} ticks; expected more than the {length} of a chunk")
    compared, differences = 0, []
    position = np.clip(record.actions[0], config.action_low, config.action_high).tolist()
    with ControlDecoder(tokenizer, config, position=position, clock=lambda: now[0]) as decoder:
        decoder.warmup()
        for index in range(1, len(record)):
            now[0] = int(columns["time_ns"][index])
            status = Status(int(columns["status"][index]))
            tokens = record.tokens_of(index)
            is_given = columns["token_state"][index] != NO_TOKENS
            decoder._guard.commit(record.actions[index - 1])
            # The columns hold the chunk in service after the tick: a refused one's own numbers are not recorded.
            is_accepted = is_given and int(columns["sequence"][index]) != int(columns["sequence"][index - 1])
            result = decoder.step(
                tokens if is_accepted else None,
                sequence=int(columns["sequence"][index]),
                observed_ns=int(columns["observed_ns"][index]),
            )
            was_held = bool(columns["flags"][index] & HELD)
            if was_held and status not in (Status.STALE, Status.NOT_READY):
                if status is not Status.DEADLINE_MISS:
                    decoder._queue.clear()
                continue
            if index < length or status in _NOT_IN_TOKENS:
                continue
            compared += 1
            distance = float(np.abs(result.actions - record.actions[index]).max())
            if result.is_held != was_held or not distance <= _TOLERANCE:
                differences.append(
                    f"tick {columns['tick'][index]}: {status.name}, sent {record.actions[index].tolist()}; replayed "
                    f"{result.status.name}, {result.actions.tolist()}"
                )
    return compared, differences


if __name__ == "__main__":
    prepare_console()
    sys.exit(main())
