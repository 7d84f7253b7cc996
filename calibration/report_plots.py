"""The picture of what a fit is worth, layer by layer."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rfsq.calibration.report import CalibrationReport
from rfsq.rfsq_ref.drawing import BLUE, GREEN, GREY, INK, ORANGE, finish, new_figure


def draw_report(report: CalibrationReport) -> Figure:
    """Three panels: action error by prefix, latent scales by layer, shares by layer."""
    figure = new_figure(
        12.5, f"{report.method}: {report.num_episodes} episodes, {report.num_steps} steps of {report.source}"
    )
    errors, scales, shares = figure.subplots(3, 1)
    names = [f"L{row.layer}" for row in report.layers]
    _draw_errors(errors, report)
    _draw_scales(scales, report)
    _draw_shares(shares, report)
    for axes in (errors, scales, shares):
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
    return figure


def _points(values: list[float | None]) -> tuple[list[int], list[float]]:
    """Places and values of what is there and can be drawn on a logarithmic axis."""
    found = [(place, value) for place, value in enumerate(values) if value is not None and value > 0]
    return [place for place, _ in found], [value for _, value in found]


def _draw_errors(axes: Axes, report: CalibrationReport) -> None:
    axes.set_yscale("log")
    axes.plot(*_points(list(report.trained_mse)), color=GREY, marker="s", markersize=4, label="trained forward pass")
    axes.plot(
        *_points([row.action_mse for row in report.layers]),
        color=BLUE, marker="o", linewidth=2, label=f"{report.method}, tokens alone",
    )  # fmt: skip
    if report.autoencoder_mse > 0:
        axes.axhline(report.autoencoder_mse, color=GREEN, linestyle="--", linewidth=1.2, label="without quantiser")
    if report.published_mse > 0:
        axes.axhline(report.published_mse, color=ORANGE, linestyle=":", linewidth=1.5, label="published decoding")
    finish(axes, "Action MSE of a prefix, robot units²", legend=2, grid="y")


def _draw_scales(axes: Axes, report: CalibrationReport) -> None:
    axes.set_yscale("log")
    rows = report.layers
    axes.plot(*_points([row.worst_case for row in rows]), color=ORANGE, marker="v", label="worst case in [−1, 1]")
    root_mse = [None if row.latent_mse is None else row.latent_mse**0.5 for row in rows]
    axes.plot(*_points(root_mse), color=BLUE, marker="o", linewidth=2, label="RMS on the data")
    axes.plot(*_points([row.bin_width for row in rows]), color=INK, marker="_", markersize=12, linewidth=0.8,
              label="bin width")  # fmt: skip
    noise = [None if row.noise_bound is None else row.noise_bound * row.bin_width for row in rows]
    axes.plot(*_points(noise), color=GREY, linestyle="--", label="float32 error bound")
    finish(axes, "Latent error after the layer", legend=2, grid="y")


def _draw_shares(axes: Axes, report: CalibrationReport) -> None:
    rows = report.layers
    places = range(len(rows))
    axes.bar(
        places,
        [row.levels_used for row in rows],
        width=0.62,
        color="#b9d4ec",
        label="levels used; above: clipped share, float32 flips",
    )
    axes.set_ylim(0, 1.15)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    for place, row in zip(places, rows, strict=True):
        flipped = f"{row.flipped:.0e}" if row.flipped else "0"
        axes.annotate(
            f"{row.clipped:.2%}\n{flipped}", (place, row.levels_used), xytext=(0, 3), textcoords="offset points",
            ha="center", va="bottom", fontsize=7, color=INK,
        )  # fmt: skip
    finish(axes, "Share of the levels used", legend=1, grid="y")
