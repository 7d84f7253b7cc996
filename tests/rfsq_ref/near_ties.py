"""Tells tokens that float32 may decide either way from tokens that are wrong (docs/architecture.md)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.rfsq_ref.rounding import token_error_bounds


@dataclass(frozen=True)
class Verdict:
    """total: tokens compared; differing: all that differ, followers included; near_ties and wrong: the first ones to
    differ, inside and outside the rounding bound; closest: the largest margin of these in parts of its bound."""

    total: int
    differing: int
    near_ties: int
    wrong: int
    closest: float


def first_differences(expected: Tensor, found: Tensor, *, whole_step: bool) -> Tensor:
    """Differences that have none in an earlier layer of the same latent or, with `whole_step`, of the same step."""
    different = expected != found
    source = different.any(-2, keepdim=True) if whole_step else different
    return different & ~((source.cumsum(-1) - source.long()) > 0)


class Judge:
    """A float64 reference's opinion of float32 actions [..., A]."""

    def __init__(self, reference: ActionAutoencoder, actions: Tensor) -> None:
        self.tokens, self.margins, self.bounds = token_error_bounds(reference, actions.double())
        self._whole_step = reference.conditioning is Conditioning.DYNAMIC

    def verdict(self, found: Tensor, expected: Tensor | None = None) -> Verdict:
        """On float32 tokens [..., D, L], held against the reference's own unless others are expected."""
        found = found.to(torch.int64)
        expected = self.tokens if expected is None else expected
        first = first_differences(expected, found, whole_step=self._whole_step)
        ratios = (self.margins / self.bounds)[first]
        return Verdict(
            total=expected.numel(),
            differing=int((expected != found).sum()),
            near_ties=int((first & (self.margins <= self.bounds)).sum()),
            wrong=int((first & ~(self.margins <= self.bounds)).sum()),
            closest=float(ratios.max()) if len(ratios) else 0.0,
        )
