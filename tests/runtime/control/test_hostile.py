"""What clocks, backends and callers do at their worst: it costs a tick, not the loop, nor the service after it."""

import asyncio
import functools
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer, ControlDecoder, Status
from rfsq.runtime.control.errors import in_words, is_from_outside
from rfsq.runtime.control.worker import WarmTokenizer
from rfsq.runtime.qualification.soak import chunks_of
from tests.bundles import Recipe
from tests.runtime.control.loops import PERIOD_NS, Clock, check_safe, loop, scripted, switched


class WordlessError(Exception):
    def __str__(self) -> str:
        raise SystemExit(4)


@pytest.fixture(scope="module")
def tokens(tokenizer: ActionTokenizer) -> Any:
    return chunks_of(tokenizer, 1)[0][0]


# --- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 1e300, -5, 0, 2**61, -(2**80), 2**80, "noon", None, True]
)
@pytest.mark.parametrize("reading", [1, 2, 3])
@pytest.mark.parametrize("use_worker", [False, True])
def test_one_wrong_value_of_the_clock_costs_no_more_than_the_next_chunk(
    tokenizer: ActionTokenizer, tokens: Any, value: Any, reading: int, use_worker: bool
) -> None:
    clock, readings = Clock(), 10

    def read() -> Any:
        nonlocal readings
        readings -= 1
        return clock() if readings else value

    changes = {"use_worker": True, "deadline_us": 60e6} if use_worker else {}
    with loop(tokenizer, clock=read, **changes) as decoder:
        decoder.warmup()
        last = np.zeros(3, np.float32)

        def tick(*arguments: Any) -> Any:
            nonlocal last
            clock.now += PERIOD_NS
            result = decoder.step(*arguments)
            check_safe(result, last, decoder.config)
            last = result.actions.copy()
            return result

        readings = 10**9
        assert tick(tokens).status is Status.OK
        readings = reading
        tick(tokens)
        readings = 10**9
        # It may have been a time: what comes after is then before it.
        tick()
        for _ in range(2):
            assert tick(tokens).status is Status.OK
        assert decoder.snapshot().backend == "onnxruntime"


def test_a_clock_may_give_numbers_of_another_type(tokenizer: ActionTokenizer, tokens: Any) -> None:
    for kind in (float, np.int64, np.float64):
        clock = Clock()
        with loop(tokenizer, clock=lambda clock=clock, kind=kind: kind(clock())) as decoder:
            decoder.warmup()
            for _ in range(3):
                clock.now += PERIOD_NS
                assert decoder.step(tokens, observed_ns=clock.now).status is Status.OK
            assert decoder.result.tick == 3


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint64])
def test_stamps_may_be_integers_of_numpy(tokenizer: ActionTokenizer, tokens: Any, kind: type) -> None:
    clock = Clock()
    clock.now = 10**9
    with loop(tokenizer, clock=clock) as decoder:
        decoder.warmup()
        result = decoder.step(tokens, sequence=kind(7), observed_ns=kind(10**9), deadline_us=kind(10**6))
        assert (result.status, result.sequence) == (Status.OK, 7), result.detail
        assert "again" in decoder.step(tokens, sequence=kind(7)).detail
        assert decoder.step(tokens, deadline_us=kind(0)).status is Status.DEADLINE_MISS


# --- what is raised ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), asyncio.CancelledError(), WordlessError()])
@pytest.mark.parametrize("where", ["backend", "clock"])
def test_what_a_backend_or_a_clock_raises_leaves_no_tick(
    tokenizer: ActionTokenizer, tokens: Any, error: BaseException, where: str
) -> None:
    broken, backend = switched(tokenizer)
    clock = Clock()

    def fail(*_: Any) -> Any:
        raise error

    with loop(broken, clock=lambda: fail() if where == "clock" and is_broken else clock()) as decoder:
        is_broken = False
        decoder.warmup()
        decoder.step(tokens)
        is_broken, backend.act = True, fail if where == "backend" else None
        clock.now += PERIOD_NS
        result = decoder.step(tokens)
        assert (result.status, result.is_held) == (Status.BACKEND_FAULT, True)
        assert type(error).__name__ in result.detail
        assert result.tick == 2
        is_broken, backend.act = False, None
        clock.now += PERIOD_NS
        result = decoder.step(tokens)
        assert (result.status, result.tick, decoder.health.missed_ticks) == (Status.OK, 3, 0)


