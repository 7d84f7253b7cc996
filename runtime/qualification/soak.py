"""Run a decoder through many ticks without a fault, and say what it costs and whether memory grows.

Prints latencies, what `ControlDecoder` adds to the bare backend (measured in turn in the same run), how much memory
grew, and every status that was not OK. `campaign.py` injects faults.
"""

if __name__ == "__main__":
    from ..bundle.start import run_script

    # Before the imports below, which take long enough for Ctrl-C.
    run_script(f"{__package__}.soak")

import argparse
import contextlib
import dataclasses
import gc
import logging
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..backends.beliefs import mode_shape
from ..benchmark.first_result import resident_bytes
from ..bundle.arrays import AnyArray, Float32Array, Int32Array, Int64Array
from ..bundle.backend_specs import BACKENDS
from ..bundle.command import DONE, WANTING, CommandParser, Outcome, positive, run
from ..bundle.probabilities import one_hot
from ..control.belief_config import BeliefConfig
from ..control.config import ActionKind, ControlConfig, Status, Strategy
from ..control.decoder import ControlDecoder
from ..control.result import ControlResult
from ..tokenizer import ActionTokenizer
from .trial_inputs import chunks_of, config_for, motion_of

#: By how many bytes RSS may grow after warm-up.
RSS_LIMIT = 2**20
#: How many times as long as one line of Python's logging, written to nowhere, guard, queue and book-keeping may take.
#: Both run through much of Python, and suffer nearly alike when others fill the caches. Measured: 1.71 to 1.99 on a
#: quiet machine, by strategy. The quickest line of logging that was seen took 3.9 us, so the limit is 8 us there.
#: A heavily loaded machine had 2.01 to 2.07, and may fail: measure on a quiet one.
ADDED_LIMIT = 2.05
#: The percentile that is judged: the quickest ticks are those that nothing has interrupted.
_QUICKEST = 5
#: How many bytes traced ticks may keep: the numbers of the last tick are other objects than those of the first.
KEPT_LIMIT = 1024
#: Memory is ours if one of so many innermost calls is. Each further one makes a traced tick a quarter slower.
_FRAMES = 4
_CHUNKS = 64
#: So long that only a decoder that fails misses it, not one that waits for a processor.
_WORKER_DEADLINE_US = 1e6


#: Tokens or logits, and stats.
Input = tuple[AnyArray, Float32Array | None]
Step = Callable[[AnyArray, Float32Array | None], ControlResult]
Decode = Callable[[AnyArray, Float32Array | None], None]


@dataclass(frozen=True)
class SoakSetup:
    """How the decoder is set up, and which chunks it gets.

    fallback: another backend, warm beside the first. jumps: random actions, which cost most since they are limited, in
    place of a smooth motion. beliefs: chunks come as logits that are nearly certain. warm_ticks, traced_ticks: before
    and after those that are counted.
    """

    strategy: Strategy = Strategy.LATEST_ONLY
    use_worker: bool = False
    fallback: ActionTokenizer | None = None
    action_kind: ActionKind = ActionKind.DELTA
    jumps: bool = False
    beliefs: bool = False
    warm_ticks: int = 20_000
    traced_ticks: int = 10_000

    def config(self, tokenizer: ActionTokenizer, limit: float) -> ControlConfig:
        return config_for(
            tokenizer,
            limit,
            strategy=self.strategy,
            use_worker=self.use_worker,
            deadline_us=_WORKER_DEADLINE_US if self.use_worker else None,
            action_kind=(self.action_kind,) * tokenizer.model.action_dim,
            # Of the limit, far above what is nearly certain.
            beliefs=BeliefConfig(std_limit=limit, least_mode_probability=0.5) if self.beliefs else None,
        )

    def describe(self, tokenizer: ActionTokenizer) -> str:
        parts = [tokenizer.backend.description, self.strategy, self.action_kind, *["worker"] * self.use_worker]
        parts += ["beliefs"] * self.beliefs
        parts += [] if self.fallback is None else [f"falls back on {self.fallback.backend.description}"]
        return ", ".join(map(str, parts))


