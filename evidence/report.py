"""The report of a comparison: tables, figures and one page.

The page is HTML that needs nothing else: no network, no scripts, figures as SVG.
"""

import argparse
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from textwrap import fill

from rfsq.calibration import study_report
from rfsq.calibration.settings import ReadoutConfig
from rfsq.calibration.study import study
from rfsq.calibration.study_report import RESULT_JSON, study_files, write_study
from rfsq.calibration.study_result import result_from_json
from rfsq.calibration.tables import Table, as_html, as_text
from rfsq.evidence import chunk_results, rollout_report
from rfsq.evidence.chunk_results import CHUNKS_JSON
from rfsq.evidence.comparison import compare
from rfsq.evidence.findings import compared, title
from rfsq.evidence.jobs import trained_checkpoint
from rfsq.evidence.plots import figures, svg
from rfsq.evidence.results import Comparison, write_text
from rfsq.evidence.settings import ComparisonConfig, OscPose
from rfsq.evidence.tables import findings_table, layer_table, parts, peer_table, short_table, summary_table
from rfsq.rfsq_ref.checkpoints import Checkpoint, load_checkpoint
from rfsq.rfsq_ref.data import DEMONSTRATIONS, load_actions
from rfsq.rfsq_ref.normaliser import chosen_normaliser, describe_normaliser
from rfsq.rfsq_ref.training import make_deterministic
from rfsq.runtime.bundle.paths import refuse_existing

COMPARISON_JSON, COMPARISON_TEXT, REPORT_HTML, FIGURES = "comparison.json", "comparison.txt", "report.html", "figures"

_CAPTIONS = {
    "error by layer": "Error of decoding the first layers alone. Bands span the training seeds.",
    "residual decay": "What is left for each layer. A flat line means that a layer had no effect.",
    "level use": "Share of each grid level, lowest to highest, and the entropy of the layer's tokens for one step.",
    "error histograms": "Absolute error of single action values, all layers decoded, over all seeds.",
    "trajectories": "One held-out episode. The axes follow what was recorded: a decoding far off leaves them.",
    "learning curves": "Weights are kept where the validation error is lowest (dots).",
    "chunk tokens": "The best setting of each tokenizer within each budget. Dashed: the bound of one Gaussian.",
    "choice": "What each tokenizer reaches within so many bits: of its settings those that no cheaper one beats.",
    "peers": "Lower and farther left is better. Hollow squares decode a part of another setting's tokens.",
}
#: What stands around `$body`: head and style.
_PAGE = Path(__file__).with_name("page.html")


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
    beside = chunk_results.read_beside(comparison, folder / CHUNKS_JSON)
    drawn = {name: svg(figure) for name, figure in figures(comparison, beside).items()}
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
    """Of results beside the comparison: calibration; chunk tokens and a closed loop on the same demonstrations."""
    path = options.output / RESULT_JSON
    if path.exists() and (options.calibration_study or options.report_only):
        found = study_report.parts(result_from_json(path.read_text(encoding="utf-8")))
        yield "Calibration choices", as_html(found.values())
    if beside := chunk_results.read_beside(comparison, options.output / CHUNKS_JSON):
        yield "Chunk tokens at equal bits", as_html(filter(None, chunk_results.parts(*beside).values()))
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


# The page -------------------------------------------------------------------------------------------------------------


def page(comparison: Comparison, drawn: Mapping[str, str], sections: Sequence[tuple[str, str]] = ()) -> str:
    """HTML of the whole report. drawn: SVG by the names of rfsq.evidence.plots.figures; sections: further ones, (title,
    HTML), behind the comparison's own."""
    parts = [
        f"<h1>{title(comparison.improvement)}</h1>\n<p class=lead>{_lead(comparison)}</p>",
        f"<p class=muted>{html.escape(_data(comparison))}</p>",
        _findings(comparison),
        *(f"<p class=muted>{html.escape(remark)}</p>" for remark in comparison.remarks),
        "<h2>All, coarse and fine layers</h2>\n" + summary_table(comparison).html(),
        "<p class=muted>Fine layers alone: the coarse ones at their mean over the calibration episodes.</p>",
        *(f"<h2>{name.capitalize()}</h2>\n{_figure(name, drawn[name])}" for name in drawn if name != "peers"),
        "<h2>Layer by layer</h2>",
        *(_details(layer_table(report)) for report in comparison.schemes),
    ]
    if "peers" in drawn:
        verdict = "".join(f"<li>{html.escape(sentence)}</li>\n" for sentence in comparison.peer_verdict)
        parts += [
            f"<h2>Peers at equal bits</h2>\n<ul>\n{verdict}</ul>\n{_figure('peers', drawn['peers'])}",
            _details(peer_table(comparison)),
        ]
    parts += [f"<h2>{html.escape(heading)}</h2>\n{content}" for heading, content in sections]
    parts.append(f"<h2>Made from</h2>\n{_provenance(comparison).html()}")
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(body="\n".join(parts))


def _lead(comparison: Comparison) -> str:
    naive, calibrated = (comparison.scheme(name).groups[-1].metrics for name in ("naive", "calibrated"))
    sentence = (
        f"Calibrated robust tokens have {compared(comparison.improvement)} action error than naive ones, their worst "
        f"seed against the best, decoded from tokens alone. Mean squared error over all seeds, in normalised units²: "
        f"{calibrated['action_mse'].mean:.1e} against {naive['action_mse'].mean:.1e}."
    )
    if "position_mm" in calibrated:
        sentence += (
            f" In the robot's units: {calibrated['position_mm'].mean:.2f} mm against "
            f"{naive['position_mm'].mean:.2f} mm per step."
        )
    return sentence


def _data(comparison: Comparison) -> str:
    data = comparison.data
    return (
        f"{data.source}: {sum(data.episodes.values())} episodes, {sum(data.steps.values())} steps, "
        f"{data.action_dim} action dimensions; judged on {data.episodes['test']} episodes ({data.steps['test']} steps) "
        "of the test split, which nothing that is trained or fitted here sees."
    )


def _findings(comparison: Comparison) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(claim)}</td><td>{html.escape(measured)}</td><td class={state}>{state}</td></tr>\n"
        for claim, measured, state in findings_table(comparison).rows
    )
    return f"<table class=findings><tbody>\n{rows}</tbody></table>"


def _figure(name: str, drawing: str) -> str:
    return f"<figure>{drawing}<figcaption>{html.escape(_CAPTIONS[name])}</figcaption></figure>"


def _details(table: Table) -> str:
    return f"<details><summary>{html.escape(table.title.replace('`', ''))}</summary>{table.html()}</details>"


def _provenance(comparison: Comparison) -> Table:
    facts = {
        "data sha256": comparison.data.sha256,
        "seeds": " ".join(map(str, comparison.seeds)),
        **comparison.settings,
        **comparison.versions,
        **{f"checkpoint {name}": sha256 for name, sha256 in comparison.checkpoints.items()},
    }
    return Table("", ("fact", "value"), tuple(facts.items()))
