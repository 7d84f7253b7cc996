"""`ControlDecoder` in a loop: right status, safe action, back in service; never an error that was not asked for."""

import gc
import os
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq import runtime
from rfsq.runtime import ActionTokenizer, ControlDecoder, ControlFaultError, Status, WrongThreadError
from rfsq.runtime.control.health import LatencyHistogram
from rfsq.runtime.control.recorder import FlightRecorder, read_record
from rfsq.runtime.qualification.soak import chunks_of
from tests.runtime.control.loops import PERIOD_NS, Clock, check_safe, loop, switched

#: By so many bytes what 1,500 ticks keep may differ: the numbers of the last one are not always equally many.
_KEPT = 512


@pytest.fixture(scope="module")
def tokens(tokenizer: ActionTokenizer) -> Any:
    return chunks_of(tokenizer, 1)[0][0]


def test_before_warmup_and_before_the_first_chunk_it_is_not_ready(tokenizer: ActionTokenizer, tokens: Any) -> None:
    with loop(tokenizer) as decoder:
        result = decoder.step(tokens)
        assert (result.status, result.is_held, "warmup()" in result.detail) == (Status.NOT_READY, True, True)
        decoder.warmup()
        assert decoder.step().status is Status.NOT_READY
        assert decoder.step(tokens).status is Status.OK


def test_once_closed_it_stands_still(tokenizer: ActionTokenizer, tokens: Any) -> None:
    decoder = loop(tokenizer, max_relative_step=(float("inf"),) * 3)
    decoder.warmup()
    assert decoder.step(tokens).actions[:2].any()
    decoder.close()
    for _ in range(2):
        result = decoder.step(tokens)
        assert (result.status, result.is_held) == (Status.NOT_READY, True)
        assert not result.actions[:2].any()


def test_closing_ends_every_thread_and_can_be_repeated(tokenizer: ActionTokenizer, tokens: Any) -> None:
    before = threading.active_count()
    decoder = loop(tokenizer, fallbacks=(tokenizer,), use_worker=True, deadline_us=60e6)
    decoder.warmup()
    assert decoder.step(tokens).status is Status.OK
    assert threading.active_count() == before + 5
    for _ in range(3):
        decoder.close()
        assert threading.active_count() == before
    decoder.step(tokens)
    assert decoder.snapshot().held == 1


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_of_fork_is_refused(tokenizer: ActionTokenizer, tokens: Any) -> None:
    with loop(tokenizer, use_worker=True, deadline_us=60e6) as decoder:
        decoder.warmup()
        child = os.fork()
        if not child:
            code = 1
            try:
                decoder.step(tokens)
            except WrongThreadError as error:
                decoder.close()
                code = 0 if f"process {os.getpid()} has inherited this decoder by fork" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert decoder.step(tokens).status is Status.OK


@pytest.mark.parametrize("how", ["stop", "hold_last", "raise"])
def test_what_a_fault_does(tokenizer: ActionTokenizer, tokens: Any, how: str) -> None:
    with loop(tokenizer, on_fault=how) as decoder:
        decoder.warmup()
        decoder.step(tokens)
        if how == "raise":
            with pytest.raises(ControlFaultError, match="BAD_TOKEN"):
                decoder.step(tokens - 100)
        else:
            assert decoder.step(tokens - 100).status is Status.BAD_TOKEN
        assert decoder.result.is_held
        result = decoder.step(tokens)
        assert result.is_latched is (how == "stop")
        assert result.status is (Status.BAD_TOKEN if how == "stop" else Status.OK)
        decoder.reset()
        assert decoder.step(tokens).status is Status.OK


def test_only_what_stands_still_after_the_start_is_raised(tokenizer: ActionTokenizer, tokens: Any) -> None:
    clock = Clock()
    with loop(tokenizer, on_fault="raise", clock=clock) as decoder:
        decoder.warmup()
        assert decoder.step().status is Status.NOT_READY
        assert decoder.step(tokens, sequence=1).status is Status.OK
        # The older one stays in service.
        again = decoder.step(tokens, sequence=1)
        assert (again.status, again.is_held) == (Status.STALE, False)
        for _ in range(tokenizer.model.chunk_length - 2):
            assert decoder.step().status is Status.OK
        with pytest.raises(ControlFaultError, match="STALE: the last chunk has run out"):
            decoder.step()
        assert (decoder.result.status, decoder.result.is_held) == (Status.STALE, True)