@dataclass(frozen=True)
class SoakReport:
    """The result of a soak. step_us, bare_us: median, 99 %, 99.9 % and longest time with and without the decoder.

    added_us: median of their difference, tick by tick. quick_added_us, line_us: what is judged, the 5 % quantiles of
    the difference and of one line of logging, measured in turn. kept, transient: bytes that traced ticks kept, and the
    most that lived at once within them. others: how often each status but OK was given. limited: the share of ticks on
    which the slew limit held the action back.
    """

    description: str
    ticks: int
    seconds: float
    step_us: tuple[float, ...]
    bare_us: tuple[float, ...]
    added_us: float
    quick_added_us: float
    line_us: float
    rss_growth: int
    kept: int
    transient: int
    traced_ticks: int
    others: dict[str, int]
    limited: float
    has_worker: bool
    has_beliefs: bool = False

    @property
    def ratio(self) -> float:
        return self.step_us[0] / self.bare_us[0]

    def verdicts(self) -> tuple[tuple[bool, str], ...]:
        cost = self.quick_added_us / self.line_us
        judged = f"at most {ADDED_LIMIT:g}"
        if self.has_worker:
            judged = "not judged: the worker is another thread"
        elif self.has_beliefs:
            judged = "not judged: alone, the backend checks other arrays each time, and the loop has its own"
        added = (
            f"guard, queue and book-keeping add {self.added_us:.2f} us to the backend (median), {self.ratio:.1f} "
            f"times; the quickest {cost:.2f} times what a line of logging takes, {self.line_us:.2f} us"
        )
        others = ", ".join(f"{count} {name}" for name, count in self.others.items()) or "none"
        return (
            (self.has_worker or self.has_beliefs or cost <= ADDED_LIMIT, f"{added}; {judged}"),
            (self.rss_growth < RSS_LIMIT, f"RSS grew by {self.rss_growth / 1024:.0f} KiB; below {RSS_LIMIT // 1024}"),
            (
                self.kept <= KEPT_LIMIT,
                f"tracemalloc: {self.kept / self.traced_ticks:.3f} bytes kept per tick, {self.kept} after "
                f"{self.traced_ticks} ticks; at most {KEPT_LIMIT}. At most {self.transient} at once within a tick",
            ),
            (not self.others, f"ticks with a status other than OK: {others}"),
        )

    @property
    def holds(self) -> bool:
        return all(is_right for is_right, _ in self.verdicts())

    def __str__(self) -> str:
        lines = [
            f"{self.ticks} ticks on {self.description}:",
            f"  a chunk on each, {self.seconds:.0f} s in all; the slew limit held {self.limited:.0%} of them back",
        ]
        bare = "tokenizer.decode_logits_into" if self.has_beliefs else "tokenizer.decode_into"
        for name, taken in (("step", self.step_us), (bare, self.bare_us)):
            p50, p99, p999, most = taken
            lines.append(f"  {name:22} p50 {p50:.2f}  p99 {p99:.2f}  p99.9 {p999:.2f}  max {most:.0f} us")
        return "\n".join((*lines, *(f"{'✓' if is_right else '✗'} {text}" for is_right, text in self.verdicts())))


def main(arguments: Sequence[str] | None = None) -> int:
    return run(_parser(), _work, arguments)


