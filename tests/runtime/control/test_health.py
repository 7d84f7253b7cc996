"""What a loop tells of itself, read by somebody else's parser, against what was counted here."""

import math
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from rfsq.runtime import ActionTokenizer, Status
from rfsq.runtime.control.health import Health, HealthSnapshot, LatencyHistogram, upper_end
from rfsq.runtime.qualification.soak import chunks_of
from tests.runtime.control.loops import Clock, fails, loop, switched

EDGES = st.builds(lambda exponent, beside: 2**exponent + beside, st.integers(5, 40), st.integers(-1, 1))
NANOSECONDS = st.integers(-(10**6), 2**45) | st.integers(0, 200) | st.integers(10**3, 10**6) | EDGES


def _samples(text: str) -> dict[tuple[str, str], float]:
    """By name and the value of the one label."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert len(sample.labels) <= 1
            found[sample.name, next(iter(sample.labels.values()), "")] = float(sample.value)
    return found


def _check_text(text: str, health: Health, snapshot: HealthSnapshot, latencies: list[int]) -> None:
    samples = _samples(text)
    for status in Status:
        count = samples["rfsq_control_ticks_total", status.name.lower()]
        assert count == health.statuses[status] == snapshot.statuses[status.name]
    for name, expected in (
        ("held_ticks", snapshot.held),
        ("chunks", snapshot.chunks),
        ("refused_chunks", snapshot.refused_chunks),
        ("missed_ticks", snapshot.missed_ticks),
        ("fallbacks", snapshot.fallbacks),
        ("recoveries", snapshot.recoveries),
        ("incidents", snapshot.incidents),
        ("records_written", snapshot.records_written),
        ("records_failed", snapshot.records_failed),
        ("internal_faults", snapshot.internal_faults),
    ):
        assert samples[f"rfsq_control_{name}_total", ""] == expected, name
    assert samples["rfsq_control_latched", ""] == snapshot.is_latched
    assert samples["rfsq_control_latency_seconds_count", ""] == len(latencies)
    assert samples["rfsq_control_latency_seconds_sum", ""] == pytest.approx(sum(latencies) / 1e9)
    buckets = {le: count for (name, le), count in samples.items() if name == "rfsq_control_latency_seconds_bucket"}
    assert len(buckets) == 28
    for le, count in buckets.items():
        bound = math.inf if le == "+Inf" else round(float(le) * 1e9)
        assert count == sum(latency <= bound for latency in latencies), le


@given(st.lists(NANOSECONDS, max_size=60))
def test_the_histogram_reads_as_openmetrics(nanoseconds: list[int]) -> None:
    health = Health()
    for value in nanoseconds:
        health.latency.add(value)
    _check_text(health.openmetrics(), health, health.snapshot(), [max(value, 0) for value in nanoseconds])


def test_everything_that_was_counted_reads_as_openmetrics(tokenizer: ActionTokenizer, tmp_path: Any) -> None:
    broken, backend = switched(tokenizer)
    tokens, clock = chunks_of(tokenizer, 1)[0][0], Clock()
    readings = Counter[str]()

    def ticking() -> int:
        clock.now += 700
        readings["calls"] += 1
        return clock()

    with loop(broken, fallbacks=(tokenizer,), clock=ticking, max_consecutive_faults=4, retry_after_s=60.0) as decoder:
        decoder.warmup()
        latencies = []
        for arguments in ([tokens], [], [tokens - 100], [tokens], [], [], []):
            if arguments and arguments[0] is tokens:
                backend.act = fails if backend.act is None and latencies else None
            latencies.append(decoder.step(*arguments).latency_ns)
        while not decoder.result.is_latched:
            latencies.append(decoder.step(tokens - 100).latency_ns)
        assert decoder.write_flight_record(tmp_path / "flight.npz")
        (tmp_path / "file").write_text("", encoding="utf-8")
        assert not decoder.write_flight_record(tmp_path / "file" / "flight.npz")
        snapshot = decoder.snapshot()
        _check_text(decoder.openmetrics(), decoder.health, snapshot, latencies)
    assert readings["calls"] > 2 * len(latencies)
    # Each is told from the others, and from 0.
    assert (snapshot.ticks, snapshot.is_latched, snapshot.fallbacks) == (len(latencies), True, 1)
    assert (snapshot.records_written, snapshot.records_failed, snapshot.chunks) == (1, 1, 2)
    assert snapshot.refused_chunks == 3
    assert snapshot.held >= 4


@given(st.lists(NANOSECONDS, min_size=1, max_size=200), st.floats(0.001, 1.0))
def test_quantiles_are_at_most_one_bin_above(nanoseconds: list[int], fraction: float) -> None:
    histogram = LatencyHistogram()
    for value in nanoseconds:
        histogram.add(value)
    values = sorted(max(value, 0) for value in nanoseconds)
    exact = values[max(1, math.ceil(fraction * len(values))) - 1]
    found = histogram.quantile(fraction)
    longest = upper_end(64 * 40 - 1)
    if exact <= longest:
        assert exact <= found <= exact * (1 + 1 / 64) + 1
    assert histogram.max_ns == values[-1]
    assert histogram.cumulative(()) == ([], len(values))
    assert histogram.sum_ns == sum(values)


def test_an_empty_histogram_has_no_quantile() -> None:
    assert LatencyHistogram().quantile(0.5) == 0.0


def test_readers_in_other_threads_are_off_by_no_more_than_the_tick_under_way(tokenizer: ActionTokenizer) -> None:
    tokens = chunks_of(tokenizer, 1)[0][0]
    found: list[HealthSnapshot] = []
    texts: list[str] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            found.append(decoder.snapshot())
            texts.append(decoder.openmetrics())

    with loop(tokenizer) as decoder:
        decoder.warmup()
        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(3000):
            decoder.step(tokens)
        is_over.set()
        reader.join()
        assert decoder.snapshot().ticks == 3000
    ticks = [snapshot.ticks for snapshot in found]
    assert ticks == sorted(ticks)
    for text in texts[:: 1 + len(texts) // 40]:
        samples = _samples(text)
        counted = sum(count for (name, _), count in samples.items() if name == "rfsq_control_ticks_total")
        assert samples["rfsq_control_latency_seconds_count", ""] >= counted - 1
        assert np.isfinite(samples["rfsq_control_latency_seconds_sum", ""])
