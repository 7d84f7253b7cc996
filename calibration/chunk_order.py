"""The order of the bits of chunk tokens, which latent each of them refines, and of their classes."""

from functools import cache

import torch
from torch import Tensor

from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.rfsq_ref.chunk_code import WIDTH, cell_middles


@cache
def distortions() -> Tensor:
    """Mean squared error [MOST_BITS + 1] of a standard normal latent of so many bits, each with its best gain."""
    z = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    density /= density.sum()
    y = torch.tanh(z / WIDTH)
    found = [1.0]
    for bits in range(1, MOST_BITS + 1):
        level = WIDTH * torch.atanh(cell_middles(y, bits))
        gain = (density * z * level).sum() / (density * level.square()).sum()
        found.append(float((density * (z - gain * level).square()).sum()))
    return torch.tensor(found, dtype=torch.float64)


def bit_order(variances: Tensor, num_bits: int, shared_bits: int = 0) -> Tensor:
    """The latent [C, num_bits] that each bit refines, the one first whose error falls most: variances [C, N].

    The first `shared_bits` are the same in all classes, the best for their mean variances, each class's over its sum: a
    policy learns sooner what a bit means that means the same everywhere.
    """
    falls = variances.unsqueeze(-1) * -distortions().diff()
    # Of one latent, each bit must come behind the one before, whatever rounding says.
    falls = falls.cummin(dim=-1).values
    shared = torch.empty(len(variances), 0, dtype=torch.long)
    if shared_bits:
        mean = (variances / variances.sum(dim=1, keepdim=True)).mean(dim=0, keepdim=True)
        shared = bit_order(mean, shared_bits).expand(len(variances), -1)
        count = torch.bincount(shared[0], minlength=variances.shape[1])
        falls = torch.where(torch.arange(MOST_BITS) < count.unsqueeze(-1), -torch.inf, falls)
    own = falls.flatten(1).argsort(dim=1, descending=True, stable=True)[:, : num_bits - shared_bits]
    return torch.cat((shared, own // MOST_BITS), dim=1)


def class_order(means: Tensor, weights: Tensor) -> Tensor:
    """Classes [C] in an order in which each bit of their numbers says as much as it can of where their means lie:
    halves along the direction in which the means [C, N] differ most, each halved again. weights [C]: of each class.

    A policy that says a class by a few bits at a time then says first what matters most.
    """
    count = len(means)
    if count < 2:
        return torch.arange(count)
    shares = (weights / weights.sum()).unsqueeze(-1)
    apart = means - (shares * means).sum(dim=0)
    direction = torch.linalg.svd(shares.sqrt() * apart, full_matrices=False).Vh[0]
    direction = direction * direction[direction.abs().argmax()].sign()
    along = (apart @ direction).argsort(stable=True)
    # As many as the numbers that begin with a 0.
    half = 1 << (count - 1).bit_length() - 1
    parts = (along[:half], along[half:])
    return torch.cat([part[class_order(means[part], weights[part])] for part in parts])
