"""One contract for every way of turning action chunks into tokens and back; ours, bins, and no tokens at all."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import torch

from rfsq.evidence.errors import EvidenceError
from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.data import FloatArray
from rfsq.rfsq_ref.normaliser import QUANTILES
from rfsq.rfsq_ref.quantizer import published_dequantize

Float64Array = npt.NDArray[np.float64]
_MOST_BITS = 24


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
    low: Float64Array
    high: Float64Array
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


def action_range(steps: FloatArray, kind: BinRange) -> tuple[Float64Array, Float64Array]:
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
