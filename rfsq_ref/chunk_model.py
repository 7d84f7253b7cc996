"""Chunk tokens in the robot's units: a normaliser around a chunk code."""

import torch
from torch import Tensor

from rfsq.rfsq_ref.autoencoder import InRobotUnits
from rfsq.rfsq_ref.chunk_code import ChunkCode, ChunkConstants, ChunkSizes
from rfsq.rfsq_ref.errors import SettingsError
from rfsq.rfsq_ref.normaliser import Normaliser
from rfsq.runtime.bundle.arrays import last_rounding


class ChunkTokenizer(InRobotUnits):
    """Actions [..., T, A] to tokens [..., L] and back, in float32 or float64 (`.double()`).

    Actions are normalised by (action - offset) / units, float32 [A] each; the code holds values in [-1, 1].
    """

    def __init__(self, sizes: ChunkSizes, constants: ChunkConstants, normaliser: Normaliser | None = None) -> None:
        super().__init__(sizes.action_dim, normaliser)
        if normaliser is not None and len(normaliser.scale) != sizes.action_dim:
            raise SettingsError(f"normaliser for {len(normaliser.scale)} dimensions, code for {sizes.action_dim}")
        self.code, self.normaliser = ChunkCode(sizes, constants), normaliser

    @property
    def sizes(self) -> ChunkSizes:
        return self.code.sizes

    def normalised(self, actions: Tensor) -> Tensor:
        """Actions [..., T, A] to chunks [..., N] of the code."""
        return ((actions - self.offset) / self.units).flatten(-2)

    def encode(self, actions: Tensor) -> Tensor:
        """Actions [..., T, A] to tokens int64 [..., L]."""
        chunks = self.normalised(actions)
        tokens = self.code.encode(chunks.reshape(-1, self.sizes.num_values))
        return tokens.reshape(*chunks.shape[:-1], self.sizes.num_tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        """The first l tokens [..., l] of chunks, l from 1 to L, to actions [..., T, A]."""
        sizes = self.sizes
        chunks = self.code.decode(tokens.reshape(-1, tokens.shape[-1]))
        return chunks.reshape(*tokens.shape[:-1], sizes.chunk_length, sizes.action_dim) * self.units + self.offset

    def bound(self, num_tokens: int) -> Tensor:
        """The most by which each dimension [A] errs, in the robot's units, of actions that are normalised to [-1, 1];
        for numbers of tokens in `code.budgets`. The last rounding counts, to a float32 in the robot's units."""
        rounding = torch.from_numpy(last_rounding(self.offset.cpu(), self.units.cpu()))
        return self.code.bound(num_tokens) * self.units.double().cpu() + rounding