class _Handler:
    def __call__(self, *_: object) -> None:
        sys.exit(5)

    def handle(self, *_: object) -> None:
        sys.exit(5)


@pytest.mark.parametrize(
    "handler",
    [_Handler(), _Handler().handle, functools.partial(_Handler.handle, None), lambda *_: sys.exit(5)],
    ids=["object", "method", "partial", "function"],
)
def test_what_a_handler_raises_leaves_the_tick_though_a_backend_was_running(
    tokenizer: ActionTokenizer, tokens: Any, handler: Any
) -> None:
    broken, backend = switched(tokenizer)
    with loop(broken) as decoder:
        decoder.warmup()
        before = decoder.step(tokens).actions.copy()
        previous = signal.signal(signal.SIGTERM, handler)
        try:
            backend.act = lambda _: signal.raise_signal(signal.SIGTERM)
            with pytest.raises(SystemExit):
                decoder.step(tokens)
        finally:
            signal.signal(signal.SIGTERM, previous)
        backend.act = None
        check_safe(decoder.result, before, decoder.config)
        assert (decoder.result.status, decoder.result.is_held) == (Status.BACKEND_FAULT, True)
        assert "the tick was broken off: SystemExit: 5; " in decoder.result.detail
        # The next tick counts it, and takes it as sent.
        assert decoder.step().is_held
        snapshot = decoder.snapshot()
        assert (snapshot.ticks, snapshot.held, snapshot.statuses["BACKEND_FAULT"]) == (3, 2, 1)
        assert decoder.step(tokens).status is Status.OK


def test_what_is_from_outside_is_told_from_the_rest() -> None:
    assert is_from_outside(KeyboardInterrupt())
    assert not is_from_outside(SystemExit())
    assert in_words(WordlessError()) == "WordlessError"
    assert in_words(ValueError("x")) == "ValueError: x"


def test_a_stack_without_room_costs_ticks_and_nothing_else(tokenizer: ActionTokenizer, tokens: Any) -> None:
    clock = Clock()

    def at_depth(depth: int, call: Callable[[], Any]) -> Any:
        return call() if depth == 0 else at_depth(depth - 1, call)

    def depth_of(frame: Any) -> int:
        return 0 if frame is None else 1 + depth_of(frame.f_back)

    with loop(tokenizer, clock=clock) as decoder:
        decoder.warmup()
        limit = sys.getrecursionlimit()
        deepest = limit - depth_of(sys._getframe()) - 10
        entered = 0
        step = ControlDecoder.step
        for depth in range(deepest - 40, deepest + 15):
            clock.now += PERIOD_NS
            decoder.step(tokens)
            before = decoder.result.actions.copy()
            clock.now += PERIOD_NS
            try:
                at_depth(depth, functools.partial(step, decoder, tokens))
            except RecursionError as error:
                trace, names = error.__traceback__, []
                while trace is not None:
                    names.append(trace.tb_frame.f_code)
                    trace = trace.tb_next
                # It has come from the caller, who had no room to call.
                assert step.__code__ not in names, depth
            else:
                entered += decoder.result.is_held
                check_safe(decoder.result, before, decoder.config)
        assert entered > 3
        clock.now += PERIOD_NS
        assert decoder.step(tokens).status is Status.OK


def test_a_caller_who_spoils_what_he_was_given_spoils_his_copy(tokenizer: ActionTokenizer, tokens: Any) -> None:
    # Both see the same times, however long this machine takes.
    clock = Clock()
    with loop(tokenizer, clock=clock) as decoder, loop(tokenizer, clock=clock) as other:
        decoder.warmup()
        other.warmup()
        for given in (tokens, None, tokens - 100, None, tokens):
            clock.now += PERIOD_NS
            result = decoder.step(given)
            np.testing.assert_array_equal(result.actions, other.step(given).actions)
            result.actions[:] = 1e9
            result.actions.flags.writeable = False
        with pytest.raises(AttributeError):
            result.status = Status.OK  # type: ignore[misc]


