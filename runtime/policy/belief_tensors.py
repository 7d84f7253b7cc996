"""What beliefs about both kinds of tokens need of torch: distributions, and gradients where a plain one has no end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bundle.arrays import AnyArray
from ..bundle.beliefs import SUM_TOLERANCE, Belief


def tensor_of(array: AnyArray, like: Tensor) -> Tensor:
    """Of its device, and of its type where the array has floats."""
    kind = like.dtype if array.dtype.kind == "f" else torch.int64
    # A copy, because what was read from a file cannot be written.
    return torch.tensor(array, dtype=kind, device=like.device)


def softmax(values: Tensor, sharpness: Tensor | None, *, is_logits: bool) -> Tensor:
    """Logits, or probabilities, [..., n, K] to probabilities; sharpness: 1 / temperature [n], None for 1.

    NaN where logits are NaN or all -inf, and where what is given is no distribution.
    """
    sharpness = None if sharpness is None else sharpness.unsqueeze(-1)
    if is_logits:
        return (values if sharpness is None else values * sharpness).softmax(-1)
    sums = values.sum(-1, keepdim=True)
    is_distribution = ((sums - 1).abs() <= SUM_TOLERANCE) & (values >= 0).all(-1, keepdim=True)
    if sharpness is not None:
        # Over the largest, or all may become 0. A gradient at 0 may have no end.
        share = values / values.amax(-1, keepdim=True)
        values = torch.where(share > 0, torch.where(share > 0, share, 1) ** sharpness, 0)
        sums = values.sum(-1, keepdim=True)
    return torch.where(is_distribution, values / sums, torch.nan)


def marked(belief: Belief[Tensor], distributions: Sequence[Tensor], dim: int) -> Belief[Tensor]:
    """With NaN, and a mode of -1, in every chunk of which any distribution is none: what was made of it may be finite.

    distributions: [..., *] with NaN in them; dim: the first axis behind those of chunks.
    """
    # No sum of probabilities is infinite.
    mark = 0 * torch.stack([part.detach().flatten(dim).sum(-1) for part in distributions]).sum(0)
    wide, mode = mark[..., None, None], belief.mode
    is_wrong = mark.isnan().reshape(mark.shape + (1,) * (mode.ndim - mark.ndim))
    return Belief(
        belief.actions + wide, belief.std + wide, belief.mode_probability + mark, torch.where(is_wrong, -1, mode)
    )


def one_hot(indices: Tensor, like: Tensor) -> Tensor:
    """[...] to [..., K] of the type and the last axis of `like`."""
    return (indices.unsqueeze(-1) == torch.arange(like.shape[-1], device=like.device)).to(like.dtype)


def drawn(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """An index [...] from each distribution [..., K]: of exponential times with these rates the first to come. Nothing
    waits for a GPU, as it does in multinomial."""
    rates = probabilities.detach()
    return (rates / torch.empty_like(rates).exponential_(generator=generator)).argmax(-1)


def straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """The first, with the gradient of the second."""
    return gradient + (value - gradient).detach()


def root(variance: Tensor) -> Tensor:
    """The square root, whose gradient is 0 where that of the variance has no end."""
    is_none = variance == 0
    return torch.where(is_none, 0, torch.where(is_none, 1, variance).sqrt())