def _parser() -> CommandParser:
    parser = CommandParser(
        "runtime/qualification/soak.py",
        "serve many ticks without a fault: what does that cost, and does anything grow?",
        wanting="a limit did not hold",
    )
    parser.add_bundle()
    parser.add_backend()
    parser.add_argument("--ticks", type=positive, default=1_000_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--strategy", choices=list(map(str, Strategy)), default="latest_only")
    parser.add_argument("--worker", action="store_true", help="decode in another thread")
    parser.add_argument("--fallback", choices=tuple(BACKENDS), help="another backend, warm beside the first")
    parser.add_argument("--jumps", action="store_true", help="random actions, which the slew limit has to hold back")
    parser.add_argument("--beliefs", action="store_true", help="chunks as logits, not as tokens")
    parser.add_argument("--absolute", action="store_true", help="dimensions that are places, not motions")
    return parser


def _work(options: argparse.Namespace) -> Outcome:
    with contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.NOTSET)
        logging.disable(logging.CRITICAL)
        tokenizer = stack.enter_context(ActionTokenizer.load(options.bundle, backend=options.backend))
        fallback = None
        if options.fallback:
            fallback = stack.enter_context(ActionTokenizer.load(options.bundle, backend=options.fallback))
        kind = ActionKind.ABSOLUTE if options.absolute else ActionKind.DELTA
        setup = SoakSetup(Strategy(options.strategy), options.worker, fallback, kind, options.jumps, options.beliefs)
        report = soak(tokenizer, options.ticks, setup)
    print(report)
    verdict = "✓ every limit held" if report.holds else "✗ a limit did not hold"
    return Outcome(f"{verdict}: {report.description}", dataclasses.asdict(report), DONE if report.holds else WANTING)


def soak(tokenizer: ActionTokenizer, ticks: int, setup: SoakSetup = SoakSetup()) -> SoakReport:
    """Serve a chunk on every tick, the dearest case, as fast as possible."""
    tokens, stats, limit = (chunks_of if setup.jumps else motion_of)(tokenizer, _CHUNKS)
    inputs: list[Input] = list(zip(tokens, stats, strict=True))
    if setup.beliefs:
        inputs = [(_nearly_certain(chunk, tokenizer.model.vocabulary), None) for chunk in tokens]
    config = setup.config(tokenizer, limit)
    fallbacks = () if setup.fallback is None else (setup.fallback,)
    # Filled with ones, so that their pages exist before memory is measured.
    times = np.ones((3, ticks), np.int64)
    with ControlDecoder(tokenizer, config, fallbacks=fallbacks, position=(0.0,) * config.action_dim) as decoder:
        decoder.warmup()
        calls = _calls(decoder, tokenizer, has_beliefs=setup.beliefs)
        _time(calls, inputs, np.ones((3, setup.warm_ticks), np.int64))
        gc.collect()
        before, memory, started = list(decoder.health.statuses), resident_bytes() or 0, time.monotonic()
        limited = _time(calls, inputs, times)
        seconds, growth = time.monotonic() - started, (resident_bytes() or 0) - memory
        kept, transient = _traced(calls[0], inputs, setup.traced_ticks)
        after = list(decoder.health.statuses)
    whole, bare, line = times
    return SoakReport(
        description=setup.describe(tokenizer),
        ticks=ticks,
        seconds=seconds,
        step_us=_quantiles(whole),
        bare_us=_quantiles(bare),
        added_us=float(np.median(whole - bare)) / 1e3,
        quick_added_us=float(np.percentile(whole, _QUICKEST) - np.percentile(bare, _QUICKEST)) / 1e3,
        line_us=float(np.percentile(line, _QUICKEST)) / 1e3,
        rss_growth=growth,
        kept=kept,
        transient=transient,
        traced_ticks=setup.traced_ticks,
        others={
            status.name: after[status] - before[status]
            for status in Status
            if status is not Status.OK and after[status] > before[status]
        },
        limited=limited / ticks,
        has_worker=setup.use_worker,
        has_beliefs=setup.beliefs,
    )


def _nearly_certain(tokens: Int32Array, vocabulary: int) -> Float32Array:
    """Logits of tokens: those of others are 20 below."""
    return 20 * one_hot(tokens, vocabulary)


