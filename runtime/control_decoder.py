"""`ControlDecoder`: between the tokens of a policy and a moving robot, one action per tick, and never a surprise."""

from __future__ import annotations

import gc
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from runtime.contract import Float32Array
from runtime.control_backends import BackendChain
from runtime.control_config import ControlConfig, OnFault, OutOfRange, Status
from runtime.control_errors import ControlConfigError, ControlFaultError, WrongThreadError, in_words
from runtime.control_guard import ActionGuard
from runtime.control_health import Health, HealthSnapshot
from runtime.control_queue import action_queue
from runtime.control_recorder import (
    ACCEPTED,
    BEGUN,
    FELL_BACK,
    HELD,
    INTERNAL,
    LATCHED,
    NO_NUMBER,
    QUEUED,
    RESET,
    WRONG_NUMBER,
    FlightRecorder,
)
from runtime.control_worker import Reporter, WarmTokenizer
from runtime.errors import CannotCopyError
from runtime.paths import as_path
from runtime.tokenizer import ActionTokenizer
from runtime.validation import as_array_advice, kind_of

_TOKEN_TYPES = (np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.uint8))
_NEVER = NO_NUMBER
_MOST = 2**62
#: Nobody waits longer for an action.
_LONGEST_US = 1e9
#: In place of a thread: the decoder was inherited by fork, its threads were not.
_FORKED = 0
# Bound names: Python finds a member of an enum more slowly than numpy adds seven numbers.
_OK, _DEADLINE_MISS, _BAD_TOKEN, _NONFINITE = Status.OK, Status.DEADLINE_MISS, Status.BAD_TOKEN, Status.NONFINITE
_OUT_OF_RANGE, _STALE, _NOT_READY = Status.OUT_OF_RANGE, Status.STALE, Status.NOT_READY
_BACKEND_FAULT = Status.BACKEND_FAULT
_thread, _now, _Array = threading.get_ident, time.monotonic_ns, np.ndarray
_NONE_YET = "no chunk has been accepted since the start; send one"
_RUN_OUT = "the last chunk has run out; expected a new one: look at the policy"


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


@dataclass(frozen=True)
class LoopState:
    """What a tick leaves to the next beside the queue, as a flight record has it.

    start: tick of the first action of the chunk in service; layers, sequence, observed_ns: of the same chunk.
    has_begun: a chunk has been accepted since the start; is_queued: something may be left of it.
    """

    tick: int
    begin_ns: int
    start: int
    sequence: int
    observed_ns: int
    layers: int
    faults: int
    latched: Status | None
    has_begun: bool
    is_queued: bool


