"""Judges chunk tokens: which differences from the float64 reference float32 rounding explains, and which are wrong."""

import torch
from torch import Tensor

from rfsq.rfsq_ref.chunk_bits import MOST_BITS, binary, number
from rfsq.rfsq_ref.chunk_code import ChunkCode, by_class
from rfsq.rfsq_ref.chunk_escape import BLOCK_BITS, BLOCK_VALUES, escape_levels
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.chunk_rounding import Chunks, choice, latents_of, normalised_chunks
from rfsq.runtime.bundle.arrays import IntegerArray
from rfsq.runtime.bundle.comparison import TokenComparison, sorted_out

#: Values of chunks that are judged at a time: a few hundred MB.
_BLOCK = 2**16
#: The bound of what does not depend on the actions; not 0, by which nothing can be divided.
_NEVER = 2.0**-100


def judge_chunk_tokens(
    tokenizer: ChunkTokenizer, actions: Tensor, expected: IntegerArray, found: IntegerArray
) -> TokenComparison:
    """How tokens `found` differ from the reference's own, `expected`, both [N, L], of actions float64 [N, T, A].

    A class that differs is a near-tie where float32 may choose it (`Choice.acceptable`). What follows is judged along
    the class found: the cell of a latent, or of a value in escape, is a near-tie where what float32 may make of it
    reaches into that cell; else the token with the first bit that no rounding explains is wrong. So are tokens that are
    none, numbers of classes and words of escape behind the last, and bits of escape that mean nothing but are not 0.
    Nothing is `behind`. Raises ValueError where shapes differ, or for another dtype than float64.
    """
    shape = (len(actions), tokenizer.sizes.num_tokens)
    if expected.shape != shape or found.shape != shape:
        raise ValueError(f"tokens have shapes {expected.shape} and {found.shape}; expected {shape}")
    wrong, near_ties = torch.zeros(2, *shape, dtype=torch.bool)
    ours, theirs = (torch.from_numpy(tokens.astype("int64")) for tokens in (expected, found))
    with torch.no_grad():
        for rows in torch.split((ours != theirs).any(dim=1).nonzero()[:, 0], _rows(tokenizer)):
            chunks = normalised_chunks(tokenizer, actions[rows])
            wrong[rows], near_ties[rows] = _judged(tokenizer.code, chunks, ours[rows], theirs[rows])
    margins, bounds = torch.zeros(2, *shape, dtype=torch.float64)
    if wrong.any():
        first = wrong.any(dim=1).nonzero()[:1, 0]
        _, margins[first], bounds[first] = chunk_token_bounds(tokenizer, actions[first])
    masks = wrong.numpy(), near_ties.numpy(), torch.zeros_like(wrong).numpy()
    return sorted_out(expected, found, (margins.numpy(), bounds.numpy()), masks)


