"""What a policy may make of the tokens of a chunk: such as are refused, and such as nobody can tell from good ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..bundle.validation import token_types
from .rig import Rig

#: Makes other tokens of those of a chunk, [1, T, D, L] or [1, L], which it may alter.
Change = Callable[[Any, Rig], Any]


def _with(value: int, tokens: Any, rig: Rig) -> Any:
    tokens.reshape(-1)[rig.rng.randrange(tokens.size)] = value
    return tokens


def _too_high(tokens: Any, rig: Rig) -> Any:
    """The smallest type that tokens of this model may have, and its largest value, or one above the vocabulary."""
    small = token_types(rig.model)[-1]
    highest = int(np.iinfo(small).max)
    is_word = highest < rig.model.vocabulary
    return _with(rig.model.vocabulary if is_word else highest, tokens if is_word else tokens.astype(small), rig)


def _another_type(tokens: Any, rig: Rig) -> Any:
    types = {"int8", "int16", "uint8", "uint16", "uint32", "uint64", ">i4", "bool", "complex64", "S1"}
    return tokens.astype(rig.rng.choice(sorted(types.difference(map(str, token_types(rig.model))))))


def _no_array(tokens: Any, rig: Rig) -> Any:
    return rig.rng.choice((tokens.tolist(), object(), "tokens", memoryview(tokens), 3, b"\0", tokens.flat, np.int32(1)))


def _another_shape(tokens: Any, rig: Rig) -> Any:
    others = [
        tokens[0],
        tokens[None],
        tokens[..., :0],
        tokens[:0],
        tokens.reshape(-1),
        tokens[..., None],
        np.concatenate((tokens, tokens)),
        np.concatenate((tokens, tokens), axis=-1),
        np.int32(tokens.flat[0]).reshape(()),
    ]
    if rig.model.token_grid:
        others += [tokens[:, :-1], tokens[:, :, :-1], tokens[0, 0], np.swapaxes(tokens, 2, 3)[..., None]]
    else:
        # As tokens of the other kind lie.
        others.append(np.broadcast_to(tokens[:, None, None], (1, rig.length, 2, tokens.size)))
    return rig.rng.choice(others)


def _masked(tokens: Any, rig: Rig) -> Any:
    """A subclass of ndarray with rules of its own, in which the illegal value is hidden."""
    masked = np.ma.masked_array(_with(-1, tokens, rig), mask=True)
    return rig.rng.choice((masked, masked.view(np.recarray)))


def _any(tokens: Any, rig: Rig) -> Any:
    random = np.random.default_rng(rig.rng.randrange(2**32))
    return random.integers(rig.model.vocabulary, size=tokens.shape, dtype=np.int32)


def _another_rest(tokens: Any, rig: Rig) -> Any:
    """The first tokens of one chunk, and the others of another."""
    first = rig.rng.randint(1, tokens.size)
    return np.concatenate((tokens[:, :first], rig.pick().tokens[:, first:]), axis=1)


#: Refused, of either kind.
BAD_TOKENS: dict[str, Change] = {
    "token too high by one": lambda tokens, rig: _with(rig.model.vocabulary, tokens, rig),
    "token far too high": partial(_with, 2**31 - 1),
    "negative token": partial(_with, -1),
    "int64 tokens that wrap to legal ones": lambda tokens, _: tokens.astype(np.int64) + 2**32,
    "token of the smallest type too high": _too_high,
    "float tokens": lambda tokens, rig: tokens.astype(rig.rng.choice(("float16", "float32", "float64"))),
    "NaN tokens": lambda tokens, _: np.full(tokens.shape, np.nan),
    "array of objects": lambda tokens, _: np.full(tokens.shape, None, object),
    "tokens of another type": _another_type,
    "no array at all": _no_array,
    "tokens of another shape": _another_shape,
    "masked or record array": _masked,
}
#: Of chunk tokens alone: whatever legal ones say, they decode to a chunk within the range.
LEGAL_TOKENS: dict[str, Change] = {
    "another token, legal too": lambda tokens, rig: _with(rig.rng.randrange(rig.model.vocabulary), tokens, rig),
    "first token missing": lambda tokens, _: tokens[:, 1:] if tokens.size > 1 else tokens,
    "tokens of two chunks": _another_rest,
    "tokens of another bundle": _any,
}
