"""One run of the benchmark: it opens what works here, and measures all figures in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.beliefs import decodes_beliefs
from ..backends.cpu_targets import cpu_info, system_text
from ..backends.registry import GPU_BACKENDS, PREFERENCE, select_backend
from ..bundle.arrays import Float64Array
from ..bundle.console import ProgressLine, duration
from ..bundle.errors import BackendUnavailableError, InferenceError, InvalidInputError, TokenizerError
from ..bundle.folder import Bundle, open_bundle
from ..bundle.golden import read_golden
from ..bundle.manifest import GOLDEN_NAME
from ..bundle.paths import counted
from ..tokenizer import ActionTokenizer
from . import timing
from .beliefs import belief_figures
from .processes import Peers, Start, StartError, measure_start, open_peers
from .report import Report, missing_lines
from .timing import BESIDE


@dataclass(frozen=True)
class Config:
    """batches: numbers of chunks B; rounds: of up to 100 calls of each figure; starts: processes for the cold start;
    beside: another bundle for the same chunks, whose calls are timed in turn with those of the first."""

    bundle: Path
    backends: tuple[str, ...] = PREFERENCE
    batches: tuple[int, ...] = (1, 4096)
    rounds: int = 100
    starts: int = 5
    has_peers: bool = False
    beside: Path | None = None


#: Rounds and starts of a first look: still enough calls with a single chunk for every percentile that is shown.
QUICK_ROUNDS, QUICK_STARTS = 10, 1
#: About how long a new process takes that loads a bundle and decodes.
_START_SECONDS = 0.5


class Progress(ProgressLine):
    """Says what is about to be done and about how long it takes, and then how far it is."""

    _started = 0.0

    def show_round(self, what: str, number: int, rounds: int) -> None:
        """Say which round begins, from 0 on; those before tell how long the rest takes."""
        now = time.monotonic()
        if not number:
            self._started = now
        left = f", {_about((now - self._started) / number * (rounds - number))} left" if number else ""
        self.show(f"{what}: round {number + 1} of {rounds}{left}")


def _about(seconds: float) -> str:
    return duration(seconds) if seconds < 1 else f"about {duration(seconds)}"


def expectation(config: Config, tokenizers: Sequence[ActionTokenizer], others: Sequence[ActionTokenizer] = ()) -> str:
    """What is about to be done, and about how long it takes: a GPU's own figures and the peers' come on top."""
    names = ", ".join(tokenizer.backend.name for tokenizer in tokenizers)
    # Encoding and decoding, with the tokenizer's checks and without; and distributions of one chunk.
    figures = sum(2 * (1 + len(tokenizer.model.key_prefixes)) for tokenizer in (*tokenizers, *others))
    beliefs = 8 * sum(decodes_beliefs(tokenizer.backend) for tokenizer in tokenizers) if 1 in config.batches else 0
    processes = (2 * config.starts + 1) * len(tokenizers) if config.starts else 0
    seconds = (
        processes * _START_SECONDS + (len(config.batches) * figures + beliefs) * config.rounds * timing.ROUND_SECONDS
    )
    more = f", and {counted(beliefs, 'figure')} of distributions" if beliefs else ""
    starts = f"{counted(processes, 'new process', 'new processes')}, then " if processes else ""
    chunks = " and ".join(counted(batch, "chunk") for batch in config.batches)
    is_long = config.rounds > QUICK_ROUNDS
    return (
        f"measuring {names}: {starts}{counted(config.rounds, 'round')} of {counted(figures, 'figure')} with {chunks} a "
        f"call{more}: {_about(seconds)} where nothing else runs{'; --quick takes a tenth' if is_long else ''}"
    )


def bench(config: Config, progress: Progress | None = None) -> Report:
    """Measure what works here. Raises BundleError, and BackendUnavailableError where no backend works at all."""
    with contextlib.ExitStack() as scope:
        return _Run(config, progress or Progress(is_silent=True), scope).report()


class _Run:
    """A run, and what it has open until `scope` ends."""

    def __init__(self, config: Config, progress: Progress, scope: contextlib.ExitStack) -> None:
        self._config, self._progress, self._scope = config, progress, scope
        self._bundle = open_bundle(config.bundle)
        self._beside = None if config.beside is None else _same_chunks(self._bundle, open_bundle(config.beside))
        self._missing: dict[str, str] = {}
        progress.show("opening backends")
        self._tokenizers = list(self._open_all(self._bundle))
        self._others = [] if self._beside is None else list(self._open_all(self._beside, BESIDE))
        if not self._tokenizers:
            raise self._unavailable("no backend can be measured")

    def report(self) -> Report:
        """Everything, measured."""
        config, bundle, model = self._config, self._bundle, self._bundle.manifest.model
        self._progress.begin(expectation(config, self._tokenizers, self._others))
        starts = tuple(self._starts())
        self._gpu = self._open_gpu()
        self._peers = self._open_peers()
        taken: dict[timing.Figure, Float64Array] = {}
        for batch in config.batches:
            what = f"{counted(batch, 'chunk')} a call"
            on_round = functools.partial(self._progress.show_round, what, rounds=config.rounds)
            with contextlib.ExitStack() as arrays:
                found, failed = timing.measure(list(self._figures(arrays, batch)), config.rounds, on_round)
            taken |= found
            self._missing.update(failed)
        self._progress.clear()
        rows = timing.summarise(taken, model.chunk_length)
        if not rows:
            raise self._unavailable("every call of every backend failed")
        return Report(
            machine=machine_facts(self._gpu, self._peers.versions),
            bundle={
                "bundle": str(bundle.folder),
                "fingerprint": bundle.manifest.fingerprint,
                "model": f"{model.mode}, {model.sizes_text}",
                **({} if self._beside is None else {"beside": _described(self._beside)}),
            },
            backends={found.backend.name: found.backend.description for found in self._tokenizers},
            starts=starts,
            rows=tuple(rows),
            bandwidths=tuple(timing.bandwidths_of(taken)),
            arithmetic=tuple(timing.arithmetic_of(taken)),
            missing=self._missing,
            remarks=self._peers.remarks,
        )

    def _unavailable(self, what: str) -> BackendUnavailableError:
        reasons = "\n".join(f"  {line}" for line in missing_lines(self._missing))
        return BackendUnavailableError(f"{what} with {self._bundle.folder} here:\n{reasons}")

    @contextlib.contextmanager
    def _noting(self, what: str, *errors: type[Exception]) -> Iterator[None]:
        """Go on after these errors; the report says that they kept `what` from being measured."""
        try:
            yield
        except errors as error:
            self._missing[what] = str(error)

    def _open_all(self, bundle: Bundle, suffix: str = "") -> Iterator[ActionTokenizer]:
        """The backends that give the right answers; how fast wrong ones come does not matter."""
        manifest = bundle.manifest
        golden = read_golden(bundle.content(GOLDEN_NAME), manifest.model)
        for name in self._config.backends:
            with self._noting(name + suffix, TokenizerError):
                backend = select_backend(name, bundle, golden)
                yield self._scope.enter_context(ActionTokenizer(manifest, backend))

    def _starts(self) -> Iterator[Start]:
        for tokenizer in self._tokenizers if self._config.starts else ():
            what = f"cold start of {tokenizer.backend.name}"
            self._progress.show(what)
            with self._noting(what, StartError):
                yield measure_start(self._bundle.folder, tokenizer.backend.name, self._config.starts)

    def _open_gpu(self) -> Any:
        """The module `gpu`, or None where it has nothing to measure or no way to."""
        if not self._config.has_peers and all(found.backend.name not in GPU_BACKENDS for found in self._tokenizers):
            return None
        with self._noting("floor and bandwidth of the GPU", ImportError, BackendUnavailableError):
            from . import gpu

            gpu.open_device()
            return gpu
        return None

    def _open_peers(self) -> Peers:
        if self._config.has_peers:
            self._progress.show("starting the peers")
            floor = "" if self._gpu is None else self._gpu.TRIVIAL_KERNEL
            # InvalidInputError: chunk tokens, which no peer has.
            with self._noting("peers", BackendUnavailableError, InvalidInputError):
                opened = open_peers(self._bundle.manifest.model, self._config.batches, floor)
                peers = self._scope.enter_context(opened)
                self._missing.update(peers.unavailable)
                return peers
        return Peers({}, (), {}, ())

    def _figures(self, arrays: contextlib.ExitStack, size: int) -> Iterator[timing.Figure]:
        """The figures of the floors, of each backend, and of the peers; their arrays are open until `arrays` ends."""
        gpu, batches = self._gpu, []
        for tokenizer in self._tokenizers:
            with self._noting(f"{tokenizer.backend.name}, batch {size}", InferenceError):
                batches.append((tokenizer, timing.random_batch(tokenizer, size)))
        if gpu is not None:
            with self._noting("floor: a captured graph with one trivial kernel", TokenizerError):
                yield gpu.trivial_figure(arrays, size)
        if gpu is not None and batches:
            with self._noting(f"copies and arithmetic, batch {size}", TokenizerError):
                yield from self._gpu_figures(arrays, *batches[0])
        for tokenizer, batch in batches:
            name = tokenizer.backend.name
            yield from timing.host_figures(tokenizer, batch, has_copies=name in GPU_BACKENDS)
            if size == 1:
                # A policy says one chunk at a time, and its logits are many times as large as the chunk.
                yield from belief_figures(tokenizer)
            if gpu is not None and name in GPU_BACKENDS:
                with self._noting(f"{name}, device, batch {size}", InferenceError):
                    yield from gpu.device_figures(arrays, tokenizer, batch)
                    if size == 1:
                        yield from gpu.device_belief_figures(arrays, tokenizer)
        for tokenizer in self._others:
            with self._noting(f"{tokenizer.backend.name}{BESIDE}, batch {size}", InferenceError):
                found = timing.host_figures(tokenizer, timing.random_batch(tokenizer, size), has_copies=False)
                yield from (dataclasses.replace(figure, backend=figure.backend + BESIDE) for figure in found)
        yield from (figure for figure in self._peers.figures if figure.batch == size)

    def _gpu_figures(
        self, arrays: contextlib.ExitStack, tokenizer: ActionTokenizer, batch: timing.Batch
    ) -> Iterator[timing.Figure]:
        """The copies alone; bandwidth and arithmetic too, unless for a single chunk, which neither limits."""
        yield from self._gpu.floor_figures(arrays, tokenizer.model, batch)
        if batch.size > 1:
            yield from self._gpu.copy_figures(arrays, batch.size)
            yield self._gpu.arithmetic_figure(arrays, batch.size)


def _same_chunks(bundle: Bundle, beside: Bundle) -> Bundle:
    """`beside`. Raises InvalidInputError unless both take the same chunks."""
    sizes = [(found.manifest.model.chunk_length, found.manifest.model.action_dim) for found in (bundle, beside)]
    if sizes[0] != sizes[1]:
        raise InvalidInputError(
            f"chunks [T, A] are {list(sizes[1])} in {beside.folder} and {list(sizes[0])} in {bundle.folder}; expected "
            "the same: give --beside a bundle for the same chunks"
        )
    return beside


def _described(bundle: Bundle) -> str:
    model = bundle.manifest.model
    return f"{bundle.folder}, {model.mode}, {model.sizes_text}"


# --- the machine ------------------------------------------------------------------------------------------------------


_LIBRARIES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13-libs",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
)


def machine_facts(gpu: Any, versions: Mapping[str, str]) -> dict[str, str]:
    """By name, for people. gpu: the module `gpu`, or None; versions: of other libraries."""
    processor = cpu_info("model name", "Hardware") or platform.processor() or platform.machine()
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": f"{processor}, {len(os.sched_getaffinity(0))} cores usable",
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


def _driver_version() -> str:
    words = system_text("/proc/driver/nvidia/version").split()
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "version not told")
