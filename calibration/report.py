"""What a fit is worth, layer by layer: a table to read, report.json and report.png."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rfsq.calibration.constants import worst_case_errors
from rfsq.calibration.data import reference_actions, reference_latents
from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.readout import held_out_warning
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, RecoveredDecoder
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.quantizer import Conditioning, LayerStep, published_dequantize
from rfsq.rfsq_ref.rounding import token_error_bounds
from rfsq.runtime.bundle.fidelity import Fidelity, fidelity
from rfsq.runtime.bundle.paths import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORT_JSON = "report.json"
REPORT_PNG = "report.png"


@dataclass(frozen=True)
class LayerReport:
    """One layer on the judged episodes; latents have no unit, actions are physical, None = does not apply.

    residual_low, residual_high: what the layer is given; clipped: share of it beyond the outermost bins;
    bin_width: smallest over the latents (`dynamic`: mean over steps); levels_used: share of the K * D levels;
    latent_mse, action_mse: of decoding tokens up to this layer, against the latents and actions that went in;
    worst_case: bound on the latent error after this layer for any latent in [-1, 1];
    noise_bound: median bound on the float32 error, in bin widths; flipped: share of tokens that float32 decides
    differently from float64.
    """

    layer: int
    residual_low: float
    residual_high: float
    clipped: float
    bin_width: float
    levels_used: float
    latent_mse: float | None = None
    action_mse: float | None = None
    worst_case: float | None = None
    noise_bound: float | None = None
    flipped: float = 0.0


@dataclass(frozen=True)
class CalibrationReport:
    """Rows of all layers, and mean squared action errors in robot units² to compare them with.

    autoencoder_mse: without a quantiser, as trained; readout_mse: the same through the readout, where there is one;
    trained_mse: the forward pass of training, for `dynamic` with its side information, by prefix; published_mse: grid
    values summed, mean and sigma dropped; fidelity: of the deepest prefix that decodes.
    """

    method: str
    source: str
    num_episodes: int
    num_steps: int
    autoencoder_mse: float
    readout_mse: float | None
    trained_mse: tuple[float, ...]
    published_mse: float
    layers: tuple[LayerReport, ...]
    fidelity: Fidelity


def report_calibrated(checkpoint: Checkpoint, episodes: ActionDataset) -> CalibrationReport:
    """Judge the checkpoint's conditioning constants. CheckpointError when it has none, DataError for other actions."""
    model = checkpoint.model(Conditioning.CALIBRATED, dtype=torch.float64)
    assert checkpoint.constants is not None
    worst_case = worst_case_errors(checkpoint.constants, checkpoint.config.num_levels).tolist()
    return _report("calibrated", checkpoint, model, episodes, dict(enumerate(worst_case, start=1)))


def report_recovered(checkpoint: Checkpoint, episodes: ActionDataset) -> CalibrationReport:
    """Judge the checkpoint's recovered decoders; prefixes without one have no errors of their own.

    CalibrationError when it has none, DataError for other actions.
    """
    if not checkpoint.recovered or checkpoint.trained_with is not Conditioning.DYNAMIC:
        raise CalibrationError(
            f"this checkpoint (trained with {checkpoint.trained_with.value!r}) has {len(checkpoint.recovered)} "
            "recovered decoders; expected a 'dynamic' one with at least one: fit it with --method recovered"
        )
    model = checkpoint.model(dtype=torch.float64)
    reach = {
        prefix: recovered_latent_reach(decoder, checkpoint.config.num_levels) + 1
        for prefix, decoder in checkpoint.recovered.items()
    }
    return _report("recovered", checkpoint, model, episodes, reach)


def recovered_latent_reach(decoder: RecoveredDecoder, num_levels: int) -> float:
    """Largest magnitude of a decoded latent over all tokens there are, reached or not by an encoder."""
    spread = decoder.matrix * (num_levels - 1)
    high = decoder.offset + spread.clamp(min=0).sum(dim=-1)
    low = decoder.offset + spread.clamp(max=0).sum(dim=-1)
    return float(torch.maximum(high.abs(), low.abs()).max())


