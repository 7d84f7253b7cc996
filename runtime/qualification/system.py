"""Faults that need a real process, disk or file, on POSIX, while a decoder serves.

The bundle itself is not changed: files are damaged in a copy of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..bundle.errors import TokenizerError
from ..control.config import Status
from ..control.recorder import read_record
from ..tokenizer import ActionTokenizer
from .fault_report import FaultReport
from .injection import Fault
from .rig import Answer, Chunk, Rig, Setup

_PAGE = 4096
_HEADER = struct.Struct("<q")
#: Sends the messages that it is given, again and again, as fast as somebody reads.
_PRODUCER = """
import os, sys
messages = memoryview(sys.stdin.buffer.read())
while True:
    sent = 0
    while sent < len(messages):
        sent += os.write(1, messages[sent:])
"""
_MESSAGES = 64


class Producer:
    """A process that writes messages of odd length, of more than a page, into a pipe of one page: it waits within one.

    process: for signals.
    """

    def __init__(self, chunks: list[Chunk]) -> None:
        self.chunks, self._received = chunks, b""
        messages = [
            _HEADER.pack(number) + chunks[number % len(chunks)].tokens.tobytes().ljust(_PAGE, b".") + b"."
            for number in range(_MESSAGES)
        ]
        self._length = len(messages[0])
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PRODUCER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._descriptor = self.process.stdout.fileno()
        os.set_blocking(self._descriptor, False)
        # Linux's F_SETPIPE_SZ; elsewhere pipes keep their size.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._descriptor, getattr(fcntl, "F_SETPIPE_SZ", 1031), _PAGE)
        self.process.stdin.write(b"".join(messages))
        self.process.stdin.close()

    def poll(self) -> tuple[int, Chunk] | None:
        """The next message, its number and chunk, if all of it is here; never waits."""
        while len(self._received) < self._length:
            try:
                read = os.read(self._descriptor, self._length - len(self._received))
            except BlockingIOError:
                return None
            if not read:
                return None
            self._received += read
        message, self._received = self._received, b""
        (number,) = _HEADER.unpack_from(message)
        return number, self.chunks[number % len(self.chunks)]

    def kill(self) -> int:
        """Kill it by SIGKILL; returns the exit status."""
        # After so long its next write has found no room, and waits.
        time.sleep(0.005)
        self.process.kill()
        return self.process.wait()

    def end(self) -> int:
        """Close the pipe; returns how many bytes of a message have come without the rest."""
        assert self.process.stdout is not None
        self.process.stdout.close()
        return len(self._received)


_DISK_BYTES = 2**18


class _Trial:
    """Tries faults, and reports what was wrong with each. times: how often each is tried."""

    def __init__(self, times: int, rng: random.Random) -> None:
        self.times, self.rng = times, rng
        self.report = FaultReport()

    @contextlib.contextmanager
    def fault(self, group: str, what: str, rig: Rig) -> Iterator[None]:
        """A fault within: what happens to a thing of this group."""
        self._problems: list[str] = []
        try:
            yield
        finally:
            found = self._problems + rig.check.problems
            rig.check.problems.clear()
            self.report.add(group, f"{group} {what}", "wrong" if found else "right", found)

    def expect(self, what: str, found: object, expected: object, detail: str = "") -> None:
        if found != expected:
            self._problems.append(f"{what} is {found}; expected {expected}{detail and ': ' + detail}")

    def expect_answer(self, what: str, answer: Answer, status: Status = Status.OK) -> None:
        """`status`, and standing still where it is not OK."""
        is_held = status is not Status.OK
        self.expect(what, (answer.status, answer.is_held), (status, is_held), answer.detail)


def run_system_faults(path: Path, times: int, *, backend: str = "auto", seed: int = 0) -> FaultReport:
    """Try every kind `times` times. Raises TokenizerError if the bundle at `path` cannot be opened."""
    begin, trial = time.monotonic(), _Trial(times, random.Random(seed))
    with tempfile.TemporaryDirectory() as folder:
        with ActionTokenizer.load(path, backend=backend) as tokenizer:
            _stop_producers(trial, tokenizer)
            disk = _fill_disks(trial, tokenizer, Path(folder) / "disk")
            _lose_folders(trial, tokenizer, Path(folder) / "flights")
        for name in ("c", "onnxruntime"):
            _damage_bundles(trial, path, Path(folder) / name, name)
    report = trial.report
    report.where = f"with real processes, files and disks ({disk})"
    report.seconds, report.facts = time.monotonic() - begin, {"disk": disk}
    return report


# --- the producer -----------------------------------------------------------------------------------------------------


def _stop_producers(trial: _Trial, tokenizer: ActionTokenizer) -> None:
    with contextlib.closing(Rig(tokenizer, Setup(), trial.rng)) as rig:

        def serve(found: tuple[int, Chunk] | None) -> None:
            trial.expect("a message", found is not None, True)
            if found is not None:
                trial.expect_answer("a chunk", rig.send(found[1], sequence=found[0]))

        for _ in range(trial.times):
            producer = Producer(rig.chunks)
            with trial.fault("producer", "stopped in the middle of a message (SIGSTOP)", rig):
                # The numbers begin again, as those of a policy that was restarted.
                for _ in range(trial.rng.randint(1, 3)):
                    serve(rig.wait_for(producer.poll))
                producer.process.send_signal(signal.SIGSTOP)
                _run_out(trial, rig, producer, serve)
                producer.process.send_signal(signal.SIGCONT)
                serve(rig.wait_for(producer.poll))
            with trial.fault("producer", "killed in the middle of a message (SIGKILL)", rig):
                trial.expect("its exit status", producer.kill(), -signal.SIGKILL)
                _run_out(trial, rig, producer, serve)
                trial.expect("that a part of a message was left", producer.end() > 0, True)


def _run_out(trial: _Trial, rig: Rig, producer: Producer, serve: Callable[[tuple[int, Chunk] | None], None]) -> None:
    """Serve the messages that have come whole, and then what is queued, to its end."""
    while (found := producer.poll()) is not None:
        serve(found)
    for _ in range(rig.length - 1):
        trial.expect_answer("a tick after it", rig.tick())
    trial.expect_answer("the tick after the last action", rig.tick(), Status.STALE)


# --- the recorder's disk ----------------------------------------------------------------------------------------------


def _fill_disks(trial: _Trial, tokenizer: ActionTokenizer, place: Path) -> str:
    place.mkdir()
    with _small_disk(place) as (disk, fill, free):
        for _ in range(trial.times):
            rig = Rig(tokenizer, Setup(record_folder=str(place / "flights")), trial.rng)
            with contextlib.closing(rig), trial.fault("flight recorder", "whose disk is full", rig):
                (place / "flights").mkdir(exist_ok=True)
                fill()
                _record(trial, rig, failed=1, written=0)
                free()
                trial.expect("what it left", list((place / "flights").iterdir()), [])
                _record(trial, rig, failed=1, written=1)
            shutil.rmtree(place / "flights")
    return disk


@contextlib.contextmanager
def _small_disk(place: Path) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """A small file system if one can be mounted, else a limit on the size of files; how to fill it and free it."""
    filler = place / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(_PAGE))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(place)]
    is_mounted = False
    with contextlib.suppress(OSError):
        is_mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if is_mounted:
        try:
            yield f"a tmpfs of {_DISK_BYTES // 1024} KiB, filled", fill, filler.unlink
        finally:
            subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield (
            "RLIMIT_FSIZE of 64 bytes, for no tmpfs can be mounted",
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1])),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _lose_folders(trial: _Trial, tokenizer: ActionTokenizer, folder: Path) -> None:
    for _ in range(trial.times):
        with contextlib.closing(Rig(tokenizer, Setup(record_folder=str(folder)), trial.rng)) as rig:
            with trial.fault("flight recorder", "whose folder was removed", rig):
                _record(trial, rig, failed=0, written=1)
                shutil.rmtree(folder, ignore_errors=True)
                _record(trial, rig, failed=0, written=2)
                trial.expect("how many records are there", len(list(folder.glob("*"))), 1)
            with trial.fault("flight recorder", "whose folder became a file", rig):
                shutil.rmtree(folder, ignore_errors=True)
                folder.write_bytes(b"")
                _record(trial, rig, failed=1, written=2)
                folder.unlink()
                _record(trial, rig, failed=1, written=3)
        shutil.rmtree(folder, ignore_errors=True)


def _record(trial: _Trial, rig: Rig, *, failed: int, written: int) -> None:
    """A fault in the middle of service that is recorded; expects so many records failed and written afterwards."""
    # Only the first of two records within record_interval_s is written.
    time.sleep(2 * rig.config.record_interval_s)
    trial.expect_answer("a chunk before it", rig.send(rig.pick()))
    chunk = rig.pick()
    trial.expect_answer("its tick", rig.send(chunk, tokens=chunk.tokens - rig.model.vocabulary), Status.BAD_TOKEN)
    # The loop does not wait for the disk.
    trial.expect_answer("the tick after it", rig.send(rig.pick()))
    trial.expect("that all is reported", rig.decoder.flush(), True)
    found = rig.decoder.snapshot()
    trial.expect("records failed and written", (found.records_failed, found.records_written), (failed, written))
    for file in Path(rig.config.record_folder or "").glob("*.npz"):
        read_record(file)


# --- the bundle's files -----------------------------------------------------------------------------------------------


def _overwrite(file: Path) -> None:
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.write(b"\xcc" * size)


def _replace(file: Path) -> None:
    other = file.with_name("another")
    other.write_bytes(b"another file")
    other.replace(file)


#: What is done to each file. In place: a process that has mapped it dies of SIGBUS, or runs what is written now.
_DAMAGES: tuple[tuple[str, Callable[[Path], object]], ...] = (
    ("removed", Path.unlink),
    ("truncated in place", lambda file: os.truncate(file, file.stat().st_size // 2)),
    ("emptied in place", lambda file: os.truncate(file, 0)),
    ("overwritten in place", _overwrite),
    ("replaced", _replace),
    ("removed with their folder", lambda file: shutil.rmtree(file.parent, ignore_errors=True)),
)


def _damage_bundles(trial: _Trial, source: Path, folder: Path, backend: str) -> None:
    """Damage all files at once, the running library too; the decoder and its fallback go on."""
    shutil.copytree(source, folder)
    try:
        tokenizer = ActionTokenizer.load(folder, backend=backend)
        fallback = ActionTokenizer.load(folder, backend="onnxruntime")
    except TokenizerError:
        # The backend is not for this machine, or not in this bundle.
        return
    setup = Setup(has_fallback=True)
    with tokenizer, fallback, contextlib.closing(Rig(tokenizer, setup, trial.rng, fallback=fallback)) as rig:
        chunk = rig.pick()
        before = tokenizer.decode(chunk.tokens, chunk.stats)
        for name, damage in _DAMAGES * trial.times:
            with trial.fault(f"files of {backend}'s bundle", name, rig):
                trial.expect_answer("a chunk before it", rig.send(rig.pick()))
                for file in [path for path in folder.rglob("*") if path.is_file()]:
                    damage(file)
                for _ in range(3):
                    trial.expect_answer("a chunk", rig.send(rig.pick()))
                after = tokenizer.decode(chunk.tokens, chunk.stats)
                trial.expect("that its answers are the same bits", after.tobytes() == before.tobytes(), True)
                _fail_over(trial, rig)
                trial.expect("what is mapped of it", _mapped(folder), [])
                trial.expect("that it is opened again", _opens(folder, backend), False)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(source, folder)


def _fail_over(trial: _Trial, rig: Rig) -> None:
    recoveries = rig.decoder.health.recoveries
    rig.backend.fault = Fault.RAISES
    answer = rig.send(rig.pick())
    rig.clear()
    trial.expect("a fallback", (answer.status, answer.fell_back), (Status.OK, True), answer.detail)
    is_back = rig.wait_for(lambda: rig.decoder.health.recoveries > recoveries)
    trial.expect("that the first one comes back", is_back, True)


def _mapped(folder: Path) -> list[str]:
    """Files below `folder` that this process has mapped, where the system tells."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return sorted({line.split(maxsplit=5)[5] for line in maps.splitlines() if str(folder.resolve()) in line})


def _opens(folder: Path, backend: str) -> bool:
    with contextlib.suppress(TokenizerError):
        ActionTokenizer.load(folder, backend=backend).close()
        return True
    return False
