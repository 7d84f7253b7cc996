"""Chunk tokens: a residual finite scalar quantiser over a whole chunk, of fixed length, decodable from any prefix.

A chunk x of N = T * A normalised actions becomes a stream of bits. The first bits name a class. Each class has a mean,
an orthonormal basis and scales of its own (a classified Karhunen-Loève transform). Each further bit refines one latent;
which one, the order of the class says, which is part of the code. Formulas: docs/chunk_tokens.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from rfsq.rfsq_ref.chunk_bits import MOST_BITS, binary, number
from rfsq.rfsq_ref.chunk_escape import escape_bound, escape_decode, escape_encode
from rfsq.rfsq_ref.errors import SettingsError
from rfsq.runtime.bundle.paths import shown

#: The compander maps z to tanh(z / (WIDTH s)), s the standard deviation of a latent: the density of levels that a
#: Gaussian latent wants is near enough to its derivative.
WIDTH = 2.2
_LIMITS = {
    "action_dim": (1, 64),
    "chunk_length": (1, 64),
    "num_classes": (2, 256),
    "token_bits": (4, 16),
    "num_tokens": (1, 256),
}


@dataclass(frozen=True)
class ChunkSizes:
    """action_dim A, chunk_length T, num_classes C with the escape class, which is the last, token_bits: of one token
    (vocabulary 2^token_bits), num_tokens L: of a chunk."""

    action_dim: int
    chunk_length: int
    num_classes: int = 64
    token_bits: int = 10
    num_tokens: int = 45

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            least, most = _LIMITS[name]
            if type(size) is not int or not least <= size <= most:
                raise SettingsError(f"{name} is {shown(size)}; expected an integer from {least} to {most}")
        if self.class_bits > self.token_bits:
            raise SettingsError(
                f"{self.num_classes} classes take {self.class_bits} bits, and a token has {self.token_bits}; expected "
                "the class to fit into the first token: fewer classes or a larger vocabulary"
            )
        if self.code_bits < 1:
            raise SettingsError("the one token of a chunk is all taken by its class; expected more tokens or more bits")
        if self.code_bits > self.num_values * MOST_BITS:
            raise SettingsError(
                f"{self.num_tokens} tokens are more than a chunk of {self.num_values} values can use; expected at most "
                f"{max(self.most_tokens, 1)}"
            )

    @property
    def num_values(self) -> int:
        """N = T * A."""
        return self.action_dim * self.chunk_length

    @property
    def class_bits(self) -> int:
        return (self.num_classes - 1).bit_length()

    @property
    def most_tokens(self) -> int:
        """How many tokens a chunk can use, whatever num_tokens is."""
        return (self.num_values * MOST_BITS + self.class_bits) // self.token_bits

    @property
    def code_bits(self) -> int:
        """Bits of a chunk behind those of its class."""
        return self.token_bits * self.num_tokens - self.class_bits

    @property
    def escape(self) -> int:
        """The class of chunks that no other class holds."""
        return self.num_classes - 1


@dataclass(frozen=True)
class ChunkConstants:
    """What a fit finds, for the C - 1 classes but escape.

    mean: float32 [C - 1, N]; basis: float32 [C - 1, N, M], columns orthonormal, M <= N latents, those that the order
    refines; scale: float32 [C - 1, M], positive standard deviations; gain: float32 [C - 1, M, MOST_BITS + 1], what a
    latent of so many bits is multiplied by; order: int64 [C - 1, code_bits], the latent that each bit refines.
    budgets: numbers of tokens at which errors count; weights: float32, one for each, of the squared error there.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor
    gain: Tensor
    order: Tensor
    budgets: tuple[int, ...]
    weights: Tensor

    def check(self, sizes: ChunkSizes) -> None:
        """Raise SettingsError where shapes, order or numbers are not those of a code of these sizes."""
        classes, latents = sizes.num_classes - 1, self.scale.shape[-1]
        expected = {
            "mean": (classes, sizes.num_values),
            "basis": (classes, sizes.num_values, latents),
            "scale": (classes, latents),
            "gain": (classes, latents, MOST_BITS + 1),
            "order": (classes, sizes.code_bits),
            "weights": (len(self.budgets),),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor.shape != shape or not torch.isfinite(tensor).all():
                raise SettingsError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}, all finite: fit again")
        if not (self.weights >= 0).all():
            raise SettingsError("every weight must be 0 or more: fit again")
        if not 1 <= latents <= sizes.num_values or not (self.scale > 0).all() or not (self.gain > 0).all():
            raise SettingsError("every scale and gain must be positive, and there are at most T * A latents: fit again")
        bits = bit_counts(self.order.clamp(0, latents - 1), latents)
        if self.order.min() < 0 or self.order.max() >= latents or bits.max() > MOST_BITS:
            raise SettingsError(
                f"order names latents from 0 to {latents - 1}, each at most {MOST_BITS} times: fit again"
            )
        if list(self.budgets) != sorted(set(self.budgets)) or not set(self.budgets) <= {
            *range(1, sizes.num_tokens + 1)
        }:
            raise SettingsError(
                f"budgets are {self.budgets}; expected rising numbers of tokens up to {sizes.num_tokens}"
            )


