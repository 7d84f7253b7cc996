"""Engines for this machine, added to a bundle that was built elsewhere: needs neither torch nor a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from export.bundle_writer import stage_bundle
from export.c_builder import find_compiler
from export.engines import compile_graphs, compile_source, opened_backends, with_measurements
from export.errors import ExportError, require_none
from export.progress import StepList
from export.trt_builder import Profile
from runtime.bundle import Bundle, open_bundle
from runtime.contract import Backend
from runtime.golden import Golden, read_golden, replay
from runtime.manifest import C_HEADER, C_SOURCE, GOLDEN_NAME, EngineEntry, Manifest, ParityEntry
from runtime.trt_api import TENSORRT_BACKENDS, available_tensorrt

_ENGINES = ("c", *TENSORRT_BACKENDS)


@dataclass(frozen=True)
class TargetConfig:
    """bundle: the folder to add to; profile: batch sizes B.

    backends: None for every TensorRT that is installed, and for C where there is a compiler.
    """

    bundle: Path
    backends: tuple[str, ...] | None = None
    profile: Profile = field(default_factory=lambda: Profile(1, 1, 4096))

    def __post_init__(self) -> None:
        unknown = set(self.backends or ()) - set(_ENGINES)
        if unknown:
            raise ValueError(f"backends {sorted(unknown)} have no engines to add; there are {', '.join(_ENGINES)}")


def add_engines(config: TargetConfig) -> Manifest:
    """Compile graphs and C source for this machine, replay the golden vectors on it, and replace the bundle as a whole.

    The bundle is as it was unless every gate passed. Raises BundleError for no bundle, BackendUnavailableError
    without TensorRT or a GPU, EngineBuildError, CBuildError, GateError.
    """
    backends = _present() if config.backends is None else config.backends
    if not backends:
        raise ExportError(
            "neither a C compiler nor a TensorRT is here: install gcc or clang for C, or TensorRT with "
            f"pip install '.[{TENSORRT_BACKENDS[1]},gpu]'"
        )
    steps = StepList()
    with steps.step("open bundle") as step:
        bundle = open_bundle(config.bundle)
        manifest = bundle.manifest
        golden = read_golden(bundle.content(GOLDEN_NAME), manifest.model)
        step.note(f"{bundle.folder}: {manifest.model.mode}, fingerprint {manifest.fingerprint[:16]}")
    with stage_bundle(config.bundle, overwrite=True) as staged:
        graphs = [(graph, bundle.content(graph.file)) for graph in manifest.graphs_of("reduce")]
        added = compile_graphs(graphs, backends, config.profile, (), staged, steps)
        if "c" in backends:
            header, source = (bundle.content(file).decode() for file in (C_HEADER, C_SOURCE))
            added += compile_source(header, source, staged, steps)
        replaced = {entry.file for entry in added}
        kept = [entry for entry in manifest.engines if entry.file not in replaced]
        dropped = {
            file for entry in manifest.engines if entry.file in replaced for file in (entry.file, entry.kernel_cache)
        }
        for file in manifest.files.keys() - dropped:
            staged.write(file, bundle.content(file))
        manifest = replace(manifest, engines=(*kept, *added))
        staged.seal(manifest)
        with opened_backends(open_bundle(staged.folder), backends) as (opened, absent):
            if absent:
                raise ExportError("engines were built but cannot run here, so none is added:\n  " + "\n  ".join(absent))
            # The first word: C for a lesser target has that in its name too.
            engines_here = [backend for backend in opened if backend.name.split()[0] in backends]
            with steps.step("golden vectors") as step:
                parity = [entry for backend in engines_here for entry in _replayed(golden, bundle, backend)]
                for entry in parity:
                    step.note(f"{entry.backend}, {entry.gate}: {entry.value:.4g}, limit {entry.limit:.4g}")
                require_none(
                    f"{entry.backend}, {entry.gate}: {entry.value:g}; expected at most {entry.limit:g} ({entry.detail})"
                    for entry in parity
                    if not entry.value <= entry.limit
                )
            names = {backend.name for backend in engines_here}
            before = [entry for entry in manifest.parity if entry.backend not in names]
            engines: tuple[EngineEntry, ...] = with_measurements(manifest.engines, engines_here, staged)
        manifest = staged.seal(replace(manifest, engines=engines, parity=(*before, *parity)))
    print(f"\n✓ {config.bundle} has validated engines for {', '.join(sorted(names))} on this machine")
    return manifest


def _present() -> tuple[str, ...]:
    return (*(("c",) if find_compiler() is not None else ()), *available_tensorrt())


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
        )
        for check in replay(golden, bundle.manifest.model, backend).checks
    ]
