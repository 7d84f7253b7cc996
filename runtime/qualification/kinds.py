"""The faults of a campaign: what each one is, how it is injected, and what the right answer is."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..backends.contract import Backend
from ..bundle.arrays import Codes
from ..bundle.models import ModelEntry
from ..control.belief_config import WhenUncertain
from ..control.config import OnFault, OutOfRange, Status
from ..control.errors import WrongThreadError
from ..control.realtime import Watchdog
from . import belief_faults
from .belief_faults import BAD_BELIEFS
from .injection import Fault
from .rig import MOST_FAULTS, PATIENCE_S, PERIOD_S, Answer, Rig, Setup
from .token_faults import BAD_TOKENS, LEGAL_TOKENS, Change

Inject = Callable[[Rig], Answer]
_SILENCE_S = 0.02
#: Deadlines of ticks in which a backend hangs. They pass in full; with a fallback, half is left for its answer.
_HANG_US, _HANG_WITH_FALLBACK_US = 4e4, 6e5


@dataclass(frozen=True)
class Kind:
    """One kind of fault. inject: returns the answer of the tick that must have noticed it.

    is_held: whether that tick stands still. is_backend: a backend fails, so that the fallback answers if there is one,
    and the failed one is tried again. recoveries: how many backends have to come back. applies: to which setups.
    latches: the decoder stands still afterwards until `reset()`. is_slow: real time passes, so each setup draws it once
    at most. takes_time: a thread has to come back before service goes on.
    """

    name: str
    status: Status
    inject: Inject
    is_held: bool = True
    is_backend: bool = False
    recoveries: Callable[[Setup], int] = lambda _: 0
    applies: Callable[[Setup], bool] = lambda _: True
    latches: bool = False
    is_slow: bool = False
    takes_time: bool = False

    def expected(self, setup: Setup, chunk_length: int) -> Answer:
        """The right one, but for its detail."""
        if self.is_backend and setup.has_fallback:
            return Answer(Status.OK, is_held=False, fell_back=True, is_latched=False)
        limits = self.status is Status.OUT_OF_RANGE and setup.out_of_range is OutOfRange.LIMIT
        # A chunk of one action leaves nothing to be served in place of a stale one.
        is_drained = self.status is Status.STALE and chunk_length == 1
        is_held = (self.is_held or is_drained) and not limits
        if self.status is Status.UNCERTAIN:
            is_held = setup.when_uncertain is WhenUncertain.HOLD
        is_latched = is_held and (self.latches or setup.on_fault is OnFault.STOP)
        return Answer(self.status, is_held, fell_back=False, is_latched=is_latched)


# --- tokens -----------------------------------------------------------------------------------------------------------


def _changed(change: Change, rig: Rig) -> Answer:
    chunk = rig.pick()
    return rig.send(chunk, tokens=change(chunk.tokens.copy(), rig))


def _number(name: str, rig: Rig) -> Answer:
    wrong = (1.5, "1", 2**70, -(2**70), math.nan, True, [1], np.float64(1))
    chunk = rig.pick()
    options: dict[str, Any] = {"sequence": rig.sequence + 1, name: rig.rng.choice(wrong)}
    return rig.tick(chunk.tokens, stats=chunk.stats, **options)


def _stats(rig: Rig) -> Answer:
    chunk = rig.pick()
    stats: Any = chunk.stats
    if stats is None:
        # Stats of another bundle: mean and scale of this one are constants.
        wrong: list[Any] = [np.ones(rig.model.stats_shape(1), np.float32)]
    else:
        wrong = [None, stats[:, :-1], stats.astype(np.float64), stats.tolist(), stats * -1]
        for value in (math.nan, math.inf, -math.inf):
            altered = stats.copy()
            altered.reshape(-1)[rig.rng.randrange(altered.size)] = value
            wrong.append(altered)
    return rig.send(chunk, stats=rig.rng.choice(wrong))


def _until_latched(rig: Rig) -> Answer:
    wrong = rig.model.vocabulary
    return [rig.send(chunk, tokens=chunk.tokens + wrong) for chunk in [rig.pick() for _ in range(MOST_FAULTS)]][-1]


def _still_legal(change: Change, rig: Rig) -> Answer:
    """Tokens that no check can tell from good ones: served as what they mean, inside limits and slew."""
    tokens = change(rig.pick().tokens.copy(), rig)
    return rig.send(rig.decoded(Codes(tokens, None)))


# --- backends ---------------------------------------------------------------------------------------------------------


def _failing(fault: Fault, rig: Rig) -> Answer:
    rig.backend.fault = fault
    return rig.send(rig.pick())


def _huge(rig: Rig) -> Answer:
    rig.backend.fault = Fault.HUGE
    chunk = rig.pick()
    rows = chunk.rows.copy()
    # What the fault makes of it: it is served if such a chunk is limited and not refused.
    rows[0, 0] = 1e30
    return rig.send(replace(chunk, rows=rows))


def _both_failing(rig: Rig) -> Answer:
    rig.spare.fault = Fault.RAISES
    return _failing(Fault.RAISES, rig)


def _nan_weights(backend: Backend, rig: Rig) -> Answer:
    chunk, healthy = rig.pick(), rig.backend.replace(backend)
    if not rig.model.token_grid:
        # Of the first class: escape, in which random chunks are sent, has no weights.
        chunk = rig.decoded(Codes(np.zeros_like(chunk.tokens), None))
    try:
        return rig.send(chunk)
    finally:
        rig.backend.replace(healthy)


def _late(seconds: float, rig: Rig) -> Answer:
    rig.backend.fault, rig.backend.delay_s = Fault.SLOW, seconds
    chunk = rig.pick()
    answer = rig.send(chunk)
    if seconds > 0:
        rig.expect_service(chunk, 1 + round(seconds / PERIOD_S))
    return answer


def _hanging(rig: Rig) -> Answer:
    """A backend hangs in a worker's thread, and still hangs when the next chunk comes."""
    rig.backend.fault = Fault.HANGS
    deadline_us = _HANG_WITH_FALLBACK_US if rig.setup.has_fallback else _HANG_US
    answer = rig.send(rig.pick(), deadline_us=deadline_us)
    again = rig.send(rig.pick(), deadline_us=deadline_us)
    is_right = again.status is (Status.OK if rig.setup.has_fallback else Status.DEADLINE_MISS)
    if not is_right and not answer.is_latched:
        rig.check.problems.append(f"the chunk after a hanging one: {again}: {again.detail}")
    return answer


