"""Beliefs about chunk tokens in operations of torch, through which gradients flow. Formulas: docs/beliefs.md.

A latent's y = tanh(z / width) is near 1 or -1 where its bits are all alike, so 1 + y and 1 - y are sums of their own:
of the probabilities that bits are 1, and of those that they are 0. Both are 0 of a bit that is not known. C classes,
escape last, N = T * A values, M latents, R the most bits that a latent has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..bundle.arrays import Float32Array
from ..bundle.beliefs import Belief, BeliefMode
from ..bundle.decoding import BLOCK_BITS, BLOCK_VALUES, MOST_BITS, ChunkDecoding, bit_places
from ..bundle.models import ChunkModel
from .belief_tensors import drawn, marked, one_hot, root, softmax, straight_through, tensor_of


class _Bits(NamedTuple):
    """Given the class, that each of the first n code bits is 0, and that it is 1: [B, 2, C, f] of those that share a
    token with the class, [B, 2, n - f] of all others, which do not depend on it."""

    first: Tensor
    rest: Tensor

    def of_class(self, classes: Tensor) -> Tensor:
        """[B, 2, n], given these classes [B]."""
        own = classes.reshape(-1, 1, 1, 1).expand(-1, 2, 1, self.first.shape[3])
        return torch.cat((self.first.gather(2, own).squeeze(2), self.rest), dim=2)


class _Moments(NamedTuple):
    """Of normalised chunks, [..., N] each."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class ChunkBeliefs:
    """The constants of a decoder on one device, in one type: see `ChunkDecoding`.

    units, offset: [A]; places: int64 [C - 1, M, R], see `bit_places`; most_bits: R of each number of
    tokens; words: [V, token_bits], their bits; digits: [256, 5 * 3], see `_digits_of_words`.
    """

    model: ChunkModel
    mean: Tensor
    basis: Tensor
    width: Tensor
    units: Tensor
    offset: Tensor
    places: Tensor
    most_bits: tuple[int, ...]
    words: Tensor
    digits: Tensor

    @classmethod
    def of(cls, decoding: ChunkDecoding, model: ChunkModel, like: Tensor) -> Self:
        """like: a tensor of the device and the type."""
        places = bit_places(decoding.order, model.num_latents)
        lengths = (model.token_bits * tokens - model.class_bits for tokens in model.prefixes)
        words = np.arange(model.vocabulary)[:, None] >> np.arange(model.token_bits - 1, -1, -1) & 1
        units, offset = (np.array(part, np.float64) for part in (model.action_units, model.action_offset))
        return cls(
            model=model,
            mean=tensor_of(decoding.mean, like),
            basis=tensor_of(decoding.basis, like),
            width=tensor_of(decoding.width, like),
            units=tensor_of(units, like),
            offset=tensor_of(offset, like),
            places=tensor_of(places, like),
            most_bits=tuple(int((places < length).sum(axis=2).max()) for length in lengths),
            words=tensor_of(words.astype(np.float32), like),
            digits=tensor_of(_digits_of_words(), like),
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
        """given: distributions [B, l, V], or classes [B, C] and bits [B, n]; sharpness: 1 / temperature of each token
        [l], or class and bit [1 + n], None for 1."""
        if len(given) == 1:
            words = softmax(given[0], sharpness, is_logits=is_logits)
            classes, bits = self._of_words(words)
        else:
            words = None
            classes, bits = self._of_pair(given, sharpness, is_logits=is_logits)
        probability, chosen = classes.max(dim=1)
        if mode == "expected":
            found = _mixed(classes, self._in_classes(bits))
        elif mode == "likeliest mode":
            found = self._within(chosen, bits.of_class(chosen))
        else:
            chosen, tokens = self._drawn(classes, bits, words, generator)
            found = self._within(chosen, bits.of_class(chosen))
            certain = one_hot(tokens, found.mean.new_empty(2)).movedim(2, 1)
            found = found._replace(mean=straight_through(self._within(chosen, certain).mean, found.mean))
        shape = (self.model.chunk_length, self.model.action_dim)
        actions, deviation = (torch.unflatten(part, 1, shape) for part in (found.mean, root(found.variance)))
        belief = Belief(actions * self.units + self.offset, deviation * self.units, probability, chosen)
        return marked(belief, (classes, bits.first, bits.rest), 1)

    # What is given, taken apart --------------------------------------------------------------------------------------

    def _of_words(self, words: Tensor) -> tuple[Tensor, _Bits]:
        """Classes [B, C] and bits of distributions [B, l, V]."""
        model, escape = self.model, self.model.num_classes - 1
        by_class = words[:, 0].reshape(len(words), 1 << model.class_bits, model.vocabulary >> model.class_bits)
        # Numbers behind the last class mean the last.
        by_class = torch.cat((by_class[:, :escape], by_class[:, escape:].sum(1, keepdim=True)), dim=1)
        classes = by_class.sum(2)
        cannot_be = classes.unsqueeze(2) == 0
        # Of a class that cannot be nothing is known.
        share = torch.where(
            cannot_be, 1 / by_class.shape[2], by_class / torch.where(cannot_be, 1, classes.unsqueeze(2))
        )
        first, rest = self.words[: by_class.shape[2], model.class_bits :], words[:, 1:]
        return classes, _Bits(
            torch.stack((share @ (1 - first), share @ first), dim=1),
            torch.stack(((rest @ (1 - self.words)).flatten(1), (rest @ self.words).flatten(1)), dim=1),
        )

    def _of_pair(self, given: tuple[Tensor, ...], sharpness: Tensor | None, *, is_logits: bool) -> tuple[Tensor, _Bits]:
        of_class, of_bits = (None, None) if sharpness is None else (sharpness[:1], sharpness[1:])
        classes = softmax(given[0].unsqueeze(1), of_class, is_logits=is_logits).squeeze(1)
        ones = given[1]
        sides = torch.stack((torch.zeros_like(ones) if is_logits else 1 - ones, ones), dim=2)
        both = softmax(sides, of_bits, is_logits=is_logits).movedim(2, 1)
        cut = self.model.token_bits - self.model.class_bits
        return classes, _Bits(both[:, :, None, :cut].expand(-1, -1, classes.shape[1], -1), both[:, :, cut:])

    def _drawn(
        self, classes: Tensor, bits: _Bits, words: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Classes [B] and code bits [B, n]: of tokens that are drawn whole where their distribution is given."""
        model = self.model
        if words is None:
            chosen = drawn(classes, generator)
            ones = bits.of_class(chosen)[:, 1].detach()
            return chosen, (torch.rand(ones.shape, generator=generator, device=ones.device) < ones).long()
        tokens = drawn(words, generator)
        code = self.words[tokens].flatten(1).long()
        chosen = tokens[:, 0] >> model.token_bits - model.class_bits
        return chosen.clamp(max=model.num_classes - 1), code[:, model.class_bits :]

    # What it decodes to -----------------------------------------------------------------------------------------------

    def _in_classes(self, bits: _Bits) -> _Moments:
        """Of every class, [B, C, N]."""
        length = bits.first.shape[3] + bits.rest.shape[2]
        cut, kept = bits.first.shape[3], len(self.mean)
        columns = functional.pad(torch.cat((bits.first.flatten(2), bits.rest), dim=2), (0, 1))
        places = self._places(length)
        by_class = torch.arange(kept, device=places.device).reshape(-1, 1, 1) * cut
        # Behind the bits of the first token, of every class, escape too; then what is not known.
        own = torch.where(places < cut, places + by_class, places + kept * cut)
        found = torch.unflatten(columns.index_select(2, own.flatten()), 2, own.shape)
        latents, variances = self._latents(found, places, length, self.width)
        chunks = self.mean + torch.einsum("bcm,cnm->bcn", latents, self.basis)
        spread = torch.einsum("bcm,cnm->bcn", variances, self.basis.square())
        escaped = self._escaped(torch.cat((bits.first[:, :, -1], bits.rest), dim=2))
        return _Moments(
            torch.cat((chunks.clamp(-1, 1), escaped.mean.unsqueeze(1)), dim=1),
            torch.cat((spread.clamp(max=1), escaped.variance.unsqueeze(1)), dim=1),
        )

    def _within(self, classes: Tensor, bits: Tensor) -> _Moments:
        """Of one class [B] for each chunk, of bits [B, 2, n] given that: [B, N]."""
        length, escape = bits.shape[2], self.model.num_classes - 1
        kept = classes.clamp(max=escape - 1)
        places, basis = self._places(length)[kept], self.basis[kept]
        columns = functional.pad(bits, (0, 1))
        found = columns.gather(2, places.flatten(1).unsqueeze(1).expand(-1, 2, -1))
        found = torch.unflatten(found, 2, places.shape[1:])
        latents, variances = self._latents(found, places, length, self.width[kept])
        chunks = self.mean[kept] + (basis @ latents.unsqueeze(2)).squeeze(2)
        spread = (basis.square() @ variances.unsqueeze(2)).squeeze(2)
        escaped, is_escaped = self._escaped(bits), (classes == escape).unsqueeze(1)
        return _Moments(
            torch.where(is_escaped, escaped.mean, chunks.clamp(-1, 1)),
            torch.where(is_escaped, escaped.variance, spread.clamp(max=1)),
        )

    def _places(self, length: int) -> Tensor:
        """int64 [C - 1, M, R]: of the first `length` bits those of each latent, `length` where it has fewer than R."""
        tokens = (length + self.model.class_bits) // self.model.token_bits
        return self.places[..., : self.most_bits[tokens - 1]].clamp(max=length)

    def _latents(self, found: Tensor, places: Tensor, length: int, width: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of latents [..., M], of the probabilities [B, 2, ..., M, R] that their bits are 0, and 1.

        width: [..., M, MOST_BITS + 1].
        """
        count = (places < length).sum(-1)
        half = width.gather(-1, count.unsqueeze(-1)).squeeze(-1) / 2
        least = torch.ldexp(torch.ones_like(half), -count)
        steps = torch.ldexp(found.new_ones(found.shape[-1]), -torch.arange(found.shape[-1], device=found.device))
        below, above = (found * steps).unbind(1)
        others = 1 - torch.eye(len(steps), dtype=steps.dtype, device=steps.device)
        latents = half * ((above.sum(-1) + least) / (below.sum(-1) + least)).log()
        # How far apart the two values of a bit are. Of sums without it: what subtracting leaves may be rounding alone.
        sides = [(steps / (side @ others + least.unsqueeze(-1))).log1p() for side in (below, above)]
        apart = half.unsqueeze(-1) * (sides[0] + sides[1])
        return latents, (found[:, 0] * found[:, 1] * apart.square()).sum(-1)

    def _escaped(self, bits: Tensor) -> _Moments:
        """Of escaped chunks [B, N], of bits [B, 2, n]: thirds, 2 (digit - 1) and what the bits behind add."""
        num_values, length = self.mean.shape[1], bits.shape[2]
        most = -(-num_values // BLOCK_VALUES)
        blocks = min(length // BLOCK_BITS, most)
        of_word = torch.unflatten(bits[:, :, : blocks * BLOCK_BITS], 2, (blocks, BLOCK_BITS)).movedim(1, -1)
        share = bits.new_ones(len(bits), blocks, 1)
        # Not the product over eight bits at once: a gradient of that waits for the GPU.
        for place in range(BLOCK_BITS):
            share = (share.unsqueeze(-1) * of_word[:, :, place].unsqueeze(-2)).flatten(-2)
        digits = (share @ self.digits).reshape(len(bits), blocks * BLOCK_VALUES, 3)[:, :num_values]
        digits = functional.pad(digits, (0, 0, 0, num_values - digits.shape[1]))
        middles = 2 * torch.arange(3, dtype=bits.dtype, device=bits.device) - 2
        mean = (digits * middles).sum(-1)
        variance = (digits * (middles - mean.unsqueeze(-1)).square()).sum(-1)
        layers = min(MOST_BITS, -(-max(length - most * BLOCK_BITS, 0) // num_values))
        if layers:
            finer = bits[:, :, most * BLOCK_BITS :][:, :, : layers * num_values]
            finer = functional.pad(finer, (0, layers * num_values - finer.shape[2]))
            finer = torch.unflatten(finer, 2, (layers, num_values))
            steps = torch.ldexp(bits.new_ones(layers, 1), -torch.arange(1, layers + 1, device=bits.device).unsqueeze(1))
            zeros, ones = finer.unbind(1)
            mean = mean + ((ones - zeros) * steps).sum(1)
            variance = variance + (4 * zeros * ones * steps.square()).sum(1)
        return _Moments(mean / 3, variance / 9)


def _mixed(classes: Tensor, found: _Moments) -> _Moments:
    """Of all classes [B, C] together."""
    weights = classes.unsqueeze(2)
    mean = (weights * found.mean).sum(1)
    variance = (weights * (found.variance + (found.mean - mean.unsqueeze(1)).square())).sum(1)
    return _Moments(mean, variance)


def _digits_of_words() -> Float32Array:
    """Which of the three digits each value of a word has, [256, 5 * 3]: words that no chunk has mean the last."""
    words = np.arange(1 << BLOCK_BITS).clip(max=3**BLOCK_VALUES - 1)
    digits = words[:, None] // 3 ** np.arange(BLOCK_VALUES - 1, -1, -1) % 3
    found: Float32Array = (digits[..., None] == np.arange(3)).reshape(len(words), -1).astype(np.float32)
    return found
