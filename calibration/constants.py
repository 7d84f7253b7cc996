"""The `calibrated` conditioning: a mean m and a scale s for every layer and latent, and a proof of what they cost.

A layer is a uniform quantiser of K levels with centre m and bin width w = 2 s / (K - 1). w is the largest of

1. data: what the residual of the calibration data asks for (objective `range` or `mse`);
2. catch-up: the residual that any latent in [-1, 1] can leave is carried along by interval arithmetic. A layer can
   divide it by K at best, so it must be at most worst_case * K^n when n layers follow: wide enough for that;
3. noise: NOISE_FACTOR times the bound on the float32 error of a latent, so that rounding decides few tokens.

So the first layers follow the data, and as many as the tanh range needs (four of eight with 7 levels) wait for the
end. With odd K these have a level at the data's centre: on the data they stay silent, off the data they catch up.
An even K has no such level: an idle layer would put the data onto a bin edge, so there every layer covers the whole
remaining residual. If K^L is too small for worst_case, the layers do the best they can and the bound says so.

The constants are part of a tokenizer's identity, so they must not hang on the last bits of a latent, which differ
between processors: a mean is rounded to a multiple of about 2^-16 of what its layer spans, which makes one that is
mere rounding exactly 0, and a scale is rounded up to 16 significant bits. Later layers and the proof see the rounded
ones.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rfsq.calibration.data import ROUNDED_BITS, reference_actions, reference_latents, rounded
from rfsq.calibration.settings import DEFAULT_CALIBRATION, CalibrationConfig, Granularity, Objective
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import ActionDataset
from rfsq.rfsq_ref.errors import DataError
from rfsq.rfsq_ref.quantizer import ConditioningConstants
from rfsq.rfsq_ref.rounding import UNIT, latent_error_bound

#: Smallest bin width in units of the bound on the float32 error of a latent (`rfsq_ref.rounding`, 8 deviations of it).
#: Where the residual fills its bins evenly, 2 / 32 of the tokens lie within the bound of an edge; as the mean error is
#: some 50 times smaller than the bound, about 1 / (50 * 32) of them flip, the 1e-3 that is tolerable.
NOISE_FACTOR = 32.0
#: One step alone has no range.
MINIMUM_STEPS = 2
#: Covers the float64 roundings of the reference quantiser itself, L layers of numbers below 4.
_FLOAT64_SLACK = 2.0**-46
_MSE_ITERATIONS = 100


def fit_constants(
    checkpoint: Checkpoint, episodes: ActionDataset, config: CalibrationConfig = DEFAULT_CALIBRATION
) -> ConditioningConstants:
    """Fit mean and scale, float32 [L, D], to the float64 reference's latents of these episodes.

    Raises DataError for fewer than MINIMUM_STEPS steps, another action dimension or latents that are not finite.
    """
    actions = reference_actions(checkpoint, episodes)
    model = checkpoint.model(dtype=torch.float64)
    sizes = checkpoint.config
    return constants_of_latents(
        reference_latents(model, actions),
        sizes.num_layers,
        sizes.num_levels,
        config,
        noise=float32_noise(model, actions),
    )


def float32_noise(model: ActionAutoencoder, actions: Tensor) -> float:
    """Largest bound on the float32 error of these actions' latents, for a float64 model; at least one rounding of 1.

    DataError where float32 overflows.
    """
    _, bound = latent_error_bound(model, actions)
    largest = float(bound.max())
    if not math.isfinite(largest):
        raise DataError(
            "float32 may overflow on these actions, so no bin is wide enough; expected actions of the size the "
            "checkpoint was trained on: repair or rescale the calibration data"
        )
    return max(largest, UNIT)


def constants_of_latents(
    latents: Tensor,
    num_layers: int,
    num_levels: int,
    config: CalibrationConfig = DEFAULT_CALIBRATION,
    *,
    noise: float = UNIT,
) -> ConditioningConstants:
    """Fit mean and scale, float32 [L, D], to latents [N, D] in [-1, 1].

    noise: bound on the float32 error of a latent. Raises DataError for fewer than MINIMUM_STEPS latents.
    """
    if latents.ndim != 2 or len(latents) < MINIMUM_STEPS:
        raise DataError(
            f"latents of shape {tuple(latents.shape)}; expected [steps, latents] with at least {MINIMUM_STEPS} steps: "
            "give more calibration data"
        )
    latent_dim = latents.shape[1]
    residual = latents.detach().double()
    if config.granularity is Granularity.LAYER:
        residual = residual.reshape(-1, 1)
    # What any latent in [-1, 1] can have left.
    reach = -torch.ones_like(residual[0]), torch.ones_like(residual[0])
    least_scale = NOISE_FACTOR * noise * (num_levels - 1) / 2
    layers = []
    for layer in range(num_layers):
        bins = _fit_to_data(residual, num_levels, config, least_scale, is_first=layer == 0)
        if config.worst_case < 1:
            # What the layers that follow can still bring down to worst_case; with even K none of them may idle.
            reducible = config.worst_case * num_levels ** (num_layers - 1 - layer)
            bins = _catch_up(bins, reach, reducible if num_levels % 2 else 0.0, least_scale)
        layers.append(bins)
        residual, reach = residual - bins.nearest(residual) * bins.scale - bins.mean, bins.leaves(*reach)
    shape = (num_layers, latent_dim)
    mean = torch.stack([bins.mean for bins in layers]).float().expand(shape)
    scale = torch.stack([bins.scale for bins in layers]).float().expand(shape)
    return ConditioningConstants(mean.contiguous(), scale.contiguous())


def worst_case_residuals(constants: ConditioningConstants, num_levels: int) -> Tensor:
    """Bounds on the residual after each layer for every latent in [-1, 1], float64 [L, D, 2]: lowest, highest.

    The image of an interval under one layer is a union of intervals, one per bin it touches; its hull goes into the
    next layer, so the bound can only be too wide. Holds for the float64 quantiser, its own roundings included.
    """
    mean, scale = constants.mean.double(), constants.scale.double()
    reach = -torch.ones_like(mean[0]), torch.ones_like(mean[0])
    bounds = []
    for layer_mean, layer_scale in zip(mean, scale, strict=True):
        reach = _Bins(layer_mean, layer_scale, num_levels).leaves(*reach)
        bounds.append(torch.stack(reach, dim=-1))
    return torch.stack(bounds)


def worst_case_errors(constants: ConditioningConstants, num_levels: int) -> Tensor:
    """Largest latent error that decoding the first 1 ... L layers can leave, over [-1, 1], float64 [L].

    A prefix of l < L layers adds mean[l] (docs/architecture.md), which the bound takes into account.
    """
    residuals = worst_case_residuals(constants, num_levels)
    added = torch.cat((constants.mean[1:].double(), torch.zeros_like(constants.mean[:1], dtype=torch.float64)))
    return (residuals - added.unsqueeze(-1)).abs().amax(dim=(1, 2))


@dataclass(frozen=True, eq=False)
class _Bins:
    """The K bins of a layer around its levels, mean + scale * linspace(-1, 1, K). mean, scale: [D]."""

    mean: Tensor
    scale: Tensor
    num_levels: int

    def nearest(self, residual: Tensor) -> Tensor:
        """Grid value in [-1, 1] nearest to (residual - mean) / scale, the lower one on a tie (docs/architecture.md)."""
        half_levels = (self.num_levels - 1) / 2
        index = torch.ceil(((residual - self.mean) / self.scale + 1) * half_levels - 0.5).clamp(0, self.num_levels - 1)
        return index / half_levels - 1

    def leaves(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Hull [D] of what the layer leaves of the residuals in [lower, upper]."""
        half_levels = (self.num_levels - 1) / 2
        grid = (torch.arange(self.num_levels, dtype=self.mean.dtype) - half_levels) / half_levels
        level = self.mean + grid.unsqueeze(-1) * self.scale
        half_bin = self.scale / (self.num_levels - 1)
        first, last = level - half_bin, level + half_bin
        first[0], last[-1] = -torch.inf, torch.inf
        left, right = torch.maximum(first, lower), torch.minimum(last, upper)
        touched = left <= right + _FLOAT64_SLACK
        least = torch.where(touched, left - level, torch.inf).amin(dim=0)
        most = torch.where(touched, right - level, -torch.inf).amax(dim=0)
        return least - _FLOAT64_SLACK, most + _FLOAT64_SLACK


