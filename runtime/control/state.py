"""The state that one tick leaves to the next, and the columns of a flight record.

The loop works on `LoopState`, the recorder packs it into a row, and a replay reads it back from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .config import Status

#: In place of a number: none was given; what was given is no number.
NO_NUMBER, WRONG_NUMBER = -(2**62), -(2**62) - 1
#: In place of a backend's index: the decoder itself has failed.
INTERNAL = -1
#: Tokens or stats of a tick: none came; they are in the record; they came but do not fit into it.
ABSENT, KEPT, UNKEPT = 0, 1, 2
#: Flags of a tick. ACCEPTED: its chunk was. QUEUED: something may be served after it. BEGUN: a chunk has come since the
#: start. RESET: the row is no tick, but says where the robot was when the decoder was started or reset.
HELD, LATCHED, FELL_BACK, ACCEPTED, QUEUED, BEGUN, RESET = 1, 2, 4, 8, 16, 32, 64

#: The chunk in service: sequence, observed_ns, layers (0 where there is none), and the tick of its first action.
#: A plain tuple: a tick unpacks one five times, and Python does that fastest.
InService = tuple[int, int, int, int]
NONE_IN_SERVICE: InService = -1, NO_NUMBER, 0, 0
NONE_YET = "no chunk has been accepted since the start; send one"
RUN_OUT = "the last chunk has run out; expected a new one: look at the policy"


@dataclass(slots=True)
class LoopState:
    """What a tick leaves to the next beside the queue.

    line: number and beginning of the last tick, as one tuple: a tick that is broken off changes both or neither.
    used: index of the backend that decoded last, INTERNAL if the decoder itself has failed since. has_begun: a chunk
    has been accepted since the start; is_queued: actions of it may be left; why_empty: why, once none is left.
    """

    line: tuple[int, int] = (0, NO_NUMBER)
    service: InService = NONE_IN_SERVICE
    used: int = 0
    faults: int = 0
    latched: Status | None = None
    has_begun: bool = False
    is_queued: bool = False
    why_empty: str = NONE_YET


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
}


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
    )
