"""The five ways of using an RFSQ checkpoint that are compared, layer by layer, on the float64 reference.

`naive`: no normalisation. `dynamic`: Robust RFSQ, with its side information beside the tokens. `published`: the same
tokens alone, decoded as `decode_from_indices` does. `recovered`: the same tokens alone, through the recovered decoder.
`calibrated`: tokens of the calibrated conditioning, alone.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rfsq.calibration.recovered import COARSE_LAYERS
from rfsq.evidence.errors import EvidenceError
from rfsq.evidence.metrics import Array, action_errors, entropy_bits, level_counts
from rfsq.evidence.results import Metrics, ReportRow, SchemeReport, Spread, metrics_of
from rfsq.evidence.settings import OscPose
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.checkpoints import Checkpoint
from rfsq.rfsq_ref.data import FloatArray
from rfsq.rfsq_ref.normaliser import QUANTILES
from rfsq.rfsq_ref.quantizer import Conditioning, LayerStep, published_dequantize

#: Bins of |error|, in normalised units: a fifth of a decade wide.
ERROR_EDGES = tuple(10.0 ** (exponent / 5) for exponent in range(-40, 11))
#: Of a token of bins.
_MOST_BITS = 24


#: What every layer does to the latents [N, D] of N steps; the first is given the latents themselves.
Layers = list[LayerStep]


def tokens_of(layers: Layers) -> Tensor:
    """int64 [N, D, L]."""
    return torch.stack([step.tokens for step in layers], dim=-1)


class Scheme:
    """How tokens become latents, on their own unless a scheme says otherwise; decoding from there is the same."""

    name: ClassVar[str]
    conditioning: ClassVar[Conditioning]

    def __init__(self, checkpoint: Checkpoint) -> None:
        """The checkpoint must carry what the scheme needs: constants, or recovered decoders of every prefix."""
        self.model: ActionAutoencoder = checkpoint.model(self.conditioning, dtype=torch.float64)

    @torch.no_grad()
    def encode(self, actions: npt.NDArray[np.float32]) -> Layers:
        """actions float32 [N, A]."""
        return list(self.model.quantizer.layers(self.model.encode_latents(torch.tensor(actions, dtype=torch.float64))))

    @torch.no_grad()
    def decode(self, actions: npt.NDArray[np.float32], layers: int) -> Array:
        """What the first layers of the tokens of these actions [N, A] decode to, in the robot's units."""
        found: Array = self.model.decode_latents(self.prefix(self.encode(actions)[:layers])).numpy()
        return found

    @property
    def bits_per_layer(self) -> float:
        """Of one step: what must travel for the decoder to work."""
        sizes = self.model.config
        return sizes.latent_dim * math.log2(sizes.num_levels)

    def prefix(self, first: Layers) -> Tensor:
        """Latents [N, D] from the first layers alone."""
        return self.model.dequantize(tokens_of(first))

    def rest(self, fine: Layers, typical: Layers) -> Tensor:
        """Latents [N, D] from the fine layers; the coarse ones before them at their mean over `typical` episodes."""
        usual = [self.part(step).mean(dim=0) for step in typical]
        return torch.stack([self.part(step) for step in fine]).sum(dim=0) + torch.stack(usual).sum(dim=0)

    def part(self, step: LayerStep) -> Tensor:
        """What one layer adds to the latents [N, D]."""
        return step.dequantised


class Naive(Scheme):
    name = "naive"
    conditioning = Conditioning.NONE


class Dynamic(Scheme):
    name = "dynamic"
    conditioning = Conditioning.DYNAMIC

    @property
    def bits_per_layer(self) -> float:
        # Mean and sigma as float32.
        return super().bits_per_layer + 64.0

    def prefix(self, first: Layers) -> Tensor:
        stats = [step.stats for step in first if step.stats is not None]
        return self.model.dequantize(tokens_of(first), torch.stack(stats, dim=-2))


class Published(Scheme):
    name = "published"
    conditioning = Conditioning.DYNAMIC

    def prefix(self, first: Layers) -> Tensor:
        return published_dequantize(self.model.quantizer, tokens_of(first))

    def part(self, step: LayerStep) -> Tensor:
        return step.grid_values


class Recovered(Scheme):
    name = "recovered"
    conditioning = Conditioning.DYNAMIC

    def rest(self, fine: Layers, typical: Layers) -> Tensor:
        usual = tokens_of(typical).double().mean(dim=0)
        tokens = torch.cat((usual.expand(len(fine[0].tokens), -1, -1), tokens_of(fine)), dim=-1)
        return self.model.recovered[tokens.shape[-1]].latents(tokens)


