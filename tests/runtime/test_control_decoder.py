"""`ControlDecoder` in a loop: right status, safe action, back in service; never an error that was not asked for."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import ActionTokenizer, ControlDecoder, ControlFaultError, Status, WrongThreadError
from runtime.control_recorder import read_record, write_record
from runtime.control_soak import FAULTS, FaultyBackend, chunks_of, config_for, run_campaign
from runtime.replay_flight import replay


def make(tokenizer: ActionTokenizer, *, fallbacks: tuple[ActionTokenizer, ...] = (), **changes: Any) -> ControlDecoder:
    limit = chunks_of(tokenizer, 16)[2]
    config = config_for(tokenizer, limit, **changes)
    return ControlDecoder(tokenizer, config, fallbacks=fallbacks, position=(0.0,) * config.action_dim)


def faulty(tokenizer: ActionTokenizer) -> tuple[ActionTokenizer, FaultyBackend]:
    backend: Any = FaultyBackend(tokenizer.backend)
    return ActionTokenizer(tokenizer._manifest, backend), backend


def test_every_fault_is_answered_with_its_status_and_nothing_unsafe_leaves(tokenizer: ActionTokenizer) -> None:
    report = run_campaign(tokenizer, 10 * len(FAULTS))
    assert report.holds, str(report)
    assert len(report.kinds) == len(FAULTS) >= 15


def test_before_warmup_and_before_the_first_chunk_it_is_not_ready(tokenizer: ActionTokenizer) -> None:
    tokens = chunks_of(tokenizer, 1)[0][0]
    with make(tokenizer) as decoder:
        assert decoder.step(tokens).status is Status.NOT_READY
        decoder.warmup()
        assert decoder.step().status is Status.NOT_READY
        assert decoder.step(tokens).status is Status.OK


def test_it_falls_back_once_within_the_tick_and_returns_when_the_first_works_again(tokenizer: ActionTokenizer) -> None:
    broken, backend = faulty(tokenizer)
    tokens = chunks_of(tokenizer, 1)[0][0]
    with make(broken, fallbacks=(tokenizer,), retry_after_s=0.01) as decoder:
        decoder.warmup()
        backend.fault = "raises"
        result = decoder.step(tokens)
        assert (result.status, result.fell_back) == (Status.OK, True)
        assert not decoder.step(tokens).fell_back
        backend.fault = ""
        for _ in range(500):
            if decoder.snapshot().recoveries:
                break
            time.sleep(0.01)
        assert decoder.snapshot().recoveries == 1
        assert decoder.snapshot().fallbacks == 1


def test_a_backend_that_hangs_is_left_behind(tokenizer: ActionTokenizer) -> None:
    stuck, backend = faulty(tokenizer)
    free = threading.Event()
    tokens = chunks_of(tokenizer, 1)[0][0]
    with make(stuck, fallbacks=(tokenizer,), use_worker=True, deadline_us=500_000.0, retry_after_s=60.0) as decoder:
        decoder.warmup()
        original = backend._backend

        class Hanging:
            def decode_into(self, *_: object) -> None:
                free.wait()

        backend._backend = Hanging()
        try:
            result = decoder.step(tokens)
            assert (result.status, result.fell_back) == (Status.OK, True)
            assert decoder.step(tokens).status is Status.OK
        finally:
            free.set()
            backend._backend = original


@pytest.mark.parametrize("how", ["stop", "hold_last", "raise"])
def test_what_a_fault_does(tokenizer: ActionTokenizer, how: str) -> None:
    tokens = chunks_of(tokenizer, 1)[0][0]
    with make(tokenizer, on_fault=how) as decoder:
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


def test_faults_in_a_row_latch(tokenizer: ActionTokenizer) -> None:
    tokens = chunks_of(tokenizer, 1)[0][0]
    with make(tokenizer, max_consecutive_faults=3) as decoder:
        decoder.warmup()
        for number in range(3):
            assert decoder.step(tokens - 100).is_latched is (number == 2)
        assert decoder.step(tokens).is_latched


def test_a_draft_is_replaced_by_its_full_decode(tokenizer: ActionTokenizer) -> None:
    tokens = chunks_of(tokenizer, 1)[0][0]
    draft = np.ascontiguousarray(tokens[..., : tokenizer.prefixes[0]])
    with make(tokenizer) as decoder:
        decoder.warmup()
        now = time.monotonic_ns()
        assert decoder.step(draft, sequence=4, observed_ns=now).status is Status.OK
        assert decoder.step(tokens, sequence=4, observed_ns=now).status is Status.OK
        assert decoder.step(draft, sequence=4, observed_ns=now).status is Status.STALE


def test_another_thread_is_refused_and_one_decoder_each_is_fine(tokenizer: ActionTokenizer) -> None:
    tokens = chunks_of(tokenizer, 1)[0][0]

    def drive() -> int:
        with make(tokenizer) as decoder:
            decoder.warmup()
            return sum(decoder.step(tokens).status is Status.OK for _ in range(300))

    with make(tokenizer) as decoder, ThreadPoolExecutor(2) as pool:
        decoder.warmup()
        with pytest.raises(WrongThreadError, match="make one decoder per thread"):
            pool.submit(decoder.step, tokens).result()
        assert [run.result() for run in [pool.submit(drive), pool.submit(drive)]] == [300, 300]


def test_a_fault_leaves_a_flight_record_and_a_full_disk_leaves_the_loop_alone(
    tokenizer: ActionTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = chunks_of(tokenizer, 1)[0][0]
    with make(tokenizer, record_folder=str(tmp_path), record_interval_s=1e-6) as decoder:
        decoder.warmup()
        decoder.step(tokens)
        decoder.step(tokens - 100)
        assert decoder.flush()
        (path,) = tmp_path.glob("flight-*.npz")
        record = read_record(path)
        np.testing.assert_array_equal(record.tokens_of(0), tokens)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("runtime.control_worker.write_record", full)
        decoder.step(tokens)
        assert decoder.step(tokens - 100).status is Status.BAD_TOKEN
        assert decoder.flush()
        assert decoder.snapshot().records_failed == 1
        assert decoder.step(tokens).status is Status.OK


def test_openmetrics_counts_what_happened(tokenizer: ActionTokenizer) -> None:
    with make(tokenizer) as decoder:
        decoder.warmup()
        decoder.step(chunks_of(tokenizer, 1)[0][0])
        text = decoder.openmetrics()
    assert text.endswith("# EOF\n")
    assert 'rfsq_control_ticks_total{status="ok"} 1\n' in text
    assert 'rfsq_control_latency_seconds_bucket{le="+Inf"} 1\n' in text


def test_a_flight_is_replayed_and_a_difference_found(tokenizer: ActionTokenizer, tmp_path: Path) -> None:
    tokens = chunks_of(tokenizer, 16)[0]
    path = tmp_path / "flight.npz"
    with make(tokenizer) as decoder:
        decoder.warmup()
        for tick in range(60):
            decoder.step(tokens[tick % 16] - 100 * (tick % 17 == 16))
        assert decoder.write_flight_record(path)
    record = read_record(path)
    compared, differences = replay(record, tokenizer)
    assert compared > 40
    assert not differences
    actions = record.actions.copy()
    actions[30] += 0.01
    write_record(path, {**record.columns, "actions": actions, "tokens": record.tokens}, record.meta)
    assert replay(read_record(path), tokenizer)[1]
