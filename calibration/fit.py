#!/usr/bin/env python3
"""The command that fits a checkpoint to demonstrations, and reports what the fit is worth.

The result is a new checkpoint file; the weights stay as they are. `fitting.py` does the work.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    from rfsq.runtime.bundle.start import run_script

    run_script("rfsq.calibration.fit")

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.settings import (
    DEFAULT_READOUT,
    CalibrationConfig,
    Granularity,
    Method,
    Objective,
    ReadoutChoice,
    ReadoutConfig,
    RecoveredConfig,
    Target,
    Weighting,
)
from rfsq.runtime.bundle.advice import install_package
from rfsq.runtime.bundle.command import DATA_FORMATS, CommandParser, Outcome, path_argument, refuse_idle_choices, run
from rfsq.runtime.bundle.paths import counted, refuse_existing

if TYPE_CHECKING:
    from rfsq.rfsq_ref.checkpoints import Checkpoint
    from rfsq.rfsq_ref.data import ActionDataset


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser("calibrate")
    parser.add_checkpoint()
    parser.add_data(
        "--calibration-data",
        text=f"recorded actions: .pt, {DATA_FORMATS}; of the checkpoint's training data only the "
        "calibration episodes are used",
    )
    parser.add_output("checkpoint; default: build/checkpoints/NAME-METHOD.safetensors")
    parser.add_argument("--report-dir", type=path_argument, metavar="DIR", help="default: build/reports/NAME-METHOD")
    parser.add_argument(
        "--method", type=Method, choices=list(Method), default=Method.CALIBRATED,
        help="calibrated: new, better tokens, which the policy is trained on; recovered: the published tokens of a "
        "robust checkpoint stay; default: calibrated",
    )  # fmt: skip
    group = parser.add_argument_group("calibrated")
    _add(group, "objective", Objective, "cover the data's range, or minimise its squared error", CalibrationConfig)
    _add(group, "coverage", float, "share of the data to cover", CalibrationConfig)
    _add(group, "headroom", float, "how much farther than the data the first layer reaches", CalibrationConfig)
    _add(group, "granularity", Granularity, "constants per layer, or per layer and latent", CalibrationConfig)
    _add(group, "worst_case", float, "latent error to aim at in [-1, 1]; 1: by the data alone", CalibrationConfig)
    group.add_argument(
        "--readout", type=ReadoutChoice, choices=list(ReadoutChoice),
        help="refit the decoder's last layer; default: auto, where it wins on calibration episodes left out of the fit",
    )  # fmt: skip
    group.add_argument("--readout-ridge", type=float, metavar="X", help="penalty on that; default: cross-validated")
    group = parser.add_argument_group("recovered")
    group.add_argument("--prefixes", type=int, nargs="+", metavar="L", help="layers to decode; default: 3 and all")
    group.add_argument("--ridge", type=float, metavar="X", help="penalty on the map; default: cross-validated")
    _add(group, "refine_steps", int, "most Gauss-Newton steps, 0 = none", RecoveredConfig)
    _add(group, "target", Target, "latents to regress on first", RecoveredConfig)
    _add(group, "weighting", Weighting, "weight of a step", RecoveredConfig)
    return parser


def _add(group: Any, name: str, kind: Any, text: str, defaults: type) -> None:
    """An option for a setting; what is not given is None, so that what the method does not use can be refused."""
    shape = {"choices": list(kind)} if issubclass(kind, StrEnum) else {"metavar": "X"}
    said = f"{text}; default: {getattr(defaults, name)}"
    group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=said, **shape)


def _work(options: argparse.Namespace) -> Outcome:
    refuse_idle_choices(options)
    import torch

    from rfsq.calibration.data import calibration_dataset, data_warnings, judging_episodes
    from rfsq.calibration.report import format_report, report_calibrated, report_files, report_recovered, staged_report
    from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT, load_checkpoint, save_checkpoint
    from rfsq.rfsq_ref.own_format import check_output
    from rfsq.runtime.bundle.fidelity import Grade

    method: Method = options.method
    given: Path = options.checkpoint or ROBUST_CHECKPOINT
    output = options.output or Path(f"build/checkpoints/{given.stem}-{method}.safetensors")
    report_dir = options.report_dir or Path(f"build/reports/{given.stem}-{method}")
    # Sums come out in one order, whatever the machine has: the same data give the same constants.
    torch.set_num_threads(1)
    check_output(output)
    # Refused now, not after the work.
    refuse_existing([output, *report_files(report_dir)], overwrite=options.overwrite)
    checkpoint = load_checkpoint(given, use_layernorm=options.use_layernorm, weights=options.weights)
    print("".join(f"{line}\n" for line in checkpoint.remarks), end="")
    dataset = calibration_dataset(checkpoint, options.data, key=options.key, filter_key=options.filter_key)
    fitted = _fit(options, checkpoint, dataset)
    judge = report_calibrated if method is Method.CALIBRATED else report_recovered
    report = judge(fitted, judging_episodes(fitted, dataset))
    provenance: dict[str, Any] = fitted.provenance[method.value]
    data = provenance["data"]
    episodes = counted(data["episodes"], "episode")
    print(f"fitted on {episodes} ({data['steps']} steps) of {data['source']}: {data['selection']}")
    print(
        "".join(f"{line}\n" for line in (*data_warnings(checkpoint, dataset), provenance.get("remark")) if line), end=""
    )
    print(format_report(report, is_verbose=options.verbose))
    with staged_report(report, report_dir, provenance):
        save_checkpoint(fitted, output)
    if not find_spec("matplotlib"):
        print(f"no drawing of the report: matplotlib is not installed; {install_package('matplotlib')}")
    verdict = f"✓ wrote {output} and {report_dir}: what the tokens are worth: {report.fidelity.line}"
    if report.fidelity.grade is Grade.WORTHLESS:
        # Once more, so that it is not the line above that stays in mind.
        verdict += f"\n{report.fidelity.warning_in(report.method)}"
    return Outcome(verdict, {"output": str(output), "report": asdict(report), "provenance": provenance})


def _fit(options: argparse.Namespace, checkpoint: "Checkpoint", dataset: "ActionDataset") -> "Checkpoint":
    from rfsq.calibration.fitting import calibrate, recover
    from rfsq.calibration.recovered import default_prefixes

    of_calibrated = _given(options, [*CalibrationConfig.__dataclass_fields__, "readout", "readout_ridge"])
    of_recovered = _given(options, [*RecoveredConfig.__dataclass_fields__, "prefixes"])
    unused = of_recovered if options.method is Method.CALIBRATED else of_calibrated
    if unused:
        flags = ", ".join("--" + name.replace("_", "-") for name in unused)
        raise CalibrationError(f"{flags} given, which method {options.method.value!r} does not use; drop it")
    if options.method is Method.CALIBRATED:
        readout = ReadoutConfig(
            of_calibrated.pop("readout", DEFAULT_READOUT.choice), of_calibrated.pop("readout_ridge", None)
        )
        return calibrate(checkpoint, dataset, CalibrationConfig(**of_calibrated), readout)
    prefixes = tuple(of_recovered.pop("prefixes", default_prefixes(checkpoint.config.num_layers)))
    return recover(checkpoint, dataset, prefixes, RecoveredConfig(**of_recovered))


def _given(options: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}
