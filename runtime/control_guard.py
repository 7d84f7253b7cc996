"""What may leave: finite, inside the limits, and near what was sent before. In place, over arrays made once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from runtime.contract import Float32Array
from runtime.control_config import ActionKind, ControlConfig, OutOfRange, Status, slew_margin
from runtime.control_errors import ControlConfigError

_FLOAT32 = np.float32
# Bound names and positional `out`: looking up costs as much as the arithmetic on seven numbers. But for minimum and
# maximum, which numpy lets find out for a microsecond that a positional `out` is deprecated there.
_add, _subtract, _multiply = np.add, np.subtract, np.multiply
_less_equal, _greater_equal, _both = np.less_equal, np.greater_equal, np.logical_and
_minimum, _maximum, _copy = np.minimum, np.maximum, np.copyto


class ActionGuard:
    """Holds the last action sent, to which every next one is compared. For one thread.

    position: the command that the robot obeys before the first tick; needed where a dimension is absolute or a gripper.
    """

    def __init__(self, config: ControlConfig, chunk_length: int, position: Sequence[float] | None = None) -> None:
        size = config.action_dim
        self._size = size
        self._low = np.array([_inside(value, math.inf) for value in config.action_low], _FLOAT32)
        self._high = np.array([_inside(value, -math.inf) for value in config.action_high], _FLOAT32)
        margins = map(slew_margin, config.action_low, config.action_high)
        steps = [step - margin for step, margin in zip(config.max_relative_step, margins, strict=True)]
        self._step = np.array([_inside(step, -math.inf) for step in steps], _FLOAT32)
        keeps = [
            kind is ActionKind.ABSOLUTE or index in config.gripper for index, kind in enumerate(config.action_kind)
        ]
        self._needed = [index for index, kept in enumerate(keeps) if kept]
        self._keep = np.array(keeps, _FLOAT32)
        self._limits_chunks = config.out_of_range is OutOfRange.LIMIT
        self._below, self._above = np.empty(size, _FLOAT32), np.empty(size, _FLOAT32)
        self._still = np.empty(size, _FLOAT32)
        self._ones = np.ones(size, _FLOAT32)
        self._is_low_enough = np.empty((chunk_length, size), np.bool_)
        self._is_high_enough = np.empty((chunk_length, size), np.bool_)
        self._all_inside = b"\1" * (chunk_length * size)
        self.last = np.zeros(size, _FLOAT32)
        if position is None and self._needed:
            raise ControlConfigError(
                f"no position was given, and dimensions {self._needed} are absolute or grippers; expected the command "
                "that the robot obeys now, for standing still means to repeat it: pass position"
            )
        self.reset(position)

    def reset(self, position: Sequence[float] | None = None) -> None:
        """Begin from `position`, the robot's present command; None for the last one sent. Motions begin at 0."""
        values = self.last.astype(np.float64) if position is None else np.asarray(position, np.float64)
        if values.shape != (self._size,):
            raise ControlConfigError(
                f"position has shape {list(values.shape)}; expected [{self._size}], one value per action dimension"
            )
        values = np.where(self._keep > 0, values, 0.0)
        # float32 of a limit may lie beside it by a rounding.
        tolerance = np.spacing(np.maximum(np.abs(self._low), np.abs(self._high)))
        for index in self._needed:
            low, high = float(self._low[index]), float(self._high[index])
            if not low - tolerance[index] <= values[index] <= high + tolerance[index]:
                raise ControlConfigError(
                    f"position[{index}] is {values[index]}; expected {low} to {high}, the limits of this dimension: "
                    "bring the robot inside them first, or correct action_low and action_high"
                )
        _copy(self.last, np.clip(values.astype(_FLOAT32), self._low, self._high))

    def check_chunk(self, chunk: Float32Array) -> Status:
        """chunk [T, A]: OK, NONFINITE or OUT_OF_RANGE; the last is brought inside where the settings say so."""
        inside = self._is_low_enough
        _less_equal(chunk, self._high, inside)
        _greater_equal(chunk, self._low, self._is_high_enough)
        _both(inside, self._is_high_enough, inside)
        # A NaN compares false.
        if inside.tobytes() == self._all_inside:
            return Status.OK
        if not np.isfinite(chunk).all():
            return Status.NONFINITE
        if self._limits_chunks:
            _maximum(chunk, self._low, out=chunk)
            _minimum(chunk, self._high, out=chunk)
        return Status.OUT_OF_RANGE

    def first_outside(self, chunk: Float32Array) -> str:
        """Which value was refused, in words."""
        outside = ~((chunk <= self._high) & (chunk >= self._low))
        step, index = (int(part) for part in np.unravel_index(int(outside.argmax()), outside.shape))
        return (
            f"actions[{step}, {index}] is {chunk[step, index]}; expected {self._low[index]} to {self._high[index]}: "
            "look at the policy, or at action_low and action_high"
        )

    def limit(self, target: Float32Array, out: Float32Array) -> bool:
        """The allowed action nearest to `target` into `out`; False where that is not finite. `commit` what is sent."""
        last, step, below, above = self.last, self._step, self._below, self._above
        _subtract(last, step, below)
        _maximum(below, self._low, out=below)
        _add(last, step, above)
        _minimum(above, self._high, out=above)
        _maximum(target, below, out=out)
        _minimum(out, above, out=out)
        total = out.dot(self._ones)
        return bool(total == total)

    def commit(self, sent: Float32Array) -> None:
        """What was sent, to which the next action is compared."""
        _copy(self.last, sent)

    def hold(self, out: Float32Array) -> None:
        """Stand still, as far as the slew limit lets a motion end at once: what is kept stays, motions go to 0."""
        _multiply(self.last, self._keep, self._still)
        self.limit(self._still, out)


def _inside(value: float, towards: float) -> np.float32:
    """`value` as float32, rounded towards the inside."""
    rounded = np.float32(value)
    is_outside = float(rounded) < value if towards > 0 else float(rounded) > value
    return np.nextafter(rounded, np.float32(towards)) if is_outside else rounded
