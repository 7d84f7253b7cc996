"""A comparison as tables: for the terminal, for Markdown, for the page."""

from collections.abc import Iterable

import numpy as np

from rfsq.calibration.tables import Part, Table
from rfsq.evidence.findings import AS_TRAINED, REFITTED, best_within
from rfsq.evidence.results import CodecReport, Comparison, Finding, Metrics, SchemeReport, Spread

#: What a reader sees of each scheme.
SCHEME_TITLES = {
    "naive": "naive",
    "dynamic": "robust `dynamic`, side information beside the tokens",
    "published": "the same tokens alone, published `decode_from_indices`",
    "recovered": "the same tokens alone, `recovered` decoder",
    "calibrated": "robust `calibrated`, tokens alone",
}
UNQUANTISED_TITLES = {
    AS_TRAINED: "robust autoencoder as trained, no quantiser",
    REFITTED: "robust autoencoder, readout refitted, no quantiser",
}
#: Columns by the names of metrics; those in the robot's units are there where the actions have such units.
_ERRORS = {
    "action_mse": "action MSE, normalised units²",
    "max_error": "max error, normalised units",
    "position_mm": "position mm",
    "position_mm_p99": "p99 mm",
    "rotation_deg": "rotation °",
    "rotation_deg_p99": "p99 °",
    "gripper_sign_errors": "wrong gripper sign, share",
}
#: Of peers, whose table is long.
_PEER_ERRORS = ("action_mse", "max_error", "position_mm", "position_mm_p99")
_NONE = "–"


def parts(comparison: Comparison) -> dict[str, Part]:
    """By the names that documents give them, in the order of the text."""
    found: dict[str, Part] = {"comparison": short_table(comparison), "comparison summary": summary_table(comparison)}
    found |= {f"comparison {report.scheme} layers": layer_table(report) for report in comparison.schemes}
    if comparison.peers:
        found |= {"peers": peer_table(comparison), "peer verdict": comparison.peer_verdict}
    claims = tuple(
        f"{finding.claim}: {'yes' if finding.holds else '**no**'}; {finding.measured}"
        for finding in comparison.findings
    )
    return found | {"findings": claims, "remarks": comparison.remarks}


def short_table(comparison: Comparison) -> Table:
    """Each way of decoding, the coarse layers of the default, and the best setting of each peer within their bits."""
    titles = {
        "naive": "naive",
        "dynamic": "robust, with side information",
        "published": "robust, published decoder",
        "recovered": "robust, `recovered`",
        "calibrated": "**robust, `calibrated`** (default)",
    }
    ours = [
        (titles[report.scheme], report.bits(report.groups[-1]), report.groups[-1].metrics)
        for report in comparison.schemes
    ]
    default = comparison.scheme("calibrated")
    coarse = default.groups[0]
    budget = default.bits(coarse)
    ours.append((f"**the same, {coarse.label}**", budget, coarse.metrics))
    best = best_within(comparison.peers, budget).values()
    rows = [*ours, *((peer.name, peer.bits, peer.metrics) for peer in best if peer)]
    return Table.of(
        "Held-out episodes; MSE in normalised units²; position error in mm, where actions have such a unit",
        (
            {"tokens": name, "bits a step": f"{bits:.0f}", "MSE": short(found["action_mse"])}
            | ({"mm": short(found["position_mm"])} if "position_mm" in found else {})
            for name, bits, found in rows
        ),
    )


def summary_table(comparison: Comparison) -> Table:
    """Every scheme with all, coarse and fine layers; the autoencoders without a quantiser below."""
    lines = [
        (SCHEME_TITLES[report.scheme], row.label, f"{report.bits(row):.0f}", row.metrics)
        for report in comparison.schemes
        for row in sorted(report.groups, key=lambda row: row is not report.groups[-1])
    ]
    for kind, metrics in comparison.unquantised.items():
        lines.append((UNQUANTISED_TITLES.get(kind, f"{kind}, no quantiser"), _NONE, _NONE, metrics))
    return Table.of(
        f"Held-out episodes, {_spread_words(comparison)}",
        (
            {"decoding": name, "layers": layers, "bits/step": bits, **_errors(metrics)}
            for name, layers, bits, metrics in lines
        ),
    )


