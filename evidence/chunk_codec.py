"""Chunk tokens as codecs, to be compared with those of others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from rfsq.calibration.chunk import ChunkFitConfig, fit_chunk_code
from rfsq.evidence.schemes import Codec
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.data import ActionDataset, FloatArray
from rfsq.rfsq_ref.normaliser import Normaliser

IntArray = npt.NDArray[np.int64]
FAMILY = "chunk tokens"


@dataclass(frozen=True, eq=False)
class ChunkCodec(Codec):
    """The first `prefix` tokens of a float64 model; chunks of its length alone."""

    name: str
    partial: bool
    model: ChunkTokenizer
    prefix: int
    family = series = FAMILY

    @property
    def vocabulary(self) -> int:
        return 1 << self.model.sizes.token_bits

    def tokens(self, chunks: FloatArray) -> IntArray:
        """float32 [B, T, A] to tokens [B, prefix]."""
        with torch.no_grad():
            tokens: IntArray = self.model.encode(torch.from_numpy(chunks.astype(np.float64))).numpy()
        return tokens[:, : self.prefix]

    def decode(self, tokens: npt.ArrayLike, length: int) -> FloatArray:
        """tokens [B, prefix] to actions float32 [B, length, A]; length: of the model's chunks."""
        del length
        with torch.no_grad():
            decoded = self.model.decode(torch.as_tensor(np.asarray(tokens)))
        return decoded.numpy().astype(np.float32)

    def reconstruct(self, chunks: FloatArray) -> FloatArray:
        return self.decode(self.tokens(chunks), chunks.shape[1])

    def bits_per_step(self, chunks: FloatArray) -> float:
        """token_bits of each token."""
        del chunks
        return self.prefix * self.model.sizes.token_bits / self.model.sizes.chunk_length


def fit_chunk_model(
    train: ActionDataset, calibration: ActionDataset, sizes: ChunkSizes, normaliser: Normaliser | None, seed: int
) -> ChunkTokenizer:
    """In float64. normaliser: of the actions, which the code takes in [-1, 1]. Raises DataError."""
    constants = fit_chunk_code(train.episodes, calibration.episodes, sizes, ChunkFitConfig(seed), normaliser)
    return ChunkTokenizer(sizes, constants, normaliser).double()


def sizes_for(bits: float, action_dim: int, chunk_length: int) -> ChunkSizes:
    """As many tokens as so many bits a step have room for, to the nearest token, and no more than a chunk can use."""
    least = ChunkSizes(action_dim, chunk_length, num_tokens=1)
    wanted = round(bits * chunk_length / least.token_bits)
    return replace(least, num_tokens=max(1, min(wanted, least.most_tokens)))


def chunk_codecs(model: ChunkTokenizer, budgets: Sequence[float]) -> list[ChunkCodec]:
    """As many tokens as each budget, in bits of a step, has room for, to the nearest token; all tokens at most."""
    sizes = model.sizes
    counts = {min(max(round(bits * sizes.chunk_length / sizes.token_bits), 1), sizes.num_tokens) for bits in budgets}
    return [
        ChunkCodec(f"{FAMILY}, {count} of {sizes.num_tokens}", count < sizes.num_tokens, model, count)
        for count in sorted(counts)
    ]
