"""Numbers as bits, the highest first, as chunk tokens have them."""

import torch
from torch import Tensor

from rfsq.runtime.bundle.decoding import MOST_BITS as MOST_BITS


def number(bits: Tensor) -> Tensor:
    """Bits [..., n], the highest first, to the number [...] that they spell."""
    places = torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)
    return (bits.long() << places).sum(dim=-1)


def binary(numbers: Tensor, length: int) -> Tensor:
    """The inverse of `number`: [..., length]."""
    return numbers.unsqueeze(-1) >> torch.arange(length - 1, -1, -1, device=numbers.device) & 1
