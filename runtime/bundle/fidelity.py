"""What tokens are worth: how well decoded actions match those that went in, by dimension, and a grade.

Every dimension is judged by the share of its variance that decoding loses, in the robot's own units. One that is at
rest has no variance to lose: it is held against the motion that three quarters of the others exceed, or its
normaliser's unit where that is smaller. So a locked joint may err by as much as the slower joints may, not by as much
as a gripper that counts to 100, and one other joint that hardly moves does not decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np

from .advice import command
from .arrays import Float32Array, Float64Array
from .paths import counted, shortlist

#: Share of a dimension's variance that decoding may lose before people are warned. At 1 % the RMS error is a tenth of
#: the standard deviation: as much as ten plain bins over an evenly filled range leave, 3.3 bits without any model.
POOR_SHARE = 0.01
#: What loses more than all of the variance does worse than always sending the mean. Of actions far outside of what the
#: model was trained for, half of it is enough: all of them decode to about the ends of its range, which of actions
#: around zero keeps the sign.
WORTHLESS_SHARE, OUTSIDE_SHARE = 1.0, 0.5
#: In units of the normaliser, which maps what the model was trained on to about -1 to 1.
FAR = 5.0
#: The same, beyond which chunk tokens decode to nothing; by as much as the last digits, rounding reaches farther.
CHUNK_RANGE = 1 + 1e-6


class Grade(StrEnum):
    """Of a dimension, and of a verdict, which has that of its worst dimension."""

    GOOD = "good"
    POOR = "poor"
    WORTHLESS = "worthless"


@dataclass(frozen=True)
class Fidelity:
    """One number per action dimension, in the robot's units. rmse: root mean squared error; largest: |error|;
    deviation: standard deviation of the actions themselves; low, high: their range; unit, offset: the normaliser's,
    physical = normalised * unit + offset."""

    steps: int
    rmse: tuple[float, ...]
    largest: tuple[float, ...]
    deviation: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    unit: tuple[float, ...]
    offset: tuple[float, ...]

    def is_possible(self, unit: Sequence[float], offset: Sequence[float]) -> bool:
        """Whether these can be the errors of a model with this normaliser."""
        sizes, ends = (self.rmse, self.largest, self.deviation), (self.low, self.high)
        return (
            (self.unit, self.offset) == (tuple(unit), tuple(offset))
            and all(len(column) == len(self.unit) for column in (*sizes, *ends))
            and all(value >= 0 for column in sizes for value in column)
            and all(low <= high for low, high in zip(*ends, strict=True))
            and self.steps > 0
        )

    @cached_property
    def at_rest(self) -> tuple[bool, ...]:
        """Whether a dimension moves by less than float32 can tell."""
        smallest = np.finfo(np.float32).eps * np.maximum(np.abs(self.low), np.abs(self.high))
        return tuple((self.deviation <= smallest).tolist())

    @cached_property
    def yardstick(self) -> tuple[float, ...]:
        """What the RMS error is held against: the deviation, or for a dimension at rest the lower quartile of those
        that move, or its unit where that is smaller."""
        moving = sorted(value for value, rests in zip(self.deviation, self.at_rest, strict=True) if not rests)
        slow = moving[len(moving) // 4] if moving else float("inf")
        rows = zip(self.deviation, self.unit, self.at_rest, strict=True)
        return tuple(min(slow, unit) if rests else deviation for deviation, unit, rests in rows)

    @cached_property
    def lost(self) -> tuple[float, ...]:
        """Mean squared error over the square of the yardstick: of a dimension that moves, the share of its variance."""
        return tuple((error / yardstick) ** 2 for error, yardstick in zip(self.rmse, self.yardstick, strict=True))

    @cached_property
    def grades(self) -> tuple[Grade, ...]:
        """Of each dimension. One at rest is worthless where it is off by more than its unit, half of all that the model
        was trained for."""
        return tuple(map(self._grade, range(len(self.rmse))))

    @property
    def grade(self) -> Grade:
        return max(self.grades, key=list(Grade).index)

    @cached_property
    def far_outside(self) -> tuple[int, ...]:
        """Dimensions whose actions go far beyond what the normaliser maps to about -1 to 1, the farthest first."""
        return _beyond(FAR, self.low, self.high, self.unit, self.offset)

    def clipping_in(self, mode: str, names: Sequence[str] = ()) -> str:
        """`clipping` where the tokens are of chunks, else empty; mode: of the tokens."""
        return clipping(self.low, self.high, self.unit, self.offset, names) if mode == "chunk" else ""

    def warning_in(self, mode: str) -> str:
        """What a person should know, naming the worst dimensions; empty where all are good. mode: of the tokens."""
        if self.grade is Grade.GOOD:
            return ""
        found = [dimension for dimension, grade in enumerate(self.grades) if grade is self.grade]
        found.sort(key=lambda dimension: -self.lost[dimension])
        size = f"{len(found)} of {len(self.rmse)} dimensions ({shortlist(found)})"
        most = f"worst is dimension {found[0]}: {self._judged(found[0])}"
        if self.grade is Grade.POOR:
            return (
                f"WARNING: the tokens are poor: decoded actions lose more than {POOR_SHARE:.0%} of the variance in "
                f"{size}; {most}. {self._advice(found[0], mode)}"
            )
        return (
            f"WARNING: the tokens are worthless: always sending the mean would do better, or about as well, in {size}; "
            f"{most}. {self._outside()}Check first that the actions are in the units that the model was trained in "
            "(radians or degrees, 0..1 or 0..100), that the dimensions are in its order, and that they come from its "
            f"robot. Only where all that is right, {_remedy(mode)}"
        )

    def table(self, title: str) -> str:
        """A row per dimension, and what the criterion is for those at rest."""
        # Here, since no robot prints a table.
        from .console import aligned

        heads = ("RMS error", "largest error", "deviation of the data", "share of the variance lost", "verdict")
        rows: list[tuple[str, ...]] = [(title, *heads)]
        for dimension, grade in enumerate(self.grades):
            numbers = (column[dimension] for column in (self.rmse, self.largest, self.deviation))
            share = _share(self.lost[dimension]) + (" *" if self.at_rest[dimension] else "")
            rows.append((f"dimension {dimension}, robot units", *(f"{value:.3g}" for value in numbers), share, grade))
        lines = list(aligned(rows))
        if any(self.at_rest):
            lines.append(
                "* at rest: the error is held against the deviation that three quarters of the others exceed, or the "
                "normaliser's unit where that is smaller"
            )
        return "\n".join(lines)

    def text(self, title: str, mode: str) -> str:
        """The table, and the warning where there is one. mode: of the tokens."""
        return "\n".join((self.table(title), *filter(None, [self.warning_in(mode)])))

    @property
    def line(self) -> str:
        """Grade and worst dimensions."""
        lost, error, largest = (int(np.argmax(values)) for values in (self.lost, self.rmse, self.largest))
        share = _share(self.lost[lost], "a dimension's variance")
        return (
            f"{self.grade}; in robot units: RMS error at most {self.rmse[error]:.3g} (dimension {error}), largest "
            f"error {self.largest[largest]:.3g} (dimension {largest}); at most {share} is lost (dimension {lost})"
        )

    def _advice(self, dimension: int, mode: str) -> str:
        """What helps where the tokens are poor in this dimension."""
        is_clipped = dimension in _beyond(CHUNK_RANGE, self.low, self.high, self.unit, self.offset)
        return wider() if is_clipped and mode == "chunk" else _way_out(mode)

    def _grade(self, dimension: int) -> Grade:
        share = self.lost[dimension]
        if self.at_rest[dimension]:
            is_worthless = self.rmse[dimension] > self.unit[dimension]
        else:
            is_worthless = share > (OUTSIDE_SHARE if dimension in self.far_outside else WORTHLESS_SHARE)
        return Grade.WORTHLESS if is_worthless else Grade.POOR if share > POOR_SHARE else Grade.GOOD

    def _judged(self, dimension: int) -> str:
        error, yardstick = f"RMS error {self.rmse[dimension]:.3g}", f"{self.yardstick[dimension]:.3g}"
        if self.at_rest[dimension]:
            return (
                f"{error} where the actions rest at {self.low[dimension]:.3g}, judged as if they moved by {yardstick}"
            )
        return f"{_share(self.lost[dimension], 'its variance')}, {error} where the actions deviate by {yardstick}"

    def _outside(self) -> str:
        outside = self.far_outside
        if not outside:
            return ""
        low, high = (f"{self.offset[outside[0]] + side * self.unit[outside[0]]:.3g}" for side in (-1, 1))
        return (
            f"The data lie far outside of what the model was trained for in dimensions {shortlist(outside)}: dimension "
            f"{outside[0]} runs from {self.low[outside[0]]:.3g} to {self.high[outside[0]]:.3g}, the model knows about "
            f"{low} to {high}. "
        )


class FidelitySums:
    """Adds up steps in batches."""

    def __init__(self, unit: Sequence[float], offset: Sequence[float]) -> None:
        """unit, offset: the normaliser's, one number for each of A; 1 and 0 without one."""
        self._unit, self._offset = tuple(map(float, unit)), tuple(map(float, offset))
        self._steps = 0
        self._squares, self._largest = np.zeros((2, len(self._unit)))
        self._sums, self._sums_of_squares = np.zeros((2, len(self._unit)))
        self._low, self._high = np.full((2, len(self._unit)), np.inf) * [[1], [-1]]
        self._shift: Float64Array | None = None

    def add(self, actions: Float32Array | Float64Array, decoded: Float32Array | Float64Array) -> None:
        """Both [N, A] in the robot's units, N at least 1."""
        exact = actions.astype(np.float64)
        errors = np.abs(decoded.astype(np.float64) - exact)
        # Far from zero, sums of squares would lose their digits.
        self._shift = exact[0] if self._shift is None else self._shift
        moved = exact - self._shift
        self._steps += len(exact)
        self._squares += np.square(errors).sum(axis=0)
        self._largest = np.maximum(self._largest, errors.max(axis=0))
        self._sums += moved.sum(axis=0)
        self._sums_of_squares += np.square(moved).sum(axis=0)
        self._low = np.minimum(self._low, exact.min(axis=0))
        self._high = np.maximum(self._high, exact.max(axis=0))

    def result(self) -> Fidelity:
        """Of at least one step."""
        mean = self._sums / self._steps
        deviation = np.sqrt(np.maximum(self._sums_of_squares / self._steps - np.square(mean), 0))
        measured = (np.sqrt(self._squares / self._steps), self._largest, deviation, self._low, self._high)
        columns = (*(tuple(map(float, column)) for column in measured), self._unit, self._offset)
        return Fidelity(self._steps, *columns)


