"""The command that drives simulated robots through tokens: scripted experts in robosuite, every codec in the loop.

Users start it as `rfsq_ref/rollout.py`. It runs in an environment with the simulator, for hours, and goes on where it
was stopped. Every cell of the table drives the same scenes with the same noise. `--report-only` writes the report of
the episodes that are there, in any environment. Results are the same with any number of workers. Another kind of
processor rounds differently, and single episodes may end differently there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rfsq.evidence.settings import TASK_NAMES, RolloutConfig
from rfsq.runtime.bundle.advice import install
from rfsq.runtime.bundle.command import CommandParser, Outcome, path_argument, run
from rfsq.runtime.bundle.paths import refuse_existing


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parser(), _work, arguments)


def parser() -> CommandParser:
    """All arguments of the command; what has the name of a setting is one."""
    parser = CommandParser("rollout", interrupted="run the same command again to go on")
    parser.description = f"{parser.description}; driving needs the simulator: {install('sim')}"
    parser.add_output("folder of the report", Path("build/rollout"))
    parser.add_argument(
        "--episodes-dir", type=path_argument, default=RolloutConfig.folder, metavar="DIR",
        help="where episodes are kept, which --overwrite leaves as they are; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--report-only", action="store_true", help="report the episodes that are there")
    parser.add_argument(
        "--tasks", nargs="+", default=RolloutConfig.tasks, metavar="TASK",
        help=f"of {', '.join(TASK_NAMES)}; default: {' '.join(RolloutConfig.tasks)}",
    )  # fmt: skip
    parser.add_argument("--cells", nargs="+", default=(), metavar="CELL", help='such as "raw"; default: all of them')
    parser.add_argument("--peers", action="store_true", help="the methods of others too, trained where needed")
    parser.add_argument("--restart-changed", action="store_true", help="drive cells whose codec has changed anew")
    parser.add_settings(
        RolloutConfig,
        {
            "episodes": "per task and cell",
            "seed": "of scenes and experts",
            "chunk": "actions executed between two looks",
            "workers": "processes",
        },
    )
    parser.refuse_former("--results", "the report goes to --output now, and episodes are kept in --episodes-dir")
    return parser


def config_of(options: argparse.Namespace) -> RolloutConfig:
    """Raises EvidenceError for settings that make no sense."""
    names = RolloutConfig.__dataclass_fields__.keys() - {"tasks", "cells", "folder"}
    given = {name: getattr(options, name) for name in names}
    return RolloutConfig(tuple(options.tasks), tuple(options.cells), folder=options.episodes_dir, **given)


def _work(options: argparse.Namespace) -> Outcome:
    config = config_of(options)

    from rfsq.evidence.rollout_report import report_files, write_report

    # Refused now, not after hours of driving.
    files = report_files(options.output)
    refuse_existing(files, overwrite=options.overwrite)
    if not options.report_only:
        from rfsq.evidence.rollouts import run_rollouts

        run_rollouts(config)
    text, document = write_report(config.file, options.output, is_verbose=options.verbose)
    print(text)
    return Outcome(f"✓ wrote {', '.join(map(str, filter(Path.exists, files)))}", document)