class Calibrated(Scheme):
    name = "calibrated"
    conditioning = Conditioning.CALIBRATED


@dataclass(frozen=True)
class Judge:
    """What every scheme is judged on. judged, typical: actions float32 [N, A], held out and calibration episodes."""

    judged: npt.NDArray[np.float32]
    typical: npt.NDArray[np.float32]
    units: Array
    physical: OscPose | None

    def errors(self, decoded: Tensor) -> Metrics:
        """decoded: [N, A], for the judged actions."""
        return metrics_of(action_errors(self.judged, decoded.numpy(), self.units, self.physical))

    def unquantised(self, model: ActionAutoencoder) -> Metrics:
        """A float64 autoencoder alone, without its quantiser."""
        with torch.no_grad():
            return self.errors(model.decode_latents(model.encode_latents(torch.from_numpy(self.judged).double())))

    @torch.no_grad()
    def report(self, scheme: Scheme) -> SchemeReport:
        """All rows of a scheme. Raises EvidenceError for actions that the model cannot take."""
        encoded, typical = scheme.encode(self.judged), scheme.encode(self.typical)
        latents = encoded[0].residual
        if not torch.isfinite(latents).all():
            raise EvidenceError(
                f"{scheme.name}: latents are not finite; expected actions of the size the checkpoint was trained "
                "on: rescale the data or train with --normaliser min-max"
            )
        count = len(encoded)
        coarse = min(COARSE_LAYERS, count)
        prefixes = [scheme.prefix(encoded[:layers]) for layers in range(1, count + 1)]
        groups = [(range(count), prefixes[-1])]
        if coarse < count:
            fine = (range(coarse, count), scheme.rest(encoded[coarse:], typical[:coarse]))
            groups = [(range(coarse), prefixes[coarse - 1]), fine, *groups]

        def row(shown: range, used: range, found: Tensor) -> ReportRow:
            levels = scheme.model.config.num_levels
            counts = np.stack([level_counts(encoded[layer].tokens.numpy(), levels) for layer in used])
            shares = counts.sum(axis=(0, 1)) / counts.sum()
            use = {
                "residual_std": float(encoded[used.start].residual.std(correction=0)),
                "entropy_bits": float(entropy_bits(counts).sum()),
                "latent_mse": float((found - latents).square().mean()),
            }
            return ReportRow(
                label(shown.start, shown.stop),
                metrics_of(use) | self.errors(scheme.model.decode_latents(found)),
                tuple(Spread.of([share]) for share in shares.tolist()),
            )

        errors = (scheme.model.decode_latents(prefixes[-1]).numpy() - self.judged.astype(np.float64)) / self.units
        # What lies beyond the outermost edges counts to the outermost bins.
        within = np.clip(np.abs(errors), ERROR_EDGES[0], ERROR_EDGES[-1])
        return SchemeReport(
            scheme.name,
            (),
            scheme.bits_per_layer,
            tuple(row(range(layer + 1), range(layer, layer + 1), found) for layer, found in enumerate(prefixes)),
            tuple(row(layers, layers, found) for layers, found in groups),
            tuple((np.histogram(within, ERROR_EDGES)[0] / errors.size).tolist()),
        )


def label(start: int, stop: int) -> str:
    """ "L0", or "L0–L2" for the layers start … stop - 1."""
    return f"L{start}" if stop == start + 1 else f"L{start}–L{stop - 1}"


# Codecs: one contract for ours, bins, and no tokens at all ------------------------------------------------------------


class Codec(ABC):
    """One setting of one method: a coarser prefix or another number of bins is another codec.

    name: method and setting, as a table shows them: "calibrated L0-L2"; family: the method; series: of settings that
    one curve joins; partial: whether it decodes a part of another codec's tokens. A codec is fitted or trained before
    it becomes one, and has no state that a call would change.
    """

    name: str
    family: str
    series: str
    partial: bool

    @abstractmethod
    def reconstruct(self, chunks: FloatArray) -> FloatArray:
        """Encode and decode: float32 [B, T, A] to float32 [B, T, A], both in the robot's own units."""

    @abstractmethod
    def bits_per_step(self, chunks: FloatArray) -> float:
        """Mean bits that the tokens of one step need as a policy emits them: log2 of the vocabulary per token."""


