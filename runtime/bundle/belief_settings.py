"""What makes beliefs honest: temperatures of logits and scales of `std`, as `rfsq calibrate --beliefs` fits them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .advice import quoted
from .arrays import AnyArray
from .beliefs import Belief, BeliefMode
from .errors import InvalidInputError
from .paths import as_path
from .reading import build, read_json

_FORMAT = "rfsq-belief-settings"
#: Far above one number for each bit of the longest chunk.
_MOST_BYTES = 2**20


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
        for name, numbers in (("temperature", self.temperature), *self.std_scale.items()):
            if not numbers or not all(math.isfinite(number) and number > 0 for number in numbers):
                raise InvalidInputError(f"{name} is {list(numbers)!r:.80}; expected positive, finite numbers")

    def scaled(self, belief: Belief[AnyArray], mode: BeliefMode) -> Belief[AnyArray]:
        """The belief with an honest `std`. mode: as it was decoded. Raises InvalidInputError for a mode without scales,
        and for another number of action dimensions."""
        scale = self.std_scale.get(mode)
        if scale is None or len(scale) != belief.std.shape[-1]:
            found = "none" if scale is None else f"{len(scale)} of them"
            raise InvalidInputError(
                f"scales of std for {mode!r}: {found}; expected {belief.std.shape[-1]}, one for each action dimension: "
                f"calibrate this mode for this tokenizer with {quoted('calibrate', '--beliefs')}"
            )
        return dataclasses.replace(belief, std=belief.std * np.asarray(scale, belief.std.dtype))

    def text(self) -> str:
        """As a file has it."""
        content = {"format": _FORMAT, "temperature": self.temperature, "std_scale": dict(self.std_scale)}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"


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
