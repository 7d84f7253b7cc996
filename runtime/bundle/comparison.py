"""Compares answers with the reference's, telling float32 near-ties from wrong tokens (docs/architecture.md)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .arrays import BoolArray, Float64Array, FloatArray, Int64Array, IntegerArray, unravel


@dataclass(frozen=True)
class WrongToken:
    """index: position in [..., D, L]; margin and bound in bin widths."""

    index: tuple[int, ...]
    expected: int
    found: int
    margin: float
    bound: float

    def __str__(self) -> str:
        return (
            f"token {list(self.index)} is {self.found}, expected {self.expected}: margin {self.margin:.2e} bins, "
            f"float32 explains {self.bound:.2e}"
        )


@dataclass(frozen=True, eq=False)
class TokenComparison:
    """How tokens [..., D, L] differ from the reference's. Sums with `+`, along the first axis.

    wrong: differs without a near-tie to explain it; near_ties: rounding can carry the value into the found bin;
    behind: differs behind an earlier difference, to be judged by the decoded action alone. Each int64 [L]. flipped:
    bool [...], the steps with a near-tie flip. first_wrong: the first wrong token in memory order.
    """

    wrong: Int64Array
    near_ties: Int64Array
    behind: Int64Array
    flipped: BoolArray
    first_wrong: WrongToken | None

    @property
    def num_steps(self) -> int:
        return self.flipped.size

    @property
    def num_wrong(self) -> int:
        return int(self.wrong.sum())

    @property
    def num_near_ties(self) -> int:
        return int(self.near_ties.sum())

    def __add__(self, other: TokenComparison) -> TokenComparison:
        first_wrong = self.first_wrong
        if first_wrong is None and other.first_wrong is not None:
            head, *tail = other.first_wrong.index
            first_wrong = replace(other.first_wrong, index=(head + len(self.flipped), *tail))
        return TokenComparison(
            wrong=self.wrong + other.wrong,
            near_ties=self.near_ties + other.near_ties,
            behind=self.behind + other.behind,
            flipped=np.concatenate((self.flipped, other.flipped)),
            first_wrong=first_wrong,
        )


def compare_tokens(
    expected: IntegerArray,
    found: IntegerArray,
    margins: FloatArray,
    bounds: FloatArray,
    *,
    num_levels: int,
    is_step_coupled: bool | None,
) -> TokenComparison:
    """Sort every difference into wrong, near-tie and behind; all arrays [..., D, L] with at least one leading axis.

    margins: the reference's distance to the nearest bin edge; bounds: how far float32 can move the value; both in bin
    widths. is_step_coupled: whether a flip moves the later layers of all latents of its step, not of its own alone;
    None where `expected` is what the reference decides after the found tokens of the layers before: then no difference
    is behind another. What is no level at all is wrong wherever it stands. Raises ValueError when the shapes differ.
    """
    shapes = {array.shape for array in (expected, found, margins, bounds)}
    if len(shapes) != 1 or expected.ndim < 3:
        raise ValueError(f"tokens, margins and bounds have shapes {sorted(shapes)}; expected one shape [..., D, L]")
    differs = expected != found
    is_level = (found >= 0) & (found < num_levels)
    behind = np.zeros_like(differs)
    if is_step_coupled is not None:
        cause = differs.any(axis=-2, keepdims=True) if is_step_coupled else differs
        behind[..., 1:] = np.logical_or.accumulate(cause, axis=-1)[..., :-1]
        behind &= differs & is_level
    # A level farther off than the neighbour takes a move over whole bins besides. Written so that a margin or bound
    # that is not a number excuses nothing.
    bins_between = np.abs(found.astype(np.int64) - expected) - 1
    near_ties = differs & ~behind & is_level & (margins + bins_between <= bounds)
    return sorted_out(expected, found, (margins, bounds), (differs & ~behind & ~near_ties, near_ties, behind))


def compare_chunk_tokens(
    expected: IntegerArray, found: IntegerArray, margins: FloatArray, bounds: FloatArray, *, vocabulary: int
) -> TokenComparison:
    """The same of chunk tokens [N, L], where one flip may change all that follows: that is behind it, and judged by
    the decoded action alone. flipped is [N, 1]. Raises ValueError when the shapes differ."""
    shapes = {array.shape for array in (expected, found, margins, bounds)}
    if len(shapes) != 1 or expected.ndim != 2:
        raise ValueError(f"tokens, margins and bounds have shapes {sorted(shapes)}; expected one shape [N, L]")
    differs, is_word = expected != found, (found >= 0) & (found < vocabulary)
    behind = np.zeros_like(differs)
    behind[:, 1:] = np.logical_or.accumulate(differs, axis=1)[:, :-1]
    behind &= differs & is_word
    # Written so that a margin or bound that is not a number excuses nothing.
    near_ties = differs & ~behind & is_word & (margins <= bounds)
    return sorted_out(expected, found, (margins, bounds), (differs & ~behind & ~near_ties, near_ties, behind))


def sorted_out(
    expected: IntegerArray,
    found: IntegerArray,
    edges: tuple[FloatArray, FloatArray],
    masks: tuple[BoolArray, BoolArray, BoolArray],
) -> TokenComparison:
    """The comparison of tokens [N, ..., L] whose differences are sorted. edges: margins and bounds; masks: which are
    wrong, near-ties, and behind a difference; all of one shape."""
    (margins, bounds), (wrong, near_ties, _) = edges, masks
    first_wrong = None
    if wrong.any():
        index = unravel(wrong.argmax(), wrong.shape)
        first_wrong = WrongToken(
            index, int(expected[index]), int(found[index]), float(margins[index]), float(bounds[index])
        )
    wrong_counts, tie_counts, behind_counts = (mask.reshape(-1, mask.shape[-1]).sum(axis=0) for mask in masks)
    # Of each step; of a chunk code, of each chunk.
    flipped = np.asarray(near_ties.any(axis=(-2, -1)) if near_ties.ndim > 2 else near_ties.any(axis=-1, keepdims=True))
    return TokenComparison(wrong_counts, tie_counts, behind_counts, flipped, first_wrong)


@dataclass(frozen=True)
class ActionError:
    """The largest |difference| beyond what `found` had to be rounded by, in normalised units, infinite for NaN; where,
    and what stood there in physical units."""

    value: float
    index: tuple[int, ...]
    expected: float
    found: float

    def __str__(self) -> str:
        if not self.index:
            return "nothing compared"
        return f"action {list(self.index)} is {self.found:.9g}, expected {self.expected:.9g}"


def action_errors(
    expected: FloatArray,
    found: FloatArray,
    units: npt.ArrayLike,
) -> ActionError:
    """The worst of actions [..., A] in physical units; units [A]: physical units per normalised unit.

    found: in the type in which they were decoded, float32 for every backend.

    What is judged is the number that was computed, as far as its float32 can tell: the one nearest to `expected` of all
    that round to `found`. A joint that rests a thousand units from zero has float32 positions 6e-5 of a unit apart; the
    last rounding to one of them, up to half of that, is not an error of who decodes. An error before that rounding is
    seen whole: among many actions some lie where it carries them across to the next float32.

    Raises ValueError when the shapes differ.
    """
    if expected.shape != found.shape:
        raise ValueError(f"actions have shapes {expected.shape} and {found.shape}; expected the same")
    if expected.size == 0:
        return ActionError(0.0, (), 0.0, 0.0)
    # Infinities subtract to NaN, which counts as infinite below.
    with np.errstate(invalid="ignore"):
        differences = np.abs(found.astype(np.float64) - expected)
        errors = np.maximum(differences - _half_step(found, expected), 0) / np.asarray(units, np.float64)
    errors[np.isnan(errors)] = np.inf
    index = unravel(errors.argmax(), errors.shape)
    return ActionError(float(errors[index]), index, float(expected[index]), float(found[index]))


def _half_step(found: FloatArray, expected: FloatArray) -> Float64Array:
    """How far the numbers that round to `found` reach towards `expected`; same shape. 0 beside infinity."""
    towards = np.where(expected > found, np.inf, -np.inf).astype(found.dtype)
    with np.errstate(over="ignore"):
        neighbours = np.nextafter(found, towards).astype(np.float64)
    steps = np.abs(neighbours - found)
    return np.asarray(np.where(np.isfinite(steps), steps / 2, 0.0))


def std_error(expected: FloatArray, found: FloatArray, units: npt.ArrayLike) -> float:
    """The largest |difference| of standard deviations [N, T, A], as a share of the expected one, or of a hundredth of
    the largest of its chunk where that is more; infinite for NaN.

    units [A]: physical units per normalised unit, in which the largest is found.
    """
    right, wrong = (np.asarray(part, np.float64) / np.asarray(units, np.float64) for part in (expected, found))
    scale = np.maximum(right, right.max(axis=(1, 2), keepdims=True) / 100)
    with np.errstate(invalid="ignore"):
        differences = np.abs(wrong - right)
    shares = np.divide(differences, scale, out=np.where(differences == 0, 0.0, np.inf), where=scale > 0)
    shares[np.isnan(shares)] = np.inf
    return float(shares.max(initial=0.0))