# --- backends ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["golden", "no golden"])
def either(tokenizer: ActionTokenizer, request: pytest.FixtureRequest) -> ActionTokenizer:
    assert tokenizer.golden is not None
    return tokenizer if request.param == "golden" else ActionTokenizer(tokenizer.manifest, tokenizer.backend)


@pytest.mark.parametrize("wrong", [0.0, 3e-5, 1e-3])
def test_a_backend_that_is_wrong_but_for_zeros_is_not_used_again(either: ActionTokenizer, wrong: float) -> None:
    """By so many units of a dimension."""
    main, backend = switched(either)
    warm = WarmTokenizer(main, 0)
    decode, resting = either.backend.decode_into, either.decode(warm.probe.tokens)
    units = np.asarray(either.model.action_units, np.float32)

    def decode_wrongly(tokens: Any, stats: Any, actions: Any) -> None:
        decode(tokens, stats, actions)
        if not np.array_equal(actions, resting):
            actions += np.float32(wrong) * units

    backend.decode_into = decode_wrongly  # type: ignore[method-assign]
    assert warm.works() is (wrong == 0)


@pytest.mark.parametrize("use_worker", [False, True])
def test_a_backend_that_writes_some_rows_passes_off_no_older_ones(
    tokenizer: ActionTokenizer, tokens: Any, use_worker: bool
) -> None:
    broken, backend = switched(tokenizer)
    size, length = tokenizer.model.action_dim, tokenizer.model.chunk_length
    changes = {"use_worker": True, "deadline_us": 60e6} if use_worker else {}
    for missing in range(length * size):
        with loop(broken, **changes) as decoder:
            decoder.warmup()
            assert decoder.step(tokens).status is Status.OK

            def write_the_rest(actions: Any, missing: int = missing) -> None:
                flat = actions.reshape(-1)
                flat[np.arange(flat.size) != missing] = 0.0

            backend.act = write_the_rest
            assert decoder.step(tokens).status is Status.NONFINITE
            backend.act = None


# --- motion -----------------------------------------------------------------------------------------------------------


def test_a_reset_in_motion_stays_within_the_slew(tokenizer: ActionTokenizer, tokens: Any) -> None:
    with loop(tokenizer) as decoder:
        decoder.warmup()
        decoder.step(tokens)
        last = decoder.step(tokens).actions.copy()
        step = np.array(decoder.config.max_relative_step)
        assert (np.abs(last[:2]) > step[:2]).any()
        place = [0.0, 0.0, 0.1]
        decoder.reset(place)
        np.testing.assert_array_equal(decoder.result.actions, [last[0], last[1], np.float32(0.1)])
        assert decoder.result.is_held
        last = decoder.result.actions.copy()
        check_safe(decoder.step(), last, decoder.config)


@pytest.mark.parametrize("slow", [1.45, 1.1, 1.49])
def test_a_loop_that_is_slow_serves_no_action_a_period_late(slow: float) -> None:
    length = 12
    tokenizer, backend = scripted(Recipe(chunk_length=length))
    # Each action says for which tick of its chunk it is.
    backend.rows = np.arange(length)[:, None] * np.ones(3) * 1e-3
    clock = Clock()
    with loop(
        tokenizer,
        clock=clock,
        action_low=(-1.0,) * 3,
        action_high=(1.0,) * 3,
        max_relative_step=(9.0,) * 3,
        stale_after_s=1.0,
    ) as decoder:
        decoder.warmup()
        chunk = np.zeros((1, length, 4, 3), np.int32)
        observed = clock.now
        result, served = decoder.step(chunk, observed_ns=observed), 0
        while not result.is_held:
            row = round(float(result.actions[0]) * 1e3)
            late = (clock.now - observed) / PERIOD_NS - row
            assert -0.5 <= late < 1, (served, late)
            served += 1
            clock.now += round(slow * PERIOD_NS)
            result = decoder.step()
        assert result.status is Status.STALE
        missed = decoder.snapshot().missed_ticks
        assert missed == result.tick - served - 1
        assert missed >= 1