def _calls(decoder: ControlDecoder, tokenizer: ActionTokenizer, *, has_beliefs: bool) -> tuple[Step, Decode]:
    """A step, and the bare backend, each with what came."""
    model, step = tokenizer.model, decoder.step
    decode, decode_logits = tokenizer.decode_into, tokenizer.decode_logits_into
    out = np.empty(model.actions_shape(1), np.float32)
    if has_beliefs:
        others = np.empty_like(out), np.empty(1, np.float32), np.empty(mode_shape(model, 1), np.int32)
        return lambda chunk, _: step(logits=chunk), lambda chunk, _: decode_logits(chunk, out, *others)
    return lambda chunk, stat: step(chunk, stats=stat), lambda chunk, stat: decode(chunk, out, stat)


def _time(calls: tuple[Step, Decode], inputs: list[Input], times: Int64Array) -> int:
    """Fill times [3, ticks] with ns of steps, the bare backend and lines of logging; returns how many were limited."""
    whole, bare, line = times
    clock, (step, decode), log = time.monotonic_ns, calls, _line()
    limited = 0
    for tick in range(times.shape[1]):
        chunk, stat = inputs[tick % _CHUNKS]
        # Each goes first in turn, since the second one profits from what the first one brought into the caches.
        if tick & 1:
            begin = clock()
            decode(chunk, stat)
            middle = clock()
            result = step(chunk, stat)
            whole[tick] = clock() - middle
            bare[tick] = middle - begin
        else:
            begin = clock()
            result = step(chunk, stat)
            middle = clock()
            decode(chunk, stat)
            bare[tick] = clock() - middle
            whole[tick] = middle - begin
        begin = clock()
        log(tick)
        line[tick] = clock() - begin
        limited += result.is_limited
    return limited


def _line() -> Callable[[int], str]:
    """One line of logging, by a logger of its own: the settings of the program do not matter."""
    logger = logging.Logger("soak")
    text_of = logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s").format

    def line(tick: int) -> str:
        return text_of(logger.makeRecord("soak", logging.INFO, "soak", 1, "tick %d: %s", (tick, "served"), None))

    return line


def _traced(step: Step, inputs: list[Input], ticks: int) -> tuple[int, int]:
    """How many bytes so many ticks keep, and the most that live at once within them."""

    def serve(count: int) -> None:
        for tick in range(count):
            chunk, stat = inputs[tick % _CHUNKS]
            step(chunk, stat)

    gc.collect()
    tracemalloc.start(_FRAMES)
    try:
        # So that what a tick leaves to the next is traced before anything is counted.
        serve(_CHUNKS * 8)
        sizes = [_bytes_of_ours(tracemalloc.take_snapshot())]
        for _ in range(2):
            tracemalloc.reset_peak()
            total = tracemalloc.get_traced_memory()[0]
            serve(ticks)
            transient = tracemalloc.get_traced_memory()[1] - total
            sizes.append(_bytes_of_ours(tracemalloc.take_snapshot()))
    finally:
        tracemalloc.stop()
    # What ticks keep, these keep twice. A worker in the middle of a chunk, and objects that Python has in stock from
    # before anything was traced, count once at most.
    return min(later - earlier for earlier, later in pairwise(sizes)), transient


def _bytes_of_ours(snapshot: tracemalloc.Snapshot) -> int:
    """The bytes that calls through this package have allocated: other threads do other things meanwhile."""
    ours = tracemalloc.Filter(True, str(Path(__file__).parents[1] / "*"), all_frames=True)
    counting = tracemalloc.Filter(False, tracemalloc.__file__, all_frames=True)
    return sum(trace.size for trace in snapshot.filter_traces((ours, counting)).traces)


def _quantiles(nanoseconds: Int64Array) -> tuple[float, ...]:
    return tuple((np.percentile(nanoseconds, (50, 99, 99.9, 100)) / 1e3).tolist())
