"""The picture of a closed-loop run."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rfsq.evidence.cells import RAW
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.rollout_report import POOLED, TOLERANCES, TaskReport, cells_of
from rfsq.runtime.bundle.writing import replacing

_COLOURS = {RAW: "#222222", "naive": "#d9730d", "published decoder": "#b3261e", "recovered decoder": "#2a8c55"}
_BLUES = ("#a9cdec", "#7db3e0", "#4d94cf", "#2f7dc0", "#1f6fb4")
_OTHERS = ("#7b4fa3", "#b58900", "#0f8b8d", "#c2185b", "#5d4037", "#455a64")


def draw(reports: dict[str, TaskReport], path: Path) -> None:
    """Above: success of every task and cell with its interval; below: success against tolerance, where it is measured.

    Written through a temporary sibling. Raises EvidenceError where it cannot be written.
    """
    tasks = {task: report for task, report in reports.items() if task != POOLED}
    cells = cells_of(tasks)
    colours = _colours(cells)
    figure = Figure(figsize=(max(6.4, 4.2 * len(tasks)), 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_2d(figure.subplots(2, len(tasks), squeeze=False))
    for column, (task, report) in enumerate(tasks.items()):
        _success(axes[0, column], task, report, cells, colours, named=column == 0)
        _tolerance(axes[1, column], report, colours)
    lines = {line.get_label(): line for axis in axes[1] for line in axis.get_legend_handles_labels()[0]}
    if lines:
        figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)
    except OSError as error:
        raise EvidenceError(f"cannot write {path}: {error.strerror}; choose another --results") from error


def _colours(cells: list[str]) -> dict[str, str]:
    blues, others = iter(_BLUES), iter(_OTHERS * 3)
    return {
        cell: _COLOURS.get(cell) or (next(blues, _BLUES[-1]) if cell.startswith("calibrated") else next(others))
        for cell in cells
    }


def _success(
    axes: Axes, task: str, report: TaskReport, cells: list[str], colours: dict[str, str], *, named: bool
) -> None:
    for row, cell in enumerate(cells):
        if cell not in report.cells:
            continue
        rate = report.cells[cell].success
        axes.plot([100 * rate.low, 100 * rate.high], [row, row], color=colours[cell], linewidth=2)
        axes.plot([100 * rate.rate], [row], "o", color=colours[cell])
    axes.set_yticks(range(len(cells)), cells if named else [""] * len(cells), fontsize=8)
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.set_xlim(-3, 103)
    axes.set_title(report.title(task), fontsize=10)
    axes.set_xlabel("success in %, 95 % Wilson interval", fontsize=8)
    axes.grid(axis="x", color="#e3e3e3")


def _tolerance(axes: Axes, report: TaskReport, colours: dict[str, str]) -> None:
    measured = {cell: found for cell, found in report.cells.items() if found.tolerances}
    if not measured:
        axes.set_axis_off()
        return
    for cell, found in measured.items():
        rates = [100 * rate.rate for rate in found.tolerances]
        axes.plot(TOLERANCES, rates, color=colours[cell], label=cell, linewidth=1.5)
    for tolerance in report.separating_mm:
        axes.axvline(tolerance, color="#222222", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set_ylim(-3, 103)
    axes.set_xlabel("tolerance in mm", fontsize=8)
    axes.set_ylabel("solved within it, in %", fontsize=8)
    axes.grid(color="#e3e3e3")
