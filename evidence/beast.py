"""BEAST (Zhou et al. 2025, arXiv 2506.06072): a chunk as the coefficients of a B-spline for each dimension, which are
found by least squares and rounded to uniform levels.

Knots are uniform and clamped: the first and the last repeat, so that the spline ends where its outer coefficients are.
A dimension that steps (a gripper) gets a spline of degree 0, as the authors have it: here every dimension whose
training chunks it fits better. Coefficients in the order of time, those of one time together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.interpolate import BSpline

from rfsq.evidence.metrics import Array
from rfsq.evidence.schemes import BinRange, Codec, action_range
from rfsq.rfsq_ref.data import FloatArray

IntArray = npt.NDArray[np.int64]
DEGREE = 3
#: Of one coefficient.
_LEVELS = (2, 4096)


@cache
def spline_values(length: int, count: int, degree: int) -> Array:
    """The values [length, count] of so many B-splines of at most this degree, at the steps of a chunk."""
    degree = min(degree, count - 1)
    inner = np.linspace(0.0, 1.0, count - degree + 1)
    knots = np.concatenate((np.zeros(degree), inner, np.ones(degree)))
    # In the middle of each step, so that all splines of degree 0 have as many steps.
    places = (np.arange(length) + 0.5) / length if degree == 0 else np.linspace(0.0, 1.0, length)
    found: Array = BSpline.design_matrix(places, knots, degree).toarray()
    return found


@dataclass(frozen=True, eq=False)
class BeastCodec(Codec):
    """splines: float64 [A, T, n], the values of each dimension's splines; low, high: float64 [n, A], what the levels
    of each coefficient cover, clipped outside."""

    name: str
    series: str
    splines: Array
    low: Array
    high: Array
    levels: int
    family = "BEAST"
    partial = False

    @property
    def vocabulary(self) -> int:
        return self.levels

    def tokens(self, chunks: FloatArray) -> IntArray:
        """float32 [B, T, A] to tokens [B, n * A]."""
        span = np.where(self.high > self.low, self.high - self.low, 1.0)
        share = (coefficients(self.splines, chunks) - self.low) / span
        tokens: IntArray = np.clip(np.rint(share * (self.levels - 1)), 0, self.levels - 1).astype(np.int64)
        return tokens.reshape(len(chunks), -1)

    def decode(self, tokens: npt.ArrayLike, length: int) -> FloatArray:
        """tokens [B, n * A] to actions float32 [B, length, A]; length: of the chunks it was fitted to."""
        del length
        share = np.asarray(tokens).reshape(-1, *self.low.shape) / (self.levels - 1)
        found = self.low + share * (self.high - self.low)
        return (self.splines @ found.transpose(2, 1, 0)).transpose(2, 1, 0).astype(np.float32)

    def reconstruct(self, chunks: FloatArray) -> FloatArray:
        return self.decode(self.tokens(chunks), chunks.shape[1])

    def bits_per_step(self, chunks: FloatArray) -> float:
        """log2 of the levels for each coefficient."""
        steps: int = chunks.shape[1]
        return float(self.low.size * math.log2(self.levels) / steps)


def coefficients(splines: Array, chunks: FloatArray) -> Array:
    """Least-squares coefficients [B, n, A] of chunks [B, T, A]."""
    found: Array = (np.linalg.pinv(splines) @ chunks.astype(np.float64).transpose(2, 1, 0)).transpose(2, 1, 0)
    return found


def chosen_splines(chunks: FloatArray, count: int) -> Array:
    """[A, T, n]: of degree 3 for each dimension, or 0 where these fit better."""
    bases = [spline_values(chunks.shape[1], count, degree) for degree in (DEGREE, 0)]
    values = chunks.astype(np.float64).transpose(2, 1, 0)
    smooth, steps = (np.square(basis @ (np.linalg.pinv(basis) @ values) - values).sum(axis=(1, 2)) for basis in bases)
    return np.stack([bases[int(is_better)] for is_better in steps < smooth])


def _ranges(found: Array, kind: BinRange) -> tuple[Array, Array]:
    """Low and high [n, A] of coefficients [B, n, A]."""
    low, high = action_range(found.reshape(len(found), -1).astype(np.float32), kind)
    return low.reshape(found.shape[1:]), high.reshape(found.shape[1:])


def _codec(splines: Array, covered: tuple[Array, Array], levels: int, kind: BinRange) -> BeastCodec:
    length, count = splines.shape[1:]
    series = f"BEAST, {length} steps"
    name = f"{series}, {count} coefficients, {levels} levels, {kind.value}"
    return BeastCodec(name, series, splines, *covered, levels)


def beast_codecs(chunks: FloatArray, budgets: Sequence[float]) -> Iterator[BeastCodec]:
    """Every number of coefficients, with as many levels as each of these budgets allows, in bits of a step."""
    length, dimensions = chunks.shape[1:]
    for count in range(1, length + 1):
        splines = chosen_splines(chunks, count)
        found = coefficients(splines, chunks)
        covered = {kind: _ranges(found, kind) for kind in BinRange}
        most = {math.floor(2 ** (bits * length / (count * dimensions)) + 1e-9) for bits in budgets}
        for levels in sorted({min(number, _LEVELS[1]) for number in most if number >= _LEVELS[0]}):
            for kind in BinRange:
                yield _codec(splines, covered[kind], levels, kind)
