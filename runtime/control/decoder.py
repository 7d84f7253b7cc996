"""`ControlDecoder`: between the tokens of a policy and a moving robot, one action per tick, and never a surprise."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

from ..bundle.arrays import Float32Array
from ..bundle.errors import CannotCopyError
from ..bundle.paths import as_path
from ..tokenizer import ActionTokenizer
from .beliefs import GivenBelief, check_beliefs
from .chain import BackendChain
from .config import ControlConfig, OnFault, Status
from .errors import ControlConfigError, ControlFaultError, WrongThreadError, in_words, is_from_outside
from .guard import ActionGuard
from .health import Health, HealthSnapshot
from .loop import ControlLoop
from .order import steady
from .recorder import FlightRecorder
from .result import ADVICE, BROKEN_OFF, BrokenOff, ControlResult, LoopState, TickOutcome
from .tick_log import Reporter, TickLog

#: In place of the owning thread: the decoder was inherited by fork, and its threads were not.
_FORKED = object()
# A bound name: Python finds a member of an enum more slowly than numpy adds seven numbers.
_NOT_READY = Status.NOT_READY
_thread = threading.get_ident
_ASKED_FOR = (WrongThreadError, ControlFaultError)


class ControlDecoder:
    """One action per tick from chunks of tokens, with a status that says whether it can be trusted.

    For one thread: the one that calls `warmup()`. From another, and in a child of fork, `step` and `reset` raise
    WrongThreadError; `health`, `snapshot()` and `openmetrics()` may be read from any. Each robot has one of its own,
    and a process may have any number. A signal's handler may raise, but calls neither `step` nor `reset`.

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
        check_beliefs(config, (tokenizer, *fallbacks))
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
        self._guard = ActionGuard(config, model.chunk_length, position)
        self._recorder = None
        if config.record_ticks:
            self._recorder = FlightRecorder(config.record_ticks, model, has_beliefs=config.beliefs is not None)
        self.health = Health()
        self._tick_log = TickLog(config, self._clock, self._recorder, self.health)
        self._loop = ControlLoop(config, model, self._guard, self._tick_log, self._clock)
        self._meta: dict[str, Any] = {
            "config": config.to_values(),
            "fingerprint": tokenizer.fingerprint,
            "token_shape": model.tokens_shape(1)[1:],
            "backends": [found.backend.name for found in self._tokenizers],
        }
        self._pauses_gc, self._raises = config.pause_gc, config.on_fault is OnFault.RAISE
        self._owner: object = None
        self._chain: BackendChain | None = None
        self._is_gc_paused = False
        shown, _ = self._loop.outcomes
        self._still = BrokenOff(self._guard.held_after, shown)
        self.result = ControlResult(shown)

    def warmup(self, make_chain: Callable[..., BackendChain] = BackendChain, *, reports: bool = True) -> None:
        """Run everything once, and make the calling thread the loop's. Raises what a broken backend raises.

        For replays: make_chain, called as BackendChain is; reports, whether log lines and records are written.
        """
        if self._chain is not None:
            raise ControlConfigError(
                "warmup() was called before; expected once per decoder: call reset() to go on, or make another one"
            )
        self._chain = chain = make_chain(self._tokenizers, self.config, self._guard, self._clock, self.health)
        self._loop.rehearse(chain)
        self.health.count_anew()
        chain.start()
        if self._recorder is not None:
            self._recorder.written = 0
        self._start_anew(self.result.shown.values)
        if reports:
            self._tick_log.reporter = Reporter(self.config, self.health, self._recorder, self._meta)
        self._owner = _thread()
        _WARM.add(self)

    def step(  # noqa: C901, PLR0913  # the two nets under a tick, which no call may stand between
        self,
        tokens: object = None,
        *,
        logits: object = None,
        probabilities: object = None,
        deadline_us: float | None = None,
        stats: Float32Array | None = None,
        sequence: int | None = None,
        observed_ns: int | None = None,
    ) -> ControlResult:
        """The action of this tick. Call it once per tick, with what has arrived: tokens, logits, probabilities or None.

        tokens: int32 or int64 [1, T, D, l] (uint8 too) or [1, l] (uint16 too), l a built prefix. logits, probabilities:
        float32, as `ActionTokenizer.decode_logits` takes them, of one chunk, where the settings have `beliefs`. An
        action that is too uncertain is UNCERTAIN; `result.belief` says how far it may be off. deadline_us: from now, in
        place of the settings' own. stats: float32 [1, T, l, 2], for `dynamic` bundles. sequence: of the chunk,
        counting up; the same one with a larger l takes the place of the draft that came before.
        observed_ns: when the policy looked, on this decoder's clock: action i is for that time + i periods.

        Raises WrongThreadError from another thread, ControlFaultError where `on_fault` is `raise`, and what a signal's
        handler raises, as KeyboardInterrupt; nothing else, whatever a backend, the clock or the decoder itself raises.
        `result` is safe to be sent after each: a tick that was broken off stands still. An exception that comes just
        before a tick begins or just after it has ended leaves the last or this tick's whole result. `result.tick`
        tells which: where that was sent already, call again; else send it (docs/control_loop.md, "What is promised").
        """
        sent = self.result.shown
        try:
            try:
                result = self.result
                if _thread() != self._owner:
                    return self._refuse_thread(sent)
                if isinstance(sent, BrokenOff):
                    sent = self._loop.make_up_for(sent)
                    # Another one, for the one before is shown still.
                    self._still = BrokenOff(self._guard.held_after, sent)
                still = self._still
                still.before = sent
                result.shown = still
                pauses = self._pauses_gc and (gc.isenabled() or self._is_gc_paused)
                if logits is not None or probabilities is not None:
                    tokens = GivenBelief(tokens, logits, probabilities)
                try:
                    if pauses:
                        self._is_gc_paused = True
                        gc.disable()
                    out = self._loop.tick(sent, tokens, stats, sequence, observed_ns, deadline_us)
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
                # Nothing that could fail comes first, not even a call: the stack may be full.
                if isinstance(sent, TickOutcome):
                    self._still.before = sent
                    self.result.shown = self._still
                # What the decoder or a library raises never reaches the loop: it gets a safe action.
                if isinstance(error, Exception) and (isinstance(error, RecursionError) or not is_from_outside(error)):
                    if self._raises:
                        raise ControlFaultError(BROKEN_OFF) from error
                    return self.result
                self._still.detail = f"{BROKEN_OFF}: {in_words(error)}; {ADVICE}"
                raise
        except _ASKED_FOR:
            raise
        except BaseException:
            if isinstance(sent, TickOutcome):
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

    def resume(self, sent: Float32Array, tick: int, state: LoopState) -> None:
        """Go on as if `sent` had left last, on `tick`, and the loop were in `state`; the queue stays. For replays."""
        self.result.shown = TickOutcome(sent.tolist(), tick=tick)
        self._loop.state = state

    def snapshot(self) -> HealthSnapshot:
        """Counters and latencies since `warmup()`; from any thread."""
        return self.health.snapshot()

    def openmetrics(self) -> str:
        """The same as OpenMetrics text; from any thread."""
        return self.health.openmetrics()

    def write_flight_record(self, path: str | os.PathLike[str]) -> bool:
        """Write the last ticks to `path`, now; not from the loop. False if the disk refuses, which is logged."""
        if self._tick_log.reporter is None or self._recorder is None:
            raise ControlConfigError("there is no flight record; call warmup(), with record_ticks above 0")
        return self._tick_log.reporter.write(as_path(path, "the flight record"))

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until log lines and records are written; not from the loop."""
        return self._tick_log.reporter is None or self._tick_log.reporter.flush(timeout_s)

    def close(self) -> None:
        """End the threads beside the loop; the tokenizers stay open. Closing twice is harmless.

        A thread that hangs in a backend is left there: then do not close the tokenizer of that backend.
        """
        self._owner = None
        if self._chain is not None:
            self._chain.close()
        if self._tick_log.reporter is not None:
            self._tick_log.reporter.close()
            self._tick_log.reporter = None

    def __repr__(self) -> str:
        state = "not warm"
        if self._chain is not None:
            state = "closed" if self._owner is None else f"tick {self.result.tick}, {self.result.status}"
        return f"{type(self).__name__}({state}, {self.config.strategy}, {', '.join(map(repr, self._tokenizers))})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Before `warmup()` a copy has the same parts and position; afterwards this raises CannotCopyError."""
        if self._chain is not None:
            raise CannotCopyError(
                "a decoder that has been warmed up cannot be copied or pickled: it has threads, and one robot's last "
                "command; make another one, or copy it before warmup()"
            )
        first, *fallbacks = self._tokenizers
        named = {"fallbacks": fallbacks, "position": tuple(self.result.shown.values), "clock": self._clock}
        return _made_again, (type(self), first, self.config, named)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_thread(self, sent: TickOutcome | BrokenOff) -> ControlResult:
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
        out = TickOutcome(
            self._guard.values,
            tick=sent.tick,
            sequence=sent.sequence,
            is_latched=sent.is_latched,
            backend=sent.backend,
            detail="the decoder is not warm, or closed; call warmup() in the thread of the loop",
        )
        self.health.statuses[_NOT_READY] += 1
        self.health.held += 1
        self.result.shown = out
        return self.result

    def _start_anew(self, start: list[float]) -> None:
        """Start again from `start`, as if it had been sent last: the next action is compared to it."""
        out, sent = TickOutcome(start), self.result.shown
        if isinstance(sent, TickOutcome):
            # As in a tick: a start that is broken off stands still.
            self._still.before = sent
            self.result.shown = self._still
        self._loop.begin_anew(out)
        self.result.shown = out


def _made_again(kind: type[ControlDecoder], tokenizer: ActionTokenizer, config: ControlConfig, named: Any) -> Any:
    return kind(tokenizer, config, **named)


#: The decoders that a child of fork inherits.
_WARM: weakref.WeakSet[ControlDecoder] = weakref.WeakSet()


def _disown() -> None:
    for decoder in list(_WARM):
        decoder._owner = _FORKED  # noqa: SLF001  # of the class above


os.register_at_fork(after_in_child=_disown)
