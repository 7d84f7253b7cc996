"""What all vocabularies share: ids of a flat range at the positions of a sequence, and what is wrong with others."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn, overload

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
from ..bundle.reading import coerce_fields
from ..bundle.validation import as_array_advice, kind_of, native, refuse_first

if TYPE_CHECKING:
    from ..tokenizer import ActionTokenizer

_ID_TYPES = (np.dtype(np.int64), np.dtype(np.int32))
_LARGEST_ID = 2**63 - 1
_MOST_VALUES = 2**31
#: In a chunk; a thousand is usual. Each position takes 8 bytes.
_MOST_IDS = 2**24


@dataclass(frozen=True, eq=False)
class PartialTokens:
    """The tokens that are whole in every sequence of a batch.

    tokens: int32; of per-step tokens [B, T, D, l] of the first l layers (`layer-major`) or [B, t, D, L] of the first t
    steps (`step-major`), of chunk tokens the first l, [B, l]. whole: int64 [B], the whole layers, steps or tokens of
    each sequence. The shortest one decides: tokens have as many of every sequence, and used is how many ids that is;
    the rest was checked and left out. To take each at its own length, see `Vocabulary.count_whole`.
    """

    tokens: Int32Array
    whole: Int64Array
    used: int


class Vocabulary(ABC):
    """Frozen dataclasses extend it: which ids tokens have, and which stand where in the sequence of a chunk.

    special_ids: names and ids that are no tokens (bos, eos, pad, ...). fingerprint: of the tokenizer, or empty.
    tokenizer_sizes: what `_SIZES` and `_VALUES` name, of that tokenizer; empty where nobody said. All but the first,
    of which a policy may say fewer, have to be the same here.
    """

    #: The field with the number of values that a token has, K; the fields that are sizes, 1 at least; n in letters; the
    #: type of few bytes that tokens may have.
    _VALUES: ClassVar[str]
    _SIZES: ClassVar[tuple[str, ...]]
    _LENGTH: ClassVar[str]
    _NARROW: ClassVar[str]

    offset: int
    special_ids: tuple[tuple[str, int], ...]
    fingerprint: str
    tokenizer_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        # JSON gives lists in place of tuples.
        coerce_fields(self, VocabularyError, _of_python)
        least = {**dict.fromkeys(self._SIZES, 1), self._VALUES: 2, "offset": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise VocabularyError(f"{name} is {getattr(self, name)}; expected an int of at least {smallest}")
        if self._values > _MOST_VALUES:
            raise VocabularyError(f"{self._VALUES} is {self._values}; expected at most 2^31, for tokens are int32")
        if self.sequence_length > _MOST_IDS:
            raise VocabularyError(
                f"a chunk would have {self.sequence_length} ids, {self._LENGTH}; expected at most {_MOST_IDS}: give "
                "the sizes of the tokenizer's model"
            )
        if self.ids.stop - 1 > _LARGEST_ID:
            raise VocabularyError(f"the last id would be {self.ids.stop - 1}, beyond int64; choose a smaller offset")
        self._check_special_ids()
        for name, size in zip((*self._SIZES, self._VALUES), self.tokenizer_sizes, strict=False):
            found, is_length = getattr(self, name), name == self._SIZES[0]
            if found != size and not (is_length and found < size):
                raise VocabularyError(
                    f"{name} is {found}, and the tokenizer {self.fingerprint[:16]} has {size}; expected {size}"
                    f"{' or fewer' if is_length else ''}: of another tokenizer take from_tokenizer"
                )

    def _check_special_ids(self) -> None:
        names: dict[int, str] = {}
        for name, number in self.special_ids:
            if not 0 <= number <= _LARGEST_ID:
                raise VocabularyError(f"special id {name!r} = {number}; expected a name and an int from 0 to 2^63 - 1")
            if number in self.ids:
                raise VocabularyError(
                    f"special id {name!r} is {number}, which is the token {self._token_of(number)}: tokens have "
                    f"{self.ids.start} ... {self.ids.stop - 1}; choose another id for it or another offset"
                )
            if number in names or name in names.values():
                raise VocabularyError(
                    f"special id {name!r} = {number} is given twice: {dict(self.special_ids)}; expected one id for "
                    "each name and one name for each id"
                )
            names[number] = name

    @property
    @abstractmethod
    def ids(self) -> range:
        """The ids of tokens, from the offset on."""

    @property
    @abstractmethod
    def sequence_length(self) -> int:
        """The number of ids of a whole chunk, n."""

    @property
    def size(self) -> int:
        """The largest id plus 1, special ones included: the number of rows that an embedding needs."""
        return max(self.ids.stop, *(number + 1 for _, number in self.special_ids), 0)

    def ids_at(self, position: int) -> range:
        """The ids that may stand at this position, 0 ... n - 1: what a constrained sampler lets through."""
        is_whole = isinstance(position, int | np.integer) and not isinstance(position, bool)
        if not is_whole or not 0 <= position < self.sequence_length:
            raise InvalidInputError(f"position is {position!r:.60}; expected 0 ... {self.sequence_length - 1}")
        start = int(self._lowest[position])
        return range(start, start + self._values)

    def to_ids(self, tokens: object) -> Int64Array:
        """Tokens of whole chunks, int32 or int64 (of levels uint8, of chunk tokens uint16) -> ids int64 [B, n].

        Raises InvalidInputError.
        """
        array = self._checked(tokens)
        ids = np.empty((len(array), *self._grid), np.int64)
        np.add(self._to_grid(array), self._lowest.reshape(self._grid), out=ids)
        return ids.reshape(len(array), self.sequence_length)

    @overload
    def to_tokens(self, ids: object, *, partial: None = None) -> Int32Array: ...

    @overload
    def to_tokens(self, ids: object, *, partial: Literal["prefix"]) -> PartialTokens: ...

    def to_tokens(self, ids: object, *, partial: Literal["prefix"] | None = None) -> Int32Array | PartialTokens:
        """ids int64 (int32) [B, n] -> tokens int32; special ids are to be taken off before.

        partial: `prefix` takes sequences that end early, with the array or with their first special id, behind which
        only special ids may follow (eos, pad, pad ...). What is whole in all of them (`PartialTokens`) becomes tokens;
        one with nothing whole is too short, and with it the batch. Everything else is an error there too, in the part
        that is left out as well.

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
        levels = self._above_lowest(array)
        is_clean = levels.size == 0 or bool(np.maximum.reduce(levels.view(np.uint64), axis=None) < self._values)
        least = most if partial is None else self._unit
        is_whole = is_clean and least <= width <= most
        lengths = np.full(len(array), width) if is_whole else self._lengths(array, levels, partial, least)
        if partial is None:
            return self._from_grid(levels, self._grid[0])
        whole = lengths // self._unit
        count = int(whole.min(initial=min(width, most) // self._unit))
        used = count * self._unit
        return PartialTokens(self._from_grid(levels[:, :used], count), whole, used)

    def count_whole(self, ids: object) -> Int64Array:
        """ids int64 (int32) [B, n] -> int64 [B]: the layers, steps or tokens of each sequence that are whole.

        They are those that `to_tokens` takes with partial="prefix"; 0 where a sequence ends before the first is whole,
        as with eos alone. So rows can be left out, and those of one length decoded together. Raises what `to_tokens`
        raises for ids that are wrong.
        """
        array = _ids(ids)
        return self._lengths(array, self._above_lowest(array), "prefix", 0) // self._unit

    # What the kinds of tokens differ in.

    @property
    def _values(self) -> int:
        return int(getattr(self, self._VALUES))

    @property
    @abstractmethod
    def _grid(self) -> tuple[int, ...]:
        """The axes of a sequence, the outermost first; it may end early behind each of that one."""

    @property
    def _unit(self) -> int:
        """The number of ids of one layer, one step or one token, whichever is outermost."""
        return math.prod(self._grid[1:])

    @property
    @abstractmethod
    def _unit_name(self) -> str: ...

    @cached_property
    @abstractmethod
    def _lowest(self) -> Int64Array:
        """The lowest id at each position, [n]."""

    @abstractmethod
    def _checked(self, tokens: object) -> AnyArray:
        """Tokens of whole chunks. Raises InvalidInputError."""

    @abstractmethod
    def _to_grid(self, tokens: AnyArray) -> AnyArray:
        """Tokens as [B, *grid]."""

    @abstractmethod
    def _from_grid(self, values: Int64Array, count: int) -> Int32Array:
        """Values [B, count * unit] as tokens."""

    @abstractmethod
    def _token_of(self, number: int) -> str:
        """The token that has this id, for people."""

    @abstractmethod
    def _place(self, position: int) -> str:
        """What stands at this position, for people."""

    @abstractmethod
    def _misplaced(self, number: int, sequence: AnyArray) -> str:
        """What a token is that stands where it must not, for people."""

    def _checked_tokens(self, tokens: object, shape: tuple[int, ...], letters: str, advice: str) -> AnyArray:
        """Tokens [B, *shape], each 0 ... values - 1, in this machine's byte order. Raises InvalidInputError."""
        expected, values = f"[{letters}] = [{', '.join(['B', *map(str, shape)])}]", self._values
        if type(tokens) is not np.ndarray:
            raise InvalidInputError(f"tokens is a {type(tokens).__qualname__}; expected a numpy.ndarray {expected}")
        tokens = native("tokens", tokens, (np.dtype(np.int32), np.dtype(np.int64), np.dtype(self._NARROW)))
        if tokens.shape[1:] != shape or tokens.ndim != len(shape) + 1:
            raise InvalidInputError(f"tokens have shape {list(tokens.shape)}; expected {expected}: {advice}")
        if tokens.size and not (np.minimum.reduce(tokens, axis=None) >= 0 and tokens.max() < values):
            refuse_first("tokens", tokens, (tokens >= 0) & (tokens < values), f"0 ... {values - 1}")
        return tokens

    def _above_lowest(self, ids: AnyArray) -> Int64Array:
        """How far each id of [B, n] is above the lowest at its position, as far as a chunk goes.

        Read modulo 2^64, the ids that may stand there are the smallest numbers, and all others are larger.
        """
        above: Int64Array = ids[:, : self.sequence_length] - self._lowest[: ids.shape[1]]
        return above

    # On the way to an error.

    def _lengths(self, ids: AnyArray, levels: Int64Array, partial: str | None, least: int) -> Int64Array:
        """How many ids each sequence has before it ends, [B]; refuses the first that is malformed, or has fewer than
        `least`.
        """
        # Only where a sequence may end early is a special id its end.
        is_special = np.isin(ids, [number for _, number in self.special_ids if partial])
        width = ids.shape[1]
        positions = np.arange(width)
        lengths: Int64Array = np.where(is_special, positions, width).min(axis=1, initial=width)
        is_wrong = np.ones(ids.shape, np.bool_)
        is_wrong[:, : levels.shape[1]] = levels.view(np.uint64) >= self._values
        is_wrong &= positions < lengths[:, None]
        # A special id that another id follows is not the end, but wrong.
        goes_on = ((positions > lengths[:, None]) & ~is_special).any(axis=1)
        is_wrong[np.flatnonzero(goes_on), lengths[goes_on]] = True
        is_short = lengths < least
        refused = is_wrong.any(axis=1) | is_short
        if refused.any():
            row = int(refused.argmax())
            if is_wrong[row].any():
                self._refuse_at(ids, row, int(is_wrong[row].argmax()), partial)
            expected = f"{self._LENGTH} = {self.sequence_length}; to take what is whole, pass partial='prefix'"
            if partial:
                expected = f"at least {self._unit}, one whole {self._unit_name}: leave out sequences for which "
                expected += "count_whole(ids) is 0"
            length = int(lengths[row])
            raise SequenceTooShortError(f"sequence {row} has {length} ids; expected {expected}", row, length)
        return lengths

    def _refuse_at(self, ids: AnyArray, row: int, position: int, partial: str | None) -> NoReturn:
        number = int(ids[row, position])
        expected = f"nothing behind the {self.sequence_length} ids of a chunk"
        if position < self.sequence_length:
            allowed = self.ids_at(position)
            expected = f"{allowed.start} ... {allowed.stop - 1}, {self._place(position)}"
        name = next((name for name, special in self.special_ids if special == number), None)
        error: type[MalformedIdsError]
        if name is not None:
            error, found = SpecialIdError, f"the special id {name!r}"
            expected += ": take bos, eos and padding off before, or pass partial='prefix', which ends a sequence there"
            if partial:
                found += ", and other ids than special ones follow"
                expected = f"only special ids behind it, {', '.join(name for name, _ in self.special_ids)}: cut off "
                expected += "what follows the end, or name the padding in special_ids"
        elif position >= self.sequence_length:
            error, found = SequenceTooLongError, "one too many"
        elif number in self.ids:
            error, found = WrongLayerError, self._misplaced(number, ids[row])
        else:
            error, found = ForeignIdError, "no id of this vocabulary"
        raise error(f"ids[{row}, {position}] is {number}, {found}; expected {expected}", row, position)


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


def _of_python(value: object) -> object:
    """Numbers of numpy as Python's own, also in pairs of special ids; everything else as it is."""
    if isinstance(value, tuple | list):
        return tuple(tuple(map(_number, part)) if isinstance(part, tuple | list) else _number(part) for part in value)
    return _number(value)


def _number(value: object) -> object:
    return int(value) if isinstance(value, np.integer) else value


def require_tokenizer(tokenizer: object) -> ActionTokenizer:
    """Raises InvalidInputError for anything else."""
    # Imported here, since mapping ids needs no tokenizer.
    from ..tokenizer import ActionTokenizer

    if not isinstance(tokenizer, ActionTokenizer):
        raise InvalidInputError(f"tokenizer is a {kind_of(tokenizer)}; expected an ActionTokenizer")
    return tokenizer


def special_pairs(special_ids: object) -> tuple[tuple[str, int], ...]:
    """As a vocabulary has them. Raises VocabularyError for what is neither a mapping nor None."""
    if not isinstance(special_ids, Mapping | None):
        raise VocabularyError(f"special_ids are {special_ids!r:.60}; expected a dict of names and ids")
    return tuple((special_ids or {}).items())
