#!/usr/bin/env python3
"""Measure the runtime on this machine: latency of one chunk, throughput, import and load. Judges nothing.

The targets beside the figures are for one idle core of a 2-core x86-64 machine; other programs that run make every
figure worse, so each is a median of many calls, with the 99th percentile beside it.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import subprocess
import time
from collections.abc import Callable, Sequence

import numpy as np

from runtime import ActionTokenizer

ROOT = Path(__file__).resolve().parents[2]
_THROUGHPUT_STEPS = 100_000
_PROCESSES = 7


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path, help="folder written by `python export/build_engine.py`")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--calls", type=int, default=5000, help="calls per figure, default: %(default)s")
    options = parser.parse_args(arguments)
    with ActionTokenizer.load(options.bundle, backend=options.backend) as tokenizer:
        model = tokenizer.model
        print(
            f"{options.bundle}: {model.mode}, T {model.chunk_length}, A {model.action_dim}, D {model.latent_dim}, "
            f"L {model.num_layers}, K {model.num_levels}; {tokenizer.backend.description}"
        )
        _bench_latency(tokenizer, options.calls)
        _bench_throughput(tokenizer)
    _bench_start(options.bundle, options.backend)
    return 0


def _bench_latency(tokenizer: ActionTokenizer, calls: int) -> None:
    actions, tokens, stats = _random_batch(tokenizer, 1)
    decoded, encoded = np.empty_like(actions), np.empty_like(tokens)
    backend = tokenizer.backend
    print("one chunk, microseconds                median      p99")
    _report("encode, backend, bound", 60, calls, lambda: backend.encode_into(actions, encoded, None))
    for prefix in tokenizer.prefixes:
        part = np.ascontiguousarray(tokens[..., :prefix])
        side = None if stats is None else np.ascontiguousarray(stats[..., :prefix, :])
        _report(
            f"decode {prefix} layers, backend, bound",
            15,
            calls,
            lambda part=part, side=side: backend.decode_into(part, side, decoded),
        )
    _report("encode", None, calls, lambda: tokenizer.encode(actions))
    _report("encode_into", None, calls, lambda: tokenizer.encode_into(actions, encoded))
    _report("decode", None, calls, lambda: tokenizer.decode(tokens, stats))
    _report("decode_into", None, calls, lambda: tokenizer.decode_into(tokens, decoded, stats))


def _report(label: str, target: float | None, calls: int, call: Callable[[], object]) -> None:
    for _ in range(calls // 10):
        call()
    taken = np.empty(calls)
    for index in range(calls):
        start = time.perf_counter_ns()
        call()
        taken[index] = time.perf_counter_ns() - start
    median, high = np.percentile(taken / 1e3, [50, 99])
    beside = "" if target is None else f"   (target {target})"
    print(f"  {label:34} {median:8.1f} {high:8.1f}{beside}")


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
