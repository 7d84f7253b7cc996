"""The log of every tick: counts, a row of the flight record, a line in the log. No fault in it costs an action."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .config import ControlConfig, OnFault, Status
from .errors import in_words
from .health import Health
from .recorder import RESET, FlightRecorder
from .result import INTERNAL, NO_NUMBER, LoopState, TickOutcome
from .worker import Reporter

_OK, _NOT_READY = Status.OK, Status.NOT_READY


class TickLog:
    """The log of one loop, which alone calls it. reporter: set between `warmup` and `close`."""

    reporter: Reporter | None = None

    def __init__(
        self, config: ControlConfig, clock: Callable[[], int], recorder: FlightRecorder | None, health: Health
    ) -> None:
        self.health = health
        self._clock, self._recorder = clock, recorder
        self._stops, self._most_faults = config.on_fault is OnFault.STOP, config.max_consecutive_faults
        self._last_status = _OK

    def close_tick(self, out: TickOutcome, state: LoopState, tokens: object, stats: object) -> None:
        """Complete `out`: its status and action are chosen, and its number is still that of the tick shown last."""
        health, status, is_held = self.health, out.status, out.is_held
        failures = health.internal_faults
        if is_held and status is not _NOT_READY:
            state.faults += 1
            if state.latched is None and (self._stops or 0 < self._most_faults <= state.faults):
                state.latched = status
        else:
            state.faults = 0
        # Without a clock no tick is counted, but no two are shown under one number.
        tick, shown = state.line[0], out.tick
        out.tick = tick if tick > shown else shown + 1
        out.is_latched = health.is_latched = state.latched is not None
        health.statuses[status] += 1
        if is_held:
            health.held += 1
        latency = 0
        try:
            if out.begin != NO_NUMBER:
                latency = self._clock() - out.begin
            health.latency.add(latency)
        except Exception as error:  # the action is chosen already
            self._excuse(out, "the clock or the histogram", error)
        out.latency_ns = latency
        self._record(out, state, tokens, stats)
        is_broken = health.internal_faults != failures
        if status is not _OK or out.fell_back or self._last_status is not _OK or is_broken:
            self._report(out, is_broken)

    def begin_anew(self, out: TickOutcome) -> None:
        """Start again from `out`, which says where the robot is."""
        self._last_status = _OK
        self.health.is_latched = False
        self._record(out, LoopState(), flags=RESET)

    def make_up_for(self, out: TickOutcome, state: LoopState) -> None:
        """Note a tick that was broken off, for which `out` was shown; what it noted itself is struck out."""
        self.health.statuses[out.status] += 1
        self.health.held += 1
        if self._recorder is not None:
            self._recorder.written = out.rows
        self._record(out, dataclasses.replace(state, used=INTERNAL))

    def _record(
        self, out: TickOutcome, state: LoopState, tokens: object = None, stats: object = None, flags: int = 0
    ) -> None:
        if self._recorder is None:
            return
        try:
            self._recorder.add(out, state, tokens, stats, flags)
        except Exception as error:  # a record is worth no tick
            self._excuse(out, "the flight recorder", error)
        out.rows = self._recorder.written

    def _report(self, out: TickOutcome, is_broken: bool) -> None:
        status = out.status
        is_news = (status is not self._last_status and status not in (_OK, _NOT_READY)) or out.fell_back
        self._last_status = status
        try:
            self.health.incidents += is_news
            if (is_news or is_broken) and self.reporter is not None:
                self.reporter.incident(status, out.tick, out.detail, out.is_held)
        except Exception as error:  # a log line is worth no tick
            self._excuse(out, "the reporter", error)

    def _excuse(self, out: TickOutcome, what: str, error: Exception) -> None:
        self.health.internal_faults += 1
        out.detail = f"{out.detail or 'the action is good'}; {what} failed: {in_words(error)}"
