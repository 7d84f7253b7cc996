"""What the system can do for a loop to be on time: each wish is granted or refused, and either is reported."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from runtime.control_errors import RealtimeRefusedError

_MCL_CURRENT, _MCL_FUTURE = 1, 2


@dataclass(frozen=True)
class RealtimeConfig:
    """lock_memory: no page is ever swapped out. fifo_priority: 1 to 99, None to leave it. cpus: () to leave them.

    freeze_gc: what exists now is never looked at by the garbage collector again. is_required: a refusal is an error.
    """

    lock_memory: bool = False
    fifo_priority: int | None = None
    cpus: tuple[int, ...] = ()
    freeze_gc: bool = False
    is_required: bool = False


@dataclass(frozen=True)
class RealtimeSetting:
    """One wish, and what became of it."""

    name: str
    is_granted: bool
    detail: str

    def __str__(self) -> str:
        return f"{'✓' if self.is_granted else '✗'} {self.name}: {self.detail}"


def apply_realtime(config: RealtimeConfig) -> tuple[RealtimeSetting, ...]:
    """Apply to the calling thread, memory and garbage to the whole process; in the loop's thread, after `warmup()`.

    Raises RealtimeRefusedError where something is refused that `is_required`.
    """
    settings = []
    if config.freeze_gc:
        gc.collect()
        gc.freeze()
        settings.append(RealtimeSetting("freeze_gc", True, f"{gc.get_freeze_count()} objects"))
    if config.lock_memory:
        settings.append(_try("lock_memory", _lock_memory, "raise `ulimit -l`, or grant CAP_IPC_LOCK"))
    if config.cpus:
        settings.append(_try("cpus", lambda: _set_affinity(config.cpus), "choose among os.sched_getaffinity(0)"))
    if config.fifo_priority is not None:
        priority = config.fifo_priority
        settings.append(
            _try("fifo_priority", lambda: _set_fifo(priority), "grant CAP_SYS_NICE, or rtprio in limits.conf")
        )
    if config.is_required and (refused := [setting for setting in settings if not setting.is_granted]):
        raise RealtimeRefusedError("; ".join(f"{setting.name}: {setting.detail}" for setting in refused))
    return tuple(settings)


def _try(name: str, apply: Callable[[], str], advice: str) -> RealtimeSetting:
    try:
        return RealtimeSetting(name, True, apply())
    except (OSError, ValueError, OverflowError, AttributeError) as error:
        return RealtimeSetting(name, False, f"refused: {error}; {advice}")


def _lock_memory() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return "present and future pages"


def _set_affinity(cpus: tuple[int, ...]) -> str:
    os.sched_setaffinity(0, cpus)
    return f"runs on {sorted(os.sched_getaffinity(0))}"


def _set_fifo(priority: int) -> str:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    return f"SCHED_FIFO {os.sched_getparam(0).sched_priority}"


class Watchdog:
    """Calls back from a thread of its own when ticks stop for `timeout_s`; again only after they have gone on.

    last_tick_ns: of `time.monotonic_ns`; 0 while there was none, for which nobody is called. It sees a loop that hangs
    in a library which lets other threads run, as ctypes and ONNX Runtime do; not a stopped process.
    """

    def __init__(self, last_tick_ns: Callable[[], int], timeout_s: float, on_silence: Callable[[float], None]) -> None:
        self._last_tick_ns, self._timeout_s, self._on_silence = last_tick_ns, timeout_s, on_silence
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="control watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        reported = 0
        while not self._stop.wait(self._timeout_s / 4):
            last = self._last_tick_ns()
            silence = (time.monotonic_ns() - last) / 1e9
            if last and last != reported and silence > self._timeout_s:
                reported = last
                self._on_silence(silence)
