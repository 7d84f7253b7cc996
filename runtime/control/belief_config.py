"""How a control loop takes what a policy believes: how it is decoded, how sure it has to be, and what is done else."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np

from ..bundle.belief_settings import BeliefSettings
from ..bundle.errors import InvalidInputError
from ..bundle.reading import coerce_fields
from .errors import ControlConfigError

_ABOVE_0 = float(np.finfo(np.float32).tiny)
_INF = float("inf")
#: What numbers may be, the least and the most of them, and how to say it.
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (1e-12, 1e12, "from 1e-12 to 1e+12"),
    "std_limit": (_ABOVE_0, _INF, "above 0, in the unit of the action, or inf for no limit"),
    "least_mode_probability": (0, 1, "from 0, for no limit, to 1"),
    "slow_factor": (_ABOVE_0, 1, "more than 0, at most 1"),
    "leave_factor": (_ABOVE_0, 1, "more than 0, at most 1"),
    "leave_ticks": (1, 1_000_000, "an integer from 1 to 1000000"),
}


class WhenUncertain(StrEnum):
    """What an action that is too uncertain does, beside the status UNCERTAIN.

    HOLD stands still. SLOW goes a part of the way from standing still to the action. ASK passes the action on, for the
    caller to decide.
    """

    HOLD = "hold"
    SLOW = "slow"
    ASK = "ask"


@dataclass(frozen=True)
class BeliefConfig:
    """Settings of a loop that takes logits and probabilities of tokens; a table `beliefs` of `ControlConfig`.

    mode: what is decoded (docs/beliefs.md, "Which mode"); samples are drawn outside a loop. temperature: what divides
    logits, one number, or one for each layer, token, or class and bit, which then come in this number alone. settings:
    what `load_belief_settings` gives, in place of temperature, for what they were fitted to; they make `std` honest.

    An action is uncertain if its `std` is above `std_limit` (in the unit of the action; one number, or one for each
    dimension; inf for none), or if the probability of its chunk's mode is below `least_mode_probability` (0 for none).
    when_uncertain: what is done then. slow_factor: of SLOW, which part of the way.

    Being uncertain ends where every `std` is at most `leave_factor` of its limit, and what the mode lacks of certainty,
    1 - its probability, at most `leave_factor` of what it may lack; on so many served ticks in a row, `leave_ticks`.
    So a belief that trembles about its limit does not change what the robot does on every tick.

    >>> BeliefConfig(std_limit=0.2, least_mode_probability=0.6, when_uncertain="slow").slow_factor
    0.5
    """

    mode: Literal["expected", "likeliest mode"] = "expected"
    temperature: float | tuple[float, ...] = 1.0
    settings: BeliefSettings | None = None
    std_limit: float | tuple[float, ...] = _INF
    least_mode_probability: float = 0.0
    when_uncertain: WhenUncertain = WhenUncertain.HOLD
    slow_factor: float = 0.5
    leave_factor: float = 0.8
    leave_ticks: int = 1

    def __post_init__(self) -> None:
        coerce_fields(self, ControlConfigError, plain)
        for name, (least, most, expected) in _RANGES.items():
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            if not numbers or not all(least <= number <= most for number in numbers):
                raise ControlConfigError(f"{name} is {value!r:.80}; expected {expected}")
        if self.settings is not None and self.temperature != 1:
            raise ControlConfigError("both temperature and settings are given; expected one, for settings have one")

    def check_dimensions(self, action_dim: int) -> None:
        """Raises ControlConfigError for limits or scales of another number of action dimensions."""
        if isinstance(self.std_limit, tuple) and len(self.std_limit) != action_dim:
            raise ControlConfigError(
                f"beliefs.std_limit has {len(self.std_limit)} values and action_low {action_dim}; expected one per "
                "action dimension in both: complete them"
            )
        if self.settings is not None:
            try:
                self.settings.scale(self.mode, action_dim)
            except InvalidInputError as error:
                raise ControlConfigError(f"beliefs.settings: {error}") from error


def plain(value: object) -> object:
    """Numbers and arrays of numpy as Python's own; everything else as it is."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    # No setting is a list of lists, and one that holds itself has no end.
    return [_number(entry) for entry in value] if isinstance(value, (list, tuple)) else _number(value)


def _number(value: object) -> Any:
    # What is wider than Python's own float stays numpy's in `item`.
    if isinstance(value, np.floating):
        return float(value)
    return value.item() if isinstance(value, np.generic) else value
