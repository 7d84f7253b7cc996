"""Backends that fail while a robot moves: the next one decodes on the same tick; the first is tried off the loop."""

import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.runtime import ActionTokenizer, ControlConfigError, ControlDecoder, Status
from rfsq.runtime.control.config import ControlConfig
from rfsq.runtime.control.health import Health
from rfsq.runtime.control.tick_log import Reporter
from rfsq.runtime.control.worker import DecodeWorker, WarmTokenizer
from rfsq.runtime.qualification.soak import chunks_of
from tests.runtime.control.driven import drive
from tests.runtime.control.loops import Clock, check_safe, config_of, fails, hurry, loop, switched

#: No test waits so long, unless something is broken.
_PATIENCE_S = 60.0


def _wait(is_there: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not is_there():
        assert time.monotonic() < end
        time.sleep(0.002)


class Pair:
    """A decoder with two backends that can be told to fail, main and spare."""

    def __init__(self, tokenizer: ActionTokenizer, **changes: Any) -> None:
        first, self.main = switched(tokenizer, "main")
        second, self.spare = switched(tokenizer, "spare")
        self.decoder = loop(first, fallbacks=(second,), **{"retry_after_s": 60.0, **changes})
        self.tokens = chunks_of(tokenizer, 1)[0][0]
        self.last = np.zeros(tokenizer.model.action_dim, np.float32)

    def __enter__(self) -> "Pair":
        self.decoder.warmup()
        return self

    def __exit__(self, *_: object) -> None:
        self.decoder.close()

    def step(self, *arguments: Any, **options: Any) -> tuple[str, str, bool]:
        """Status, backend and whether it fell back; what is sent is safe."""
        result = self.decoder.step(*(arguments or (self.tokens,)), **options)
        check_safe(result, self.last, self.decoder.config)
        self.last = result.actions.copy()
        return result.status.name, result.backend, result.fell_back


WORKERS = pytest.mark.parametrize("changes", [{}, {"use_worker": True, "deadline_us": 60e6}], ids=["loop", "worker"])


@WORKERS
def test_it_falls_back_once_and_stays_there(tokenizer: ActionTokenizer, changes: dict[str, Any]) -> None:
    with Pair(tokenizer, **changes) as pair:
        assert pair.step() == ("OK", "main", False)
        pair.main.act = fails
        assert pair.step() == ("OK", "spare", True)
        assert "main: InferenceError: injected; decoded on spare instead" in pair.decoder.result.detail
        for _ in range(3):
            assert pair.step() == ("OK", "spare", False)
        snapshot = pair.decoder.snapshot()
        assert (snapshot.fallbacks, snapshot.backend, snapshot.incidents, snapshot.held) == (1, "spare", 1, 0)


@WORKERS
def test_what_has_failed_is_tried_off_the_loop_and_used_again(
    tokenizer: ActionTokenizer, changes: dict[str, Any]
) -> None:
    threads: list[str] = []

    def fail(actions: Any) -> None:
        threads.append(threading.current_thread().name)
        fails(actions)

    with Pair(tokenizer, retry_after_s=0.002, **changes) as pair:
        pair.main.act = fail
        assert pair.step() == ("OK", "spare", True)
        # Twice off the loop, where it fails still.
        _wait(lambda: len(threads) >= 3)
        assert pair.step() == ("OK", "spare", False)
        assert set(threads[1:]) == {"control retry main"}
        pair.main.act = None
        _wait(lambda: pair.decoder.snapshot().recoveries == 1)
        assert pair.step() == ("OK", "main", False)
        assert pair.decoder.snapshot().backend == "main"
        # And again.
        pair.main.act = fail
        assert pair.step() == ("OK", "spare", True)


def test_a_backend_that_answers_something_else_than_at_the_start_is_not_used_again(tokenizer: ActionTokenizer) -> None:
    asked = [0]

    def other(actions: Any) -> None:
        asked[0] += 1
        actions[...] = 0.123

    with Pair(tokenizer, retry_after_s=0.002) as pair:
        pair.main.act = fails
        pair.step()
        pair.main.act = other
        _wait(lambda: asked[0] >= 2)
        assert pair.step() == ("OK", "spare", False)
        assert pair.decoder.snapshot().recoveries == 0


@WORKERS
def test_a_backend_that_comes_back_wrong_but_for_zeros_is_used_again_when_it_is_right(
    tokenizer: ActionTokenizer, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry has to find what a robot at rest would not."""
    model = tokenizer.model
    resting = tokenizer.decode(tokenizer.encode(np.zeros((1, model.chunk_length, model.action_dim), np.float32)))
    works, tries = WarmTokenizer.works, list[bool]()

    def decode_wrongly(tokens: Any, stats: Any, actions: Any) -> None:
        tokenizer.backend.decode_into(tokens, stats, actions)
        if not np.array_equal(actions, resting):
            actions += np.float32(1e-3) * np.asarray(model.action_units, np.float32)

    def try_again(warm: WarmTokenizer) -> bool:
        tries.append(works(warm))
        return tries[-1]

    monkeypatch.setattr(WarmTokenizer, "works", try_again)
    with Pair(tokenizer, retry_after_s=0.002, **changes) as pair:
        pair.main.act = fails
        assert pair.step() == ("OK", "spare", True)
        pair.main.decode_into = decode_wrongly  # type: ignore[method-assign]
        pair.main.act = None

        def is_tried_again() -> bool:
            assert pair.step() == ("OK", "spare", False)
            return len(tries) >= 4

        _wait(is_tried_again)
        assert pair.step() == ("OK", "spare", False)
        assert not any(tries)
        assert pair.decoder.snapshot().recoveries == 0
        del pair.main.decode_into
        _wait(lambda: pair.step() == ("OK", "main", False))
        assert pair.decoder.snapshot().recoveries == 1
        assert tries.count(True) == 1


def test_who_waits_to_try_again_does_not_wait_when_the_loop_is_closed(tokenizer: ActionTokenizer) -> None:
    with Pair(tokenizer, retry_after_s=1e5) as pair:
        pair.main.act = fails
        assert pair.step() == ("OK", "spare", True)
        chain: Any = pair.decoder._chain
    _wait(lambda: not any(retrier._thread.is_alive() for retrier in chain._retriers))
    pair.decoder.close()


@WORKERS
def test_where_the_fallback_fails_too_the_robot_stands_still_and_goes_on_with_the_next_chunk(
    tokenizer: ActionTokenizer, changes: dict[str, Any]
) -> None:
    with Pair(tokenizer, **changes) as pair:
        pair.step()
        pair.main.act = pair.spare.act = fails
        assert pair.step() == ("BACKEND_FAULT", "spare", False)
        result = pair.decoder.result
        assert result.is_held
        assert result.detail == ("main: InferenceError: injected; spare instead: spare: InferenceError: injected")
        # Neither is known to work: there is nothing to lose with the first.
        assert pair.step() == ("BACKEND_FAULT", "main", False)
        pair.main.act = pair.spare.act = None
        assert pair.step() == ("OK", "main", False)
        assert pair.decoder.snapshot().fallbacks == 1


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda _: None, "not finite"),
        (lambda actions: actions.fill(np.inf), "not finite"),
        (lambda actions: actions[0, -1].fill(np.nan), "not finite"),
        (lambda _: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["writes nothing", "infinity", "NaN", "raises"],
)
@WORKERS
def test_whatever_a_backend_does_is_seen(
    tokenizer: ActionTokenizer, changes: dict[str, Any], act: Callable[[Any], None], reason: str
) -> None:
    with Pair(tokenizer, **changes) as pair:
        pair.step()
        pair.main.act = act
        assert pair.step() == ("OK", "spare", True)
        assert reason in pair.decoder.result.detail


def test_without_time_left_the_next_chunk_goes_to_the_other_one(tokenizer: ActionTokenizer) -> None:
    clock = Clock()

    def fail_late(actions: Any) -> None:
        clock.now += 3_000_000
        fails(actions)

    with Pair(tokenizer, clock=clock, deadline_us=2000.0) as pair:
        pair.main.act = fail_late
        assert pair.step() == ("BACKEND_FAULT", "main", False)
        assert pair.step() == ("OK", "spare", False)
        assert pair.decoder.snapshot().fallbacks == 0


def test_wrong_tokens_are_no_fault_of_a_backend(tokenizer: ActionTokenizer) -> None:
    with Pair(tokenizer) as pair:
        assert pair.step(pair.tokens - 100) == ("BAD_TOKEN", "main", False)
        assert pair.step() == ("OK", "main", False)
        assert pair.decoder.snapshot().fallbacks == 0


# --- in a thread of its own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_spare", [True, False])
def test_a_backend_that_hangs_is_left_behind_until_it_answers(
    tokenizer: ActionTokenizer, has_spare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    with Pair(tokenizer, use_worker=True, deadline_us=60e6, retry_after_s=0.002) as pair:
        if not has_spare:
            pair.spare.act = fails
        given = hurry(monkeypatch, lambda warm: warm.name == "main" and not free.is_set())
        pair.main.act = lambda _: free.wait(_PATIENCE_S) and None
        try:
            found = pair.step()
            # Half of the time is for the other one.
            assert 0 < given[0] <= 30
            if has_spare:
                assert found == ("OK", "spare", True)
                assert pair.step() == ("OK", "spare", False)
            else:
                assert found == ("BACKEND_FAULT", "spare", False)
                assert "main has not answered in time" in pair.decoder.result.detail
                # Nor the next time, for which it has all of it.
                assert pair.step() == ("DEADLINE_MISS", "main", False)
                assert 30 < given[1] <= 60
        finally:
            pair.main.act = None
            free.set()

        # Whether or not ticks go on.
        _wait(lambda: pair.decoder.snapshot().recoveries >= 1)
        assert pair.step() == ("OK", "main", False)


def test_a_backend_that_hangs_is_waited_for_until_the_deadline(tokenizer: ActionTokenizer) -> None:
    free = threading.Event()
    main, backend = switched(tokenizer, "main")
    tokens = chunks_of(tokenizer, 1)[0][0]
    with loop(main, use_worker=True, deadline_us=60e6, retry_after_s=60.0) as decoder:
        decoder.warmup()
        backend.act = lambda _: free.wait(_PATIENCE_S) and None
        try:
            for _ in range(2):
                before = time.monotonic()
                assert decoder.step(tokens, deadline_us=2e4).status is Status.DEADLINE_MISS
                assert "main has not answered in time" in decoder.result.detail
                assert time.monotonic() - before >= 0.01
        finally:
            backend.act = None
            free.set()


def test_one_that_was_left_behind_and_answers_within_the_next_deadline_serves_the_next_chunk(
    tokenizer: ActionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    with Pair(tokenizer, use_worker=True, deadline_us=60e6) as pair:
        pair.spare.act = fails
        pair.main.act = lambda _: free.wait(_PATIENCE_S) and None
        with monkeypatch.context() as patch:
            hurry(patch, lambda warm: warm.name == "main")
            assert pair.step() == ("BACKEND_FAULT", "spare", False)
        pair.main.act = None
        release = threading.Timer(0.1, free.set)
        release.start()
        assert pair.step() == ("OK", "main", False)
        release.join()


def test_answers_that_nobody_waits_for_disturb_no_later_one(tokenizer: ActionTokenizer) -> None:
    worker = DecodeWorker(WarmTokenizer(tokenizer, 0))
    tokens = chunks_of(tokenizer, 4)[0]
    for chunk in tokens[:3]:
        worker.ask(chunk, None)
        _wait(lambda: not worker.is_pending)
    for chunk in tokens:
        worker.ask(chunk, None)
        assert worker.wait_until(time.monotonic() + _PATIENCE_S)
        np.testing.assert_array_equal(worker.warm.out, tokenizer.decode(chunk))
    worker.close()


def test_what_ends_a_thread_ends_no_loop(tokenizer: ActionTokenizer) -> None:
    def leave(_: Any) -> None:
        raise SystemExit(3)

    with Pair(tokenizer, use_worker=True, deadline_us=60e6) as pair:
        pair.main.act = leave
        assert pair.step() == ("OK", "spare", True)
        assert "InferenceError: SystemExit: 3" in pair.decoder.result.detail


def test_wrong_types_and_stats_are_found_before_they_are_handed_over(
    tokenizer: ActionTokenizer, dynamic_tokenizer: ActionTokenizer
) -> None:
    with Pair(tokenizer, use_worker=True, deadline_us=60e6) as pair:
        assert pair.step(pair.tokens.astype(np.int64) + 2**32)[0] == "BAD_TOKEN"
        assert pair.step(pair.tokens.astype(np.uint8))[0] == "OK"
        assert pair.step(pair.tokens, stats=np.zeros((1, 2, 3, 2), np.float32))[0] == "BAD_TOKEN"
    tokens, stats = (found[0] for found in chunks_of(dynamic_tokenizer, 1)[:2])
    with Pair(dynamic_tokenizer, use_worker=True, deadline_us=60e6) as pair:
        for wrong in (None, "stats", stats.astype(np.float64), stats[:, :, :1], -stats):  # type: ignore[union-attr]
            assert pair.step(tokens, stats=wrong)[0] == "BAD_TOKEN"
        assert pair.step(tokens, stats=stats)[:2] == ("OK", "main")
        assert pair.decoder.snapshot().fallbacks == 0


def test_a_worker_needs_a_deadline(tokenizer: ActionTokenizer) -> None:
    with pytest.raises(ControlConfigError, match="use_worker is true without deadline_us"):
        config_of(tokenizer, use_worker=True)


def test_a_fallback_of_another_tokenizer_is_refused(
    tokenizer: ActionTokenizer, dynamic_tokenizer: ActionTokenizer
) -> None:
    with pytest.raises(ControlConfigError, match="its tokens mean something else"):
        loop(tokenizer, fallbacks=(dynamic_tokenizer,))


# --- the log ----------------------------------------------------------------------------------------------------------


def test_incidents_are_logged_at_a_limited_rate(
    tokenizer: ActionTokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("rfsq.runtime.control.tick_log.time.monotonic", lambda: now[0])
    config: ControlConfig = config_of(tokenizer, log_interval_s=10.0)
    reporter = Reporter(config, Health(), None, {})
    with caplog.at_level(logging.WARNING):
        for tick in range(5):
            reporter.incident(Status.STALE, tick, "injected", True)
        reporter.incident(Status.BAD_TOKEN, 5, "other", False)
        assert reporter.flush()
        now[0] = 111.0
        reporter.incident(Status.STALE, 6, "injected", True)
        assert reporter.flush()
    reporter.close()
    assert caplog.messages == [
        "tick 0: STALE, standing still: injected",
        "tick 5: BAD_TOKEN, service goes on: other",
        "tick 6: STALE, standing still: injected (4 more since the last line)",
    ]


def test_a_reporter_that_fails_once_still_reports(
    tokenizer: ActionTokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    health = Health()
    reporter = Reporter(config_of(tokenizer, log_interval_s=1e-6), health, None, {})
    with monkeypatch.context() as patch:
        patch.setattr("rfsq.runtime.control.tick_log.Reporter._report", lambda *_: 1 / 0)
        reporter.incident(Status.STALE, 1, "injected", True)
        assert reporter.flush()
    reporter.incident(Status.STALE, 2, "injected", True)
    assert reporter.flush()
    reporter.close()
    assert caplog.messages[0].startswith("an incident cannot be reported: ZeroDivisionError")
    assert caplog.messages[1] == "tick 2: STALE, standing still: injected"
    assert health.internal_faults == 1


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_each_with_its_own_decoder_run_at_once(bundle: Path) -> None:
    context: Any = multiprocessing.get_context("spawn")
    start, found = context.Barrier(2), context.Queue()
    processes = [context.Process(target=drive, args=(bundle, start, found)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [found.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(_PATIENCE_S)
    assert [process.exitcode for process in processes] == [0, 0]
    assert results[0] == results[1]
    assert results[0][0] == 500
    assert results[0][1] > 0


def test_a_decoder_can_be_made_in_one_thread_and_driven_in_another(tokenizer: ActionTokenizer) -> None:
    decoder: ControlDecoder = loop(tokenizer)
    tokens = chunks_of(tokenizer, 1)[0][0]
    found: list[Status] = []

    def drive() -> None:
        decoder.warmup()
        found.append(decoder.step(tokens).status)

    thread = threading.Thread(target=drive)
    thread.start()
    thread.join()
    decoder.close()
    assert found == [Status.OK]
