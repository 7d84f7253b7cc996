"""What a tick is answered with, and what it leaves to the next.

A signal's handler may raise between any two instructions of a tick and break it off. So nothing is cleaned up
afterwards: from the beginning of a tick a `BrokenOff` is shown, which stands still; the tick is put together in an
`TickOutcome` that nobody sees; and one assignment shows it when it is whole.

The loop works on `LoopState`; the recorder packs it into a row, and a replay reads it back from there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np

from ..bundle.arrays import Float32Array, Int32Array
from .config import Status

#: In place of a number: none was given; what was given is no number.
NO_NUMBER, WRONG_NUMBER = -(2**62), -(2**62) - 1
#: In place of a backend's index: the decoder itself has failed.
INTERNAL = -1

#: The chunk in service: sequence, observed_ns, layers (0 where there is none), and the tick of its first action.
#: A plain tuple: a tick unpacks one five times, and Python does that fastest.
InService = tuple[int, int, int, int]
NO_SERVICE: InService = -1, NO_NUMBER, 0, 0
NONE_YET = "no chunk has been accepted since the start; send one"
RUN_OUT = "the last chunk has run out; expected a new one: look at the policy"
BROKEN_OFF = "the tick was broken off"
NO_STAMPS = NO_NUMBER, NO_NUMBER
ADVICE = "it was raised from outside; send this action, or stop the robot"


@dataclass(frozen=True, slots=True, eq=False)
class TickBelief:
    """What the policy believed of the action of a tick, by the newest chunk.

    std: float32 [A], in the unit of the action; mode_probability: of the likeliest mode of its chunk; mode: int32, its
    class [], or its coarse tokens [T, D, c].
    """

    std: Float32Array
    mode_probability: float
    mode: Int32Array = field(repr=False)


@dataclass(slots=True, eq=False)
class TickOutcome:
    """A whole tick; not altered while it is shown. values: `actions` as Python's floats, with values of float32.

    For the tick log alone: begin, when the tick began, NO_NUMBER if the clock failed; stamps, the sequence and
    observed_ns that came; is_accepted, whether the chunk was; rows, how many the flight recorder has, with this tick.
    """

    values: list[float]
    actions: Float32Array = field(init=False)
    status: Status = Status.NOT_READY
    tick: int = 0
    sequence: int = -1
    is_held: bool = True
    is_limited: bool = False
    is_latched: bool = False
    fell_back: bool = False
    backend: str = ""
    detail: str = ""
    latency_ns: int = 0
    belief: TickBelief | None = None
    begin: int = NO_NUMBER
    stamps: tuple[int, int] = NO_STAMPS
    is_accepted: bool = False
    rows: int = 0

    def __post_init__(self) -> None:
        self.actions = np.array(self.values, np.float32)


@dataclass(slots=True)
class LoopState:
    """What a tick leaves to the next beside the queue.

    line: number and beginning of the last tick, as one tuple: a tick that is broken off changes both or neither.
    used: index of the backend that decoded last, INTERNAL if the decoder itself has failed since. has_begun: a chunk
    has been accepted since the start; is_queued: actions of it may be left; why_empty: why, once none is left.
    doubt: 0, or after an uncertain action how many served ticks in a row have to be sure until nothing is uncertain.
    """

    line: tuple[int, int] = (0, NO_NUMBER)
    service: InService = NO_SERVICE
    used: int = 0
    faults: int = 0
    latched: Status | None = None
    has_begun: bool = False
    is_queued: bool = False
    why_empty: str = NONE_YET
    doubt: int = 0


class BrokenOff:
    """Stands still after `before`; has the attributes of a `TickOutcome`, computed when somebody looks.

    So that showing it takes one assignment, and no call that could fail. hold: gives the values that stand still after
    those that were sent.
    """

    __slots__ = ("_hold", "before", "detail")

    def __init__(self, hold: Callable[[list[float]], list[float]], before: TickOutcome) -> None:
        self._hold, self.before = hold, before
        self.detail = f"{BROKEN_OFF}; {ADVICE}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settled(), name)

    def settled(self) -> TickOutcome:
        """The outcome that this stands for; it does not depend on the decoder any more."""
        before = self.before
        return TickOutcome(
            self._hold(before.values),
            before.status if before.is_latched else Status.BACKEND_FAULT,
            before.tick + 1,
            before.sequence,
            is_latched=before.is_latched,
            backend=before.backend,
            detail=self.detail,
            rows=before.rows,
        )


def _of_shown(name: str, text: str | None = None) -> Any:
    """An attribute that is read from the outcome that is shown, and cannot be written."""
    return property(attrgetter(f"shown.{name}"), doc=text)


class ControlResult:
    """The result of a tick: one object for all ticks, valid until the next `step`; `actions` are a new array each."""

    __slots__ = ("shown",)

    def __init__(self, shown: TickOutcome) -> None:
        #: Everything below in one piece, so that one assignment publishes it.
        self.shown: TickOutcome | BrokenOff = shown

    def __reduce__(self) -> tuple[type[ControlResult], tuple[TickOutcome]]:
        """A copy keeps this tick, whatever the decoder does next."""
        # The outcome that is shown is filled again two ticks later.
        shown = self.shown
        return type(self), (shown.settled() if isinstance(shown, BrokenOff) else copy.copy(shown),)

    actions: Float32Array = _of_shown("actions", "float32 [A], always inside limits and slew.")
    status: Status = _of_shown("status")
    is_held: bool = _of_shown("is_held", "Whether `actions` tell the robot to stand still.")
    is_limited: bool = _of_shown(
        "is_limited", "Whether the limits or the slew limit made `actions` differ from what was decoded."
    )
    is_latched: bool = _of_shown("is_latched", "Whether the decoder stands still until `reset()`.")
    fell_back: bool = _of_shown("fell_back", "Whether `backend` decoded on this tick because another one failed.")
    backend: str = _of_shown("backend", "The name of the backend that decoded last.")
    detail: str = _of_shown("detail", "What was found, what was expected and what to do; empty for OK.")
    tick: int = _of_shown("tick")
    sequence: int = _of_shown("sequence", "The sequence number of the chunk in service; -1 for none.")
    latency_ns: int = _of_shown("latency_ns")
    belief: TickBelief | None = _of_shown(
        "belief", "What the policy believed of this action; None where it came as tokens, or nothing was due."
    )

    @property
    def latency_us(self) -> float:
        return self.shown.latency_ns / 1e3

    def __repr__(self) -> str:
        held = ", held" if self.is_held else ""
        detail = f": {self.detail}" if self.detail else ""
        return f"ControlResult({self.status.name}{held}, {self.actions.tolist()}, {self.latency_us:.1f} us{detail})"
