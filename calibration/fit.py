#!/usr/bin/env python3
"""Fit what makes a checkpoint's tokens decodable on their own, and report what the fit is worth.

`calibrated` gives new, better tokens (the policy is trained on them); `recovered` keeps the published tokens of a
Robust RFSQ checkpoint. The result is a new checkpoint file; the weights stay as they are.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
if __name__ == "__main__":
    from rfsq.runtime.bundle.console import explain_missing_packages

    explain_missing_packages()

import argparse
from dataclasses import asdict, replace
from enum import StrEnum
from importlib.util import find_spec
from typing import Any

import torch

from rfsq.calibration.constants import CalibrationConfig, Granularity, Objective, fit_constants, worst_case_errors
from rfsq.calibration.data import (
    Selection,
    calibration_dataset,
    calibration_episodes,
    data_warnings,
    judging_episodes,
    selection_of,
)
from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.readout import DEFAULT_READOUT, ReadoutChoice, ReadoutConfig, fit_readout
from rfsq.calibration.recovered import RecoveredConfig, Target, Weighting, default_prefixes, fit_recovered_details
from rfsq.calibration.report import (
    CalibrationReport,
    format_report,
    recovered_latent_reach,
    report_calibrated,
    report_files,
    report_recovered,
    write_report,
)
from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT, Checkpoint, check_output, load_checkpoint, save_checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.errors import OutputError, UnusableError
from rfsq.runtime.bundle.console import path_argument
from rfsq.runtime.bundle.fidelity import Grade
from rfsq.runtime.bundle.paths import counted, refuse_existing


class Method(StrEnum):
    CALIBRATED = "calibrated"
    RECOVERED = "recovered"


def calibrate(
    checkpoint: Checkpoint,
    dataset: ActionDataset,
    config: CalibrationConfig,
    readout: ReadoutConfig = DEFAULT_READOUT,
) -> Checkpoint:
    """The checkpoint with conditioning constants, a readout where one is kept and, under `calibrated`, provenance.

    Earlier ones are replaced. provenance["calibrated"]["remark"]: str, what became of the readout, and why.
    """
    episodes = calibration_episodes(checkpoint, dataset)
    constants = fit_constants(checkpoint, episodes, config)
    bound = float(worst_case_errors(constants, checkpoint.config.num_levels)[-1])
    fitted = replace(checkpoint, readout=None).with_fit(constants=constants)
    is_training_data = selection_of(checkpoint, dataset) is Selection.TRAINING_SPLIT
    fit = fit_readout(fitted, episodes, readout, is_training_data=is_training_data)
    facts = _provenance(checkpoint, dataset, episodes, asdict(config)) | {
        "worst_case_latent_error": bound,
        "readout": fit.facts(readout),
        "remark": fit.remark,
    }
    return fitted.with_fit(readout=fit.readout, provenance={Method.CALIBRATED.value: facts})


def recover(
    checkpoint: Checkpoint, dataset: ActionDataset, prefixes: tuple[int, ...], config: RecoveredConfig
) -> Checkpoint:
    """The checkpoint with recovered decoders and, under `recovered`, their provenance; earlier ones are replaced.

    provenance["recovered"]["remark"]: str, what a person should know about the fit; mostly empty.
    """
    episodes = calibration_episodes(checkpoint, dataset)
    fits = fit_recovered_details(checkpoint, episodes, prefixes, config)
    facts = _provenance(checkpoint, dataset, episodes, asdict(config)) | {
        "prefixes": {
            str(prefix): {
                "rank": fit.regression.rank,
                "unknowns": fit.unknowns,
                "condition": fit.regression.condition,
                "refinements": fit.refinements,
                "ridge": fit.ridge,
                "worst_case_latent_error": recovered_latent_reach(fit.decoder, checkpoint.config.num_levels) + 1,
            }
            for prefix, fit in fits.items()
        },
        "remark": "\n".join(fit.remark for fit in fits.values() if fit.remark),
    }
    decoders = {prefix: fit.decoder for prefix, fit in fits.items()}
    return checkpoint.with_fit(recovered=decoders, provenance={Method.RECOVERED.value: facts})


def _provenance(
    checkpoint: Checkpoint, dataset: ActionDataset, episodes: ActionDataset, config: dict[str, Any]
) -> dict[str, Any]:
    return {
        "config": {name: value.value if isinstance(value, StrEnum) else value for name, value in config.items()},
        "data": {
            "source": dataset.source,
            "sha256": dataset.sha256,
            "selection": selection_of(checkpoint, dataset).value,
            "episodes": len(episodes.episodes),
            "steps": episodes.num_steps,
        },
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=path_argument, default=ROBUST_CHECKPOINT, help="default: the embedded robust one"
    )
    parser.add_argument(
        "--calibration-data", type=path_argument,
        help="action data; of the checkpoint's training data only the calibration episodes are used. "
        "Default: the embedded demonstrations",
    )  # fmt: skip
    parser.add_argument("--key", help="name of the action array or column, when it is not the usual one")
    parser.add_argument("--filter-key", metavar="NAME", help="episodes that this filter of a robomimic file lists")
    parser.add_argument("--method", type=Method, choices=list(Method), default=Method.CALIBRATED)
    parser.add_argument(
        "--use-layernorm", action=argparse.BooleanOptionalAction, default=None,
        help="how a checkpoint that does not say it was trained: Robust RFSQ, or naive",
    )  # fmt: skip
    parser.add_argument(
        "--weights",
        help="which model of a checkpoint that holds several, such as ema; default: the model, no average",
    )
    parser.add_argument("--output", type=path_argument, help="default: build/checkpoints/NAME-METHOD.safetensors")
    parser.add_argument("--report-dir", type=path_argument, help="default: build/reports/NAME-METHOD")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint and a report that are there")
    _add_calibrated(parser)
    _add_recovered(parser)
    return parser.parse_args(arguments)


def _add_calibrated(parser: argparse.ArgumentParser) -> None:
    calibrated = CalibrationConfig()
    group = parser.add_argument_group("calibrated")
    group.add_argument(
        "--objective", type=Objective, choices=list(Objective),
        help=f"cover the data's range or minimise its squared error (default {calibrated.objective.value})",
    )  # fmt: skip
    group.add_argument("--coverage", type=float, help=f"share of the data to cover (default {calibrated.coverage:g})")
    group.add_argument(
        "--headroom", type=float,
        help=f"how much farther than the data's range the first layer reaches (default {calibrated.headroom:g})",
    )  # fmt: skip
    group.add_argument(
        "--granularity", type=Granularity, choices=list(Granularity),
        help=f"constants per layer, or per layer and latent (default {calibrated.granularity.value})",
    )  # fmt: skip
    group.add_argument(
        "--worst-case", type=float,
        help=f"latent error to aim at for any latent in [-1, 1] (default {calibrated.worst_case:g}; 1: data alone)",
    )  # fmt: skip
    group.add_argument(
        "--readout", type=ReadoutChoice, choices=list(ReadoutChoice),
        help="refit the decoder's last layer: auto (default) where it wins on calibration episodes left out of the fit",
    )  # fmt: skip
    group.add_argument(
        "--readout-ridge", type=float, help="penalty on changing the decoder's last layer (default: cross-validated)"
    )


def _add_recovered(parser: argparse.ArgumentParser) -> None:
    recovered = RecoveredConfig()
    group = parser.add_argument_group("recovered")
    group.add_argument("--prefixes", type=int, nargs="+", help="layers to decode (default: 3 and all)")
    group.add_argument("--ridge", type=float, help="penalty on the map (default: cross-validated)")
    group.add_argument(
        "--refine-steps", type=int, help=f"most Gauss-Newton steps, 0 = none (default {recovered.refine_steps})"
    )
    group.add_argument(
        "--target", type=Target, choices=list(Target),
        help=f"latents to regress on first (default {recovered.target.value})",
    )  # fmt: skip
    group.add_argument(
        "--weighting", type=Weighting, choices=list(Weighting),
        help=f"weight of a step (default {recovered.weighting.value})",
    )  # fmt: skip


def _given(options: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _fit(options: argparse.Namespace, checkpoint: Checkpoint, dataset: ActionDataset) -> Checkpoint:
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


def _judge(method: Method, checkpoint: Checkpoint, dataset: ActionDataset) -> CalibrationReport:
    report = report_calibrated if method is Method.CALIBRATED else report_recovered
    return report(checkpoint, judging_episodes(checkpoint, dataset))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    method: Method = options.method
    name = f"{options.checkpoint.stem}-{method.value}"
    output = options.output or Path("build/checkpoints") / f"{name}.safetensors"
    report_dir = options.report_dir or Path("build/reports") / name
    # Sums come out in one order, whatever the machine has: the same data give the same constants.
    torch.set_num_threads(1)
    try:
        check_output(output)
        # Not after the work.
        refuse_existing([output, *report_files(report_dir)], overwrite=options.overwrite, error=OutputError)
        checkpoint = load_checkpoint(options.checkpoint, use_layernorm=options.use_layernorm, weights=options.weights)
        for line in checkpoint.remarks:
            print(line)
        dataset = calibration_dataset(
            checkpoint, options.calibration_data, key=options.key, filter_key=options.filter_key
        )
        fitted = _fit(options, checkpoint, dataset)
        report = _judge(method, fitted, dataset)
        provenance: dict[str, Any] = fitted.provenance[method.value]
        data = provenance["data"]
        episodes = counted(data["episodes"], "episode")
        print(f"fitted on {episodes} ({data['steps']} steps) of {data['source']}: {data['selection']}")
        for remark in (*data_warnings(checkpoint, dataset), provenance.get("remark")):
            if remark:
                print(remark)
        print(format_report(report))
        # The checkpoint last: where it is, everything else went well.
        write_report(report, report_dir, provenance)
        if not find_spec("matplotlib"):
            print("no drawing of the report: matplotlib is not installed; pip install '.[evidence]'")
        save_checkpoint(fitted, output)
    except UnusableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {output} and {report_dir}")
    if report.fidelity.grade is Grade.WORTHLESS:
        # Once more, so that it is not the line above that stays in mind.
        print(report.fidelity.warning)
    return 0


if __name__ == "__main__":
    sys.exit(main())
