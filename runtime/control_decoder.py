"""`ControlDecoder`: between the tokens of a policy and a moving robot, one action per tick, and never a surprise."""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from runtime.contract import Float32Array
from runtime.control_config import ControlConfig, OnFault, OutOfRange, Status
from runtime.control_errors import ControlConfigError, ControlFaultError, WrongThreadError
from runtime.control_guard import ActionGuard
from runtime.control_health import Health, HealthSnapshot
from runtime.control_queue import ActionQueue
from runtime.control_recorder import FELL_BACK, HELD, LATCHED, FlightRecorder
from runtime.control_worker import DecodeWorker, Reporter, Retrier, WarmTokenizer
from runtime.errors import InvalidInputError
from runtime.tokenizer import ActionTokenizer

_TOKEN_TYPES = (np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.uint8))
_NEVER = -(2**62)


class ControlResult:
    """One tick. There is one object for all of them: it and `actions` are valid until the next `step`.

    actions: float32 [A], always inside limits and slew. is_held: they tell the robot to stand still. is_limited: the
    slew limit holds them back. is_latched: until `reset()`. fell_back: to `backend`, on this tick, because the one
    before failed. detail: what was found, expected and what to do; empty for OK.
    """

    __slots__ = (
        "actions",
        "backend",
        "detail",
        "fell_back",
        "is_held",
        "is_latched",
        "is_limited",
        "latency_ns",
        "sequence",
        "status",
        "tick",
    )

    def __init__(self, action_dim: int) -> None:
        self.actions: Float32Array = np.zeros(action_dim, np.float32)
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

    @property
    def latency_us(self) -> float:
        return self.latency_ns / 1e3

    def __repr__(self) -> str:
        held = ", held" if self.is_held else ""
        return f"ControlResult({self.status.name}{held}, {self.actions.tolist()}, {self.latency_us:.1f} us)"


