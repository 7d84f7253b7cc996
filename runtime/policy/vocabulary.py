"""Tokens as ids of a flat vocabulary and back, for models that emit ids as they emit text.

A token of layer l with level i has the id `offset + l * K + i`: every layer has K ids of its own, the same at every
step and latent. A chunk is a sequence of n = T * D * L ids, in one of two orders:

- `layer-major`: L0 of the whole chunk, then L1, and so on; within a layer step by step, within a step latent by
  latent. Position (l * T + t) * D + d. The first l * T * D ids are the coarse prefix of l layers.
- `step-major`: the first step with all its layers, then the second; within a step layer by layer, within a layer
  latent by latent. Position (t * L + l) * D + d.

So the layer at each position is known, and an id of another layer is an error. Nothing is repaired.

Chunk tokens are a sequence already: `ChunkVocabulary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Self

import numpy as np

from ..bundle.arrays import AnyArray, Int32Array, Int64Array
from ..bundle.errors import InvalidInputError
from ..bundle.models import ChunkModel, StepModel
from .ids import PartialTokens as PartialTokens
from .ids import Vocabulary, require_tokenizer, special_pairs

if TYPE_CHECKING:
    from ..tokenizer import ActionTokenizer

Order = Literal["layer-major", "step-major"]
ORDERS: tuple[Order, ...] = ("layer-major", "step-major")


@dataclass(frozen=True)
class TokenVocabulary(Vocabulary):
    """Which ids the tokens of one tokenizer have, and in what order; the module's text defines both.

    special_ids: names and ids that are no tokens (bos, eos, pad, ...). fingerprint: of the tokenizer, or empty.
    VocabularyError for settings that make no sense. The vocabulary of a draft model that emits l layers is
    `dataclasses.replace(vocabulary, num_layers=l)`: the same ids, and in `layer-major` the start of the same sequence.

    >>> vocabulary = TokenVocabulary(num_layers=2, num_levels=3, latent_dim=1, chunk_length=2, offset=100)
    >>> ids = vocabulary.to_ids(np.array([[[[0, 2]], [[1, 1]]]], np.int32))
    >>> ids.tolist()
    [[100, 101, 105, 104]]
    >>> vocabulary.to_tokens(ids)[0, :, 0].tolist()
    [[0, 2], [1, 1]]
    """

    _VALUES = "num_levels"
    _SIZES = ("num_layers", "latent_dim", "chunk_length")
    _LENGTH = "T * D * L"
    _NARROW = "uint8"

    num_layers: int
    num_levels: int
    latent_dim: int
    chunk_length: int
    offset: int = 0
    order: Order = "layer-major"
    special_ids: tuple[tuple[str, int], ...] = ()
    fingerprint: str = ""
    tokenizer_sizes: tuple[int, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: ActionTokenizer,
        *,
        offset: int = 0,
        order: Order = "layer-major",
        special_ids: Mapping[str, int] | None = None,
    ) -> Self:
        """A vocabulary with the sizes and the fingerprint of `tokenizer`.

        InvalidInputError if it is no tokenizer, or has chunk tokens, which `for_tokenizer` takes too.
        """
        model = require_tokenizer(tokenizer).model
        if not isinstance(model, StepModel):
            raise InvalidInputError(
                f"a TokenVocabulary is for per-step tokens, and this bundle has {model.mode} tokens, whose ids are "
                "those of a ChunkVocabulary; TokenVocabulary.for_tokenizer gives the one that fits"
            )
        return cls(
            num_layers=model.num_layers,
            num_levels=model.num_levels,
            latent_dim=model.latent_dim,
            chunk_length=model.chunk_length,
            offset=offset,
            order=order,
            special_ids=special_pairs(special_ids),
            fingerprint=tokenizer.fingerprint,
            tokenizer_sizes=(model.num_layers, model.latent_dim, model.chunk_length, model.num_levels),
        )

    @staticmethod
    def for_tokenizer(
        tokenizer: ActionTokenizer, *, offset: int = 0, special_ids: Mapping[str, int] | None = None
    ) -> TokenVocabulary | ChunkVocabulary:
        """The vocabulary of whichever tokens `tokenizer` has; those of steps in `layer-major` order."""
        kind = TokenVocabulary if isinstance(require_tokenizer(tokenizer).model, StepModel) else ChunkVocabulary
        return kind.from_tokenizer(tokenizer, offset=offset, special_ids=special_ids)

    @property
    def ids(self) -> range:
        """The L * K ids of tokens, from the offset on."""
        return range(self.offset, self.offset + self.num_layers * self.num_levels)

    @property
    def sequence_length(self) -> int:
        """The number of ids of a whole chunk, n = T * D * L."""
        return self.chunk_length * self.latent_dim * self.num_layers

    @property
    def _axes(self) -> tuple[int, int, int]:
        """The axes of tokens [B, T, D, L] in the order of the sequence, the outermost first."""
        return (3, 1, 2) if self.order == "layer-major" else (1, 3, 2)

    @property
    def _grid(self) -> tuple[int, ...]:
        sizes = {1: self.chunk_length, 2: self.latent_dim, 3: self.num_layers}
        return tuple(sizes[axis] for axis in self._axes)

    @property
    def _unit_name(self) -> str:
        return self.order.partition("-")[0]

    @cached_property
    def _lowest(self) -> Int64Array:
        """The lowest id at each position, [n]."""
        layers = np.indices(self._grid, np.int64, sparse=True)[self._axes.index(3)]
        return np.broadcast_to(self.offset + self.num_levels * layers, self._grid).reshape(-1)

    def _from_grid(self, levels: Int64Array, count: int) -> Int32Array:
        """Levels [B, count * unit] as tokens."""
        grid = levels.reshape(len(levels), count, *self._grid[1:])
        return np.moveaxis(grid, (1, 2, 3), self._axes).astype(np.int32, order="C")

    def _layer_of(self, number: int) -> int:
        return (number - self.offset) // self.num_levels

    def _to_grid(self, tokens: AnyArray) -> AnyArray:
        return tokens.transpose(0, *self._axes)

    def _token_of(self, number: int) -> str:
        return f"of layer {self._layer_of(number)}, level {(number - self.offset) % self.num_levels}"

    def _place(self, position: int) -> str:
        return f"layer {self._layer_of(int(self._lowest[position]))} in {self.order} order"

    def _misplaced(self, number: int, sequence: AnyArray) -> str:
        return f"of layer {self._layer_of(number)}{self._other_order(sequence)}"

    def _checked(self, tokens: object) -> AnyArray:
        shape = (self.chunk_length, self.latent_dim, self.num_layers)
        advice = "for fewer layers use the vocabulary dataclasses.replace(vocabulary, num_layers=l)"
        return self._checked_tokens(tokens, shape, "B, T, D, L", advice)

    def _other_order(self, sequence: AnyArray) -> str:
        """A remark if the whole sequence would be right in the other order."""
        if len(sequence) != self.sequence_length:
            return ""
        other = replace(self, order=ORDERS[1 - ORDERS.index(self.order)])
        levels = sequence.astype(np.int64) - other._lowest  # noqa: SLF001  # of this class
        is_right = (levels.view(np.uint64) < self.num_levels).all()
        return f" (the whole sequence is in {other.order} order)" if is_right else ""


@dataclass(frozen=True)
class ChunkVocabulary(Vocabulary):
    """Which ids chunk tokens have: token i of every position has the id `offset + i`, and a chunk is its L tokens.

    num_tokens: L; vocabulary: V, how many values a token has. Every sequence of them decodes, and so does its
    beginning. The vocabulary of a policy that says the first l tokens is `dataclasses.replace(vocabulary,
    num_tokens=l)`: the same ids, and the start of the same sequence.

    >>> vocabulary = ChunkVocabulary(num_tokens=3, vocabulary=1024, offset=32000)
    >>> ids = vocabulary.to_ids(np.array([[7, 0, 1023]], np.int32))
    >>> ids.tolist()
    [[32007, 32000, 33023]]
    >>> vocabulary.to_tokens(ids[:, :2], partial="prefix").tokens.tolist()
    [[7, 0]]
    """

    _VALUES = "vocabulary"
    _SIZES = ("num_tokens",)
    _LENGTH = "L"
    _NARROW = "uint16"

    num_tokens: int
    vocabulary: int
    offset: int = 0
    special_ids: tuple[tuple[str, int], ...] = ()
    fingerprint: str = ""
    tokenizer_sizes: tuple[int, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def from_tokenizer(
        cls, tokenizer: ActionTokenizer, *, offset: int = 0, special_ids: Mapping[str, int] | None = None
    ) -> Self:
        """A vocabulary with the sizes and the fingerprint of `tokenizer`.

        InvalidInputError if it is no tokenizer, or has per-step tokens.
        """
        model = require_tokenizer(tokenizer).model
        if not isinstance(model, ChunkModel):
            raise InvalidInputError(
                f"a ChunkVocabulary is for chunk tokens, and this bundle has {model.mode} tokens, whose ids are those "
                "of a TokenVocabulary; TokenVocabulary.for_tokenizer gives the one that fits"
            )
        sizes = (model.num_tokens, model.vocabulary)
        return cls(*sizes, offset, special_pairs(special_ids), tokenizer.fingerprint, sizes)

    @property
    def ids(self) -> range:
        """The V ids of tokens, from the offset on, the same at every position."""
        return range(self.offset, self.offset + self.vocabulary)

    @property
    def sequence_length(self) -> int:
        """The number of ids of a whole chunk, L."""
        return self.num_tokens

    @property
    def _grid(self) -> tuple[int, ...]:
        return (self.num_tokens,)

    @property
    def _unit_name(self) -> str:
        return "token"

    @cached_property
    def _lowest(self) -> Int64Array:
        return np.full(self.num_tokens, self.offset)

    def _to_grid(self, tokens: AnyArray) -> AnyArray:
        return tokens

    def _from_grid(self, values: Int64Array, count: int) -> Int32Array:
        del count
        return values.astype(np.int32)

    def _token_of(self, number: int) -> str:
        return str(number - self.offset)

    def _place(self, position: int) -> str:
        return f"a token, at position {position}"

    def _misplaced(self, number: int, sequence: AnyArray) -> str:
        del number, sequence
        raise AssertionError("every token may stand at every position")

    def _checked(self, tokens: object) -> AnyArray:
        advice = "for the first l tokens use the vocabulary dataclasses.replace(vocabulary, num_tokens=l)"
        return self._checked_tokens(tokens, (self.num_tokens,), "B, L", advice)
