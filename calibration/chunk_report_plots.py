"""The picture of what chunk tokens are worth: errors against bits, and the use of classes."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rfsq.calibration.chunk_report import ChunkReport, ClassKind, PrefixReport
from rfsq.rfsq_ref.drawing import BLUE, GREEN, GREY, ORANGE, RED, finish, new_figure
from rfsq.runtime.bundle.paths import counted

_COLOURS = {ClassKind.LEARNED: BLUE, ClassKind.BROAD: ORANGE, ClassKind.ESCAPE: RED}


def draw_chunk_report(report: ChunkReport) -> Figure:
    """Four panels: squared error and largest errors against bits a step, share and error of each class."""
    figure = new_figure(
        15.5,
        f"chunk tokens: {counted(report.num_episodes, 'episode')}, {counted(report.num_windows, 'window')} of "
        f"{report.source}",
    )
    panels = figure.subplots(4, 1)
    for axes, draw in zip(panels, (_draw_mse, _draw_errors, _draw_shares, _draw_class_errors), strict=True):
        draw(axes, report)
    return figure


def _draw_mse(axes: Axes, report: ChunkReport) -> None:
    axes.set_yscale("log")
    bits, errors = [row.bits_per_step for row in report.prefixes], [row.mse for row in report.prefixes]
    axes.plot(bits, errors, color=BLUE, marker="o", linewidth=2)
    for row in report.prefixes:
        axes.annotate(
            f"{row.num_tokens}", (row.bits_per_step, row.mse), xytext=(4, 4), textcoords="offset points", fontsize=8
        )
    finish(axes, "Action MSE, normalised units², by number of tokens", x="bits a step", legend=0)


def _draw_errors(axes: Axes, report: ChunkReport) -> None:
    axes.set_yscale("log")

    def worst(values: Callable[[PrefixReport], tuple[float, ...] | None]) -> tuple[list[float], list[float]]:
        """Bits, and the largest over the dimensions in normalised units, where there is one."""
        found = [(row.bits_per_step, values(row)) for row in report.prefixes]
        units = report.fidelity.unit
        kept = [
            (bits, max(error / unit for error, unit in zip(errors, units, strict=True)))
            for bits, errors in found
            if errors is not None
        ]
        return [bits for bits, _ in kept], [error for _, error in kept]

    # No line: between these numbers of tokens nothing is bounded.
    axes.plot(*worst(lambda row: row.bound), color=GREY, linestyle="", marker="D", label="bound")
    axes.plot(*worst(lambda row: row.largest), color=ORANGE, marker="v", label="largest")
    axes.plot(*worst(lambda row: row.p99), color=GREEN, marker="s", markersize=4, label="99 % below")
    axes.plot(*worst(lambda row: row.rms), color=BLUE, marker="o", linewidth=2, label="RMS")
    within = ", the bound of those within the range" if report.clipped else ""
    finish(axes, f"Error of the worst dimension, normalised units{within}", x="bits a step", legend=4)


def _draw_shares(axes: Axes, report: ChunkReport) -> None:
    for kind in ClassKind:
        places = [index for index, row in enumerate(report.classes) if row.kind is kind]
        shares = [100 * report.classes[index].share for index in places]
        axes.bar(places, shares, color=_COLOURS[kind], label=kind.value)
    axes.set_xlim(-1, len(report.classes))
    finish(axes, "Share of the windows that a class codes, %", x="class", legend=3, grid="y")


def _draw_class_errors(axes: Axes, report: ChunkReport) -> None:
    axes.set_yscale("log")
    shown = sorted({0, len(report.prefixes) // 2, len(report.prefixes) - 1})
    used = [(index, row) for index, row in enumerate(report.classes) if row.mse]
    for place, marker in zip(shown, "ovs", strict=False):
        count = report.prefixes[place].num_tokens
        axes.scatter(
            [index for index, _ in used],
            [row.mse[place] for _, row in used],
            c=[_COLOURS[row.kind] for _, row in used],
            marker=marker, s=14, label=counted(count, "token"),
        )  # fmt: skip
    axes.set_xlim(-1, len(report.classes))
    finish(axes, "Action MSE of each class, normalised units²", x="class", legend=3, grid="y")
