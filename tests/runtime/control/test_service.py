"""Which action is served on which tick, to the nanosecond and to the number, and what is said where none is."""

import gc
import signal
from typing import Any

import pytest

from rfsq.runtime import ActionTokenizer, ControlConfig, ControlConfigError, ControlDecoder, ControlFaultError, Status
from rfsq.runtime.control.config import ActionKind
from tests.bundles import Recipe
from tests.runtime.control.loops import PERIOD_NS, ScriptedLoop, first_of, loop, scripted

RAMP = [[0.1], [0.2], [0.3], [0.4]]
STALE_NS = 10 * PERIOD_NS


def test_settings_of_another_robot_are_refused(tokenizer: ActionTokenizer) -> None:
    two = ControlConfig(0.002, (-1.0,) * 2, (1.0,) * 2, (0.5,) * 2, (ActionKind.DELTA,) * 2)
    with pytest.raises(
        ControlConfigError, match=r"the settings have 2 action dimensions; expected 3, as the bundle has"
    ):
        ControlDecoder(tokenizer, two)


def test_every_backend_has_decoded_for_a_chunk_of_ticks_before_the_first_one() -> None:
    made = [scripted(Recipe(chunk_length=4)) for _ in range(3)]
    asked = [0, 0, 0]
    for index, (_, backend) in enumerate(made):
        decode = backend.decode_into

        def count(*arguments: Any, index: int = index, decode: Any = decode) -> None:
            asked[index] += 1
            decode(*arguments)

        backend.decode_into = count  # type: ignore[method-assign]
    main, *spares = (found for found, _ in made)
    with ScriptedLoop() as other:
        config = other.config
    with ControlDecoder(main, config, fallbacks=spares) as decoder:
        decoder.warmup()
        assert min(asked) >= 4
        assert max(asked) == min(asked)
        assert decoder.snapshot().backend == "scripted"


# --- age --------------------------------------------------------------------------------------------------------------


def test_a_chunk_is_served_until_it_is_older_than_it_may_be_and_then_dropped() -> None:
    with ScriptedLoop(stale_after_s=2 * PERIOD_NS / 1e9) as made:
        made.tick(RAMP)
        assert [first_of(made.tick()) for _ in range(2)] == pytest.approx([0.2, 0.3])
        result = made.tick(passed=1e-6)
        # By a nanosecond or two.
        assert (result.status, result.is_held) == (Status.STALE, True)
        assert result.detail == (
            "the chunk was observed 0.004 s ago; expected at most 0.004: look at the policy, or raise stale_after_s"
        )
        tick = result.tick
        dropped = f"what was queued was dropped on tick {tick}, STALE; expected a new chunk since"
        assert made.tick(passed=0.0).detail == dropped


@pytest.mark.parametrize("strategy", ["weighted_average", "temporal_ensemble"])
def test_what_has_become_too_old_while_a_chunk_was_decoded_has_no_part_in_its_first_action(strategy: str) -> None:
    changes = {"strategy": strategy, "new_weight": 0.75, "ensemble_decay": 0.0, "stale_after_s": STALE_NS / 1e9}
    for late, expected in ((0, {"weighted_average": 0.6, "temporal_ensemble": 0.4}[strategy]), (1, 0.8)):
        with ScriptedLoop(**changes) as made:
            first = made.clock.now + PERIOD_NS
            made.tick(0.0, observed_ns=first)
            begin = first + PERIOD_NS
            # So long that the first chunk is too old, or not quite.
            made.clock.readings = [begin, first + STALE_NS + late]
            result = made.tick(0.8, observed_ns=begin)
            assert (result.status, result.is_held, first_of(result)) == (Status.OK, False, pytest.approx(expected))


# --- in time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("taken", "status"), [(10**6, Status.OK), (10**6 + 1, Status.DEADLINE_MISS)])
def test_an_action_is_in_time_until_the_deadline_itself(taken: int, status: Status) -> None:
    with ScriptedLoop(deadline_us=1000.0) as made:
        begin = made.clock.now + PERIOD_NS
        made.clock.readings = [begin, begin, begin + taken]
        assert made.tick(0.5).status is status


