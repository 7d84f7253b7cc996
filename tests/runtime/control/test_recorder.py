"""The flight recorder: what came is in it whatever it was, and what is read back is whole or refused."""

import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rfsq.runtime.bundle.models import ChunkModel, StepModel
from rfsq.runtime.control.config import Status
from rfsq.runtime.control.errors import FlightRecordError
from rfsq.runtime.control.recorder import ABSENT, KEPT, UNKEPT, FlightRecorder, read_record, state_after, write_record
from rfsq.runtime.control.result import INTERNAL, NO_NUMBER, NONE_YET, RUN_OUT, LoopState, TickOutcome

SHAPE = (2, 3, 4)
ACTIONS = np.array([0.5, -1.0], np.float32)
META = {"config": {}, "fingerprint": "f", "token_shape": SHAPE}


def _recorder(ticks: int = 8, *, has_stats: bool = False) -> FlightRecorder:
    model = StepModel("dynamic" if has_stats else "none", 2, 2, 3, 8, 4, 5, (4,), 1.0, (1.0, 1.0), (0.0, 0.0))
    return FlightRecorder(ticks, model)


def _chunk_recorder(ticks: int = 8, num_tokens: int = 45) -> FlightRecorder:
    prefixes = tuple(range(1, num_tokens + 1))
    sizes = {"chunk_length": 8, "action_dim": 2, "num_classes": 64, "token_bits": 10, "num_tokens": num_tokens}
    model = ChunkModel("chunk", **sizes, num_latents=9, prefixes=prefixes, budgets=(num_tokens,), bounds=(1.0,),
                       action_limit=1.0, action_units=(1.0, 1.0), action_offset=(0.0, 0.0))  # fmt: skip
    return FlightRecorder(ticks, model)


def _write(recorder: FlightRecorder, path: Path) -> Path:
    write_record(path, recorder.copy(), META)
    return path


def _tick(number: int, actions: Any = ACTIONS) -> tuple[TickOutcome, LoopState]:
    return TickOutcome(actions.tolist()), LoopState(line=(number, NO_NUMBER))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (np.arange(24, dtype=np.int32).reshape(1, 2, 3, 4), np.arange(24)),
        (np.arange(18, dtype=np.uint8).reshape(1, 2, 3, 3), np.arange(18)),
        (np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3).transpose(0, 1, 3, 2), None),
        (np.full((1, 2, 3, 1), 2**32 + 1, np.int64), np.full(6, 2**31 - 1)),
        (np.full((1, 2, 3, 1), -(2**32) + 1, np.int64), np.full(6, -1)),
    ],
)
def test_tokens_of_every_type_that_decodes_are_kept_and_illegal_ones_stay_illegal(
    tmp_path: Path, tokens: Any, expected: Any
) -> None:
    recorder = _recorder()
    recorder.add(*_tick(7), tokens)
    record = read_record(_write(recorder, tmp_path / "flight.npz"))
    found = record.tokens_of(0)
    assert found is not None
    assert found.shape == tokens.shape
    np.testing.assert_array_equal(found.reshape(-1), tokens.reshape(-1) if expected is None else expected)
    assert record.columns["tick"].tolist() == [7]
    np.testing.assert_array_equal(record.actions, [ACTIONS])


@pytest.mark.parametrize("count", [1, 8, 45])
@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint16])
def test_any_first_few_chunk_tokens_are_kept(tmp_path: Path, count: int, kind: Any) -> None:
    recorder, tokens = _chunk_recorder(), np.arange(count, dtype=kind)[None]
    # What was there before is longer.
    for number in range(20):
        recorder.add(*_tick(number), np.full((1, 45), 1023, np.int32))
    recorder.add(*_tick(99), tokens)
    path = tmp_path / "flight.npz"
    write_record(path, recorder.copy(), {**META, "token_shape": (45,)})
    record = read_record(path)
    np.testing.assert_array_equal(record.tokens_of(len(record) - 1), tokens)
    np.testing.assert_array_equal(record.tokens_of(len(record) - 2), np.full((1, 45), 1023))
    assert record.stats_of(0) is None


REFUSED_TYPES = pytest.mark.parametrize(
    "refused", ["i1", "i2", "u4", "u8", ">i4", ">i8", "f4", "?", "O", np.ma.MaskedArray, np.memmap]
)


@REFUSED_TYPES
@pytest.mark.parametrize("made", [_recorder, _chunk_recorder])
def test_tokens_of_a_type_that_no_decoder_takes_are_not_kept(made: Callable[[], FlightRecorder], refused: Any) -> None:
    """Kept as int32, they would be tokens that a replay accepts."""
    recorder = made()
    tokens = np.ones((1, 8) if made is _chunk_recorder else (1, 2, 3, 4), np.int32)
    if isinstance(refused, str):
        recorder.add(*_tick(0), tokens.astype(refused))
    else:
        recorder.add(*_tick(0), tokens.view(refused))
    assert recorder.copy()["token_state"].tolist() == [UNKEPT]


