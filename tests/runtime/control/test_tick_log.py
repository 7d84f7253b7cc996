"""What is kept of every tick, in the flight record and in the counts, field by field."""

from pathlib import Path
from typing import Any

import pytest

from rfsq.runtime import ControlConfigError, Status
from rfsq.runtime.bundle.errors import TokenizerError
from rfsq.runtime.control.recorder import (
    ACCEPTED,
    BEGUN,
    FELL_BACK,
    HELD,
    LATCHED,
    QUEUED,
    RESET,
    FlightRecord,
    read_record,
)
from rfsq.runtime.control.result import INTERNAL, NO_NUMBER
from tests.runtime.control.loops import PERIOD_NS, ScriptedLoop


def _record(made: ScriptedLoop, folder: Path) -> FlightRecord:
    assert made.decoder.write_flight_record(folder / "flight.npz")
    return read_record(folder / "flight.npz")


def _rows(record: FlightRecord, *names: str) -> list[tuple[int, ...]]:
    return list(zip(*(record.columns[name].tolist() for name in names), strict=True))


SERVED = ACCEPTED | QUEUED | BEGUN


def test_a_flight_record_says_what_was_in_service_and_what_happened(tmp_path: Path) -> None:
    with ScriptedLoop(fallbacks=1) as made:
        start = made.clock.now
        made.tick()
        made.tick(0.5, sequence=7)
        assert made.tick(0.5, fails=True).fell_back
        made.clock.error = RuntimeError("injected")
        made.tick()
        made.clock.error = None
        with pytest.raises(KeyboardInterrupt):
            made.tick(KeyboardInterrupt())
        made.decoder.reset()
        record = _record(made, tmp_path)
    assert record.meta["backends"] == ["scripted", "scripted"]
    assert _rows(record, "tick", "status", "flags", "backend") == [
        (0, Status.NOT_READY, RESET | HELD, 0),
        (1, Status.NOT_READY, HELD, 1),
        (2, Status.OK, SERVED, 0),
        (3, Status.OK, SERVED | FELL_BACK, 1),
        # The clock did not say that a tick had begun.
        (3, Status.BACKEND_FAULT, HELD | BEGUN, INTERNAL),
        (0, Status.NOT_READY, RESET | HELD, 0),
    ]
    second = start + 2 * PERIOD_NS
    assert _rows(record, "sequence", "observed_ns", "service_layers", "start", "given_sequence") == [
        (-1, NO_NUMBER, 0, 0, NO_NUMBER),
        (-1, NO_NUMBER, 0, 0, NO_NUMBER),
        (7, second, 3, 2, 7),
        (8, second + PERIOD_NS, 3, 3, NO_NUMBER),
        (8, second + PERIOD_NS, 3, 3, NO_NUMBER),
        (-1, NO_NUMBER, 0, 0, NO_NUMBER),
    ]


def test_a_tick_that_was_broken_off_has_one_row_whatever_it_had_noted_itself(tmp_path: Path) -> None:
    with ScriptedLoop() as made:
        made.tick(0.5)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                made.tick(KeyboardInterrupt())
        made.tick()
        record = _record(made, tmp_path)
        snapshot = made.decoder.snapshot()
    assert _rows(record, "tick", "status", "backend", "latency_ns")[2:] == [
        (2, Status.BACKEND_FAULT, INTERNAL, 0),
        (3, Status.BACKEND_FAULT, INTERNAL, 0),
        (4, Status.STALE, 0, 0),
    ]
    assert [bool(flags & ACCEPTED) for flags in record.columns["flags"]] == [False, True, False, False, False]
    assert (snapshot.ticks, snapshot.held, snapshot.statuses["BACKEND_FAULT"]) == (4, 3, 2)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_so_many_faults_in_a_row_latch_and_a_reset_ends_it_at_once(most: int, tmp_path: Path) -> None:
    with ScriptedLoop(max_consecutive_faults=most) as made:
        assert [made.wrong().is_latched for _ in range(4)] == [number >= most for number in range(1, 5)]
        assert made.decoder.snapshot().is_latched
        assert made.decoder.snapshot().incidents == 1
        made.decoder.reset()
        assert not made.decoder.snapshot().is_latched
        # The same again is news.
        made.wrong()
        assert made.decoder.snapshot().incidents == 2
        flags = _record(made, tmp_path).columns["flags"]
        assert [bool(found & LATCHED) for found in flags[1:5]] == [number >= most for number in range(1, 5)]


