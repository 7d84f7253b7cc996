"""The report as one HTML page that needs nothing else: no network, no scripts, figures as SVG."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from rfsq.calibration.tables import Table
from rfsq.evidence.findings import compared, title
from rfsq.evidence.results import Comparison
from rfsq.evidence.tables import findings_table, layer_table, peer_table, summary_table

_CAPTIONS = {
    "error by layer": "Error of decoding the first layers alone. Bands span the training seeds.",
    "residual decay": "What is left for each layer. A flat line means that a layer had no effect.",
    "level use": "Share of each grid level, lowest to highest, and the entropy of the layer's tokens for one step.",
    "error histograms": "Absolute error of single action values, all layers decoded, over all seeds.",
    "trajectories": "One held-out episode. The axes follow what was recorded: a decoding far off leaves them.",
    "learning curves": "Weights are kept where the validation error is lowest (dots).",
    "peers": "Lower and farther left is better. Hollow squares decode a part of another setting's tokens.",
}
#: What stands around `$body`: head and style.
_PAGE = Path(__file__).with_name("page.html")


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