def test_a_deadline_that_nobody_can_meet_is_a_deadline() -> None:
    with ScriptedLoop() as made:
        made.tick(RAMP)
        begin = made.clock.now + PERIOD_NS
        made.clock.readings = [begin, begin + 1000]
        result = made.tick(deadline_us=1e-4)
        assert (result.status, result.is_held) == (Status.DEADLINE_MISS, True)
        assert result.detail.startswith("the action was there after 1 us; expected 0: look at what else runs here")


def test_a_reading_of_the_clock_in_the_middle_that_fails_leaves_nothing_in_service_and_no_fallback_behind() -> None:
    with ScriptedLoop(fallbacks=1) as made:
        made.tick(RAMP)
        begin = made.clock.now + PERIOD_NS
        made.clock.readings = [begin, RuntimeError("injected"), begin + 1]
        result = made.tick(0.5, fails=True)
        assert (result.status, result.is_held, result.fell_back) == (Status.BACKEND_FAULT, True, False)
        number = result.tick
        result = made.tick()
        assert (result.status, result.is_held) == (Status.STALE, True)
        assert result.detail == (
            f"what was queued was dropped on tick {number}, BACKEND_FAULT; expected a new chunk since"
        )


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "options", "expected"),
    [
        # The full decode of the draft takes its place; whatever else comes is averaged with it.
        (ScriptedLoop.FULL, {"sequence": 3}, 0.25 * 0.0 + 0.75 * 0.8),
        (ScriptedLoop.FULL, {"sequence": 4}, 0.25 * (0.25 * 0.0 + 0.75 * 0.4) + 0.75 * 0.8),
        (ScriptedLoop.FULL, {"sequence": 4, "observed_ns": "as the draft"}, 0.25 * (0.75 * 0.4) + 0.75 * 0.8),
    ],
)
def test_a_full_decode_replaces_its_draft_in_an_average(layers: int, options: dict[str, Any], expected: float) -> None:
    with ScriptedLoop(strategy="weighted_average", new_weight=0.75) as made:
        made.tick(0.0, sequence=2)
        made.tick(0.4, sequence=3, layers=made.DRAFT)
        if "observed_ns" in options:
            options = {**options, "observed_ns": made.clock.now}
        result = made.tick(0.8, layers=layers, **options)
        assert (result.status, first_of(result)) == (Status.OK, pytest.approx(expected))


def test_a_policy_that_starts_anew_is_served_as_soon_as_nothing_is_left_of_the_chunk_before() -> None:
    for waited, status in ((3, Status.STALE), (4, Status.OK)):
        with ScriptedLoop(strategy="weighted_average") as made:
            made.tick(0.1, sequence=7)
            for _ in range(waited - 1):
                made.tick()
            observed = made.clock.now + PERIOD_NS
            result = made.tick(0.5, sequence=7, observed_ns=observed)
            assert result.status is status
            assert first_of(result) == pytest.approx(0.5 if status is Status.OK else 0.1)


def test_a_slow_loop_counts_its_own_ticks_where_no_chunk_is_in_service() -> None:
    with ScriptedLoop() as made:
        made.tick(RAMP)
        first = made.wrong().tick
        # By its chunk one in three would be missed.
        assert [made.tick(passed=1.4).tick for _ in range(9)] == [first + number for number in range(1, 10)]
        assert made.decoder.snapshot().missed_ticks == 0


def test_a_clock_that_goes_back_leaves_nothing_in_service() -> None:
    with ScriptedLoop() as made:
        made.tick(RAMP)
        result = made.tick(passed=-3.0)
        assert (result.status, result.is_held) == (Status.STALE, True)
        assert result.detail == (
            "the clock went back by 0.006000 s; expected a monotonic one: what was observed before cannot be dated"
        )
        number = result.tick
        assert made.tick().detail == f"what was queued was dropped on tick {number}, STALE; expected a new chunk since"
        # Nor is a new one compared to what cannot be dated.
        assert made.tick(0.5, observed_ns=made.clock.now).status is Status.OK


def test_a_chunk_that_is_brought_inside_is_not_a_refused_one() -> None:
    with ScriptedLoop(out_of_range="limit") as made:
        result = made.tick(2.0)
        assert (result.status, result.is_held, first_of(result)) == (Status.OUT_OF_RANGE, False, 1.0)
        snapshot = made.decoder.snapshot()
        assert (snapshot.chunks, snapshot.refused_chunks) == (1, 0)
        made.wrong()
        assert made.decoder.snapshot().refused_chunks == 1


