"""One contract for every way of turning action chunks into tokens and back: ours, the published one, the peers."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.data import FloatArray
from rfsq.rfsq_ref.quantizer import published_dequantize


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
