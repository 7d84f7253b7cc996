"""The definition of what probabilities of tokens decode to: expected actions and their standard deviations.

Tokens are taken to be independent, given the class of a chunk. Decoding is affine in the levels of per-step tokens, and
in the bits of chunk tokens before the compander: so the expected latents and their variances are exact. What is not
affine behind them is taken as affine: Mish about the expected value, the compander between the two values that a bit
gives its latent while the others are as expected (docs/beliefs.md). Gradients reach the probabilities.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rfsq.rfsq_ref.autoencoder import ActionAutoencoder, linear_layers
from rfsq.rfsq_ref.chunk_bits import MOST_BITS, binary, number
from rfsq.rfsq_ref.chunk_code import WIDTH, ChunkCode, ChunkSizes, bit_counts
from rfsq.rfsq_ref.chunk_escape import BLOCK_BITS, BLOCK_VALUES, escape_levels
from rfsq.rfsq_ref.chunk_model import ChunkTokenizer
from rfsq.rfsq_ref.errors import NotDecodableError
from rfsq.rfsq_ref.quantizer import Conditioning
from rfsq.runtime.bundle.beliefs import Belief, BeliefMode


@dataclass(frozen=True, eq=False)
class BitProbabilities:
    """Of chunk tokens. classes: [B, C], escape last; bits: [B, C, n], that each of the first n code bits is 1, given
    the class."""

    classes: Tensor
    bits: Tensor


# Per-step tokens ------------------------------------------------------------------------------------------------------


def step_belief(
    model: ActionAutoencoder, probabilities: Tensor, mode: BeliefMode, coarse: int, generator: torch.Generator | None
) -> Belief[Tensor]:
    """probabilities [B, T, D, l, K] of the first l layers; coarse: how many layers are the mode, at most l.

    generator: of samples. Raises NotDecodableError where tokens need the statistics of the encoder.
    """
    if model.conditioning is Conditioning.DYNAMIC and not model.recovered:
        raise NotDecodableError("statistics of every layer travel beside these tokens, and no policy predicts them")
    likeliest = probabilities[..., :coarse, :].max(dim=-1)
    chosen, known = likeliest.indices, probabilities
    tokens = _drawn(probabilities, generator) if mode == "sample" else None
    if mode != "expected":
        chosen = chosen if tokens is None else tokens[..., :coarse]
        known = torch.cat((_one_hot(chosen, probabilities), probabilities[..., coarse:, :]), dim=-2)
    mean, variance = (part.flatten(-2) for part in _moments(known))
    matrix, offset = model.token_map(probabilities.shape[-2])
    (first, second), units = linear_layers(model.decoder), model.units
    hidden = first(mean @ matrix.T + offset)
    actions = second(functional.mish(hidden)) * units + model.offset
    slope = (second.weight * _mish_slope(hidden).unsqueeze(-2)) @ first.weight @ matrix
    std = _root((slope.square() * variance.unsqueeze(-2)).sum(-1)) * units
    # What was drawn is certain; std is of what its mode leaves open.
    actions = actions if tokens is None else model.decode(tokens)
    return Belief(actions, std, likeliest.values.flatten(1).amin(1), chosen)


def _moments(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the token [...] of probabilities [..., K]."""
    levels = torch.arange(probabilities.shape[-1], dtype=probabilities.dtype, device=probabilities.device)
    mean = probabilities @ levels
    return mean, (probabilities * (levels - mean.unsqueeze(-1)).square()).sum(-1)


def _mish_slope(x: Tensor) -> Tensor:
    """The derivative of x tanh(log(1 + e^x))."""
    inner = functional.softplus(x).tanh()
    return inner + x * x.sigmoid() * (1 - inner.square())


# Chunk tokens ---------------------------------------------------------------------------------------------------------


def chunk_belief(
    model: ChunkTokenizer, known: BitProbabilities, mode: BeliefMode, generator: torch.Generator | None
) -> Belief[Tensor]:
    """Actions of what is `known`; generator: of samples."""
    sizes, code, bits = model.sizes, model.code, known.bits
    probability, likeliest = known.classes.max(dim=1)
    chosen = _drawn(known.classes, generator) if mode == "sample" else likeliest
    weights = known.classes if mode == "expected" else _one_hot(chosen, known.classes)
    found = [_in_class(code, bits[:, index], index) for index in range(sizes.num_classes)]
    means, variances = (torch.stack(part, dim=1) for part in zip(*found, strict=True))
    weights = weights.unsqueeze(-1)
    mean = (weights * means).sum(1)
    variance = (weights * (variances + (means - mean.unsqueeze(1)).square())).sum(1)
    if mode == "sample":
        rows = torch.arange(len(bits), device=bits.device)
        drawn = torch.bernoulli(bits[rows, chosen], generator=generator)
        mean = code.decode_bits(torch.cat((binary(chosen, sizes.class_bits), drawn.long()), dim=1))
    shape = (-1, sizes.chunk_length, sizes.action_dim)
    actions = mean.reshape(shape) * model.units + model.offset
    return Belief(actions, _root(variance).reshape(shape) * model.units, probability, chosen)