# --- around a tick ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pause_gc", [True, False])
@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
def test_garbage_collection_is_left_as_it_was_found(pause_gc: bool, is_on: bool, is_first: bool) -> None:
    seen: list[bool] = []
    with ScriptedLoop(pause_gc=pause_gc) as made:
        decode = made.backend.decode_into

        def look(*arguments: Any) -> None:
            seen.append(gc.isenabled())
            decode(*arguments)

        if not is_first:
            made.tick(0.5)
        made.backend.decode_into = look  # type: ignore[method-assign]
        try:
            if not is_on:
                gc.disable()
            made.tick(0.5)
            after = gc.isenabled()
        finally:
            gc.enable()
    assert seen == [is_on and not pause_gc]
    assert after is is_on


@pytest.mark.parametrize("on_fault", ["hold_last", "raise"])
@pytest.mark.parametrize("error", [OSError("handled"), SystemExit(5)])
def test_what_a_handler_raises_leaves_the_tick_though_the_clock_was_being_read(
    error: BaseException, on_fault: str
) -> None:
    with ScriptedLoop(on_fault=on_fault) as made:
        made.tick(0.5)

        def handle(*_: object) -> None:
            raise error

        def read() -> int:
            signal.raise_signal(signal.SIGTERM)
            return 0

        previous = signal.signal(signal.SIGTERM, handle)
        clock = made.decoder._loop._clock
        try:
            made.decoder._loop._clock = read
            with pytest.raises(type(error)):
                made.tick()
        finally:
            signal.signal(signal.SIGTERM, previous)
            made.decoder._loop._clock = clock
        result = made.decoder.result
        assert (result.status, result.is_held, first_of(result)) == (Status.BACKEND_FAULT, True, 0.0)
        assert f"broken off: {type(error).__name__}" in result.detail


def test_the_threads_beside_a_loop_end_with_its_block(tokenizer: ActionTokenizer) -> None:
    decoder = loop(tokenizer)
    with decoder:
        decoder.warmup()
        decoder.step()
    assert decoder.step().detail.startswith("the decoder is not warm, or closed")
    assert repr(decoder).startswith("ControlDecoder(closed, ")


@pytest.mark.parametrize("error", [ValueError("a bug"), RecursionError()])
@pytest.mark.parametrize("on_fault", ["hold_last", "raise"])
def test_what_fails_in_the_decoder_itself_breaks_the_tick_off_and_leaves_it_only_where_asked(
    error: Exception, on_fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    with ScriptedLoop(on_fault=on_fault, max_relative_step=(0.25,) * 3) as made:
        for _ in range(2):
            made.tick(0.5)
        with monkeypatch.context() as patch:
            patch.setattr(made.decoder._tick_log, "close_tick", fail)
            if on_fault == "raise":
                with pytest.raises(ControlFaultError, match=r"^the tick was broken off$") as caught:
                    made.tick(0.5)
                assert caught.value.__cause__ is error
            else:
                assert made.tick(0.5) is made.decoder.result
        result = made.decoder.result
        assert (result.status, result.is_held, result.tick) == (Status.BACKEND_FAULT, True, 3)
        assert first_of(result) == pytest.approx(0.25, abs=1e-5)
        # The next one takes it as sent, and serves nothing of what was half done.
        if on_fault == "hold_last":
            assert made.tick().is_held
        assert made.tick(0.5).status is Status.OK


def test_a_stack_that_overflows_in_a_handler_leaves_no_tick() -> None:
    def handle(*_: object) -> None:
        raise RecursionError

    with ScriptedLoop() as made:
        made.tick(0.5)
        previous, clock = signal.signal(signal.SIGTERM, handle), made.decoder._loop._clock
        try:
            made.decoder._loop._clock = lambda: signal.raise_signal(signal.SIGTERM) or 0
            result = made.tick()
        finally:
            signal.signal(signal.SIGTERM, previous)
            made.decoder._loop._clock = clock
        assert (result.status, result.is_held) == (Status.BACKEND_FAULT, True)
        assert made.tick(0.5).status is Status.OK
