"""The deployed arithmetic, described once: what the emitters of ONNX, C and CUDA write down.

Everything that is constant at run time is folded in float64 and rounded to float32 once: the normaliser's units into
the first and last linear layer, the token decoding into the decoder's first linear layer (docs/architecture.md).

The normaliser's offset is folded into nothing. A bias that held it would be as large as the offset, and so would be the
rounding errors of every sum with it, whatever the units: an encoder flips tokens, and a decoder loses digits, where
joints rest far from zero. So it is taken off first, which is exact near the offset, and added last, which rounds once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from rfsq.calibration.recovered import default_prefixes
from rfsq.export.errors import BuildInputError
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, linear_layers
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.runtime.bundle.arrays import Float32Array, Float64Array
from rfsq.runtime.bundle.decoding import StepDecoding


class DeployMode(StrEnum):
    """Which tokens the encoder gives and what the decoder makes of them."""

    NONE = "none"
    DYNAMIC = "dynamic"
    CALIBRATED = "calibrated"
    RECOVERED = "recovered"

    @property
    def conditioning(self) -> Conditioning:
        """The reference conditioning that gives these tokens."""
        return Conditioning.DYNAMIC if self is DeployMode.RECOVERED else Conditioning(self.value)

    @property
    def has_stats(self) -> bool:
        """Whether mean and sigma of every layer travel beside the tokens."""
        return self is DeployMode.DYNAMIC


@dataclass(frozen=True)
class Affine:
    """y = weight @ x + bias; weight float32 [outputs, inputs], bias float32 [outputs]."""

    weight: Float32Array
    bias: Float32Array


@dataclass(frozen=True)
class AffineQuantizer:
    """Layers with constant bins, in bin widths counted from a middle level h = (K - 1) // 2.

    v_0 = z * ratio_0 + shift_0; count_l = clip(ceil(v_l), -h, K - 1 - h), which is token_l - h;
    v_{l+1} = (v_l - count_l) * ratio_{l+1} + shift_{l+1}. ratio, shift: float32 [L, D].

    With the width w = 2 s / (K - 1) and the middle level's value c = m - s + w h of every layer, these are the formulas
    of docs/architecture.md: v = (r - c) / w - 1/2, so that ceil gives ties to the lower level; ratio_0 = 1 / w_0,
    ratio_l = w_{l-1} / w_l; shift_0 = -c_0 / w_0 - 1/2, shift_l = -c_l / w_l - 1/2 + ratio_l / 2. Five operations a
    layer, and none of them adds what is large and takes it off again.
    """

    ratio: Float32Array
    shift: Float32Array


@dataclass(frozen=True)
class EncoderPlan:
    """actions [B, T, A] - offset -> first, Mish, second, tanh -> L layers -> tokens [B, T, D, L].

    And stats [B, T, L, 2] where it has them. offset: float32 [A] in physical units; emitters leave it out where it is
    zero in every dimension. quantizer: None for layers that are normalised by the step's own mean, and its unbiased
    deviation plus SIGMA_EPSILON.
    """

    chunk_length: int
    num_layers: int
    num_levels: int
    offset: Float32Array
    first: Affine
    second: Affine
    quantizer: AffineQuantizer | None
    has_stats: bool

    @property
    def action_dim(self) -> int:
        return len(self.offset)

    @property
    def latent_dim(self) -> int:
        return len(self.second.bias)


@dataclass(frozen=True)
class DecoderPlan:
    """tokens [B, T, D, l] (and stats [B, T, l, 2]) -> first, Mish, second -> + offset -> actions [B, T, A].

    first takes the D * l tokens as numbers, except with stats: then it takes the D latents. `latents`, from tokens to
    latents, and `hidden`, from latents on, are the same in two steps: one more layer for a library, a fifth of the
    arithmetic for code that is generated. latents is None with stats.
    """

    chunk_length: int
    prefix: int
    latent_dim: int
    num_levels: int
    latents: Affine | None
    hidden: Affine
    first: Affine
    second: Affine
    offset: Float32Array

    @property
    def has_stats(self) -> bool:
        return self.latents is None

    @property
    def action_dim(self) -> int:
        return len(self.offset)

    @cached_property
    def own_tokens(self) -> Float32Array | None:
        """Weights [D, l] where every latent depends on its own tokens alone, else None."""
        if self.latents is None:
            return None
        by_latent = self.latents.weight.reshape(self.latent_dim, self.latent_dim, self.prefix)
        if by_latent[~np.eye(self.latent_dim, dtype=bool)].any():
            return None
        return by_latent[np.arange(self.latent_dim), np.arange(self.latent_dim)]


Plan = EncoderPlan | DecoderPlan


def plan_encoder(model: ActionAutoencoder, mode: DeployMode, chunk_length: int) -> EncoderPlan:
    """Fold a float64 reference model into an encoder."""
    _require(model, mode)
    (weight, bias), second = map(_linear, linear_layers(model.encoder))
    return EncoderPlan(
        chunk_length=chunk_length,
        num_layers=model.config.num_layers,
        num_levels=model.config.num_levels,
        offset=_offset(model),
        first=_affine(weight / _numpy(model.units), bias),
        second=_affine(*second),
        quantizer=None if model.conditioning is Conditioning.DYNAMIC else _affine_quantizer(model),
        has_stats=mode.has_stats,
    )


def plan_decoder(model: ActionAutoencoder, mode: DeployMode, chunk_length: int, prefix: int) -> DecoderPlan:
    """Fold a float64 reference model into a decoder of the first `prefix` layers."""
    _require(model, mode)
    (weight, bias), (last_weight, last_bias) = map(_linear, linear_layers(model.decoder))
    hidden, latents = _affine(weight, bias), None
    if not mode.has_stats:
        matrix, offset = map(_numpy, model.token_map(prefix))
        latents = _affine(matrix, offset)
        weight, bias = weight @ matrix, weight @ offset + bias
    units = _numpy(model.units)
    return DecoderPlan(
        chunk_length=chunk_length,
        prefix=prefix,
        latent_dim=model.config.latent_dim,
        num_levels=model.config.num_levels,
        latents=latents,
        hidden=hidden,
        first=_affine(weight, bias),
        second=_affine(last_weight * units[:, None], last_bias * units),
        offset=_offset(model),
    )


def step_decoding(plans: Sequence[DecoderPlan]) -> StepDecoding | None:
    """The constants of these decoders, of one model; None with stats."""
    whole = plans[-1]
    affine = {plan.prefix: plan.latents for plan in plans if plan.latents is not None}
    if whole.has_stats:
        return None
    return StepDecoding(
        matrices={prefix: latents.weight for prefix, latents in affine.items()},
        offsets={prefix: latents.bias for prefix, latents in affine.items()},
        first_weight=whole.hidden.weight,
        first_bias=whole.hidden.bias,
        second_weight=whole.second.weight,
        second_bias=whole.second.bias,
    )


def action_limit(plan: EncoderPlan) -> float:
    """The largest |action| for which no float32 sum in the encoder can overflow, whatever the signs: physical units.

    Above it an infinity less an infinity would be NaN, and a NaN has no token. Half of float32's range is kept back
    for the roundings. BuildInputError where nothing is left of it.
    """
    first, second = (
        (np.abs(layer.weight.astype(np.float64)), np.abs(layer.bias.astype(np.float64)))
        for layer in (plan.first, plan.second)
    )
    offset = np.abs(plan.offset.astype(np.float64))
    inner = first[0] @ offset + first[1]
    # |Mish(x)| <= max(|x|, 0.31), so both layers together are bounded by slope * |action| + rest, and what is left
    # without the offset by |action| + |offset|.
    slopes = np.concatenate((np.ones_like(offset), first[0].sum(1), second[0] @ first[0].sum(1)))
    rests = np.concatenate((offset, inner, second[0] @ (inner + 0.31) + second[1]))
    limit = float(((np.finfo(np.float32).max / 2 - rests) / np.maximum(slopes, 1)).min())
    if not limit > 0:
        raise BuildInputError(
            f"the normaliser's offset or the encoder's biases overflow float32 whatever the action: sums reach "
            f"{rests.max():.3g}; the training diverged, or the normaliser is not the one of this checkpoint"
        )
    return float(10.0 ** np.floor(np.log10(limit)))


def middle_level(num_levels: int) -> int:
    """The level that bins are counted from; the lower one of two for an even number of levels.

    >>> middle_level(7), middle_level(8)
    (3, 3)
    """
    return (num_levels - 1) // 2


def choose_prefixes(requested: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Sorted, without repetition, always with the full depth; by default the coarse layers too.

    Raises BuildInputError outside 1 ... L.

    >>> choose_prefixes(None, 8), choose_prefixes([5, 2], 8)
    ((3, 8), (2, 5, 8))
    """
    if requested is None:
        return default_prefixes(num_layers)
    wrong = [prefix for prefix in requested if not 1 <= prefix <= num_layers]
    if wrong:
        raise BuildInputError(f"prefixes {wrong} are not between 1 and the model's {num_layers} layers")
    return tuple(sorted({*requested, num_layers}))


