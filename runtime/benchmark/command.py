"""Measure every backend that works here: latency, jitter, throughput, cold start and memory. Judges nothing.

It says first what it is about to do and how long that takes; --quick is for a first look.
The exit status is 0, or 2 where nothing could be measured: no bundle, an altered one, or no backend for it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..backends.registry import PREFERENCE
from ..bundle.console import ProgressLine, path_argument, printable
from ..bundle.errors import TokenizerError
from ..bundle.paths import refuse_existing
from .report import report_files, report_text, write_report
from .run import QUICK_ROUNDS, QUICK_STARTS, Config, Progress, bench


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_arguments(arguments)
    config = Config(
        bundle=options.bundle,
        backends=tuple(dict.fromkeys(options.backends)),
        batches=tuple(dict.fromkeys(options.batch)),
        rounds=options.rounds or (QUICK_ROUNDS if options.quick else Config.rounds),
        starts=options.starts if options.starts is not None else (QUICK_STARTS if options.quick else Config.starts),
        has_peers=options.peers,
    )
    try:
        if options.output is not None:
            # Before minutes are spent on figures that nobody could keep.
            refuse_existing(report_files(options.output), overwrite=options.overwrite)
            options.output.mkdir(parents=True, exist_ok=True)
        report = bench(config, Progress(ProgressLine()))
        print(report_text(report), end="")
        if options.output is not None:
            print("\n".join(printable(line) for line in write_report(report, options.output)))
    except TokenizerError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write to {options.output}: {error.strerror}; choose another folder", file=sys.stderr)
        return 2
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    defaults = Config(Path())
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=path_argument, help="folder written by `python export/build_engine.py`")
    parser.add_argument(
        "--backends", nargs="+", choices=PREFERENCE, default=list(PREFERENCE), help="default: every one that works here"
    )
    parser.add_argument(
        "--batch", nargs="+", type=_positive, default=list(defaults.batches), help="chunks a call, default: 1 4096"
    )
    parser.add_argument(
        "--rounds", type=_positive, help=f"of up to 100 calls of each figure, default: {defaults.rounds}"
    )
    parser.add_argument(
        "--starts", type=_natural, help=f"processes for the cold start, 0 for none, default: {defaults.starts}"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a first look: {QUICK_ROUNDS} rounds and {QUICK_STARTS} start, where these are not given",
    )
    parser.add_argument("--peers", action="store_true", help="torch eager and compiled as well; needs torch")
    parser.add_argument("--output", type=path_argument, help="folder for bench.json, bench.txt and bench.png")
    parser.add_argument("--overwrite", action="store_true", help="replace figures that are there")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; expected at least 1")
    return number


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative; expected 0 or more")
    return number
