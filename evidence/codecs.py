"""One contract for every way of turning action chunks into tokens and back: ours, the published one, the peers."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.data import FloatArray
from rfsq.rfsq_ref.quantizer import published_dequantize


@runtime_checkable
class Codec(Protocol):
    """One setting of one method: a coarser prefix or another number of bins is another codec.

    A codec is fitted or trained before it becomes one, and has no state that a call would change.
    """

    @property
    def name(self) -> str:
        """Method and setting, as a table shows them: "calibrated L0-L2"."""

    def reconstruct(self, chunks: FloatArray) -> FloatArray:
        """Encode and decode: float32 [B, T, A] to float32 [B, T, A], both in the robot's own units."""

    def bits_per_step(self, chunks: FloatArray) -> float:
        """Mean bits that the tokens of one step need as a policy emits them: log2 of the vocabulary per token."""


@dataclass(frozen=True)
class RfsqCodec:
    """The first `prefix` layers of the tokens of a float32 model, which must decode on their own.

    published: decoded as the published `decode_from_indices` does.
    """

    name: str
    model: ActionAutoencoder
    prefix: int
    published: bool = False

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
class RawCodec:
    """No tokens at all: the actions as they are."""

    name: str = "raw actions"

    def reconstruct(self, chunks: FloatArray) -> FloatArray:
        return chunks

    def bits_per_step(self, chunks: FloatArray) -> float:
        """float32 numbers."""
        return float(32 * chunks.shape[-1])