def bits_of_tokens(probabilities: Tensor, sizes: ChunkSizes) -> BitProbabilities:
    """Probabilities [B, l, V] of the first l tokens as those of class and bits.

    The bits of the first token behind the class depend on the class; those of all others do not.
    """
    token_bits, class_bits = sizes.token_bits, sizes.class_bits
    words = binary(torch.arange(1 << token_bits, device=probabilities.device), token_bits).to(probabilities.dtype)
    # Numbers behind the last class mean the last.
    by_class = probabilities[:, 0].reshape(len(probabilities), 1 << class_bits, -1)
    behind = by_class[:, sizes.escape :].sum(1, keepdim=True)
    by_class = torch.cat((by_class[:, : sizes.escape], behind), dim=1)
    classes = by_class.sum(-1)
    known = classes.unsqueeze(-1) > 0
    # Of a class that cannot be, nothing is known.
    share = torch.where(known, by_class / torch.where(known, classes.unsqueeze(-1), 1), 1 / by_class.shape[-1])
    first = share @ words[: by_class.shape[-1], class_bits:]
    rest = (probabilities[:, 1:] @ words).flatten(1)
    return BitProbabilities(classes, torch.cat((first, rest.unsqueeze(1).expand(-1, len(classes[0]), -1)), dim=2))


def _in_class(code: ChunkCode, bits: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [B, N] of normalised chunks of a class, of the probabilities [B, n] of their code bits."""
    if index == code.sizes.escape:
        return _in_escape(bits, code.sizes.num_values)
    length, latents = bits.shape[1], code.scale.shape[1]
    order, rank = code.order[index, :length], code.rank[index, :length]
    # Not ldexp of the bits: its gradient is 0 where the exponent is negative.
    weight = torch.ldexp(torch.ones_like(rank, dtype=bits.dtype), -rank)

    def latents_of(parts: Tensor) -> Tensor:
        zeros = torch.zeros(len(bits), latents, dtype=bits.dtype, device=bits.device)
        return zeros.index_add(1, order, parts)

    y = latents_of((bits - 0.5) * weight)
    count = bit_counts(order.unsqueeze(0), latents)[0]
    width = WIDTH * code.gain[index].gather(1, count.unsqueeze(1))[:, 0] * code.scale[index]
    basis = code.basis[index]
    chunks = code.mean[index] + (width * torch.atanh(y)) @ basis.T
    # How far the latent is with a bit that is 1 from where it is with a 0. Not by the slope of atanh, which near 1 is
    # much steeper than the way to the middle, where a latent goes when its first bit is another.
    of_bit = y[:, order]
    apart = width[order] * (torch.atanh(of_bit + (1 - bits) * weight) - torch.atanh(of_bit - bits * weight))
    variance = latents_of(bits * (1 - bits) * apart.square()) @ basis.square().T
    # What lies between -1 and 1 has no greater one.
    return chunks.clamp(-1, 1), variance.clamp(max=1)


def _in_escape(bits: Tensor, num_values: int) -> tuple[Tensor, Tensor]:
    """The same of the escape class: words of five values with three levels each, then bits that halve the cells."""
    count, length = bits.shape
    levels = escape_levels(length, num_values).to(bits)
    blocks = min(length // BLOCK_BITS, -(-num_values // BLOCK_VALUES))
    mean, variance = (torch.zeros(count, num_values, dtype=bits.dtype, device=bits.device) for _ in range(2))
    if blocks:
        words = binary(torch.arange(1 << BLOCK_BITS, device=bits.device), BLOCK_BITS)
        powers = 3 ** torch.arange(BLOCK_VALUES - 1, -1, -1, device=bits.device)
        digits = (number(words).clamp(max=3**BLOCK_VALUES - 1).unsqueeze(1) // powers % 3).to(bits.dtype)
        of_block = bits[:, : blocks * BLOCK_BITS].reshape(count, blocks, 1, BLOCK_BITS)
        share = torch.where(words.bool(), of_block, 1 - of_block).prod(-1)
        first = (share @ digits).flatten(1)[:, :num_values]
        second = (share @ digits.square()).flatten(1)[:, :num_values]
        mean[:, : first.shape[1]], variance[:, : first.shape[1]] = first, second - first.square()
    if int(levels.min()) >= 3:
        finer = bits[:, blocks * BLOCK_BITS :][:, : num_values * MOST_BITS]
        for start in range(0, finer.shape[1], num_values):
            halves = finer[:, start : start + num_values]
            part = halves.shape[1]
            mean = torch.cat((2 * mean[:, :part] + halves, mean[:, part:]), dim=1)
            variance = torch.cat((4 * variance[:, :part] + halves * (1 - halves), variance[:, part:]), dim=1)
    return (2 * mean + 1) / levels - 1, variance * (2 / levels).square()


# Both -----------------------------------------------------------------------------------------------------------------


def _one_hot(indices: Tensor, like: Tensor) -> Tensor:
    return functional.one_hot(indices, like.shape[-1]).to(like.dtype)


def _drawn(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    flat = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return flat.reshape(probabilities.shape[:-1])


def _root(variance: Tensor) -> Tensor:
    """The square root, whose gradient is 0 where that of the variance has no end."""
    is_spread = variance > 0
    return torch.where(is_spread, torch.where(is_spread, variance, 1).sqrt(), 0)
