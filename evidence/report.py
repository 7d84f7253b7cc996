"""`python rfsq_ref/compare.py`: what a person asks for, and the files that answer."""

import argparse
import html
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rfsq.calibration.readout import ReadoutChoice, ReadoutConfig
from rfsq.calibration.study import study
from rfsq.calibration.study_report import RESULT_JSON, parts, study_files, write_study
from rfsq.calibration.study_result import StudyResult, result_from_json
from rfsq.calibration.tables import inline_html
from rfsq.evidence.comparison import compare
from rfsq.evidence.findings import REQUIRED_IMPROVEMENT
from rfsq.evidence.jobs import ComparisonConfig
from rfsq.evidence.metrics import OscPose
from rfsq.evidence.page import page
from rfsq.evidence.plots import figures, svg
from rfsq.evidence.results import Comparison, check_writable, read_json, write_json, write_text
from rfsq.evidence.rollout_files import demonstrations_of, read_report
from rfsq.evidence.rollout_report import conclusions, tables_of
from rfsq.evidence.tables import findings_table, layer_table, peer_table, summary_table
from rfsq.evidence.training import CACHE, SEEDS, trained_checkpoint
from rfsq.rfsq_ref.checkpoints import Checkpoint, load_checkpoint
from rfsq.rfsq_ref.data import ActionDataset, load_actions, load_demonstrations
from rfsq.rfsq_ref.errors import OutputError, UnusableError
from rfsq.rfsq_ref.normaliser import NormaliserKind
from rfsq.rfsq_ref.normaliser_choice import chosen_normaliser, describe_normaliser
from rfsq.rfsq_ref.train import make_deterministic
from rfsq.runtime.bundle.console import path_argument
from rfsq.runtime.bundle.paths import refuse_existing

