"""Beliefs about per-step tokens in operations of torch, through which gradients flow. Formulas: docs/beliefs.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from ..bundle.beliefs import Belief, BeliefMode
from ..bundle.decoding import StepDecoding
from .belief_tensors import drawn, marked, one_hot, root, softmax, straight_through, tensor_of


@dataclass(frozen=True, eq=False)
class StepBeliefs:
    """The constants of a decoder on one device, in one type: see `StepDecoding`. offset: [A] in physical units."""

    maps: dict[int, tuple[Tensor, Tensor]]
    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    offset: Tensor
    coarse: int

    @classmethod
    def of(cls, decoding: StepDecoding, offset: tuple[float, ...], coarse: int, like: Tensor) -> Self:
        """coarse: layers that are the mode; like: a tensor of the device and the type."""
        return cls(
            {
                prefix: (tensor_of(matrix, like), tensor_of(decoding.offsets[prefix], like))
                for prefix, matrix in decoding.matrices.items()
            },
            (tensor_of(decoding.first_weight, like), tensor_of(decoding.first_bias, like)),
            (tensor_of(decoding.second_weight, like), tensor_of(decoding.second_bias, like)),
            torch.tensor(offset, dtype=like.dtype, device=like.device),
            coarse,
        )

    def decode(
        self,
        given: tuple[Tensor, ...],
        sharpness: Tensor | None,
        mode: BeliefMode,
        generator: torch.Generator | None,
        *,
        is_logits: bool,
    ) -> Belief[Tensor]:
        """given: [..., T, D, l, K]; sharpness: 1 / temperature [l], None for 1. mode_probability [...]."""
        probabilities = softmax(given[0], sharpness, is_logits=is_logits)
        likeliest, coarse = probabilities[..., : self.coarse, :].max(dim=-1), self.coarse
        chosen, known, tokens = likeliest.indices, probabilities, None
        if mode == "sample":
            tokens = drawn(probabilities, generator)
            chosen = tokens[..., :coarse]
        if mode != "expected":
            known = torch.cat((one_hot(chosen, probabilities), probabilities[..., coarse:, :]), dim=-2)
        levels = torch.arange(known.shape[-1], dtype=known.dtype, device=known.device)
        mean = (known * levels).sum(-1)
        variance = (known * (levels - mean.unsqueeze(-1)).square()).sum(-1)
        actions, hidden = self._actions(mean)
        if tokens is not None:
            actions = straight_through(self._actions(tokens.to(actions.dtype))[0], actions)
        probability = likeliest.values.flatten(-3)
        # Of no steps at all nothing is unsure.
        probability = probability.amin(-1) if probability.shape[-1] else probability.new_ones(probability.shape[:-1])
        return marked(Belief(actions, self._std(hidden, variance), probability, chosen), (probabilities,), -4)

    def _actions(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [..., D, l], or what is expected of them, to actions [..., A] and the hidden layer [..., H]."""
        matrix, offset = self.maps[tokens.shape[-1]]
        latents = functional.linear(tokens.flatten(-2), matrix, offset)
        hidden = functional.linear(latents, *self.first)
        return functional.linear(functional.mish(hidden), *self.second) + self.offset, hidden

    def _std(self, hidden: Tensor, variance: Tensor) -> Tensor:
        """Of actions [..., A], by the variance of the tokens [..., D, l]."""
        matrix = self.maps[variance.shape[-1]][0]
        jacobian = (self.second[0] * _mish_slope(hidden).unsqueeze(-2)) @ self.first[0] @ matrix
        return root((jacobian.square() @ variance.flatten(-2).unsqueeze(-1)).squeeze(-1))


def _mish_slope(x: Tensor) -> Tensor:
    """The derivative of x tanh(log(1 + e^x))."""
    inner = functional.softplus(x).tanh()
    return inner + x * x.sigmoid() * (1 - inner.square())
