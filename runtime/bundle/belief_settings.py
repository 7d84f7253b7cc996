"""What makes beliefs honest: temperatures of logits and scales of `std`, as `rfsq calibrate --beliefs` fits them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from .advice import quoted
from .arrays import Float32Array
from .beliefs import BELIEF_MODES, BeliefKind, BeliefMode
from .errors import FingerprintError, InvalidInputError
from .paths import as_path, shown
from .reading import build, read_json
from .validation import real_numbers

_FORMAT, _VERSION = "rfsq-belief-settings", 2
#: Far above one number for each bit of the longest chunk.
_MOST_BYTES = 2**20
#: Beyond these float32 has no digits left.
_LEAST, _LARGEST = 1e-12, 1e12


@dataclass(frozen=True)
class BeliefSettings:
    """What `decode_logits` and `decode_probabilities` take, fitted to one policy.

    kind: what they hold for; temperature: one for each layer, token, or class and bit; std_scale: for each action
    dimension [A], by mode, what `std` is multiplied by. Numbers are positive.

    >>> settings = BeliefSettings(BeliefKind("0" * 64, "tokens", 2, 1), (1.5, 2.0), {"expected": (0.5,)})
    >>> settings.std_scale["expected"]
    (0.5,)
    """

    kind: BeliefKind
    temperature: tuple[float, ...]
    std_scale: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        if not isinstance(self.std_scale, Mapping):
            raise InvalidInputError(f"std_scale is {self.std_scale!r:.80}; expected scales by mode")
        if unknown := [mode for mode in self.std_scale if mode not in BELIEF_MODES]:
            raise InvalidInputError(f"std_scale has {unknown!r:.80}; expected modes, of {', '.join(BELIEF_MODES)}")
        scales = {mode: _positive(f"std_scale of {mode!r}", scale) for mode, scale in self.std_scale.items()}
        # Their own: nobody changes them afterwards.
        object.__setattr__(self, "temperature", _positive("temperature", self.temperature))
        object.__setattr__(self, "std_scale", MappingProxyType(scales))

    def check(self, kind: BeliefKind) -> None:
        """Raises FingerprintError where these were fitted to another tokenizer, InvalidInputError where to another form
        or length."""
        again = f"fit them again with {_fit()}"
        if kind.fingerprint != self.kind.fingerprint:
            raise FingerprintError(
                f"the settings of beliefs are of the tokenizer {self.kind.fingerprint[:16]}, and this one is "
                f"{kind.fingerprint[:16]}: {again}, or load the bundle that they belong to"
            )
        if kind != self.kind:
            raise InvalidInputError(
                f"the settings of beliefs were fitted to {self.kind}; what is decoded is {kind}: {again}, or decode "
                "what they were fitted to"
            )

    def scale(self, mode: BeliefMode, action_dim: int) -> Float32Array:
        """What `std` is multiplied by, [A]. Raises InvalidInputError where there are none for this mode and robot."""
        found = self.std_scale.get(mode, ())
        if len(found) != action_dim:
            raise InvalidInputError(
                f"the settings of beliefs have {len(found)} scales of std for {mode!r}; expected {action_dim}, one for "
                f"each action dimension: fit them with {_fit()}, or pass temperature=settings.temperature, which "
                "leaves std as it is"
            )
        return np.array(found, np.float32)

    def __reduce__(self) -> tuple[Any, ...]:
        """What is read alone cannot be copied: a copy is made anew."""
        return type(self), (self.kind, self.temperature, dict(self.std_scale))

    def text(self) -> str:
        """As a file has it."""
        content = {
            **{"format": _FORMAT, "version": _VERSION, "kind": dataclasses.asdict(self.kind)},
            **{"temperature": self.temperature, "std_scale": dict(self.std_scale)},
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _fit() -> str:
    return quoted("calibrate", "--beliefs F --for-bundle BUNDLE")


def _check_kind(kind: object) -> None:
    """Raises InvalidInputError."""
    if not isinstance(kind, BeliefKind):
        raise InvalidInputError(f"kind is {kind!r:.80}; expected a BeliefKind")
    try:
        build(BeliefKind, dataclasses.asdict(kind), "kind")
        if not re.fullmatch("[0-9a-f]{64}", kind.fingerprint):
            raise ValueError(f"kind.fingerprint is {kind.fingerprint!r:.80}; expected 64 hexadecimal digits")
        if not 0 <= kind.coarse <= kind.length or kind.length < 1:
            raise ValueError(f"kind is {kind}; expected l of 1 or more, and no more layers of the mode than there are")
    except ValueError as error:
        raise InvalidInputError(str(error)) from error


def _positive(name: str, numbers: object) -> tuple[float, ...]:
    """Raises InvalidInputError."""
    expected = f"a list of one or more positive numbers from {_LEAST:g} to {_LARGEST:g}"
    found = real_numbers(name, numbers, expected)
    if found.ndim != 1 or not len(found) or not ((found >= _LEAST) & (found <= _LARGEST)).all():
        raise InvalidInputError(f"{name} is {numbers!r:.80}; expected {expected}")
    return tuple(map(float, found))


def load_belief_settings(path: str | os.PathLike[str]) -> BeliefSettings:
    """What `BeliefSettings.text` gave a file. Raises InvalidInputError."""
    found = as_path(path, "the settings of beliefs")
    try:
        content = read_json(found, _MOST_BYTES)
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise ValueError(f"it does not say format {_FORMAT!r}")
        if (version := content.pop("version", 1)) != _VERSION:
            raise ValueError(f"it has version {shown(version)}, expected {_VERSION}, which says what it was fitted to")
        return build(BeliefSettings, content, "it")
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{found} holds no settings of beliefs for this version: {error}; fit them with {_fit()}"
        ) from error
