"""Threads beside the loop: decoders that can be left behind, retries of failed ones, log lines and records."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from ..backends.replay import replay
from ..bundle.arrays import AnyArray, Codes, Float32Array, Float64Array
from ..bundle.comparison import action_errors
from ..bundle.gates import GATES
from ..bundle.paths import as_path
from ..tokenizer import ActionTokenizer, codes_of
from .config import ControlConfig, Status
from .errors import in_words
from .health import Health
from .recorder import FlightRecorder, write_record

_LOG = logging.getLogger(__name__)
#: So that a loop that fails again and again does not fill the disk.
_MOST_RECORDS = 100
#: Incidents that wait to be told while the disk or a log's handler hangs.
_MOST_WAITING = 256
_LONGEST_RETRY_S = 60.0
#: A retry takes as long as a decode, unless it hangs.
_CLOSE_S = 1.0
#: How many chunks a failed backend has to decode rightly before it is used again.
_PROBES = 16


class WarmTokenizer:
    """A tokenizer that has decoded already. `is_healthy` is cleared by the loop alone."""

    def __init__(self, tokenizer: ActionTokenizer, index: int) -> None:
        model = tokenizer.model
        self.tokenizer, self.index, self.name = tokenizer, index, tokenizer.backend.name
        self.is_healthy = True
        self.out = np.zeros((1, model.chunk_length, model.action_dim), np.float32)
        self.chunk: Float32Array = self.out[0]
        # numpy's own `fill` takes more than twice as long.
        self._bytes, self._spoilt = self.out.data.cast("B"), np.full_like(self.out, np.nan).tobytes()
        tokenizer.warmup()
        self.probe = codes_of(tokenizer, np.zeros_like(self.out))
        golden = tokenizer.golden
        # Not all of them: other threads may have to wait for Python's lock meanwhile.
        self._golden = None if golden is None else golden.every(-(-len(golden.actions) // _PROBES))
        self._answers = [] if golden is not None else self._answer_probes()

    def spoil(self) -> None:
        """Fill `out` with NaN: a backend that leaves a part unwritten must not pass off the last chunk as this one."""
        self._bytes[:] = self._spoilt

    def works(self) -> bool:
        """Whether it answers as the reference does; without golden vectors, as it did at the start.

        Raises whatever it raises.
        """
        model = self.tokenizer.model
        if self._golden is not None:
            return replay(self._golden, model, self.tokenizer.backend).passed
        return all(
            action_errors(expected, self.tokenizer.decode(*codes), model.action_units).value <= GATES.action_error
            for codes, expected in self._answers
        )

    def _answer_probes(self) -> list[tuple[Codes, Float64Array]]:
        """Codes from all over the range, cut after every prefix, and what they decode to now."""
        model = self.tokenizer.model
        shape = (_PROBES, model.chunk_length, model.action_dim)
        chunks = np.random.default_rng(0).uniform(-1, 1, shape) * model.action_units + model.action_offset
        whole = codes_of(self.tokenizer, chunks.astype(np.float32))
        parts = [whole.prefix(prefix) for prefix in model.prefixes]
        return [(codes, self.tokenizer.decode(*codes).astype(np.float64)) for codes in parts]


class _Bell:
    """Wakes one thread. May be rung from any thread, again and again, also where a signal's handler may raise.

    A threading.Event stays locked for ever where such a handler comes within `set`: the next tick would hang in it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        # One call that is all or nothing.
        try:
            self._lock.release()
        except RuntimeError:
            """It rings already."""

    def wait(self, timeout_s: float = -1) -> bool:
        """Wait until it is rung, or return at once if it was since the last time; False after `timeout_s`."""
        return self._lock.acquire(True, timeout_s)


class DecodeWorker:
    """Decodes in a thread of its own, so that the loop can stop waiting. Called by the loop alone.

    Tokens are copied in: a worker that is left behind reads its own copy, and writes where nobody else looks.
    """

    def __init__(self, warm: WarmTokenizer) -> None:
        model = warm.tokenizer.model
        self.warm = warm
        # Counters, not the state of a lock: a signal's handler may raise between any two instructions.
        self._asked = self._answered = 0
        self.error: BaseException | None = None
        self._slots = {
            prefix: (
                np.zeros((1, model.chunk_length, model.latent_dim, prefix), np.int32),
                np.zeros((1, model.chunk_length, prefix, 2), np.float32),
            )
            for prefix in model.prefixes
        }
        self._given = warm.probe
        self._go, self._done = _Bell(), _Bell()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=f"control decode {warm.name}", daemon=True)
        self._thread.start()

    @property
    def is_pending(self) -> bool:
        """Whether it has not answered yet; may be asked from any thread."""
        return self._asked != self._answered

    def wait_until(self, end_s: float) -> bool:
        """Whether it has answered by `end_s` on `time.monotonic()`; the answer is `error` or `warm.out`."""
        while self.is_pending:
            if not self._done.wait(max(end_s - time.monotonic(), 0.0)):
                return not self.is_pending
        return True

    def ask(self, tokens: AnyArray, stats: Float32Array | None) -> None:
        """Start decoding tokens of a legal shape [1, T, D, l]; only while nothing is pending."""
        own_tokens, own_stats = self._slots[tokens.shape[3]]
        np.copyto(own_tokens, tokens, casting="unsafe")
        if stats is not None:
            np.copyto(own_stats, stats)
        self._given = Codes(own_tokens, None if stats is None else own_stats)
        self.error = None
        self._asked += 1
        self.wake()

    def wake(self) -> None:
        """Wake the thread if something is pending; harmless if it is awake."""
        self._go.ring()

    def close(self) -> None:
        """End the thread. One that hangs is left behind, and ends when its backend answers, or with the process."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self.is_pending:
            self.wake()
            self._thread.join()

    def _run(self) -> None:
        while not self._is_closed:
            self._go.wait()
            if self._is_closed:
                return
            if not self.is_pending:
                continue
            try:
                self.warm.tokenizer.decode_into(self._given.tokens, self.warm.out, self._given.stats)
            except BaseException as error:  # handed to the loop, which says what it was
                self.error = error
            self._answered = self._asked
            self._done.ring()


class Retrier:
    """Tries a failed tokenizer again in a thread of its own, less and less often, until it answers rightly."""

    def __init__(self, warm: WarmTokenizer, worker: DecodeWorker | None, config: ControlConfig, health: Health) -> None:
        self._warm, self._worker, self._first_s, self._health = warm, worker, config.retry_after_s, health
        self._failed, self._end, self._is_closed = _Bell(), _Bell(), False
        self._thread = threading.Thread(target=self._run, name=f"control retry {warm.name}", daemon=True)
        self._thread.start()

    def start(self) -> None:
        self._failed.ring()

    def close(self) -> None:
        """End the thread; one that hangs in its backend is left behind."""
        self._is_closed = True
        self._end.ring()
        self._failed.ring()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while True:
            self._failed.wait()
            pause = self._first_s
            while not self._warm.is_healthy and not self._end.wait(pause):
                pause = min(2 * pause, _LONGEST_RETRY_S)
                is_free = self._worker is None or not self._worker.is_pending
                if is_free and self._succeeds():
                    self._health.recoveries += 1
                    self._warm.is_healthy = True
                    _LOG.warning("backend %s answers rightly again, and is used again", self._warm.name)
            if self._is_closed:
                return

    def _succeeds(self) -> bool:
        try:
            return self._warm.works()
        except BaseException as error:  # whatever it is, the backend does not work yet
            _LOG.info("backend %s still fails: %s", self._warm.name, in_words(error))
            return False


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
