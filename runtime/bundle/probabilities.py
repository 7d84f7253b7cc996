"""Probabilities of tokens in numpy: from logits, of classes and bits, and samples of them.

Chunk tokens come as distributions over their vocabulary, or as a pair: classes [B, C], escape last, and the first n
code bits [B, n]. Either way they are taken apart into classes and bits: given the class, bits are independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .arrays import AnyArray, Float32Array, Float64Array, Int32Array
from .models import ChunkModel, ModelEntry

#: The logit of what is certain.
_LARGEST_LOGIT = 1e30
#: Distributions: of per-step tokens [B, T, D, l, K] or chunk tokens [B, l, V] alone, or of classes and bits.
Given = tuple[Float32Array, ...]


def num_tokens(given: Given, model: ModelEntry) -> int:
    """l: of how many layers, or chunk tokens, these are."""
    if len(given) == 1:
        return int(given[0].shape[-2])
    assert isinstance(model, ChunkModel)  # others have no pairs
    return int(model.class_bits + given[1].shape[1]) // model.token_bits


def softmax(logits: Float32Array, sharpness: npt.ArrayLike, axis: Literal[0, -1] = -1) -> Float64Array:
    """Logits [..., l, K], or [K, ..., l] along axis 0, to probabilities; sharpness: 1 / temperature [l], or one number.

    -inf has probability 0.
    """
    factors = np.asarray(sharpness, np.float64)
    powers = logits.astype(np.float64, order="C")
    powers -= powers.max(axis, keepdims=True)
    powers *= factors if axis == 0 else factors[..., None]
    np.exp(powers, out=powers)
    powers /= powers.sum(axis, keepdims=True)
    return powers


def distributions(
    values: Float32Array, sharpness: npt.ArrayLike, *, is_logits: bool, axis: Literal[0, -1] = -1
) -> Float64Array:
    """Logits, or probabilities, which have a sharpness of 1, to probabilities float64 that sum to 1 along this axis."""
    return softmax(values, sharpness, axis) if is_logits else normalised(values, axis)


def logits_of(given: Given) -> Given:
    """Logits of probabilities; a bit that is surely 1 gets a finite one, for +inf is none."""
    if len(given) == 2:
        classes, bits = given
        return _logarithms(classes), bit_logits(1 - bits.astype(np.float64), bits)
    return (_logarithms(given[0]),)


def _logarithms(probabilities: Float32Array) -> Float32Array:
    found = np.empty_like(probabilities)
    with np.errstate(divide="ignore"):
        # In float64, a few at a time.
        np.log(probabilities, out=found, dtype=np.float64, casting="same_kind")
    return found


def bit_logits(zeros: npt.ArrayLike, ones: npt.ArrayLike) -> Float32Array:
    """Of bits, from the probabilities of both sides: of those near 1 a float32 does not tell how near."""
    with np.errstate(divide="ignore"):
        logits = np.log(np.asarray(ones, np.float64)) - np.log(np.asarray(zeros, np.float64))
    found: Float32Array = np.minimum(logits, _LARGEST_LOGIT).astype(np.float32)
    return found


def normalised(probabilities: Float32Array, axis: Literal[0, -1] = -1) -> Float64Array:
    """Distributions [..., K], or [K, ...] along axis 0, over their sums."""
    found = probabilities.astype(np.float64, order="C")
    found /= found.sum(axis, keepdims=True)
    return found


def one_hot(indices: AnyArray, size: int) -> Float32Array:
    """[...] to [..., size]."""
    found: Float32Array = (indices[..., None] == np.arange(size)).astype(np.float32)
    return found


def drawn(probabilities: Float64Array, uniform: Float64Array) -> Int32Array:
    """An index [...] from each distribution [..., K], none that has probability 0. uniform: [...], each from [0, 1)."""
    sums = probabilities.cumsum(axis=-1)
    # Times the very last sum, so that no rounding leaves a gap behind it.
    found: Int32Array = (sums > uniform[..., None] * sums[..., -1:]).argmax(axis=-1).astype(np.int32)
    return found


@dataclass(frozen=True, eq=False)
class ChunkProbabilities:
    """Of chunk tokens. classes: float64 [B, C]; first: float64 [B, C, 2, f], given the class, that each code bit of
    the first token is 0 and that it is 1; rest: float64 [B, 2, r], the same of the bits behind.

    Both of a bit, for a latent near the end of its range is told from that end by the lesser one.
    """

    classes: Float64Array
    first: Float64Array
    rest: Float64Array

    def of_class(self, classes: Int32Array) -> Float64Array:
        """Bits [B, 2, f + r], given these classes [B]."""
        rows = np.arange(len(classes))
        bits: Float64Array = np.concatenate((self.first[rows, classes], self.rest), axis=2)
        return bits


def chunk_probabilities(
    given: Given, sharpness: Float32Array, model: ChunkModel, *, is_logits: bool
) -> ChunkProbabilities:
    """What is given of chunk tokens, taken apart. sharpness: [l], or [1 + n] of a pair."""
    if len(given) == 2:
        return _of_pair(given, sharpness, model, is_logits=is_logits)
    words = distributions(given[0], sharpness, is_logits=is_logits)
    by_class = _by_class(words[:, 0], model)
    classes = by_class.sum(axis=2)
    # Of a class that cannot be nothing is known.
    share = np.full_like(by_class, 1 / by_class.shape[2])
    np.divide(by_class, classes[..., None], out=share, where=classes[..., None] > 0)
    first = _zeros_and_ones(share)
    behind = words.shape[1] - 1
    rest = _zeros_and_ones(words[:, 1:]).swapaxes(1, 2).reshape(len(words), 2, behind * model.token_bits)
    return ChunkProbabilities(classes, first, rest)


def _of_pair(given: Given, sharpness: Float32Array, model: ChunkModel, *, is_logits: bool) -> ChunkProbabilities:
    bits = given[1]
    if is_logits:
        powers = bits * np.asarray(sharpness[1:], np.float64)
        with np.errstate(over="ignore"):
            # exp overflows to infinity, whose inverse is 0.
            both = np.stack((1 / (1 + np.exp(powers)), 1 / (1 + np.exp(-powers))), axis=1)
    else:
        ones = bits.astype(np.float64)
        both = np.stack((1 - ones, ones), axis=1)
    cut = model.token_bits - model.class_bits
    first = np.broadcast_to(both[:, None, :, :cut], (len(bits), model.num_classes, 2, cut))
    of_classes = distributions(given[0], sharpness[0], is_logits=is_logits)
    return ChunkProbabilities(of_classes, first, both[:, :, cut:])


def tokens_of(classes: AnyArray, bits: AnyArray, model: ChunkModel) -> Int32Array:
    """Classes [B] and the code bits [B, n] of l whole tokens to these, int32 [B, l]."""
    number = classes[:, None] >> np.arange(model.class_bits - 1, -1, -1) & 1
    whole = np.concatenate((number, bits), axis=1)
    whole = whole.reshape(len(bits), whole.shape[1] // model.token_bits, model.token_bits)
    places = np.arange(model.token_bits - 1, -1, -1, dtype=np.int32)
    tokens: Int32Array = (whole.astype(np.int32) << places).sum(-1, dtype=np.int32)
    return tokens


def class_of_tokens(tokens: Int32Array, model: ChunkModel) -> Int32Array:
    """The classes int32 [B] that tokens [B, l] name."""
    number = tokens[:, 0] >> model.token_bits - model.class_bits
    classes: Int32Array = np.minimum(number, model.num_classes - 1).astype(np.int32)
    return classes


def _by_class(words: Float64Array, model: ChunkModel) -> Float64Array:
    """The first token's distribution [B, V] as [B, C, words of a class]: numbers behind the last class mean it."""
    numbers = 1 << model.class_bits
    by_number = words.reshape(len(words), numbers, model.vocabulary // numbers)
    escape = model.num_classes - 1
    return np.concatenate((by_number[:, :escape], by_number[:, escape:].sum(axis=1, keepdims=True)), axis=1)


def _zeros_and_ones(words: Float64Array) -> Float64Array:
    """Of distributions [B, l, 2^n] over numbers that each of their bits is 0, and 1, the highest first: [B, l, 2, n].

    By sums and not by a product of matrices, for which a library may start threads that a control loop waits for.
    """
    batch, length, count = words.shape
    found = np.empty((batch, length, 2, count.bit_length() - 1))
    for place in range(found.shape[3]):
        halves = words.reshape(batch, length, 2, words.shape[2] // 2)
        halves.sum(axis=3, out=found[..., place])
        words = halves[:, :, 0] + halves[:, :, 1]
    return found
