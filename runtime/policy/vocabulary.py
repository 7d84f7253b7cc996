"""Tokens as ids of a flat vocabulary and back, for models that emit ids as they emit text.

A token of layer l with level i has the id `offset + l * K + i`: every layer has K ids of its own, the same at every
step and latent. A chunk is a sequence of n = T * D * L ids, in one of two orders:

- `layer-major`: L0 of the whole chunk, then L1, and so on; within a layer step by step, within a step latent by
  latent. Position (l * T + t) * D + d. The first l * T * D ids are the coarse prefix of l layers.
- `step-major`: the first step with all its layers, then the second; within a step layer by layer, within a layer
  latent by latent. Position (t * L + l) * D + d.

So the layer at each position is known, and an id of another layer is an error. Nothing is repaired.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NoReturn, Self, overload

import numpy as np

from ..bundle.arrays import AnyArray, Int32Array, Int64Array
from ..bundle.errors import (
    ForeignIdError,
    IdTypeError,
    InvalidInputError,
    MalformedIdsError,
    SequenceTooLongError,
    SequenceTooShortError,
    SpecialIdError,
    VocabularyError,
    WrongLayerError,
)
from ..bundle.models import step_model
from ..bundle.reading import coerce_fields
from ..bundle.validation import TOKEN_TYPES, as_array_advice, kind_of, native, refuse_first

if TYPE_CHECKING:
    from ..tokenizer import ActionTokenizer

Order = Literal["layer-major", "step-major"]
ORDERS: tuple[Order, ...] = ("layer-major", "step-major")

_ID_TYPES = (np.dtype(np.int64), np.dtype(np.int32))
_LARGEST_ID = 2**63 - 1
_MOST_LEVELS = 2**31
#: In a chunk; a thousand is usual. Each position takes 8 bytes.
_MOST_IDS = 2**24


@dataclass(frozen=True, eq=False)
class PartialTokens:
    """The tokens that are whole in every sequence of a batch.

    tokens: int32 [B, T, D, l] of the first l layers (`layer-major`), int32 [B, t, D, L] of the first t steps
    (`step-major`). whole: int64 [B], the whole layers or steps of each sequence, of which tokens have the fewest.
    used: how many ids of each sequence are in tokens; the rest of it was checked and left out.
    """

    tokens: Int32Array
    whole: Int64Array
    used: int


@dataclass(frozen=True)
class TokenVocabulary:
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

    num_layers: int
    num_levels: int
    latent_dim: int
    chunk_length: int
    offset: int = 0
    order: Order = "layer-major"
    special_ids: tuple[tuple[str, int], ...] = ()
    fingerprint: str = ""

    def __post_init__(self) -> None:
        # JSON gives lists in place of tuples.
        coerce_fields(self, VocabularyError)
        least = {"num_layers": 1, "num_levels": 2, "latent_dim": 1, "chunk_length": 1, "offset": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise VocabularyError(f"{name} is {getattr(self, name)}; expected an int of at least {smallest}")
        if self.num_levels > _MOST_LEVELS:
            raise VocabularyError(f"num_levels is {self.num_levels}; expected at most 2^31, for tokens are int32")
        if self.sequence_length > _MOST_IDS:
            raise VocabularyError(
                f"a chunk would have {self.sequence_length} ids, T * D * L; expected at most {_MOST_IDS}: give the "
                "sizes of the tokenizer's model"
            )
        if self.ids.stop - 1 > _LARGEST_ID:
            raise VocabularyError(f"the last id would be {self.ids.stop - 1}, beyond int64; choose a smaller offset")
        self._check_special_ids()

    def _check_special_ids(self) -> None:
        names: dict[int, str] = {}
        for name, number in self.special_ids:
            if not 0 <= number <= _LARGEST_ID:
                raise VocabularyError(f"special id {name!r} = {number}; expected a name and an int from 0 to 2^63 - 1")
            if number in self.ids:
                raise VocabularyError(
                    f"special id {name!r} is {number}, which is the token of layer {self._layer_of(number)}, level "
                    f"{(number - self.offset) % self.num_levels}: tokens have {self.ids.start} ... "
                    f"{self.ids.stop - 1}; choose another id for it or another offset"
                )
            if number in names or name in names.values():
                raise VocabularyError(
                    f"special id {name!r} = {number} is given twice: {dict(self.special_ids)}; expected one id for "
                    "each name and one name for each id"
                )
            names[number] = name

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: ActionTokenizer,
        *,
        offset: int = 0,
        order: Order = "layer-major",
        special_ids: Mapping[str, int] | None = None,
    ) -> Self:
        """A vocabulary with the sizes and the fingerprint of `tokenizer`; InvalidInputError if it is no tokenizer."""
        # Imported here, since mapping ids needs no tokenizer.
        from ..tokenizer import ActionTokenizer

        if not isinstance(tokenizer, ActionTokenizer):
            raise InvalidInputError(f"tokenizer is a {kind_of(tokenizer)}; expected an ActionTokenizer")
        model = step_model(tokenizer.model, "a TokenVocabulary")
        if not isinstance(special_ids, Mapping | None):
            raise VocabularyError(f"special_ids are {special_ids!r:.60}; expected a dict of names and ids")
        return cls(
            num_layers=model.num_layers,
            num_levels=model.num_levels,
            latent_dim=model.latent_dim,
            chunk_length=model.chunk_length,
            offset=offset,
            order=order,
            special_ids=tuple((special_ids or {}).items()),
            fingerprint=tokenizer.fingerprint,
        )

    @property
    def ids(self) -> range:
        """The L * K ids of tokens, from the offset on."""
        return range(self.offset, self.offset + self.num_layers * self.num_levels)

    @property
    def size(self) -> int:
        """The largest id plus 1, special ones included: the number of rows that an embedding needs."""
        return max(self.ids.stop, *(number + 1 for _, number in self.special_ids), 0)

    @property
    def sequence_length(self) -> int:
        """The number of ids of a whole chunk, n = T * D * L."""
        return self.chunk_length * self.latent_dim * self.num_layers

    def ids_at(self, position: int) -> range:
        """The K ids that may stand at this position, 0 ... n - 1: what a constrained sampler lets through."""
        is_whole = isinstance(position, int | np.integer) and not isinstance(position, bool)
        if not is_whole or not 0 <= position < self.sequence_length:
            raise InvalidInputError(f"position is {position!r:.60}; expected 0 ... {self.sequence_length - 1}")
        start = int(self._lowest[position])
        return range(start, start + self.num_levels)

    def to_ids(self, tokens: object) -> Int64Array:
        """tokens int32 (int64, uint8) [B, T, D, L], each 0 ... K - 1 -> ids int64 [B, n]. InvalidInputError."""
        array = self._tokens(tokens)
        ids = np.empty((len(array), *self._grid), np.int64)
        np.add(array.transpose(0, *self._axes), self._lowest.reshape(self._grid), out=ids)
        return ids.reshape(len(array), self.sequence_length)

    @overload
    def to_tokens(self, ids: object, *, partial: None = None) -> Int32Array: ...

    @overload
    def to_tokens(self, ids: object, *, partial: Literal["prefix"]) -> PartialTokens: ...

    def to_tokens(self, ids: object, *, partial: Literal["prefix"] | None = None) -> Int32Array | PartialTokens:
        """ids int64 (int32) [B, n] -> tokens int32 [B, T, D, L]; special ids are to be taken off before.

        partial: `prefix` takes sequences that end early, with the array or with their first special id, behind which
        only special ids may follow (eos, pad, pad ...). Their whole layers (`layer-major`) or whole steps
        (`step-major`) become tokens; a sequence with none is too short. Everything else is an error there too, in the
        part that is left out as well. A step is coded on its own: to decode t < T steps, fill the chunk with any
        tokens and drop the actions of the filling.

        Raises SequenceTooShortError, SequenceTooLongError, ForeignIdError, SpecialIdError or WrongLayerError for the
        first sequence that is malformed, at its first position that is wrong, and IdTypeError for another type.
        """
        if partial is not None and not (isinstance(partial, str) and partial == "prefix"):
            raise InvalidInputError(f"partial is {partial!r:.60}; expected 'prefix' or None")
        array = _ids(ids)
        width, most = array.shape[1], self.sequence_length
        if partial is None and not len(array) and width != most:
            kind = SequenceTooShortError if width < most else SequenceTooLongError
            raise kind(f"ids have shape {list(array.shape)}; expected [B, n] = [B, {most}]", None, min(width, most))
        # Modulo 2^64 the ids of a position are the K smallest numbers, and all others are larger.
        levels = array[:, :most] - self._lowest[:width]
        is_clean = levels.size == 0 or bool(np.maximum.reduce(levels.view(np.uint64), axis=None) < self.num_levels)
        least = most if partial is None else self._unit
        is_whole = is_clean and least <= width <= most
        lengths = np.full(len(array), width) if is_whole else self._lengths(array, levels, partial)
        if partial is None:
            return self._from_grid(levels, self._grid[0])
        whole = lengths // self._unit
        count = int(whole.min(initial=min(width, most) // self._unit))
        used = count * self._unit
        return PartialTokens(self._from_grid(levels[:, :used], count), whole, used)

    @property
    def _axes(self) -> tuple[int, int, int]:
        """The axes of tokens [B, T, D, L] in the order of the sequence, the outermost first."""
        return (3, 1, 2) if self.order == "layer-major" else (1, 3, 2)

    @property
    def _grid(self) -> tuple[int, ...]:
        sizes = {1: self.chunk_length, 2: self.latent_dim, 3: self.num_layers}
        return tuple(sizes[axis] for axis in self._axes)

    @property
    def _unit(self) -> int:
        """The number of ids of one layer or one step, whichever is outermost."""
        return self._grid[1] * self.latent_dim

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

    def _tokens(self, tokens: object) -> AnyArray:
        expected = f"[B, T, D, L] = [B, {self.chunk_length}, {self.latent_dim}, {self.num_layers}]"
        if type(tokens) is not np.ndarray:
            raise InvalidInputError(f"tokens is a {type(tokens).__qualname__}; expected a numpy.ndarray {expected}")
        tokens = native("tokens", tokens, TOKEN_TYPES)
        if tokens.ndim != 4 or tokens.shape[1:] != (self.chunk_length, self.latent_dim, self.num_layers):
            raise InvalidInputError(
                f"tokens have shape {list(tokens.shape)}; expected {expected}: for fewer layers use the vocabulary "
                "dataclasses.replace(vocabulary, num_layers=l)"
            )
        if tokens.size and not (np.minimum.reduce(tokens, axis=None) >= 0 and tokens.max() < self.num_levels):
            is_level = (tokens >= 0) & (tokens < self.num_levels)
            refuse_first("tokens", tokens, is_level, f"0 ... {self.num_levels - 1}")
        return tokens

    # On the way to an error.

    def _lengths(self, ids: AnyArray, levels: Int64Array, partial: str | None) -> Int64Array:
        """How many ids each sequence has before it ends, [B]; refuses the first that is malformed."""
        # Only where a sequence may end early is a special id its end.
        is_special = np.isin(ids, [number for _, number in self.special_ids if partial])
        width = ids.shape[1]
        positions = np.arange(width)
        lengths: Int64Array = np.where(is_special, positions, width).min(axis=1, initial=width)
        is_wrong = np.ones(ids.shape, np.bool_)
        is_wrong[:, : levels.shape[1]] = levels.view(np.uint64) >= self.num_levels
        is_wrong &= positions < lengths[:, None]
        # A special id that another id follows is not the end, but wrong.
        goes_on = ((positions > lengths[:, None]) & ~is_special).any(axis=1)
        is_wrong[np.flatnonzero(goes_on), lengths[goes_on]] = True
        is_short = lengths < (self._unit if partial else self.sequence_length)
        refused = is_wrong.any(axis=1) | is_short
        if refused.any():
            row = int(refused.argmax())
            if is_wrong[row].any():
                self._refuse_at(ids, row, int(is_wrong[row].argmax()))
            expected = f"T * D * L = {self.sequence_length}; to take what is whole, pass partial='prefix'"
            if partial:
                expected = f"at least {self._unit}, one whole {self.order.partition('-')[0]}"
            length = int(lengths[row])
            raise SequenceTooShortError(f"sequence {row} has {length} ids; expected {expected}", row, length)
        return lengths

    def _refuse_at(self, ids: AnyArray, row: int, position: int) -> NoReturn:
        number = int(ids[row, position])
        expected = f"nothing behind the {self.sequence_length} ids of a chunk"
        if position < self.sequence_length:
            allowed = self.ids_at(position)
            layer = self._layer_of(allowed.start)
            expected = f"{allowed.start} ... {allowed.stop - 1}, layer {layer} in {self.order} order"
        name = next((name for name, special in self.special_ids if special == number), None)
        error: type[MalformedIdsError]
        if name is not None:
            error, found = SpecialIdError, f"the special id {name!r}"
            expected += ": take bos, eos and padding off before"
        elif position >= self.sequence_length:
            error, found = SequenceTooLongError, "one too many"
        elif number in self.ids:
            error, found = WrongLayerError, f"of layer {self._layer_of(number)}{self._other_order(ids[row])}"
        else:
            error, found = ForeignIdError, "no id of this vocabulary"
        raise error(f"ids[{row}, {position}] is {number}, {found}; expected {expected}", row, position)

    def _other_order(self, sequence: AnyArray) -> str:
        """A remark if the whole sequence would be right in the other order."""
        if len(sequence) != self.sequence_length:
            return ""
        other = replace(self, order=ORDERS[1 - ORDERS.index(self.order)])
        levels = sequence.astype(np.int64) - other._lowest  # noqa: SLF001  # of this class
        is_right = (levels.view(np.uint64) < self.num_levels).all()
        return f" (the whole sequence is in {other.order} order)" if is_right else ""


def _ids(ids: object) -> AnyArray:
    """int64 or int32 [B, n] in this machine's byte order."""
    if type(ids) is not np.ndarray:
        raise IdTypeError(
            f"ids is a {type(ids).__qualname__}; expected a numpy.ndarray{as_array_advice('ids', ids, is_float=False)}"
        )
    native = ids.dtype.newbyteorder("=")
    if native not in _ID_TYPES:
        raise IdTypeError(f"ids have type {ids.dtype}; expected int64 or int32: they are numbers of a vocabulary")
    if ids.ndim != 2:
        hint = "; for a single sequence pass ids[None]" if ids.ndim == 1 else ""
        raise IdTypeError(f"ids have shape {list(ids.shape)}; expected [B, n]{hint}")
    return ids.astype(native, copy=False)