def _hanging_loop(rig: Rig) -> Answer:
    """A backend hangs in the loop's own thread, until the watchdog notices and releases it."""
    called = threading.Event()

    def notice(_: float) -> None:
        if rig.backend.hanging:
            called.set()
            rig.jump(PERIOD_S)
            rig.backend.release()

    watchdog = Watchdog(lambda: rig.decoder.health.last_tick_ns, _SILENCE_S, notice)
    # If the watchdog does not call, the campaign goes on and says so.
    timer = threading.Timer(PATIENCE_S / 2, rig.backend.release)
    watchdog.start()
    timer.start()
    try:
        rig.backend.fault = Fault.HANGS
        chunk = rig.pick()
        answer = rig.send(chunk)
        rig.expect_service(chunk, 2)
    finally:
        watchdog.stop()
        timer.cancel()
    if not called.is_set():
        rig.check.problems.append(f"no watchdog called while the loop hung: {answer}")
    return answer


# --- chunks and clocks ------------------------------------------------------------------------------------------------


def _dated(age: Callable[[Rig], int], rig: Rig, *, ahead: int = 1) -> Answer:
    """A chunk of that age in periods comes while another is in service."""
    rig.send(rig.pick())
    return rig.send(rig.pick(), age=age(rig), sequence=rig.sequence + ahead)


def _late_in_time(rig: Rig) -> Answer:
    rig.send(rig.pick())
    if rig.length == 1:
        return rig.send(rig.pick())
    rig.tick()
    return rig.send(rig.pick(), age=1)


def _same_again(rig: Rig) -> Answer:
    chunk = rig.pick()
    rig.send(chunk)
    return rig.send(chunk, sequence=rig.sequence, age=1)


