"""The escape class of chunk tokens: every value by itself, on a grid that each bit makes finer."""

import torch
from torch import Tensor

from rfsq.rfsq_ref.chunk_bits import MOST_BITS, binary, number
from rfsq.runtime.bundle.decoding import BLOCK_BITS as BLOCK_BITS
from rfsq.runtime.bundle.decoding import BLOCK_VALUES as BLOCK_VALUES


def escape_levels(num_bits: int, num_values: int) -> Tensor:
    """How many levels each value [N] of an escaped chunk has in so many code bits: first three, then twice as many for
    each further bit, value by value."""
    blocks = min(max(num_bits, 0) // BLOCK_BITS, -(-num_values // BLOCK_VALUES))
    ternary = min(blocks * BLOCK_VALUES, num_values)
    levels = torch.ones(num_values, dtype=torch.long)
    levels[:ternary] = 3
    if ternary == num_values:
        more = max(num_bits - blocks * BLOCK_BITS, 0)
        each, rest = divmod(more, num_values)
        doubled = torch.full((num_values,), min(each, MOST_BITS))
        doubled[:rest] = min(each + 1, MOST_BITS)
        levels <<= doubled
    return levels


def escape_bound(num_bits: int, num_values: int) -> float:
    """The most by which an escaped value in [-1, 1] errs: half a step of the coarsest grid."""
    return 1 / int(escape_levels(num_bits, num_values).min())


def escape_encode(chunks: Tensor, num_bits: int) -> Tensor:
    """Chunks [B, N], values outside [-1, 1] at its ends, to code bits [B, num_bits]; those left over are 0."""
    count, num_values = chunks.shape
    # Multiplied before anything is added, which is exact for every float32.
    half = 3 * 2 ** (MOST_BITS - 1)
    cells = (torch.floor(chunks.double().clamp(-1, 1) * half).long() + half).clamp(max=2 * half - 1)
    blocks = -(-num_values // BLOCK_VALUES)
    ternary = torch.zeros(count, blocks * BLOCK_VALUES, dtype=torch.long, device=chunks.device)
    ternary[:, :num_values] = cells >> MOST_BITS
    weights = 3 ** torch.arange(BLOCK_VALUES - 1, -1, -1, device=chunks.device)
    words = (ternary.reshape(count, blocks, BLOCK_VALUES) * weights).sum(dim=-1)
    finer = binary(cells & (2**MOST_BITS - 1), MOST_BITS).transpose(1, 2).flatten(1)
    code = torch.cat((binary(words, BLOCK_BITS).flatten(1), finer), dim=1)[:, :num_bits]
    return torch.nn.functional.pad(code, (0, num_bits - code.shape[1]))


def escape_decode(code: Tensor, num_values: int) -> Tensor:
    """Code bits [B, j] to chunks float64 [B, N]: the middle of the cell that each value is in, 0 before its first."""
    count, length = code.shape
    levels = escape_levels(length, num_values).to(code.device)
    blocks = min(length // BLOCK_BITS, -(-num_values // BLOCK_VALUES))
    # Words that no chunk has decode as the last one that a chunk may have.
    words = number(code[:, : blocks * BLOCK_BITS].reshape(count, blocks, BLOCK_BITS)).clamp(max=3**BLOCK_VALUES - 1)
    weights = 3 ** torch.arange(BLOCK_VALUES - 1, -1, -1, device=code.device)
    cells = torch.zeros(count, num_values, dtype=torch.long, device=code.device)
    ternary = (words.unsqueeze(-1) // weights % 3).flatten(1)[:, :num_values]
    cells[:, : ternary.shape[1]] = ternary
    if int(levels.min()) >= 3:
        finer = code[:, blocks * BLOCK_BITS :][:, : num_values * MOST_BITS]
        for start in range(0, finer.shape[1], num_values):
            bits = finer[:, start : start + num_values]
            cells[:, : bits.shape[1]] = 2 * cells[:, : bits.shape[1]] + bits
    return (2 * cells + 1).double() / levels - 1
