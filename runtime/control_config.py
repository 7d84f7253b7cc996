"""How a control loop is guarded: one frozen dataclass, from Python or TOML, checked before the robot moves."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, Self

import numpy as np

from runtime.control_errors import ControlConfigError
from runtime.paths import as_path
from runtime.reading import read_file

#: Settings take a few KB.
_SIZE_LIMIT = 2**20
#: Sums and differences of a few such numbers are float32 still.
_LARGEST = float(np.finfo(np.float32).max) / 4


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

    # Words where one is written; IntEnum would write the number.
    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return format(int(self) if spec.endswith(("b", "d", "o", "x")) else self.name, spec)


class OnFault(StrEnum):
    """HOLD_LAST stands still and goes on with the next good chunk; STOP stands still until `reset()`."""

    HOLD_LAST = "hold_last"
    STOP = "stop"
    RAISE = "raise"


class ActionKind(StrEnum):
    """DELTA: a motion per tick, standing still is 0. ABSOLUTE: a place, standing still is the last one."""

    DELTA = "delta"
    ABSOLUTE = "absolute"


class OutOfRange(StrEnum):
    """REJECT refuses the chunk. LIMIT serves it, brought inside the limits, and says OUT_OF_RANGE at its arrival."""

    REJECT = "reject"
    LIMIT = "limit"


class Strategy(StrEnum):
    """What becomes of an older chunk when a newer one arrives."""

    LATEST_ONLY = "latest_only"
    WEIGHTED_AVERAGE = "weighted_average"
    TEMPORAL_ENSEMBLE = "temporal_ensemble"


@dataclass(frozen=True)
class ControlConfig:
    """Settings of one loop; A values where a value per dimension is meant.

    action_low, action_high: what may leave. max_relative_step: by how much an action may differ from the one sent
    before; inf for no limit. action_kind: per dimension; gripper: the dimensions whose last command is kept in a fault
    whatever their kind, and which are never averaged. stale_after_s: from observation on. max_consecutive_faults:
    ticks in a row without service until the decoder stands still until `reset()`; 0 for never. new_weight: of the newer
    chunk in `weighted_average`. ensemble_decay, ensemble_chunks: m of exp(-m i), i = 0 for the oldest, and over how
    many chunks. deadline_us: None for none. use_worker: decode in a thread, so that one that hangs can be left behind.
    record_ticks: length of the flight recorder, 0 for none; record_folder: where it is written after a fault.
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

    def __post_init__(self) -> None:
        self._coerce()
        self._check_numbers()
        self._check_dimensions()

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Self:
        """Raises ControlConfigError for a file that cannot be read, unknown keys and values that make no sense."""
        file = as_path(path, "the settings", ControlConfigError)
        try:
            values = tomllib.loads(read_file(file, _SIZE_LIMIT).decode("utf-8"))
        except FileNotFoundError:
            raise ControlConfigError(
                f"{file} does not exist; give a TOML file with the settings of the loop: see docs/control_loop.md"
            ) from None
        except OSError as error:
            raise ControlConfigError(
                f"{file} cannot be read: {error}; expected a TOML file: check what it is and its permissions"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ControlConfigError(f"{file} is no TOML: {error}; see docs/control_loop.md") from error
        return cls.from_values(values, str(file))

    @classmethod
    def from_values(cls, values: dict[str, Any], source: str = "the settings") -> Self:
        fields = dataclasses.fields(cls)
        known = {field.name for field in fields}
        if unknown := sorted(values.keys() - known):
            raise ControlConfigError(
                f"{source}: unknown keys {', '.join(unknown)}; expected some of {', '.join(sorted(known))}: correct "
                "the spelling or take them out"
            )
        needed = {field.name for field in fields if field.default is dataclasses.MISSING}
        if missing := sorted(needed - values.keys()):
            raise ControlConfigError(f"{source}: {', '.join(missing)} missing; there is no safe default: set them")
        return cls(**values)

    def to_values(self) -> dict[str, Any]:
        """As `from_values` takes them, JSON's types alone."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
            if value is not None
        }

    @property
    def action_dim(self) -> int:
        return len(self.action_low)

    def _coerce(self) -> None:
        for name in ("action_low", "action_high", "max_relative_step"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        kinds = _sequence("action_kind", self.action_kind)
        object.__setattr__(self, "action_kind", tuple(_member("action_kind", ActionKind, kind) for kind in kinds))
        object.__setattr__(self, "gripper", _sequence("gripper", self.gripper))
        for name, kind in (("on_fault", OnFault), ("out_of_range", OutOfRange), ("strategy", Strategy)):
            object.__setattr__(self, name, _member(name, kind, getattr(self, name)))

    def _check_numbers(self) -> None:
        for name in ("period_s", "stale_after_s", "retry_after_s", "record_interval_s", "log_interval_s"):
            _require(name, getattr(self, name), "from 1e-06 to 1e+06 seconds", lambda value: 1e-6 <= value <= 1e6)
        if self.deadline_us is not None:
            _require("deadline_us", self.deadline_us, "above 0, at most 1e+09", lambda value: 0 < value <= 1e9)
        _require("new_weight", self.new_weight, "more than 0, at most 1", lambda value: 0 < value <= 1)
        _require("ensemble_decay", self.ensemble_decay, "from 0 to 10", lambda value: 0 <= value <= 10)
        for name, least, most in (
            ("max_consecutive_faults", 0, 1_000_000),
            ("record_ticks", 0, 1_000_000),
            ("ensemble_chunks", 1, 256),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ControlConfigError(f"{name} is {value!r}; expected an integer from {least} to {most}: correct it")
        for name in ("use_worker", "pause_gc"):
            if type(getattr(self, name)) is not bool:
                raise ControlConfigError(f"{name} is {getattr(self, name)!r}; expected true or false: correct it")
        if self.record_folder is not None and not isinstance(self.record_folder, str):
            raise ControlConfigError(f"record_folder is {self.record_folder!r}; expected a path as text: correct it")
        if self.use_worker and self.deadline_us is None:
            raise ControlConfigError(
                "use_worker is true without deadline_us; expected a deadline, for without one a decoder that hangs is "
                "waited for: set deadline_us"
            )

    def _check_dimensions(self) -> None:
        size = len(self.action_low)
        if not size:
            raise ControlConfigError("action_low is empty; expected one value per action dimension: set it")
        for name in ("action_high", "max_relative_step", "action_kind"):
            if len(getattr(self, name)) != size:
                raise ControlConfigError(
                    f"{name} has {len(getattr(self, name))} values and action_low {size}; expected one per action "
                    "dimension in both: complete them"
                )
        are_dimensions = all(type(index) is int and 0 <= index < size for index in self.gripper)
        if not are_dimensions or len(set(self.gripper)) != len(self.gripper):
            raise ControlConfigError(
                f"gripper is {list(self.gripper)}; expected different dimensions from 0 to {size - 1}: correct it"
            )
        for index in range(size):
            self._check_dimension(index, self.action_low[index], self.action_high[index])

    def _check_dimension(self, index: int, low: float, high: float) -> None:
        if not (-_LARGEST <= low < high <= _LARGEST):
            raise ControlConfigError(
                f"dimension {index} has the limits {low} to {high}; expected finite ones, the lower below the upper: "
                "correct action_low and action_high"
            )
        if self.action_kind[index] is ActionKind.DELTA and index not in self.gripper and not low <= 0 <= high:
            raise ControlConfigError(
                f"dimension {index} is a delta with the limits {low} to {high}; expected 0 among them, for a robot "
                "that may not stand still cannot be stopped: correct them, or its action_kind"
            )
        step, least = self.max_relative_step[index], slew_margin(low, high) * 4
        if not step > least:
            raise ControlConfigError(
                f"max_relative_step of dimension {index} is {step}; expected above {least:.2g}, four roundings of "
                "float32 at these limits, or inf for none: raise it"
            )


def slew_margin(low: float, high: float) -> float:
    """What float32 may round by between two actions inside these limits."""
    return max(abs(low), abs(high)) * 2.0**-22


def _sequence(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ControlConfigError(f"{name} is {value!r}; expected a list, one entry per dimension: correct it")
    return tuple(value)


def _numbers(name: str, value: object) -> tuple[float, ...]:
    values = _sequence(name, value)
    for index, number in enumerate(values):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise ControlConfigError(f"{name}[{index}] is {number!r}; expected a number: correct it")
        if isinstance(number, int) and abs(number) > _LARGEST:
            raise ControlConfigError(f"{name}[{index}] is an integer beyond float32; expected a number of an action")
    return tuple(map(float, values))


def _member(name: str, kind: type[Any], value: object) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ControlConfigError(
            f"{name} is {value!r}; expected one of {', '.join([str(member) for member in kind])}: correct the spelling"
        ) from None


def _require(name: str, value: object, expected: str, is_right: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_right(value):
        raise ControlConfigError(f"{name} is {value!r}; expected {expected}: correct it")