@pytest.mark.parametrize(("made", "other"), [(_recorder, np.uint16), (_chunk_recorder, np.uint8)])
def test_nor_is_the_narrow_type_of_the_other_kind_of_tokens(made: Callable[[], FlightRecorder], other: Any) -> None:
    recorder = made()
    recorder.add(*_tick(0), np.ones((1, 8) if made is _chunk_recorder else (1, 2, 3, 4), other))
    assert recorder.copy()["token_state"].tolist() == [UNKEPT]


@pytest.mark.parametrize("tokens", [np.zeros((1, 46), np.int32), np.zeros(45, np.int32), np.zeros((1, 2, 3, 4), int)])
def test_tokens_of_another_shape_than_those_of_a_chunk_do_not_fit(tokens: Any) -> None:
    recorder = _chunk_recorder()
    recorder.add(*_tick(0), tokens)
    assert recorder.copy()["token_state"].tolist() == [UNKEPT]


def test_a_recorder_takes_the_memory_of_its_arrays_however_many_prefixes_decode() -> None:
    """Whatever else there is of a row is of the actions, and the same for any tokens."""
    ticks, taken = 2000, list[int]()
    for num_tokens in (1, 256):
        tracemalloc.start()
        recorder = _chunk_recorder(ticks, num_tokens)
        tokens = [np.zeros((1, count), np.int32) for count in range(1, num_tokens + 1)]
        for number in range(2 * ticks):
            recorder.add(*_tick(number), tokens[number % num_tokens])
        del tokens
        taken.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    rows = ticks + 9
    assert taken[1] - taken[0] < rows * 255 * 4 + 2**17


@pytest.mark.parametrize(
    "tokens", [np.zeros((1, 2, 3, 4), np.float32), np.zeros((1, 2, 3, 5), np.int32), np.zeros((2, 3, 4)), [[1]], "x", 3]
)
def test_what_does_not_fit_is_recorded_as_such(tmp_path: Path, tokens: Any) -> None:
    recorder = _recorder(has_stats=True)
    recorder.add(*_tick(0), tokens, tokens)
    recorder.add(*_tick(1))
    record = read_record(_write(recorder, tmp_path / "flight.npz"))
    assert record.columns["token_state"].tolist() == [UNKEPT, ABSENT]
    assert record.columns["stats_state"].tolist() == [UNKEPT, ABSENT]
    assert record.tokens_of(0) is None
    assert record.stats_of(0) is None


def test_stats_are_kept_beside_their_tokens(tmp_path: Path) -> None:
    recorder, tokens = _recorder(has_stats=True), np.ones((1, 2, 3, 3), np.int32)
    stats = np.arange(12, dtype=np.float32).reshape(1, 2, 3, 2)
    recorder.add(*_tick(0), tokens, stats)
    recorder.add(*_tick(1), tokens, stats[:, :, :2])
    recorder.add(*_tick(2), tokens, stats.astype(np.float64))
    # A tokenizer takes stats in any byte order, and no subclass.
    recorder.add(*_tick(3), tokens, stats.astype(">f4"))
    recorder.add(*_tick(4), tokens, stats.view(np.ma.MaskedArray))
    record = read_record(_write(recorder, tmp_path / "flight.npz"))
    assert record.columns["stats_state"].tolist() == [KEPT, UNKEPT, UNKEPT, KEPT, UNKEPT]
    for index in (0, 3):
        np.testing.assert_array_equal(record.stats_of(index), stats)  # type: ignore[arg-type]  # it is there


def test_the_last_ticks_and_what_they_need_are_kept_in_order() -> None:
    recorder = _recorder(8)
    for tick in range(100):
        recorder.add(*_tick(tick, ACTIONS * tick))
        ticks = recorder.copy()["tick"].tolist()
        # The row that the tick under way may be writing is left out.
        assert ticks == list(range(max(0, tick + 1 - (8 + 2)), tick + 1))
    np.testing.assert_array_equal(recorder.copy()["actions"][-1], ACTIONS * 99)


def test_a_copy_made_while_the_loop_writes_holds_whole_rows() -> None:
    recorder, is_over = _recorder(64), threading.Event()

    def write() -> None:
        tick = 0
        while not is_over.is_set():
            tokens = np.full((1, *SHAPE), tick, np.int32)
            recorder.add(*_tick(tick, np.full(2, tick, np.float32)), tokens)
            tick = (tick + 1) % 2**20

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(300):
            copied = recorder.copy()
            ticks = copied["tick"]
            assert (np.diff(ticks) == 1).all()
            np.testing.assert_array_equal(copied["actions"], np.repeat(ticks[:, None], 2, 1))
            assert (copied["tokens"] == ticks[:, None]).all()
    finally:
        is_over.set()
        thread.join()


