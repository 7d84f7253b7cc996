"""The log of every tick: counts, a row of the flight record, a line in the log. No fault in it costs an action.

A thread beside the loop writes lines and records.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ..bundle.paths import as_path
from .config import ControlConfig, OnFault, Status
from .errors import in_words
from .health import Health
from .recorder import RESET, FlightRecorder, write_record
from .result import INTERNAL, NO_NUMBER, LoopState, TickOutcome

_LOG = logging.getLogger(__name__)
#: So that a loop that fails again and again does not fill the disk.
_MOST_RECORDS = 100
#: Incidents that wait to be told while the disk or a log's handler hangs.
_MOST_WAITING = 256
_OK, _NOT_READY = Status.OK, Status.NOT_READY


class Reporter:
    """Writes log lines and flight records off the loop, which only puts what is to be told into a bounded queue."""

    def __init__(
        self, config: ControlConfig, health: Health, recorder: FlightRecorder | None, meta: dict[str, Any]
    ) -> None:
        self._config, self._health, self._recorder, self._meta = config, health, recorder, meta
        # `put` is all or nothing, whatever a signal's handler raises. None ends the thread.
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._logged: dict[Status, float] = {}
        self._suppressed: dict[Status, int] = {}
        self._recorded = -float("inf")
        self._records = 0
        self._thread = threading.Thread(target=self._run, name="control reporter", daemon=True)
        self._thread.start()

    def incident(self, status: Status, tick: int, detail: str, is_held: bool) -> None:
        """Report a tick; it is left out if too many wait to be reported already."""
        if self._tasks.qsize() < _MOST_WAITING:
            self._tasks.put(functools.partial(self._report, status, tick, detail, is_held))

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until everything so far is reported; False after `timeout_s`."""
        reached = threading.Event()
        self._tasks.put(reached.set)
        return reached.wait(timeout_s)

    def close(self) -> None:
        self._tasks.put(None)
        self._thread.join(10.0)

    def _run(self) -> None:
        for task in iter(self._tasks.get, None):
            try:
                task()
            except Exception as error:  # the next incident is still to be reported
                self._health.internal_faults += 1
                _LOG.error("an incident cannot be reported: %s", in_words(error))

    def _report(self, status: Status, tick: int, detail: str, is_held: bool) -> None:
        now = time.monotonic()
        if now - self._logged.get(status, -float("inf")) < self._config.log_interval_s:
            self._suppressed[status] = self._suppressed.get(status, 0) + 1
        else:
            self._logged[status] = now
            more = self._suppressed.pop(status, 0)
            suffix = f" ({more} more since the last line)" if more else ""
            action = "standing still" if is_held else "service goes on"
            _LOG.warning("tick %d: %s, %s: %s%s", tick, status.name, action, detail, suffix)
        is_due = now - self._recorded >= self._config.record_interval_s and self._records < _MOST_RECORDS
        if is_held and self._recorder is not None and self._config.record_folder is not None and is_due:
            self._recorded = now
            self._records += 1
            self.write(as_path(self._config.record_folder) / f"flight-{time.time_ns()}-tick{tick}.npz")

    def write(self, path: Path) -> bool:
        """The ring as it is now, to `path`; False, counted and logged, where the disk refuses."""
        assert self._recorder is not None
        try:
            write_record(path, self._recorder.copy(), self._meta)
        except OSError as error:
            self._health.records_failed += 1
            _LOG.error("the flight record %s cannot be written: %s; make room or change record_folder", path, error)
            return False
        self._health.records_written += 1
        _LOG.warning("flight record: %s", path)
        return True


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
