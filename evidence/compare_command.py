"""The command that compares naive and robust tokens, and peers at equal bits, on held-out episodes.

Users start it as `rfsq_ref/compare.py`; `report.py` does the work.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rfsq.calibration.settings import ReadoutChoice
from rfsq.evidence.settings import CACHE, OSC_POSITION_M, OSC_ROTATION_RAD, SEEDS
from rfsq.rfsq_ref.settings import NORMALISER_CHOICES
from rfsq.runtime.bundle.command import DONE, WANTING, CommandParser, Outcome, path_argument, refuse_idle_choices, run


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("compare", wanting="calibrated tokens do not have 30 % less error than naive ones")
    parser.add_data()
    parser.add_output("folder of the report", Path("build/evidence"))
    parser.add_argument(
        "--report-only", action="store_true", help="draw page and figures anew from the results in the --output folder"
    )
    given = parser.add_argument_group("checkpoints", "what is not given is trained, one for each seed")
    given.add_argument("--naive", type=path_argument, nargs="+", default=[], metavar="F")
    given.add_argument("--robust", type=path_argument, nargs="+", default=[], metavar="F")
    given.add_argument(
        "--weights", metavar="NAME",
        help="which model of checkpoints that hold several, such as ema; default: the model, no average",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="S", help="default: 0 1 2")
    parser.add_argument("--epochs", type=int, default=100, metavar="N", help="of every training; default: %(default)s")
    parser.add_argument(
        "--normaliser", choices=NORMALISER_CHOICES, default="auto",
        help="of every training; auto (default): min-max for actions that are not of about unit size",
    )  # fmt: skip
    parser.add_argument(
        "--readout", type=ReadoutChoice, choices=list(ReadoutChoice), default=ReadoutChoice.AUTO,
        help="refit the decoder's last layer for calibrated tokens; default: auto, where it wins on calibration "
        "episodes left out of the fit",
    )  # fmt: skip
    parser.add_argument("--chunk-length", type=int, default=8, metavar="T", help="default: %(default)s")
    parser.add_argument(
        "--osc-pose", action=argparse.BooleanOptionalAction,
        help="report mm and degrees as of the OSC_POSE controller; default: for the embedded demonstrations",
    )  # fmt: skip
    for name, default, unit in (("position", OSC_POSITION_M, "m"), ("rotation", OSC_ROTATION_RAD, "rad")):
        parser.add_argument(
            f"--{name}-unit", type=float, default=default, metavar="X", help=f"{unit}; default: %(default)s"
        )
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="other tokenizers too; default: yes"
    )
    parser.add_argument(
        "--calibration-study", action=argparse.BooleanOptionalAction, default=True,
        help="measure the choices of calibration too; default: yes",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes; default: one for each core"
    )
    parser.add_argument(
        "--cache", type=path_argument, default=CACHE, metavar="DIR", help="trained models; default: %(default)s"
    )
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    refuse_idle_choices(options)
    from rfsq.evidence.findings import REQUIRED_IMPROVEMENT
    from rfsq.evidence.report import report

    comparison = report(options)
    is_better = comparison.improvement > REQUIRED_IMPROVEMENT
    verdict = (
        f"{'✓' if is_better else '✗'} calibrated tokens have {comparison.improvement:.1%} less error than naive ones; "
        f"more than {REQUIRED_IMPROVEMENT:.0%} is asked for; wrote the report into {options.output}"
    )
    return Outcome(verdict, asdict(comparison), DONE if is_better else WANTING)
