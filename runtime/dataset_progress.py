"""How far a conversion is: one line, with rate and time left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 10.0


class Progress:
    """Counts steps from any thread. On a terminal the line is renewed; elsewhere one is printed every ten seconds."""

    def __init__(self, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._before, self._done, self._clock = total, done, done, clock
        self._lock = threading.Lock()
        self._started = self._shown = clock()
        self._finished: float | None = None
        self._is_terminal = sys.stderr.isatty()

    def begin(self) -> None:
        """Start the clock anew: what came before was no work on steps."""
        self._started = self._clock()

    def add(self, steps: int) -> None:
        with self._lock:
            self._done += steps

    def line(self) -> str:
        """The rate is that of this run; what an earlier run did counts as done alone."""
        rate, done = self.rate, self._before + self.steps
        left = f"{duration((self._total - done) / rate)} left" if rate > 0 else "time left unknown"
        return f"{done:,} of {self._total:,} steps, {done / self._total:.1%}, {rate / 1e6:.2f} million steps/s, {left}"

    def show(self) -> None:
        """Print the line where the last one is old enough."""
        now = self._clock()
        if now - self._shown < (_TERMINAL_SECONDS if self._is_terminal else _LOG_SECONDS):
            return
        self._shown = now
        print(
            f"\r\x1b[K{self.line()}" if self._is_terminal else self.line(), end=self._end, file=sys.stderr, flush=True
        )

    def finish(self) -> None:
        """Stop the clock, and make room for other lines."""
        self._finished = self._clock()
        if self._is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    @property
    def steps(self) -> int:
        """Of this run."""
        with self._lock:
            return self._done - self._before

    @property
    def seconds(self) -> float:
        return (self._clock() if self._finished is None else self._finished) - self._started

    @property
    def rate(self) -> float:
        """Steps a second, of this run."""
        seconds = self.seconds
        return self.steps / seconds if seconds > 0 else 0.0

    @property
    def _end(self) -> str:
        return "" if self._is_terminal else "\n"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
