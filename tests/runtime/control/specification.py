"""What a control loop has to do, in as few lines of plain Python and float64 as it takes; nothing here is fast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

Row = list[float]
#: By tick.
Line = dict[int, Row]


@dataclass(frozen=True)
class Belief:
    """std of every row, and the probability of the likeliest mode."""

    std: list[Row]
    probability: float


@dataclass(frozen=True)
class Chunk:
    """What arrives. rows: what the backend makes of it; None where it raises. is_legal: its form and its tokens.

    belief: None where it comes as tokens.
    """

    rows: list[Row] | None
    layers: int
    number: int | None = None
    observed: int | None = None
    is_legal: bool = True
    belief: Belief | None = None


@dataclass(frozen=True)
class Rules:
    """Per dimension low, high, step and whether standing still keeps its value; then the rest of the settings."""

    dimensions: tuple[tuple[float, float, float, bool], ...]
    grippers: tuple[int, ...]
    length: int
    period: int
    stale: int
    strategy: str
    new_weight: float
    decay: float
    ensemble: int
    stops: bool
    brings_inside: bool
    #: How far outside is no fault, as a part of high - low.
    tolerance: float
    most_faults: int
    #: Of std and of the mode's probability, which part of the limit ends being uncertain, and for how many ticks.
    std_limit: tuple[float, ...]
    least_probability: float
    leave_factor: float
    leave_ticks: int
    when_uncertain: str
    slow_factor: float


@dataclass(frozen=True)
class Newest:
    number: int
    observed: int
    layers: int
    start: int


class Specification:
    def __init__(self, rules: Rules, position: Row) -> None:
        self.rules, self.sent = rules, [0.0] * len(position)
        self.reset(position)

    def reset(self, position: Row | None) -> None:
        """None: the last action that was sent still holds; motions do whatever the position."""
        if position is not None:
            places = zip(position, self.sent, self.rules.dimensions, strict=True)
            self.sent = [place if keep else sent for place, sent, (*_, keep) in places]
        self.tick, self.before, self.faults = 0, None, 0
        self.latched: str | None = None
        self.newest: Newest | None = None
        self.lines: list[Line] = []
        self.observed: list[int] = []
        self.has_begun = False
        self.belief: Belief | None = None
        #: How many ticks in a row have to be sure.
        self.doubt = 0

    def step(self, now: int, chunk: Chunk | None) -> tuple[str, bool]:
        """Status, and whether the robot is told to stand still; the action is in `sent`."""
        status, wanted = self._judged(*self._decide(now, chunk))
        self.before: int | None = now
        still = [sent if keep else 0.0 for sent, (*_, keep) in zip(self.sent, self.rules.dimensions, strict=True)]
        self.sent = [
            min(max(value, low, sent - step), high, sent + step)
            for value, sent, (low, high, step, _) in zip(wanted or still, self.sent, self.rules.dimensions, strict=True)
        ]
        is_fault = wanted is None and status != "NOT_READY"
        self.faults = self.faults + 1 if is_fault else 0
        if is_fault and (self.rules.stops or 0 < self.rules.most_faults <= self.faults):
            self.latched = self.latched or status
        return status, wanted is None

    def _decide(self, now: int, chunk: Chunk | None) -> tuple[str, Row | None]:
        passed = Fraction(0 if self.before is None else now - self.before, self.rules.period)
        if self.latched is not None:
            self.tick += 1
            return self.latched, None
        self.tick += max(1, math.ceil(passed - Fraction(1, 2)))
        if passed < 0:
            self.newest, self.lines = None, []
            return "STALE", None
        if self.newest is not None and self.lines:
            due = self.newest.start + (now - self.newest.observed) // self.rules.period
            self.tick = max(self.tick, due)
        status = "OK" if chunk is None else self._receive(now, chunk)
        if status not in ("OK", "STALE", "LIMITED"):
            self.lines = []
            return status, None
        if self.newest is not None and self.lines and now - self.newest.observed > self.rules.stale:
            self.lines = []
            return "STALE", None
        row = self._served(now)
        if row is None and status == "OK":
            return ("STALE" if self.has_begun else "NOT_READY"), None
        return "OUT_OF_RANGE" if status == "LIMITED" else status, row

    def _judged(self, status: str, row: Row | None) -> tuple[str, Row | None]:
        """An action that is too uncertain stands still, is slowed, or goes on as it is."""
        rules = self.rules
        if row is None or self.belief is None or self.newest is None:
            return status, row
        shares = zip(self.belief.std[self.tick - self.newest.start], rules.std_limit, strict=True)
        lack = (1 - self.belief.probability) / (1 - rules.least_probability)
        worst = max(lack, *(std / limit for std, limit in shares))
        if worst > (rules.leave_factor if self.doubt else 1):
            self.doubt = rules.leave_ticks
        elif self.doubt:
            self.doubt -= 1
        if not self.doubt:
            return status, row
        if rules.when_uncertain == "hold":
            return "UNCERTAIN", None
        if rules.when_uncertain == "slow":
            row = [self._slowed(index, value) for index, value in enumerate(row)]
        return "UNCERTAIN", row

    def _slowed(self, index: int, value: float) -> float:
        *_, keeps = self.rules.dimensions[index]
        still = self.sent[index] if keeps else 0.0
        return still if index in self.rules.grippers else still + self.rules.slow_factor * (value - still)

    def _receive(self, now: int, chunk: Chunk) -> str:
        if not chunk.is_legal:
            return "BAD_TOKEN" if self._start_of(now, chunk) is not None or chunk.layers == 0 else "STALE"
        found = self._start_of(now, chunk)
        if found is None:
            return "STALE"
        newest, is_swap = found
        if chunk.rows is None:
            return "BACKEND_FAULT"
        if not all(math.isfinite(value) for row in chunk.rows for value in row):
            return "NONFINITE"
        limits = [(low, high) for low, high, *_ in self.rules.dimensions]
        inside = [[min(max(v, a), b) for v, (a, b) in zip(row, limits, strict=True)] for row in chunk.rows]
        is_far = any(
            not low - self.rules.tolerance * (high - low) <= value <= high + self.rules.tolerance * (high - low)
            for row in chunk.rows
            for value, (low, high) in zip(row, limits, strict=True)
        )
        if is_far and not self.rules.brings_inside:
            return "OUT_OF_RANGE"
        line = {newest.start + index: row for index, row in enumerate(inside if is_far else chunk.rows)}
        if is_swap and self.lines:
            self.lines[-1] = line
        else:
            # `observed` of the lines that there are.
            self.observed = [*self.observed[len(self.observed) - len(self.lines) :], newest.observed]
            self.lines = [*self.lines, line]
        self.newest, self.has_begun, self.belief = newest, True, chunk.belief
        return "LIMITED" if is_far else "OK"

    def _start_of(self, now: int, chunk: Chunk) -> tuple[Newest, bool] | None:
        """Where it belongs, and whether it replaces a draft of itself; None where it comes too late or in no order."""
        rules, last = self.rules, self.newest
        number = chunk.number if chunk.number is not None else 0 if last is None else last.number + 1
        observed = now if chunk.observed is None else chunk.observed
        if last is not None:
            is_same = number == last.number and chunk.observed in (None, last.observed)
            if is_same and chunk.layers > last.layers:
                return self._in_time(now, Newest(number, last.observed, chunk.layers, last.start), True)
            is_drained = not self.lines or self.tick - last.start >= rules.length
            is_restart = chunk.observed is not None and observed > last.observed and is_drained
            if (number <= last.number and not is_restart) or observed < last.observed:
                return None
        delay = max(0, _round(Fraction(now - observed, rules.period)))
        return self._in_time(now, Newest(number, observed, chunk.layers, self.tick - delay), False)

    def _in_time(self, now: int, newest: Newest, is_swap: bool) -> tuple[Newest, bool] | None:
        age, rules = now - newest.observed, self.rules
        is_late = age > rules.stale or _round(Fraction(age, rules.period)) >= rules.length
        return None if is_late or -age > rules.period else (newest, is_swap)

    def _served(self, now: int) -> Row | None:
        if not self.lines or self.tick not in self.lines[-1]:
            return None
        if self.rules.strategy == "latest_only":
            return self.lines[-1][self.tick]
        if self.rules.strategy == "weighted_average":
            return self._joined(len(self.lines) - 1, now)
        lines = zip(self.lines[-self.rules.ensemble :], self.observed[-self.rules.ensemble :], strict=True)
        rows = [line[self.tick] for line, observed in lines if self.tick in line and now - observed <= self.rules.stale]
        weights = [math.exp(-self.rules.decay * age) for age in range(len(rows))]
        mean = [
            sum(w * v for w, v in zip(weights, column, strict=True)) / sum(weights)
            for column in zip(*rows, strict=True)
        ]
        return [rows[-1][index] if index in self.rules.grippers else value for index, value in enumerate(mean)]

    def _joined(self, index: int, now: int) -> Row | None:
        """With what would have been served without chunk `index`."""
        if index < 0 or self.tick not in self.lines[index] or now - self.observed[index] > self.rules.stale:
            return None
        row, older = self.lines[index][self.tick], self._joined(index - 1, now)
        if older is None:
            return row
        weights = [1.0 if index in self.rules.grippers else self.rules.new_weight for index in range(len(row))]
        return [w * new + (1 - w) * old for w, new, old in zip(weights, row, older, strict=True)]


def _round(number: Fraction) -> int:
    return math.floor(number + Fraction(1, 2))