def _affine_quantizer(model: ActionAutoencoder) -> AffineQuantizer:
    mean, scale = _numpy(model.quantizer.mean), _numpy(model.quantizer.scale)
    num_levels = model.config.num_levels
    width = 2 * scale / (num_levels - 1)
    before = np.concatenate((np.ones_like(width[:1]), width[:-1]))
    # -c / w - 1/2, arranged so that a mean of zero leaves no rounding: an edge that lies at zero stays there.
    shift = (num_levels - 1) / 2 - middle_level(num_levels) - 0.5 - mean / width
    shift[1:] += before[1:] / width[1:] / 2
    return AffineQuantizer((before / width).astype(np.float32), shift.astype(np.float32))


def _require(model: ActionAutoencoder, mode: DeployMode) -> None:
    if model.offset.dtype is not torch.float64:
        raise ValueError(f"plans are folded from the float64 reference; got {model.offset.dtype}")
    if model.conditioning is not mode.conditioning:
        raise ValueError(
            f"mode {mode.value!r} needs conditioning {mode.conditioning.value!r}; the model has "
            f"{model.conditioning.value!r}"
        )


def _linear(layer: nn.Linear) -> tuple[Float64Array, Float64Array]:
    return _numpy(layer.weight), _numpy(layer.bias)


def _offset(model: ActionAutoencoder) -> Float32Array:
    """Exactly: a model holds it as float32."""
    return np.ascontiguousarray(_numpy(model.offset), np.float32)


def _affine(weight: Float64Array, bias: Float64Array) -> Affine:
    """BuildInputError for numbers beyond float32."""
    largest = max(float(np.abs(weight).max()), float(np.abs(bias).max()))
    if not largest <= float(np.finfo(np.float32).max):
        raise BuildInputError(
            f"a layer has numbers up to {largest:.3g} once the normaliser is folded in, too large for float32; the "
            "normaliser's scale is not the one of this checkpoint"
        )
    return Affine(np.ascontiguousarray(weight, np.float32), np.ascontiguousarray(bias, np.float32))


def _numpy(tensor: Tensor) -> Float64Array:
    return tensor.detach().numpy().astype(np.float64)