def _fit_to_data(
    residual: Tensor, num_levels: int, config: CalibrationConfig, least_scale: float, *, is_first: bool
) -> _Bins:
    """What the residual [N, D] asks for, rounded, the scale not below `least_scale`."""
    ordered = residual.sort(dim=0).values
    # Outward: at most `tail` of the data lies beyond either end.
    tail = (1 - config.coverage) / 2 if config.objective is Objective.RANGE else 0.0
    beyond = int(tail * len(ordered))
    low, high = ordered[beyond], ordered[len(ordered) - 1 - beyond]
    mean = _round_mean((low + high) / 2, ((high - low) / 2).clamp(min=least_scale))
    # K bins reach half a bin beyond the outermost levels.
    scale = torch.maximum(high - mean, mean - low) * (num_levels - 1) / num_levels
    if config.objective is Objective.MSE:
        mean, scale = _least_squares(residual, mean, scale, num_levels)
        scale = scale.clamp(min=least_scale)
        mean = _round_mean(mean, scale)
    elif is_first:
        # No latent leaves [-1, 1], so nothing is gained by reaching farther.
        enough = (1 + mean.abs()) * (num_levels - 1) / num_levels
        scale = torch.minimum(scale * (1 + config.headroom), enough)
    return _Bins(mean, _round_up(scale.clamp(min=least_scale)), num_levels)


