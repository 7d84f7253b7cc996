"""Real-time settings of the system: each one is granted or refused, and either is reported; and a watchdog."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from ..bundle.errors import CannotCopyError
from .errors import RealtimeRefusedError, in_words

_LOG = logging.getLogger(__name__)
_MCL_CURRENT, _MCL_FUTURE = 1, 2
Undo = Callable[[], object]


@dataclass(frozen=True)
class RealtimeConfig:
    """The settings that `apply_realtime` asks for.

    lock_memory: no page is ever swapped out. fifo_priority: of SCHED_FIFO, 1 to 99; None leaves the scheduler. cpus:
    where the thread may run; () leaves that. freeze_gc: the garbage collector never looks again at what exists now.
    is_required: a refusal is an error.
    """

    lock_memory: bool = False
    fifo_priority: int | None = None
    cpus: tuple[int, ...] = ()
    freeze_gc: bool = False
    is_required: bool = False


@dataclass(frozen=True)
class RealtimeSetting:
    """One setting, and what became of it. undo: takes back what was granted; `undo_realtime` calls it."""

    name: str
    is_granted: bool
    detail: str
    undo: Undo | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{'✓' if self.is_granted else '✗'} {self.name}: {self.detail}"


def apply_realtime(config: RealtimeConfig) -> tuple[RealtimeSetting, ...]:
    """Apply the settings; call it in the loop's thread, after `warmup()`.

    Scheduler and cpus are those of the calling thread, memory and garbage those of the process. Raises
    RealtimeRefusedError if one is refused although `is_required`; then nothing is changed.
    """
    settings = []
    if config.freeze_gc:
        settings.append(_try("freeze_gc", "leave freeze_gc out", _freeze))
    if config.lock_memory:
        settings.append(_try("lock_memory", "raise `ulimit -l`, or grant CAP_IPC_LOCK", _lock_memory))
    if config.cpus:
        settings.append(_try("cpus", "choose among os.sched_getaffinity(0)", _set_affinity, config.cpus))
    if config.fifo_priority is not None:
        advice = "grant CAP_SYS_NICE, or rtprio in limits.conf"
        settings.append(_try("fifo_priority", advice, _set_fifo, config.fifo_priority))
    if config.is_required and (refused := [setting for setting in settings if not setting.is_granted]):
        undo_realtime(settings)
        raise RealtimeRefusedError("; ".join(f"{setting.name}: {setting.detail}" for setting in refused))
    return tuple(settings)


def undo_realtime(settings: Sequence[RealtimeSetting]) -> None:
    """Take back what was granted, in the thread that asked for it; the last first. Raises OSError."""
    for setting in reversed(settings):
        if setting.undo is not None:
            setting.undo()


def _try(name: str, advice: str, apply: Callable[..., tuple[str, Undo]], *wish: object) -> RealtimeSetting:
    try:
        detail, undo = apply(*wish)
    except (OSError, ValueError, OverflowError, AttributeError) as error:
        return RealtimeSetting(name, False, f"refused: {error}; {advice}")
    return RealtimeSetting(name, True, detail, undo)


def _freeze() -> tuple[str, Undo]:
    gc.collect()
    gc.freeze()
    return f"{gc.get_freeze_count()} objects", gc.unfreeze


def _lock_memory() -> tuple[str, Undo]:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return "present and future pages", libc.munlockall


def _set_affinity(cpus: tuple[int, ...]) -> tuple[str, Undo]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    return f"runs on {sorted(os.sched_getaffinity(0))}", lambda: os.sched_setaffinity(0, before)


def _set_fifo(priority: int) -> tuple[str, Undo]:
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    detail = f"SCHED_FIFO {os.sched_getparam(0).sched_priority}"
    return detail, lambda: os.sched_setscheduler(0, policy, parameters)


class Watchdog:
    """Calls `on_silence` from a thread of its own when ticks stop for `timeout_s`, once until they go on.

    last_tick_ns: gives `time.monotonic_ns` of the last tick, 0 before the first one, which is not waited for. It sees a
    loop that hangs in a library that lets other threads run, as ctypes and ONNX Runtime do; not a stopped process.
    """

    def __init__(
        self,
        last_tick_ns: Callable[[], int],
        timeout_s: float,
        on_silence: Callable[[float], None],
        *,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._last_tick_ns, self._timeout_s, self._on_silence = last_tick_ns, timeout_s, on_silence
        self._clock, self._reported = clock, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="control watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """May be called by `on_silence` too."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def __reduce__(self) -> NoReturn:
        raise CannotCopyError(
            "a watchdog is a thread, and cannot be copied or pickled: make one in the process of the loop"
        )

    def look(self) -> bool:
        """Look once, as the thread does four times per timeout; returns whether it has called back."""
        last = self._last_tick_ns()
        silence_s = (self._clock() - last) / 1e9
        if not last or last == self._reported or silence_s <= self._timeout_s:
            return False
        self._reported = last
        self._on_silence(silence_s)
        return True

    def _watch(self) -> None:
        while not self._stop.wait(self._timeout_s / 4):
            try:
                self.look()
            except Exception as error:  # a watchdog whose callback fails still watches
                _LOG.error("the watchdog's callback failed: %s", in_words(error))
