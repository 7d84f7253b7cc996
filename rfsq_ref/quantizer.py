"""Residual finite scalar quantiser with three conditionings of the residual.

Formulas: docs/architecture.md; residual FSQ with normalised residuals is arXiv 2508.15860.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from rfsq.rfsq_ref.errors import NotDecodableError, SettingsError
from rfsq.runtime.bundle.advice import quoted

#: Added to the unbiased standard deviation of a step's latents, as in the published model.
SIGMA_EPSILON = 1e-5


class Conditioning(StrEnum):
    """How a layer's residual is brought onto the grid [-1, 1]."""

    NONE = "none"
    DYNAMIC = "dynamic"
    CALIBRATED = "calibrated"


@dataclass(frozen=True)
class ConditioningConstants:
    """Constants of the `calibrated` conditioning: x = (r - mean) / scale.

    mean, scale: float32 [L, D]; scale is positive.
    """

    mean: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 2 or self.mean.shape != self.scale.shape:
            raise SettingsError(
                f"conditioning constants have shapes {tuple(self.mean.shape)} and {tuple(self.scale.shape)}; "
                "expected [num_layers, latent_dim] for both"
            )
        if not (torch.isfinite(self.mean).all() and torch.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise SettingsError("conditioning constants must be finite and every scale positive; calibrate again")


@dataclass(frozen=True)
class LayerStep:
    """What one layer does to the residual; every tensor [..., D] unless said otherwise.

    residual: what the layer is given; conditioned: the residual on the grid's scale; tokens: int64 levels that the
    layer decides for; grid_values and dequantised: what it takes off the residual, on the grid's scale and on the
    residual's; stats: [..., 2] mean and sigma (`dynamic` only).
    """

    residual: Tensor
    conditioned: Tensor
    tokens: Tensor
    grid_values: Tensor
    dequantised: Tensor
    stats: Tensor | None


@dataclass(frozen=True)
class Quantized:
    """latents [..., D]: the sum of all layers; tokens int64 [..., D, L]; stats [..., L, 2] (`dynamic` only)."""

    latents: Tensor
    tokens: Tensor
    stats: Tensor | None


class ResidualQuantizer(nn.Module):
    """L layers of K uniform levels; every method takes any leading dimensions, in float32 or float64.

    >>> quantizer = ResidualQuantizer(num_layers=1, num_levels=5, latent_dim=2, conditioning=Conditioning.NONE)
    >>> tokens = quantizer.quantize(torch.tensor([0.6, -2.0])).tokens
    >>> tokens.tolist(), quantizer.dequantize(tokens).tolist()
    ([[3], [0]], [0.5, -1.0])
    """

    half_steps: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        num_layers: int,
        num_levels: int,
        latent_dim: int,
        conditioning: Conditioning,
        constants: ConditioningConstants | None = None,
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.num_levels = num_levels
        self.latent_dim = latent_dim
        self.conditioning = conditioning
        if (conditioning is Conditioning.CALIBRATED) != (constants is not None):
            raise ValueError(f"conditioning {conditioning.value!r} with constants {constants is not None}")
        # Integers survive a change of dtype, so the grid is exact to the last bit in float64 too.
        half_steps = torch.arange(num_levels, dtype=torch.float32) * 2 - (num_levels - 1)
        self.register_buffer("half_steps", half_steps, persistent=False)
        if constants is None:
            zeros = torch.zeros(num_layers, latent_dim)
            constants = ConditioningConstants(zeros, torch.ones_like(zeros))
        if constants.mean.shape != (num_layers, latent_dim):
            raise SettingsError(
                f"conditioning constants have shape {tuple(constants.mean.shape)}; this quantiser needs "
                f"[num_layers, latent_dim] = {(num_layers, latent_dim)}: calibrate this checkpoint"
            )
        self.register_buffer("mean", constants.mean.clone(), persistent=False)
        self.register_buffer("scale", constants.scale.clone(), persistent=False)

    @property
    def grid(self) -> Tensor:
        """linspace(-1, 1, K)."""
        return self.half_steps / (self.num_levels - 1)

    @property
    def edges(self) -> Tensor:
        """The K - 1 values halfway between neighbouring levels."""
        return (self.half_steps[:-1] + 1) / (self.num_levels - 1)

    def layers(self, latents: Tensor, follow: Tensor | None = None) -> Iterator[LayerStep]:
        """Run the layers one by one over latents [..., D].

        follow: tokens [..., D, L] of another implementation, taken off in place of this one's own decisions: each
        layer then decides on the residual that the other implementation saw, up to rounding.
        """
        residual, grid, edges = latents, self.grid, self.edges
        for layer in range(self.num_layers):
            stats = None
            if self.conditioning is Conditioning.DYNAMIC:
                mean = residual.mean(dim=-1, keepdim=True)
                scale = residual.std(dim=-1, keepdim=True) + SIGMA_EPSILON
                stats = torch.cat((mean, scale), dim=-1)
            else:
                mean, scale = self.mean[layer], self.scale[layer]
            conditioned = (residual - mean) / scale
            # `right=False` puts a value that lies on an edge into the lower bin: ties go to the lower index.
            tokens = torch.bucketize(conditioned.contiguous(), edges, right=False)
            grid_values = grid[tokens if follow is None else follow[..., layer]]
            dequantised = grid_values * scale + mean
            yield LayerStep(residual, conditioned, tokens, grid_values, dequantised, stats)
            residual = residual - dequantised

    def quantize(self, latents: Tensor) -> Quantized:
        """Tokens, side information and the dequantised sum of latents [..., D]."""
        steps = list(self.layers(latents))
        stats = [step.stats for step in steps if step.stats is not None]
        return Quantized(
            latents=torch.stack([step.dequantised for step in steps]).sum(dim=0),
            tokens=torch.stack([step.tokens for step in steps], dim=-1),
            stats=torch.stack(stats, dim=-2) if stats else None,
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Quantised latents [..., D] with the straight-through gradient: the identity from output to input."""
        return latents + (self.quantize(latents.detach()).latents - latents).detach()

    def dequantize(self, tokens: Tensor, stats: Tensor | None = None) -> Tensor:
        """Latents [..., D] from the first l layers, tokens [..., D, l] with 1 <= l <= L.

        stats: [..., l, 2], needed by `dynamic` and by nothing else. A `calibrated` prefix adds the mean of
        what is missing, mean[l] (docs/architecture.md). Raises NotDecodableError without needed stats, ValueError for
        tokens of another shape or outside 0 ... K - 1.
        """
        prefix = tokens.shape[-1]
        if tokens.ndim < 2 or tokens.shape[-2] != self.latent_dim or not 1 <= prefix <= self.num_layers:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; expected [..., {self.latent_dim}, l] with l from 1 to "
                f"{self.num_layers} layers"
            )
        # A negative index would count from the end of the grid, and nobody would notice.
        if tokens.numel() and (tokens.min() < 0 or tokens.max() >= self.num_levels):
            raise ValueError(
                f"tokens run from {int(tokens.min())} to {int(tokens.max())}; expected 0 to {self.num_levels - 1}"
            )
        levels = self.grid[tokens.long()]
        if self.conditioning is Conditioning.DYNAMIC:
            if stats is None:
                raise NotDecodableError(dynamic_needs_stats())
            mean, scale = stats[..., :prefix, 0].unsqueeze(-2), stats[..., :prefix, 1].unsqueeze(-2)
        else:
            mean, scale = self.mean[:prefix].T, self.scale[:prefix].T
        latents = (levels * scale + mean).sum(dim=-1)
        if prefix < self.num_layers and self.conditioning is Conditioning.CALIBRATED:
            latents = latents + self.mean[prefix]
        return latents

    def decision_margins(self, conditioned: Tensor) -> Tensor:
        """Distance of conditioned values to the nearest bin edge, in bin widths; same shape."""
        bins = (conditioned + 1) * (self.num_levels - 1) / 2
        nearest_edge = torch.clamp(torch.round(bins - 0.5), 0, self.num_levels - 2) + 0.5
        return (bins - nearest_edge).abs()


def dynamic_needs_stats() -> str:
    """What to say where `dynamic` tokens are to be decoded alone."""
    return (
        "tokens of a `dynamic` (Robust RFSQ) checkpoint cannot be decoded alone: every layer was normalised by a mean "
        "and a sigma of its own step, and these do not travel with the tokens. Either pass the `stats` that encoding "
        "returned, or fit a checkpoint whose tokens decode on their own: "
        f"{quoted('calibrate', '--checkpoint FILE')} (`calibrated`: new tokens, exact; "
        "`recovered`: the published tokens, approximate)"
    )


def published_dequantize(quantizer: ResidualQuantizer, tokens: Tensor) -> Tensor:
    """Latents [..., D] as the published `decode_from_indices` gives them: the sum of grid values alone.

    Wrong for `dynamic` (mean and sigma are dropped); kept because comparisons need it.
    """
    return quantizer.grid[tokens.long()].sum(dim=-1)
