"""One tick after another: which chunk is used, which action is due, and the status that says why."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..bundle.arrays import Float32Array
from ..bundle.models import ModelEntry
from ..bundle.validation import token_types
from .belief_config import WhenUncertain
from .beliefs import BeliefJudge
from .chain import BackendChain
from .config import ControlConfig, OutOfRange, Status
from .errors import in_words, is_from_outside
from .guard import ActionGuard
from .order import ChunkOrder, nanoseconds, stamp
from .queue import action_queue
from .result import INTERNAL, NO_NUMBER, NO_SERVICE, NO_STAMPS, RUN_OUT, WRONG_NUMBER, BrokenOff, LoopState, TickOutcome
from .tick_log import TickLog

# Bound names: Python finds a member of an enum more slowly than numpy adds seven numbers.
_OK, _DEADLINE_MISS, _BAD_TOKEN, _STALE = Status.OK, Status.DEADLINE_MISS, Status.BAD_TOKEN, Status.STALE
_OUT_OF_RANGE, _NOT_READY, _BACKEND_FAULT = Status.OUT_OF_RANGE, Status.NOT_READY, Status.BACKEND_FAULT
_UNCERTAIN = Status.UNCERTAIN
_now = time.monotonic_ns
_Array = np.ndarray
#: The deadline of ticks that are only rehearsed.
_REHEARSAL_US = 1e7


class ControlLoop:
    """Puts ticks together; `ControlDecoder` shows them when they are whole. For one thread.

    A tick leaves `state` and the queue to the next one. chain: what decodes; set by `rehearse`.
    """

    chain: BackendChain
    #: The tick under way, and its deadline.
    _out: TickOutcome
    _deadline_ns: int | None = None

    def __init__(
        self, config: ControlConfig, model: ModelEntry, guard: ActionGuard, tick_log: TickLog, clock: Callable[[], int]
    ) -> None:
        self.tick_log = tick_log
        self.state = LoopState()
        #: One is shown while the other is filled.
        self.outcomes = TickOutcome(guard.sent), TickOutcome(guard.sent)
        self._config, self._guard, self._clock = config, guard, clock
        self._health = tick_log.health
        self._length = model.chunk_length
        self._order = ChunkOrder(config, model)
        self._token_types = token_types(model)
        self._stale_ns = self._order.stale_ns
        self._queue = action_queue(config, model.chunk_length)
        self._allowed_ns = None if config.deadline_us is None else nanoseconds(config.deadline_us)
        self._is_limiting = config.out_of_range is OutOfRange.LIMIT
        self._judge = None if config.beliefs is None else BeliefJudge(config, config.beliefs, model)
        #: `LoopState.doubt` before the tick under way.
        self._doubt = 0

    def rehearse(self, chain: BackendChain) -> None:
        """Run ticks on each backend and throw them away, so that the first real one finds every cache filled."""
        self.chain = chain
        for warm in chain.warm:
            for found in chain.warm:
                found.is_healthy = found is warm
            for _ in range(self._length):
                self.tick(self.outcomes[0], *warm.probe, None, None, _REHEARSAL_US)
                if warm.beliefs is not None:
                    self.tick(self.outcomes[0], warm.beliefs.probe, None, None, None, _REHEARSAL_US)
                    # It may be too uncertain, and stand still.
                    self.state.latched = None
        for found in chain.warm:
            found.is_healthy = True

    def begin_anew(self, out: TickOutcome) -> None:
        """Start again from `out`, which says where the robot is."""
        self._queue.clear()
        self.state = LoopState(used=self.state.used)
        self.tick_log.begin_anew(out)

    def make_up_for(self, broken: BrokenOff) -> TickOutcome:
        """Take what was shown of a tick that was broken off as sent; nothing that it left half done is served."""
        self._drop(_BACKEND_FAULT)
        sent = broken.settled()
        self.tick_log.make_up_for(sent, self.state)
        return sent

    def tick(  # noqa: PLR0913  # as `step` was given them: to pack them takes time
        self,
        sent: TickOutcome,
        tokens: object,
        stats: object,
        sequence: object,
        observed_ns: object,
        deadline_us: object,
    ) -> TickOutcome:
        """This tick, whole and not yet shown; `sent` is what was shown before it."""
        first, second = self.outcomes
        self._out = out = second if sent is first else first
        out.detail, out.tick, out.sequence, out.backend = "", sent.tick, sent.sequence, sent.backend
        out.is_held = out.fell_back = out.is_limited = out.is_accepted = False
        out.belief = None
        out.begin, out.stamps = NO_NUMBER, NO_STAMPS
        self._guard.sent = sent.values
        if sequence is not None or observed_ns is not None:
            out.stamps = stamp(sequence), stamp(observed_ns)
        self._health.last_tick_ns = _now()
        try:
            begin = out.begin = self._clock()
            allowed_ns = self._allowed_ns if deadline_us is None else nanoseconds(deadline_us)
            self._deadline_ns = None if allowed_ns is None else begin + allowed_ns
            out.status = self._decide(begin, tokens, stats)
            if not out.is_held:
                # The action is there: is it still in time, and is all that it is made of young enough?
                now = self._clock()
                if allowed_ns is not None and now - begin > allowed_ns:
                    out.status = self._explain_late(now - begin, deadline_us)
                elif self._queue.first_observed_ns < now - self._stale_ns:
                    status = _OK if out.status is _UNCERTAIN else out.status
                    out.status = self._serve(now, self.state.line[0], status)
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
        self.tick_log.close_tick(out, self.state, tokens, stats)
        return out

    def _explain_late(self, taken_ns: int, deadline_us: object) -> Status:
        allowed_us = self._config.deadline_us if deadline_us is None else deadline_us
        if nanoseconds(allowed_us) < 0:
            found = allowed_us if isinstance(allowed_us, (int, float)) else f"a {type(allowed_us).__qualname__}"
            return self._hold(_DEADLINE_MISS, f"deadline_us is {found}; expected a number above 0: correct it")
        return self._hold(
            _DEADLINE_MISS,
            f"the action was there after {taken_ns / 1e3:.0f} us; expected {allowed_us:.0f}: look at what else runs "
            "here, or raise deadline_us",
        )

    def _fail(self, error: Exception) -> None:
        """Hold this tick: the decoder itself has failed, or the clock that it was given."""
        self._out.fell_back = False
        self.state.used = INTERNAL
        self._drop(_BACKEND_FAULT)
        latched = self.state.latched
        self._out.status = self._hold(
            _BACKEND_FAULT if latched is None else latched,
            f"the decoder itself, or its clock, failed: {in_words(error)}; look at the clock, or report it as a bug",
        )

    def _decide(self, begin: int, tokens: object, stats: object) -> Status:
        """The status of this tick; its action is in the guard unless the tick is held."""
        state, order = self.state, self._order
        counted, last = state.line
        self._doubt = state.doubt
        # A tick that was broken off, or without a clock, has been shown under a number that no clock has given.
        shown = self._out.tick
        if shown > counted:
            counted = shown
        tick = counted + 1
        if state.latched is not None:
            state.line = tick, begin
            return self._hold(state.latched, "standing still after a fault; find the cause, then call reset()")
        if last != NO_NUMBER:
            if begin < last:
                state.line = tick, begin
                self._drop(_STALE)
                state.service = NO_SERVICE
                return self._hold(
                    _STALE,
                    f"the clock went back by {(last - begin) / 1e9:.6f} s; expected a monotonic one: what was observed "
                    "before cannot be dated",
                )
            timed = order.next_tick(begin, state.line, state.service if state.is_queued else None)
            if timed > tick:
                self._health.missed_ticks += timed - tick
                tick = timed
        state.line = tick, begin
        status = _OK
        if tokens is not None:
            status = self._receive(begin, tick, tokens, stats)
            if status is not _OK and not self._out.is_accepted:
                self._health.refused_chunks += 1
                if status is not _STALE:
                    self._out.is_held = True
                    self._drop(status)
                    return status
        return self._serve(begin, tick, status)

    def _serve(self, now: int, tick: int, status: Status) -> Status:
        """Take the action of this tick from the queue; status: of the chunk that came on this tick."""
        out, state = self._out, self.state
        oldest = now - self._stale_ns
        if state.is_queued:
            _, observed, _, _ = state.service
            if observed < oldest:
                self._drop(_STALE)
                return self._hold(_STALE, self._order.too_old(now - observed))
        action = self._queue.take(tick, oldest)
        if action is None:
            if status is _OK:
                return self._hold(_STALE if state.has_begun else _NOT_READY, state.why_empty)
            return self._hold(status, f"{out.detail}; and there is nothing else: {state.why_empty}")
        judge = self._judge
        if judge is not None and judge.has_belief:
            return self._serve_believed(action, judge, tick, status)
        out.is_limited = self._guard.limit(action)
        return status

    def _serve_believed(self, action: Float32Array, judge: BeliefJudge, tick: int, status: Status) -> Status:
        """Serve an action that came as a belief as far as it is sure enough; status: of the chunk on this tick."""
        out, state, guard, beliefs = self._out, self.state, self._guard, self._config.beliefs
        assert beliefs is not None
        *_, start = state.service
        row = tick - start
        out.belief = judge.believed(row)
        # Of the doubt before this tick: it may be served twice, where something has become too old meanwhile.
        state.doubt = judge.doubt_after(self._doubt, row)
        if not state.doubt:
            out.is_limited = guard.limit(action)
            return status
        why = judge.why(row)
        if not out.detail.endswith(why):
            out.detail = f"{out.detail}; and {why}" if out.detail else why
        if beliefs.when_uncertain is WhenUncertain.HOLD:
            out.is_held = True
        elif beliefs.when_uncertain is WhenUncertain.SLOW:
            out.is_limited = guard.slow(action, beliefs.slow_factor)
        else:
            out.is_limited = guard.limit(action)
        return _UNCERTAIN

    def _receive(self, begin: int, tick: int, tokens: Any, stats: object) -> Status:
        """Check, decode and queue a chunk. STALE leaves the older chunk in service."""
        out, state, order = self._out, self.state, self._order
        stamps = out.stamps
        if type(tokens) is _Array:
            layers = order.layers_of.get(tokens.shape, 0) if tokens.dtype in self._token_types else 0
        else:
            layers = order.layers_believed(tokens)
        if not layers or WRONG_NUMBER in stamps:
            # `tick` says what is wrong: it has the arguments as they were given.
            return _BAD_TOKEN
        service, is_queued = state.service, state.is_queued
        last_number, last_observed, _, last_start = service
        is_drained = not is_queued or tick - last_start >= self._length
        placed = order.place(begin, tick, layers, service, stamps, is_drained)
        if isinstance(placed, str):
            out.detail = placed
            return _STALE
        chain = self.chain
        status = chain.decode(tokens, stats, self._deadline_ns)
        used = chain.used
        out.backend, state.used = used.name, used.index
        if status is not _OK or chain.fell_back:
            out.detail, out.fell_back = chain.detail, chain.fell_back
        if status is not _OK and not (status is _OUT_OF_RANGE and self._is_limiting):
            return status
        number, observed, _, start = placed
        is_swap = is_queued and number == last_number and observed == last_observed
        self._queue.push(chain.chunk, start, observed, is_swap=is_swap)
        if self._judge is not None:
            self._judge.take_in(chain.decoded)
        state.service = placed
        out.is_accepted = state.has_begun = state.is_queued = True
        state.why_empty = RUN_OUT
        out.sequence = number
        self._health.chunks += 1
        return status

    def _hold(self, status: Status, detail: str) -> Status:
        self._out.is_held, self._out.detail = True, detail
        return status

    def _drop(self, why: Status) -> None:
        """Serve nothing of what is queued any more."""
        self._queue.clear()
        state = self.state
        state.is_queued = False
        if state.has_begun:
            state.why_empty = (
                f"what was queued was dropped on tick {state.line[0]}, {why.name}; expected a new chunk since"
            )
