"""What the class of a chunk says of it: its mean, in numbers and in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..bundle.arrays import Float32Array, Float64Array, Int32Array, Int64Array
from ..bundle.models import ChunkModel
from .samples import spread

#: Shares of the largest |action| from which on a mean is worth a word.
_SLIGHT, _PLAIN, _STRONG = 0.1, 0.35, 0.7
#: Dimensions that a sentence names at most.
_MOST_NAMED = 4
#: Words of a class that are decoded for its mean: all of them, where a token has ten bits and there are 64 classes.
_MOST_WORDS = 256


def classes_of(model: ChunkModel, tokens: Int32Array) -> Int64Array:
    """tokens [B, l] -> the class that each names, int64 [B]; what no encoder sends means the last."""
    named = tokens[:, 0].astype(np.int64) >> (model.token_bits - model.class_bits)
    classes: Int64Array = np.minimum(named, model.num_classes - 1)
    return classes


def class_mean(decode: Callable[[Int32Array], Float32Array], model: ChunkModel, number: int) -> Float64Array:
    """The mean [T, A] of a class but escape, in the robot's units. decode: tokens [B, l] -> actions [B, T, A].

    The bits of token 0 behind the class move some latents up or down by as much. So over all words of a class they
    cancel, and the mean of what the words decode to is that of the class, but for what each is clipped by.
    """
    free = model.token_bits - model.class_bits
    words = spread(np.arange(number << free, (number + 1) << free, dtype=np.int32), _MOST_WORDS)
    decoded: Float64Array = decode(words[:, None]).astype(np.float64)
    mean: Float64Array = decoded.mean(axis=0)
    return mean


def in_words(mean: Float64Array, largest: Float32Array, names: Sequence[str]) -> str:
    """A mean [T, A] in words. largest: of each dimension in the data, which its size is told against.

    >>> in_words(np.array([[0.9, 0.0, 0.2]] * 2), np.ones(3, np.float32), ("x", "y", "z"))
    'x strongly positive; z slightly positive; all else near 0'
    """
    scale = np.where(largest > 0, largest, 1.0)
    half = -(-len(mean) // 2)
    begin, end, level = ((part / scale).mean(axis=0) for part in (mean[:half], mean[-half:], mean))
    size = np.maximum(np.maximum(np.abs(begin), np.abs(end)), np.abs(level))
    moving = [dim for dim in np.argsort(-size, kind="stable").tolist() if size[dim] >= _SLIGHT]
    if not moving:
        return "all near 0"
    parts = [f"{names[dim]} {_said(begin[dim], end[dim], level[dim])}" for dim in moving[:_MOST_NAMED]]
    return "; ".join([*parts, *_rest(len(moving), len(names))])


def _said(begin: float, end: float, level: float) -> str:
    if min(abs(begin), abs(end)) >= _SLIGHT and begin * end < 0:
        return "turns from positive to negative" if begin > 0 else "turns from negative to positive"
    size = abs(level)
    much = "strongly " if size >= _STRONG else "" if size >= _PLAIN else "slightly "
    return f"{much}{'positive' if level > 0 else 'negative'}"


def _rest(moving: int, of: int) -> Iterator[str]:
    if moving > _MOST_NAMED:
        yield f"{moving - _MOST_NAMED} more"
    elif moving < of:
        yield "all else near 0"
