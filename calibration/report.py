"""What a fit is worth, layer by layer: a table to read, report.json and report.png."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rfsq.calibration.constants import worst_case_errors
from rfsq.calibration.data import mean_square, reference_actions, reference_latents
from rfsq.calibration.errors import CalibrationError
from rfsq.calibration.readout import held_out_warning
from rfsq.calibration.tables import Table
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, RecoveredDecoder
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.quantizer import Conditioning, published_dequantize
from rfsq.rfsq_ref.rounding import token_error_bounds
from rfsq.runtime.bundle.console import aligned
from rfsq.runtime.bundle.fidelity import Fidelity, Grade, fidelity
from rfsq.runtime.bundle.paths import counted, replacing

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from matplotlib.figure import Figure

_Report = TypeVar("_Report", bound="DataclassInstance")
REPORT_JSON = "report.json"
REPORT_PNG = "report.png"
#: Columns of the table that a first look needs.
_FIRST = ("layer", "clipped", "levels", "latent MSE", "action MSE", "worst case", "flipped")


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


@torch.no_grad()
def _report(
    method: str, checkpoint: Checkpoint, model: ActionAutoencoder, episodes: ActionDataset, worst_case: dict[int, float]
) -> CalibrationReport:
    actions, num_levels = reference_actions(checkpoint, episodes), checkpoint.config.num_levels
    trained = checkpoint.model(dtype=torch.float64)
    with_readout = checkpoint.readout is not None and model.conditioning is Conditioning.CALIBRATED
    latents = reference_latents(model, actions)
    steps = list(model.quantizer.layers(latents))
    tokens = torch.stack([step.tokens for step in steps], dim=-1)
    float32_tokens, _ = checkpoint.model(model.conditioning, dtype=torch.float32).encode(actions.float())
    _, _, bounds = token_error_bounds(model, actions)
    published, stats = trained.encode(actions)

    def action_mse(decoded: Tensor, decoder: ActionAutoencoder = trained) -> float:
        return mean_square(decoder.decode_latents(decoded) - actions)

    rows: list[LayerReport] = []
    deepest = latents
    for prefix, step in enumerate(steps, start=1):
        decodes = model.conditioning is not Conditioning.DYNAMIC or prefix in model.recovered
        if decodes:
            deepest = model.dequantize(tokens[..., :prefix])
        noise = float(bounds[..., prefix - 1].median())
        scale = model.quantizer.scale[prefix - 1].min() if step.stats is None else step.stats[..., 1].mean()
        rows.append(
            LayerReport(
                layer=prefix - 1,
                residual_low=float(step.residual.min()),
                residual_high=float(step.residual.max()),
                # The outermost bins end half a bin beyond the outermost levels.
                clipped=float((step.conditioned.abs() > num_levels / (num_levels - 1)).double().mean()),
                bin_width=float(scale) * 2 / (num_levels - 1),
                levels_used=float(levels_used(step.tokens, num_levels).double().mean()),
                latent_mse=mean_square(deepest - latents) if decodes else None,
                action_mse=action_mse(deepest, model) if decodes else None,
                worst_case=worst_case.get(prefix),
                noise_bound=noise if math.isfinite(noise) else None,
                flipped=float((float32_tokens[..., prefix - 1] != step.tokens).double().mean()),
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


def levels_used(tokens: Tensor, num_levels: int) -> Tensor:
    """Whether each level of tokens [N, ...] occurs: bool [K, ...]."""
    return torch.stack([(tokens == level).any(dim=0) for level in range(num_levels)])


# Text, JSON, picture -------------------------------------------------------------------------------------------------


def format_report(report: CalibrationReport, *, is_verbose: bool = True) -> str:
    """A table with a row per layer, and the errors to compare with below it; is_verbose: all of its columns, and good
    dimensions too."""
    table = Table.of(
        f"{report.method}, judged on {counted(report.num_episodes, 'episode')} ({report.num_steps} steps) of "
        f"{report.source}; action MSE in robot units², latents have no unit",
        (
            {
                "layer": f"L{row.layer}",
                "residual on the data": f"{row.residual_low:+.2e} … {row.residual_high:+.2e}",
                "clipped": f"{row.clipped:.2%}",
                "bin width": f"{row.bin_width:.2e}",
                "levels": f"{row.levels_used:.0%}",
                "latent MSE": _number(row.latent_mse),
                "action MSE": _number(row.action_mse),
                "worst case": _number(row.worst_case),
                "noise/bin": _number(row.noise_bound),
                "flipped": f"{row.flipped:.4%}",
            }
            for row in report.layers
        ),
    )
    lost = held_out_warning(report.autoencoder_mse, report.readout_mse, "the episodes that judge", "robot units²")
    others = [
        ("autoencoder as trained, no quantiser, action MSE", report.autoencoder_mse),
        ("readout refitted, no quantiser", report.readout_mse),
        ("trained forward pass", report.trained_mse[-1]),
        ("published decode_from_indices", report.published_mse),
    ]
    lines = [
        (table if is_verbose else table.only(table.title, *_FIRST)).text(),
        *aligned([(name, _number(mse)) for name, mse in others], left=2),
        *filter(None, [lost]),
    ]
    if is_verbose or report.fidelity.grade is not Grade.GOOD:
        lines.append(report.fidelity.text("decoded from all layers", report.method))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"


def draw_calibration(report: CalibrationReport) -> "Figure":
    """The picture of a report."""
    # A build draws nothing, and would wait for matplotlib longer than for any package but torch.
    from rfsq.calibration.report_plots import draw_report

    return draw_report(report)


def report_to_json(report: "DataclassInstance", provenance: Mapping[str, Any] | None = None) -> str:
    """Strict JSON (no NaN, no infinity: ValueError), keys sorted; provenance: how the fit was made, added as it is."""
    fields = asdict(report) | ({"provenance": dict(provenance)} if provenance is not None else {})
    return json.dumps(fields, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def report_files(folder: Path) -> tuple[Path, ...]:
    """What staged_report writes."""
    return folder / REPORT_JSON, folder / REPORT_PNG


@contextmanager
def staged_report(
    report: _Report, folder: Path, draw: Callable[[_Report], "Figure"], provenance: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """report.json and, where matplotlib is installed, report.png into a folder, made if missing.

    They take their names when the block ends well, and are gone when not. CalibrationError if one cannot be written.
    """
    with ExitStack() as stack:
        path = stack.enter_context(replacing(folder / REPORT_JSON, error=CalibrationError))
        path.write_text(report_to_json(report, provenance), encoding="utf-8")
        if find_spec("matplotlib"):
            from rfsq.rfsq_ref.drawing import save_png

            picture = stack.enter_context(replacing(folder / REPORT_PNG, error=CalibrationError))
            save_png(draw(report), picture, CalibrationError)
        yield