def _report(
    method: str,
    checkpoint: Checkpoint,
    model: ActionAutoencoder,
    episodes: ActionDataset,
    worst_case: dict[int, float],
) -> CalibrationReport:
    actions = reference_actions(checkpoint, episodes)
    trained = checkpoint.model(dtype=torch.float64)
    with_readout = checkpoint.readout is not None and model.conditioning is Conditioning.CALIBRATED
    with torch.no_grad():
        latents = reference_latents(model, actions)
        steps = list(model.quantizer.layers(latents))
        tokens = torch.stack([step.tokens for step in steps], dim=-1)
        float32_tokens, _ = _as_float32(checkpoint, model).encode(actions.float())
        _, _, bounds = token_error_bounds(model, actions)
        published, stats = trained.encode(actions)

        def action_mse(decoded: Tensor, decoder: ActionAutoencoder = trained) -> float:
            return _mean_square(decoder.decode_latents(decoded) - actions)

        rows: list[LayerReport] = []
        deepest = latents
        for layer, step in enumerate(steps):
            row = _layer_report(model, layer, step)
            prefix = layer + 1
            if model.conditioning is not Conditioning.DYNAMIC or prefix in model.recovered:
                deepest = model.dequantize(tokens[..., :prefix])
                row = replace(row, latent_mse=_mean_square(deepest - latents), action_mse=action_mse(deepest, model))
            rows.append(
                replace(
                    row,
                    worst_case=worst_case.get(prefix),
                    noise_bound=_finite(float(bounds[..., layer].median())),
                    flipped=float((float32_tokens[..., layer] != step.tokens).double().mean()),
                )
            )
        trained_mse = tuple(
            action_mse(
                trained.quantizer.dequantize(published[..., :prefix], None if stats is None else stats[..., :prefix, :])
            )
            for prefix in range(1, len(steps) + 1)
        )
        return CalibrationReport(
            method=method,
            source=episodes.source,
            num_episodes=len(episodes.episodes),
            num_steps=episodes.num_steps,
            autoencoder_mse=action_mse(latents),
            readout_mse=action_mse(latents, model) if with_readout else None,
            trained_mse=trained_mse,
            published_mse=action_mse(published_dequantize(trained.quantizer, published)),
            layers=tuple(rows),
            fidelity=fidelity(
                actions.numpy(), model.decode_latents(deepest).numpy(), model.units.tolist(), model.offset.tolist()
            ),
        )


def _layer_report(model: ActionAutoencoder, layer: int, step: LayerStep) -> LayerReport:
    """What the layer itself shows; what it is worth is left open."""
    num_levels = model.config.num_levels
    return LayerReport(
        layer=layer,
        residual_low=float(step.residual.min()),
        residual_high=float(step.residual.max()),
        clipped=_clipped_share(step, num_levels),
        bin_width=_bin_width(model, layer, step),
        levels_used=_levels_used(step.tokens, num_levels),
    )


def _as_float32(checkpoint: Checkpoint, model: ActionAutoencoder) -> ActionAutoencoder:
    return checkpoint.model(model.conditioning, dtype=torch.float32)


def _mean_square(error: Tensor) -> float:
    return float(error.square().mean())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _clipped_share(step: LayerStep, num_levels: int) -> float:
    # The outermost bins end half a bin beyond the outermost levels.
    return float((step.conditioned.abs() > num_levels / (num_levels - 1)).double().mean())


def _bin_width(model: ActionAutoencoder, layer: int, step: LayerStep) -> float:
    scale = model.quantizer.scale[layer].min() if step.stats is None else step.stats[..., 1].mean()
    return float(scale) * 2 / (model.config.num_levels - 1)


def _levels_used(tokens: Tensor, num_levels: int) -> float:
    used = [(tokens == level).flatten(0, -2).any(dim=0) for level in range(num_levels)]
    return float(torch.stack(used).double().mean())


# Text, JSON, picture -------------------------------------------------------------------------------------------------


