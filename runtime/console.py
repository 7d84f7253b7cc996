"""What the scripts share: output that any terminal can show, whatever a bundle says."""

from __future__ import annotations

import signal
import sys


def prepare_console() -> None:
    """For a script of its own: no traceback for a terminal without ✓, nor where the reader of a pipe has left.

    The process then ends as every other does, by SIGPIPE, with a status that is none of the script's own.
    """
    escape_what_cannot_be_shown()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


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