def fidelity(
    actions: Float32Array | Float64Array,
    decoded: Float32Array | Float64Array,
    unit: Sequence[float],
    offset: Sequence[float],
) -> Fidelity:
    """Of actions [N, A], N at least 1, and what they are decoded to, in the robot's units; of a normaliser's A units
    and offsets."""
    sums = FidelitySums(unit, offset)
    sums.add(actions, decoded)
    return sums.result()


def clipping(
    low: Sequence[float],
    high: Sequence[float],
    unit: Sequence[float],
    offset: Sequence[float],
    names: Sequence[str] = (),
) -> str:
    """A warning about actions that chunk tokens clip, naming the dimension where most; empty where there are none.

    low, high: the range [A] of the actions; unit, offset: the normaliser's; names: of the dimensions, or none.
    """
    found = _beyond(CHUNK_RANGE, low, high, unit, offset)
    if not found:
        return ""
    worst = found[0]
    name = f" ({names[worst]})" if names else ""
    others = f"; others lie beyond in {counted(len(found) - 1, 'dimension')} more" if len(found) > 1 else ""
    return (
        "WARNING: actions lie beyond the range of the tokens, and decode as its ends, where no bound holds: dimension "
        f"{worst}{name} runs from {low[worst]:.4g} to {high[worst]:.4g}, the range from "
        f"{offset[worst] - unit[worst]:.4g} to {offset[worst] + unit[worst]:.4g}{others}. {wider()}"
    )


