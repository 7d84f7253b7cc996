"""The command that measures a bundle on this machine: latency, jitter, throughput, cold start and memory.

It judges nothing. It says first what it is about to do and how long that takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle.backend_specs import BACKENDS
from ..bundle.command import CommandParser, Outcome, natural, positive, run
from ..bundle.console import printable
from ..bundle.paths import counted, refuse_existing

if TYPE_CHECKING:
    from .report import Report
    from .timing import Row


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("bench")
    parser.add_bundle()
    parser.add_backends("every one that works here")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 4096], help="chunks a call; default: 1 4096")
    parser.add_argument("--rounds", type=positive, help="of up to 100 calls of each figure; default: 100")
    parser.add_argument("--starts", type=natural, help="processes for the cold start, 0 for none; default: 5")
    parser.add_argument(
        "--quick", action="store_true", help="a first look: 10 rounds and 1 start, where these are not given"
    )
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="OTHER",
        help="another bundle, for the same chunks, measured in turn with this one",
    )
    parser.add_argument("--peers", action="store_true", help="torch eager and compiled as well; needs torch")
    parser.add_output("folder for bench.json, bench.txt and bench.png")
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    from .report import report_files, report_json, report_text, write_report
    from .run import QUICK_ROUNDS, QUICK_STARTS, Config, Progress, bench

    config = Config(
        bundle=options.bundle,
        backends=tuple(dict.fromkeys(options.backends or BACKENDS)),
        batches=tuple(dict.fromkeys(options.batch)),
        rounds=options.rounds or (QUICK_ROUNDS if options.quick else Config.rounds),
        starts=options.starts if options.starts is not None else (QUICK_STARTS if options.quick else Config.starts),
        has_peers=options.peers,
        beside=options.beside,
    )
    if options.output is not None:
        # Before minutes are spent on figures that nobody could keep.
        refuse_existing(report_files(options.output), overwrite=options.overwrite)
    report = bench(config, Progress())
    print(report_text(report, is_summary=not options.verbose), end="")
    said = write_report(report, options.output) if options.output is not None else []
    print("".join(f"{printable(line)}\n" for line in said), end="")
    return Outcome("\n".join(_verdict(report)), json.loads(report_json(report)))


def _verdict(report: Report) -> Iterator[str]:
    """A line for each backend: its medians for the fewest chunks a call."""
    batch = min((row.batch for row in report.rows), default=1)
    for backend in report.backends:
        figures = ", ".join(
            f"{row.operation} {row.p50:.3g} µs{_beside(row)}"
            for row in report.rows
            if (row.backend, row.path, row.batch) == (backend, "host", batch) and row.operation in ("encode", "decode")
        )
        yield f"✓ measured {backend}: {figures or 'no figure'} (median, {counted(batch, 'chunk')} a call)"


def _beside(row: Row) -> str:
    return "" if row.times_beside is None else f", {row.times_beside:.3g} times that of the bundle beside"