def test_faults_in_a_row_latch(tokenizer: ActionTokenizer, tokens: Any) -> None:
    with loop(tokenizer, max_consecutive_faults=3) as decoder:
        decoder.warmup()
        for number in range(3):
            assert decoder.step(tokens - 100).is_latched is (number == 2)
        assert decoder.step(tokens).is_latched


@pytest.mark.parametrize("is_dated", [True, False])
def test_a_draft_is_replaced_by_its_full_decode(tokenizer: ActionTokenizer, tokens: Any, is_dated: bool) -> None:
    draft = np.ascontiguousarray(tokens[..., : tokenizer.prefixes[0]])
    clock = Clock()
    with loop(tokenizer, clock=clock, max_relative_step=(float("inf"),) * 3) as decoder:
        decoder.warmup()
        options: dict[str, Any] = {"observed_ns": clock.now} if is_dated else {}
        assert decoder.step(draft, sequence=4, **options).status is Status.OK
        clock.now += PERIOD_NS
        result = decoder.step(tokens, sequence=4, **options)
        assert result.status is Status.OK
        np.testing.assert_array_equal(result.actions, tokenizer.decode(tokens)[0, 1])
        result = decoder.step(draft, sequence=4, **options)
        assert (result.status, "chunk 4 comes again" in result.detail) == (Status.STALE, True)


def test_another_thread_is_refused_and_one_decoder_each_is_fine(tokenizer: ActionTokenizer, tokens: Any) -> None:
    start = threading.Barrier(2)

    def drive() -> list[int]:
        with loop(tokenizer) as decoder:
            decoder.warmup()
            start.wait()
            for _ in range(500):
                decoder.step(tokens)
            return decoder.health.statuses

    with loop(tokenizer) as decoder, ThreadPoolExecutor(2) as pool:
        decoder.warmup()
        assert decoder.step(tokens).status is Status.OK
        for call in (decoder.step, decoder.reset):
            with pytest.raises(WrongThreadError, match="make one decoder per thread"):
                pool.submit(call).result()
        assert pool.submit(decoder.snapshot).result().ticks == 1
        for run in [pool.submit(drive), pool.submit(drive)]:
            assert run.result()[Status.OK] == 500
        assert decoder.step(tokens).status is Status.OK


def test_a_fault_leaves_a_flight_record_and_a_full_disk_leaves_the_loop_alone(
    tokenizer: ActionTokenizer, tokens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loop(tokenizer, record_folder=str(tmp_path), record_interval_s=1e-6) as decoder:
        decoder.warmup()
        decoder.step(tokens)
        decoder.step(tokens - 100)
        assert decoder.flush()
        (path,) = tmp_path.glob("flight-*.npz")
        np.testing.assert_array_equal(read_record(path).tokens_of(1), tokens)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("rfsq.runtime.control.tick_log.write_record", full)
        decoder.step(tokens)
        assert decoder.step(tokens - 100).status is Status.BAD_TOKEN
        assert decoder.flush()
        assert decoder.snapshot().records_failed == 1
        assert decoder.step(tokens).status is Status.OK


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("deadline_us", "status"), [(None, Status.STALE), (1000.0, Status.DEADLINE_MISS)])
def test_what_becomes_old_while_it_is_decoded_is_not_served(
    tokenizer: ActionTokenizer, tokens: Any, deadline_us: float | None, status: Status
) -> None:
    clock = Clock()
    slow, backend = switched(tokenizer)

    def take_long(actions: Any) -> None:
        clock.now += 10**10
        actions.fill(0.0)

    with loop(slow, clock=clock, stale_after_s=0.1, deadline_us=deadline_us) as decoder:
        decoder.warmup()
        backend.act = take_long
        result = decoder.step(tokens)
        assert (result.status, result.is_held) == (status, True)
        assert "10.000 s ago" in result.detail if deadline_us is None else "after 10000000 us" in result.detail
        backend.act = None
        clock.now += PERIOD_NS
        assert decoder.step().is_held
        assert decoder.step(tokens).status is Status.OK


