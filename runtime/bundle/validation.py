"""Checks arrays before anything runs: wrong input is refused by name and place, and nothing is half-done.

The usual array, of the right type and contiguous, costs two or three microseconds; words are made only on the way
to an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import numpy.typing as npt

from .advice import command
from .arrays import AnyArray, BoolArray, Float32Array, Float64Array, Int32Array, unravel
from .errors import InvalidInputError, UnbuiltPrefixError
from .models import ModelEntry

_Scalar = TypeVar("_Scalar", bound=np.generic)

_FLOAT32 = np.dtype(np.float32)
_INT32 = np.dtype(np.int32)
_BYTES, _WORDS = np.dtype(np.uint8), np.dtype(np.uint16)
#: The types that tokens may have, of one kind or the other; int32 first.
TOKEN_TYPES = (_INT32, np.dtype(np.int64), _BYTES, _WORDS)
#: What DLPack calls memory of a CUDA device.
_DLPACK_CUDA = 2
_UNSIGNED = {dtype: np.dtype(f"u{dtype.itemsize}") for dtype in TOKEN_TYPES}

#: No |mean| and no sigma of a `dynamic` layer comes near it. Layer 0 takes tanh's values: within 1 of 0, over a range
#: of at most 2. A layer takes the mean away and then moves, in units of sigma, what lies inside the grid's [-1, 1] to
#: within half a bin of 0, and what lies beyond nearer to 0 by 1. So with 3 levels or more no range is wider than the
#: one before, and nothing is farther from 0 than that range is wide: |mean| <= 2; and sigma, unbiased over 2 latents or
#: more, is at most range / sqrt(2) + 1e-5. Twice 2 leaves room for rounding, and for 2 levels, whose half a bin is a
#: whole sigma.
STATS_LIMIT = 4.0


def _stats_needed() -> str:
    """What to say where a `dynamic` bundle is to decode tokens alone."""
    build = command("build", "--conditioning calibrated")
    return (
        "tokens of a `dynamic` bundle cannot be decoded alone: every layer was normalised by a mean and a sigma of its "
        "own step, which do not travel with the tokens. Pass the stats that encode_with_stats returned, or build a "
        f"bundle whose tokens decode on their own: `{build}` (new tokens, exact) or "
        "`--conditioning recovered` (the same tokens, approximate)"
    )


def is_gpu_array(value: object) -> bool:
    """Whether `value` says, by one of the two common protocols, that it lies on a GPU."""
    if type(value) is np.ndarray:
        return False
    try:
        where = getattr(value, "__dlpack_device__", None)
        if where is not None:
            return int(where()[0]) == _DLPACK_CUDA
    except Exception:
        # Whatever somebody's object raises that cannot say where it lies: then nothing shows that it is on a GPU.
        return False
    # Asked of the type, because making the description takes torch several microseconds.
    return hasattr(type(value), "__cuda_array_interface__")


class CheckedPair:
    """An input and an output whose forms were checked, to be known when they come again: a control loop's arrays do.

    They are referenced weakly. numpy resizes nothing that is referenced so; what else can be changed in place, type,
    shape, strides and whether it may be written, is compared.
    """

    __slots__ = ("_shape", "_source", "_source_form", "_strides", "_target", "_target_form")

    def __init__(self, source: AnyArray, target: AnyArray) -> None:
        self._source: Callable[[], Any] = weakref.ref(source)
        self._target: Callable[[], Any] = weakref.ref(target)
        self._source_form = source.dtype, source.shape, source.strides
        self._target_form = target.dtype, target.shape, target.strides

    def is_of(self, source: Any, target: Any) -> bool:
        """Whether these are the two, as they were."""
        if self._source() is not source or self._target() is not target:
            return False
        return (
            (source.dtype, source.shape, source.strides) == self._source_form
            and (target.dtype, target.shape, target.strides) == self._target_form
            and target.flags.writeable
        )


class InputValidator:
    """Validates the arrays that go in and out of one model."""

    def __init__(self, model: ModelEntry) -> None:
        self._model = model
        self._vocabulary = model.vocabulary
        self._token_types = token_types(model)
        self._prefixes = frozenset(model.prefixes)
        # The limit as float32, the type of what is compared with it.
        self._action_limit = float(np.float32(model.action_limit))
        self._actions_tail = (model.chunk_length, model.action_dim)
        self._token_grid, self._num_axes = model.token_grid, len(model.token_grid) + 2

    def actions(self, actions: object, *, unchecked: int = 0) -> Float32Array:
        """float32 [B, T, A], every |action| at most the model's limit; as a C-contiguous array of native order.

        unchecked: up to so many chunks the backend checks the values, faster. Raises InvalidInputError.
        """
        array = as_plain_array("actions", actions)
        if array.dtype != _FLOAT32 or array.shape[1:] != self._actions_tail:
            check_shape("actions", array.shape, "B, T, A", self._actions_tail)
            array = native("actions", array, (_FLOAT32,))
        if not (array.flags.c_contiguous and array.flags.aligned):
            array = np.require(array, requirements=["C", "A"])
        if len(array) > unchecked:
            self.check_actions(array)
        return array

    def check_actions(self, array: Float32Array) -> None:
        """Raises InvalidInputError for the first action, at its place in any array, that no encoder takes."""
        limit = self._action_limit
        # A NaN is the maximum of any array that holds one, and no comparison with it is true.
        if array.size and not (
            np.maximum.reduce(array, axis=None) <= limit and np.minimum.reduce(array, axis=None) >= -limit
        ):
            expected = f"finite numbers of at most {limit:.3g}, beyond which float32 overflows in the encoder"
            refuse_first("actions", array, np.abs(array) <= limit, expected)

    def tokens(self, tokens: object, *, unchecked: int = 0) -> Int32Array:
        """int32 or int64 [B, T, D, l] (uint8 too) or [B, l] (uint16 too); as C-contiguous native int32.

        l is a prefix that decodes, values are 0 ... vocabulary - 1. unchecked: up to so many chunks the backend checks
        the values, faster; of other types they are checked here. Raises InvalidInputError, UnbuiltPrefixError for
        another l.
        """
        array = as_plain_array("tokens", tokens)
        if array.dtype != _INT32 or array.shape[1:-1] != self._token_grid or array.ndim != self._num_axes:
            check_shape("tokens", array.shape, token_letters(self._model), self._token_grid)
            array = native("tokens", array, self._token_types)
        if array.shape[-1] not in self._prefixes:
            check_prefix(array.shape, self._model)
        if not (array.flags.c_contiguous and array.flags.aligned):
            array = np.require(array, requirements=["C", "A"])
        is_int32 = array.dtype == _INT32
        if len(array) > unchecked or not is_int32:
            self.check_tokens(array)
        return array if is_int32 else array.astype(_INT32)

    def check_tokens(self, array: AnyArray) -> None:
        """Raises InvalidInputError for the first token, at its place in any array of a type taken, that is illegal."""
        values = self._vocabulary
        # As unsigned numbers, negative ones are the largest: one pass finds both kinds of wrong value.
        if array.size and np.maximum.reduce(array.view(_UNSIGNED[array.dtype]), axis=None) >= values:
            named = "levels of this bundle" if self._token_grid else "words of this bundle's vocabulary"
            expected = f"0 ... {values - 1}, the {values} {named}"
            refuse_first("tokens", array, (array >= 0) & (array < values), expected)

    def stats(self, stats: object, tokens: Int32Array) -> Float32Array | None:
        """float32 [B, T, l, 2] that encoding can give, for `dynamic` bundles; None for all others.

        Raises InvalidInputError.
        """
        if stats is None and not self._model.has_stats:
            return None
        check_whether_stats(stats, self._model)
        array = as_plain_array("stats", stats)
        expected = (*tokens.shape[:2], tokens.shape[3], 2)
        if array.shape != expected:
            raise InvalidInputError(
                f"stats have shape {list(array.shape)}; expected [B, T, l, 2] = {list(expected)} beside tokens of "
                f"shape {list(tokens.shape)}: slice tokens[..., :l] and stats[..., :l, :] alike"
            )
        array = np.require(native("stats", array, (_FLOAT32,)), _FLOAT32, ["C", "A"])
        # Written so that NaN is refused.
        possible = np.abs(array) <= STATS_LIMIT
        possible[..., 1] &= array[..., 1] > 0
        if not possible.all():
            is_sigma = possible.argmin() % 2
            number = (
                f"a sigma above 0 and at most {STATS_LIMIT:g}" if is_sigma else f"a mean of at most ±{STATS_LIMIT:g}"
            )
            origin = (
                "latents lie between -1 and 1, so no encoder gives it; pass the stats that encode_with_stats returned"
            )
            refuse_first("stats", array, possible, f"{number}: {origin}")
        return array

    def output(
        self, name: str, out: object, dtype: type[_Scalar], shape: tuple[int, ...], *inputs: AnyArray
    ) -> npt.NDArray[_Scalar]:
        """`out`; raises InvalidInputError unless results can be written straight into it, without touching `inputs`."""
        # Unlike an input, it must not be converted: the results would be lost with the converted array.
        if type(out) is not np.ndarray or out.dtype != dtype or out.shape != shape:
            found = f"{out.dtype}{list(out.shape)}" if type(out) is np.ndarray else f"a {kind_of(out)}"
            raise InvalidInputError(
                f"{name} is {found}; expected a numpy.ndarray {np.dtype(dtype)}{list(shape)}: allocate it with "
                f"np.empty({list(shape)}, np.{np.dtype(dtype)})"
            )
        flags = out.flags
        if not (flags.writeable and flags.c_contiguous and flags.aligned):
            raise InvalidInputError(
                f"{name} is {'not writable' if not flags.writeable else 'not C-contiguous and aligned'}; expected an "
                "array that results can be written into directly: allocate it with np.empty"
            )
        for given in inputs:
            # Arrays that own their memory share it with nobody but themselves, and asking numpy takes longer.
            is_apart = flags.owndata and given.flags.owndata and out is not given
            if not is_apart and np.may_share_memory(out, given):
                raise InvalidInputError(
                    f"{name} overlaps the memory of an input or of another output; give it memory of its own"
                )
        return out


def token_types(model: ModelEntry) -> tuple[np.dtype[Any], ...]:
    """The types that tokens of this model may have; int32 first."""
    return (*TOKEN_TYPES[:2], np.dtype(model.narrow_type))


def token_letters(model: ModelEntry) -> str:
    """The axes of tokens, by their letters."""
    return "B, T, D, l" if model.token_grid else "B, l"


def check_shape(name: str, shape: tuple[int, ...], letters: str, tail: tuple[int, ...]) -> None:
    """Raises InvalidInputError unless the shape is [B, *tail], or [B, *tail, l] where `letters` say so.

    >>> check_shape("actions", (1, 8, 6), "B, T, A", (8, 7))
    Traceback (most recent call last):
    rfsq.runtime.bundle.errors.InvalidInputError: actions have shape [1, 8, 6]; expected [B, T, A] = [B, 8, 7]
    """
    expected = ["B", *map(str, tail), *(["l"] if letters.endswith("l") else [])]
    if len(shape) != len(expected) or shape[1 : 1 + len(tail)] != tail:
        is_single = len(shape) == len(expected) - 1 and shape[: len(tail)] == tail
        hint = f"; for a single chunk pass {name}[None]" if is_single else ""
        sizes = ", ".join(expected)
        raise InvalidInputError(
            f"{name} have shape {list(shape)}; expected [{letters}]{f' = [{sizes}]' if sizes != letters else ''}{hint}"
        )


def check_prefix(shape: tuple[int, ...], model: ModelEntry) -> None:
    """Raises UnbuiltPrefixError unless the bundle decodes tokens of this shape, [B, T, D, l] or [B, l]."""
    layers = shape[-1]
    if layers in model.prefixes:
        return
    if not model.token_grid:
        raise UnbuiltPrefixError(
            f"tokens have the shape {list(shape)}, {layers} of a chunk; this bundle decodes from 1 to {model.depth}: "
            "pass the first so many that its encoder gave, tokens[:, :l]"
        )
    slicing = "slice tokens[..., :l] to one of them, or " if layers > min(model.prefixes) else ""
    raise UnbuiltPrefixError(
        f"tokens have {layers} layers (shape {list(shape)}); this bundle decodes {listed(model.prefixes)}: "
        + (
            f"{slicing}build the bundle with `--prefixes {layers}`"
            if 1 <= layers < model.depth
            else f"pass the first so many of the model's {model.depth} layers, tokens[..., :l]"
        )
    )


def check_whether_stats(stats: object | None, model: ModelEntry) -> None:
    """Raises InvalidInputError unless there are stats where decoding needs them, and none elsewhere."""
    if stats is None and model.has_stats:
        raise InvalidInputError(_stats_needed())
    if stats is not None and not model.has_stats:
        raise InvalidInputError(
            f"stats were given, but tokens of a {model.mode!r} bundle are decoded without: its mean and scale are "
            "constants in the decoder. Leave stats out"
        )


def refuse_first(name: str, array: AnyArray, is_right: BoolArray, expected: str) -> NoReturn:
    """Raises InvalidInputError for the first value that is not right."""
    index = unravel(is_right.argmin(), array.shape)
    raise InvalidInputError(f"{name}{list(index)} is {array[index]}; expected {expected}")


def as_plain_array(name: str, value: object) -> AnyArray:
    # Subclasses bring rules of their own: a masked array hides the very values that have to be checked.
    if type(value) is not np.ndarray:
        advice = as_array_advice(name, value, is_float=name != "tokens")
        raise InvalidInputError(f"{name} is a {kind_of(value)}; expected a numpy.ndarray{advice}")
    return value


def real_numbers(name: str, value: object, expected: str) -> Float64Array:
    """One or several as float64, where they are numbers already: numpy would make some of text, of truth values, and of
    what a mask hides. Raises InvalidInputError."""
    parts = value if isinstance(value, list | tuple) else (value,)
    if all(type(part) is float for part in parts):
        # These raise nothing: what a signal's handler raises meanwhile passes as it is.
        return np.array(value, np.float64)
    read = ""
    # Whatever somebody's object raises that is no array.
    with suppress(Exception):
        found = np.asarray(value)
        types = [found.dtype]
        if found.ndim and not isinstance(value, np.ndarray):
            # One truth value among numbers is one of these to numpy.
            types += [np.asarray(part).dtype for part in cast(Iterable[object], value)]
        strange = [dtype for dtype in types if dtype.kind not in "iuf"]
        if not strange and not isinstance(value, np.ma.MaskedArray):
            with np.errstate(over="ignore"):
                return found.astype(np.float64)
        read = f" of type {(*strange, found.dtype)[0]}"
    raise InvalidInputError(f"{name} is a {kind_of(value)}{read}; expected {expected}")


def kind_of(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def as_array_advice(name: str, value: object, *, is_float: bool) -> str:
    """How `value` becomes an array, as the end of a message; nothing where only the caller can know.

    Whole numbers keep their type, for rounding them unseen would make other tokens of them.
    """
    if isinstance(value, np.ma.MaskedArray):
        # numpy.asarray would give the values that the mask hides.
        return f": what its mask hides is no value; leave those chunks out, or choose values with {name}.filled"
    if any(f"{base.__module__}.{base.__qualname__}" == "torch.Tensor" for base in type(value).__mro__):
        return f": pass {name}.detach().cpu(){'.float()' if is_float else ''}.numpy()"
    if is_gpu_array(value):
        return f": copy it from the GPU, {name}.get() where it is CuPy's"
    if isinstance(value, list | tuple | np.ndarray) or hasattr(type(value), "__array__"):
        return f": pass np.asarray({name}{', np.float32' if is_float else ''})"
    return ""


def native(name: str, array: AnyArray, accepted: tuple[np.dtype[Any], ...]) -> AnyArray:
    """In this machine's byte order, if the type is an accepted one in any order; else raises InvalidInputError."""
    native = array.dtype.newbyteorder("=")
    if native not in accepted:
        raise InvalidInputError(
            f"{name} have type {array.dtype}; expected {listed(accepted)}: "
            + type_advice(array.dtype, accepted[0], f"{name}.astype(np.{accepted[0]})")
        )
    return array.astype(native, copy=False)


def type_advice(found: np.dtype[Any], wanted: np.dtype[Any], conversion: str) -> str:
    """The end of a message: `conversion` only where it is right whatever the values are."""
    if found.kind in "iu" or (found.kind == "f" and wanted.kind == "f"):
        return f"convert with {conversion}"
    if found.kind in "fc":
        return "a fraction is lost in conversion; pass the whole numbers that the tokenizer or the policy gave"
    return f"these are no plain numbers; make them anew as np.{wanted}"


def listed(values: tuple[object, ...]) -> str:
    *rest, last = map(str, values)
    return f"{', '.join(rest)} or {last}" if rest else last