class ControlDecoder:
    """One action per tick from chunks of tokens, with a status that says whether it can be trusted.

    For one thread: the one that calls `warmup()`. From another, and in a child of fork, `step` and `reset` raise
    WrongThreadError; `health`, `snapshot()` and `openmetrics()` may be read from any. One decoder per robot and
    process, and not within itself: a signal's handler may raise, and calls neither `step` nor `reset`.

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
        self._layers_of = {(*self._tail, prefix): prefix for prefix in model.prefixes}
        self._guard = ActionGuard(config, model.chunk_length, position)
        self._queue = action_queue(config, model.chunk_length)
        self.result = ControlResult(model.action_dim)
        self.health = Health()
        token_shape = (model.chunk_length, model.latent_dim, model.num_layers)
        self._recorder: FlightRecorder | None = None
        if config.record_ticks:
            self._recorder = FlightRecorder(
                config.record_ticks, token_shape, model.action_dim, has_stats=model.has_stats
            )
        self._meta: dict[str, Any] = {
            "config": config.to_values(),
            "fingerprint": tokenizer.fingerprint,
            "token_shape": token_shape,
            "backends": [found.backend.name for found in self._tokenizers],
        }
        self._period_ns = max(1, round(config.period_s * 1e9))
        self._half_period_ns = self._period_ns // 2
        self._stale_ns = round(config.stale_after_s * 1e9)
        self._allowed_ns = None if config.deadline_us is None else int(config.deadline_us * 1000)
        self._pauses_gc, self._raises = config.pause_gc, config.on_fault is OnFault.RAISE
        self._stops, self._is_limiting = config.on_fault is OnFault.STOP, config.out_of_range is OutOfRange.LIMIT
        self._owner: int | None = None
        self._chain: BackendChain | None = None
        self._reporter: Reporter | None = None
        self._deadline_ns: int | None = None
        self._used = 0
        self._is_accepted = self._is_deciding = False
        self._latched: Status | None = None
        self._last_status = _OK
        self._start_anew()

    def warmup(self) -> None:
        """Run everything once; the calling thread is the loop's from now on. Raises what a broken backend raises."""
        if self._chain is not None:
            raise ControlConfigError(
                "warmup() was called before; expected once per decoder: call reset() to go on, or make another one"
            )
        self._chain = chain = BackendChain(self._tokenizers, self.config, self._guard, self._clock)
        position = self._guard.last
        for warm in chain.warm:
            # Ticks whose outcome is thrown away: every branch of a good one has run, every cache is filled.
            for _ in range(self._length + 2):
                self._practise(warm)
        self.health = Health()
        chain.start(self.health)
        if self._recorder is not None:
            self._recorder.written = 0
        self.reset(position)
        self._reporter = Reporter(self.config, self.health, self._recorder, self._meta)
        self._owner = _thread()
        _WARM.add(self)

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

        Raises WrongThreadError from another thread, ControlFaultError where `on_fault` is `raise`, and what a signal's
        handler raises, as KeyboardInterrupt; nothing else. `result` is safe to be sent after each.
        """
        result = self.result
        if _thread() != self._owner:
            return self._refuse_thread()
        pauses = self._pauses_gc and gc.isenabled()
        try:
            if pauses:
                gc.disable()
            try:
                status = self._decide_in_time(tokens, stats, sequence, observed_ns, deadline_us)
            except Exception as error:  # nothing may leave the loop but an action that is safe
                status = self._stand_still(error)
            self._finish(status, tokens, stats, sequence, observed_ns)
            self._is_deciding = False
        except BaseException as error:
            # Anything may be half done: what is queued, and what is in `result`.
            if not self._is_deciding:
                self._guard.commit()
            self._is_deciding = False
            result.status, result.is_latched = self._stand_still(error), self._latched is not None
            raise
        finally:
            if pauses:
                gc.enable()
        if self._raises and result.is_held and status is not _NOT_READY:
            raise ControlFaultError(f"{status.name}: {result.detail}")
        return result

    def reset(self, position: Sequence[float] | None = None) -> None:
        """Forget chunks, faults and the latch. position: where the robot is now, as at the start.

        The next tick is NOT_READY until a chunk comes. Raises ControlConfigError for a position outside the limits.
        """
        if self._owner is not None and _thread() != self._owner:
            self._refuse_thread()
        self._guard.reset(position)
        self._start_anew()
        self._record(_NOT_READY, 0, RESET | HELD, None, None, NO_NUMBER, NO_NUMBER)

    def resume(self, sent: Float32Array, state: LoopState) -> None:
        """Go on as if `sent` had left last and the loop were in `state`; the queue stays. For replays."""
        self._guard.resume(sent)
        self._tick, self._last_begin, self._start, self._layers = state.tick, state.begin_ns, state.start, state.layers
        self._sequence, self._observed, self._faults = state.sequence, state.observed_ns, state.faults
        self._latched, self._has_begun, self._is_queued = state.latched, state.has_begun, state.is_queued

    def snapshot(self) -> HealthSnapshot:
        """Counters and latencies since `warmup()`; from any thread."""
        return self.health.snapshot()

    def openmetrics(self) -> str:
        """The same as OpenMetrics text; from any thread."""
        return self.health.openmetrics()

    def write_flight_record(self, path: str | os.PathLike[str]) -> bool:
        """The last ticks to `path`, now; not from the loop. False where the disk refuses, which is logged."""
        if self._reporter is None or self._recorder is None:
            raise ControlConfigError("there is no flight record; call warmup(), with record_ticks above 0")
        return self._reporter.write(as_path(path, "the flight record"))

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until log lines and records are written; not from the loop."""
        return self._reporter is None or self._reporter.flush(timeout_s)

    def close(self) -> None:
        """End the threads beside the loop; the tokenizers stay open. Closing twice is harmless.

        A thread that hangs in a backend is left behind in it: do not close that one's tokenizer then.
        """
        self._owner = None
        if self._chain is not None:
            self._chain.close()
        if self._reporter is not None:
            self._reporter.close()
            self._reporter = None

    def __repr__(self) -> str:
        state = "not warm"
        if self._chain is not None:
            state = "closed" if self._reporter is None else f"tick {self._tick}, {self.result.status}"
        return f"{type(self).__name__}({state}, {self.config.strategy}, {', '.join(map(repr, self._tokenizers))})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Before `warmup()` a copy is made of the same parts, from the same position. Raises CannotCopyError."""
        if self._chain is not None:
            raise CannotCopyError(
                "a decoder that has been warmed up cannot be copied or pickled: it has threads, and one robot's last "
                "command; make another one, or copy it before warmup()"
            )
        return _made_again, (type(self), self._tokenizers, self.config, self._guard.last, self._clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- one tick -----------------------------------------------------------------------------------------------------

    def _decide_in_time(
        self, tokens: object, stats: object, sequence: int | None, observed_ns: int | None, deadline_us: float | None
    ) -> Status:
        """Status and action of this tick."""
        result = self.result
        # Not before: while the last tick had not returned, it might have been broken off.
        self._guard.commit()
        self._is_deciding = True
        result.detail = ""
        result.is_held = result.fell_back = result.is_limited = self._is_accepted = False
        self._begin = _NEVER
        self.health.last_tick_ns = _now()
        begin = self._begin = self._clock()
        allowed_ns = self._allowed_ns if deadline_us is None else _nanoseconds(deadline_us)
        self._deadline_ns = None if allowed_ns is None else begin + allowed_ns
        status = self._decide(begin, tokens, stats, sequence, observed_ns)
        if not result.is_held:
            # Now that the action is there, is it in time still?
            taken = self._clock() - begin
            is_late = allowed_ns is not None and taken > allowed_ns
            if is_late or begin + taken - self._observed > self._stale_ns:
                result.is_held = True
                status = self._explain_late(taken, deadline_us) if is_late else self._grow_old(begin + taken)
        if result.is_held:
            result.is_limited = False
            self._guard.hold(result.actions)
        return status

    def _explain_late(self, taken_ns: int, deadline_us: object) -> Status:
        allowed_us = self.config.deadline_us if deadline_us is None else deadline_us
        if not isinstance(allowed_us, (int, float)) or _nanoseconds(allowed_us) < 0:
            found = allowed_us if isinstance(allowed_us, (int, float)) else f"a {type(allowed_us).__qualname__}"
            return self._explain(_DEADLINE_MISS, f"deadline_us is {found}; expected a number above 0: correct it")
        return self._explain(
            _DEADLINE_MISS,
            f"the action was there after {taken_ns / 1e3:.0f} us; expected {allowed_us:.0f}: look at what else runs "
            "here, or raise deadline_us",
        )

    def _grow_old(self, now: int) -> Status:
        """What is in service is too old."""
        status = self._explain(_STALE, self._too_old(now - self._observed))
        self._drop(status)
        return status

    def _stand_still(self, error: BaseException) -> Status:
        """A tick on which the decoder itself has failed, or the clock that it was given, or which was broken off."""
        result = self.result
        result.is_held, result.is_limited, result.fell_back = True, False, False
        self._used = INTERNAL
        self._drop(_BACKEND_FAULT)
        self._guard.hold(result.actions)
        what, advice = "the decoder itself, or its clock, failed", "look at the clock, or report it as a bug"
        if not isinstance(error, Exception):
            what, advice = "the tick was broken off", "it was raised from outside; send this action, or stop the robot"
        return self._explain(
            _BACKEND_FAULT if self._latched is None else self._latched, f"{what}: {in_words(error)}; {advice}"
        )

    def _decide(
        self, begin: int, tokens: object, stats: object, sequence: int | None, observed_ns: int | None
    ) -> Status:
        """Status of this tick, and its action in `result.actions` unless `result.is_held`."""
        passed = begin - self._last_begin
        if self._latched is not None:
            self._tick += 1
            self._last_begin, self.result.is_held = begin, True
            return self._explain(self._latched, "standing still after a fault; find the cause, then call reset()")
        # Ticks are counted, for a clock that trembles repeats none and skips none; unless whole ones were missed.
        self._tick += 1
        if not 0 <= passed <= self._period_ns + self._half_period_ns and self._last_begin != _NEVER:
            if passed < 0:
                self._last_begin, self.result.is_held = begin, True
                self._forget_order()
                return self._explain(
                    _STALE,
                    f"the clock went back by {-passed / 1e9:.6f} s; expected a monotonic one: what was observed before "
                    "cannot be dated",
                )
            self._tick += (passed + self._half_period_ns) // self._period_ns - 1
        self._last_begin = begin
        status = _OK
        if tokens is not None:
            status = self._receive(begin, tokens, stats, sequence, observed_ns)
            if status is not _OK and not self._is_accepted:
                self.health.refused_chunks += 1
                if status is not _STALE:
                    self.result.is_held = True
                    self._drop(status)
                    return status
        return self._serve(begin, status)

    def _serve(self, begin: int, status: Status) -> Status:
        """The action of this tick from what is queued; `status` is of the chunk that came on it."""
        result = self.result
        if self._is_queued and begin - self._observed > self._stale_ns:
            result.is_held = True
            return self._grow_old(begin)
        if not self._queue.take(self._tick, result.actions):
            result.is_held = True
            if status is _OK:
                return self._explain(_STALE if self._has_begun else _NOT_READY, self._why_empty)
            return self._explain(status, f"{result.detail}; and there is nothing else: {self._why_empty}")
        try:
            result.is_limited = self._guard.limit(result.actions)
        except ValueError as error:
            result.is_held = True
            self._drop(_NONFINITE)
            return self._explain(_NONFINITE, f"{error}; report it as a bug")
        return status

    def _receive(
        self, begin: int, tokens: object, stats: object, sequence: int | None, observed_ns: int | None
    ) -> Status:
        """Check, decode and queue a chunk. STALE leaves the older chunk in service."""
        layers = self._layers_of.get(tokens.shape) if type(tokens) is _Array else None
        if (
            layers is None
            or tokens.dtype not in _TOKEN_TYPES  # type: ignore[attr-defined]  # with layers it is an array
            or (sequence is not None and _number(sequence) == WRONG_NUMBER)
            or (observed_ns is not None and _number(observed_ns) == WRONG_NUMBER)
        ):
            return self._explain(_BAD_TOKEN, self._wrong_form(tokens, sequence, observed_ns))
        assert isinstance(tokens, _Array)
        number = self._sequence + 1 if sequence is None else sequence
        observed = begin if observed_ns is None else observed_ns
        is_swap = (
            number == self._sequence
            and layers > self._layers > 0
            and (observed_ns is None or observed_ns == self._observed)
        )
        if is_swap:
            observed = self._observed
        if reason := self._wrong_order(begin, number, observed, is_swap, observed_ns is not None):
            return self._explain(_STALE, reason)
        delay = (begin - observed + self._half_period_ns) // self._period_ns
        if delay >= self._length:
            return self._explain(
                _STALE,
                f"the chunk comes {delay} ticks after its observation and has {self._length} actions; expected one "
                "whose time has not passed: look at the policy's latency",
            )
        status, chunk = self._decode(tokens, stats)
        if status is not _OK and not (status is _OUT_OF_RANGE and self._is_limiting):
            return status
        start = self._start if is_swap else self._tick - max(delay, 0)
        self._queue.push(chunk, start, is_swap=is_swap and not self._queue.is_empty)
        self._start, self._sequence, self._observed, self._layers = start, number, observed, layers
        self._is_accepted = self._has_begun = self._is_queued = True
        self._why_empty = _RUN_OUT
        self.result.sequence = number
        self.health.chunks += 1
        return status

    def _decode(self, tokens: npt.NDArray[Any], stats: object) -> tuple[Status, Float32Array]:
        """On the first backend that works; where it fails, once on the next."""
        chain, result = self._chain, self.result
        assert chain is not None  # step has looked
        status = chain.decode(tokens, stats, self._deadline_ns)
        used = chain.used
        result.backend, self._used = used.name, used.index
        if status is not _OK or chain.fell_back:
            result.detail, result.fell_back = chain.detail, chain.fell_back
        return status, chain.chunk

    def _wrong_form(self, tokens: object, sequence: object, observed_ns: object) -> str:
        """What is wrong with the arguments."""
        if type(tokens) is not _Array:
            advice = as_array_advice("tokens", tokens, is_float=False)
            return f"tokens is a {kind_of(tokens)}; expected a numpy.ndarray{advice}"
        if tokens.shape not in self._layers_of:
            return (
                f"tokens have shape {list(tokens.shape)}; expected {list(self._tail)} and one of the layers "
                f"{sorted(self._layers_of.values())}: send what the policy gives for one chunk"
            )
        if tokens.dtype not in _TOKEN_TYPES:
            return f"tokens have type {tokens.dtype}; expected int32, int64 or uint8: send levels, not values"
        is_first = sequence is not None and _number(sequence) == WRONG_NUMBER
        name, value = ("sequence", sequence) if is_first else ("observed_ns", observed_ns)
        found = "beyond it" if type(value) is int else f"a {type(value).__qualname__}"
        return f"{name} is {found}; expected an int between -2**62 and 2**62: correct what the policy sends"

    def _wrong_order(self, begin: int, number: int, observed: int, is_swap: bool, is_dated: bool) -> str:
        """Why a chunk is not to be used, or nothing."""
        if observed - begin > self._period_ns:
            return (
                f"the chunk was observed {(observed - begin) / 1e9:.3f} s from now; expected the past: use one clock "
                "in both processes"
            )
        if begin - observed > self._stale_ns:
            return self._too_old(begin - observed)
        if is_swap or self._observed == _NEVER:
            return ""
        # A policy that was started anew counts from its beginning; it has looked later than the one before.
        is_restart = is_dated and observed > self._observed and self._is_drained()
        if number <= self._sequence and not is_restart:
            kind = "again" if number == self._sequence else "after a newer one"
            return f"chunk {number} comes {kind}; expected above {self._sequence}: look at the policy's order"
        if observed < self._observed:
            return (
                f"chunk {number} was observed before chunk {self._sequence}, which came earlier; expected later: look "
                "at the policy's order"
            )
        return ""

    def _too_old(self, age_ns: int) -> str:
        return (
            f"the chunk was observed {age_ns / 1e9:.3f} s ago; expected at most {self.config.stale_after_s:g}: look at "
            "the policy, or raise stale_after_s"
        )

    def _is_drained(self) -> bool:
        return not self._is_queued or self._tick - self._start >= self._length

    # --- the end of a tick --------------------------------------------------------------------------------------------

    def _finish(self, status: Status, tokens: object, stats: object, sequence: object, observed_ns: object) -> None:
        """Count, record, report. Whatever fails in it costs no action: that is chosen already."""
        result, health = self.result, self.health
        failures = health.internal_faults
        is_held = result.is_held
        if is_held and status is not _NOT_READY:
            self._faults += 1
            most = self.config.max_consecutive_faults
            if self._latched is None and (self._stops or (most and self._faults >= most)):
                self._latched = status
        else:
            self._faults = 0
        is_latched = self._latched is not None
        result.status, result.tick, result.is_latched = status, self._tick, is_latched
        health.is_latched = is_latched
        health.statuses[status] += 1
        health.held += is_held
        latency = 0
        try:
            if self._begin != _NEVER:
                latency = self._clock() - self._begin
            health.latency.add(latency)
        except Exception as error:  # see above
            self._excuse("the clock or the histogram", error)
        result.latency_ns = latency
        if self._recorder is not None:
            flags = is_held * HELD + is_latched * LATCHED + result.fell_back * FELL_BACK + self._is_accepted * ACCEPTED
            self._record(status, latency, flags, tokens, stats, sequence, observed_ns)
        is_broken = health.internal_faults != failures
        if status is not _OK or result.fell_back or self._last_status is not _OK or is_broken:
            self._report(status, is_broken)

    def _record(
        self,
        status: Status,
        latency: int,
        flags: int,
        tokens: object,
        stats: object,
        sequence: object,
        observed_ns: object,
    ) -> None:
        if self._recorder is None:
            return
        try:
            self._recorder.add(
                self.result.actions,
                tokens,
                stats,
                self._tick,
                self._last_begin,
                latency,
                status,
                flags + self._is_queued * QUEUED + self._has_begun * BEGUN,
                self._used,
                self._faults,
                self._sequence,
                self._observed,
                self._layers,
                self._start,
                NO_NUMBER if sequence is None else _number(sequence),
                NO_NUMBER if observed_ns is None else _number(observed_ns),
            )
        except Exception as error:  # a record is worth no tick
            self._excuse("the flight recorder", error)

    def _report(self, status: Status, is_broken: bool) -> None:
        result = self.result
        is_news = (status is not self._last_status and status not in (_OK, _NOT_READY)) or result.fell_back
        self._last_status = status
        try:
            self.health.incidents += is_news
            if (is_news or is_broken) and self._reporter is not None:
                self._reporter.incident(status, self._tick, result.detail, result.is_held)
        except Exception as error:  # a log line is worth no tick
            self._excuse("the reporter", error)

    def _excuse(self, what: str, error: Exception) -> None:
        self.health.internal_faults += 1
        self.result.detail = f"{self.result.detail or 'the action is good'}; {what} failed: {in_words(error)}"

    def _explain(self, status: Status, detail: str) -> Status:
        self.result.detail = detail
        return status

    def _drop(self, why: Status) -> None:
        """Nothing of what is queued is served any more."""
        self._queue.clear()
        self._is_queued = False
        if self._has_begun:
            self._why_empty = (
                f"what was queued was dropped on tick {self._tick}, {why.name}; expected a new chunk since"
            )

    def _refuse_thread(self) -> ControlResult:
        if self._owner == _FORKED:
            raise WrongThreadError(
                f"process {os.getpid()} has inherited this decoder by fork, and not its threads; expected the process "
                "that has called warmup(): make one decoder per process"
            )
        if self._owner is not None:
            raise WrongThreadError(
                f"step or reset was called from thread {_thread()}; expected {self._owner}, which has called warmup(): "
                "make one decoder per thread"
            )
        result = self.result
        result.status, result.is_held, result.is_limited, result.fell_back = _NOT_READY, True, False, False
        result.latency_ns = 0
        result.detail = "the decoder is not warm, or closed; call warmup() in the thread of the loop"
        self._guard.commit()
        self._guard.hold(result.actions)
        self.health.statuses[_NOT_READY] += 1
        self.health.held += 1
        return result

    def _start_anew(self) -> None:
        result = self.result
        self._tick = self._start = self._faults = 0
        self._begin = self._last_begin = _NEVER
        self._latched, self._last_status = None, _OK
        self._has_begun, self._why_empty = False, _NONE_YET
        self._forget_order()
        result.status, result.is_held, result.is_latched, result.is_limited = _NOT_READY, True, False, False
        result.sequence = -1
        self.health.is_latched = False
        # What was sent last, not a step further: the next action is compared to it.
        result.actions[:] = self._guard.last

    def _forget_order(self) -> None:
        self._drop(_STALE)
        self._sequence, self._observed, self._layers = -1, _NEVER, 0

    def _practise(self, warm: WarmTokenizer) -> None:
        assert self._chain is not None
        healthy = [found.is_healthy for found in self._chain.warm]
        for found in self._chain.warm:
            found.is_healthy = found is warm
        self._forget_order()
        self._finish(
            self._decide_in_time(warm.probe, warm.probe_stats, None, None, 1e7),
            warm.probe,
            warm.probe_stats,
            None,
            None,
        )
        for found, was in zip(self._chain.warm, healthy, strict=True):
            found.is_healthy = was


def _made_again(
    kind: type[ControlDecoder],
    tokenizers: tuple[ActionTokenizer, ...],
    config: ControlConfig,
    position: tuple[float, ...],
    clock: Callable[[], int],
) -> ControlDecoder:
    return kind(tokenizers[0], config, fallbacks=tokenizers[1:], position=position, clock=clock)


#: Those that a child of fork inherits.
_WARM: weakref.WeakSet[ControlDecoder] = weakref.WeakSet()


def _disown() -> None:
    for decoder in list(_WARM):
        decoder._owner = _FORKED


os.register_at_fork(after_in_child=_disown)


def _nanoseconds(deadline_us: object) -> int:
    """What is no number above 0 is over at once: the loop asked for something, and nobody knows what."""
    if not isinstance(deadline_us, (int, float)) or not 0 < deadline_us < math.inf:
        return -1
    return int(min(deadline_us, _LONGEST_US) * 1000)


def _number(value: object) -> int:
    return value if type(value) is int and -_MOST < value < _MOST else WRONG_NUMBER
