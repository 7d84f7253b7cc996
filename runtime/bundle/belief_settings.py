"""What makes beliefs honest: temperatures of logits and scales of `std`, as `rfsq calibrate --beliefs` fits them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from .advice import quoted
from .arrays import AnyArray
from .beliefs import BELIEF_MODES, Belief, BeliefMode
from .errors import InvalidInputError
from .paths import as_path
from .reading import build, read_json

_FORMAT = "rfsq-belief-settings"
#: Far above one number for each bit of the longest chunk.
_MOST_BYTES = 2**20
#: Beyond these float32 has no digits left.
_LEAST, _LARGEST = 1e-12, 1e12


@dataclass(frozen=True)
class BeliefSettings:
    """temperature: what `decode_logits` takes, one for each layer, token, or class and bit; std_scale: for each action
    dimension [A], by mode, what `std` is multiplied by. All are positive.

    >>> settings = BeliefSettings((1.5, 2.0), {"expected": (0.5,)})
    >>> settings.std_scale["expected"]
    (0.5,)
    """

    temperature: tuple[float, ...]
    std_scale: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        if not isinstance(self.std_scale, Mapping):
            raise InvalidInputError(f"std_scale is {self.std_scale!r:.80}; expected scales by mode")
        if unknown := [mode for mode in self.std_scale if mode not in BELIEF_MODES]:
            raise InvalidInputError(f"std_scale has {unknown!r:.80}; expected modes, of {', '.join(BELIEF_MODES)}")
        scales = {mode: _positive(f"std_scale of {mode!r}", scale) for mode, scale in self.std_scale.items()}
        # Their own: nobody changes them afterwards.
        object.__setattr__(self, "temperature", _positive("temperature", self.temperature))
        object.__setattr__(self, "std_scale", MappingProxyType(scales))

    def scaled(self, belief: Belief[AnyArray], mode: BeliefMode) -> Belief[AnyArray]:
        """The belief with an honest `std`. mode: as it was decoded. Raises InvalidInputError for a mode without scales,
        and for another number of action dimensions."""
        if mode not in BELIEF_MODES:
            raise InvalidInputError(f"mode is {mode!r:.60}; expected one of {', '.join(BELIEF_MODES)}")
        scale = self.std_scale.get(mode)
        if scale is None or len(scale) != belief.std.shape[-1]:
            found = "none" if scale is None else f"{len(scale)} of them"
            raise InvalidInputError(
                f"scales of std for {mode!r}: {found}; expected {belief.std.shape[-1]}, one for each action dimension: "
                f"calibrate this mode for this tokenizer with {quoted('calibrate', '--beliefs')}"
            )
        return dataclasses.replace(belief, std=belief.std * np.asarray(scale, belief.std.dtype))

    def __reduce__(self) -> tuple[Any, ...]:
        """What is read alone cannot be copied: a copy is made anew."""
        return type(self), (self.temperature, dict(self.std_scale))

    def text(self) -> str:
        """As a file has it."""
        content = {"format": _FORMAT, "temperature": self.temperature, "std_scale": dict(self.std_scale)}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _positive(name: str, numbers: object) -> tuple[float, ...]:
    """Raises InvalidInputError."""
    try:
        found = np.array(numbers)
    except Exception as error:  # of whatever it is that was given
        raise InvalidInputError(f"{name} is a {type(numbers).__name__}: {error}; expected numbers") from error
    if found.dtype.kind not in "fiu" or found.ndim != 1 or not len(found):
        raise InvalidInputError(f"{name} is {numbers!r:.80}; expected a list of numbers, one or more")
    if not ((found >= _LEAST) & (found <= _LARGEST)).all():
        raise InvalidInputError(f"{name} is {numbers!r:.80}; expected positive numbers from {_LEAST:g} to {_LARGEST:g}")
    return tuple(map(float, found))


def load_belief_settings(path: str | os.PathLike[str]) -> BeliefSettings:
    """What `BeliefSettings.text` gave a file. Raises InvalidInputError."""
    found = as_path(path, "the settings of beliefs")
    try:
        content = read_json(found, _MOST_BYTES)
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise ValueError(f"it does not say format {_FORMAT!r}")
        return build(BeliefSettings, content, "it")
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{found} holds no settings of beliefs: {error}; write them with {quoted('calibrate', '--beliefs F')}"
        ) from error