COMPARISON_JSON, COMPARISON_TEXT, REPORT_HTML, FIGURES = "comparison.json", "comparison.txt", "report.html", "figures"
DEFAULT_OUTPUT = Path("build/evidence")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare naive and robust tokens, and peers at equal bits, on held-out episodes.",
        epilog="exit status: 0 = calibrated tokens have more than 30 % less error than naive ones, 1 = not, 2 = error",
    )
    given = parser.add_argument_group("checkpoints", "what is not given is trained, one for each seed")
    given.add_argument("--naive", type=path_argument, nargs="+", default=[], metavar="F")
    given.add_argument("--robust", type=path_argument, nargs="+", default=[], metavar="F")
    given.add_argument(
        "--weights", help="which model of checkpoints that hold several, such as ema; default: the model, no average"
    )
    parser.add_argument("--data", type=path_argument, help="action data; the embedded demonstrations by default")
    parser.add_argument("--key", help="name of the action array or column in --data, when it is not the usual one")
    parser.add_argument("--filter-key", metavar="NAME", help="episodes that this filter of a robomimic file lists")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=100, help="of every training (default %(default)s)")
    parser.add_argument(
        "--normaliser", choices=["auto", "none", *(kind.value for kind in NormaliserKind)], default="auto",
        help="of every training; auto: min-max for actions that are not of about unit size",
    )  # fmt: skip
    parser.add_argument(
        "--readout", type=ReadoutChoice, choices=list(ReadoutChoice), default=ReadoutChoice.AUTO,
        help="refit the decoder's last layer for calibrated tokens: auto (default) where it wins on calibration "
        "episodes left out of the fit",
    )  # fmt: skip
    parser.add_argument("--chunk-length", type=int, default=8, help="steps of a chunk, T (default %(default)s)")
    parser.add_argument(
        "--osc-pose", action=argparse.BooleanOptionalAction, default=None,
        help="report mm and degrees as of the OSC_POSE controller (default: for the embedded demonstrations)",
    )  # fmt: skip
    units = OscPose()
    parser.add_argument("--position-unit", type=float, default=units.position_m, help="m (default %(default)s)")
    parser.add_argument("--rotation-unit", type=float, default=units.rotation_rad, help="rad (default %(default)s)")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--calibration-study", action=argparse.BooleanOptionalAction, default=True,
        help="measure the choices of calibration too",
    )  # fmt: skip
    parser.add_argument(
        "--report-only", action="store_true", help="draw page and figures anew from the results in the --output folder"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--cache", type=path_argument, default=CACHE, help="trained models (default %(default)s)")
    parser.add_argument("--output", type=path_argument, default=DEFAULT_OUTPUT, help="folder (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a comparison that is there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    make_deterministic()
    try:
        check_writable(options.output)
        # Not after an hour of training.
        refuse_existing(_written(options), overwrite=options.overwrite, error=OutputError)
        comparison = _redrawn(options.output) if options.report_only else _compared(options)
    except UnusableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {REPORT_HTML}, {COMPARISON_TEXT} and more into {options.output}")
    return 0 if comparison.improvement > REQUIRED_IMPROVEMENT else 1


def _written(options: argparse.Namespace) -> list[Path]:
    """Everything that this command writes into its folder."""
    folder: Path = options.output
    written = [folder / name for name in (REPORT_HTML, FIGURES, COMPARISON_TEXT)]
    if options.report_only:
        return written
    return [*written, folder / COMPARISON_JSON, *(study_files(folder) if options.calibration_study else ())]


def _compared(options: argparse.Namespace) -> Comparison:
    """Measure, and write everything."""
    dataset = (
        load_actions(options.data, key=options.key, filter_key=options.filter_key)
        if options.data
        else load_demonstrations()
    )
    config = ComparisonConfig(
        seeds=tuple(options.seeds),
        epochs=options.epochs,
        normaliser=chosen_normaliser(options.normaliser, dataset),
        chunk_length=options.chunk_length,
        physical=_physical(options),
        with_peers=options.peers,
        readout=ReadoutConfig(options.readout),
        workers=options.workers,
        cache=options.cache,
    )
    print(
        f"comparing on {dataset.source}: {len(dataset.episodes)} episodes, {dataset.num_steps} steps; "
        f"what is not at hand is trained first, some minutes\n{describe_normaliser(dataset, options.normaliser)}",
        flush=True,
    )
    naive, robust = (_load(paths, options.weights) for paths in (options.naive, options.robust))
    comparison = compare(dataset, config, naive=naive, robust=robust, show_progress=True)
    text = as_text(comparison)
    print(text, flush=True)
    # First without what may still fail: an hour of training is not lost to a damaged file beside it.
    write_report(comparison, text, [], options.output)
    sections = []
    if options.calibration_study:
        sections.append(_calibration_section(_studied(dataset, config, robust, options.output)))
    sections += _closed_loop(options.output, comparison)
    if sections:
        write_report(comparison, text, sections, options.output)
    return comparison


def _redrawn(folder: Path) -> Comparison:
    """Write page, figures and text anew from the results that lie in the folder."""
    comparison = read_json(folder / COMPARISON_JSON)
    sections = []
    if (folder / RESULT_JSON).exists():
        sections.append(_calibration_section(result_from_json((folder / RESULT_JSON).read_text(encoding="utf-8"))))
    write_report(comparison, as_text(comparison), sections + _closed_loop(folder, comparison), folder)
    return comparison


def write_report(comparison: Comparison, text: str, sections: Sequence[tuple[str, str]], folder: Path) -> None:
    """Page, figures and text, and the JSON last: where it is, everything else is too. Raises EvidenceError."""
    drawn = {name: svg(figure) for name, figure in figures(comparison).items()}
    for name, drawing in drawn.items():
        write_text(folder / FIGURES / f"{name.replace(' ', '-')}.svg", drawing)
    write_text(folder / REPORT_HTML, page(comparison, drawn, sections))
    write_text(folder / COMPARISON_TEXT, text + "\n")
    write_json(comparison, folder / COMPARISON_JSON)


def as_text(comparison: Comparison) -> str:
    """Everything, for a terminal."""
    parts = [summary_table(comparison).text()]
    parts += [layer_table(report, comparison).text() for report in comparison.schemes]
    if comparison.peers:
        parts += [peer_table(comparison).text(), "\n".join(comparison.peer_verdict)]
    parts.append(findings_table(comparison).text())
    parts += comparison.remarks
    return "\n\n".join(parts)


def _studied(
    dataset: ActionDataset, config: ComparisonConfig, robust: Sequence[Checkpoint], folder: Path
) -> StudyResult:
    """What the calibration choices are worth for the same checkpoints; written too."""
    chosen = robust or [
        trained_checkpoint(dataset, config.training(use_layernorm=True, seed=seed), config.cache)[0]
        for seed in config.seeds
    ]
    result = study(chosen, dataset, show_progress=True)
    write_study(result, folder)
    return result


def _calibration_section(result: StudyResult) -> tuple[str, str]:
    shown = [f"<p>{inline_html(part)}</p>" if isinstance(part, str) else part.html() for part in parts(result).values()]
    return "Calibration choices", "\n".join(shown)


def _closed_loop(folder: Path, comparison: Comparison) -> list[tuple[str, str]]:
    """A section on the closed loop, where it has been run on the same demonstrations and its results lie here."""
    path = folder / "rollout.json"
    if not path.exists() or demonstrations_of(path) != comparison.data.sha256:
        return []
    reports = read_report(path)
    tables = "\n".join(table.html() for table in tables_of(reports).values())
    said = "".join(
        f"<li>{html.escape(f'{task}: ' + ' '.join(conclusions(found)))}</li>" for task, found in reports.items()
    )
    return [("Closed loop", f"{tables}\n<ul>{said}</ul>")]


def _load(paths: list[Path], weights: str | None) -> list[Checkpoint]:
    """Says what is remarkable about each."""
    checkpoints = [load_checkpoint(path, weights=weights) for path in paths]
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        for remark in checkpoint.remarks:
            print(f"{path.name}: {remark}")
    return checkpoints


def _physical(options: argparse.Namespace) -> OscPose | None:
    wanted = options.data is None if options.osc_pose is None else options.osc_pose
    return OscPose(options.position_unit, options.rotation_unit) if wanted else None
