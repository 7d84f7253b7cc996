"""The figures of a comparison, as matplotlib figures and as SVG for the page."""

import io
from collections.abc import Iterable, Sequence
from itertools import cycle

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rfsq.evidence.chunk_codec import FAMILY
from rfsq.evidence.chunk_results import ChunkComparison, by_family
from rfsq.evidence.results import CodecReport, Comparison, Spread
from rfsq.evidence.tables import UNQUANTISED_TITLES
from rfsq.rfsq_ref.drawing import BLUE, GREEN, GREY, INK, ORANGE, RED, finish, new_chart, new_figure

SCHEME_COLOURS = {
    "naive": ORANGE,
    "dynamic": GREY,
    "published": RED,
    "recovered": GREEN,
    "calibrated": BLUE,
}
_PEER_COLOURS = ("#7b4fa3", "#c39bd3", "#b58900", "#e0c060", "#0f8b8d", "#76c7c7", "#c2185b", "#8d6e63", "#455a64")
_DIMENSIONS = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
_TINY = 1e-12
_MSE = ("action_mse", "Action MSE, normalised units²")


def figures(
    comparison: Comparison, beside: tuple[ChunkComparison, Sequence[CodecReport]] | None = None
) -> dict[str, Figure]:
    """By name, in the order of the page. beside: what `chunk_results.read_beside` found."""
    drawn = {
        "error by layer": error_by_layer(comparison),
        "residual decay": residual_decay(comparison),
        "level use": level_use(comparison),
        "error histograms": error_histograms(comparison),
        "trajectories": trajectories(comparison),
    }
    if comparison.curves:
        drawn["learning curves"] = learning_curves(comparison)
    if beside:
        drawn["chunk tokens"] = chunk_tokens(*beside)
    if comparison.peers:
        drawn["choice"] = choice(comparison, beside[0] if beside else None)
        drawn["peers"] = peers(comparison)
    return drawn


