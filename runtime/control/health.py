"""The health of a control loop: counters, a histogram of latencies, OpenMetrics text.

One thread writes, any thread may read, and nobody locks: a reader may see the current tick half counted, and is never
off by more than that tick.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from .config import Status

_SUB_BITS = 6
_SUB = 1 << _SUB_BITS
_OCTAVES = 40
_LENGTH = _SUB * _OCTAVES
#: Upper bounds of the OpenMetrics buckets in ns, where bins end: from 1 us to 69 s, each twice the one before.
_BOUNDS_NS = tuple((1024 << exponent) - 1 for exponent in range(27))


class LatencyHistogram:
    """A log-linear histogram like HdrHistogram: exact to 64 ns, within 1.6 % above, up to days, in one array."""

    def __init__(self) -> None:
        self._counts = array("q", bytes(8 * _LENGTH))
        # Python's ints: a reader sees them whole, which numpy does not promise of an element.
        self.sum_ns = 0
        self.max_ns = 0

    def add(self, nanoseconds: int) -> None:
        """Count one time; a negative one, of a clock that jumped back, as 0."""
        if nanoseconds < 0:
            nanoseconds = 0
        index = _index_of(nanoseconds)
        self._counts[index if index < _LENGTH else -1] += 1
        self.sum_ns += nanoseconds
        if nanoseconds > self.max_ns:
            self.max_ns = nanoseconds

    def quantile(self, fraction: float) -> float:
        """The upper end, in ns, of the bin that holds this quantile; 0 if nothing was counted."""
        counts = np.array(self._counts)
        total = int(counts.sum())
        if not total:
            return 0.0
        rank = max(1, int(np.ceil(fraction * total)))
        index = int(np.searchsorted(np.cumsum(counts), rank))
        return float(min(upper_end(index), self.max_ns))

    def cumulative(self, bounds_ns: tuple[int, ...]) -> tuple[list[int], int]:
        """How many times were at most each bound, which must be the end of a bin; and how many there are."""
        running = np.cumsum(np.array(self._counts))
        return [int(running[_index_of(bound)]) for bound in bounds_ns], int(running[-1])


def _index_of(nanoseconds: int) -> int:
    exponent = nanoseconds.bit_length() - _SUB_BITS - 1
    return nanoseconds if exponent < 0 else (exponent << _SUB_BITS) + (nanoseconds >> exponent)


def upper_end(index: int) -> int:
    """The largest number of ns that is counted in bin `index`."""
    if index < 2 * _SUB:
        return index
    exponent = (index >> _SUB_BITS) - 1
    return ((index - (exponent << _SUB_BITS) + 1) << exponent) - 1


@dataclass(frozen=True)
class HealthSnapshot:
    """Counts since `warmup`; times in microseconds.

    held: ticks on which the robot was told to stand still. missed_ticks: ticks whose time passed without a call,
    because the loop was late or slow; their actions were left out. internal_faults: errors of clock, histogram,
    recorder or reporter, which cost the robot no action.
    """

    ticks: int
    statuses: dict[str, int]
    held: int
    chunks: int
    refused_chunks: int
    missed_ticks: int
    fallbacks: int
    recoveries: int
    incidents: int
    records_written: int
    records_failed: int
    internal_faults: int
    is_latched: bool
    backend: str
    p50_us: float
    p99_us: float
    p999_us: float
    max_us: float


#: What a loop counts beside its statuses, and what OpenMetrics says of each.
_COUNTERS = {
    "held": "Ticks on which the robot was told to stand still.",
    "chunks": "Chunks of tokens that were accepted.",
    "refused_chunks": "Chunks of tokens that were refused.",
    "missed_ticks": "Ticks whose time passed without a call; their actions were left out.",
    "fallbacks": "Changes to another backend because one failed.",
    "recoveries": "Backends that work again.",
    "incidents": "Runs of ticks with a status other than OK.",
    "records_written": "Flight records written.",
    "records_failed": "Flight records that could not be written.",
    "internal_faults": "Errors of clock, histogram, recorder or reporter.",
}


class Health:
    """The counters of one decoder: the loop counts ticks, the reporter's thread counts records."""

    def __init__(self) -> None:
        self.count_anew()

    def count_anew(self) -> None:
        """Set everything back to the start."""
        self.latency = LatencyHistogram()
        self.statuses = [0] * len(Status)
        self.held = self.chunks = self.refused_chunks = self.missed_ticks = 0
        self.fallbacks = self.recoveries = self.incidents = 0
        self.records_written = self.records_failed = self.internal_faults = 0
        self.is_latched = False
        self.backend = ""
        #: When the last tick began, on the monotonic clock of the system whatever clock the loop has; 0 for never.
        self.last_tick_ns = 0

    def snapshot(self) -> HealthSnapshot:
        latency, counted = self.latency, {name: getattr(self, name) for name in _COUNTERS}
        return HealthSnapshot(
            ticks=sum(self.statuses),
            statuses={status.name: self.statuses[status] for status in Status},
            is_latched=self.is_latched,
            backend=self.backend,
            p50_us=latency.quantile(0.5) / 1e3,
            p99_us=latency.quantile(0.99) / 1e3,
            p999_us=latency.quantile(0.999) / 1e3,
            max_us=latency.max_ns / 1e3,
            **counted,
        )

    def openmetrics(self) -> str:
        """As OpenMetrics 1.0: serve it as `application/openmetrics-text; version=1.0.0; charset=utf-8`."""
        lines = _family("ticks", "counter", "Ticks by status.")
        lines += [
            f'rfsq_control_ticks_total{{status="{status.name.lower()}"}} {self.statuses[status]}' for status in Status
        ]
        for counter, text in _COUNTERS.items():
            name = "held_ticks" if counter == "held" else counter
            lines += [*_family(name, "counter", text), f"rfsq_control_{name}_total {getattr(self, counter)}"]
        lines += _family("latched", "gauge", "1 while the decoder stands still until reset.")
        lines.append(f"rfsq_control_latched {int(self.is_latched)}")
        cumulative, total = self.latency.cumulative(_BOUNDS_NS)
        lines += _family("latency_seconds", "histogram", "Duration of a tick in the decoder.", unit="seconds")
        lines += [
            f'rfsq_control_latency_seconds_bucket{{le="{bound / 1e9!r}"}} {count}'
            for bound, count in zip(_BOUNDS_NS, cumulative, strict=True)
        ]
        lines += [
            f'rfsq_control_latency_seconds_bucket{{le="+Inf"}} {total}',
            f"rfsq_control_latency_seconds_count {total}",
            f"rfsq_control_latency_seconds_sum {self.latency.sum_ns / 1e9!r}",
            "# EOF",
        ]
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, text: str, *, unit: str = "") -> list[str]:
    lines = [f"# TYPE rfsq_control_{name} {kind}"]
    if unit:
        lines.append(f"# UNIT rfsq_control_{name} {unit}")
    return [*lines, f"# HELP rfsq_control_{name} {text}"]
