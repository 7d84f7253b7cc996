#!/usr/bin/env python3
"""The command that fits a checkpoint, or chunk tokens, to demonstrations, and reports what the fit is worth.

The result is a new checkpoint file; the weights of a model stay as they are. `fitting.py` does the work, and
`chunk_fitting.py` that of chunk tokens.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    from rfsq.runtime.bundle.start import run_script

    run_script("rfsq.calibration.fit")

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from enum import StrEnum
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.settings import (
    DEFAULT_READOUT,
    BitOrder,
    CalibrationConfig,
    ChunkConfig,
    Granularity,
    Method,
    Objective,
    ReadoutChoice,
    ReadoutConfig,
    RecoveredConfig,
    Target,
    Weighting,
)
from rfsq.rfsq_ref.settings import TokenKind
from rfsq.runtime.bundle.advice import install_package
from rfsq.runtime.bundle.command import DATA_FORMATS, CommandParser, Outcome, path_argument, refuse_idle_choices, run
from rfsq.runtime.bundle.paths import counted, refuse_existing

if TYPE_CHECKING:
    from rfsq.rfsq_ref.checkpoints import Checkpoint
    from rfsq.rfsq_ref.data import ActionDataset
    from rfsq.runtime.bundle.fidelity import Fidelity

#: Options by what uses them; what is not given is None.
_OF_STEP = ("checkpoint", "use_layernorm", "weights")
_OF_CALIBRATED = (*CalibrationConfig.__dataclass_fields__, "readout", "readout_ridge")
_OF_RECOVERED = (*RecoveredConfig.__dataclass_fields__, "prefixes")
_OF_CHUNK = tuple(ChunkConfig.__dataclass_fields__)
_OF_FITS = ("data", "key", "filter_key", "method", *_OF_CALIBRATED, *_OF_RECOVERED, *_OF_CHUNK)


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
    parser.add_output(
        "checkpoint; default: build/checkpoints/NAME-METHOD.safetensors, of chunk tokens DATA-chunk, or "
        "DATA-chunk-shared by their order"
    )
    parser.add_argument(
        "--beliefs", type=path_argument, metavar="F",
        help="fit temperatures and spreads to a policy's logits on windows held out, an .npz; --checkpoint is the "
        "tokenizer, --output the settings",
    )  # fmt: skip
    parser.add_argument(
        "--for-bundle", type=path_argument, metavar="BUNDLE", help="that decodes these, built from --checkpoint"
    )
    parser.add_argument("--report-dir", type=path_argument, metavar="DIR", help="default: the same below build/reports")
    parser.add_argument(
        "--kind", type=TokenKind, choices=list(TokenKind), default=TokenKind.STEP,
        help="step: tokens of single steps, of a trained checkpoint; chunk: tokens of a whole chunk, which need no "
        "training; default: step",
    )  # fmt: skip
    parser.add_argument(
        "--method", type=Method, choices=list(Method),
        help="of step tokens. calibrated: new, better tokens, which the policy is trained on; recovered: the published "
        "tokens of a robust checkpoint stay; default: calibrated",
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
    group = parser.add_argument_group("chunk")
    _add(group, "chunk_length", int, "T, steps of a chunk", ChunkConfig)
    _add(group, "classes", int, "C, with escape; fewer where there are few data", ChunkConfig)
    _add(group, "vocabulary", int, "words of a token, a power of two", ChunkConfig)
    group.add_argument(
        "--tokens", type=int, metavar="X", help="L, of a chunk; default: as many as 8 bits of each value take"
    )
    group.add_argument(
        "--normaliser", metavar="{auto,none,min-max,F}",
        help="what brings actions into [-1, 1]: chosen by auto, none, or JSON with kind, offset and scale; default: "
        "auto",
    )  # fmt: skip
    _add(group, "order", BitOrder, "of the first bits: own of each class, or shared for a policy", ChunkConfig)
    _add(group, "seed", int, "of the first classes", ChunkConfig)
    return parser


def _add(group: Any, name: str, kind: Any, text: str, defaults: type) -> None:
    """An option for a setting; what is not given is None, so that what the method does not use can be refused."""
    shape = {"choices": list(kind)} if issubclass(kind, StrEnum) else {"metavar": "X"}
    said = f"{text}; default: {getattr(defaults, name)}"
    group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=said, **shape)


def _work(options: argparse.Namespace) -> Outcome:
    refuse_idle_choices(options)
    if options.beliefs is None:
        _refuse_unused(options)
        if options.for_bundle is not None:
            raise CalibrationError("--for-bundle given, which --beliefs alone uses; drop it")
    import torch

    # Sums come out in one order, whatever the machine has: the same data give the same constants.
    torch.set_num_threads(1)
    if options.beliefs is not None:
        return _fit_beliefs(options)
    return _fit_chunk(options) if options.kind is TokenKind.CHUNK else _fit_step(options)


def _refuse_unused(options: argparse.Namespace) -> None:
    """Raises CalibrationError for options that the kind of tokens, or the method, does not use."""
    kind: TokenKind = options.kind
    method: Method = options.method or Method.CALIBRATED
    of_kind = (*_OF_STEP, "method", *_OF_CALIBRATED, *_OF_RECOVERED) if kind is TokenKind.CHUNK else _OF_CHUNK
    of_method = _OF_RECOVERED if method is Method.CALIBRATED else _OF_CALIBRATED
    for chosen, names in ((f"kind {kind.value!r}", of_kind), (f"method {method.value!r}", of_method)):
        if unused := _given(options, names):
            flags = ", ".join("--" + name.replace("_", "-") for name in unused)
            raise CalibrationError(f"{flags} given, which {chosen} does not use; drop it")


def _fit_step(options: argparse.Namespace) -> Outcome:
    from rfsq.calibration.data import calibration_dataset, data_warnings, judging_episodes
    from rfsq.calibration.report import (
        draw_calibration,
        format_report,
        report_calibrated,
        report_recovered,
        staged_report,
    )
    from rfsq.rfsq_ref.checkpoints import ROBUST_CHECKPOINT, load_checkpoint, save_checkpoint

    method: Method = options.method or Method.CALIBRATED
    given: Path = options.checkpoint or ROBUST_CHECKPOINT
    output, report_dir = _places(options, f"{given.stem}-{method}")
    checkpoint = load_checkpoint(given, use_layernorm=options.use_layernorm, weights=options.weights)
    print("".join(f"{line}\n" for line in checkpoint.remarks), end="")
    dataset = calibration_dataset(checkpoint, options.data, key=options.key, filter_key=options.filter_key)
    fitted = _fit(options, method, checkpoint, dataset)
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
    with staged_report(report, report_dir, draw_calibration, provenance):
        save_checkpoint(fitted, output)
    document = {"output": str(output), "report": asdict(report), "provenance": provenance}
    return Outcome(_verdict(output, report_dir, report.fidelity, report.method), document)


def _fit_chunk(options: argparse.Namespace) -> Outcome:
    from rfsq.calibration.chunk_fitting import chunk_parts, fit_chunk_tokens, fitted_on
    from rfsq.calibration.chunk_report import MODE, draw_chunk, format_chunk_report, report_chunk
    from rfsq.calibration.report import staged_report
    from rfsq.rfsq_ref.chunk_checkpoint import save_chunk_checkpoint
    from rfsq.rfsq_ref.data import DEMONSTRATIONS, load_actions

    given: Path = options.data or DEMONSTRATIONS
    config = ChunkConfig(**_given(options, _OF_CHUNK))
    # A policy is trained on one order or the other: both are kept.
    order = "" if config.order is BitOrder.OWN else f"-{config.order}"
    output, report_dir = _places(options, f"{given.stem}-chunk{order}")
    dataset = load_actions(given, key=options.key, filter_key=options.filter_key)
    fitted = fit_chunk_tokens(dataset, config)
    report = report_chunk(fitted, chunk_parts(dataset).judging)
    print(fitted_on(fitted.provenance))
    print("\n".join(fitted.provenance["remarks"]))
    print(format_chunk_report(report, is_verbose=options.verbose))
    with staged_report(report, report_dir, draw_chunk, fitted.provenance):
        save_chunk_checkpoint(fitted, output)
    document = {"output": str(output), "report": asdict(report), "provenance": dict(fitted.provenance)}
    return Outcome(_verdict(output, report_dir, report.fidelity, MODE), document)


def _fit_beliefs(options: argparse.Namespace) -> Outcome:
    from rfsq.calibration.belief_fitting import draw_beliefs, format_beliefs, load_logits, write_settings
    from rfsq.calibration.beliefs import calibrate_beliefs, settings_of
    from rfsq.calibration.report import report_files, staged_report
    from rfsq.rfsq_ref.checkpoints import load_checkpoint
    from rfsq.rfsq_ref.chunk_checkpoint import load_chunk_checkpoint
    from rfsq.runtime.bundle.folder import open_bundle

    if unused := _given(options, _OF_FITS):
        flags = ", ".join("--" + name.replace("_", "-") for name in unused)
        raise CalibrationError(f"{flags} given, which --beliefs does not use; drop it")
    if options.checkpoint is None or options.for_bundle is None:
        raise CalibrationError(
            "--beliefs needs the tokenizer that the policy speaks, --checkpoint F, and the bundle that was built from "
            "it and decodes what the policy says, --for-bundle BUNDLE"
        )
    output: Path = options.output or Path(f"build/beliefs/{options.beliefs.stem}.json")
    report_dir: Path = options.report_dir or Path(f"build/reports/{options.beliefs.stem}-beliefs")
    refuse_existing([output, *report_files(report_dir)], overwrite=options.overwrite)
    tokens = (
        load_chunk_checkpoint(options.checkpoint)
        if options.kind is TokenKind.CHUNK
        else load_checkpoint(options.checkpoint, use_layernorm=options.use_layernorm, weights=options.weights)
    )
    report = calibrate_beliefs(*load_logits(options.beliefs, tokens, open_bundle(options.for_bundle).manifest))
    print(format_beliefs(report, is_verbose=options.verbose))
    with staged_report(report, report_dir, draw_beliefs):
        write_settings(report, output)
    spread = report.spreads[0]
    return Outcome(
        f"✓ wrote {output} and {report_dir}: {100 * spread.within_one[1]:.0f}% of recorded actions lie within 1 std, "
        f"{100 * spread.within_two[1]:.0f}% within 2, on episodes that nothing was fitted to",
        {"output": str(output), "report": asdict(report), "settings": json.loads(settings_of(report).text())},
    )


def _places(options: argparse.Namespace, name: str) -> tuple[Path, Path]:
    """The checkpoint to write, and the folder of the report; refused now, not after the work, where they cannot be."""
    from rfsq.calibration.report import report_files
    from rfsq.rfsq_ref.own_format import check_output

    output: Path = options.output or Path(f"build/checkpoints/{name}.safetensors")
    report_dir: Path = options.report_dir or Path(f"build/reports/{name}")
    check_output(output)
    refuse_existing([output, *report_files(report_dir)], overwrite=options.overwrite)
    return output, report_dir


def _verdict(output: Path, report_dir: Path, fidelity: "Fidelity", mode: str) -> str:
    from rfsq.runtime.bundle.fidelity import Grade

    if not find_spec("matplotlib"):
        print(f"no drawing of the report: matplotlib is not installed; {install_package('matplotlib')}")
    verdict = f"✓ wrote {output} and {report_dir}: what the tokens are worth: {fidelity.line}"
    # Once more, so that it is not the line above that stays in mind.
    return verdict if fidelity.grade is not Grade.WORTHLESS else f"{verdict}\n{fidelity.warning_in(mode)}"


def _fit(
    options: argparse.Namespace, method: Method, checkpoint: "Checkpoint", dataset: "ActionDataset"
) -> "Checkpoint":
    from rfsq.calibration.fitting import calibrate, recover
    from rfsq.calibration.recovered import default_prefixes

    of_calibrated, of_recovered = _given(options, _OF_CALIBRATED), _given(options, _OF_RECOVERED)
    if method is Method.CALIBRATED:
        readout = ReadoutConfig(
            of_calibrated.pop("readout", DEFAULT_READOUT.choice), of_calibrated.pop("readout_ridge", None)
        )
        return calibrate(checkpoint, dataset, CalibrationConfig(**of_calibrated), readout)
    prefixes = tuple(of_recovered.pop("prefixes", default_prefixes(checkpoint.config.num_layers)))
    return recover(checkpoint, dataset, prefixes, RecoveredConfig(**of_recovered))


def _given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}
