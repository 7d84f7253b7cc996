"""What the scripts share: output that any terminal can show, whatever a bundle says, and how far they are."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

from .errors import RfsqError


def prepare_console() -> None:
    """For a script of its own: no traceback for a terminal without ✓, nor where the reader of a pipe has left.

    The process then ends as every other does, by SIGPIPE, with a status that is none of the script's own. What stderr
    does not take is dropped, and changes no status.
    """
    # A stream that was closed before the start is None, and the next file that is opened would get its number.
    if sys.stdout is None:
        # Only for reading: every use is refused, as that of a full one.
        sys.stdout = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115  # until the process ends
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    if not isinstance(sys.stderr, _Dropping):
        sys.stderr = cast(TextIO, _Dropping(sys.stderr))
    escape_what_cannot_be_shown()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def end_by_interrupts() -> None:
    """For a worker process: Ctrl-C reaches it too, and ends it without a traceback of its own."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def escape_what_cannot_be_shown() -> None:
    """A terminal without ✓ gets an escape; not `?`, which would show ✓ and ✗ alike."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """`text` with everything escaped that a terminal would obey instead of showing, but for line ends."""
    return "".join(
        character if character.isprintable() or character == "\n" else ascii(character)[1:-1] for character in text
    )


class StdoutError(RfsqError):
    """Standard output takes no more. No OSError, which would be blamed on the file that is just written."""


class _Checked:
    """A stream whose refusals are StdoutError; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return int(self._do(self._stream.write, text))

    def flush(self) -> None:
        self._do(self._stream.flush)

    def _do(self, act: Callable[..., Any], *given: str) -> Any:
        try:
            return act(*given)
        except OSError as error:
            raise StdoutError(
                f"standard output cannot be written: {error.strerror or error}; make room where it goes, or send it "
                "elsewhere"
            ) from error


class _Dropping(_Checked):
    """A stream that drops what it cannot write."""

    def _do(self, act: Callable[..., Any], *given: str) -> Any:
        with suppress(OSError):
            act(*given)
        return len("".join(given))


def checked(stdout: TextIO) -> Any:
    """The same stream, which raises StdoutError where it cannot be written."""
    return _Checked(stdout)


def discard_stdout() -> None:
    """What standard output has not taken is dropped: Python would try once more as it ends, and change the status."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        sys.stdout.flush()


class ProgressLine:
    """How far a command is, on stderr: one line that is renewed on a terminal, one every ten seconds in a log."""

    _TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 10.0

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, is_silent: bool = False) -> None:
        self._clock, self._is_silent = clock, is_silent
        self._is_terminal = sys.stderr.isatty()
        self._seconds = self._TERMINAL_SECONDS if self._is_terminal else self._LOG_SECONDS
        self._shown: float | None = None

    def show(self, text: str) -> None:
        """Print `text` where the last line is old enough."""
        now = self._clock()
        if self._shown is None:
            # A terminal is told at once; a log has been told what begins.
            self._shown = now - (self._seconds if self._is_terminal else 0)
        if self._is_silent or now - self._shown < self._seconds:
            return
        self._shown = now
        begin, end = ("\r\x1b[K", "") if self._is_terminal else ("", "\n")
        print(f"{begin}{printable(text)}", end=end, file=sys.stderr, flush=True)

    def begin(self, what: str) -> None:
        """Say what is about to be done: once, in a log too."""
        if not self._is_silent:
            self.clear()
            print(printable(what), file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for other lines."""
        if self._is_terminal and not self._is_silent:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1, is_ruled: bool = False) -> Iterator[str]:
    """Lines of a table: columns as wide as their widest cell, the first `left` aligned to the left, the others right.

    is_ruled: the first row is a head, with a line of dashes below it.

    >>> for line in aligned([("gate", "measured"), ("wrong tokens", "0")], is_ruled=True):
    ...     print(line)
    gate          measured
    ----------------------
    wrong tokens         0
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        cells = zip(row, widths, strict=True)
        shown = [cell.rjust(width) if at >= left else cell.ljust(width) for at, (cell, width) in enumerate(cells)]
        yield "  ".join(shown).rstrip()
        if is_ruled and not number:
            yield "-" * (sum(widths) + 2 * (len(widths) - 1))


def duration(seconds: float) -> str:
    """Such as `59 s`, `1 min 00 s` and `2 h 02 min`."""
    if seconds < 1:
        return "less than 1 s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
