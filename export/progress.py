"""What a person watches during a build: for each phase ✓ or ✗, what came out, and how long it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rfsq.runtime.bundle.console import aligned


@dataclass
class Phase:
    """What a phase of a build found out, or why there was nothing to do."""

    details: list[str] = field(default_factory=list)
    sign: str = "✓"

    def note(self, *details: str) -> None:
        self.details += details

    def skip(self, reason: str) -> None:
        self.sign = "–"
        self.note(reason)

    def fail(self, reason: str) -> None:
        self.sign = "✗"
        self.note(reason)


@contextmanager
def phase(title: str) -> Iterator[Phase]:
    """Print the phase as it ends, as failed where it raises; on a terminal also as it begins."""
    current = Phase()
    is_terminal = sys.stdout.isatty()
    if is_terminal:
        print(f"… {title}", end="", flush=True)
    started = time.perf_counter()
    try:
        yield current
    except BaseException:
        current.sign = "✗"
        raise
    finally:
        seconds = time.perf_counter() - started
        first, *rest = current.details or [""]
        print(f"{chr(13) if is_terminal else ''}{current.sign} {title:<28} {seconds:6.1f} s  {first}", flush=True)
        for detail in rest:
            print(f"{'':<40} {detail}", flush=True)


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell; all but the first aligned to the right.

    >>> print(table(("gate", "measured"), [("wrong tokens", "0")]))
    gate          measured
    ----------------------
    wrong tokens         0
    """
    head, *lines = aligned([header, *rows])
    return "\n".join((head, "-" * len(head), *lines))
