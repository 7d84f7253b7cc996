"""A comparison as tables: for the terminal, for Markdown, for the page."""

from collections.abc import Sequence

import numpy as np

from rfsq.calibration.tables import Table
from rfsq.evidence.findings import AS_TRAINED, REFITTED
from rfsq.evidence.results import CodecReport, Comparison, Finding, Metrics, ReportRow, SchemeReport, Spread

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
_PHYSICAL = (
    ("position mm", "position_mm"),
    ("p99 mm", "position_mm_p99"),
    ("rotation °", "rotation_deg"),
    ("p99 °", "rotation_deg_p99"),
    ("wrong gripper sign, share", "gripper_sign_errors"),
)
_NONE = "–"
_MSE, _LARGEST = "action MSE, normalised units²", "max error, normalised units"


def summary_table(comparison: Comparison) -> Table:
    """Every scheme with all, coarse and fine layers; the autoencoders without a quantiser below."""
    physical = [(title, name) for title, name in _PHYSICAL if comparison.data.physical]
    rows = []
    for report in comparison.schemes:
        for row in sorted(report.groups, key=lambda row: row is not report.groups[-1]):
            bits = _group_layers(report, row) * report.bits_per_layer
            rows.append((SCHEME_TITLES[report.scheme], row.label, f"{bits:.0f}", *_errors(row.metrics, physical)))
    for kind, metrics in comparison.unquantised.items():
        rows.append((UNQUANTISED_TITLES.get(kind, f"{kind}, no quantiser"), _NONE, _NONE, *_errors(metrics, physical)))
    header = ("decoding", "layers", "bits/step", _MSE, _LARGEST, *(title for title, _ in physical))
    return Table(f"Held-out episodes, {_spread_words(comparison)}", header, tuple(rows))


def layer_table(report: SchemeReport, comparison: Comparison) -> Table:
    """One scheme layer by layer: what the layer is given and holds, and the error of decoding up to it."""
    physical = [(title, name) for title, name in _PHYSICAL if comparison.data.physical]
    header = (
        "layer", "residual std at the input", "levels used, lowest … highest", "entropy, bits/step", "decoded",
        "latent MSE", _MSE, _LARGEST, *(title for title, _ in physical),
    )  # fmt: skip
    prefixes = [row.label for row in report.prefixes]
    rows = []
    for layer, row in enumerate(report.prefixes):
        rows.append(
            (f"L{layer}", *_use(row), row.label, number(row.metrics["latent_mse"]), *_errors(row.metrics, physical))
        )
    for row in report.groups:
        rows.append(
            (
                row.label,
                *_use(row),
                row.label if row.label in prefixes else f"{row.label}, {report.groups[0].label} at their mean",
                number(row.metrics["latent_mse"]),
                *_errors(row.metrics, physical),
            )
        )
    return Table(f"{SCHEME_TITLES[report.scheme]}, layer by layer", header, tuple(rows))


def peer_table(comparison: Comparison) -> Table:
    """Peers and ours by bits per step."""
    physical = [(title, name) for title, name in _PHYSICAL[:2] if comparison.data.physical]
    lines: list[tuple[float, tuple[str, ...]]] = []
    for peer in comparison.peers:
        name = f"{peer.family}: {peer.name}" + (" (partial)" if peer.partial else "")
        lines.append((peer.metrics["bits_per_step"].mean, (name, bits_text(peer), *_errors(peer.metrics, physical))))
    for report in comparison.schemes:
        if report.scheme != "published":
            for layers, row in enumerate(report.prefixes, start=1):
                bits = layers * report.bits_per_layer
                lines.append(
                    (bits, (f"**{report.scheme} {row.label}**", f"{bits:.1f}", *_errors(row.metrics, physical)))
                )
    header = ("tokenizer", "bits/step", _MSE, _LARGEST, *(title for title, _ in physical))
    ordered = tuple(line for _, line in sorted(lines, key=lambda line: line[0]))
    return Table(f"By bits per step, {_spread_words(comparison)}", header, ordered)


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


def _errors(metrics: Metrics, physical: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(number(metrics[name]) for name in ("action_mse", "max_error", *(name for _, name in physical)))


def _use(row: ReportRow) -> tuple[str, str, str]:
    shares = " ".join(f"{100 * share.mean:.0f}" for share in row.level_share)
    return number(row.metrics["residual_std"]), f"{shares} %", number(row.metrics["entropy_bits"])


def _group_layers(report: SchemeReport, row: ReportRow) -> int:
    """How many layers a group has, from the prefix labels."""
    labels = [prefix.label for prefix in report.prefixes]
    return (
        labels.index(row.label) + 1 if row.label in labels else len(labels) - labels.index(report.groups[0].label) - 1
    )


def _spread_words(comparison: Comparison) -> str:
    counts = {len(report.checkpoints) for report in comparison.schemes}
    return "one checkpoint each, no spread" if counts == {1} else "mean ± standard deviation over the training seeds"
