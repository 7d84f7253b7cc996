"""Engines for this machine, added to a bundle that was built elsewhere: needs neither torch nor a checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from rfsq.export.batches import Profile
from rfsq.export.bundle_writer import stage_bundle
from rfsq.export.c_builder import CBuildError, find_compiler
from rfsq.export.engines import (
    compile_cuda,
    compile_graphs,
    compile_source,
    find_gpu,
    opened_backends,
    with_measurements,
)
from rfsq.export.errors import BuildInputError, EngineBuildError, ExportError, require_none
from rfsq.export.progress import StepList
from rfsq.runtime.backends.contract import Backend
from rfsq.runtime.backends.replay import replay
from rfsq.runtime.backends.tensorrt_api import TENSORRT_BACKENDS, available_tensorrt
from rfsq.runtime.bundle.errors import BackendUnavailableError
from rfsq.runtime.bundle.folder import Bundle, open_bundle
from rfsq.runtime.bundle.golden import Golden, read_golden
from rfsq.runtime.bundle.manifest import (
    C_HEADER,
    C_SOURCE,
    CUDA_SOURCE,
    GOLDEN_NAME,
    EngineEntry,
    Manifest,
    ParityEntry,
)

_ENGINES = ("c", "cuda", *TENSORRT_BACKENDS)


@dataclass(frozen=True)
class TargetConfig:
    """bundle: the folder to add to; profile: batch sizes B.

    backends: all of them, or nothing is added; None for what can be proven here, of C, CUDA and every TensorRT that is
    installed.
    """

    bundle: Path
    backends: tuple[str, ...] | None = None
    profile: Profile = field(default_factory=lambda: Profile(1, 1, 4096))

    def __post_init__(self) -> None:
        unknown = set(self.backends or ()) - set(_ENGINES)
        if unknown:
            raise BuildInputError(f"backends {sorted(unknown)} have no engines to add; there are {', '.join(_ENGINES)}")


class _CannotRunError(ExportError):
    """reasons: by backend, why its engines cannot be made or run here."""

    def __init__(self, message: str, reasons: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = reasons or {}

    @classmethod
    def of(cls, reasons: Mapping[str, str]) -> Self:
        return cls(_listed(reasons), reasons)


def add_engines(config: TargetConfig) -> Manifest:
    """Compile graphs and C source for this machine, replay the golden vectors on it, and replace the bundle as a whole.

    The bundle is as it was unless every gate passed. Raises BundleError for no bundle, GateError, and ExportError where
    a backend that was asked for cannot be made or run here, or none can.
    """
    backends, left_out = _present()
    if config.backends is not None:
        try:
            return _add_all(config, config.backends)
        except _CannotRunError as error:
            others = [name for name in backends if name not in error.reasons]
            advice = f"\nadd what can be proven here with --backends {' '.join(others)}" if others else ""
            raise ExportError(f"no engine is added, for some cannot be made or run here:\n  {error}{advice}") from error
    while backends:
        try:
            manifest = _add_all(config, backends)
        except _CannotRunError as error:
            # Once more without it: nothing that was not proven stays, nor takes the place of what was there.
            left_out.update(error.reasons)
            backends = tuple(name for name in backends if name not in error.reasons)
        else:
            for name, reason in left_out.items():
                print(f"– {name} is left out: {reason}")
            return manifest
    raise ExportError(
        f"no engine can be added here: install gcc or clang for C, or TensorRT with pip install "
        f"'.[{TENSORRT_BACKENDS[1]},gpu]' on a machine with a GPU\n  {_listed(left_out)}"
    )


def _listed(reasons: Mapping[str, str]) -> str:
    return "\n  ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _add_all(config: TargetConfig, backends: tuple[str, ...]) -> Manifest:
    """Raises _CannotRunError where not all of them can be made and run here."""
    steps = StepList()
    with steps.step("open bundle") as step:
        bundle = open_bundle(config.bundle)
        manifest = bundle.manifest
        golden = read_golden(bundle.content(GOLDEN_NAME), manifest.model)
        step.note(f"{bundle.folder}: {manifest.model.mode}, fingerprint {manifest.fingerprint[:16]}")
    with stage_bundle(config.bundle, overwrite=True) as staged:
        graphs = [(graph, bundle.content(graph.file)) for graph in manifest.graphs_of("reduce")]
        added: tuple[EngineEntry, ...] = ()
        for name in backends:
            try:
                if name == "c":
                    header, source = (bundle.content(file).decode() for file in (C_HEADER, C_SOURCE))
                    added += compile_source(header, source, staged, steps)
                elif name == "cuda":
                    added += compile_cuda(bundle.content(CUDA_SOURCE).decode(), staged, steps)
                else:
                    added += compile_graphs(graphs, (name,), config.profile, (), staged, steps)
            except (BackendUnavailableError, CBuildError, EngineBuildError) as error:
                raise _CannotRunError.of({name: str(error)}) from error
        replaced = [entry for entry in manifest.engines if any(_takes_the_place(new, entry) for new in added)]
        kept = [entry for entry in manifest.engines if entry not in replaced]
        dropped = {file for entry in replaced for file in (entry.file, entry.kernel_cache)}
        for file in manifest.files.keys() - dropped:
            staged.write(file, bundle.content(file))
        manifest = replace(manifest, engines=(*kept, *added))
        staged.seal(manifest, is_proven=False)
        with opened_backends(open_bundle(staged.folder, is_proven=False), backends) as (opened, absent):
            if absent:
                raise _CannotRunError.of(absent)
            with steps.step("golden vectors") as step:
                parity = [entry for backend in opened for entry in _replayed(golden, bundle, backend)]
                for entry in parity:
                    step.note(f"{entry.backend}, {entry.gate}: {entry.value:.4g}, limit {entry.limit:.4g}")
                require_none(
                    f"{entry.backend}, {entry.gate}: {entry.value:g}; expected at most {entry.limit:g} ({entry.detail})"
                    for entry in parity
                    if not entry.value <= entry.limit
                )
            here = {(backend.name, backend.device) for backend in opened}
            before = [entry for entry in manifest.parity if (entry.backend, entry.device) not in here]
            engines: tuple[EngineEntry, ...] = with_measurements(manifest.engines, opened, staged)
        manifest = staged.seal(replace(manifest, engines=engines, parity=(*before, *parity)))
    print(f"\n✓ {config.bundle} has validated engines for {', '.join(sorted({name for name, _ in here}))} here")
    return manifest


def _takes_the_place(new: EngineEntry, old: EngineEntry) -> bool:
    """Whether the old engine is of no use beside the new one: else it might be the one that is run and proven."""
    is_same_library = (new.backend, new.version, new.source) == (old.backend, old.version, old.source)
    return new.file == old.file or (new.backend not in ("c", "cuda") and is_same_library)


def _present() -> tuple[tuple[str, ...], dict[str, str]]:
    """What can be compiled here and run, and why the rest of what is installed cannot."""
    backends, left_out = list[str](), dict[str, str]()
    if find_compiler() is None:
        left_out["c"] = "no C compiler is here; install gcc or clang, or name one in the environment as CC"
    else:
        backends.append("c")
    if reason := _why_no_gpu():
        generated = ("cuda",) if importlib.util.find_spec("cuda") else ()
        return tuple(backends), {**left_out, **dict.fromkeys((*generated, *available_tensorrt()), reason)}
    if find_gpu() is not None:
        backends.append("cuda")
    return (*backends, *available_tensorrt()), left_out


def _why_no_gpu() -> str:
    """Empty where there is one."""
    # Here, because it needs cuda-python, which a machine without a GPU need not have.
    try:
        from rfsq.runtime.backends.gpu.driver import open_device

        open_device()
    except (ImportError, BackendUnavailableError) as error:
        return str(error)
    return ""


def _replayed(golden: Golden, bundle: Bundle, backend: Backend) -> list[ParityEntry]:
    num_steps = golden.actions.shape[0] * golden.actions.shape[1]
    return [
        ParityEntry(
            backend.name,
            f"golden vectors, {check.gate}",
            num_steps,
            check.value,
            check.limit,
            check.detail or backend.description,
            backend.device,
        )
        for check in replay(golden, bundle.manifest.model, backend).checks
    ]
