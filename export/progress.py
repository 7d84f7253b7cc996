"""The step list a person watches during a build: ✓ or ✗, what was done, what came out, how long it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Step:
    """What a step found out, or why there was nothing to do."""

    details: list[str] = field(default_factory=list)
    skipped: bool = False
    failed: bool = False

    def note(self, detail: str) -> None:
        self.details.append(detail)

    def skip(self, reason: str) -> None:
        self.skipped = True
        self.note(reason)

    def fail(self, reason: str) -> None:
        self.failed = True
        self.note(reason)


class StepList:
    """Prints every step as it ends; on a terminal also as it begins."""

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        step = Step()
        is_terminal = sys.stdout.isatty()
        if is_terminal:
            print(f"… {title}", end="", flush=True)
        started = time.perf_counter()
        sign = "✗"
        try:
            yield step
            sign = "✗" if step.failed else "–" if step.skipped else "✓"
        finally:
            seconds = time.perf_counter() - started
            first, *rest = step.details or [""]
            print(f"{chr(13) if is_terminal else ''}{sign} {title:<28} {seconds:6.1f} s  {first}", flush=True)
            for detail in rest:
                print(f"{'':<40} {detail}", flush=True)


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell; all but the first aligned to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, *rows):
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join((first, *others)).rstrip())
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