class ControlDecoder:
    """One action per tick from chunks of tokens, with a status that says whether it can be trusted.

    For one thread: the one that calls `warmup()`. From another, `step` and `reset` raise WrongThreadError; `health`,
    `snapshot()` and `openmetrics()` may be read from any. One decoder per robot and process.

    fallbacks: tokenizers of the same bundle on other backends, tried in this order. position: the command that the
    robot obeys now, needed where a dimension is absolute or a gripper. clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        tokenizer: ActionTokenizer,
        config: ControlConfig,
        *,
        fallbacks: Sequence[ActionTokenizer] = (),
        position: Sequence[float] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        model = tokenizer.model
        if config.action_dim != model.action_dim:
            raise ControlConfigError(
                f"the settings have {config.action_dim} action dimensions; expected {model.action_dim}, as the bundle "
                "has: complete them, or load the bundle of this robot"
            )
        for other in fallbacks:
            if other.fingerprint != tokenizer.fingerprint:
                raise ControlConfigError(
                    f"a fallback has the fingerprint {other.fingerprint}; expected {tokenizer.fingerprint}: its tokens "
                    "mean something else; load the same bundle with another backend"
                )
        self.config, self._clock = config, clock
        self._tokenizers = (tokenizer, *fallbacks)
        self._length, self._tail = model.chunk_length, (1, model.chunk_length, model.latent_dim)
        self._prefixes, self._highest = frozenset(model.prefixes), model.num_levels - 1
        self._guard = ActionGuard(config, model.chunk_length, position)
        self._queue = ActionQueue(config, model.chunk_length)
        self._target: Float32Array = np.zeros(model.action_dim, np.float32)
        self.result = ControlResult(model.action_dim)
        self._guard.hold(self.result.actions)
        self.health = Health()
        token_shape = (model.chunk_length, model.latent_dim, model.num_layers)
        self._recorder = (
            FlightRecorder(config.record_ticks, token_shape, model.action_dim) if config.record_ticks else None
        )
        self._meta: dict[str, Any] = {
            "config": config.to_values(),
            "fingerprint": tokenizer.fingerprint,
            "token_shape": token_shape,
            "backends": [found.backend.name for found in self._tokenizers],
        }
        self._period_ns = max(1, round(config.period_s * 1e9))
        self._stale_ns = round(config.stale_after_s * 1e9)
        self._owner: int | None = None
        self._warm: list[WarmTokenizer] = []
        self._workers: list[DecodeWorker] = []
        self._retriers: list[Retrier] = []
        self._reporter: Reporter | None = None
        self._deadline_ns = 0
        self._tick, self._start, self._faults, self._layers, self._used = 0, 0, 0, 0, 0
        self._sequence, self._observed, self._last_begin = -1, _NEVER, _NEVER
        self._latched: Status | None = None
        self._last_status = Status.OK
        self._has_chunk = self._was_limited = False
        self._is_limiting = config.out_of_range is OutOfRange.LIMIT
        self._start_anew()

    def warmup(self) -> None:
        """Run everything once; the calling thread is the loop's from now on. Raises what a broken backend raises."""
        if self._warm:
            raise ControlConfigError("warmup() was called before; expected once per decoder: call reset() to go on")
        warm = [WarmTokenizer(tokenizer, index) for index, tokenizer in enumerate(self._tokenizers)]
        self._owner = threading.get_ident()
        health = Health()
        if self.config.use_worker:
            self._workers = [DecodeWorker(found) for found in warm]
        self._warm, self.health = warm, health
        position = self._guard.last.tolist()
        for found in warm:
            # Ticks whose outcome is thrown away: every branch of a good one has run, every cache is filled.
            for _ in range(self._length + 2):
                self._practise(found)
        self._guard.reset(position)
        self._start_anew()
        self.health = health = Health()
        health.backend = warm[0].name
        self._reporter = Reporter(self.config, health, self._recorder, self._meta)
        if len(warm) > 1 or self._workers:
            self._retriers = [Retrier(found, self.config, health, self._freedom_of(found)) for found in warm]
        if self._recorder is not None:
            self._recorder.written = 0

    def step(
        self,
        tokens: object = None,
        *,
        deadline_us: float | None = None,
        stats: Float32Array | None = None,
        sequence: int | None = None,
        observed_ns: int | None = None,
    ) -> ControlResult:
        """The action of this tick. Call it once per tick, with the tokens [1, T, D, l] that have arrived, or None.

        deadline_us: from now, in place of the settings' own. stats: float32 [1, T, l, 2], for `dynamic` bundles.
        sequence: of the chunk, counting up; the same one with more layers replaces a draft by its full decode.
        observed_ns: when the policy looked, on this decoder's clock: action i is for that time + i periods.

        Raises WrongThreadError from another thread, ControlFaultError where `on_fault` is `raise`; nothing else.
        """
        result = self.result
        if threading.get_ident() != self._owner:
            return self._refuse_thread()
        pauses = self.config.pause_gc and gc.isenabled()
        if pauses:
            gc.disable()
        try:
            self.health.last_tick_ns = time.monotonic_ns()
            begin = self._clock()
            deadline_ns = self._deadline_of(deadline_us)
            self._deadline_ns = 0 if deadline_ns is None else begin + deadline_ns
            try:
                status = self._decide(begin, tokens, stats, sequence, observed_ns)
            except Exception as error:  # nothing may leave the loop but an action that is safe
                status = self._explain(Status.BACKEND_FAULT, f"{type(error).__name__}: {error}; report it as a bug")
                result.is_held = True
                self._queue.clear()
            if not result.is_held and deadline_ns is not None and self._clock() > self._deadline_ns:
                status = self._explain(
                    Status.DEADLINE_MISS,
                    f"the action was there after {(self._clock() - begin) / 1e3:.0f} us; expected "
                    f"{deadline_ns / 1e3:.0f}: look at what else runs here, or raise deadline_us",
                )
                result.is_held = True
            if result.is_held:
                result.is_limited = False
                self._guard.hold(result.actions)
            self._guard.commit(result.actions)
            self._finish(status, begin, tokens)
        finally:
            if pauses:
                gc.enable()
        if result.is_held and self.config.on_fault is OnFault.RAISE and status is not Status.NOT_READY:
            raise ControlFaultError(f"{status.name}: {result.detail}")
        return result

    def reset(self, position: Sequence[float] | None = None) -> None:
        """Forget chunks, faults and the latch. position: where the robot is now, as at the start.

        The next tick is NOT_READY until a chunk comes. Raises ControlConfigError for a position outside the limits.
        """
        if self._owner is not None and threading.get_ident() != self._owner:
            self._refuse_thread()
        self._guard.reset(position)
        self._guard.hold(self.result.actions)
        self._start_anew()

    def snapshot(self) -> HealthSnapshot:
        """Counters and latencies since `warmup()`; from any thread."""
        return self.health.snapshot()

    def openmetrics(self) -> str:
        """The same as OpenMetrics text; from any thread."""
        return self.health.openmetrics()

    def write_flight_record(self, path: str | Path) -> bool:
        """The last ticks to `path`, now; not from the loop. False where the disk refuses, which is logged."""
        if self._reporter is None or self._recorder is None:
            raise ControlConfigError("there is no flight record; call warmup(), with record_ticks above 0")
        return self._reporter.write(Path(path))

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until log lines and records are written; not from the loop."""
        return self._reporter is None or self._reporter.flush(timeout_s)

    def close(self) -> None:
        """End the threads beside the loop; the tokenizers stay open."""
        for retrier in self._retriers:
            retrier.close()
        for worker in self._workers:
            worker.close()
        if self._reporter is not None:
            self._reporter.close()
        self._retriers, self._workers, self._reporter = [], [], None
        self._owner = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- one tick -----------------------------------------------------------------------------------------------------

    def _decide(
        self, begin: int, tokens: object, stats: object, sequence: int | None, observed_ns: int | None
    ) -> Status:
        """Status of this tick, and its action in `result.actions` unless `result.is_held`."""
        result = self.result
        result.detail, result.is_held, result.fell_back, result.is_limited = "", False, False, False
        if self._latched is not None:
            result.is_held = True
            self._tick += 1
            self._last_begin = begin
            return self._explain(
                self._latched, "standing still after faults in a row; find the cause, then call reset()"
            )
        status, passed = Status.OK, begin - self._last_begin
        if passed < 0 and self._last_begin != _NEVER:
            self._last_begin, self._tick, result.is_held = begin, self._tick + 1, True
            self._forget_order()
            return self._explain(
                Status.STALE,
                f"the clock went back by {-passed / 1e9:.6f} s; expected a monotonic one: nothing that was observed "
                "before can be dated",
            )
        # Ticks are counted, for a clock that trembles repeats none and skips none; unless whole ones were missed.
        missed = passed > self._period_ns + self._period_ns // 2 and self._last_begin != _NEVER
        self._tick += (passed + self._period_ns // 2) // self._period_ns if missed else 1
        self._last_begin = begin
        if tokens is not None:
            status = self._receive(begin, tokens, stats, sequence, observed_ns)
            if status is not Status.OK:
                self.health.refused_chunks += 1
                if status is Status.DEADLINE_MISS or (status is not Status.STALE and not self._was_limited):
                    result.is_held = True
                    self._queue.clear()
                    return status
        return self._serve(begin, status)

    def _serve(self, begin: int, status: Status) -> Status:
        result = self.result
        if begin - self._observed > self._stale_ns and not self._queue.is_empty:
            self._queue.clear()
            status = self._explain(
                Status.STALE,
                f"the chunk was observed {(begin - self._observed) / 1e9:.3f} s ago; expected at most "
                f"{self.config.stale_after_s:g}: look at the policy, or raise stale_after_s",
            )
        if not self._queue.take(self._tick, self._target):
            result.is_held = True
            if status is not Status.OK:
                return status
            if not self._has_chunk:
                return self._explain(Status.NOT_READY, "no chunk has come yet; send one")
            return self._explain(Status.STALE, "the last chunk has run out; expected a new one: look at the policy")
        if not self._guard.limit(self._target, result.actions):
            result.is_held = True
            self._queue.clear()
            return self._explain(Status.NONFINITE, "the action is not finite; report it as a bug")
        result.is_limited = result.actions.tobytes() != self._target.tobytes()
        return status

    def _receive(
        self, begin: int, tokens: object, stats: object, sequence: int | None, observed_ns: int | None
    ) -> Status:
        """Check, decode and queue a chunk. STALE leaves the older chunk in service; so does a chunk that is limited."""
        self._was_limited = False
        if reason := self._wrong_form(tokens, sequence, observed_ns):
            return self._explain(Status.BAD_TOKEN, reason)
        assert isinstance(tokens, np.ndarray)
        number = self._sequence + 1 if sequence is None else sequence
        observed = begin if observed_ns is None else observed_ns
        layers = tokens.shape[3]
        is_swap = number == self._sequence and observed == self._observed and layers > self._layers
        if reason := self._wrong_order(begin, number, observed, is_swap, observed_ns is not None):
            return self._explain(Status.STALE, reason)
        delay = (begin - observed + self._period_ns // 2) // self._period_ns
        if delay >= self._length:
            return self._explain(
                Status.STALE,
                f"the chunk comes {delay} ticks after its observation and has {self._length} actions; expected one "
                "whose time has not passed: look at the policy's latency",
            )
        status, chunk = self._decode(tokens, stats)
        if status is Status.OUT_OF_RANGE and self._is_limiting:
            self._was_limited = True
        elif status is not Status.OK:
            return status
        assert chunk is not None
        start = self._start if is_swap else self._tick - max(delay, 0)
        self._queue.push(chunk, start, is_swap=is_swap and not self._queue.is_empty)
        self._start, self._sequence, self._observed, self._layers = start, number, observed, layers
        self._has_chunk = True
        self.result.sequence = number
        self.health.chunks += 1
        return status

    def _wrong_form(self, tokens: object, sequence: object, observed_ns: object) -> str:
        """What is wrong with the arguments, or nothing."""
        if type(tokens) is not np.ndarray:
            kind = f"{type(tokens).__module__}.{type(tokens).__qualname__}"
            return f"tokens is a {kind}; expected a numpy.ndarray: pass np.asarray(tokens)"
        if tokens.ndim != 4 or tokens.shape[:3] != self._tail or tokens.shape[3] not in self._prefixes:
            return (
                f"tokens have shape {list(tokens.shape)}; expected {list(self._tail)} and one of the layers "
                f"{sorted(self._prefixes)}: send what the policy gives for one chunk"
            )
        if tokens.dtype not in _TOKEN_TYPES:
            return f"tokens have type {tokens.dtype}; expected int32, int64 or uint8: send levels, not values"
        for name, value in (("sequence", sequence), ("observed_ns", observed_ns)):
            if value is not None and (type(value) is not int or abs(value) >= 2**62):
                return f"{name} is {value!r}; expected an int below 2**62: correct what the policy sends"
        return ""

    def _wrong_order(self, begin: int, number: int, observed: int, is_swap: bool, is_dated: bool) -> str:
        """Why a chunk is not to be used, or nothing."""
        if observed - begin > self._period_ns:
            return (
                f"the chunk was observed {(observed - begin) / 1e9:.3f} s from now; expected the past: use one clock "
                "in both processes"
            )
        if begin - observed > self._stale_ns:
            return (
                f"the chunk was observed {(begin - observed) / 1e9:.3f} s ago; expected at most "
                f"{self.config.stale_after_s:g}: look at the policy, or raise stale_after_s"
            )
        if is_swap or not self._has_chunk:
            return ""
        # A policy that was started anew counts from its beginning; it has looked later than the one before.
        is_restart = is_dated and observed > self._observed and self._is_drained()
        if number <= self._sequence and not is_restart:
            kind = "again" if number == self._sequence else "after a newer one"
            return f"chunk {number} comes {kind}; expected above {self._sequence}: the newer one stays in service"
        if observed < self._observed:
            return (
                f"chunk {number} was observed before chunk {self._sequence}, which came earlier; expected later: the "
                "newer one stays in service"
            )
        return ""

    def _is_drained(self) -> bool:
        return self._queue.is_empty or self._tick - self._start >= self._length

    # --- backends -----------------------------------------------------------------------------------------------------

    def _decode(self, tokens: npt.NDArray[Any], stats: object) -> tuple[Status, Float32Array | None]:
        """On the first backend that works; where it fails, once on the next."""
        first = self._warm[0]
        active = first if first.is_healthy else self._healthy(-1) or first
        if self.health.backend != active.name:
            self.health.backend = active.name
        other = self._healthy(active.index) if len(self._warm) > 1 else None
        status, chunk = self._decode_on(active, tokens, stats, has_other=other is not None)
        is_backend = status in (Status.BACKEND_FAULT, Status.NONFINITE, Status.DEADLINE_MISS)
        if is_backend and (len(self._warm) > 1 or self._workers):
            active.is_healthy = False
            self._retriers[active.index].start()
        # Without time left, the next chunk goes to the other one.
        is_late = bool(self._deadline_ns) and self._clock() >= self._deadline_ns
        if is_backend and other is not None and not is_late:
            reason = self.result.detail
            self.health.fallbacks += 1
            self.health.backend = other.name
            status, chunk = self._decode_on(other, tokens, stats, has_other=False)
            if status is Status.OK:
                self.result.fell_back, self.result.backend = True, other.name
                self.result.detail = f"{reason}; decoded on {other.name} instead"
            elif status in (Status.BACKEND_FAULT, Status.NONFINITE, Status.DEADLINE_MISS):
                other.is_healthy = False
                self._retriers[other.index].start()
        return status, chunk

    def _healthy(self, beside: int) -> WarmTokenizer | None:
        for warm in self._warm:
            if warm.is_healthy and warm.index != beside:
                return warm
        return None

    def _decode_on(
        self, warm: WarmTokenizer, tokens: npt.NDArray[Any], stats: Any, *, has_other: bool
    ) -> tuple[Status, Float32Array | None]:
        self.result.backend, self._used = warm.name, warm.index
        try:
            if self._workers:
                if not self._decode_in_worker(self._workers[warm.index], tokens, stats, has_other):
                    return self._explain(
                        Status.DEADLINE_MISS,
                        f"backend {warm.name} has not answered in time, and may hang; expected within deadline_us: it "
                        "is left behind until it answers",
                    ), None
            else:
                warm.tokenizer.decode_into(tokens, warm.out, stats)
        except InvalidInputError as error:
            return self._explain(Status.BAD_TOKEN, str(error)), None
        except Exception as error:  # whatever a library raises, the robot must not
            return self._explain(Status.BACKEND_FAULT, f"{warm.name}: {type(error).__name__}: {error}"), None
        chunk = warm.out[0]
        status = self._guard.check_chunk(chunk)
        if status is Status.NONFINITE:
            self._explain(
                status, f"backend {warm.name} made of legal tokens what is not finite; expected numbers: run selftest"
            )
        elif status is Status.OUT_OF_RANGE:
            self._explain(status, "limited" if self._is_limiting else self._guard.first_outside(chunk))
        return status, chunk

    def _decode_in_worker(
        self, worker: DecodeWorker, tokens: npt.NDArray[Any], stats: Float32Array | None, has_other: bool
    ) -> bool:
        """False if it is not done in time: half of the time, where another backend can use the rest."""
        if not worker.settle():
            return False
        if tokens.dtype != np.int32 and not ((tokens >= 0) & (tokens <= self._highest)).all():
            raise InvalidInputError(f"tokens are not all 0 ... {self._highest}; expected levels: look at the policy")
        if stats is not None and (
            type(stats) is not np.ndarray or stats.shape != (1, self._length, tokens.shape[3], 2)
        ):
            raise InvalidInputError("stats have a wrong form; expected float32 [1, T, l, 2] as encoding gave them")
        left = (self._deadline_ns - self._clock()) / 1e9
        if not worker.decode(tokens, stats, left / 2 if has_other else left):
            return False
        if worker.error is not None:
            raise worker.error
        return True

    def _freedom_of(self, warm: WarmTokenizer) -> Callable[[], bool]:
        if not self._workers:
            return lambda: True
        worker = self._workers[warm.index]
        return lambda: not worker.is_pending

    # --- the end of a tick --------------------------------------------------------------------------------------------

    def _finish(self, status: Status, begin: int, tokens: object) -> None:
        result, health = self.result, self.health
        is_fault = result.is_held and status is not Status.NOT_READY
        self._faults = self._faults + 1 if is_fault else 0
        if is_fault and self._latched is None:
            most = self.config.max_consecutive_faults
            if self.config.on_fault is OnFault.STOP or (most and self._faults >= most):
                self._latched = status
        result.status, result.tick = status, self._tick
        result.is_latched = health.is_latched = self._latched is not None
        result.latency_ns = latency = self._clock() - begin
        health.statuses[status] += 1
        health.held += result.is_held
        health.latency.add(latency)
        if self._recorder is not None:
            flags = result.is_held * HELD + result.is_latched * LATCHED + result.fell_back * FELL_BACK
            self._recorder.add(
                result.actions,
                tokens,
                self._tick,
                begin,
                latency,
                self._sequence,
                self._observed,
                status,
                flags,
                self._used,
                self._faults,
            )
        if self._workers:
            for worker in self._workers:
                worker.settle()
        is_news = status is not self._last_status or result.fell_back
        self._last_status = status
        if is_news and (status not in (Status.OK, Status.NOT_READY) or result.fell_back):
            health.incidents += 1
            if self._reporter is not None:
                self._reporter.incident(status, self._tick, result.detail, result.is_held)

    def _explain(self, status: Status, detail: str) -> Status:
        self.result.detail = detail
        return status

    def _deadline_of(self, deadline_us: object) -> int | None:
        """In ns. What is no number above 0 is over at once: the loop asked for something, and nobody knows what."""
        given = self.config.deadline_us if deadline_us is None else deadline_us
        if given is None:
            return None
        if not isinstance(given, (int, float)) or not 0 < given < math.inf:
            return 0
        return int(given * 1000)

    def _refuse_thread(self) -> ControlResult:
        if self._owner is not None:
            raise WrongThreadError(
                f"step or reset was called from thread {threading.get_ident()}; expected {self._owner}, which has "
                "called warmup(): make one decoder per thread"
            )
        self.result.detail = "the decoder is not warm; call warmup() in the thread of the loop"
        self.health.statuses[Status.NOT_READY] += 1
        return self.result

    def _start_anew(self) -> None:
        self._queue.clear()
        self._tick, self._last_begin = 0, _NEVER
        self._latched = None
        self._faults = 0
        self._last_status = Status.OK
        self._has_chunk = self._was_limited = False
        self._start = 0
        self._forget_order()
        self.result.status, self.result.is_held, self.result.is_latched = Status.NOT_READY, True, False
        self.result.sequence = -1
        self.health.is_latched = False

    def _forget_order(self) -> None:
        self._queue.clear()
        self._sequence, self._observed, self._layers = -1, _NEVER, 0

    def _practise(self, warm: WarmTokenizer) -> None:
        healthy = [found.is_healthy for found in self._warm]
        for found in self._warm:
            found.is_healthy = found is warm
        begin = self._clock()
        self._deadline_ns = begin + 10**10
        self._forget_order()
        self._decide(begin, warm.probe, warm.probe_stats, None, None)
        self._guard.hold(self.result.actions)
        self._guard.commit(self.result.actions)
        if self._recorder is not None:
            self._recorder.add(self.result.actions, warm.probe, *([0] * 9))
        for found, was in zip(self._warm, healthy, strict=True):
            found.is_healthy = was
