"""The report of a comparison: tables, figures and one page."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill

from rfsq.calibration import study_report
from rfsq.calibration.settings import ReadoutConfig
from rfsq.calibration.study import study
from rfsq.calibration.study_report import RESULT_JSON, study_files, write_study
from rfsq.calibration.study_result import result_from_json
from rfsq.calibration.tables import as_html, as_text
from rfsq.evidence import rollout_report
from rfsq.evidence.comparison import compare
from rfsq.evidence.jobs import trained_checkpoint
from rfsq.evidence.page import page
from rfsq.evidence.plots import figures, svg
from rfsq.evidence.results import Comparison, write_text
from rfsq.evidence.settings import ComparisonConfig, OscPose
from rfsq.evidence.tables import parts, short_table
from rfsq.rfsq_ref.checkpoints import Checkpoint, load_checkpoint
from rfsq.rfsq_ref.data import DEMONSTRATIONS, load_actions
from rfsq.rfsq_ref.normaliser_choice import chosen_normaliser, describe_normaliser
from rfsq.rfsq_ref.training import make_deterministic
from rfsq.runtime.bundle.paths import refuse_existing

COMPARISON_JSON, COMPARISON_TEXT, REPORT_HTML, FIGURES = "comparison.json", "comparison.txt", "report.html", "figures"


def report(options: argparse.Namespace) -> Comparison:
    """What the command `compare` does: measure, or draw anew what was measured, and write page, text and figures.

    Prints the tables; options: of the command. Raises EvidenceError and what the data and the checkpoints do.
    """
    make_deterministic()
    # Not after an hour of training.
    refuse_existing(_written(options), overwrite=options.overwrite, folders=[options.output / FIGURES])
    comparison = Comparison.read(options.output / COMPARISON_JSON) if options.report_only else _compared(options)
    sections = list(_sections(options, comparison))
    if sections or options.report_only:
        write_report(comparison, sections, options.output)
    return comparison


def _written(options: argparse.Namespace) -> list[Path]:
    """Every file that this command writes into its folder, beside those in FIGURES."""
    folder: Path = options.output
    written = [folder / name for name in (REPORT_HTML, COMPARISON_TEXT)]
    if options.report_only:
        return written
    return [*written, folder / COMPARISON_JSON, *(study_files(folder) if options.calibration_study else ())]


def _compared(options: argparse.Namespace) -> Comparison:
    """Measure, and write what was found."""
    dataset = load_actions(options.data or DEMONSTRATIONS, key=options.key, filter_key=options.filter_key)
    config = ComparisonConfig(
        seeds=tuple(options.seeds),
        normaliser=chosen_normaliser(options.normaliser, dataset),
        physical=_physical(options),
        readout=ReadoutConfig(options.readout),
        **{name: getattr(options, name) for name in ("epochs", "chunk_length", "peers", "workers", "cache")},
    )
    size = f"{len(dataset.episodes)} episodes, {dataset.num_steps} steps"
    most = ", most of them for peers, which --no-peers leaves out" if config.peers else ""
    print(f"comparing on {dataset.source}: {size}; training what is missing takes minutes{most}", flush=True)
    if options.verbose:
        print(describe_normaliser(dataset, options.normaliser), flush=True)
    naive, robust = (_load(paths, options.weights) for paths in (options.naive, options.robust))
    comparison = compare(dataset, config, naive=naive, robust=robust)
    print(full_text(comparison) if options.verbose else short_text(comparison), flush=True)
    # First without what may still fail: an hour of training is not lost to a damaged file beside it.
    write_report(comparison, [], options.output)
    if options.calibration_study:
        # Of the same checkpoints.
        chosen = robust or [
            trained_checkpoint(dataset, config.training(use_layernorm=True, seed=seed), config.cache)[0]
            for seed in config.seeds
        ]
        write_study(study(chosen, dataset), options.output)
    return comparison


def write_report(comparison: Comparison, sections: Sequence[tuple[str, str]], folder: Path) -> None:
    """Page, figures and text, and the JSON last: where it is, everything else is too. Raises EvidenceError."""
    drawn = {name: svg(figure) for name, figure in figures(comparison).items()}
    for name, drawing in drawn.items():
        write_text(folder / FIGURES / f"{name.replace(' ', '-')}.svg", drawing)
    write_text(folder / REPORT_HTML, page(comparison, drawn, sections))
    write_text(folder / COMPARISON_TEXT, full_text(comparison) + "\n")
    comparison.write(folder / COMPARISON_JSON)


def short_text(comparison: Comparison) -> str:
    """What fits a screen: what each way of decoding costs, the claims, and what is missing or poor."""
    claims = tuple(f"{'✓' if finding.holds else '✗'} {finding.claim}" for finding in comparison.findings)
    # How good each seed's tokens are is a detail; that they are poor is a remark of its own.
    remarks = tuple(fill(remark, 100) for remark in comparison.remarks if "; in robot units: " not in remark)
    return as_text(filter(None, [short_table(comparison), claims, remarks]))


def full_text(comparison: Comparison) -> str:
    """Everything, for a terminal."""
    return as_text(parts(comparison).values())


def _sections(options: argparse.Namespace, comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Of results beside the comparison: the calibration study, and a closed loop on the same demonstrations."""
    path = options.output / RESULT_JSON
    if path.exists() and (options.calibration_study or options.report_only):
        found = study_report.parts(result_from_json(path.read_text(encoding="utf-8")))
        yield "Calibration choices", as_html(found.values())
    path = options.output / "rollout.json"
    if path.exists():
        rollout = rollout_report.RolloutResult.read(path)
        if rollout.run.hashes.get("demonstrations") == comparison.data.sha256:
            yield "Closed loop", as_html(rollout_report.parts(rollout.tasks).values())


def _load(paths: list[Path], weights: str | None) -> list[Checkpoint]:
    """Says what is remarkable about each."""
    checkpoints = [load_checkpoint(path, weights=weights) for path in paths]
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        for remark in checkpoint.remarks:
            print(f"{path.name}: {remark}")
    return checkpoints


def _physical(options: argparse.Namespace) -> OscPose | None:
    wanted = options.data is None if options.osc_pose is None else options.osc_pose
    units = OscPose(options.position_unit, options.rotation_unit)
    return units if wanted else None
