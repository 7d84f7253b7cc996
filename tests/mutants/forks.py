"""Tasks in forks of this process, a few at a time: each begins with all that is imported here already."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: Given the number of its place, below the number of jobs; returns an exit status.
Task = Callable[[int], int]


@dataclass(frozen=True)
class Ended:
    """index: of the task; status: its exit status, below 0 for a signal; output: what it printed, until the next."""

    index: int
    status: int
    output: Path


def forked(tasks: Sequence[Task], jobs: int, work: Path) -> Iterator[Ended]:
    """As they end. What a task started and left behind is killed."""
    running: dict[int, tuple[int, int]] = {}
    waiting, places = iter(enumerate(tasks)), list(range(jobs))
    try:
        while True:
            while places and (following := next(waiting, None)) is not None:
                place = places.pop()
                running[_fork(following[1], place, _output(work, place))] = (following[0], place)
            if not running:
                return
            process, status = os.wait()
            _kill(process)
            index, place = running.pop(process)
            places.append(place)
            yield Ended(index, os.waitstatus_to_exitcode(status), _output(work, place))
    finally:
        for process in running:
            _kill(process)


def _output(work: Path, place: int) -> Path:
    return work / f"output-{place}.txt"


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _fork(task: Task, place: int, output: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 3
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = task(place)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        # Nothing of the process that was forked is to be ended or flushed a second time.
        os._exit(status)