def test_a_clock_that_has_not_said_when_a_tick_began_costs_its_latency() -> None:
    with ScriptedLoop() as made:
        made.tick(0.5)
        made.clock.readings = [RuntimeError("injected"), made.clock.now + 10**6]
        result = made.tick()
        assert (result.status, result.latency_ns) == (Status.BACKEND_FAULT, 0)
        assert made.decoder.health.latency.max_ns == 0


def test_where_there_is_no_flight_record_none_is_written(tmp_path: Path) -> None:
    reason = r"there is no flight record; call warmup\(\), with record_ticks above 0"
    with ScriptedLoop(record_ticks=0) as made:
        made.tick(0.5)
        with pytest.raises(ControlConfigError, match=reason):
            made.decoder.write_flight_record(tmp_path / "flight.npz")
    closed = ScriptedLoop()
    with pytest.raises(TokenizerError, match="the flight record"):
        closed.decoder.write_flight_record(3)  # type: ignore[arg-type]
    closed.decoder.close()
    with pytest.raises(ControlConfigError, match=reason):
        closed.decoder.write_flight_record(tmp_path / "flight.npz")
    assert list(tmp_path.iterdir()) == []


def test_what_a_tick_has_noted_itself_before_it_was_broken_off_is_struck_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a bug")

    with ScriptedLoop() as made:
        made.tick(0.5)
        with monkeypatch.context() as patch:
            patch.setattr(made.decoder._tick_log, "_report", fail)
            assert made.wrong().status is Status.BACKEND_FAULT
        made.tick()
        record = _record(made, tmp_path)
    assert _rows(record, "tick", "status", "backend") == [
        (0, Status.NOT_READY, 0),
        (1, Status.OK, 0),
        (2, Status.BACKEND_FAULT, INTERNAL),
        (3, Status.STALE, 0),
    ]


def test_without_a_flight_record_a_loop_goes_on_after_a_tick_that_was_broken_off() -> None:
    with ScriptedLoop(record_ticks=0) as made:
        made.tick(0.5)
        with pytest.raises(KeyboardInterrupt):
            made.tick(KeyboardInterrupt())
        result = made.tick(0.5)
        assert (result.status, result.detail) == (Status.OK, "")
        assert made.decoder.health.internal_faults == 0


def test_only_what_is_new_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Status, int]] = []
    with ScriptedLoop() as made:

        def note(status: Status, tick: int, *_: Any) -> None:
            seen.append((status, tick))

        monkeypatch.setattr(made.decoder._tick_log.reporter, "incident", note)
        for rows in (None, 0.5, 0.5, 9.0, 9.0, 0.5, None, 9.0):
            made.tick(rows)
    assert seen == [(Status.OUT_OF_RANGE, 4), (Status.OUT_OF_RANGE, 8)]


def test_a_tick_that_was_broken_off_has_missed_what_the_clock_says_once() -> None:
    with ScriptedLoop() as made:
        made.tick(0.5)
        with pytest.raises(KeyboardInterrupt):
            made.tick(KeyboardInterrupt(), passed=6.0)
        assert made.tick(0.5).tick == 8
        assert made.decoder.health.missed_ticks == 5


def test_ticks_without_a_clock_make_up_for_none_that_is_missed() -> None:
    with ScriptedLoop() as made:
        made.tick(0.5)
        made.clock.error = RuntimeError("injected")
        for _ in range(3):
            made.tick()
        made.clock.error, made.clock.now = None, made.clock.now - 2 * PERIOD_NS
        assert made.tick(0.5).tick == 5
        assert made.decoder.health.missed_ticks == 0


def test_why_a_tick_was_broken_off_is_not_said_of_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a bug")

    with ScriptedLoop() as made:
        made.tick(0.5)
        with pytest.raises(KeyboardInterrupt):
            made.tick(KeyboardInterrupt("Ctrl-C"))
        assert "Ctrl-C" in made.decoder.result.detail
        made.tick(0.5)
        monkeypatch.setattr(made.decoder._tick_log, "close_tick", fail)
        result = made.tick(0.5)
        assert result.is_held
        assert "Ctrl-C" not in result.detail