def format_report(report: CalibrationReport) -> str:
    """A table with a row per layer, and the errors to compare with below it."""
    lost = held_out_warning(report.autoencoder_mse, report.readout_mse, "the episodes that judge", "robot units²")
    header = (
        f"{'layer':>5}  {'residual on the data':>22}  {'clipped':>8}  {'bin width':>9}  {'levels':>6}  "
        f"{'latent MSE':>10}  {'action MSE':>10}  {'worst case':>10}  {'noise/bin':>9}  {'flipped':>8}"
    )
    lines = [
        f"{report.method}, judged on {counted(report.num_episodes, 'episode')} ({report.num_steps} steps) of "
        f"{report.source}; action MSE in robot units², latents have no unit",
        header,
    ]
    for row in report.layers:
        residual = f"{row.residual_low:+.2e} … {row.residual_high:+.2e}"
        lines.append(
            f"{'L' + str(row.layer):>5}  {residual:>22}  {row.clipped:8.2%}  {row.bin_width:9.2e}  "
            f"{row.levels_used:6.0%}  {_number(row.latent_mse):>10}  {_number(row.action_mse):>10}  "
            f"{_number(row.worst_case):>10}  {_number(row.noise_bound):>9}  {row.flipped:8.4%}"
        )
    lines += [
        f"autoencoder as trained, no quantiser, action MSE  {report.autoencoder_mse:.3e}",
        f"readout refitted, no quantiser                    {_number(report.readout_mse)}",
        f"trained forward pass                              {report.trained_mse[-1]:.3e}",
        f"published decode_from_indices                     {report.published_mse:.3e}",
        *filter(None, [lost]),
        report.fidelity.text("decoded from all layers"),
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"


def report_to_json(report: CalibrationReport, provenance: dict[str, Any] | None = None) -> str:
    """Strict JSON (no NaN, no infinity: ValueError), keys sorted; provenance: how the fit was made, added as it is."""
    fields = asdict(report) | ({"provenance": provenance} if provenance is not None else {})
    return json.dumps(fields, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def report_files(folder: Path) -> tuple[Path, ...]:
    """What write_report writes."""
    return folder / REPORT_JSON, folder / REPORT_PNG


def write_report(report: CalibrationReport, folder: Path, provenance: dict[str, Any] | None = None) -> None:
    """report.json and, where matplotlib is installed, report.png into a folder, made if missing.

    CalibrationError if it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT_JSON).write_text(report_to_json(report, provenance), encoding="utf-8")
        if find_spec("matplotlib"):
            # Without the version matplotlib would write, equal reports are equal files.
            draw_report(report).savefig(folder / REPORT_PNG, metadata={"Software": None})
    except OSError as error:
        raise CalibrationError(
            f"cannot write the report to {folder}: {error.strerror}; choose a writable --report-dir"
        ) from error


_INK, _BLUE, _ORANGE, _GREEN, _GREY = "#222222", "#1f6fb4", "#d9730d", "#2a8c55", "#8a8a8a"


def draw_report(report: CalibrationReport) -> Figure:
    """Three panels: action error by prefix, latent scales by layer, shares by layer."""
    # A build draws nothing, and would wait for it longer than for any package but torch.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{report.method}: {report.num_episodes} episodes, {report.num_steps} steps of {report.source}",
        color=_INK, fontsize=12, x=0.01, ha="left", fontweight="bold",
    )  # fmt: skip
    errors, scales, shares = figure.subplots(1, 3)
    names = [f"L{row.layer}" for row in report.layers]
    _draw_errors(errors, report)
    _draw_scales(scales, report)
    _draw_shares(shares, report)
    for axes in (errors, scales, shares):
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e3e3", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_INK, labelsize=9)
        axes.set_xlabel("layer", color=_INK, fontsize=9)
    return figure


def _caption(axes: Axes, title: str, columns: int) -> None:
    """Title above, legend below the panel, where it hides no data."""
    axes.set_title(title, loc="left", color=_INK, fontsize=10.5)
    axes.legend(
        fontsize=8.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, labelcolor=_INK
    )


def _points(values: list[float | None]) -> tuple[list[int], list[float]]:
    """Places and values of what is there and can be drawn on a logarithmic axis."""
    found = [(place, value) for place, value in enumerate(values) if value is not None and value > 0]
    return [place for place, _ in found], [value for _, value in found]


def _draw_errors(axes: Axes, report: CalibrationReport) -> None:
    axes.set_yscale("log")
    axes.plot(*_points(list(report.trained_mse)), color=_GREY, marker="s", markersize=4, label="trained forward pass")
    axes.plot(
        *_points([row.action_mse for row in report.layers]),
        color=_BLUE, marker="o", linewidth=2, label=f"{report.method}, tokens alone",
    )  # fmt: skip
    if report.autoencoder_mse > 0:
        axes.axhline(report.autoencoder_mse, color=_GREEN, linestyle="--", linewidth=1.2, label="without quantiser")
    if report.published_mse > 0:
        axes.axhline(report.published_mse, color=_ORANGE, linestyle=":", linewidth=1.5, label="published decoding")
    _caption(axes, "Action MSE of a prefix, robot units²", columns=2)


def _draw_scales(axes: Axes, report: CalibrationReport) -> None:
    axes.set_yscale("log")
    rows = report.layers
    axes.plot(*_points([row.worst_case for row in rows]), color=_ORANGE, marker="v", label="worst case in [−1, 1]")
    root_mse = [None if row.latent_mse is None else row.latent_mse**0.5 for row in rows]
    axes.plot(*_points(root_mse), color=_BLUE, marker="o", linewidth=2, label="RMS on the data")
    axes.plot(*_points([row.bin_width for row in rows]), color=_INK, marker="_", markersize=12, linewidth=0.8,
              label="bin width")  # fmt: skip
    noise = [None if row.noise_bound is None else row.noise_bound * row.bin_width for row in rows]
    axes.plot(*_points(noise), color=_GREY, linestyle="--", label="float32 error bound")
    _caption(axes, "Latent error after the layer", columns=2)


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
            ha="center", va="bottom", fontsize=7, color=_INK,
        )  # fmt: skip
    _caption(axes, "Share of the levels used", columns=1)
