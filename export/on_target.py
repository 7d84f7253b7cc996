"""Engines for this machine, added to a bundle that was built elsewhere: needs neither torch nor a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from export.batches import Profile
from export.bundle_writer import stage_bundle
from export.c_builder import find_compiler
from export.engines import compile_cuda, compile_graphs, compile_source, find_gpu, opened_backends, with_measurements
from export.errors import BuildInputError, ExportError, require_none
from export.progress import StepList
from runtime.bundle import Bundle, open_bundle
from runtime.contract import Backend
from runtime.golden import Golden, read_golden, replay
from runtime.manifest import C_HEADER, C_SOURCE, CUDA_SOURCE, GOLDEN_NAME, EngineEntry, Manifest, ParityEntry
from runtime.trt_api import TENSORRT_BACKENDS, available_tensorrt

_ENGINES = ("c", "cuda", *TENSORRT_BACKENDS)


@dataclass(frozen=True)
class TargetConfig:
    """bundle: the folder to add to; profile: batch sizes B.

    backends: None for every TensorRT that is installed, for C where there is a compiler, and for CUDA where there is
    a GPU.
    """

    bundle: Path
    backends: tuple[str, ...] | None = None
    profile: Profile = field(default_factory=lambda: Profile(1, 1, 4096))

    def __post_init__(self) -> None:
        unknown = set(self.backends or ()) - set(_ENGINES)
        if unknown:
            raise BuildInputError(f"backends {sorted(unknown)} have no engines to add; there are {', '.join(_ENGINES)}")


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
        if "cuda" in backends:
            added += compile_cuda(bundle.content(CUDA_SOURCE).decode(), staged, steps)
        replaced = [entry for entry in manifest.engines if any(_takes_the_place(new, entry) for new in added)]
        kept = [entry for entry in manifest.engines if entry not in replaced]
        dropped = {file for entry in replaced for file in (entry.file, entry.kernel_cache)}
        for file in manifest.files.keys() - dropped:
            staged.write(file, bundle.content(file))
        manifest = replace(manifest, engines=(*kept, *added))
        staged.seal(manifest)
        with opened_backends(open_bundle(staged.folder), backends) as (opened, absent):
            if absent:
                raise ExportError("engines were built but cannot run here, so none is added:\n  " + "\n  ".join(absent))
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


def _present() -> tuple[str, ...]:
    generated = (("c", find_compiler()), ("cuda", find_gpu()))
    return (*(name for name, needed in generated if needed is not None), *available_tensorrt())


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
