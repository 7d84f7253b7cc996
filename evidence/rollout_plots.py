"""The picture of a closed-loop run."""

from pathlib import Path

from matplotlib.axes import Axes

from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.rollout_report import CALIBRATED, NAIVE, POOLED, TOLERANCES, TaskReport, cells_of
from rfsq.evidence.rollouts import RAW
from rfsq.rfsq_ref.drawing import BLUE, GREEN, GREY, INK, ORANGE, RED, finish, new_figure, save_png

_COLOURS = {
    RAW: INK, NAIVE: ORANGE, "published decoder": RED, "recovered decoder": GREEN,
    "calibrated, L0": "#7db3e0", CALIBRATED: BLUE,
}  # fmt: skip
#: The cells whose curves are drawn, and how. The others are as good as raw, and would hide each other.
_CURVES = {RAW: "--", NAIVE: "-", "recovered decoder": "-.", "calibrated, L0": ":", CALIBRATED: "-"}
#: Cells that solve fewer scenes than this share of the best one do not stretch the axis.
_COMPARABLE = 0.5


def draw(reports: dict[str, TaskReport], path: Path) -> None:
    """Above: success of every cell with its interval; below, for each task: success against tolerance.

    Above stand all tasks together where they have the same cells, else each task. Written through a temporary sibling.
    Raises EvidenceError where it cannot be written.
    """
    tasks = {task: report for task, report in reports.items() if task != POOLED}
    shown = {POOLED: reports[POOLED]} if POOLED in reports else tasks
    precise = {task: report for task, report in tasks.items() if any(cell.tolerances for cell in report.cells.values())}
    rows = -(-len(precise) // 2)
    heights = [0.6 + 0.24 * sum(len(report.cells) for report in shown.values()), 2.3 * rows + 0.3]
    figure = new_figure(sum(heights))
    grid = figure.add_gridspec(2 if precise else 1, 1, height_ratios=heights if precise else heights[:1])
    above = figure.add_subfigure(grid[0]).subplots(
        len(shown), 1, squeeze=False, height_ratios=[len(found.cells) for found in shown.values()]
    )
    for axes, (task, report) in zip(above.flat, shown.items(), strict=True):
        _success(axes, task, report)
    if precise:
        lower = figure.add_subfigure(grid[1])
        below = list(lower.subplots(rows, 2, squeeze=False, sharey=True).flat)
        for axes, (task, report) in zip(below, precise.items(), strict=False):
            _tolerance(axes, task, report)
        for axes in below[len(precise) :]:
            axes.set_axis_off()
        lines = {line.get_label(): line for axes in below for line in axes.get_legend_handles_labels()[0]}
        lower.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save_png(figure, path, EvidenceError)


def _success(axes: Axes, task: str, report: TaskReport) -> None:
    """The axis begins where the intervals of comparable cells do; the others stand at its edge, with their number."""
    cells = cells_of({task: report})
    rates = {cell: report.cells[cell].success for cell in cells}
    best = max(rate.rate for rate in rates.values())
    edge = min(rate.low for rate in rates.values() if rate.rate >= _COMPARABLE * best)
    left = max(0.0, 100 * edge - 3)
    for row, cell in enumerate(cells):
        rate, colour = rates[cell], _COLOURS.get(cell, GREY)
        if rate.rate < edge:
            axes.text(left, row, f" ◂ {100 * rate.rate:.0f} %", color=colour, va="center", fontsize=9)
            continue
        axes.plot([100 * rate.low, 100 * rate.high], [row, row], color=colour, linewidth=2)
        axes.plot([100 * rate.rate], [row], "o", color=colour)
    axes.set_yticks(range(len(cells)), cells)
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.set_xlim(left, 101)
    finish(axes, f"{report.title(task)}: solved in %, 95 % Wilson interval", legend=0, grid="x")


def _tolerance(axes: Axes, task: str, report: TaskReport) -> None:
    for cell, style in _CURVES.items():
        if cell in report.cells and report.cells[cell].tolerances:
            rates = [100 * rate.rate for rate in report.cells[cell].tolerances]
            axes.plot(TOLERANCES, rates, color=_COLOURS[cell], linestyle=style, linewidth=1.8, label=cell)
    if report.separating_mm:
        # Widened, so that a single tolerance is seen too.
        axes.axvspan(0.97 * min(report.separating_mm), 1.03 * max(report.separating_mm), color="#f3e3d3", zorder=0)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_ylim(-3, 103)
    finish(axes, f"{task}: % solved within mm", legend=0)