@pytest.mark.parametrize(
    ("deadline_us", "found"),
    [(0, "0"), (-1.0, "-1.0"), (float("nan"), "nan"), ("soon", "a str"), (np.float32(5000), "a float32")],
)
def test_a_deadline_that_is_none_is_named(
    tokenizer: ActionTokenizer, tokens: Any, deadline_us: Any, found: str
) -> None:
    with loop(tokenizer) as decoder:
        decoder.warmup()
        result = decoder.step(tokens, deadline_us=deadline_us)
        assert (result.status, result.is_held) == (Status.DEADLINE_MISS, True)
        assert result.detail == f"deadline_us is {found}; expected a number above 0: correct it"
        assert decoder.step(tokens, deadline_us=1e300).status is Status.OK


# --- the decoder's own parts fail -------------------------------------------------------------------------------------


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("error", [RuntimeError("injected"), UnprintableError()])
def test_a_clock_that_raises_stands_still_and_leaves_the_loop_alone(
    tokenizer: ActionTokenizer, tokens: Any, error: Exception
) -> None:
    clock = Clock()
    with loop(tokenizer, clock=clock) as decoder:
        decoder.warmup()
        before = decoder.step(tokens).actions.copy()
        clock.error = error
        for _ in range(3):
            clock.now += PERIOD_NS
            result = decoder.step(tokens)
            assert (result.status, result.is_held) == (Status.BACKEND_FAULT, True)
            assert type(error).__name__ in result.detail
            check_safe(result, before, decoder.config)
            before = result.actions.copy()
        clock.error = None
        clock.now += PERIOD_NS
        assert decoder.step(tokens).status is Status.OK
        assert result.tick == 5


def test_a_clock_that_raises_at_the_end_of_a_tick_costs_the_latency_alone(
    tokenizer: ActionTokenizer, tokens: Any
) -> None:
    readings: list[int] = []

    def clock() -> int:
        readings.append(len(readings))
        # At the beginning, when the action is there, and at the end.
        if is_armed and len(readings) == 3:
            raise RuntimeError("injected")
        return 10**12

    is_armed = False
    with loop(tokenizer, clock=clock) as decoder:
        decoder.warmup()
        readings.clear()
        is_armed = True
        result = decoder.step(tokens)
        assert (result.status, result.is_held, result.latency_ns) == (Status.OK, False, 0)
        assert "the clock or the histogram failed: RuntimeError: injected" in result.detail
        assert decoder.snapshot().internal_faults == 1