def _reordered(rig: Rig) -> Answer:
    rig.send(rig.pick(), sequence=rig.sequence + 2)
    return rig.send(rig.pick(), sequence=rig.sequence - 1, age=2)


def _draft_after_whole(rig: Rig) -> Answer:
    rig.send(rig.pick())
    return rig.send(rig.draft(rig.pick()), sequence=rig.sequence, age=1)


def _longer_drafts(rig: Rig) -> Answer:
    """A draft, a longer one on the next tick, and then the whole: each takes the place of the one before."""
    chunk = rig.pick()
    lengths = sorted(rig.rng.sample(rig.model.prefixes, min(3, rig.length, len(rig.model.prefixes))))
    codes = Codes(chunk.tokens, chunk.stats)
    answer = rig.send(rig.decoded(codes.prefix(lengths[0])))
    for age, length in enumerate(lengths[1:], start=1):
        answer = rig.send(rig.decoded(codes.prefix(length)), sequence=rig.sequence, age=age)
    return answer


def _no_more(rig: Rig) -> Answer:
    rig.send(rig.pick())
    return [rig.tick() for _ in range(rig.length)][-1]


def _jump(seconds: float, rig: Rig) -> Answer:
    rig.jump(seconds)
    return rig.tick()


def _back_within(rig: Rig) -> Answer:
    _late(-50 * PERIOD_S, rig)
    rig.clear()
    return rig.tick()


def _no_clock(rig: Rig) -> Answer:
    rig.is_clock_broken = True
    return rig.send(rig.pick())


def _no_deadline(rig: Rig) -> Answer:
    wrong: tuple[Any, ...] = (math.nan, -1.0, 0, math.inf, "soon", -math.inf)
    chunk = rig.pick()
    answer = rig.send(chunk, deadline_us=rig.rng.choice(wrong))
    if not rig.setup.use_worker:
        rig.expect_service(chunk, 1)
    return answer


def _wrong_thread(rig: Rig) -> Answer:
    with ThreadPoolExecutor(1) as another:
        refusal = another.submit(rig.decoder.step, rig.pick().tokens).exception()
    if not isinstance(refusal, WrongThreadError):
        rig.check.problems.append("another thread was not refused")
    return rig.send(rig.pick())


_FAULT, _STALE, _MISS = Status.BACKEND_FAULT, Status.STALE, Status.DEADLINE_MISS


def _backend(name: str, status: Status, inject: Inject, **options: Any) -> Kind:
    options["recoveries"] = lambda setup: int(setup.use_worker or setup.has_fallback)
    return Kind(name, status, inject, is_backend=True, **options)


_WITHOUT_ACTIONS = (Fault.RAISES, Fault.RAISES_UNKNOWN, Fault.OUT_OF_MEMORY, Fault.WRONG_SHAPE)
_NOT_FINITE = (Fault.NAN, Fault.INF, Fault.WRITES_NOTHING)


