"""A policy in a process of its own, which can be stopped or killed while it writes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import sys
import time

from .rig import Chunk

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
    """A process that writes messages of odd length into a pipe of one page, so that it waits in the middle of one."""

    def __init__(self, chunks: list[Chunk]) -> None:
        self.chunks, self._received = chunks, b""
        messages = [
            _HEADER.pack(number) + chunks[number % len(chunks)].tokens.tobytes() + b"." for number in range(_MESSAGES)
        ]
        self._length = len(messages[0])
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PRODUCER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._descriptor = self._process.stdout.fileno()
        os.set_blocking(self._descriptor, False)
        # Linux's F_SETPIPE_SZ; elsewhere pipes keep their size.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._descriptor, getattr(fcntl, "F_SETPIPE_SZ", 1031), _PAGE)
        self._process.stdin.write(b"".join(messages))
        self._process.stdin.close()

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

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> int:
        """Kill it by SIGKILL; returns the exit status."""
        # After so long its next write has found no room, and waits.
        time.sleep(0.005)
        self._process.kill()
        return self._process.wait()

    def end(self) -> int:
        """Close the pipe; returns how many bytes of a message have come without the rest."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        return len(self._received)
