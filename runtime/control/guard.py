"""What may be sent: finite, inside the limits, and near what was sent before.

numpy judges a whole chunk, with arrays that are made once. Python judges the few numbers of one action: its float64
holds them and their differences without rounding, and is faster than numpy's calls.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np

from ..bundle.arrays import Float32Array, Float64Array
from .config import ActionKind, ControlConfig, OutOfRange, Status, inside, slew_margin
from .errors import ControlConfigError

_FLOAT32 = np.float32
# Bound names and positional `out`: looking names up costs as much as the arithmetic on so few numbers.
_less_equal, _greater_equal = np.less_equal, np.greater_equal
# All have one value per dimension; `strict` would take longer than two of them.
_zip, _isnan = zip, math.isnan
_OK, _NONFINITE, _OUT_OF_RANGE = Status.OK, Status.NONFINITE, Status.OUT_OF_RANGE


class ActionGuard:
    """Chooses what may be sent next, compared to what was sent last. For one thread.

    `limit` and `hold` leave their choice in `values` and `actions`, and may be called again before it is sent; the
    caller says in `sent` what was. position: the command that the robot obeys before the first tick; needed if a
    dimension is absolute or a gripper.
    """

    #: Which value of the last chunk out of range was outside, in words.
    outside: str

    def __init__(self, config: ControlConfig, chunk_length: int, position: Sequence[float] | None = None) -> None:
        size = config.action_dim
        self._size = size
        self._low = np.array([inside(value, math.inf) for value in config.action_low], _FLOAT32)
        self._high = np.array([inside(value, -math.inf) for value in config.action_high], _FLOAT32)
        self._locked = list(config.locked)
        self._tolerances = config.tolerances
        lows, highs = self._tolerated(config)
        # A row for each step: numpy takes three times as long if it has to broadcast one.
        self._lows = np.tile(lows, (chunk_length, 1))
        self._highs = np.tile(highs, (chunk_length, 1))
        # Leaves room for the rounding to float32 when an action is written.
        margins = map(slew_margin, config.action_low, config.action_high)
        steps = [step - margin for step, margin in zip(config.max_relative_step, margins, strict=True)]
        for index in self._locked:
            steps[index] = math.inf
        backs = [-step for step in steps]
        self._bounds = list(zip(steps, backs, self._low.tolist(), self._high.tolist(), strict=True))
        self._keep = [
            kind is ActionKind.ABSOLUTE or index in config.gripper for index, kind in enumerate(config.action_kind)
        ]
        self._grippers = config.gripper
        self._needed = [index for index, kept in enumerate(self._keep) if kept]
        self._limits_chunks = config.out_of_range is OutOfRange.LIMIT
        # Results of comparisons, compared as bytes.
        self._below, self._above = bytearray(chunk_length * size), bytearray(chunk_length * size)
        self._is_below = np.frombuffer(self._below, np.bool_).reshape(chunk_length, size)
        self._is_above = np.frombuffer(self._above, np.bool_).reshape(chunk_length, size)
        self._all_inside = b"\1" * (chunk_length * size)
        # Numbers of Python become float32 four times as fast packed as assigned.
        self._rounded, self._float32s = np.zeros(size, _FLOAT32), struct.Struct(f"={size}f")
        self._bytes, self._pack = self._rounded.data.cast("B"), self._float32s.pack_into
        if position is None and self._needed:
            raise ControlConfigError(
                f"no position was given, and dimensions {self._needed} are absolute or grippers; expected the command "
                "that the robot obeys now, for standing still means to repeat it: pass position"
            )
        #: What was sent last, as Python's floats with values of float32.
        self.sent = [0.0] * size
        self.sent = self.start(position)
        #: The choice, as floats and as a float32 array, which is a new one each time.
        self.values, self.actions = self.sent, self._rounded.copy()

    def start(self, position: Sequence[float] | None = None) -> list[float]:
        """Where to begin, [A]: at `position`, the robot's present command, or at the last action sent.

        Deltas stay those sent last: a motion ends as fast as the slew limit allows. A place that is measured a little
        outside, by `range_tolerance` and no more than the slew limit, is the limit. Raises ControlConfigError for a
        position of another shape or further outside.
        """
        if position is None:
            return self.sent
        values = _as_numbers(position)
        if values.shape != (self._size,):
            raise ControlConfigError(
                f"position has shape {list(values.shape)}; expected [{self._size}], one value per action dimension"
            )
        values = np.where(self._keep, values, self.sent)
        # A limit as float32 may lie one rounding beside the limit itself.
        rounding = np.spacing(np.maximum(np.abs(self._low), np.abs(self._high)))
        for index in self._needed:
            step, _, low, high = self._bounds[index]
            room = max(float(rounding[index]), min(self._tolerances[index], step))
            if not low - room <= values[index] <= high + room:
                raise ControlConfigError(
                    f"position[{index}] is {values[index]}; expected {low} to {high}, the limits of this dimension, or "
                    f"up to {room:.3g} outside: bring the robot inside them first, or correct action_low and "
                    "action_high"
                )
        start: list[float] = np.clip(values.astype(_FLOAT32), self._low, self._high).tolist()
        return start

    def check_chunk(self, chunk: Float32Array) -> Status:
        """Judge a chunk, float32 [T, A]: OK, NONFINITE, or OUT_OF_RANGE, which `outside` explains.

        Values outside the limits but within the tolerance stay: `limit` brings each action to the limit. Values further
        out are brought inside here if `out_of_range` is `limit`. Locked dimensions get their one value.
        """
        _less_equal(chunk, self._highs, self._is_below)
        _greater_equal(chunk, self._lows, self._is_above)
        # A NaN compares false.
        if self._below == self._all_inside and self._above == self._all_inside:
            if self._locked:
                chunk[:, self._locked] = self._low[self._locked]
            return _OK
        if not np.isfinite(chunk).all():
            return _NONFINITE
        is_outside = ~(self._is_below & self._is_above)
        step, index = divmod(int(is_outside.argmax()), self._size)
        self.outside = (
            f"actions[{step}, {index}] is {chunk[step, index]}; expected {self._low[index]} to {self._high[index]}, "
            f"or up to {self._tolerances[index]:.3g} outside (range_tolerance)"
            f"{'; it was brought there' if self._limits_chunks else ''}: look at the policy, at action_low and "
            "action_high, or raise range_tolerance"
        )
        if self._limits_chunks:
            np.clip(chunk, self._low, self._high, out=chunk)
        return _OUT_OF_RANGE

    def limit(self, action: Float32Array) -> bool:
        """Choose the allowed action that is nearest to `action`, float32 [A]; True if that is another one.

        Raises ValueError for NaN, to which nothing is near.
        """
        values = action.tolist()
        for value, before, (step, back, low, high) in _zip(values, self.sent, self._bounds):
            if not (low <= value <= high and back <= value - before <= step):
                self._choose(self._nearest(values, self.sent))
                return True
        self.values, self.actions = values, action.copy()
        return False

    def slow(self, action: Float32Array, factor: float) -> bool:
        """Like `limit`, but go only `factor` of the way from standing still to `action`.

        A motion becomes `factor` of it; an absolute dimension goes `factor` of the way from its last command. Grippers
        keep theirs: half open is no way between open and closed, and what is closed once may be broken.
        """
        values = []
        for index, (value, before, kept) in enumerate(_zip(action.tolist(), self.sent, self._keep)):
            still = before if kept else 0.0
            values.append(before if index in self._grippers else still + factor * (value - still))
        allowed = self._nearest(values, self.sent)
        self._choose(allowed)
        return allowed != values

    def hold(self) -> None:
        """Choose to stand still: absolute dimensions and grippers stay, deltas go to 0 as fast as the slew allows."""
        self._choose(self._still_after(self.sent))

    def held_after(self, sent: list[float]) -> list[float]:
        """What `hold` would choose after `sent`, with values of float32; nothing is chosen."""
        return list(self._float32s.unpack(self._float32s.pack(*self._still_after(sent))))

    def _still_after(self, sent: list[float]) -> list[float]:
        return self._nearest([before if kept else 0.0 for before, kept in _zip(sent, self._keep)], sent)

    def _nearest(self, values: list[float], sent: list[float]) -> list[float]:
        """The action allowed after `sent` that is nearest to `values`."""
        allowed = []
        for value, before, (step, back, low, high) in _zip(values, sent, self._bounds):
            near = before + step if value > before + step else before + back if value < before + back else value
            # The last action is inside the limits, so cutting to them only shortens the step.
            allowed.append(low if near < low else high if near > high else near)
        if _isnan(sum(allowed)):
            raise ValueError(f"an action is {values}; expected numbers")
        return allowed

    def _tolerated(self, config: ControlConfig) -> tuple[Float32Array, Float32Array]:
        """Between which values nothing is a fault, float32 [A] each; in a locked dimension all that are finite."""
        widths = zip(config.action_low, config.action_high, config.tolerances, strict=True)
        bounds = [(inside(low - width, math.inf), inside(high + width, -math.inf)) for low, high, width in widths]
        lows, highs = (np.array(side, _FLOAT32) for side in zip(*bounds, strict=True))
        largest = np.finfo(_FLOAT32).max
        lows[self._locked], highs[self._locked] = -largest, largest
        return lows, highs

    def _choose(self, allowed: list[float]) -> None:
        self._pack(self._bytes, 0, *allowed)
        self.values, self.actions = self._rounded.tolist(), self._rounded.copy()


def _as_numbers(position: Sequence[float]) -> Float64Array:
    try:
        if isinstance(position, np.ma.MaskedArray):
            raise TypeError("what a mask hides is no value")
        return np.asarray(position, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ControlConfigError(
            f"position is no list of numbers: {error}; expected one value per action dimension"
        ) from error
