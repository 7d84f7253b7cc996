#!/usr/bin/env python3
"""Measure what action tokens cost on a moving robot: scripted experts in robosuite, every codec in the loop.

Runs in an environment with the simulator (`pip install '.[sim]'`), for hours; it goes on where it was stopped. Every
cell of the table drives the same scenes with the same noise. `--report-only` writes the report of the episodes that
are there, in any environment. Results are the same with any number of workers; another kind of processor rounds
differently, and single episodes may end differently there.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.console import explain_missing_packages

    explain_missing_packages()

import argparse
from collections.abc import Sequence

from rfsq.evidence.rollout_files import report_files, write_report
from rfsq.evidence.rollouts import RolloutConfig, run_rollouts
from rfsq.evidence.simulation import TASKS
from rfsq.rfsq_ref.errors import OutputError, UnusableError
from rfsq.runtime.bundle.console import path_argument
from rfsq.runtime.bundle.paths import refuse_existing


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = RolloutConfig()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(defaults.tasks), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--cells", nargs="+", default=[], metavar="CELL", help='such as "raw"; default: all of them')
    parser.add_argument("--peers", action="store_true", help="the methods of others too, trained where needed")
    parser.add_argument("--episodes", type=int, default=defaults.episodes, metavar="N", help="per task and cell")
    parser.add_argument("--seed", type=int, default=defaults.seed, metavar="S")
    parser.add_argument(
        "--chunk", type=int, default=defaults.chunk, metavar="N", help="actions executed between two looks"
    )
    parser.add_argument("--workers", type=int, default=defaults.workers, metavar="W")
    parser.add_argument(
        "--output", type=path_argument, default=defaults.output, metavar="DIR", help="where episodes are kept"
    )
    parser.add_argument(
        "--results", type=path_argument, default=Path("docs/results"), metavar="DIR", help="for the report"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the report that is there; episodes stay")
    parser.add_argument("--restart-changed", action="store_true", help="drive cells whose codec has changed anew")
    parser.add_argument("--report-only", action="store_true", help="report the episodes that are there")
    return parser.parse_args(arguments)


def config_of(options: argparse.Namespace) -> RolloutConfig:
    """Raises EvidenceError for settings that make no sense."""
    return RolloutConfig(
        tasks=tuple(options.tasks),
        cells=tuple(options.cells),
        episodes=options.episodes,
        seed=options.seed,
        chunk=options.chunk,
        workers=options.workers,
        peers=options.peers,
        restart_changed=options.restart_changed,
        output=options.output,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done and reported; 2: it cannot be run as asked, and the message says what to do."""
    options = parse_arguments(arguments)
    try:
        config = config_of(options)
        # Not after hours of driving.
        refuse_existing(report_files(options.results), overwrite=options.overwrite, error=OutputError)
        if not options.report_only:
            run_rollouts(config)
        print(write_report(config.file, options.results))
    except UnusableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
