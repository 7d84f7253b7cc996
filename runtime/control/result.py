"""What a tick is answered with, and what it leaves to the next.

A tick may be broken off between any two of its steps, by what a signal's handler raises. So nothing is cleaned up
afterwards: from its beginning on a `BrokenOff` is shown, which stands still; the tick is put together in an `Outcome`
that nobody sees; and one assignment shows it when it is whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..bundle.arrays import Float32Array
from .config import Status
from .recorder import NO_NUMBER

BROKEN_OFF = "the tick was broken off"
ADVICE = "it was raised from outside; send this action, or stop the robot"


class Outcome:
    """One tick, whole; not altered while it is shown. values: `actions` as numbers of Python, of float32 in value."""

    __slots__ = (
        "actions",
        "backend",
        "detail",
        "fell_back",
        "is_held",
        "is_latched",
        "is_limited",
        "latency_ns",
        "rows",
        "sequence",
        "status",
        "tick",
        "values",
    )

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.actions: Float32Array = np.array(values, np.float32)
        self.status = Status.NOT_READY
        self.latency_ns = 0
        self.tick = 0
        self.sequence = -1
        self.is_held = True
        self.is_limited = False
        self.is_latched = False
        self.fell_back = False
        self.backend = ""
        self.detail = ""
        #: Of the flight recorder, this tick's included.
        self.rows = 0


class BrokenOff:
    """Stand still, after what was sent `before`. hold: what that is.

    Nothing is computed before somebody looks: to show it takes one assignment, and no call that could fail.
    """

    __slots__ = ("_hold", "before", "detail")
    is_held = True
    is_limited = fell_back = False
    latency_ns = 0

    def __init__(self, hold: Callable[[list[float]], list[float]], before: Outcome) -> None:
        self._hold, self.before = hold, before
        self.detail = f"{BROKEN_OFF}; {ADVICE}"

    @property
    def values(self) -> list[float]:
        return self._hold(self.before.values)

    @property
    def actions(self) -> Float32Array:
        return np.array(self.values, np.float32)

    @property
    def status(self) -> Status:
        return self.before.status if self.before.is_latched else Status.BACKEND_FAULT

    @property
    def is_latched(self) -> bool:
        return self.before.is_latched

    @property
    def tick(self) -> int:
        return self.before.tick + 1

    @property
    def sequence(self) -> int:
        return self.before.sequence

    @property
    def backend(self) -> str:
        return self.before.backend

    def settled(self) -> Outcome:
        """The same as an outcome of its own, which needs no decoder any more."""
        sent = Outcome(self.values)
        sent.status, sent.is_latched, sent.detail = self.status, self.is_latched, self.detail
        sent.tick, sent.sequence, sent.backend = self.tick, self.sequence, self.backend
        sent.rows = self.before.rows
        return sent


class ControlResult:
    """One tick. There is one object for all of them, valid until the next `step`; `actions` are a new array."""

    __slots__ = ("shown",)

    def __init__(self, shown: Outcome) -> None:
        #: Everything below in one piece: to assign it is to publish.
        self.shown: Outcome | BrokenOff = shown

    def __reduce__(self) -> tuple[type[ControlResult], tuple[Outcome]]:
        """A copy keeps this tick, whatever the decoder does next."""
        # An outcome that was shown is filled again on the tick after the next.
        shown = self.shown
        return type(self), (shown.settled() if isinstance(shown, BrokenOff) else copy.copy(shown),)

    @property
    def actions(self) -> Float32Array:
        """float32 [A], always inside limits and slew."""
        return self.shown.actions

    @property
    def status(self) -> Status:
        return self.shown.status

    @property
    def is_held(self) -> bool:
        """`actions` tell the robot to stand still."""
        return self.shown.is_held

    @property
    def is_limited(self) -> bool:
        """`actions` are not what was decoded: the slew limit holds them back, or the limits of a dimension."""
        return self.shown.is_limited

    @property
    def is_latched(self) -> bool:
        """It stands still until `reset()`."""
        return self.shown.is_latched

    @property
    def fell_back(self) -> bool:
        """To `backend`, on this tick, because the one before failed."""
        return self.shown.fell_back

    @property
    def backend(self) -> str:
        """The one that has decoded last."""
        return self.shown.backend

    @property
    def detail(self) -> str:
        """What was found, expected and what to do; empty for OK."""
        return self.shown.detail

    @property
    def tick(self) -> int:
        return self.shown.tick

    @property
    def sequence(self) -> int:
        """Of the chunk in service; -1 for none."""
        return self.shown.sequence

    @property
    def latency_ns(self) -> int:
        return self.shown.latency_ns

    @property
    def latency_us(self) -> float:
        return self.shown.latency_ns / 1e3

    def __repr__(self) -> str:
        held = ", held" if self.is_held else ""
        detail = f": {self.detail}" if self.detail else ""
        return f"ControlResult({self.status.name}{held}, {self.actions.tolist()}, {self.latency_us:.1f} us{detail})"


#: The chunk in service: its sequence, observed_ns and layers, 0 where there is none, and the tick of its first action.
#: A plain tuple: a tick takes one apart five times, and Python does that at once.
InService = tuple[int, int, int, int]
NONE_IN_SERVICE: InService = -1, NO_NUMBER, 0, 0


@dataclass(slots=True)
class LoopState:
    """What a tick leaves to the next beside the queue, as a flight record has it.

    line: number and beginning of the last tick, in one, so that a tick that is broken off leaves either both or none.
    has_begun: a chunk has been accepted since the start; is_queued: something may be left of it.
    """

    line: tuple[int, int] = (0, NO_NUMBER)
    service: InService = NONE_IN_SERVICE
    faults: int = 0
    latched: Status | None = None
    has_begun: bool = False
    is_queued: bool = False