KINDS: tuple[Kind, ...] = (
    *(Kind(name, Status.BAD_TOKEN, partial(_changed, change)) for name, change in BAD_TOKENS.items()),
    Kind("sequence is no number", Status.BAD_TOKEN, partial(_number, "sequence")),
    Kind("observed_ns is no number", Status.BAD_TOKEN, partial(_number, "observed_ns")),
    Kind("stats missing, NaN or of another bundle", Status.BAD_TOKEN, _stats),
    Kind("bad tokens until it latches", Status.BAD_TOKEN, _until_latched, latches=True),
    *(_backend(f"backend {fault}", _FAULT, partial(_failing, fault)) for fault in _WITHOUT_ACTIONS),
    *(_backend(f"backend {fault}", Status.NONFINITE, partial(_failing, fault)) for fault in _NOT_FINITE),
    Kind("backend gives a huge value", Status.OUT_OF_RANGE, _huge),
    Kind("fallback fails too", _FAULT, _both_failing, recoveries=lambda _: 2, applies=lambda setup: setup.has_fallback),
    Kind("backend is late", _MISS, partial(_late, PERIOD_S)),
    _backend(
        "backend hangs, left behind",
        _MISS,
        _hanging,
        applies=lambda setup: setup.use_worker,
        is_slow=True,
        takes_time=True,
    ),
    Kind("backend hangs the loop", _MISS, _hanging_loop, applies=lambda setup: not setup.use_worker, is_slow=True),
    Kind("chunk from long ago", _STALE, partial(_dated, lambda rig: 2 * rig.length + 2), is_held=False),
    Kind("chunk whose time has passed", _STALE, partial(_dated, lambda rig: rig.length), is_held=False),
    Kind("chunk from the future", _STALE, partial(_dated, lambda _: -10), is_held=False),
    Kind("chunk late, but in time", Status.OK, _late_in_time, is_held=False),
    Kind("duplicated chunk", _STALE, _same_again, is_held=False),
    # Of a chunk of one action nothing is left: dated anew, it would be that of a policy that was restarted.
    Kind("duplicated chunk, dated anew", _STALE, partial(_dated, lambda rig: rig.length == 1, ahead=0), is_held=False),
    Kind("reordered chunks", _STALE, _reordered, is_held=False),
    Kind("draft after its whole", _STALE, _draft_after_whole, is_held=False),
    Kind("draft, a longer one, and its whole", Status.OK, _longer_drafts, is_held=False),
    Kind("producer stops", _STALE, _no_more),
    Kind("clock jumps forward", _STALE, partial(_jump, 50 * PERIOD_S)),
    Kind("clock jumps back", _STALE, partial(_jump, -50 * PERIOD_S)),
    Kind("clock jumps forward within a tick", _MISS, partial(_late, 50 * PERIOD_S)),
    Kind("clock jumps back within a tick", _STALE, _back_within),
    Kind("clock raises", _FAULT, _no_clock),
    Kind("deadline is no number", _MISS, _no_deadline, recoveries=lambda setup: int(setup.use_worker), takes_time=True),
    Kind("another thread steps", Status.OK, _wrong_thread, is_held=False),
)


_CHUNK_KINDS: tuple[Kind, ...] = tuple(
    Kind(name, Status.OK, partial(_still_legal, change), is_held=False) for name, change in LEGAL_TOKENS.items()
)


def _failing_on_belief(fault: Fault, rig: Rig) -> Answer:
    rig.backend.fault = fault
    return rig.believe(rig.certain(rig.pick()))


#: Where beliefs are taken, too.
BELIEF_KINDS: tuple[Kind, ...] = (
    *(Kind(name, Status.BAD_TOKEN, partial(belief_faults.sent, change)) for name, change in BAD_BELIEFS.items()),
    Kind("flat belief", Status.UNCERTAIN, belief_faults.flat),
    Kind("belief that flips between modes", Status.UNCERTAIN, belief_faults.flipping),
    Kind("belief that trembles about its limit", Status.UNCERTAIN, belief_faults.trembling),
    Kind("belief from long ago", _STALE, belief_faults.late, is_held=False),
    Kind("tokens, and their belief again", _STALE, belief_faults.again, is_held=False),
    Kind("belief of a draft, and of its whole", Status.OK, belief_faults.longer, is_held=False),
    _backend("backend raises on a belief", _FAULT, partial(_failing_on_belief, Fault.RAISES)),
    _backend("backend gives NaN for a belief", Status.NONFINITE, partial(_failing_on_belief, Fault.NAN)),
    _backend(
        "backend writes nothing for a belief", Status.NONFINITE, partial(_failing_on_belief, Fault.WRITES_NOTHING)
    ),
)


def kinds_with(
    nan_backends: Mapping[str, Backend], model: ModelEntry, *, takes_beliefs: bool = False
) -> tuple[Kind, ...]:
    """KINDS, those of this kind of tokens and of beliefs, and one for every real backend whose weights are NaN."""
    weights = {f"NaN weights in {name}": partial(_nan_weights, backend) for name, backend in nan_backends.items()}
    return (
        *KINDS,
        *(() if model.token_grid else _CHUNK_KINDS),
        *(BELIEF_KINDS if takes_beliefs else ()),
        *(_backend(name, Status.NONFINITE, inject) for name, inject in weights.items()),
    )
