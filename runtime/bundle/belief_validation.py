"""Checks what is given of tokens' distributions: what is wrong is named with its place, before anything runs."""

from __future__ import annotations

from typing import cast

import numpy as np

from .arrays import AnyArray, BoolArray, Float32Array, unravel
from .belief_settings import BeliefSettings
from .beliefs import BELIEF_MODES, SUM_TOLERANCE
from .errors import InvalidInputError, UnbuiltPrefixError
from .models import ChunkModel, ModelEntry
from .probabilities import Given
from .validation import as_plain_array, kind_of, listed, native, real_numbers, refuse_first

_FLOAT32 = np.dtype(np.float32)
#: Colder or warmer, and float32 no longer holds what logits of any size become.
_COLDEST, _WARMEST = 1e-30, 1e30


class BeliefValidator:
    """Validates what is to be decoded as beliefs of one model. Raises InvalidInputError where its tokens do not decode
    alone."""

    def __init__(self, model: ModelEntry) -> None:
        if model.has_stats:
            raise InvalidInputError(
                f"tokens of a {model.mode!r} bundle need the mean and sigma of every layer, which no policy predicts, "
                "so their probabilities cannot be decoded; build the bundle with `--conditioning calibrated` or "
                "`--conditioning recovered`"
            )
        self._model = model

    def given(self, value: object, *, is_logits: bool, unchecked: int = 0) -> Given:
        """Distributions [B, T, D, l, K] or [B, l, V] in float32, or the pair [B, C] and [B, n] of chunk tokens, as
        C-contiguous native arrays.

        unchecked: up to so many chunks the backend checks the values. Raises InvalidInputError, UnbuiltPrefixError.
        """
        name = "logits" if is_logits else "probabilities"
        given: Given
        if self.is_pair(name, value):
            parts = cast(tuple[object, ...], value)
            classes, bits = (
                as_plain_array(part, array) for part, array in zip(("classes", "bits"), parts, strict=True)
            )
            self.check_pair(classes.shape, bits.shape)
            given = _ready("classes", classes), _ready("bits", bits)
        else:
            array = as_plain_array(name, value)
            self.check_distributions(name, array.shape)
            given = (_ready(name, array),)
        if len(given[0]) > unchecked:
            self.check_values(given, is_logits=is_logits)
        return given

    def check_values(self, given: Given, *, is_logits: bool) -> None:
        """Raises InvalidInputError for the first distribution, by its place, that is none."""
        is_pair = len(given) == 2
        kind = "logits" if is_logits else "probabilities"
        name = "classes" if is_pair else kind
        if is_logits:
            _check_logits(name, given[0])
        else:
            check_probabilities(name, given[0])
        if is_pair:
            bits = given[1]
            # A NaN compares with nothing.
            right = bits < np.inf if is_logits else (bits >= 0) & (bits <= 1)
            if not right.all():
                expected = "a finite logit, or -inf" if is_logits else "the probability that a bit is 1, 0 to 1"
                refuse_first("bits", bits, right, expected)

    def sharpness(self, temperature: object, given: Given) -> Float32Array:
        """1 / temperature, one for each layer [l] or token [l], or class and bit [1 + n]. Raises InvalidInputError."""
        size = given[0].shape[-2] if len(given) == 1 else 1 + given[1].shape[1]
        expected = f"a float, or {size} of them in a list or a numpy.ndarray"
        temperatures = real_numbers("temperature", temperature, expected)
        if temperatures.shape not in ((), (size,)):
            each = "class and bit" if len(given) == 2 else self._model.depth_unit[:-1]
            raise InvalidInputError(
                f"temperature has shape {list(temperatures.shape)}; expected one number, or [{size}], one for each "
                f"{each}"
            )
        if not ((temperatures >= _COLDEST) & (temperatures <= _WARMEST)).all():
            raise InvalidInputError(
                f"temperature is {temperature!r:.60}; expected positive numbers from {_COLDEST:g} to {_WARMEST:g}"
            )
        return np.ascontiguousarray(np.broadcast_to((1 / temperatures).astype(np.float32), (size,)))

    def is_pair(self, name: str, value: object) -> bool:
        """Whether classes and bits are given, not distributions. Raises InvalidInputError for what is neither."""
        is_chunk = isinstance(self._model, ChunkModel)
        if isinstance(value, tuple):
            if not is_chunk:
                raise InvalidInputError(
                    f"{name} are a tuple; expected one array [B, T, D, l, K]: a pair of classes and bits is for chunk "
                    f"tokens, and this bundle has {self._model.mode} tokens"
                )
            if len(value) != 2:
                raise InvalidInputError(f"a tuple of {len(value)} was given; expected the pair of classes and bits")
            return True
        if is_chunk and isinstance(value, list):
            raise InvalidInputError(
                f"{name} are a list; expected a numpy.ndarray [B, l, V], or a pair as a tuple: (classes, bits)"
            )
        return False

    def check_distributions(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises InvalidInputError, UnbuiltPrefixError."""
        model = self._model
        grid, words = model.token_grid, model.vocabulary
        if len(shape) != len(grid) + 3 or shape[1:-2] != grid or shape[-1] != words:
            letters = "B, T, D, l, K" if grid else "B, l, V"
            sizes = ", ".join(["B", *map(str, grid), "l", str(words)])
            pair = "" if grid else f", or a pair of classes [B, {_num_classes(model)}] and bits [B, n]"
            is_single = len(shape) == len(grid) + 2 and shape[:-2] == grid and shape[-1] == words
            hint = f"; for a single chunk pass {name}[None]" if is_single else ""
            raise InvalidInputError(f"{name} have shape {list(shape)}; expected [{letters}] = [{sizes}]{pair}{hint}")
        check_num_tokens(name, shape, model)

    def check_pair(self, classes: tuple[int, ...], bits: tuple[int, ...]) -> None:
        """Of their shapes. Raises InvalidInputError."""
        model = cast(ChunkModel, self._model)
        if len(classes) != 2 or classes[1] != model.num_classes:
            raise InvalidInputError(
                f"classes have shape {list(classes)}; expected [B, C] = [B, {model.num_classes}], the escape class last"
            )
        if len(bits) != 2 or bits[0] != classes[0]:
            raise InvalidInputError(
                f"bits have shape {list(bits)}; expected [B, n] = [{classes[0]}, n] beside classes of shape "
                f"{list(classes)}"
            )
        check_num_bits(bits, model)


def check_mode(mode: object, seed: object, *, can_draw: bool = True) -> None:
    """Raises InvalidInputError for no mode, and for a seed where nothing is drawn.

    can_draw: False for calls that write into arrays of the caller.
    """
    # An array has no truth to compare by.
    if not isinstance(mode, str) or mode not in BELIEF_MODES:
        raise InvalidInputError(f"mode is {mode!r:.60}; expected {listed(tuple(map(repr, BELIEF_MODES)))}")
    if mode == "sample" and not can_draw:
        raise InvalidInputError(
            "mode is 'sample'; expected 'expected' or 'likeliest mode': samples are drawn by decode_probabilities and "
            "decode_logits, which return new arrays"
        )
    if seed is not None and mode != "sample":
        raise InvalidInputError(
            f"a seed was given, and mode {mode!r} draws nothing; expected mode 'sample', or no seed"
        )
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0):
        raise InvalidInputError(
            f"seed is {seed!r:.60}; expected a whole number of 0 or more, or None for another each time"
        )


def check_settings(settings: object, temperature: object) -> None:
    """Raises InvalidInputError for what are no settings, and for a temperature beside them."""
    if settings is None:
        return
    if not isinstance(settings, BeliefSettings):
        raise InvalidInputError(
            f"settings are a {kind_of(settings)}; expected BeliefSettings, as load_belief_settings gives them, or None"
        )
    if type(temperature) is not float or temperature != 1:
        raise InvalidInputError(
            f"settings and a temperature, {temperature!r:.60}, were given; expected one or the other: settings have "
            "temperatures of their own"
        )


def check_num_tokens(name: str, shape: tuple[int, ...], model: ModelEntry) -> None:
    """Raises UnbuiltPrefixError where distributions [..., l, K] are of layers or tokens that do not decode."""
    count = shape[-2]
    if count in model.prefixes:
        return
    build = f", or build the bundle with `--prefixes {count}`" if model.token_grid and 1 <= count < model.depth else ""
    raise UnbuiltPrefixError(
        f"{name} have shape {list(shape)}, of l = {count} {model.depth_unit}; this bundle decodes "
        f"{model.prefixes_text}: pass the first so many that the policy gave, {name}[..., :l, :]{build}"
    )


def check_num_bits(shape: tuple[int, ...], model: ChunkModel) -> None:
    """Raises InvalidInputError unless bits [..., n] are those of whole tokens."""
    num_tokens, rest = divmod(shape[-1] + model.class_bits, model.token_bits)
    if rest or not 1 <= num_tokens <= model.num_tokens:
        least = model.token_bits - model.class_bits
        most = model.num_tokens * model.token_bits - model.class_bits
        raise InvalidInputError(
            f"bits have shape {list(shape)}; expected as many as l whole tokens have behind the class, "
            f"{least} and then {model.token_bits} more for each further token, {most} at most"
        )


def _num_classes(model: ModelEntry) -> int:
    return cast(ChunkModel, model).num_classes


def _ready(name: str, array: AnyArray) -> Float32Array:
    array = native(name, array, (_FLOAT32,))
    return np.require(array, requirements=["C", "A"])


def check_probabilities(name: str, array: Float32Array) -> None:
    """Raises InvalidInputError for the first of the distributions [..., K] that is none."""
    if not array.size:
        return
    with np.errstate(invalid="ignore", over="ignore"):
        sums = np.add.reduce(array, axis=-1)
        is_summed = np.abs(sums - 1) <= SUM_TOLERANCE
    # A NaN is the minimum of any array that holds one, and no comparison with it is true.
    if not np.minimum.reduce(array, axis=None) >= 0:
        refuse_first(name, array, array >= 0, "a probability, 0 to 1; or pass logits to decode_logits")
    if not is_summed.all():
        index = _place(is_summed)
        raise InvalidInputError(
            f"{name}{list(index)} sum to {sums[index]:.6g}; expected a distribution, whose sum is 1 within "
            f"{SUM_TOLERANCE:g}: pass what softmax gave, or logits to decode_logits"
        )


def _check_logits(name: str, array: Float32Array) -> None:
    if not array.size:
        return
    # A NaN is both, and compares with nothing. Of an array as a whole numpy finds them many times as fast as of rows.
    if array.min() > -np.inf and array.max() < np.inf:
        return
    largest = np.maximum.reduce(array, axis=-1)
    if np.isfinite(largest).all():
        # No NaN, no +inf, and one of each that is not -inf.
        return
    right = array < np.inf
    if not right.all():
        refuse_first(name, array, right, "a finite number, or -inf for what is forbidden")
    forbidden = largest > -np.inf
    if not forbidden.all():
        index = _place(forbidden)
        raise InvalidInputError(
            f"{name}{list(index)} are all -inf; expected one finite number at least: something has to be allowed"
        )


def _place(is_right: BoolArray) -> tuple[int, ...]:
    return unravel(is_right.argmin(), is_right.shape)