def _rows(tokenizer: ChunkTokenizer) -> int:
    """How many chunks are judged at a time."""
    return max(_BLOCK // tokenizer.sizes.num_values, 1)


def _judged(code: ChunkCode, chunks: Chunks, expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens are wrong, and which are near-ties: bool [n, L] each."""
    sizes = code.sizes
    legal = found.clamp(0, 2**sizes.token_bits - 1)
    bits = code.bits(legal)
    classes = code.classes(bits)
    class_of_reference = code.classes(code.bits(expected))
    is_explained = classes == class_of_reference
    other = (~is_explained).nonzero()[:, 0]
    if len(other):
        acceptable = choice(code, chunks[other]).acceptable()
        is_explained[other] = acceptable.gather(1, classes[other].unsqueeze(1)).squeeze(1)
    is_explained &= number(bits[:, : sizes.class_bits]) <= sizes.escape
    unexplained = torch.zeros_like(bits, dtype=torch.bool)
    for index, rows in by_class(classes):
        of = _unexplained_escape if index == sizes.escape else _unexplained
        unexplained[rows, sizes.class_bits :] = of(code, chunks[rows], bits[rows, sizes.class_bits :], index)
    wrong = (legal != found) | torch.unflatten(unexplained, 1, (-1, sizes.token_bits)).any(dim=2)
    wrong[:, 0] |= ~is_explained
    differs = found != code.encode_in(chunks.values, classes)
    differs[:, 0] |= classes != class_of_reference
    return wrong, differs & ~wrong


def _unexplained(code: ChunkCode, chunks: Chunks, bits: Tensor, index: int) -> Tensor:
    """For each latent the first bit that no rounding explains, of code bits [n, code_bits] of one class: bool."""
    latents = latents_of(code, chunks, index)
    order, rank = code.order[index], code.rank[index]
    digits = torch.zeros_like(latents.z, dtype=torch.long)
    digits.scatter_add_(1, order.expand_as(bits), bits << (MOST_BITS - 1 - rank))
    count = torch.bincount(order, minlength=digits.shape[1])
    first = _first_unexplained((latents.y + 1) / 2, latents.slack / 2, digits, count, 1)
    return first[:, order] == rank + 1


def _first_unexplained(place: Tensor, slack: Tensor, digits: Tensor, count: Tensor, coarsest: int) -> Tensor:
    """The first bit, counted from 1, behind which a value cannot be in the cell that is named; 0 where it always may.

    place: [n, V] in [0, 1], give or take slack; digits: the cell among coarsest * 2^MOST_BITS; count: [V] of bits.
    """
    first = torch.zeros_like(digits)
    for depth in range(1, int(count.max()) + 1):
        levels = coarsest << depth
        low, high = (_cell(place + sign * slack, levels) for sign in (-1, 1))
        cell = digits >> (MOST_BITS - depth)
        is_beyond = ((cell < low) | (cell > high)) & (depth <= count)
        first[(first == 0) & is_beyond] = depth
    return first


def _cell(place: Tensor, levels: int) -> Tensor:
    return (place * levels).floor().clamp(0, levels - 1).long()


def _unexplained_escape(code: ChunkCode, chunks: Chunks, bits: Tensor, _: int) -> Tensor:
    """The same for escape: of each word, and of each value behind its word."""
    length, num_values = bits.shape[1], code.sizes.num_values
    blocks = -(-num_values // BLOCK_VALUES)
    end = blocks * BLOCK_BITS
    place, slack = (chunks.values + 1) / 2, chunks.slack / 2
    padded = torch.nn.functional.pad(bits, (0, max(end + num_values * MOST_BITS - length, 0)))
    words = number(torch.unflatten(padded[:, :end], 1, (blocks, BLOCK_BITS)))
    possible = _possible_words(place, slack)
    unexplained = torch.zeros_like(padded, dtype=torch.bool)
    is_open = torch.ones_like(words, dtype=torch.bool)
    for depth in range(1, BLOCK_BITS + 1):
        shift = BLOCK_BITS - depth
        matches = (possible >> shift == (words >> shift).unsqueeze(-1)).any(dim=-1)
        unexplained[:, depth - 1 : end : BLOCK_BITS] = is_open & ~matches
        is_open &= matches
    finer = padded[:, end : end + num_values * MOST_BITS]
    finer = torch.unflatten(finer, 1, (MOST_BITS, num_values)).transpose(1, 2)
    weights = 3 ** torch.arange(BLOCK_VALUES - 1, -1, -1)
    ternary = (words.clamp(max=3**BLOCK_VALUES - 1).unsqueeze(-1) // weights % 3).flatten(1)[:, :num_values]
    digits = (ternary << MOST_BITS) + number(finer)
    depths = torch.log2(escape_levels(length, num_values) / 3).clamp(min=0).round().long()
    first = _first_unexplained(place, slack, digits, depths, 3)
    # Behind a wrong word nothing is to be expected.
    first *= is_open.repeat_interleave(BLOCK_VALUES, dim=1)[:, :num_values]
    at = torch.arange(1, MOST_BITS + 1)[:, None]
    unexplained[:, end : end + num_values * MOST_BITS] = (first.unsqueeze(1) == at).flatten(1)
    # Bits that are left over.
    unexplained[:, end + num_values * MOST_BITS :] = padded[:, end + num_values * MOST_BITS :] == 1
    return unexplained[:, :length]


def _possible_words(place: Tensor, slack: Tensor) -> Tensor:
    """The words [n, blocks, 2^BLOCK_VALUES] that values [n, N] may have, each of which has one of two digits."""
    blocks = -(-place.shape[1] // BLOCK_VALUES)
    filling = (0, blocks * BLOCK_VALUES - place.shape[1])
    low, high = (
        torch.unflatten(torch.nn.functional.pad(_cell(place + sign * slack, 3), filling), 1, (blocks, BLOCK_VALUES))
        for sign in (-1, 1)
    )
    taken = binary(torch.arange(2**BLOCK_VALUES), BLOCK_VALUES)
    weights = 3 ** torch.arange(BLOCK_VALUES - 1, -1, -1)
    return (low * weights).sum(dim=-1, keepdim=True) + ((high - low) * weights) @ taken.T


# --- without a reference ----------------------------------------------------------------------------------------------


def chunk_token_bounds(tokenizer: ChunkTokenizer, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reference tokens int64 [N, L], margins and bounds float64 [N, L], of actions float64 [N, T, A].

    A float32 token may differ from the reference only where margin <= bound, or behind a token that differs: another
    class may have been found there. Of the edges that decide a token's bits, margin and bound are those of the one that
    is nearest in parts of its bound: of a companded latent in (-1, 1), of a value of an escaped chunk, or of the choice
    of the class (`Choice.margins`). Raises ValueError for another dtype.
    """
    blocks = []
    with torch.no_grad():
        for block in torch.split(actions, _rows(tokenizer)):
            blocks.append(_block_bounds(tokenizer, block))
    tokens, margins, bounds = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return tokens, margins, bounds


def _block_bounds(tokenizer: ChunkTokenizer, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    code, sizes = tokenizer.code, tokenizer.sizes
    chunks = normalised_chunks(tokenizer, actions)
    tokens = code.encode(chunks.values)
    bits = code.bits(tokens)
    classes = code.classes(bits)
    margins, bounds = torch.empty(2, *bits.shape, dtype=torch.float64)
    of_class = choice(code, chunks).margins(classes)
    for found, part in zip((margins, bounds), of_class, strict=True):
        found[:, : sizes.class_bits] = part.unsqueeze(1)
    for index, rows in by_class(classes):
        of = _escape_margins if index == sizes.escape else _bit_margins
        margins[rows, sizes.class_bits :], bounds[rows, sizes.class_bits :] = of(code, chunks[rows], index)
    margins, bounds = torch.unflatten(torch.stack((margins, bounds)), 2, (-1, sizes.token_bits))
    nearest = (margins / bounds).argmin(dim=2, keepdim=True)
    return tokens, margins.gather(2, nearest).squeeze(2), bounds.gather(2, nearest).squeeze(2)


def _to_edge(place: Tensor, levels: Tensor | int) -> Tensor:
    """How far a place in [0, 1] is from the nearest edge between so many cells, in parts of [0, 1]."""
    scaled = place * levels
    inner = torch.as_tensor(levels) - 1
    return (scaled - torch.minimum(scaled.round().clamp(min=1), inner.to(scaled.dtype))).abs() / levels


def _bit_margins(code: ChunkCode, chunks: Chunks, index: int) -> tuple[Tensor, Tensor]:
    """Margins and bounds [n, code_bits] of the bits of one class."""
    latents = latents_of(code, chunks, index)
    order, rank = code.order[index], code.rank[index]
    place = (latents.y + 1) / 2
    return 2 * _to_edge(place[:, order], 2 << rank), latents.slack[:, order]


def _escape_margins(code: ChunkCode, chunks: Chunks, _: int) -> tuple[Tensor, Tensor]:
    """The same for escape. Bits that are left over never differ."""
    num_values, length = code.sizes.num_values, code.sizes.code_bits
    place, slack = (chunks.values + 1) / 2, chunks.slack
    blocks = -(-num_values // BLOCK_VALUES)
    filling = (0, blocks * BLOCK_VALUES - num_values)
    ternary, of_ternary = (
        torch.unflatten(torch.nn.functional.pad(part, filling, value=rest), 1, (blocks, BLOCK_VALUES))
        for part, rest in ((2 * _to_edge(place, 3), 1), (slack, _NEVER))
    )
    nearest = (ternary / of_ternary).argmin(dim=2, keepdim=True)
    words = [part.gather(2, nearest).expand(-1, -1, BLOCK_BITS).flatten(1) for part in (ternary, of_ternary)]
    levels = 3 << torch.arange(1, MOST_BITS + 1)[:, None]
    finer = (2 * _to_edge(place.unsqueeze(1), levels)).flatten(1)
    of_finer = slack.repeat(1, MOST_BITS)
    margins, bounds = torch.cat((words[0], finer), dim=1), torch.cat((words[1], of_finer), dim=1)
    rest = (0, max(length - margins.shape[1], 0))
    margins = torch.nn.functional.pad(margins, rest, value=1)
    bounds = torch.nn.functional.pad(bounds, rest, value=_NEVER)
    return margins[:, :length], bounds[:, :length]
