"""The backends of one loop: the first that works decodes; if it fails, the next one tries within the same deadline.

Threads beside the loop decode where a backend may have to be left behind, and try failed ones again.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..backends.replay import replay
from ..bundle.arrays import AnyArray, Codes, Float32Array, Float64Array
from ..bundle.comparison import action_errors
from ..bundle.errors import InferenceError, InvalidInputError
from ..bundle.gates import GATES
from ..bundle.validation import check_whether_stats
from ..tokenizer import ActionTokenizer, codes_of
from .config import ControlConfig, OutOfRange, Status
from .errors import in_words, is_from_outside, message_of
from .guard import ActionGuard
from .health import Health

_LOG = logging.getLogger(__name__)
_INT32 = np.dtype(np.int32)
_OK, _DEADLINE_MISS, _BAD_TOKEN, _NONFINITE = Status.OK, Status.DEADLINE_MISS, Status.BAD_TOKEN, Status.NONFINITE
_OUT_OF_RANGE, _BACKEND_FAULT = Status.OUT_OF_RANGE, Status.BACKEND_FAULT
#: Faults of a backend, not of what it was given.
FAILURES = frozenset((_BACKEND_FAULT, _NONFINITE, _DEADLINE_MISS))
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
        # A policy sends another array each time. Where the backend looks at the values itself, to copy them into an
        # array that comes again takes less than to check one that was never seen.
        is_known_again = model.chunk_length <= tokenizer.backend.checked_steps and not model.has_stats
        #: Arrays for tokens int32, by the length of the last axis.
        self._slots = {
            prefix: np.zeros(model.tokens_shape(1, prefix), np.int32) for prefix in model.prefixes if is_known_again
        }
        tokenizer.warmup()
        self.probe = codes_of(tokenizer, np.zeros_like(self.out))
        golden = tokenizer.golden
        # Not all of them: other threads may have to wait for Python's lock meanwhile.
        self._golden = None if golden is None else golden.every(-(-len(golden.actions) // _PROBES))
        self._answers = [] if golden is not None else self._answer_probes()

    def spoil(self) -> None:
        """Fill `out` with NaN: a backend that leaves a part unwritten must not pass off the last chunk as this one."""
        self._bytes[:] = self._spoilt

    def decode(self, tokens: AnyArray, stats: Float32Array | None) -> None:
        """Decode tokens of a legal shape and type into `out`. Raises whatever the tokenizer raises."""
        own = self._slots.get(tokens.shape[-1])
        if own is not None and tokens.dtype == _INT32:
            own[...] = tokens
            tokens = own
        self.tokenizer.decode_into(tokens, self.out, stats)

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
        """Codes from all over the range for every graph, and cut as short as they may be, and what they decode to."""
        model = self.tokenizer.model
        shape = (_PROBES, model.chunk_length, model.action_dim)
        chunks = np.random.default_rng(0).uniform(-1, 1, shape) * model.action_units + model.action_offset
        whole = codes_of(self.tokenizer, chunks.astype(np.float32))
        parts = [whole.prefix(prefix) for prefix in sorted({model.prefixes[0], *model.decoder_graphs})]
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
                np.zeros(model.tokens_shape(1, prefix), np.int32),
                np.zeros(model.stats_shape(1, prefix), np.float32) if model.has_stats else None,
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
        """Start decoding tokens of a legal shape, and stats where the bundle has any; only while nothing is pending."""
        own_tokens, own_stats = self._slots[tokens.shape[-1]]
        np.copyto(own_tokens, tokens, casting="unsafe")
        if stats is not None and own_stats is not None:
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


class BackendChain:
    """What a loop asks for actions, and nobody else.

    `decode` leaves `chunk` float32 [T, A], `used`, `fell_back` and `detail` behind. A backend that has failed is tried
    again in another thread, and used again once `WarmTokenizer.works` says that it answers rightly. Making a chain runs
    every backend once, and raises what a broken one raises.
    """

    def __init__(
        self,
        tokenizers: Sequence[ActionTokenizer],
        config: ControlConfig,
        guard: ActionGuard,
        clock: Callable[[], int],
        health: Health,
    ) -> None:
        self._model = model = tokenizers[0].model
        self.warm = [WarmTokenizer(tokenizer, index) for index, tokenizer in enumerate(tokenizers)]
        self._workers = [DecodeWorker(found) for found in self.warm] if config.use_worker else []
        self._retriers: list[Retrier] = []
        self._config, self._guard, self._clock = config, guard, clock
        self._highest = model.vocabulary - 1
        self._is_limiting = config.out_of_range is OutOfRange.LIMIT
        self._health = health
        self.chunk: Float32Array = self.warm[0].chunk
        self.used = self.warm[0]
        self.fell_back, self.detail = False, ""

    def start(self) -> None:
        """Retry what fails, from now on: the rehearsal is over."""
        self._health.backend = self.warm[0].name
        if len(self.warm) > 1 or self._workers:
            self._retriers = [
                Retrier(found, worker, self._config, self._health)
                for found, worker in itertools.zip_longest(self.warm, self._workers)
            ]

    def close(self) -> None:
        for retrier in self._retriers:
            retrier.close()
        for worker in self._workers:
            worker.close()

    def decode(self, tokens: AnyArray, stats: object, deadline_ns: int | None) -> Status:
        """Decode tokens of a legal shape and type; values may still be illegal."""
        self.fell_back, active = False, self.warm[0]
        if not active.is_healthy:
            # Once more: the tick that found the failure may have been broken off before it asked for a retry.
            if self._retriers:
                self._retriers[active.index].start()
            # If none is healthy, the first one is as good as any.
            active = self._beside(active) or active
        health = self._health
        if health.backend is not active.name:
            health.backend = active.name
        other = self._beside(active) if self._workers else None
        status = self._decode_on(active, tokens, stats, deadline_ns, has_other=other is not None)
        if status in FAILURES:
            return self._fall_back(active, status, tokens, stats, deadline_ns)
        return status

    def _fall_back(
        self, failed: WarmTokenizer, status: Status, tokens: AnyArray, stats: object, deadline_ns: int | None
    ) -> Status:
        self._retry(failed)
        other, reason = self._beside(failed), self.detail
        # If no time is left, the other one decodes from the next chunk on.
        if other is None or (deadline_ns is not None and self._clock() >= deadline_ns):
            return status
        self._health.fallbacks += 1
        self._health.backend = other.name
        status = self._decode_on(other, tokens, stats, deadline_ns, has_other=False)
        if status in FAILURES:
            self._retry(other)
            self.detail = f"{reason}; {other.name} instead: {self.detail}"
        elif status is _OK or (status is _OUT_OF_RANGE and self._is_limiting):
            self.fell_back, self.detail = True, f"{reason}; decoded on {other.name} instead"
        return status

    def _retry(self, warm: WarmTokenizer) -> None:
        if self._retriers:
            warm.is_healthy = False
            self._retriers[warm.index].start()

    def _beside(self, warm: WarmTokenizer) -> WarmTokenizer | None:
        return next((found for found in self.warm if found.is_healthy and found is not warm), None)

    def _decode_on(
        self, warm: WarmTokenizer, tokens: AnyArray, stats: Any, deadline_ns: int | None, *, has_other: bool
    ) -> Status:
        self.used = warm
        left_s = 0.0 if deadline_ns is None else (deadline_ns - self._clock()) / 1e9
        try:
            if self._workers:
                # Half of the time, where another backend can use the rest.
                if not self._decode_in_worker(
                    self._workers[warm.index], tokens, stats, left_s / 2 if has_other else left_s
                ):
                    self.detail = (
                        f"backend {warm.name} has not answered in time, and may hang; expected within deadline_us: it "
                        "is left behind until it answers"
                    )
                    return _DEADLINE_MISS
            else:
                warm.spoil()
                warm.decode(tokens, stats)
        except InvalidInputError as error:
            self.detail = message_of(error)
            return _BAD_TOKEN
        except BaseException as error:  # whatever a library raises, the robot must not
            if is_from_outside(error):
                raise
            self.detail = f"{warm.name}: {in_words(error)}"
            return _BACKEND_FAULT
        self.chunk = warm.chunk
        status = self._guard.check_chunk(warm.chunk)
        if status is not _OK:
            broken = f"backend {warm.name} gave values that are not finite; expected numbers: run selftest"
            self.detail = broken if status is _NONFINITE else self._guard.outside
        return status

    def _decode_in_worker(self, worker: DecodeWorker, tokens: AnyArray, stats: Any, left_s: float) -> bool:
        """False if it has not answered in time."""
        if tokens.dtype != np.int32 and not ((tokens >= 0) & (tokens <= self._highest)).all():
            raise InvalidInputError(
                f"not all tokens are 0 ... {self._highest}; expected these alone: look at the policy"
            )
        if stats is not None:
            check_whether_stats(stats, self._model)
            shape = self._model.stats_shape(1, tokens.shape[-1])
            if type(stats) is not np.ndarray or stats.dtype != np.float32 or stats.shape != shape:
                raise InvalidInputError("stats have a wrong form; expected float32 [1, T, l, 2] as encoding gave them")
        if left_s <= 0:
            # Whether it could still answer would be chance.
            return False
        end = time.monotonic() + left_s
        if worker.is_pending:
            # It was left behind and may answer meanwhile, or a tick was broken off before it woke the worker.
            worker.wake()
            if not worker.wait_until(end):
                return False
        worker.warm.spoil()
        worker.ask(tokens, stats)
        if not worker.wait_until(end):
            return False
        if worker.error is not None:
            # SystemExit and the like would end the worker's thread, and must not end the loop.
            raise worker.error if isinstance(worker.error, Exception) else InferenceError(in_words(worker.error))
        return True
