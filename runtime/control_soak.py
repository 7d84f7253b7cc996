#!/usr/bin/env python3
"""Run a decoder through many ticks, and through many faults, and say what it cost and whether anything unsafe left.

`soak` prints latencies, growth of memory and what the guard and queue add; `campaign` injects faults of every kind it
knows. The exit status is 0 when everything held, 1 when something did not, 2 when nothing could be run.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import gc
import logging
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.console import prepare_console, printable
from runtime.contract import Float32Array, Int32Array
from runtime.control_config import ActionKind, ControlConfig, Status
from runtime.control_decoder import ControlDecoder, ControlResult
from runtime.errors import InferenceError, TokenizerError
from runtime.tokenizer import ActionTokenizer

_PERIOD_S = 0.002
#: RSS may grow by so much after warm-up.
_RSS_LIMIT = 2**20
_WARM_TICKS = 20_000


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--ticks", type=int, default=1_000_000, help="of the soak; 0 for none")
    parser.add_argument("--faults", type=int, default=10_000, help="of the campaign; 0 for none")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    try:
        with ActionTokenizer.load(options.bundle, backend=options.backend) as tokenizer:
            holds = [soak(tokenizer, options.ticks)] if options.ticks else []
            if options.faults:
                report = run_campaign(tokenizer, options.faults)
                print(report)
                holds.append(report.holds)
    except TokenizerError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0 if all(holds) else 1


def config_for(tokenizer: ActionTokenizer, limit: float, **changes: Any) -> ControlConfig:
    """All deltas but the last dimension, a gripper."""
    size = tokenizer.model.action_dim
    values: dict[str, Any] = {
        "period_s": _PERIOD_S,
        "action_low": (-limit,) * size,
        "action_high": (limit,) * size,
        "max_relative_step": (limit / 4,) * size,
        "action_kind": (ActionKind.DELTA,) * size,
        "gripper": (size - 1,),
        "max_consecutive_faults": 0,
        **changes,
    }
    return ControlConfig(**values)


def chunks_of(tokenizer: ActionTokenizer, count: int) -> tuple[list[Int32Array], list[Float32Array | None], float]:
    """Tokens of random actions, their stats, and a limit that no decoded action reaches."""
    model = tokenizer.model
    units = np.asarray(model.action_units)
    rng = np.random.default_rng(0)
    shape = (count, 1, model.chunk_length, model.action_dim)
    actions = (rng.uniform(-0.5, 0.5, shape) * units + np.asarray(model.action_offset)).astype(np.float32)
    tokens, stats, largest = [], [], 0.0
    for chunk in actions:
        pair = tokenizer.encode_with_stats(chunk) if model.has_stats else (tokenizer.encode(chunk), None)
        tokens.append(pair[0])
        stats.append(pair[1])
        largest = max(largest, float(np.abs(tokenizer.decode(*pair)).max()))
    return tokens, stats, 1.5 * largest


def soak(tokenizer: ActionTokenizer, ticks: int) -> bool:
    """A chunk on every tick, the dearest case; prints what it found."""
    tokens, stats, limit = chunks_of(tokenizer, 16)
    config = config_for(tokenizer, limit)
    position = (0.0,) * config.action_dim
    out = np.empty((1, tokenizer.model.chunk_length, config.action_dim), np.float32)
    with ControlDecoder(tokenizer, config, position=position) as decoder:
        decoder.warmup()
        clock, step = time.monotonic_ns, decoder.step
        backend, whole = np.zeros(ticks, np.int64), np.zeros(ticks, np.int64)
        backend[:], whole[:] = 1, 1  # pages are there before memory is measured
        for tick in range(_WARM_TICKS):
            step(tokens[tick & 15], stats=stats[tick & 15])
        gc.collect()
        statuses = list(decoder.health.statuses)
        before = _rss()
        for tick in range(ticks):
            chunk, stat = tokens[tick & 15], stats[tick & 15]
            begin = clock()
            tokenizer.decode_into(chunk, out, stat)
            middle = clock()
            step(chunk, stats=stat)
            whole[tick] = clock() - middle
            backend[tick] = middle - begin
        growth = _rss() - before
        others = sum(decoder.health.statuses) - sum(statuses) - decoder.health.statuses[0] + statuses[0]
        net, transient = _traced(decoder, tokens, stats)
    added = float(np.median(whole - backend)) / 1e3
    print(f"{ticks} ticks on {tokenizer.backend.description}, a chunk on each:")
    for name, taken in (("step", whole), ("tokenizer.decode_into", backend)):
        p50, p99, p999 = np.percentile(taken, (50, 99, 99.9)) / 1e3
        print(f"  {name:22} p50 {p50:.1f}  p99 {p99:.1f}  p99.9 {p999:.1f}  max {taken.max() / 1e3:.1f} us")
    verdicts = [
        (added <= 8, f"guard, queue and book-keeping add {added:.2f} us (median) to the backend; at most 8"),
        (growth < _RSS_LIMIT, f"RSS grew by {growth / 1024:.0f} KiB; below {_RSS_LIMIT // 1024}"),
        (net <= 1024, f"tracemalloc: {net} bytes kept after 10,000 ticks, {transient} at most within them"),
        (others == 0, f"{others} ticks with a status other than OK"),
    ]
    for is_right, text in verdicts:
        print(f"{'✓' if is_right else '✗'} {text}")
    return all(is_right for is_right, _ in verdicts)


def _traced(decoder: ControlDecoder, tokens: list[Int32Array], stats: list[Float32Array | None]) -> tuple[int, int]:
    """Bytes that 10,000 ticks keep, and the most that lives at once within them."""
    tracemalloc.start()
    try:
        for tick in range(100):
            decoder.step(tokens[tick & 15], stats=stats[tick & 15])
        gc.collect()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for tick in range(10_000):
            decoder.step(tokens[tick & 15], stats=stats[tick & 15])
        after, peak = tracemalloc.get_traced_memory()
        return after - before, peak - before
    finally:
        tracemalloc.stop()


def _rss() -> int:
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


# --- faults -----------------------------------------------------------------------------------------------------------


class FaultyBackend:
    """A backend that obeys until told to fail; hands everything else through."""

    def __init__(self, backend: Any) -> None:
        self._backend, self.fault = backend, ""
        self.clock: Callable[[int], None] = lambda _: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def decode_into(self, tokens: Int32Array, stats: Float32Array | None, actions: Float32Array) -> None:
        if self.fault == "raises":
            raise InferenceError("injected")
        if self.fault == "raises what nobody knows":
            raise RuntimeError("injected")
        self._backend.decode_into(tokens, stats, actions)
        if self.fault == "nan":
            actions[0, -1, 0] = np.nan
        elif self.fault == "inf":
            actions[...] = np.inf
        elif self.fault == "huge":
            actions[0, 0, 0] = 1e6
        elif self.fault == "slow":
            self.clock(50_000_000)


@dataclass(frozen=True)
class CampaignReport:
    """What a campaign found; `failures` says which fault was answered wrongly, and how."""

    faults: int
    kinds: Counter[str]
    failures: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        lines = [f"{self.faults} faults of {len(self.kinds)} kinds:"]
        lines += [f"  {name:34} {count}" for name, count in sorted(self.kinds.items())]
        lines.append(f"{'✓' if self.holds else '✗'} {len(self.failures)} answered wrongly")
        return "\n".join((*lines, *self.failures[:20]))


class Campaign:
    """One decoder, one fault after another; every action that leaves is checked against limits and slew."""

    def __init__(self, tokenizer: ActionTokenizer, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.now = 10**12
        self.tokens, self.stats, limit = chunks_of(tokenizer, 16)
        self.backend = FaultyBackend(tokenizer.backend)
        self.backend.clock = self.advance
        self.tokenizer = ActionTokenizer(tokenizer._manifest, self.backend)
        self.config = config_for(tokenizer, limit, deadline_us=10_000.0, stale_after_s=0.05)
        self.decoder = ControlDecoder(
            self.tokenizer, self.config, position=(0.0,) * self.config.action_dim, clock=lambda: self.now
        )
        self.decoder.warmup()
        self.last = np.zeros(self.config.action_dim, np.float32)
        self.sequence = 0
        self.unsafe: list[str] = []

    def advance(self, nanoseconds: int) -> None:
        self.now += nanoseconds

    def tick(self, tokens: object = None, **options: Any) -> ControlResult:
        self.now += round(_PERIOD_S * 1e9)
        result = self.decoder.step(tokens, **options)
        self._check(result)
        return result

    def good(self) -> ControlResult:
        index = int(self.rng.integers(16))
        self.sequence += 1
        return self.tick(self.tokens[index], stats=self.stats[index], sequence=self.sequence)

    def chunk(self) -> tuple[Int32Array, Float32Array | None]:
        index = int(self.rng.integers(16))
        return self.tokens[index].copy(), self.stats[index]

    def _check(self, result: ControlResult) -> None:
        sent = result.actions.astype(np.float64)
        limit, slew = np.asarray(self.config.action_high), np.asarray(self.config.max_relative_step)
        if not (np.abs(sent) <= limit).all() or not (np.abs(sent - self.last) <= slew).all():
            self.unsafe.append(f"tick {result.tick}: {result} after {self.last.tolist()}")
        self.last = result.actions.copy()


def _bad_tokens(campaign: Campaign, change: Callable[[Any], Any]) -> ControlResult:
    tokens, stats = campaign.chunk()
    return campaign.tick(change(tokens), stats=stats, sequence=campaign.sequence + 1)


def _with(tokens: Int32Array, value: int, place: int) -> Int32Array:
    tokens.reshape(-1)[place % tokens.size] = value
    return tokens


def _backend_fault(campaign: Campaign, fault: str) -> ControlResult:
    campaign.backend.fault = fault
    try:
        tokens, stats = campaign.chunk()
        campaign.sequence += 1
        return campaign.tick(tokens, stats=stats, sequence=campaign.sequence)
    finally:
        campaign.backend.fault = ""


def _timed(campaign: Campaign, age_s: float, sequence: int) -> ControlResult:
    tokens, stats = campaign.chunk()
    observed = campaign.now + round(_PERIOD_S * 1e9) - round(age_s * 1e9)
    return campaign.tick(tokens, stats=stats, sequence=campaign.sequence + sequence, observed_ns=observed)


def _killed(campaign: Campaign) -> ControlResult:
    campaign.good()
    result = campaign.decoder.result
    for _ in range(campaign.tokenizer.model.chunk_length):
        result = campaign.tick()
    return result


def _jump(campaign: Campaign, seconds: float) -> ControlResult:
    campaign.advance(round(seconds * 1e9))
    return campaign.tick()


_BAD, _STALE = Status.BAD_TOKEN, Status.STALE
#: Name, the status it must be answered with, and how it is injected.
FAULTS: tuple[tuple[str, Status, Callable[[Campaign], ControlResult]], ...] = (
    ("token too high", _BAD, lambda c: _bad_tokens(c, lambda t: _with(t, 1000, int(c.rng.integers(2**20))))),
    ("token too high by one", _BAD, lambda c: _bad_tokens(c, lambda t: _with(t, c.tokenizer.model.num_levels, 3))),
    ("negative token", _BAD, lambda c: _bad_tokens(c, lambda t: _with(t, -1, int(c.rng.integers(2**20))))),
    ("float tokens", _BAD, lambda c: _bad_tokens(c, lambda t: t.astype(np.float32))),
    ("int64 that wraps to legal", _BAD, lambda c: _bad_tokens(c, lambda t: t.astype(np.int64) + 2**32)),
    ("tokens without batch", _BAD, lambda c: _bad_tokens(c, lambda t: t[0])),
    ("a step is missing", _BAD, lambda c: _bad_tokens(c, lambda t: t[:, :-1])),
    ("two chunks", _BAD, lambda c: _bad_tokens(c, lambda t: np.concatenate((t, t)))),
    ("no layers", _BAD, lambda c: _bad_tokens(c, lambda t: t[..., :0])),
    ("a list", _BAD, lambda c: _bad_tokens(c, lambda t: t.tolist())),
    ("no sequence number", _BAD, lambda c: c.tick(c.chunk()[0], sequence=1.5)),
    ("backend raises", Status.BACKEND_FAULT, lambda c: _backend_fault(c, "raises")),
    ("backend raises the unknown", Status.BACKEND_FAULT, lambda c: _backend_fault(c, "raises what nobody knows")),
    ("backend gives NaN", Status.NONFINITE, lambda c: _backend_fault(c, "nan")),
    ("backend gives infinity", Status.NONFINITE, lambda c: _backend_fault(c, "inf")),
    ("action out of range", Status.OUT_OF_RANGE, lambda c: _backend_fault(c, "huge")),
    ("backend is late", Status.DEADLINE_MISS, lambda c: _backend_fault(c, "slow")),
    ("stale chunk", _STALE, lambda c: _timed(c, 0.2, 1)),
    ("chunk whose time has passed", _STALE, lambda c: _timed(c, _PERIOD_S * c.tokenizer.model.chunk_length, 1)),
    ("chunk from the future", _STALE, lambda c: _timed(c, -1.0, 1)),
    ("duplicated chunk", _STALE, lambda c: _timed(c, 2 * _PERIOD_S, 0)),
    ("reordered chunk", _STALE, lambda c: _timed(c, 3 * _PERIOD_S, -2)),
    ("killed producer", _STALE, _killed),
    ("clock jumps forward", _STALE, lambda c: _jump(c, 5.0)),
    ("clock jumps back", _STALE, lambda c: _jump(c, -5.0)),
)


def run_campaign(tokenizer: ActionTokenizer, faults: int, seed: int = 0) -> CampaignReport:
    """Faults of every kind in random order, each after normal service and before it."""
    campaign = Campaign(tokenizer, seed)
    kinds: Counter[str] = Counter()
    failures = []
    with campaign.decoder:
        for _ in range(3):
            campaign.good()
        for number in range(faults):
            choice = number if number < len(FAULTS) else int(campaign.rng.integers(len(FAULTS)))
            name, expected, inject = FAULTS[choice]
            found = inject(campaign).status
            kinds[name] += 1
            if found is not expected:
                failures.append(f"{name}: {found.name}, expected {expected.name}: {campaign.decoder.result.detail}")
            if (after := campaign.good()).status is not Status.OK:
                failures.append(f"after {name}: {after}: {after.detail}")
            for _ in range(int(campaign.rng.integers(3))):
                campaign.tick()
    return CampaignReport(faults, kinds, (*campaign.unsafe, *failures))


if __name__ == "__main__":
    prepare_console()
    sys.exit(main())