def _beyond(reach: float, *columns: Sequence[float]) -> tuple[int, ...]:
    """Dimensions whose actions go farther, in units of the normaliser, the farthest first. columns: low, high, unit,
    offset."""
    low, high, unit, offset = map(np.array, columns)
    found = np.maximum(offset - low, high - offset) / unit
    return tuple(place for place in np.argsort(-found).tolist() if found[place] > reach)


def wider() -> str:
    """What helps where chunk tokens do not reach as far as the actions."""
    return (
        "Fit them again to actions that reach as far, or to the limits of the robot "
        f"({command('calibrate', '--kind chunk --normaliser FILE')}); without a normaliser the range is -1 to 1"
    )


def _way_out(mode: str) -> str:
    """What helps against poor tokens."""
    if mode in ("none", "recovered"):
        return (
            f"The mode {mode!r} is the likely cause, and no longer training helps against that: build the checkpoint "
            f"calibrated ({command('build', '--conditioning calibrated')}), and train the policy on those tokens. Only "
            f"where they are poor too, {_remedy(mode)}"
        )
    return f"The model does not know these actions well enough: {_remedy(mode)}"


def _remedy(mode: str) -> str:
    if mode == "chunk":
        return (
            f"fit to more actions like these ({command('calibrate', '--kind chunk')}), or take more tokens if a chunk "
            "can use more"
        )
    return f"train it longer, or on actions like these ({command('train')})"


def _share(share: float, whole: str = "") -> str:
    """`2.000% of it`, `300 times it`; where hardly anything moves, any multiple, and a few digits say that too."""
    times = f"{share:,.0f}" if share < 1e6 else f"{share:.3g}"
    part, joint = (f"{share:.3%}", " of ") if share < 10 else (f"{times} times", " ")
    return part + (joint + whole if whole else "")