@pytest.mark.parametrize(
    ("owner", "method", "what"),
    [(FlightRecorder, "add", "the flight recorder"), (LatencyHistogram, "add", "the clock or the histogram")],
)
def test_a_part_of_the_book_keeping_that_raises_costs_no_action(
    tokenizer: ActionTokenizer,
    tokens: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: type,
    method: str,
    what: str,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("injected")

    with loop(tokenizer, max_relative_step=(float("inf"),) * 3) as decoder:
        decoder.warmup()
        expected = decoder.step(tokens).actions.copy()
        decoder.reset([0.0] * len(expected))
        monkeypatch.setattr(owner, method, broken)
        result = decoder.step(tokens)
        assert (result.status, result.is_held) == (Status.OK, False)
        np.testing.assert_array_equal(result.actions, expected)
        assert f"{what} failed: RuntimeError: injected" in result.detail
        # It is told, though the status is OK.
        assert decoder.flush()
        assert f"tick 1: OK, service goes on: the action is good; {what} failed" in caplog.text
        result = decoder.step(tokens - 100)
        assert (result.status, result.is_held) == (Status.BAD_TOKEN, True)
        snapshot = decoder.snapshot()
        assert (snapshot.internal_faults, snapshot.statuses["OK"], snapshot.statuses["BAD_TOKEN"]) == (2, 2, 1)
        monkeypatch.undo()
        result = decoder.step(tokens)
        assert (result.status, result.detail) == (Status.OK, "")


def test_a_reporter_that_raises_costs_no_action(tokenizer: ActionTokenizer, tokens: Any, monkeypatch: Any) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("injected")

    with loop(tokenizer) as decoder:
        decoder.warmup()
        monkeypatch.setattr("rfsq.runtime.control.tick_log.Reporter.incident", broken)
        result = decoder.step(tokens - 100)
        assert (result.status, "the reporter failed" in result.detail) == (Status.BAD_TOKEN, True)
        assert decoder.step(tokens).status is Status.OK


# --- what is said -----------------------------------------------------------------------------------------------------


def test_what_is_said_where_nothing_is_served_is_true(tokenizer: ActionTokenizer, tokens: Any) -> None:
    clock = Clock()
    length = tokenizer.model.chunk_length

    with loop(tokenizer, clock=clock, stale_after_s=0.1) as decoder:
        decoder.warmup()

        def tick(*arguments: Any, **options: Any) -> str:
            clock.now += PERIOD_NS
            result = decoder.step(*arguments, **options)
            return f"{result.status.name}{' held' if result.is_held else ''}: {result.detail}"

        assert tick() == "NOT_READY held: no chunk has been accepted since the start; send one"
        assert tick(tokens - 100).startswith("BAD_TOKEN held: tokens[0, 0, 0, 0]")
        assert tick() == "NOT_READY held: no chunk has been accepted since the start; send one"
        assert tick(tokens, sequence=5) == "OK: "
        # The older chunk stays in service, and the status does not say otherwise.
        assert tick(tokens, sequence=5) == ("STALE: chunk 5 comes again; expected above 5: look at the policy's order")
        for _ in range(length - 2):
            assert tick() == "OK: "
        assert tick() == "STALE held: the last chunk has run out; expected a new one: look at the policy"
        found = tick(tokens, sequence=4)
        assert found == (
            "STALE held: chunk 4 comes after a newer one; expected above 5: look at the policy's order; and there is "
            "nothing else: the last chunk has run out; expected a new one: look at the policy"
        )
        assert tick(tokens, sequence=6) == "OK: "
        assert tick(tokens - 100, sequence=7).startswith("BAD_TOKEN held")
        # Not run out: it was dropped.
        dropped = f"what was queued was dropped on tick {decoder.result.tick}, BAD_TOKEN; expected a new chunk since"
        assert tick() == f"STALE held: {dropped}"
        assert tick() == f"STALE held: {dropped}"
        assert tick(tokens, sequence=8, observed_ns=clock.now) == "OK: "


@pytest.mark.parametrize(
    ("options", "detail"),
    [
        ({"sequence": 1.5}, "sequence is a float; expected an int"),
        ({"sequence": True}, "sequence is a bool; expected an int"),
        ({"sequence": 2**62}, "sequence is beyond it; expected an int between -2**62 and 2**62"),
        ({"sequence": 1, "observed_ns": -(2**62)}, "observed_ns is beyond it"),
        ({"observed_ns": np.float64(5)}, "observed_ns is a float64"),
        ({"sequence": np.bool_(True)}, "sequence is a bool"),
        ({"sequence": np.uint64(2**63)}, "sequence is beyond it"),
        ({"observed_ns": UnprintableError()}, "observed_ns is a UnprintableError"),
    ],
)
def test_numbers_that_are_none_are_named(
    tokenizer: ActionTokenizer, tokens: Any, options: dict[str, Any], detail: str
) -> None:
    with loop(tokenizer) as decoder:
        decoder.warmup()
        result = decoder.step(tokens, **options)
        assert (result.status, detail in result.detail) == (Status.BAD_TOKEN, True), result.detail
        # Negative numbers are numbers.
        assert decoder.step(tokens, sequence=-5).status is Status.OK
        assert decoder.step(tokens, sequence=-4).status is Status.OK


# --- memory -----------------------------------------------------------------------------------------------------------


#: Whose memory is counted: what a library allocates while it warms up, or when it pleases, is not the loop's.
_OURS = tracemalloc.Filter(True, f"{Path(runtime.__file__).parent}/control/*"), tracemalloc.Filter(True, __file__)


def _held() -> int:
    traces = tracemalloc.take_snapshot().filter_traces(_OURS)
    return sum(statistic.size for statistic in traces.statistics("filename"))


def _growth(run: Callable[[int], None]) -> float:
    """Of what the loop holds, in 500 calls: the median of six times, for the last number is not always as long."""
    found = []
    tracemalloc.start()
    try:
        run(200)
        for _ in range(7):
            run(500)
            gc.collect()
            found.append(_held())
    finally:
        tracemalloc.stop()
    return float(np.median(np.diff(found)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["latest_only", "weighted_average", "temporal_ensemble"])
def test_what_is_kept_does_not_grow_with_ticks(tokenizer: ActionTokenizer, strategy: str) -> None:
    chunks = chunks_of(tokenizer, 16)[0]
    clock = Clock()
    with loop(tokenizer, strategy=strategy, clock=clock) as decoder:
        decoder.warmup()

        def run(ticks: int) -> None:
            for tick in range(ticks):
                clock.now += PERIOD_NS
                decoder.step(None if tick & 1 else chunks[tick & 15])

        growth = _growth(run)
        assert decoder.health.statuses[Status.OK] == decoder.snapshot().ticks == 3_700
    assert abs(growth) <= _KEPT


@pytest.mark.slow
def test_memory_that_grows_with_ticks_is_found(tokenizer: ActionTokenizer, tokens: Any) -> None:
    """The test above is able to fail: one number kept per tick is more than it allows."""
    kept: list[int] = []

    with loop(tokenizer) as decoder:
        decoder.warmup()
        add = decoder.health.latency.add

        def leak(nanoseconds: int) -> None:
            add(nanoseconds)
            kept.append(nanoseconds)

        decoder.health.latency.add = leak  # type: ignore[method-assign]

        def run(ticks: int) -> None:
            for _ in range(ticks):
                decoder.step(tokens)

        assert _growth(run) > _KEPT


def test_garbage_is_not_collected_within_a_tick_and_is_after_it(tokenizer: ActionTokenizer, tokens: Any) -> None:
    seen: list[bool] = []
    broken, backend = switched(tokenizer)
    decode = backend.decode_into

    def look(actions: Any) -> None:
        seen.append(gc.isenabled())
        backend.act = None
        decode(tokens, None, actions)
        backend.act = look

    with loop(broken) as decoder:
        decoder.warmup()
        backend.act = look
        assert decoder.step(tokens).status is Status.OK
    assert seen == [False]
    assert gc.isenabled()


def test_ticks_are_seen_by_a_watchdog_even_where_the_clock_raises(tokenizer: ActionTokenizer) -> None:
    clock = Clock()
    with loop(tokenizer, clock=clock) as decoder:
        decoder.warmup()
        assert decoder.health.last_tick_ns == 0
        clock.error = RuntimeError("injected")
        begin = time.monotonic_ns()
        decoder.step()
        assert begin <= decoder.health.last_tick_ns <= time.monotonic_ns()


def test_warmup_is_for_once(tokenizer: ActionTokenizer) -> None:
    decoder: ControlDecoder = loop(tokenizer)
    with decoder:
        decoder.warmup()
        with pytest.raises(Exception, match=r"warmup\(\) was called before"):
            decoder.warmup()


def test_a_backend_that_checks_values_itself_is_given_one_array_again_and_again(chunk_bundle: Path) -> None:
    """Which it knows, and the tokenizer too; whatever arrays a policy sends."""
    with ActionTokenizer.load(chunk_bundle, backend="c") as tokenizer:
        given: list[tuple[int, list[int]]] = []
        decode = tokenizer.backend.decode_into

        def look(tokens: Any, stats: Any, actions: Any) -> None:
            given.append((id(tokens), tokens[0].tolist()))
            decode(tokens, stats, actions)

        with loop(tokenizer) as decoder:
            decoder.warmup()
            chunks, _, _ = chunks_of(tokenizer, 3)
            tokenizer.backend.decode_into = look  # type: ignore[method-assign]
            for tokens in chunks:
                assert decoder.step(tokens).status is Status.OK
            # Not of this type: the tokenizer makes an array of its own.
            assert decoder.step(chunks[0].astype(np.int64)).status is Status.OK
    numbers = [chunk[0].tolist() for chunk in chunks]
    assert [found for _, found in given] == [*numbers, numbers[0]]
    assert len({place for place, _ in given[:3]}) == 1
    assert given[3][0] != given[0][0]