def _catch_up(bins: _Bins, reach: tuple[Tensor, Tensor], allowed: float, least_scale: float) -> _Bins:
    """The data's mean and scale where they leave at most `allowed` of `reach`; else mean 0 and the scale that does.

    With mean 0 the data's residual, which is small by then, meets a level and stays as it is.
    """
    (lower, upper), (least, most) = reach, bins.leaves(*reach)
    suffices = torch.maximum(-least, most) <= allowed
    farthest = torch.maximum(-lower, upper)
    # Beyond the outermost level, at the scale, the residual goes on growing; K bins divide it by K at best.
    needed = farthest - (farthest / bins.num_levels).clamp(min=allowed)
    covering = farthest * (bins.num_levels - 1) / bins.num_levels
    caught_up = torch.maximum(needed, torch.minimum(bins.scale + bins.mean.abs(), covering))
    scale = torch.where(suffices, bins.scale, _round_up(caught_up.clamp(min=least_scale)))
    return _Bins(torch.where(suffices, bins.mean, 0.0), scale, bins.num_levels)


def _least_squares(residual: Tensor, mean: Tensor, scale: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    """Lloyd's iteration with equidistant levels: nearest levels, then the regression of the residual on them.

    Neither half can raise the squared error (Lloyd, Least squares quantization in PCM, 1982).
    """
    for _ in range(_MSE_ITERATIONS):
        level = _Bins(mean, scale.clamp(min=UNIT**2), num_levels).nearest(residual)
        level_mean, residual_mean = level.mean(dim=0), residual.mean(dim=0)
        variance = (level - level_mean).square().mean(dim=0)
        covariance = ((level - level_mean) * (residual - residual_mean)).mean(dim=0)
        slope = torch.where(variance > 0, covariance / variance.clamp(min=UNIT), scale)
        offset = residual_mean - slope * level_mean
        if torch.equal(slope, scale) and torch.equal(offset, mean):
            break
        mean, scale = offset, slope
    return mean, scale


def _round_mean(mean: Tensor, span: Tensor) -> Tensor:
    """As `rounded`, in float32, kept in float64."""
    return rounded(mean, span).float().double()


def _round_up(scale: Tensor) -> Tensor:
    """To ROUNDED_BITS significant bits, none smaller than before; kept in float64."""
    # A scale is often an earlier, rounded one divided by K, which may be such a number but for its last bits: it must
    # not depend on these whether it is rounded up.
    mantissa, exponent = torch.frexp(scale * (1 + 2.0 ** (-ROUNDED_BITS - 8)))
    return torch.ldexp(torch.ceil(torch.ldexp(mantissa, torch.tensor(ROUNDED_BITS))), exponent - ROUNDED_BITS)
