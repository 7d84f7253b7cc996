"""The float64 reference of chunk tokens: what `Reference` is for per-step tokens.

Where `Reference` judges single steps of held-out episodes, chunks are judged here, [N, T, A]: a chunk codes its steps
together, so they must follow each other in one episode (`episode_chunks`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rfsq.export.reference import Answers
from rfsq.rfsq_ref.chunk_judging import chunk_token_bounds, judge_chunk_tokens
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.runtime.bundle.arrays import Float32Array, Float64Array, Int32Array, in_chunks
from rfsq.runtime.bundle.comparison import TokenComparison
from rfsq.runtime.bundle.fidelity import Fidelity, fidelity
from rfsq.runtime.bundle.gates import GATES, near_tie_cap
from rfsq.runtime.bundle.golden import Expected, Golden


def episode_chunks(episodes: Sequence[npt.NDArray[np.floating[Any]]], chunk_length: int) -> Float32Array:
    """Episodes [n, A] as chunks float32 [N, T, A], one behind the other; the last of each is filled up with its last
    step."""
    return np.concatenate([in_chunks(episode, chunk_length) for episode in episodes]).astype(np.float32)


class ChunkReference:
    """A chunk tokenizer in float64, which decides, and in float32, for what rounding alone does."""

    def __init__(self, tokenizer: ChunkTokenizer) -> None:
        self.model = copy.deepcopy(tokenizer).double()
        self.prefixes = (tokenizer.sizes.num_tokens,)
        self._float32_model = copy.deepcopy(tokenizer).float()

    @torch.no_grad()
    def answer(self, actions: Float32Array) -> Answers:
        """actions: float32 [N, T, A] in physical units. Chunk n is decoded in part from 1 + n mod L tokens."""
        inputs = torch.from_numpy(actions)
        tokens, depth = self.model.encode(inputs.double()).numpy().astype(np.int32), self.model.sizes.num_tokens
        decoded = self.decode(tokens)
        lengths = (1 + np.arange(len(actions)) % depth).astype(np.int32)
        partial = np.empty_like(decoded)
        for length in np.unique(lengths):
            partial[lengths == length] = self.decode(tokens[lengths == length, :length])
        float32_tokens = self._float32_model.encode(inputs).numpy()
        float32 = self.judge(actions, tokens, float32_tokens)
        units = self.model.units.numpy()
        expected = Expected(
            actions=actions,
            tokens=tokens,
            stats=None,
            decoded={depth: decoded},
            near_tie_cap=near_tie_cap(float32.num_near_ties),
            flip_tolerance=self._flip_tolerance(inputs, decoded),
            lengths=lengths,
            partial=partial,
        )
        return Answers(expected, float32, (np.abs(decoded - self.decode(float32_tokens)) / units).max(-1))

    def golden(self, expected: Expected) -> Golden:
        """The same, with the margin and the bound of every token."""
        _, *edges = chunk_token_bounds(self.model, torch.from_numpy(expected.actions).double())
        margins, bounds = (part.float().numpy() for part in edges)
        return Golden(**vars(expected), margins=margins, bounds=bounds)

    def _flip_tolerance(self, actions: Tensor, decoded: Float64Array) -> float:
        """How far a chunk with a near-tie flip may lie from `decoded`, in normalised units.

        Both sides of a tie code the same chunk, so each may be as far from it as codings of these are; what lies
        outside of [-1, 1] is coded as its end.
        """
        ends = self.model.normalised(actions.double()).clamp(-1, 1)
        error = (self.model.normalised(torch.from_numpy(decoded)) - ends).abs()
        return 2 * float(error.max() if len(error) else 0) + GATES.action_error

    def judge(
        self, actions: Float32Array, expected: Int32Array, found: npt.NDArray[np.integer[Any]]
    ) -> TokenComparison:
        """Every token that float32 cannot explain (`judge_chunk_tokens`).

        actions: float32 [N, T, A]; expected: the reference's own tokens, found: another implementation's, both [N, L].
        """
        return judge_chunk_tokens(self.model, torch.from_numpy(actions).double(), expected, found)

    @torch.no_grad()
    def decode(self, tokens: npt.NDArray[np.integer[Any]], stats: Float32Array | None = None) -> Float64Array:
        """The first l tokens [N, l] to actions float64 [N, T, A]; stats: there are none."""
        assert stats is None
        return np.asarray(self.model.decode(torch.from_numpy(tokens.astype(np.int64))).numpy(), np.float64)

    @torch.no_grad()
    def action_mse(self, chunks: Float32Array) -> dict[str, float]:
        """Mean squared error in normalised units of chunks [N, T, A] by the number of tokens, at every budget; empty
        without any."""
        if not len(chunks):
            return {}
        tokens, units = self._encode(chunks), self.model.units.numpy()
        return {
            f"{budget} of {tokens.shape[1]} tokens": float(
                np.mean(((self.decode(tokens[:, :budget]) - chunks) / units) ** 2)
            )
            for budget in self.model.code.budgets
        }

    @torch.no_grad()
    def fidelity(self, chunks: Float32Array) -> Fidelity | None:
        """What all tokens make of chunks [N, T, A], for each dimension in the robot's units; None without any."""
        if not len(chunks):
            return None
        steps, decoded = (part.reshape(-1, chunks.shape[-1]) for part in (chunks, self.decode(self._encode(chunks))))
        return fidelity(steps, decoded, self.model.units.tolist(), self.model.offset.tolist())

    def _encode(self, chunks: Float32Array) -> npt.NDArray[np.int64]:
        return np.asarray(self.model.encode(torch.from_numpy(chunks).double()).numpy())