@dataclass(frozen=True)
class RfsqCodec(Codec):
    """The first `prefix` layers of the tokens of a float32 model, which must decode on their own.

    published: decoded as the published `decode_from_indices` does.
    """

    name: str
    model: ActionAutoencoder
    prefix: int
    published: bool = False
    family = series = "ours"
    partial = False

    def reconstruct(self, chunks: FloatArray) -> FloatArray:
        """See Codec. Raises NotDecodableError where tokens alone do not decode."""
        with torch.no_grad():
            tokens = self.model.encode(torch.from_numpy(chunks))[0][..., : self.prefix]
            if self.published:
                decoded = self.model.decode_latents(published_dequantize(self.model.quantizer, tokens))
            else:
                decoded = self.model.decode(tokens)
        result: FloatArray = decoded.numpy()
        return result

    def bits_per_step(self, chunks: FloatArray) -> float:
        """D * l tokens of log2 K bits."""
        del chunks
        sizes = self.model.config
        return self.prefix * sizes.latent_dim * math.log2(sizes.num_levels)


@dataclass(frozen=True)
class RawCodec(Codec):
    """No tokens at all: the actions as they are."""

    name: str = "raw actions"
    family = series = "raw actions"
    partial = False

    def reconstruct(self, chunks: FloatArray) -> FloatArray:
        return chunks

    def bits_per_step(self, chunks: FloatArray) -> float:
        """float32 numbers."""
        return float(32 * chunks.shape[-1])


# Per-dimension uniform bins, as RT-2 and OpenVLA turn actions into tokens ---------------------------------------------


class BinRange(StrEnum):
    """What the bins of a dimension cover: 1st to 99th percentile (OpenVLA, clipped) or its whole range (RT-2)."""

    QUANTILE = "1-99 %"
    FULL = "min-max"


@dataclass(frozen=True, eq=False)
class BinCodec(Codec):
    """One token of 2^bits uniform bins per action dimension; decodes to the middle of the bin.

    low, high: float64 [A], where the bins begin and end in the robot's own units; actions outside are clipped. Where
    both are equal (a dimension that never moves), every token decodes to that value. Bins nest: the first k bits of a
    token are the token of the codec with 2^k bins, so every coarser setting is also a prefix.

    RT-2 and OpenVLA use 256 bins. OpenVLA places 256 edges, from the one percentile to the other: 255 bins.

    >>> codec = BinCodec("4 bins", low=np.array([-1.0]), high=np.array([1.0]), bits=2)
    >>> codec.tokens(np.array([[-1.0], [0.1], [5.0]], np.float32)).tolist()
    [[0], [2], [3]]
    >>> codec.decode(np.array([[0], [2], [3]])).tolist()
    [[-0.75], [0.25], [0.75]]
    """

    name: str
    low: Array
    high: Array
    bits: int
    series: str = "bins"
    family = "bins"
    partial = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= _MOST_BITS:
            raise EvidenceError(f"{self.bits} bits per bin token; expected 1 to {_MOST_BITS}")
        if self.low.shape != self.high.shape or self.low.ndim != 1 or not (self.low <= self.high).all():
            raise EvidenceError(f"bins from {self.low} to {self.high}; expected two [A], the second nowhere lower")

    def tokens(self, actions: FloatArray) -> npt.NDArray[np.int64]:
        """float32 [..., A] to tokens [..., A], each 0 ... 2^bits - 1."""
        span = self.high - self.low
        share = (actions.astype(np.float64) - self.low) / np.where(span > 0, span, 1.0)
        bins = 1 << self.bits
        return np.clip(np.floor(share * bins), 0, bins - 1).astype(np.int64)

    def decode(self, tokens: npt.NDArray[np.int64]) -> FloatArray:
        """tokens [..., A] to actions float32 [..., A]."""
        middle = (tokens + 0.5) / (1 << self.bits)
        return (self.low + middle * (self.high - self.low)).astype(np.float32)

    def reconstruct(self, chunks: FloatArray) -> FloatArray:
        """See Codec; chunks of any length."""
        return self.decode(self.tokens(chunks))

    def bits_per_step(self, chunks: FloatArray) -> float:
        """A tokens of `bits` bits."""
        return float(self.bits * chunks.shape[-1])


def fit_bins(steps: FloatArray, kind: BinRange, bits: int) -> BinCodec:
    """Bins over training actions [N, A]."""
    low, high = action_range(steps, kind)
    return BinCodec(f"{1 << bits} bins, {kind.value}", low, high, bits, f"bins, {kind.value}")


def action_range(steps: FloatArray, kind: BinRange) -> tuple[Array, Array]:
    """Low and high of each dimension of [N, A]: float64 [A] each.

    A dimension whose percentiles coincide although it moves (a gripper that rarely closes) gets its full range.
    """
    values = steps.astype(np.float64)
    full = values.min(axis=0), values.max(axis=0)
    if kind is BinRange.FULL:
        return full
    low, high = np.quantile(values, QUANTILES, axis=0)
    moves = high > low
    return np.where(moves, low, full[0]), np.where(moves, high, full[1])
