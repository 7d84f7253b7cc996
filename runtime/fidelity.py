"""How well decoded actions match those that went in, for each dimension in the robot's own units, and a verdict."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.contract import Float32Array, Float64Array

#: Share of a dimension's variance that decoding may lose before people are warned. At 1 % the RMS error is a tenth of
#: the standard deviation: as much as ten plain bins over an evenly filled range leave, 3.3 bits without any model.
POOR_SHARE = 0.01


@dataclass(frozen=True)
class Fidelity:
    """One number per action dimension, in the robot's units. rmse: root mean squared error; largest: |error|;
    deviation: standard deviation of the actions themselves, 0 where they do not move by more than float32 can tell."""

    steps: int
    rmse: tuple[float, ...]
    largest: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def lost(self) -> tuple[float | None, ...]:
        """Error variance over the variance of the actions; None for a dimension that does not move."""
        return tuple(
            (error / deviation) ** 2 if deviation else None
            for error, deviation in zip(self.rmse, self.deviation, strict=True)
        )

    @property
    def warning(self) -> str:
        """What a person should know, naming the worst dimensions; empty where nothing is poor."""
        poor = sorted(
            (
                (share, dimension)
                for dimension, share in enumerate(self.lost)
                if share is not None and share > POOR_SHARE
            ),
            reverse=True,
        )
        if not poor:
            return ""
        share, worst = poor[0]
        return (
            f"WARNING: decoded actions lose more than {POOR_SHARE:.0%} of the variance in {len(poor)} of "
            f"{len(self.rmse)} dimensions ({_listed([dimension for _, dimension in poor])}); worst is dimension "
            f"{worst}: {_percent(share)} of its variance, RMS error {self.rmse[worst]:.3g} where the actions deviate "
            f"by {self.deviation[worst]:.3g}. The model does not know these actions well enough: train it longer, or "
            "on actions like these (rfsq_ref/train.py)"
        )

    def text(self, title: str) -> str:
        """A table with a row per dimension, and the warning where there is one."""
        rows = [(title, "RMS error", "largest error", "deviation of the data", "share of the variance lost")]
        for dimension, (error, largest, deviation, share) in enumerate(
            zip(self.rmse, self.largest, self.deviation, self.lost, strict=True)
        ):
            rows.append(
                (
                    f"dimension {dimension}, robot units",
                    f"{error:.3g}",
                    f"{largest:.3g}",
                    f"{deviation:.3g}",
                    "does not move" if share is None else _percent(share),
                )
            )
        return "\n".join((*_aligned(rows), *filter(None, [self.warning])))

    @property
    def summary(self) -> str:
        """The worst dimensions in a line."""
        shares = [0.0 if share is None else share for share in self.lost]
        lost, error, largest = (int(np.argmax(values)) for values in (shares, self.rmse, self.largest))
        return (
            f"in robot units: RMS error at most {self.rmse[error]:.3g} (dimension {error}), largest error "
            f"{self.largest[largest]:.3g} (dimension {largest}); at most {_percent(shares[lost])} of a dimension's "
            f"variance is lost (dimension {lost})"
        )


class FidelitySums:
    """Adds up steps in batches."""

    def __init__(self, action_dim: int) -> None:
        self._steps = 0
        self._squares, self._largest = np.zeros(action_dim), np.zeros(action_dim)
        self._sums, self._sums_of_squares, self._size = np.zeros((3, action_dim))
        self._shift: Float64Array | None = None

    def add(self, actions: Float32Array | Float64Array, decoded: Float32Array | Float64Array) -> None:
        """Both [N, A] in the robot's units, N at least 1."""
        exact = actions.astype(np.float64)
        errors = np.abs(decoded.astype(np.float64) - exact)
        # Sums of squares of what lies far from zero would cancel.
        self._shift = exact[0] if self._shift is None else self._shift
        moved = exact - self._shift
        self._steps += len(exact)
        self._squares += np.square(errors).sum(axis=0)
        self._largest = np.maximum(self._largest, errors.max(axis=0))
        self._sums += moved.sum(axis=0)
        self._sums_of_squares += np.square(moved).sum(axis=0)
        self._size = np.maximum(self._size, np.abs(exact).max(axis=0))

    def result(self) -> Fidelity:
        """Of at least one step."""
        mean = self._sums / self._steps
        deviation = np.sqrt(np.maximum(self._sums_of_squares / self._steps - np.square(mean), 0))
        moves = deviation > np.finfo(np.float32).eps * self._size
        columns = (np.sqrt(self._squares / self._steps), self._largest, np.where(moves, deviation, 0.0))
        return Fidelity(self._steps, *(tuple(map(float, column)) for column in columns))


def fidelity(actions: Float32Array | Float64Array, decoded: Float32Array | Float64Array) -> Fidelity:
    """Of actions [N, A], N at least 1, and what they are decoded to, in the robot's units."""
    sums = FidelitySums(actions.shape[-1])
    sums.add(actions, decoded)
    return sums.result()


def _percent(share: float) -> str:
    """Where hardly anything moves, what is lost may be any multiple of it: a few digits say that too."""
    return f"{share:.3%}" if share < 10 else f"{100 * share:.3g}%"


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        yield "  ".join(
            (first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)))
        )


def _listed(dimensions: Sequence[int], most: int = 6) -> str:
    shown = ", ".join(map(str, dimensions[:most]))
    return shown + (f" and {len(dimensions) - most} more" if len(dimensions) > most else "")
