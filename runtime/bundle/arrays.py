"""The arrays that everything here exchanges, places in them, and steps cut into chunks."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.floating[Any]]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntegerArray = npt.NDArray[np.integer[Any]]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


def unravel(position: int | np.intp, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of an element by its position in memory order, as Python's own numbers.

    >>> unravel(5, (2, 3))
    (1, 2)
    """
    return tuple(int(part) for part in np.unravel_index(position, shape))


def last_rounding(offset: npt.ArrayLike, units: npt.ArrayLike) -> Float64Array:
    """The most by which float32 rounds actions in offset ± units, [A] each: half a step at the farther end.

    >>> last_rounding([0.0, 1e6], [1.0, 1.0]).tolist()
    [5.960464477539063e-08, 0.03125]
    """
    farthest = np.abs(np.asarray(offset, np.float64)) + np.asarray(units, np.float64)
    return np.spacing(farthest.astype(np.float32)).astype(np.float64) / 2


class Codes(NamedTuple):
    """Tokens int32 [..., D, l], and float32 [..., l, 2], the stats beside them, where the bundle has any."""

    tokens: Int32Array
    stats: Float32Array | None

    def prefix(self, layers: int) -> Codes:
        """The first layers, C-contiguous."""
        stats = None if self.stats is None else np.ascontiguousarray(self.stats[..., :layers, :])
        return Codes(np.ascontiguousarray(self.tokens[..., :layers]), stats)


def in_chunks(steps: AnyArray, length: int) -> AnyArray:
    """[n, ...] as [ceil(n / length), length, ...]; the last chunk is filled up with the last step.

    Every step is coded on its own, so what fills a chunk changes nothing else, and is legal where the step is.

    >>> in_chunks(np.arange(3), 2).tolist()
    [[0, 1], [2, 2]]
    """
    filling = np.repeat(steps[-1:], -len(steps) % length, axis=0)
    # Without filling no copy is made.
    filled = np.concatenate((steps, filling)) if len(filling) else steps
    return filled.reshape(-1, length, *steps.shape[1:])
