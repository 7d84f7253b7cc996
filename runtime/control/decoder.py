"""`ControlDecoder`: between the tokens of a policy and a moving robot, one action per tick, and never a surprise."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..bundle.arrays import Float32Array
from ..bundle.errors import CannotCopyError
from ..bundle.paths import as_path
from ..tokenizer import ActionTokenizer
from .books import TickBooks
from .chain import BackendChain
from .clock import nanoseconds, stamp, steady
from .config import ControlConfig, OnFault, OutOfRange, Status
from .errors import (
    ControlConfigError,
    ControlFaultError,
    WrongThreadError,
    in_words,
    is_from_outside,
)
from .guard import ActionGuard
from .health import Health, HealthSnapshot
from .order import TOKEN_TYPES, ChunkOrder
from .queue import action_queue
from .recorder import INTERNAL, NO_NUMBER, WRONG_NUMBER, FlightRecorder
from .result import (
    ADVICE,
    BROKEN_OFF,
    NONE_IN_SERVICE,
    BrokenOff,
    ControlResult,
    LoopState,
    Outcome,
)
from .worker import Reporter, WarmTokenizer

_NEVER = NO_NUMBER
#: In place of a thread: the decoder was inherited by fork, its threads were not.
_FORKED = object()
# Bound names: Python finds a member of an enum more slowly than numpy adds seven numbers.
_OK, _DEADLINE_MISS, _BAD_TOKEN, _NONFINITE = Status.OK, Status.DEADLINE_MISS, Status.BAD_TOKEN, Status.NONFINITE
_OUT_OF_RANGE, _STALE, _NOT_READY = Status.OUT_OF_RANGE, Status.STALE, Status.NOT_READY
_BACKEND_FAULT = Status.BACKEND_FAULT
_thread, _now = threading.get_ident, time.monotonic_ns
_Array = np.ndarray
_ASKED_FOR = (WrongThreadError, ControlFaultError)
_NO_STAMPS = NO_NUMBER, NO_NUMBER
_NONE_YET = "no chunk has been accepted since the start; send one"
_RUN_OUT = "the last chunk has run out; expected a new one: look at the policy"


class ControlDecoder:
    """One action per tick from chunks of tokens, with a status that says whether it can be trusted.

    For one thread: the one that calls `warmup()`. From another, and in a child of fork, `step` and `reset` raise
    WrongThreadError; `health`, `snapshot()` and `openmetrics()` may be read from any. One decoder per robot and
    process, and not within itself: a signal's handler may raise, and calls neither `step` nor `reset`.

    fallbacks: tokenizers of the same bundle on other backends, tried in this order. position: the command that the
    robot obeys now, needed where a dimension is absolute or a gripper. clock: monotonic nanoseconds.
    """

    #: Of the tick under way.
    _out: Outcome
    _begin: int
    _used: int
    _is_accepted: bool

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
        self.config, self._clock = config, steady(clock)
        self._tokenizers = (tokenizer, *fallbacks)
        self._length = model.chunk_length
        self._order = ChunkOrder(config, model)
        self._stale_ns = self._order.stale_ns
        self._guard = ActionGuard(config, model.chunk_length, position)
        self._queue = action_queue(config, model.chunk_length)
        token_shape = (model.chunk_length, model.latent_dim, model.num_layers)
        self._recorder: FlightRecorder | None = None
        if config.record_ticks:
            self._recorder = FlightRecorder(
                config.record_ticks, token_shape, model.action_dim, has_stats=model.has_stats
            )
        self._books = TickBooks(config, self._clock, self._recorder)
        self.health = self._books.health
        self._meta: dict[str, Any] = {
            "config": config.to_values(),
            "fingerprint": tokenizer.fingerprint,
            "token_shape": token_shape,
            "backends": [found.backend.name for found in self._tokenizers],
        }
        self._allowed_ns = None if config.deadline_us is None else nanoseconds(config.deadline_us)
        self._pauses_gc, self._raises = config.pause_gc, config.on_fault is OnFault.RAISE
        self._is_limiting = config.out_of_range is OutOfRange.LIMIT
        self._owner: object = None
        self._chain: BackendChain | None = None
        self._deadline_ns: int | None = None
        self._is_gc_paused = False
        # One is shown, the other is filled.
        shown = Outcome(self._guard.sent)
        self._outcomes = shown, Outcome(self._guard.sent)
        self._still = BrokenOff(self._guard.held_after, shown)
        self.result = ControlResult(shown)
        self._state, self._why_empty = LoopState(), _NONE_YET

    def warmup(self) -> None:
        """Run everything once; the calling thread is the loop's from now on. Raises what a broken backend raises."""
        if self._chain is not None:
            raise ControlConfigError(
                "warmup() was called before; expected once per decoder: call reset() to go on, or make another one"
            )
        self._chain = chain = BackendChain(self._tokenizers, self.config, self._guard, self._clock)
        for warm in chain.warm:
            for found in chain.warm:
                found.is_healthy = found is warm
            for _ in range(self._length):
                self._practise(warm)
        for found in chain.warm:
            found.is_healthy = True
        self.health = self._books.health = Health()
        chain.start(self.health)
        if self._recorder is not None:
            self._recorder.written = 0
        self._start_anew(self.result.shown.values)
        self._books.reporter = Reporter(self.config, self.health, self._recorder, self._meta)
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
        handler raises, as KeyboardInterrupt; nothing else, whatever a backend, the clock or the decoder itself raises.
        `result` is safe to be sent after each: from its first line on a tick that is not whole stands still. The six
        instructions that look up what was shown last and begin to watch, and the return, are beside the tick: broken
        off there, or where the call begins or has returned, it has not begun or is whole. `result.tick` tells: where
        that was sent already, call again; else send it.
        """
        sent = self.result.shown
        try:
            try:
                result = self.result
                if _thread() != self._owner:
                    return self._refuse_thread(sent)
                if isinstance(sent, BrokenOff):
                    sent = self._make_up_for(sent)
                still = self._still
                still.before = sent
                result.shown = still
                pauses = self._pauses_gc and (gc.isenabled() or self._is_gc_paused)
                try:
                    if pauses:
                        self._is_gc_paused = True
                        gc.disable()
                    out = self._tick(sent, tokens, stats, sequence, observed_ns, deadline_us)
                finally:
                    if pauses:
                        gc.enable()
                        self._is_gc_paused = False
                if self._raises and out.is_held and out.status is not _NOT_READY:
                    result.shown = out
                    raise ControlFaultError(f"{out.status.name}: {out.detail}")
                result.shown = out
                return result
            except _ASKED_FOR:
                raise
            except BaseException as error:
                # Nothing that could fail comes before: not even a call, for which there may be no room.
                if isinstance(sent, Outcome):
                    self._still.before = sent
                    self.result.shown = self._still
                # Nothing may leave the loop but an action that is safe.
                if isinstance(error, Exception) and (isinstance(error, RecursionError) or not is_from_outside(error)):
                    if self._raises:
                        raise ControlFaultError(BROKEN_OFF) from error
                    return self.result
                self._still.detail = f"{BROKEN_OFF}: {in_words(error)}; {ADVICE}"
                raise
        except _ASKED_FOR:
            raise
        except BaseException:
            if isinstance(sent, Outcome):
                self._still.before = sent
                self.result.shown = self._still
            raise

    def reset(self, position: Sequence[float] | None = None) -> None:
        """Forget chunks, faults and the latch. position: where the robot is now, as at the start.

        The next tick is NOT_READY until a chunk comes; motions end as fast as the slew limit allows. Raises
        ControlConfigError for a position outside the limits.
        """
        if self._owner is not None and _thread() != self._owner:
            self._refuse_thread(self.result.shown)
        self._guard.sent = self.result.shown.values
        self._start_anew(self._guard.start(position))

    def resume(self, sent: Float32Array, state: LoopState) -> None:
        """Go on as if `sent` had left last and the loop were in `state`; the queue stays. For replays."""
        self.result.shown = Outcome(sent.tolist())
        self._state = state

    def snapshot(self) -> HealthSnapshot:
        """Counters and latencies since `warmup()`; from any thread."""
        return self.health.snapshot()

    def openmetrics(self) -> str:
        """The same as OpenMetrics text; from any thread."""
        return self.health.openmetrics()

    def write_flight_record(self, path: str | os.PathLike[str]) -> bool:
        """The last ticks to `path`, now; not from the loop. False where the disk refuses, which is logged."""
        if self._books.reporter is None or self._recorder is None:
            raise ControlConfigError("there is no flight record; call warmup(), with record_ticks above 0")
        return self._books.reporter.write(as_path(path, "the flight record"))

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until log lines and records are written; not from the loop."""
        return self._books.reporter is None or self._books.reporter.flush(timeout_s)

    def close(self) -> None:
        """End the threads beside the loop; the tokenizers stay open. Closing twice is harmless.

        A thread that hangs in a backend is left behind in it: do not close that one's tokenizer then.
        """
        self._owner = None
        if self._chain is not None:
            self._chain.close()
        if self._books.reporter is not None:
            self._books.reporter.close()
            self._books.reporter = None

    def __repr__(self) -> str:
        state = "not warm"
        if self._chain is not None:
            state = "closed" if self._books.reporter is None else f"tick {self.result.tick}, {self.result.status}"
        return f"{type(self).__name__}({state}, {self.config.strategy}, {', '.join(map(repr, self._tokenizers))})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Before `warmup()` a copy is made of the same parts, from the same position. Raises CannotCopyError."""
        if self._chain is not None:
            raise CannotCopyError(
                "a decoder that has been warmed up cannot be copied or pickled: it has threads, and one robot's last "
                "command; make another one, or copy it before warmup()"
            )
        return _made_again, (type(self), self._tokenizers, self.config, tuple(self.result.shown.values), self._clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- one tick -----------------------------------------------------------------------------------------------------

    def _make_up_for(self, broken: BrokenOff) -> Outcome:
        """The last tick was broken off, and what was shown of it is taken as sent; nothing half done is served."""
        self._drop(_BACKEND_FAULT)
        sent = broken.settled()
        self._still = BrokenOff(self._guard.held_after, sent)
        self._books.make_up_for(sent, self._state)
        return sent

    def _tick(
        self, sent: Outcome, tokens: object, stats: object, sequence: object, observed_ns: object, deadline_us: object
    ) -> Outcome:
        """This tick, whole and not yet shown; `sent` is what was shown before it."""
        first, second = self._outcomes
        self._out = out = second if sent is first else first
        out.detail, out.sequence, out.backend = "", sent.sequence, sent.backend
        out.is_held = out.fell_back = out.is_limited = self._is_accepted = False
        self._guard.sent = sent.values
        self._begin = _NEVER
        stamps = _NO_STAMPS
        if sequence is not None or observed_ns is not None:
            stamps = stamp(sequence), stamp(observed_ns)
        self.health.last_tick_ns = _now()
        try:
            begin = self._begin = self._clock()
            allowed_ns = self._allowed_ns if deadline_us is None else nanoseconds(deadline_us)
            self._deadline_ns = None if allowed_ns is None else begin + allowed_ns
            out.status = self._decide(begin, tokens, stats, stamps)
            if not out.is_held:
                # Now that the action is there, is it in time still, and all of which it is made young enough?
                now = self._clock()
                if allowed_ns is not None and now - begin > allowed_ns:
                    out.status = self._explain_late(now - begin, deadline_us)
                elif self._queue.first_observed_ns < now - self._stale_ns:
                    out.status = self._serve(now, self._state.line[0], out.status)
            elif out.status is _BAD_TOKEN and not out.detail:
                out.detail = self._order.wrong_form(tokens, sequence, observed_ns)
        except Exception as error:
            if is_from_outside(error):
                raise
            self._fail(error)
        guard = self._guard
        if out.is_held:
            out.is_limited = False
            guard.hold()
        out.values, out.actions = guard.values, guard.actions
        self._books.close_tick(
            out, sent.tick, self._state, self._begin, self._is_accepted, self._used, tokens, stats, stamps
        )
        return out

    def _explain_late(self, taken_ns: int, deadline_us: object) -> Status:
        allowed_us = self.config.deadline_us if deadline_us is None else deadline_us
        if nanoseconds(allowed_us) < 0:
            found = allowed_us if isinstance(allowed_us, (int, float)) else f"a {type(allowed_us).__qualname__}"
            return self._hold(_DEADLINE_MISS, f"deadline_us is {found}; expected a number above 0: correct it")
        return self._hold(
            _DEADLINE_MISS,
            f"the action was there after {taken_ns / 1e3:.0f} us; expected {allowed_us:.0f}: look at what else runs "
            "here, or raise deadline_us",
        )

    def _grow_old(self, now: int) -> Status:
        """What is in service is too old."""
        self._drop(_STALE)
        return self._hold(_STALE, self._order.too_old(now - self._state.service[1]))

    def _fail(self, error: Exception) -> None:
        """A tick on which the decoder itself has failed, or the clock that it was given."""
        self._out.fell_back = False
        self._used = INTERNAL
        self._drop(_BACKEND_FAULT)
        latched = self._state.latched
        self._out.status = self._hold(
            _BACKEND_FAULT if latched is None else latched,
            f"the decoder itself, or its clock, failed: {in_words(error)}; look at the clock, or report it as a bug",
        )

    def _decide(self, begin: int, tokens: object, stats: object, stamps: tuple[int, int]) -> Status:
        """Status of this tick, and its action in the guard unless it is held."""
        state, order = self._state, self._order
        counted, last = state.line
        # A tick that was broken off, or without a clock, has been shown under a number that no clock has given.
        shown = self._still.before.tick
        if shown > counted:
            counted = shown
        tick = counted + 1
        if state.latched is not None:
            state.line = tick, begin
            return self._hold(state.latched, "standing still after a fault; find the cause, then call reset()")
        if last != _NEVER:
            if begin < last:
                state.line = tick, begin
                self._forget_order()
                return self._hold(
                    _STALE,
                    f"the clock went back by {(last - begin) / 1e9:.6f} s; expected a monotonic one: what was observed "
                    "before cannot be dated",
                )
            timed = order.next_tick(begin, state.line, state.service if state.is_queued else None)
            if timed > tick:
                self.health.missed_ticks += timed - tick
                tick = timed
        state.line = tick, begin
        status = _OK
        if tokens is not None:
            status = self._receive(begin, tick, tokens, stats, stamps)
            if status is not _OK and not self._is_accepted:
                self.health.refused_chunks += 1
                if status is not _STALE:
                    self._out.is_held = True
                    self._drop(status)
                    return status
        return self._serve(begin, tick, status)

    def _serve(self, now: int, tick: int, status: Status) -> Status:
        """The action of this tick from what is queued; `status` is of the chunk that came on it."""
        out, state = self._out, self._state
        oldest = now - self._stale_ns
        if state.is_queued:
            _, observed, _, _ = state.service
            if observed < oldest:
                return self._grow_old(now)
        action = self._queue.take(tick, oldest)
        if action is None:
            if status is _OK:
                return self._hold(_STALE if state.has_begun else _NOT_READY, self._why_empty)
            return self._hold(status, f"{out.detail}; and there is nothing else: {self._why_empty}")
        out.is_limited = self._guard.limit(action)
        return status

    def _receive(self, begin: int, tick: int, tokens: Any, stats: object, stamps: tuple[int, int]) -> Status:
        """Check, decode and queue a chunk. STALE leaves the older chunk in service."""
        state, order = self._state, self._order
        layers = order.layers_of.get(tokens.shape) if type(tokens) is _Array else None
        if layers is None or tokens.dtype not in TOKEN_TYPES or WRONG_NUMBER in stamps:
            # What is wrong with it, says who has the arguments as they were given.
            return _BAD_TOKEN
        service, is_queued = state.service, state.is_queued
        last_number, last_observed, _, last_start = service
        is_drained = not is_queued or tick - last_start >= self._length
        placed = order.place(begin, tick, layers, service, stamps, is_drained)
        if isinstance(placed, str):
            self._out.detail = placed
            return _STALE
        status, chunk = self._decode(tokens, stats)
        if status is not _OK and not (status is _OUT_OF_RANGE and self._is_limiting):
            return status
        number, observed, _, start = placed
        is_swap = is_queued and number == last_number and observed == last_observed
        self._queue.push(chunk, start, observed, is_swap=is_swap)
        state.service = placed
        self._is_accepted = state.has_begun = state.is_queued = True
        self._why_empty = _RUN_OUT
        self._out.sequence = number
        self.health.chunks += 1
        return status

    def _decode(self, tokens: npt.NDArray[Any], stats: object) -> tuple[Status, Float32Array]:
        """On the first backend that works; where it fails, once on the next."""
        chain, out = self._chain, self._out
        assert chain is not None  # step has looked
        status = chain.decode(tokens, stats, self._deadline_ns)
        used = chain.used
        out.backend, self._used = used.name, used.index
        if status is not _OK or chain.fell_back:
            out.detail, out.fell_back = chain.detail, chain.fell_back
        return status, chain.chunk

    def _hold(self, status: Status, detail: str) -> Status:
        self._out.is_held, self._out.detail = True, detail
        return status

    def _drop(self, why: Status) -> None:
        """Nothing of what is queued is served any more."""
        self._queue.clear()
        state = self._state
        state.is_queued = False
        if state.has_begun:
            self._why_empty = (
                f"what was queued was dropped on tick {state.line[0]}, {why.name}; expected a new chunk since"
            )

    def _refuse_thread(self, sent: Outcome | BrokenOff) -> ControlResult:
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
        self._guard.sent = sent.values
        self._guard.hold()
        out = Outcome(self._guard.values)
        out.tick, out.sequence, out.is_latched, out.backend = sent.tick, sent.sequence, sent.is_latched, sent.backend
        out.detail = "the decoder is not warm, or closed; call warmup() in the thread of the loop"
        self.health.statuses[_NOT_READY] += 1
        self.health.held += 1
        self.result.shown = out
        return self.result

    def _start_anew(self, start: list[float]) -> None:
        """From `start`, which was sent last: the next action is compared to it."""
        out, sent = Outcome(start), self.result.shown
        if isinstance(sent, Outcome):
            # As in a tick: what is broken off stands still.
            self._still.before = sent
            self.result.shown = self._still
        self._queue.clear()
        self._state, self._why_empty = LoopState(), _NONE_YET
        self._books.begin_anew(out, self._state)
        self.result.shown = out

    def _forget_order(self) -> None:
        self._drop(_STALE)
        self._state.service = NONE_IN_SERVICE

    def _practise(self, warm: WarmTokenizer) -> None:
        """A tick that is thrown away: every branch of a good one has run, every cache is filled."""
        shown = self.result.shown
        assert isinstance(shown, Outcome)
        self._tick(shown, warm.probe, warm.probe_stats, None, None, 1e7)


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
