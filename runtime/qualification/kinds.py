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
from ..control.config import OnFault, OutOfRange, Status
from ..control.errors import WrongThreadError
from ..control.realtime import Watchdog
from .injection import Fault
from .rig import MOST_FAULTS, PATIENCE_S, PERIOD_S, Answer, Rig, Setup

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

    def expected(self, setup: Setup) -> Answer:
        """The right one, but for its detail."""
        if self.is_backend and setup.has_fallback:
            return Answer(Status.OK, is_held=False, fell_back=True, is_latched=False)
        limits = self.status is Status.OUT_OF_RANGE and setup.out_of_range is OutOfRange.LIMIT
        is_held = self.is_held and not limits
        is_latched = is_held and (self.latches or setup.on_fault is OnFault.STOP)
        return Answer(self.status, is_held, fell_back=False, is_latched=is_latched)


# --- tokens -----------------------------------------------------------------------------------------------------------


def _changed(change: Callable[[Any, Rig], Any], rig: Rig) -> Answer:
    chunk = rig.pick()
    return rig.send(chunk, tokens=change(chunk.tokens.copy(), rig))


def _with(value: int, tokens: Any, rig: Rig) -> Any:
    tokens.reshape(-1)[rig.rng.randrange(tokens.size)] = value
    return tokens


def _another_type(tokens: Any, rig: Rig) -> Any:
    types = ("int8", "int16", "uint16", "uint32", "uint64", ">i4", "bool", "complex64", "S1")
    return tokens.astype(rig.rng.choice(types))


def _no_array(tokens: Any, rig: Rig) -> Any:
    return rig.rng.choice((tokens.tolist(), object(), "tokens", memoryview(tokens), 3, b"\0", tokens.flat, np.int32(1)))


def _another_shape(tokens: Any, rig: Rig) -> Any:
    others = (
        tokens[0],
        tokens[None],
        tokens[:, :-1],
        tokens[:, :, :-1],
        tokens[..., :0],
        tokens[:0],
        tokens.reshape(-1),
        np.concatenate((tokens, tokens)),
        np.concatenate((tokens, tokens), axis=3),
        np.int32(tokens.flat[0]).reshape(()),
        np.swapaxes(tokens, 2, 3)[:, :, :, :, None],
    )
    return rig.rng.choice(others)


def _masked(tokens: Any, rig: Rig) -> Any:
    """A subclass of ndarray with rules of its own, in which the illegal value is hidden."""
    masked = np.ma.masked_array(_with(-1, tokens, rig), mask=True)
    return rig.rng.choice((masked, masked.view(np.recarray)))


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
        wrong: list[Any] = [np.ones((*chunk.tokens.shape[:2], chunk.tokens.shape[3], 2), np.float32)]
    else:
        wrong = [None, stats[:, :-1], stats.astype(np.float64), stats.tolist(), stats * -1]
        for value in (math.nan, math.inf, -math.inf):
            altered = stats.copy()
            altered.reshape(-1)[rig.rng.randrange(altered.size)] = value
            wrong.append(altered)
    return rig.send(chunk, stats=rig.rng.choice(wrong))


def _until_latched(rig: Rig) -> Answer:
    return [rig.send(chunk, tokens=chunk.tokens + 1000) for chunk in [rig.pick() for _ in range(MOST_FAULTS)]][-1]


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
    healthy = rig.backend.replace(backend)
    try:
        return rig.send(rig.pick())
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
    return rig.send(rig.pick(rig.model.prefixes[0]), sequence=rig.sequence, age=1)


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


_BAD_TOKENS: dict[str, Callable[[Any, Rig], Any]] = {
    "token too high by one": lambda tokens, rig: _with(rig.model.vocabulary, tokens, rig),
    "token far too high": partial(_with, 2**31 - 1),
    "negative token": partial(_with, -1),
    "int64 tokens that wrap to legal ones": lambda tokens, _: tokens.astype(np.int64) + 2**32,
    "uint8 token too high": lambda tokens, rig: _with(255, tokens.astype(np.uint8), rig),
    "float tokens": lambda tokens, rig: tokens.astype(rig.rng.choice(("float16", "float32", "float64"))),
    "NaN tokens": lambda tokens, _: np.full(tokens.shape, np.nan),
    "array of objects": lambda tokens, _: np.full(tokens.shape, None, object),
    "tokens of another type": _another_type,
    "no array at all": _no_array,
    "tokens of another shape": _another_shape,
    "masked or record array": _masked,
}
_WITHOUT_ACTIONS = (Fault.RAISES, Fault.RAISES_UNKNOWN, Fault.OUT_OF_MEMORY, Fault.WRONG_SHAPE)
_NOT_FINITE = (Fault.NAN, Fault.INF, Fault.WRITES_NOTHING)


KINDS: tuple[Kind, ...] = (
    *(Kind(name, Status.BAD_TOKEN, partial(_changed, change)) for name, change in _BAD_TOKENS.items()),
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
    Kind("duplicated chunk, dated anew", _STALE, partial(_dated, lambda _: 0, ahead=0), is_held=False),
    Kind("reordered chunks", _STALE, _reordered, is_held=False),
    Kind("draft after its whole", _STALE, _draft_after_whole, is_held=False),
    Kind("producer stops", _STALE, _no_more),
    Kind("clock jumps forward", _STALE, partial(_jump, 50 * PERIOD_S)),
    Kind("clock jumps back", _STALE, partial(_jump, -50 * PERIOD_S)),
    Kind("clock jumps forward within a tick", _MISS, partial(_late, 50 * PERIOD_S)),
    Kind("clock jumps back within a tick", _STALE, _back_within),
    Kind("clock raises", _FAULT, _no_clock),
    Kind("deadline is no number", _MISS, _no_deadline, recoveries=lambda setup: int(setup.use_worker), takes_time=True),
    Kind("another thread steps", Status.OK, _wrong_thread, is_held=False),
)


def kinds_with(nan_backends: Mapping[str, Backend]) -> tuple[Kind, ...]:
    """KINDS, and one more for every real backend whose weights are NaN."""
    weights = {f"NaN weights in {name}": partial(_nan_weights, backend) for name, backend in nan_backends.items()}
    return (*KINDS, *(_backend(name, Status.NONFINITE, inject) for name, inject in weights.items()))
