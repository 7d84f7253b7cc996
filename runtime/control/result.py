"""What a tick is answered with, and what it leaves to the next.

A tick may be broken off between any two of its steps, by what a signal's handler raises. So nothing is cleaned up
afterwards: from its beginning on a `BrokenOff` is shown, which stands still; the tick is put together in an `Outcome`
that nobody sees; and one assignment shows it when it is whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..bundle.arrays import Float32Array
from .config import Status
from .state import NO_NUMBER

BROKEN_OFF = "the tick was broken off"
NO_STAMPS = NO_NUMBER, NO_NUMBER
ADVICE = "it was raised from outside; send this action, or stop the robot"


@dataclass(slots=True, eq=False)
class Outcome:
    """One tick, whole; not altered while it is shown. values: `actions` as numbers of Python, of float32 in value.

    For the books alone: begin, by the clock, NO_NUMBER where it has not said; stamps, the sequence and observed_ns that
    came; is_accepted, whether the chunk was; rows, of the flight recorder, this tick's included.
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
    begin: int = NO_NUMBER
    stamps: tuple[int, int] = NO_STAMPS
    is_accepted: bool = False
    rows: int = 0

    def __post_init__(self) -> None:
        self.actions = np.array(self.values, np.float32)


class BrokenOff:
    """Stand still, after what was sent `before`; to whoever looks, an `Outcome`.

    Nothing is computed before: to show it takes one assignment, and no call that could fail. hold: the values that
    stand still after those that were sent.
    """

    __slots__ = ("_hold", "before", "detail")

    def __init__(self, hold: Callable[[list[float]], list[float]], before: Outcome) -> None:
        self._hold, self.before = hold, before
        self.detail = f"{BROKEN_OFF}; {ADVICE}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.settled(), name)

    def settled(self) -> Outcome:
        """The same as an outcome of its own, which needs no decoder any more."""
        before = self.before
        return Outcome(
            self._hold(before.values),
            before.status if before.is_latched else Status.BACKEND_FAULT,
            before.tick + 1,
            before.sequence,
            is_latched=before.is_latched,
            backend=before.backend,
            detail=self.detail,
            rows=before.rows,
        )


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