def layer_table(report: SchemeReport) -> Table:
    """One scheme layer by layer: what the layer is given and holds, and the error of decoding up to it."""
    prefixes = [row.label for row in report.prefixes]
    lines = [(f"L{layer}", row) for layer, row in enumerate(report.prefixes)]
    lines += [(row.label, row) for row in report.groups]
    behind_coarse = f", {report.groups[0].label} at their mean"
    return Table.of(
        f"{SCHEME_TITLES[report.scheme]}, layer by layer",
        (
            {
                "layer": name,
                "residual std at the input": number(row.metrics["residual_std"]),
                "levels used, lowest … highest": " ".join(f"{100 * share.mean:.0f}" for share in row.level_share)
                + " %",
                "entropy, bits/step": number(row.metrics["entropy_bits"]),
                "decoded": row.label + ("" if row.label in prefixes else behind_coarse),
                "latent MSE": number(row.metrics["latent_mse"]),
                **_errors(row.metrics),
            }
            for name, row in lines
        ),
    )


def peer_table(comparison: Comparison) -> Table:
    """Peers and ours by bits per step."""
    lines = [
        (
            peer.bits,
            f"{peer.family}: {peer.name}" + (" (partial)" if peer.partial else ""),
            bits_text(peer),
            peer.metrics,
        )
        for peer in comparison.peers
    ]
    for report in comparison.schemes:
        if report.scheme != "published":
            for row in report.prefixes:
                bits = report.bits(row)
                lines.append((bits, f"**{report.scheme} {row.label}**", f"{bits:.1f}", row.metrics))
    lines.sort(key=lambda line: line[0])
    return Table.of(
        f"By bits per step, {_spread_words(comparison)}",
        ({"tokenizer": name, "bits/step": bits, **_errors(metrics, _PEER_ERRORS)} for _, name, bits, metrics in lines),
    )


def findings_table(comparison: Comparison) -> Table:
    """Each claim, what was measured, and whether it holds."""
    rows = tuple((said(found), found.measured, "holds" if found.holds else "FAILS") for found in comparison.findings)
    return Table("What the numbers say", ("claim", "measured", ""), rows)


def said(finding: Finding) -> str:
    """The claim as the figures have it."""
    return finding.claim if finding.holds else f"NOT so: {finding.claim}"


def number(spread: Spread) -> str:
    """Mean and standard deviation over the seeds, the mean alone where there is one seed or all agree."""
    mean, deviation = spread.mean, spread.deviation
    if not deviation:
        return _plain(mean, 3) if mean == 0 or 1e-3 <= abs(mean) < 1e4 else f"{mean:.2e}"
    if 1e-2 <= abs(mean) < 1e4:
        return f"{_plain(mean, 3)} ± {_plain(deviation, 1)}"
    exponent = int(f"{mean:.2e}".split("e")[1])
    return f"({mean / 10.0**exponent:.2f} ± {deviation / 10.0**exponent:.2f})e{exponent}"


def _plain(value: float, digits: int) -> str:
    """So many significant digits, without an exponent."""
    return np.format_float_positional(value, precision=digits, unique=False, fractional=False, trim="-")


def bits_text(peer: CodecReport) -> str:
    """Bits per step; the spread only where it depends on the seed."""
    bits = peer.metrics["bits_per_step"]
    return f"{bits.mean:.1f}" if bits.deviation < 0.05 else f"{bits.mean:.1f} ± {bits.deviation:.1f}"


def short(value: Spread) -> str:
    """Two digits of the mean; 2.7e−6 rather than 2.7e-06, with a minus that no line ends at."""
    if value.mean >= 1e-2:
        return f"{value.mean:.2g}" if value.mean < 100 else f"{value.mean:.0f}"
    return f"{value.mean:.1e}".replace("e-0", "e−").replace("e-", "e−")


def _errors(metrics: Metrics, names: Iterable[str] = _ERRORS) -> dict[str, str]:
    return {_ERRORS[name]: number(metrics[name]) for name in names if name in metrics}


def _spread_words(comparison: Comparison) -> str:
    counts = {len(report.checkpoints) for report in comparison.schemes}
    return "one checkpoint each, no spread" if counts == {1} else "mean ± standard deviation over the training seeds"
