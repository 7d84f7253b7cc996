"""Success rates and their differences on the same scenes, with intervals and a test, by closed formulas."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """successes of n, with the Wilson interval [low, high]."""

    successes: int
    n: int
    rate: float
    low: float
    high: float

    @classmethod
    def of(cls, successes: int, n: int) -> "Rate":
        return cls(successes, n, successes / n, *wilson(successes, n))

    def overlaps(self, other: "Rate") -> bool:
        return self.low <= other.high and other.low <= self.high

    def __str__(self) -> str:
        return f"{self.rate:.0%} ({self.low:.0%} … {self.high:.0%})"


@dataclass(frozen=True)
class Paired:
    """Success of one cell less that of another, on the same n scenes.

    gained, lost: scenes that only the one, and that only the other solved; difference, with its 95 % interval
    [low, high]; p_value: of the exact McNemar test.
    """

    n: int
    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p_value: float

    @classmethod
    def of(cls, one: Sequence[bool], other: Sequence[bool]) -> "Paired":
        """Of whether each scene was solved, in the same order. Raises ValueError for different or no scenes."""
        pairs = list(zip(one, other, strict=True))
        gained, lost = pairs.count((True, False)), pairs.count((False, True))
        interval = newcombe_paired(pairs.count((True, True)), gained, lost, pairs.count((False, False)))
        return cls(len(pairs), gained, lost, (gained - lost) / len(pairs), *interval, mcnemar(gained, lost))

    def __str__(self) -> str:
        p = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        return f"{_points(self.difference)} [{_points(self.low)}, {_points(self.high)}], {p}"


def _points(share: float) -> str:
    """Percentage points, with their sign and without a negative zero."""
    return f"{round(100 * share, 1) + 0.0:+.1f}".replace("-", "−")


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of a success rate: those p whose score test does not refuse `successes` of `n`.

    E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927), 209-212:
    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n). Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}; expected between 0 and n, and n above 0")
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact McNemar test: `gained` of gained + lost discordant pairs under Binomial(·, 1/2).

    Q. McNemar, Note on the Sampling Error of the Difference between Correlated Proportions or Percentages,
    Psychometrika 12 (1947), 153-157; 1 where no pair is discordant.
    """
    discordant = gained + lost
    return float(binomtest(gained, discordant).pvalue) if discordant else 1.0


def newcombe_paired(
    both: int, gained: int, lost: int, neither: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Interval of the paired difference (gained - lost) / n of two success rates, from counts of pairs.

    Method 10 of R. G. Newcombe, Improved Confidence Intervals for the Difference between Binomial Proportions Based on
    Paired Data, Statistics in Medicine 17 (1998), 2635-2650: the Wilson intervals of both rates, squared and added with
    their correlation phi, whose numerator, where positive, is made smaller by n/2 but not below 0; phi is 0 where all
    or none are solved. Raises ValueError where there are no pairs.
    """
    n = both + gained + lost + neither
    first, second = both + gained, both + lost
    low_1, high_1 = wilson(first, n, confidence)
    low_2, high_2 = wilson(second, n, confidence)
    p_1, p_2 = first / n, second / n
    covariance: float = both * neither - gained * lost
    if covariance > 0:
        covariance = max(0.0, covariance - n / 2)
    margins = first * (n - first) * second * (n - second)
    phi = covariance / math.sqrt(margins) if margins else 0.0

    def added(one: float, other: float) -> float:
        # Rounding may leave a negative nothing.
        return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))

    difference = (gained - lost) / n
    return difference - added(p_1 - low_1, high_2 - p_2), difference + added(high_1 - p_1, p_2 - low_2)
