"""Real-time wishes: each is granted and can be taken back, or refused and says why. The watchdog by a clock of ours."""

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rfsq.runtime import RealtimeConfig, RealtimeRefusedError, Watchdog, apply_realtime
from rfsq.runtime.control.realtime import undo_realtime


@pytest.fixture(autouse=True, scope="module")
def frozen_again() -> Iterator[None]:
    """What `undo_realtime` unfreezes is more than this module's."""
    yield
    gc.collect()
    gc.freeze()


def _in_thread(call: Callable[[], Any]) -> Any:
    """Affinity and priority are of a thread: let it be one that ends."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


class FakeLibc:
    """Refuses to lock memory, or counts."""

    def __init__(self, error: int) -> None:
        self.error, self.locked = error, 0

    def mlockall(self, flags: int) -> int:
        assert flags == 3
        ctypes.set_errno(self.error)
        self.locked += not self.error
        return -1 if self.error else 0

    def munlockall(self) -> int:
        self.locked -= 1
        return 0


@pytest.fixture
def priority(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What was asked of the scheduler, which grants all."""
    asked: list[tuple[int, int]] = []

    def grant(_: int, policy: int, parameters: Any) -> None:
        asked.append((policy, parameters.sched_priority))

    monkeypatch.setattr(os, "sched_setscheduler", grant)
    return asked


def test_what_is_granted_is_reported_and_taken_back(
    monkeypatch: pytest.MonkeyPatch, priority: list[tuple[int, int]]
) -> None:
    libc = FakeLibc(0)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: libc)
    cpu = min(os.sched_getaffinity(0))

    def run() -> Any:
        before, frozen = os.sched_getaffinity(0), gc.get_freeze_count()
        settings = apply_realtime(RealtimeConfig(lock_memory=True, fifo_priority=7, cpus=(cpu,), freeze_gc=True))
        during = os.sched_getaffinity(0), gc.get_freeze_count() > frozen, libc.locked
        undo_realtime(settings)
        return settings, during, (os.sched_getaffinity(0) == before, gc.get_freeze_count())

    settings, during, after = _in_thread(run)
    assert [setting.name for setting in settings] == ["freeze_gc", "lock_memory", "cpus", "fifo_priority"]
    assert all(setting.is_granted for setting in settings)
    assert str(settings[2]) == f"✓ cpus: runs on [{cpu}]"
    assert during == ({cpu}, True, 1)
    assert after == (True, 0)
    assert libc.locked == 0
    assert priority == [(os.SCHED_FIFO, 7), (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority)]


def test_what_is_refused_is_reported_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: FakeLibc(1))

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    config = RealtimeConfig(lock_memory=True, fifo_priority=99, cpus=(100_000,))
    settings = _in_thread(lambda: apply_realtime(config))
    assert [str(setting).partition(":")[0] for setting in settings] == [
        "✗ lock_memory",
        "✗ cpus",
        "✗ fifo_priority",
    ]
    assert "Operation not permitted; raise `ulimit -l`, or grant CAP_IPC_LOCK" in settings[0].detail
    assert "choose among os.sched_getaffinity(0)" in settings[1].detail
    assert "Operation not permitted; grant CAP_SYS_NICE" in settings[2].detail


@pytest.mark.slow
def test_a_refusal_of_what_is_required_is_an_error_that_leaves_nothing_behind() -> None:
    cpu = min(os.sched_getaffinity(0))

    def run() -> bool:
        before = os.sched_getaffinity(0)
        # 0 is no priority of SCHED_FIFO, whoever asks.
        with pytest.raises(RealtimeRefusedError, match="fifo_priority: refused"):
            apply_realtime(RealtimeConfig(cpus=(cpu,), freeze_gc=True, fifo_priority=0, is_required=True))
        return os.sched_getaffinity(0) == before

    assert _in_thread(run)
    assert gc.get_freeze_count() == 0


def test_nothing_is_asked_where_nothing_is_wished() -> None:
    assert apply_realtime(RealtimeConfig(is_required=True)) == ()


# --- the watchdog -----------------------------------------------------------------------------------------------------


class Loop:
    """A loop whose last tick and whose clock are set by hand, in seconds."""

    def __init__(self) -> None:
        self.now = self.last = 0.0
        self.silences: list[float] = []
        self.watchdog = Watchdog(
            lambda: round(self.last * 1e9), 0.1, self.silences.append, clock=lambda: round(self.now * 1e9)
        )

    def look(self, now: float) -> bool:
        self.now = now
        return self.watchdog.look()


def test_the_watchdog_calls_when_ticks_stop_and_not_while_they_go_on() -> None:
    loop = Loop()
    # Nobody is called before the first tick.
    assert not loop.look(100.0)
    for tick in range(1, 50):
        loop.last = 100 + 0.05 * tick
        assert not loop.look(loop.last + 0.05)
    assert not loop.look(loop.last + 0.1)
    assert loop.look(loop.last + 0.101)
    assert loop.silences == [pytest.approx(0.101)]


def test_it_calls_once_for_each_silence() -> None:
    loop = Loop()
    loop.last = 1.0
    assert [loop.look(now) for now in (1.2, 1.3, 2.0)] == [True, False, False]
    loop.last = 3.0
    assert [loop.look(now) for now in (3.05, 3.2, 3.3)] == [False, True, False]


def test_its_thread_calls_goes_on_after_an_error_and_stops_when_told() -> None:
    called, now = threading.Event(), [2 * 10**9]
    silences: list[float] = []

    def on_silence(silence_s: float) -> None:
        silences.append(silence_s)
        if len(silences) == 1:
            # Another silence, after a tick.
            last[0] = now[0]
            now[0] += 10**9
            raise RuntimeError("injected")
        called.set()

    last = [10**9]
    watchdog = Watchdog(lambda: last[0], 0.004, on_silence, clock=lambda: now[0])
    watchdog.start()
    assert called.wait(60)
    watchdog.stop()
    assert silences == [1.0, 1.0]
    assert "control watchdog" not in [thread.name for thread in threading.enumerate()]


def test_it_can_be_stopped_by_its_callback_and_before_it_was_started() -> None:
    stopped = threading.Event()

    def on_silence(_: float) -> None:
        watchdog.stop()
        stopped.set()

    watchdog = Watchdog(lambda: 1, 0.004, on_silence, clock=lambda: 10**9)
    watchdog.start()
    assert stopped.wait(60)
    watchdog.stop()
    Watchdog(lambda: 0, 1.0, on_silence).stop()