def svg(figure: Figure) -> str:
    """As an <svg> element; equal figures give equal text."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "rfsq", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def error_by_layer(comparison: Comparison) -> Figure:
    """Action MSE of every prefix, a band from the lowest to the highest seed."""
    figure, axes = new_chart(4.6)
    for report in comparison.schemes:
        _line(axes, report.scheme, [row.metrics["action_mse"] for row in report.prefixes])
    for (name, metrics), style in zip(comparison.unquantised.items(), (":", "--", "-."), strict=False):
        label = UNQUANTISED_TITLES.get(name, f"{name}, no quantiser")
        axes.axhline(metrics["action_mse"].mean, color=INK, linestyle=style, linewidth=1, label=label)
    finish(axes, "Action MSE in normalised units², held-out episodes", x="decoded up to layer")
    return figure


def residual_decay(comparison: Comparison) -> Figure:
    """Standard deviation of what every layer is given; published and recovered tokens are those of `dynamic`."""
    figure, axes = new_chart(4.2)
    for report in comparison.schemes:
        if report.scheme not in ("published", "recovered"):
            _line(axes, report.scheme, [row.metrics["residual_std"] for row in report.prefixes])
    finish(axes, "Residual standard deviation at the layer's input", x="layer")
    return figure


def level_use(comparison: Comparison) -> Figure:
    """How often each level is used: one small chart per layer, a column per kind of tokens."""
    reports = [report for report in comparison.schemes if report.scheme not in ("published", "recovered")]
    count = max(len(report.prefixes) for report in reports)
    figure = new_figure(0.75 * count + 0.5)
    grid = figure.subplots(count, len(reports), squeeze=False, sharey=True)
    for line, report in zip(grid.T, reports, strict=True):
        for layer, axes in enumerate(line):
            if layer >= len(report.prefixes):
                axes.set_axis_off()
                continue
            row = report.prefixes[layer]
            shares = [share.mean for share in row.level_share]
            axes.bar(range(len(shares)), shares, color=SCHEME_COLOURS[report.scheme], width=0.85)
            axes.set_ylim(0, 1)
            axes.set_xticks([])
            axes.set_yticks([0, 1], ["0", "100 %"])
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=9, colors=INK)
            axes.text(0.98, 0.72, f"L{layer}, {row.metrics['entropy_bits'].mean:.0f} bits", fontsize=9, color=INK,
                      ha="right", transform=axes.transAxes)  # fmt: skip
        line[0].set_title(report.scheme, fontsize=10, color=INK)
    return figure


def error_histograms(comparison: Comparison) -> Figure:
    """Where the absolute errors of single action values lie, all layers decoded."""
    figure, axes = new_chart(4.2, log="x")
    for report in comparison.schemes:
        axes.stairs(
            [100 * share for share in report.error_share], comparison.error_edges, color=SCHEME_COLOURS[report.scheme],
            linewidth=1.8, label=report.scheme,
        )  # fmt: skip
    axes.set_ylabel("% of action values", color=INK, fontsize=10)
    finish(axes, "Absolute error of all layers", x="|error|, normalised units")
    return figure


def trajectories(comparison: Comparison) -> Figure:
    """One held-out episode: recorded, and decoded by the schemes whose tokens travel alone."""
    trajectory = comparison.trajectory
    recorded = np.array(trajectory.recorded)
    columns = min(recorded.shape[1], 2)
    rows = -(-recorded.shape[1] // columns)
    figure = new_figure(1.7 * rows + 0.8)
    grid = figure.subplots(rows, columns, squeeze=False)
    for dimension, axes in enumerate(grid.flat):
        if dimension >= recorded.shape[1]:
            axes.set_axis_off()
            continue
        for name, actions in trajectory.decoded.items():
            scheme, layers = name.split(", ")
            if name == "calibrated, L0" or (layers != "L0" and scheme != "dynamic"):
                axes.plot(
                    np.array(actions)[:, dimension], color=SCHEME_COLOURS[scheme], linewidth=1.1, alpha=0.9,
                    label=name, linestyle=":" if layers == "L0" else "-",
                )  # fmt: skip
        axes.plot(recorded[:, dimension], color=INK, linewidth=0.9, linestyle="--", label="recorded")
        low, high = recorded[:, dimension].min(), recorded[:, dimension].max()
        margin = 0.25 * max(high - low, 0.2 * float(np.abs(recorded).max()), _TINY)
        # What is published runs far out of the picture.
        axes.set_ylim(low - margin, high + margin)
        named = recorded.shape[1] == len(_DIMENSIONS)
        axes.set_title(_DIMENSIONS[dimension] if named else f"dimension {dimension}", fontsize=9, color=INK, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, colors=INK)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    return figure


def learning_curves(comparison: Comparison) -> Figure:
    """Training and validation error of every training; a dot where the weights were kept."""
    figure, axes = new_chart(4.4)
    for name, curve in comparison.curves.items():
        colour = SCHEME_COLOURS["naive" if name.startswith("naive") else "calibrated"]
        epochs = range(1, len(curve.train) + 1)
        axes.plot(epochs, curve.train, color=colour, linewidth=0.8, linestyle=":")
        axes.plot(epochs, curve.validation, color=colour, linewidth=1.1, label=f"{name}, validation")
        axes.plot(curve.kept_epoch, curve.validation[curve.kept_epoch - 1], color=colour, marker="o", markersize=5)
    finish(axes, "MSE in normalised units², in training (dotted) and on validation episodes", x="epoch")
    return figure


def peers(comparison: Comparison) -> Figure:
    """Action MSE, and millimetres where they apply, against bits per step."""
    metrics = [_MSE]
    if comparison.data.physical:
        metrics.append(("position_mm", "Mean position error, mm"))
    figure = new_figure(5.0 * len(metrics))
    for axes, (name, title) in zip(figure.subplots(len(metrics), 1, squeeze=False).flat, metrics, strict=True):
        axes.loglog()
        series = dict.fromkeys(peer.series for peer in comparison.peers)
        for joined, colour in zip(series, cycle(_PEER_COLOURS)):
            _peer_curve(axes, [peer for peer in comparison.peers if peer.series == joined], name, colour)
        for report in comparison.schemes:
            if report.scheme != "published":
                bits = [report.bits(row) for row in report.prefixes]
                values = [row.metrics[name] for row in report.prefixes]
                axes.plot(
                    bits, [value.mean for value in values], color=SCHEME_COLOURS[report.scheme], marker="o",
                    markersize=4, linewidth=2.2 if report.scheme == "calibrated" else 1.3, label=report.scheme,
                )  # fmt: skip
        finish(axes, title, x="bits per step")
    return figure


def chunk_tokens(found: ChunkComparison, others: Sequence[CodecReport] = ()) -> Figure:
    """Action MSE against bits a step: the setting of each family that is best within each budget."""
    figure, axes = new_chart(5.0)
    axes.plot(found.budgets, found.gaussian, color=INK, linestyle="--", linewidth=1, label="one Gaussian's bound")
    colours = cycle(_PEER_COLOURS)
    for family, best in by_family(found, (*found.reports, *others)):
        points = list({report.name: report for report in best if report}.values())
        is_ours = family == FAMILY
        axes.plot(
            [report.bits for report in points], [max(report.mse, _TINY) for report in points],
            color=BLUE if is_ours else next(colours), marker="o", markersize=4, linewidth=2.2 if is_ours else 1.2,
            label=family,
        )  # fmt: skip
    finish(axes, f"Action MSE in normalised units², {found.judged} episodes", x="bits per step")
    return figure


def choice(comparison: Comparison, found: ChunkComparison | None = None) -> Figure:
    """What each tokenizer reaches within so many bits of a step: of its settings those that no cheaper one beats.

    found: codecs of chunks, which take the place of the comparison's peers of their families. Where they were judged on
    other episodes than the comparison's, the names of its tokenizers say so.
    """
    name, title = ("position_mm", "Mean position error, mm") if comparison.data.physical else _MSE
    chunks = () if found is None else found.reports
    taken = {report.family for report in chunks}
    others: dict[str, list[tuple[float, float]]] = {}
    for report in (*chunks, *(peer for peer in comparison.peers if peer.family not in taken)):
        others.setdefault(report.family, []).append((report.bits, report.metrics[name].mean))
    ours = {
        f"per-step tokens, {report.scheme}": [(report.bits(row), row.metrics[name].mean) for row in report.prefixes]
        for report in map(comparison.scheme, ("recovered", "calibrated"))
    }
    colours = dict(zip(ours, (GREEN, ORANGE), strict=True)) | {FAMILY: BLUE}
    spare = cycle(_PEER_COLOURS)
    figure, axes = new_chart(4.8)
    axes.set_xscale("log")
    for family, points in (others | ours).items():
        bits, errors = zip(*unbeaten(points), strict=True)
        colour, width = (colours[family], 2.2) if family in colours else (next(spare), 1.2)
        note = "" if family in taken or found is None or found.judged == "test" else " (test)"
        axes.plot(
            bits, [max(error, _TINY) for error in errors], color=colour, marker="o", markersize=4, linewidth=width,
            label=family + note,
        )  # fmt: skip
    ticks = (2, 5, 10, 20, 50, 100, 200, 400)
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    finish(axes, f"{title}, {'test' if found is None else found.judged} episodes", x="bits per step")
    return figure


def unbeaten(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (bits, error) those with less error than all that take fewer bits, by bits.

    >>> unbeaten([(20, 0.2), (5, 0.5), (10, 0.6), (30, 0.2)])
    [(5, 0.5), (20, 0.2)]
    """
    found: list[tuple[float, float]] = []
    for bits, error in sorted(points):
        if not found or error < found[-1][1]:
            found.append((bits, error))
    return found


def _peer_curve(axes: Axes, points: Sequence[CodecReport], metric: str, colour: str) -> None:
    """One series; hollow where a part of another setting's tokens is decoded."""
    bits = [peer.bits for peer in points]
    values = [max(peer.metrics[metric].mean, _TINY) for peer in points]
    axes.plot(bits, values, color=colour, linewidth=1.1, label=points[0].series)
    for peer, place, value in zip(points, bits, values, strict=True):
        axes.plot(place, value, color=colour, marker="s", markersize=4, fillstyle="none" if peer.partial else "full")


def _line(axes: Axes, scheme: str, values: Sequence[Spread]) -> None:
    places = range(len(values))
    colour = SCHEME_COLOURS[scheme]
    axes.plot(places, [max(value.mean, _TINY) for value in values], color=colour, marker="o", markersize=4,
              linewidth=2 if scheme == "calibrated" else 1.4, label=scheme)  # fmt: skip
    low, high = [max(value.low, _TINY) for value in values], [max(value.high, _TINY) for value in values]
    axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set_xticks(places, [f"L{layer}" for layer in places])
