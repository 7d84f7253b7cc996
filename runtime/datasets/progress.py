"""How far a conversion is: one line, with rate and time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..bundle.console import ProgressLine, duration
from ..bundle.paths import counted

#: A shorter run has no rate worth showing: most of its time went into starting.
_RATE_SECONDS = 1.0


class Progress:
    """Counts steps, from any thread, and shows how far the conversion is."""

    def __init__(
        self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic, *, unit: str = "step"
    ) -> None:
        """unit: what is counted, the steps or the chunks of a conversion."""
        self.unit = unit
        self._total, self._before, self._done, self._clock = total, done, done, clock
        self._lock = threading.Lock()
        self._started = clock()
        self._finished: float | None = None
        self._shown = ProgressLine(clock)

    def begin(self) -> None:
        """Start the clock again: so far nothing was converted."""
        self._started = self._clock()

    def add(self, steps: int) -> None:
        with self._lock:
            self._done += steps

    def line(self) -> str:
        """Steps done, rate and time left. Steps of an earlier run count as done, but not towards the rate."""
        rate, done = self.rate, self._before + self.steps
        left = f"{duration((self._total - done) / rate)} left" if rate > 0 else "time left unknown"
        speed = f"{self.speed}, " if self.speed else ""
        return f"{done:,} of {counted(self._total, self.unit)}, {done / self._total:.1%}, {speed}{left}"

    def show(self) -> None:
        """Print the line where the last one is old enough."""
        self._shown.show(self.line())

    def finish(self) -> None:
        """Stop the clock, and make room for other lines."""
        self._finished = self._clock()
        self._shown.clear()

    @property
    def steps(self) -> int:
        """Steps that this run has done."""
        with self._lock:
            return self._done - self._before

    @property
    def seconds(self) -> float:
        return (self._clock() if self._finished is None else self._finished) - self._started

    @property
    def rate(self) -> float:
        """Steps a second in this run."""
        seconds = self.seconds
        return self.steps / seconds if seconds > 0 else 0.0

    @property
    def speed(self) -> str:
        """The rate in words; empty where too little was done to tell."""
        rate = self.rate
        if not rate or self.seconds < _RATE_SECONDS:
            return ""
        return f"{rate / 1e6:.2f} million {self.unit}s/s" if rate >= 1e5 else f"{rate:,.0f} {self.unit}s/s"
