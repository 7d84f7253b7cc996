"""How pictures look: one width, the same colours, axes without a frame."""

from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rfsq.runtime.bundle.paths import replacing

INK, GREY, GRID = "#222222", "#8a8a8a", "#e3e3e3"
BLUE, ORANGE, GREEN, RED = "#1f6fb4", "#d9730d", "#2a8c55", "#b3261e"
#: Of every picture, in inches: its text can be read where it is made as narrow as a phone.
WIDTH = 6.4


def new_figure(height: float, title: str = "") -> Figure:
    """An empty figure, `height` inches high, with a bold title where one is given."""
    figure = Figure(figsize=(WIDTH, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha="left", fontweight="bold")
    return figure


def new_chart(height: float, *, log: Literal["x", "y"] = "y") -> tuple[Figure, Axes]:
    """A figure with one pair of axes, of which `log` is logarithmic."""
    figure = new_figure(height)
    axes = figure.subplots()
    (axes.set_yscale if log == "y" else axes.set_xscale)("log")
    return figure, axes


def save_png(figure: Figure, path: Path, error: type[Exception]) -> None:
    """Write a figure; equal figures give equal files. Raises `error` where it cannot be written."""
    with replacing(path, error=error) as temporary:
        # Without the version that matplotlib would write.
        figure.savefig(temporary, format="png", metadata={"Software": None})


def finish(axes: Axes, title: str, *, x: str = "", legend: int = 2, grid: Literal["both", "x", "y"] = "both") -> None:
    """Give axes that are drawn their title, grid and ticks. x: title of the x axis; legend: its columns, 0 for none."""
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    if x:
        axes.set_xlabel(x, color=INK, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    if legend:
        axes.legend(
            fontsize=9, frameon=False, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=legend
        )