def test_a_record_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, path = _recorder(), tmp_path / "flights" / "flight.npz"
    recorder.add(*_tick(0))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rfsq.runtime.control.recorder.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            _write(recorder, path)
    assert not path.parent.exists()
    _write(recorder, path)
    assert list(path.parent.iterdir()) == [path]
    assert len(read_record(path)) == 1


@pytest.mark.parametrize("place", range(40))
def test_a_damaged_record_is_refused_or_reads_as_a_record(tmp_path: Path, place: int) -> None:
    recorder = _recorder()
    for tick in range(5):
        recorder.add(*_tick(tick), np.ones((1, *SHAPE), np.int32), None)
    path = _write(recorder, tmp_path / "flight.npz")
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(place)
    if place % 4 == 0:
        content = content[: int(rng.integers(len(content)))]
    else:
        for _ in range(place):
            content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    try:
        record = read_record(path)
    except FlightRecordError:
        return
    assert len(record) == 5
    record.tokens_of(0)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": np.array([9], np.int16)},
        {"status": np.array([9], np.int8)},
        {"tick": np.array([0, 1])},
        {"tick": np.array([0.5])},
        {"tick": np.array(["a"])},
        {"actions": np.zeros((1, 2))},
        {"tokens": np.zeros((1, 7), np.int32)},
        {"stats_state": np.array([KEPT], np.int8)},
        {"tokens": np.array([None], object)},
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    recorder, path = _recorder(), tmp_path / "flight.npz"
    recorder.add(*_tick(0))
    write_record(path, {**recorder.copy(), **change}, META)
    with pytest.raises(FlightRecordError, match=r"flight\.npz"):
        read_record(path)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({**META, "token_shape": [2, 3]}, "damaged"),
        ({**META, "token_shape": 24}, "no flight record"),
        ({**META, "config": 3}, "damaged"),
        ({}, "no flight record"),
    ],
)
def test_a_record_without_what_a_replay_needs_is_refused(tmp_path: Path, meta: dict[str, Any], message: str) -> None:
    recorder, path = _recorder(), tmp_path / "flight.npz"
    recorder.add(*_tick(0))
    write_record(path, recorder.copy(), meta)
    with pytest.raises(FlightRecordError, match=message):
        read_record(path)


def test_a_record_of_another_version_says_so(tmp_path: Path) -> None:
    path = tmp_path / "flight.npz"
    write_record(path, {}, {"schema": 1})
    with pytest.raises(FlightRecordError, match="has schema 1; expected 2 or 3"):
        read_record(path)


def test_a_file_that_bears_a_temporary_name_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".x.npz.{os.getpid()}.tmp"
    other.write_bytes(b"mine")
    _write(_recorder(), tmp_path / "x.npz")
    assert other.read_bytes() == b"mine"


def test_the_columns_of_a_file_are_those_that_other_versions_read(tmp_path: Path) -> None:
    recorder = _recorder()
    recorder.add(*_tick(1))
    columns = read_record(_write(recorder, tmp_path / "flight.npz")).columns
    assert {name: column.dtype.name for name, column in columns.items()} == {
        "tick": "int64", "time_ns": "int64", "latency_ns": "int64", "status": "int8", "flags": "int16",
        "backend": "int8", "faults": "int32", "sequence": "int64", "observed_ns": "int64", "service_layers": "int16",
        "start": "int64", "given_sequence": "int64", "given_observed_ns": "int64", "token_state": "int8",
        "layers": "int16", "stats_state": "int8", "doubt": "int32",
    }  # fmt: skip


@pytest.mark.parametrize(
    "state",
    [
        LoopState(),
        LoopState((7, 10**15), (3, 10**15 - 5, 2, 4), 1, 0, None, True, True, RUN_OUT),
        LoopState((7, 10**15), (3, 10**15 - 5, 2, 4), INTERNAL, 9, Status.STALE, True, False, RUN_OUT),
        LoopState((2, -5), (-4, NO_NUMBER, 0, 0), 0, 2, Status.BACKEND_FAULT, False, False, NONE_YET),
    ],
)
def test_the_state_that_a_tick_has_left_comes_back_from_its_row(tmp_path: Path, state: LoopState) -> None:
    recorder, out = _recorder(), TickOutcome(ACTIONS.tolist())
    out.status, out.is_latched = state.latched or Status.OK, state.latched is not None
    recorder.add(out, state)
    assert state_after(read_record(_write(recorder, tmp_path / "flight.npz")).row(0)) == state