class ChunkCode(nn.Module):
    """Normalised chunks [B, N] to tokens [B, L] and back, in float32 or float64 (`.double()`)."""

    mean: Tensor
    basis: Tensor
    scale: Tensor
    gain: Tensor
    order: Tensor
    weights: Tensor
    rank: Tensor
    counts: Tensor

    def __init__(self, sizes: ChunkSizes, constants: ChunkConstants) -> None:
        super().__init__()
        constants.check(sizes)
        self.sizes, self.budgets = sizes, constants.budgets
        for name in ("mean", "basis", "scale", "gain", "order", "weights"):
            self.register_buffer(name, getattr(constants, name).clone(), persistent=False)
        latents = constants.scale.shape[-1]
        self.register_buffer("rank", ranks(constants.order), persistent=False)
        # Of the bits at each budget, how many each latent has got: [budgets, C - 1, M].
        counts = [bit_counts(constants.order[:, :bits], latents) for bits in self.budget_bits]
        self.register_buffer("counts", torch.stack(counts), persistent=False)

    @property
    def constants(self) -> ChunkConstants:
        """What the code is made of."""
        tensors = self.mean, self.basis, self.scale, self.gain, self.order
        return ChunkConstants(*tensors, self.budgets, self.weights)

    @property
    def budget_bits(self) -> tuple[int, ...]:
        """Code bits at each budget."""
        return tuple(budget * self.sizes.token_bits - self.sizes.class_bits for budget in self.budgets)

    # Tokens and bits ------------------------------------------------------------------------------------------------

    def bits(self, tokens: Tensor) -> Tensor:
        """Tokens [..., l] to bits [..., l * token_bits], the highest of each token first."""
        places = torch.arange(self.sizes.token_bits - 1, -1, -1, device=tokens.device)
        return (tokens.long().unsqueeze(-1) >> places & 1).flatten(-2)

    def tokens(self, bits: Tensor) -> Tensor:
        """The inverse of `bits`."""
        token_bits = self.sizes.token_bits
        return number(bits.reshape(*bits.shape[:-1], bits.shape[-1] // token_bits, token_bits))

    def classes(self, bits: Tensor) -> Tensor:
        """The class [...] that bits name. Numbers behind the last class mean the last: every token decodes."""
        return number(bits[..., : self.sizes.class_bits]).clamp(max=self.sizes.escape)

    # Decoding -------------------------------------------------------------------------------------------------------

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, l], 1 <= l <= L, to normalised chunks [B, N] in [-1, 1]."""
        return self.decode_bits(self.bits(tokens))

    def decode_bits(self, bits: Tensor) -> Tensor:
        """The first j bits [B, j] of chunks, at least those of the class, to normalised chunks [B, N] in [-1, 1]."""
        classes, code = self.classes(bits), bits[:, self.sizes.class_bits :]
        escaped = classes == self.sizes.escape
        decoded = torch.empty(len(bits), self.sizes.num_values, dtype=self.mean.dtype, device=self.mean.device)
        decoded[~escaped] = self.decode_in(code[~escaped], classes[~escaped])
        decoded[escaped] = escape_decode(code[escaped], self.sizes.num_values).to(decoded.dtype)
        return decoded

    def decode_in(self, code: Tensor, classes: Tensor) -> Tensor:
        """Code bits [B, j] of chunks of these classes [B], none of them escape, to normalised chunks [B, N]."""
        return self.chunks(self.latents(*self.companded(code, classes), classes), classes).clamp(-1, 1)

    def companded(self, code: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The residual layers summed: y [B, M] in (-1, 1), and how many bits [B, M] each latent has got.

        Layer l takes 2^-(l + 1) off the residual or adds it: y = sum of (2 bit - 1) / 2^(l + 1).
        """
        length = code.shape[-1]
        order, rank = self.order[classes, :length], self.rank[classes, :length]
        step = torch.ldexp((2 * code - 1).to(self.mean.dtype), -(rank + 1))
        shape = (len(code), self.scale.shape[-1])
        y = torch.zeros(shape, dtype=self.mean.dtype, device=self.mean.device).scatter_add_(1, order, step)
        count = torch.zeros(shape, dtype=torch.long, device=order.device).scatter_add_(1, order, torch.ones_like(order))
        return y, count

    def latents(self, y: Tensor, count: Tensor, classes: Tensor | int) -> Tensor:
        """Companded values y [..., M], of count [..., M] bits each, to latents [..., M] of these classes."""
        gain = self.gain[classes].expand(*count.shape, -1).gather(-1, count.unsqueeze(-1)).squeeze(-1)
        return WIDTH * gain * self.scale[classes] * torch.atanh(y)

    def chunks(self, latents: Tensor, classes: Tensor) -> Tensor:
        """Latents [B, M] of these classes [B] to chunks [B, N] that are not clipped."""
        found = latents.new_empty(len(latents), self.sizes.num_values)
        for index, rows in by_class(classes):
            found[rows] = self.mean[index] + latents[rows] @ self.basis[index].T
        return found

    # Encoding -------------------------------------------------------------------------------------------------------

    def compand(self, latents: Tensor, classes: Tensor | int) -> Tensor:
        """Latents [..., M] to y [..., M] in [-1, 1]."""
        return torch.tanh(latents / (WIDTH * self.scale[classes]))

    def digits(self, latents: Tensor, classes: Tensor | int) -> Tensor:
        """All bits that latents [..., M] of these classes can have, as numbers int64 [..., M] of MOST_BITS binary
        digits: each bit is the sign of a residual, and together they spell (y + 1) / 2."""
        y = self.compand(latents, classes)
        return torch.floor((y + 1) * 2 ** (MOST_BITS - 1)).long().clamp(0, 2**MOST_BITS - 1)

    def code_in(self, latents: Tensor, classes: Tensor) -> Tensor:
        """The code bits [B, code_bits] of latents [B, M] of these classes [B]."""
        digits = self.digits(latents, classes)
        return digits.gather(1, self.order[classes]) >> (MOST_BITS - 1 - self.rank[classes]) & 1

    def encode_in(self, chunks: Tensor, classes: Tensor) -> Tensor:
        """Chunks [B, N] to the tokens [B, L] of these classes [B], whatever that costs."""
        code = torch.empty(len(chunks), self.sizes.code_bits, dtype=torch.long, device=chunks.device)
        for index, rows in by_class(classes):
            if index == self.sizes.escape:
                code[rows] = escape_encode(chunks[rows], self.sizes.code_bits)
            else:
                latents = (chunks[rows] - self.mean[index]) @ self.basis[index]
                code[rows] = self.code_in(latents, classes[rows])
        return self.tokens(torch.cat((binary(classes, self.sizes.class_bits), code), dim=1))

    def encode(self, chunks: Tensor) -> Tensor:
        """Chunks [B, N] to tokens [B, L]: of the class with the least weighted error, or escape (`choose`).

        Nothing outside [-1, 1] is ever decoded, so values beyond are coded as its ends.
        """
        chunks = chunks.clamp(-1, 1)
        return self.encode_in(chunks, self.choose(chunks))

    def choose(self, chunks: Tensor) -> Tensor:
        """The class [B] of each chunk: of those that keep the bound the one of least cost; escape where none does."""
        costs = self.costs(chunks)
        chosen = costs.argmin(dim=1)
        # The cheapest nearly always keeps it: the others are only asked where it does not.
        keeps = torch.empty_like(chosen, dtype=torch.bool)
        for index, rows in by_class(chosen):
            keeps[rows] = self.keeps_bound(chunks[rows], index)
        rest = (~keeps).nonzero()[:, 0]
        if len(rest):
            keep = torch.stack([self.keeps_bound(chunks[rest], index) for index in range(self.sizes.escape)], dim=1)
            cheapest = costs[rest].where(keep, torch.inf).argmin(dim=1)
            chosen[rest] = cheapest.where(keep.any(dim=1), self.sizes.escape)
        return chosen

    def costs(self, chunks: Tensor) -> Tensor:
        """What each class but escape costs, [B, C - 1]: the weighted sum of the latents' squared errors at the budgets.

        The basis is orthonormal, so these are the chunk's errors, before what is decoded is clipped.
        """
        found = []
        for index in range(self.sizes.escape):
            centred = chunks - self.mean[index]
            latents = centred @ self.basis[index]
            y = self.compand(latents, index)
            cost = torch.zeros(len(chunks), dtype=chunks.dtype, device=chunks.device)
            if latents.shape[1] < self.sizes.num_values:
                # What no latent holds.
                rest = centred.square().sum(dim=1) - latents.square().sum(dim=1)
                cost += self.weights.sum() * rest.clamp(min=0)
            for weight, count in zip(self.weights, self.counts[:, index], strict=True):
                decoded = self.latents(cell_middles(y, count), count.expand_as(y), index)
                cost += weight * (latents - decoded).square().sum(dim=1)
            found.append(cost)
        return torch.stack(found, dim=1)

    def keeps_bound(self, chunks: Tensor, index: int) -> Tensor:
        """Whether chunks [B, N] err nowhere in this class, at no budget, by more than in escape: bool [B]."""
        digits = self.digits((chunks - self.mean[index]) @ self.basis[index], index)
        kept = torch.ones(len(chunks), dtype=torch.bool, device=chunks.device)
        # The last budgets are the narrowest: most of what breaks a bound breaks theirs.
        for bits, count in reversed([*zip(self.budget_bits, self.counts[:, index], strict=True)]):
            rows = kept.nonzero()[:, 0]
            y = torch.ldexp((2 * (digits[rows] >> MOST_BITS - count) + 1).to(chunks.dtype), -count) - 1
            latents = self.latents(y, count.expand_as(y), index)
            error = (self.mean[index] + latents @ self.basis[index].T).clamp(-1, 1) - chunks[rows]
            kept[rows] = (error.abs() <= escape_bound(bits, self.sizes.num_values)).all(dim=1)
        return kept

    def bound(self, num_tokens: int) -> float:
        """The most by which a value in [-1, 1] errs, decoded from so many tokens; holds for those in `budgets`."""
        return escape_bound(num_tokens * self.sizes.token_bits - self.sizes.class_bits, self.sizes.num_values)


def by_class(classes: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each class that is among those [n], and its rows int64."""
    for index in torch.bincount(classes).nonzero()[:, 0].tolist():
        yield index, (classes == index).nonzero()[:, 0]


def cell_middles(y: Tensor, bits: Tensor | int) -> Tensor:
    """The middle of the cell that each companded latent is in, for so many bits; 0 for none."""
    half = torch.exp2(torch.as_tensor(bits, dtype=y.dtype) - 1)
    return ((torch.floor(y * half) + 0.5) / half).clamp(-1 + 0.5 / half, 1 - 0.5 / half)


def bit_counts(order: Tensor, num_latents: int) -> Tensor:
    """How many of the bits that refine latents in this order [C, j] each latent gets: [C, num_latents]."""
    counts = torch.zeros(len(order), num_latents, dtype=torch.long, device=order.device)
    return counts.scatter_add_(1, order, torch.ones_like(order))


def ranks(order: Tensor) -> Tensor:
    """How many bits the latent of each entry of order [C, j] has got before: [C, j]."""
    by_latent, places = order.sort(dim=1, stable=True)
    behind_first = torch.arange(order.shape[1], device=order.device) - torch.searchsorted(by_latent, by_latent)
    return torch.empty_like(order).scatter_(1, places, behind_first)


@cache
def gain_range(num_bits: int) -> tuple[float, float]:
    """Between which gains every level of a latent of so many bits stays within its own cell.

    Then what was decoded is encoded as it was, by the same class. Above 10 bits the range is about 1, so it is 1.
    """
    if not 1 <= num_bits <= 10:
        return 1.0, 1.0
    levels = 2**num_bits
    low, high = 0.1, 10.0
    for index in range(levels // 2, levels if num_bits > 1 else 1):
        value = math.atanh((2 * index + 1) / levels - 1)
        low = max(low, math.atanh(2 * index / levels - 1) / value)
        if index + 1 < levels:
            high = min(high, math.atanh(2 * (index + 1) / levels - 1) / value)
    # Not up to the edges, where rounding would decide.
    return low + (high - low) * 1e-3, high - (high - low) * 1e-3
