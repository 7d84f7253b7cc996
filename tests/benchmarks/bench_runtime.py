#!/usr/bin/env python3
"""Measure the runtime on this machine: latency of one chunk, throughput, import and load. Judges nothing.

The targets beside the figures are for an idle 2-core x86-64 machine. Other programs make every figure worse, so calls
are timed in rounds: `quietest` is the median of the best round, median and p99 are over all of them.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import functools
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime import ActionTokenizer

ROOT = Path(__file__).resolve().parents[2]
_THROUGHPUT_STEPS = 100_000
_CALLS_PER_ROUND = 100
_PROCESSES = 7


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="folder written by `python export/build_engine.py`")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=100, help=f"of {_CALLS_PER_ROUND} calls, default: %(default)s")
    options = parser.parse_args(arguments)
    with ActionTokenizer.load(options.bundle, backend=options.backend) as tokenizer:
        model = tokenizer.model
        print(
            f"{options.bundle}: {model.mode}, T {model.chunk_length}, A {model.action_dim}, D {model.latent_dim}, "
            f"L {model.num_layers}, K {model.num_levels}; {tokenizer.backend.description}"
        )
        _bench_latency(tokenizer, options.rounds)
        _bench_throughput(tokenizer)
    _bench_start(options.bundle, options.backend)
    return 0


def _bench_latency(tokenizer: ActionTokenizer, rounds: int) -> None:
    actions, tokens, stats = _random_batch(tokenizer, 1)
    decoded, encoded = np.empty_like(actions), np.empty_like(tokens)
    backend = tokenizer.backend
    figures = [_Figure("encode, backend, bound", 60, lambda: backend.encode_into(actions, encoded, None))]
    for prefix in tokenizer.prefixes:
        part = np.ascontiguousarray(tokens[..., :prefix])
        side = None if stats is None else np.ascontiguousarray(stats[..., :prefix, :])
        call = functools.partial(backend.decode_into, part, side, decoded)
        figures.append(_Figure(f"decode {prefix} layers, backend, bound", 15, call))
    figures += [
        _Figure("encode", None, lambda: tokenizer.encode(actions)),
        _Figure("encode_into", None, lambda: tokenizer.encode_into(actions, encoded)),
        _Figure("decode", None, lambda: tokenizer.decode(tokens, stats)),
        _Figure("decode_into", None, lambda: tokenizer.decode_into(tokens, decoded, stats)),
    ]
    # In turns, so that a noisy second strikes all of them.
    taken = np.array([[_time_calls(figure.call) for figure in figures] for _ in range(rounds)])
    print("one chunk, microseconds              quietest   median      p99")
    for index, figure in enumerate(figures):
        quietest = np.median(taken[:, index], axis=-1).min()
        median, high = np.percentile(taken[:, index], [50, 99])
        beside = "" if figure.target is None else f"   (target {figure.target})"
        print(f"  {figure.label:34} {quietest:8.1f} {median:8.1f} {high:8.1f}{beside}")


@dataclass(frozen=True)
class _Figure:
    label: str
    target: float | None
    call: Callable[[], object]


def _time_calls(call: Callable[[], object]) -> np.ndarray:
    """Microseconds of each call of a round, warm."""
    for _ in range(_CALLS_PER_ROUND // 10):
        call()
    taken = np.empty(_CALLS_PER_ROUND)
    for index in range(_CALLS_PER_ROUND):
        start = time.perf_counter_ns()
        call()
        taken[index] = (time.perf_counter_ns() - start) / 1e3
    return taken


def _bench_throughput(tokenizer: ActionTokenizer) -> None:
    actions, tokens, stats = _random_batch(tokenizer, -(-_THROUGHPUT_STEPS // tokenizer.model.chunk_length))
    steps = actions.shape[0] * actions.shape[1]
    print(f"{steps} steps at once, steps per second")
    for label, call in (
        ("encode", lambda: tokenizer.encode(actions)),
        ("decode", lambda: tokenizer.decode(tokens, stats)),
    ):
        call()
        print(f"  {label:34} {steps / min(_seconds(call) for _ in range(5)):10,.0f}")


def _bench_start(bundle: Path, backend: str) -> None:
    """Each in new processes, as a robot's program starts; the median."""
    load = f"ActionTokenizer.load({str(bundle.resolve())!r}, backend={backend!r}"
    print("start, seconds                         median")
    for label, target, setup, code in (
        ("import numpy", None, "", "import numpy"),
        ("import runtime", 0.3, "", "import runtime; runtime.ActionTokenizer"),
        ("load, verified", 0.3, "from runtime import ActionTokenizer", f"{load})"),
        ("load, verified, a second time", None, f"from runtime import ActionTokenizer; {load})", f"{load})"),
        ("load, hashes alone", None, "from runtime import ActionTokenizer", f"{load}, verify=False)"),
    ):
        script = f"import time\n{setup}\nstart = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
        taken = [
            float(subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True).stdout)
            for _ in range(_PROCESSES)
        ]
        beside = "" if target is None else f"            (target {target})"
        print(f"  {label:34} {np.median(taken):8.3f}{beside}")


def _random_batch(tokenizer: ActionTokenizer, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    model = tokenizer.model
    actions = np.random.default_rng(0).uniform(-1, 1, (batch, model.chunk_length, model.action_dim)).astype(np.float32)
    if model.has_stats:
        return actions, *tokenizer.encode_with_stats(actions)
    return actions, tokenizer.encode(actions), None


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
