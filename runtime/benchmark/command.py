"""Measure every backend that works here: latency, jitter, throughput, cold start and memory. Judges nothing.

It says first what it is about to do and how long that takes; --quick is for a first look.
The exit status is 0, or 2 where nothing could be measured: no bundle, an altered one, or no backend for it.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.registry import GPU_BACKENDS, PREFERENCE, select_backend
from ..bundle.console import ProgressLine, duration, path_argument, printable
from ..bundle.errors import BackendUnavailableError, InferenceError, TokenizerError
from ..bundle.folder import Bundle, open_bundle
from ..bundle.golden import read_golden
from ..bundle.manifest import GOLDEN_NAME
from ..bundle.paths import counted, refuse_existing
from ..tokenizer import ActionTokenizer
from .calls import Batch, host_figures, random_batch
from .peers import Peers, open_peers
from .report import Report, report_files, report_text, write_report
from .start import Start, StartError, measure_start
from .timing import (
    ROUND_SECONDS,
    Arithmetic,
    Bandwidth,
    Figure,
    Row,
    arithmetic_of,
    bandwidths_of,
    measure,
    summarise,
)

_LIBRARIES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13-libs",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
)


@dataclass(frozen=True)
class Config:
    """batches: numbers of chunks B; rounds: of up to 100 calls of each figure; starts: processes for the cold start."""

    bundle: Path
    backends: tuple[str, ...] = PREFERENCE
    batches: tuple[int, ...] = (1, 4096)
    rounds: int = 100
    starts: int = 5
    has_peers: bool = False


#: Rounds and starts of a first look: every percentile that is shown can still be told of a single chunk's calls.
QUICK_ROUNDS, QUICK_STARTS = 10, 1
#: A new process that loads a bundle and decodes takes about so long.
_START_SECONDS = 0.5


class Progress:
    """What is about to be done and about how long it takes, and then how far it is."""

    def __init__(self, line: ProgressLine | None = None) -> None:
        self._line, self._what, self._started = line, "", 0.0

    def begin(self, what: str) -> None:
        """Said once, in a log too."""
        if self._line is not None:
            self._line.clear()
            print(printable(what), file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        if self._line is not None:
            self._line.show(text)

    def show_round(self, what: str, number: int, rounds: int) -> None:
        """number: of the round that begins, from 0 on; those before tell how long the rest takes."""
        now = time.monotonic()
        if not number:
            self._started = now
        left = f", {_about((now - self._started) / number * (rounds - number))} left" if number else ""
        self.show(f"{what}: round {number + 1} of {rounds}{left}")

    def end(self) -> None:
        if self._line is not None:
            self._line.clear()


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_arguments(arguments)
    config = Config(
        bundle=options.bundle,
        backends=tuple(dict.fromkeys(options.backends)),
        batches=tuple(dict.fromkeys(options.batch)),
        rounds=options.rounds or (QUICK_ROUNDS if options.quick else Config.rounds),
        starts=options.starts if options.starts is not None else (QUICK_STARTS if options.quick else Config.starts),
        has_peers=options.peers,
    )
    try:
        if options.output is not None:
            # Before minutes are spent on figures that nobody could keep.
            refuse_existing(report_files(options.output), overwrite=options.overwrite)
            options.output.mkdir(parents=True, exist_ok=True)
        report = bench(config, Progress(ProgressLine()))
        print(report_text(report), end="")
        if options.output is not None:
            print("\n".join(printable(line) for line in write_report(report, options.output)))
    except TokenizerError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write to {options.output}: {error.strerror}; choose another folder", file=sys.stderr)
        return 2
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    defaults = Config(Path())
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=path_argument, help="folder written by `python export/build_engine.py`")
    parser.add_argument(
        "--backends", nargs="+", choices=PREFERENCE, default=list(PREFERENCE), help="default: every one that works here"
    )
    parser.add_argument(
        "--batch", nargs="+", type=_positive, default=list(defaults.batches), help="chunks a call, default: 1 4096"
    )
    parser.add_argument(
        "--rounds", type=_positive, help=f"of up to 100 calls of each figure, default: {defaults.rounds}"
    )
    parser.add_argument(
        "--starts", type=_natural, help=f"processes for the cold start, 0 for none, default: {defaults.starts}"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"a first look: {QUICK_ROUNDS} rounds and {QUICK_STARTS} start, where these are not given",
    )
    parser.add_argument("--peers", action="store_true", help="torch eager and compiled as well; needs torch")
    parser.add_argument("--output", type=path_argument, help="folder for bench.json, bench.txt and bench.png")
    parser.add_argument("--overwrite", action="store_true", help="replace figures that are there")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too small; expected at least 1")
    return number


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative; expected 0 or more")
    return number


def _about(seconds: float) -> str:
    return duration(seconds) if seconds < 1 else f"about {duration(seconds)}"


def expectation(config: Config, tokenizers: Sequence[ActionTokenizer]) -> str:
    """What is about to be done, and about how long it takes: a GPU's own figures and the peers' come on top."""
    names = ", ".join(tokenizer.backend.name for tokenizer in tokenizers)
    # Encoding and every decoder, with the tokenizer's checks and without.
    figures = sum(2 * (1 + len(tokenizer.model.prefixes)) for tokenizer in tokenizers)
    processes = (2 * config.starts + 1) * len(tokenizers) if config.starts else 0
    seconds = processes * _START_SECONDS + len(config.batches) * config.rounds * figures * ROUND_SECONDS
    starts = f"{counted(processes, 'new process', 'new processes')}, then " if processes else ""
    chunks = " and ".join(counted(batch, "chunk") for batch in config.batches)
    is_long = config.rounds > QUICK_ROUNDS
    return (
        f"measuring {names}: {starts}{counted(config.rounds, 'round')} of {counted(figures, 'figure')} with {chunks} a "
        f"call: {_about(seconds)} where nothing else runs{'; --quick takes a tenth' if is_long else ''}"
    )


def bench(config: Config, progress: Progress | None = None) -> Report:
    """Measure what works here. Raises BundleError, and BackendUnavailableError where no backend works at all."""
    progress = progress or Progress()
    bundle = open_bundle(config.bundle)
    missing: dict[str, str] = {}
    remarks: list[str] = []
    with contextlib.ExitStack() as scope:
        progress.show("opening backends")
        tokenizers = _open_all(scope, bundle, config.backends, missing)
        progress.begin(expectation(config, tokenizers))
        starts = tuple(_starts(bundle, tokenizers, config.starts, missing, progress))
        gpu = _open_gpu(missing, is_needed=any(t.backend.name in GPU_BACKENDS for t in tokenizers) or config.has_peers)
        trivial = _trivial_kernel(scope, gpu, missing)
        peers = _open_peers(scope, bundle, config, gpu, missing, progress)
        if peers is not None:
            missing.update(peers.unavailable)
            remarks += peers.remarks
        rows: list[Row] = []
        bandwidths: list[Bandwidth] = []
        arithmetic: list[Arithmetic] = []
        for batch in config.batches:
            with contextlib.ExitStack() as arrays:
                figures = list(_figures(arrays, tokenizers, batch, gpu, trivial, missing))
                figures += [figure for figure in peers.figures if figure.batch == batch] if peers else []

                def on_round(number: int, batch: int = batch) -> None:
                    progress.show_round(f"{counted(batch, 'chunk')} a call", number, config.rounds)

                taken, failed = measure(figures, config.rounds, on_round)
            missing.update(failed)
            rows += summarise(taken, bundle.manifest.model.chunk_length)
            bandwidths += bandwidths_of(taken)
            arithmetic += arithmetic_of(taken)
        progress.end()
        if not rows:
            reasons = "\n".join(f"  {name}: {reason}" for name, reason in missing.items())
            raise BackendUnavailableError(f"every call of every backend failed with {bundle.folder} here:\n{reasons}")
        model = bundle.manifest.model
        return Report(
            machine=machine_facts(gpu, {} if peers is None else peers.versions),
            bundle={
                "bundle": str(bundle.folder),
                "fingerprint": bundle.manifest.fingerprint,
                "model": f"{model.mode}, T {model.chunk_length}, A {model.action_dim}, D {model.latent_dim}, "
                f"L {model.num_layers}, K {model.num_levels}, hidden {model.hidden_width}",
            },
            backends={tokenizer.backend.name: tokenizer.backend.description for tokenizer in tokenizers},
            starts=starts,
            rows=tuple(rows),
            bandwidths=tuple(bandwidths),
            arithmetic=tuple(arithmetic),
            missing=missing,
            remarks=tuple(remarks),
        )


def _open_all(
    scope: contextlib.ExitStack, bundle: Bundle, names: Sequence[str], missing: dict[str, str]
) -> list[ActionTokenizer]:
    """Those that give the right answers; there is no point in how fast wrong ones come."""
    golden = read_golden(bundle.content(GOLDEN_NAME), bundle.manifest.model)
    tokenizers = []
    for name in names:
        try:
            backend = select_backend(name, bundle, golden)
        except TokenizerError as error:
            missing[name] = str(error)
            continue
        tokenizers.append(scope.enter_context(ActionTokenizer(bundle.manifest, backend)))
    if not tokenizers:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in missing.items())
        raise BackendUnavailableError(f"no backend can be measured with {bundle.folder} here:\n{reasons}")
    return tokenizers


def _starts(
    bundle: Bundle,
    tokenizers: Sequence[ActionTokenizer],
    processes: int,
    missing: dict[str, str],
    progress: Progress,
) -> Iterator[Start]:
    if not processes:
        return
    for tokenizer in tokenizers:
        name = tokenizer.backend.name
        progress.show(f"cold start of {name}")
        try:
            yield measure_start(bundle.folder, name, processes)
        except StartError as error:
            missing[f"cold start of {name}"] = str(error)


def _open_gpu(missing: dict[str, str], *, is_needed: bool) -> Any:
    """The module `bench_gpu`, or None where it has nothing to measure or no way to."""
    if not is_needed:
        return None
    try:
        from ..benchmark import gpu as bench_gpu

        bench_gpu.open_device()
    except (ImportError, BackendUnavailableError) as error:
        missing["floor and bandwidth of the GPU"] = str(error)
        return None
    return bench_gpu


def _trivial_kernel(scope: contextlib.ExitStack, gpu: Any, missing: dict[str, str]) -> Callable[[], None] | None:
    if gpu is None:
        return None
    try:
        call: Callable[[], None] = gpu.trivial_kernel(scope)
    except TokenizerError as error:
        missing["floor: a captured graph with one trivial kernel"] = str(error)
        return None
    return call


def _open_peers(
    scope: contextlib.ExitStack,
    bundle: Bundle,
    config: Config,
    gpu: Any,
    missing: dict[str, str],
    progress: Progress,
) -> Peers | None:
    if not config.has_peers:
        return None
    progress.show("starting the peers")
    try:
        floor = "" if gpu is None else gpu.TRIVIAL_KERNEL
        return scope.enter_context(open_peers(bundle.manifest.model, config.batches, floor))
    except BackendUnavailableError as error:
        missing["peers"] = str(error)
        return None


def _figures(
    scope: contextlib.ExitStack,
    tokenizers: Sequence[ActionTokenizer],
    size: int,
    gpu: Any,
    trivial: Callable[[], None] | None,
    missing: dict[str, str],
) -> Iterator[Figure]:
    """The floors first, then backend by backend."""
    batches = []
    for tokenizer in tokenizers:
        try:
            batches.append((tokenizer, random_batch(tokenizer, size)))
        except InferenceError as error:
            missing[f"{tokenizer.backend.name}, batch {size}"] = str(error)
    if gpu is not None and trivial is not None:
        yield gpu.trivial_figure(trivial, size)
    if gpu is not None and batches:
        yield from _gpu_figures(scope, *batches[0], gpu, missing)
    for tokenizer, batch in batches:
        name = tokenizer.backend.name
        yield from host_figures(tokenizer, batch, has_copies=name in GPU_BACKENDS)
        if gpu is not None and name in GPU_BACKENDS:
            try:
                yield from gpu.device_figures(scope, tokenizer, batch)
            except InferenceError as error:
                missing[f"{name}, device, batch {size}"] = str(error)


def _gpu_figures(
    scope: contextlib.ExitStack, tokenizer: ActionTokenizer, batch: Batch, gpu: Any, missing: dict[str, str]
) -> Iterator[Figure]:
    """Copies alone; bandwidth and arithmetic, which a single chunk has no use for."""
    try:
        yield from gpu.floor_figures(scope, tokenizer.model, batch)
        if batch.size > 1:
            yield from gpu.copy_figures(scope, batch.size)
            yield gpu.arithmetic_figure(scope, batch.size)
    except TokenizerError as error:
        missing[f"copies and arithmetic, batch {batch.size}"] = str(error)


def machine_facts(gpu: Any, versions: dict[str, str]) -> dict[str, str]:
    """What the figures depend on beside the bundle."""
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores usable",
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
    }
    if gpu is not None:
        device = gpu.open_device()
        facts["GPU"] = f"{device}, {device.memory / 1e9:.0f} GB"
        facts["driver"] = f"{_driver_version()}, CUDA {device.driver}"
    found = {"Python": platform.python_version(), **versions}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return {**facts, "system": platform.platform(), "versions": ", ".join(f"{n} {v}" for n, v in found.items())}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver_version() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "version not told"
    return next((word for word in text.split() if word.count(".") >= 1 and word[0].isdigit()), "version not told")
