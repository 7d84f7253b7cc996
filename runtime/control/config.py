"""The settings of a control loop: one frozen dataclass, from Python or TOML, checked before the robot moves."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, Self, TypeVar, cast

import numpy as np

from ..bundle.advice import page
from ..bundle.belief_settings import load_belief_settings
from ..bundle.errors import InvalidInputError
from ..bundle.paths import as_path
from ..bundle.reading import coerce_fields, read_file
from .belief_config import BeliefConfig, plain
from .errors import ControlConfigError

#: In bytes; settings take a few KB.
_SIZE_LIMIT = 2**20
#: Sums and differences of a few such numbers still fit into float32.
_LARGEST = float(np.finfo(np.float32).max) / 4
_Kind = TypeVar("_Kind")
_ABOVE_0 = math.ulp(0.0)
#: What numbers may be, the least and the most of them, and how to say it.
_RANGES: tuple[tuple[tuple[str, ...], float, float, str], ...] = (
    (
        ("period_s", "stale_after_s", "retry_after_s", "record_interval_s", "log_interval_s"),
        *(1e-6, 1e6, "from 1e-06 to 1e+06 seconds"),
    ),
    (("deadline_us",), _ABOVE_0, 1e9, "above 0, at most 1e+09"),
    (("new_weight",), _ABOVE_0, 1, "more than 0, at most 1"),
    (("ensemble_decay",), 0, 10, "from 0 to 10"),
    (("range_tolerance",), 0, 1, "from 0 to 1, a part of high - low"),
    (("max_consecutive_faults", "record_ticks"), 0, 1_000_000, "an integer from 0 to 1000000"),
    (("ensemble_chunks",), 1, 256, "an integer from 1 to 256"),
)


class Status(IntEnum):
    """How a tick went. Whatever it is, the actions beside it are inside limits and slew."""

    OK = 0
    DEADLINE_MISS = 1
    BAD_TOKEN = 2
    NONFINITE = 3
    OUT_OF_RANGE = 4
    STALE = 5
    NOT_READY = 6
    BACKEND_FAULT = 7
    UNCERTAIN = 8

    # The name is written; IntEnum would write the number.
    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return format(int(self) if spec.endswith(("b", "d", "o", "x")) else self.name, spec)


class OnFault(StrEnum):
    """What a fault does: HOLD_LAST stands still until the next good chunk, STOP until `reset()`; RAISE raises."""

    HOLD_LAST = "hold_last"
    STOP = "stop"
    RAISE = "raise"


class ActionKind(StrEnum):
    """What a dimension means. DELTA: a motion per tick, 0 stands still; ABSOLUTE: a place, the last stands still."""

    DELTA = "delta"
    ABSOLUTE = "absolute"


class OutOfRange(StrEnum):
    """What becomes of a chunk further outside the limits than `range_tolerance`.

    REJECT refuses it. LIMIT brings it inside the limits, serves it, and says OUT_OF_RANGE when it arrives.
    """

    REJECT = "reject"
    LIMIT = "limit"


class Strategy(StrEnum):
    """What becomes of an older chunk when a newer one arrives."""

    LATEST_ONLY = "latest_only"
    WEIGHTED_AVERAGE = "weighted_average"
    TEMPORAL_ENSEMBLE = "temporal_ensemble"


def _lists_what_is_missing(kind: type[_Kind]) -> type[_Kind]:
    """A dataclass that raises ControlConfigError with all fields that are missing, in place of TypeError."""
    signature, begin = inspect.signature(kind), cast(Callable[..., None], kind.__init__)

    @functools.wraps(begin)
    def checked(self: _Kind, *values: object, **named: object) -> None:
        _require_all(kind, signature.bind_partial(*values, **named).arguments, kind.__name__)
        begin(self, *values, **named)

    kind.__init__ = checked  # type: ignore[assignment]
    return kind


@_lists_what_is_missing
@dataclass(frozen=True)
class ControlConfig:
    """Settings of one loop; A values where a value per dimension is meant, as a list, a tuple or a numpy array.

    action_low, action_high: what may leave, the robot's physical limits; equal for a dimension that is locked: it is
    held there, whatever is decoded. max_relative_step: by how much an action may differ from the one sent before; inf
    for no limit. range_tolerance: how far outside the limits an action may be decoded, as a part of high - low, one
    number or one per dimension: what is sent is the limit then, and no fault, for tokens are not exact. action_kind:
    per dimension; gripper: the dimensions whose last command is kept in a fault whatever their kind, and which are
    never averaged. stale_after_s: from observation on. max_consecutive_faults: ticks in a row without service until the
    decoder stands still until `reset()`; 0 for never. new_weight: of the newer chunk in `weighted_average`.
    ensemble_decay, ensemble_chunks: m of exp(-m i), i = 0 for the oldest, and over how many chunks. deadline_us: None
    for none. use_worker: decode in a thread, so that one that hangs can be left behind. record_ticks: length of the
    flight recorder, 0 for none; record_folder: where it is written after a fault. beliefs: how logits and probabilities
    of tokens are taken; None for a loop that takes tokens alone.

    >>> config = ControlConfig(
    ...     period_s=0.02,
    ...     action_low=(-0.05, 0.0),
    ...     action_high=(0.05, 0.08),
    ...     max_relative_step=(0.02, float("inf")),
    ...     action_kind=("delta", "absolute"),
    ...     gripper=(1,),
    ... )
    >>> config.on_fault, config.action_dim
    (<OnFault.HOLD_LAST: 'hold_last'>, 2)
    """

    period_s: float
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_relative_step: tuple[float, ...]
    action_kind: tuple[ActionKind, ...]
    gripper: tuple[int, ...] = ()
    stale_after_s: float = 0.5
    on_fault: OnFault = OnFault.HOLD_LAST
    out_of_range: OutOfRange = OutOfRange.REJECT
    # A model of twenty episodes decoded grippers that stood at their limits up to 3.6 % outside.
    range_tolerance: float | tuple[float, ...] = 0.05
    max_consecutive_faults: int = 50
    strategy: Strategy = Strategy.LATEST_ONLY
    new_weight: float = 0.7
    ensemble_decay: float = 0.01
    ensemble_chunks: int = 8
    deadline_us: float | None = None
    use_worker: bool = False
    retry_after_s: float = 1.0
    pause_gc: bool = True
    record_ticks: int = 512
    record_folder: str | None = None
    record_interval_s: float = 10.0
    log_interval_s: float = 1.0
    beliefs: BeliefConfig | None = None

    def __post_init__(self) -> None:
        coerce_fields(self, ControlConfigError, plain)
        self._check_numbers()
        self._check_dimensions()
        if self.record_folder is not None:
            as_path(self.record_folder, "record_folder", ControlConfigError)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file. Raises ControlConfigError if it is unreadable, has unknown keys or values that make no sense."""
        file = as_path(path, "the settings", ControlConfigError)
        try:
            values = tomllib.loads(read_file(file, _SIZE_LIMIT).decode("utf-8"))
        except FileNotFoundError:
            raise ControlConfigError(
                f"{file} does not exist; give a TOML file with the settings of the loop: see {page('control_loop')}"
            ) from None
        except OSError as error:
            raise ControlConfigError(
                f"{file} cannot be read: {error}; expected a TOML file: check what it is and its permissions"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ControlConfigError(f"{file} is no TOML: {error}; see {page('control_loop')}") from error
        beliefs = values.get("beliefs")
        if isinstance(beliefs, dict) and isinstance(settings := beliefs.get("settings"), str):
            try:
                # Beside this file, wherever the loop is started.
                values["beliefs"] = {**beliefs, "settings": load_belief_settings(file.parent / settings)}
            except InvalidInputError as error:
                raise ControlConfigError(f"{file}: beliefs.settings: {error}") from error
        return cls.from_values(values, str(file))

    @classmethod
    def from_values(cls, values: dict[str, Any], source: str = "the settings") -> Self:
        if not isinstance(values, dict):
            raise ControlConfigError(f"{source}: found {values!r:.60}; expected a dict of settings by their names")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(map(str, values.keys() - known)):
            raise ControlConfigError(
                f"{source}: unknown keys {', '.join(unknown)}; expected some of {', '.join(sorted(known))}: correct "
                "the spelling or take them out"
            )
        _require_all(cls, values.keys(), source)
        return cls(**values)

    def to_values(self) -> dict[str, Any]:
        """The settings as `from_values` takes them, in types of JSON."""
        values: dict[str, Any] = _as_json(self)
        return values

    @property
    def action_dim(self) -> int:
        return len(self.action_low)

    @property
    def locked(self) -> tuple[int, ...]:
        """The dimensions that are held at one value."""
        return tuple(index for index in range(self.action_dim) if self.action_low[index] == self.action_high[index])

    @property
    def tolerances(self) -> tuple[float, ...]:
        """`range_tolerance` of each dimension, in its unit."""
        shares = self.range_tolerance
        if not isinstance(shares, tuple):
            shares = (shares,) * self.action_dim
        return tuple(
            share * (high - low) for share, low, high in zip(shares, self.action_low, self.action_high, strict=True)
        )

    def _check_numbers(self) -> None:
        for names, least, most, expected in _RANGES:
            for name in names:
                value = getattr(self, name)
                for number in value if isinstance(value, tuple) else (value,):
                    if number is not None and not least <= number <= most:
                        raise ControlConfigError(f"{name} is {value!r}; expected {expected}: correct it")
        if self.use_worker and self.deadline_us is None:
            raise ControlConfigError(
                "use_worker is true without deadline_us; expected a deadline, for without one a decoder that hangs is "
                "waited for: set deadline_us"
            )

    def _check_dimensions(self) -> None:
        size = len(self.action_low)
        if not size:
            raise ControlConfigError("action_low is empty; expected one value per action dimension: set it")
        shares = self.range_tolerance
        per_dimension = ["range_tolerance"] if isinstance(shares, tuple) else []
        for name in ("action_high", "max_relative_step", "action_kind", *per_dimension):
            if len(getattr(self, name)) != size:
                raise ControlConfigError(
                    f"{name} has {len(getattr(self, name))} values and action_low {size}; expected one per action "
                    "dimension in both: complete them"
                )
        if self.beliefs is not None:
            self.beliefs.check_dimensions(size)
        are_dimensions = all(type(index) is int and 0 <= index < size for index in self.gripper)
        if not are_dimensions or len(set(self.gripper)) != len(self.gripper):
            raise ControlConfigError(
                f"gripper is {list(self.gripper)}; expected different dimensions from 0 to {size - 1}: correct it"
            )
        for index in range(size):
            self._check_dimension(index, self.action_low[index], self.action_high[index])
        locked = self.locked
        for name in ("action_low", "action_high"):
            # A locked value as it can be sent; other limits are rounded to the inside where they are used.
            limits = enumerate(getattr(self, name))
            object.__setattr__(
                self, name, tuple(float(np.float32(value)) if index in locked else value for index, value in limits)
            )

    def _check_dimension(self, index: int, low: float, high: float) -> None:
        if not (-_LARGEST <= low <= high <= _LARGEST):
            raise ControlConfigError(
                f"dimension {index} has the limits {low} to {high}; expected finite ones, the lower below the upper, "
                "or equal for a dimension that is locked: correct action_low and action_high"
            )
        if low < high and inside(low, np.inf) > inside(high, -np.inf):
            raise ControlConfigError(
                f"dimension {index} has the limits {low} to {high}, between which no float32 lies; expected equal ones "
                "for a dimension that is locked, or wider ones: correct action_low and action_high"
            )
        if self.action_kind[index] is ActionKind.DELTA and index not in self.gripper and not low <= 0 <= high:
            raise ControlConfigError(
                f"dimension {index} is a delta with the limits {low} to {high}; expected 0 among them, for a robot "
                "that may not stand still cannot be stopped: correct them, or its action_kind"
            )
        step, least = self.max_relative_step[index], slew_margin(low, high) * 4
        if low == high and step >= 0:
            # A locked dimension needs no room to move.
            return
        if not step > least:
            raise ControlConfigError(
                f"max_relative_step of dimension {index} is {step}; expected above {least:.2g}, four roundings of "
                "float32 at these limits, or inf for none: raise it"
            )


def slew_margin(low: float, high: float) -> float:
    """By how much float32 may round the difference of two actions inside these limits."""
    return max(abs(low), abs(high)) * 2.0**-22


def inside(value: float, towards: float) -> np.float32:
    """`value` as float32, rounded towards the inside of limits, which lies towards `towards`."""
    rounded = np.float32(value)
    is_outside = float(rounded) < value if towards > 0 else float(rounded) > value
    return np.nextafter(rounded, np.float32(towards)) if is_outside else rounded


def _require_all(kind: type[Any], given: Collection[str], source: str) -> None:
    needed = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in given]:
        raise ControlConfigError(f"{source}: {', '.join(missing)} missing; there is no safe default: set them")


def _as_json(value: object) -> Any:
    """Of a dataclass all that is not None, by name."""
    if dataclasses.is_dataclass(value):
        named = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _as_json(part) for name, part in named.items() if part is not None}
    if isinstance(value, Mapping):
        return {name: _as_json(part) for name, part in value.items()}
    return list(value) if isinstance(value, tuple) else value
