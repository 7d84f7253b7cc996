"""The picture of how honest beliefs are: a reliability diagram, and shares of actions within the spread."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rfsq.calibration.beliefs import WITHIN_ONE, WITHIN_TWO, BeliefReport
from rfsq.rfsq_ref.drawing import BLUE, GREY, ORANGE, finish, new_figure
from rfsq.runtime.bundle.paths import counted


def draw_belief_report(report: BeliefReport) -> Figure:
    figure = new_figure(8.5, f"beliefs: {counted(report.episodes, 'episode')}, each judged by a fit that leaves it out")
    above, below = figure.subplots(2, 1)
    _draw_reliability(above, report)
    _draw_spreads(below, report)
    return figure


def _draw_reliability(axes: Axes, report: BeliefReport) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="honest")
    for found, colour, label in zip(report.reliability, (ORANGE, BLUE), ("as it is", "with temperatures"), strict=True):
        axes.plot(found.confidence, found.accuracy, color=colour, marker="o", markersize=4, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share that is right", fontsize=10)
    finish(axes, "How often the likeliest is right", x="probability that the policy gives it", legend=3)


def _draw_spreads(axes: Axes, report: BeliefReport) -> None:
    names = []
    for place, spread in enumerate(report.spreads):
        for offset, shares in enumerate((spread.within_one, spread.within_two)):
            x = 3 * place + 1.2 * offset
            names.append((x, f"{spread.mode}\nwithin {offset + 1} std"))
            for side, (share, colour) in enumerate(zip(shares, (ORANGE, BLUE), strict=True)):
                label = ("as it is", "with temperatures and scales")[side] if not place and not offset else None
                axes.bar(x + 0.4 * side - 0.2, 100 * share, 0.38, color=colour, label=label)
            honest = 100 * (WITHIN_ONE, WITHIN_TWO)[offset]
            axes.plot([x - 0.45, x + 0.45], [honest, honest], color=GREY, linestyle="--")
    axes.set_xticks([x for x, _ in names], [name for _, name in names], fontsize=8)
    axes.set_ylim(0, 105)
    finish(axes, "Recorded actions within the standard deviation, %", legend=2, grid="y")
