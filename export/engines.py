"""Compiles the engines of a bundle: from generated sources and graphs, for what is here or is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from rfsq.export.bundle_writer import StagedBundle
from rfsq.export.c_builder import NO_COMPILER, compile_c, find_compiler
from rfsq.export.errors import EngineBuildError, GateError, require_none
from rfsq.export.progress import Phase, phase
from rfsq.export.trt_builder import Profile, build_engine, differences, inspect_engine
from rfsq.runtime.backends.contract import MOST_CHUNKS
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.backends.tensorrt_api import find_tensorrt
from rfsq.runtime.bundle.advice import install
from rfsq.runtime.bundle.backend_specs import BACKENDS, BackendSpec
from rfsq.runtime.bundle.errors import BackendUnavailableError, EngineRefusedError
from rfsq.runtime.bundle.manifest import C_HEADER, C_SOURCE, CUDA_SOURCE, EngineEntry, GraphEntry

if TYPE_CHECKING:
    from rfsq.runtime.backends.gpu.driver import GpuDevice


@dataclass(frozen=True)
class EngineSources:
    """What engines are compiled from, into and for.

    content: of each graph and source; graphs: those of the form `reduce`; staged: the bundle in the making; profile:
    batch sizes B, for engines that are tuned for some; compute_capabilities: such as 8.9, none for what the library
    builds by itself; present: engines that are in the bundle and stay.
    """

    staged: StagedBundle
    content: Callable[[str], bytes]
    graphs: tuple[GraphEntry, ...]
    profile: Profile
    compute_capabilities: tuple[str, ...] = ()
    present: tuple[EngineEntry, ...] = ()


def compilable(*, to_run: bool) -> tuple[tuple[str, ...], dict[str, str]]:
    """Backends whose engines can be compiled here, and why those of the others that are installed cannot.

    to_run: here, too. Without, those for another machine's GPU count, and a GPU that is not here is no news.
    """
    chosen, reasons = list[str](), dict[str, str]()
    for name, spec in BACKENDS.items():
        if spec.engine_source is None or not spec.is_installed:
            continue
        try:
            require_means(spec, to_run=to_run)
        except BackendUnavailableError as error:
            if to_run:
                reasons[name] = str(error)
        except EngineBuildError as error:
            reasons[name] = str(error)
        else:
            chosen.append(name)
    return tuple(chosen), reasons


def require_means(spec: BackendSpec, *, to_run: bool) -> None:
    """Raises BackendUnavailableError where the GPU that is needed is not here, EngineBuildError without a compiler."""
    if spec.is_on_gpu and (to_run or spec.engine_source == "cuda"):
        _gpu()
    if spec.engine_source == "c" and not find_compiler():
        raise EngineBuildError(NO_COMPILER)
    if spec.engine_source == "cuda":
        from rfsq.runtime.backends.gpu.kernels import KernelError, nvrtc_version

        try:
            nvrtc_version()
        except KernelError as error:
            raise EngineBuildError(f"the generated CUDA is not compiled for {_gpu()}: {error}") from error


def compile_engines(backend: str, sources: EngineSources) -> tuple[EngineEntry, ...]:
    """Compile all engines of a backend into the bundle; none for one that runs graphs as they are.

    The gates judge later whether they are right. Raises BackendUnavailableError where a library or the GPU is missing,
    EngineBuildError where something does not compile, GateError where an engine is not what was asked for.
    """
    compilers = {"c": _compile_c, "cuda": _compile_cuda, "graphs": _compile_graphs}
    source = BACKENDS[backend].engine_source
    if source is None:
        return ()
    with phase(f"compile {backend}") as current:
        return compilers[source](backend, sources, current)


def _compile_graphs(backend: str, sources: EngineSources, current: Phase) -> tuple[EngineEntry, ...]:
    engines, capabilities = [], sources.compute_capabilities
    for graph in sources.graphs:
        content, profile = sources.content(graph.file), sources.profile
        built = build_engine(backend, content, profile, capabilities)
        try:
            origin, tensors = inspect_engine(built)
        except (EngineRefusedError, BackendUnavailableError) as error:
            raise GateError(f"{backend}, {graph.file}: {error}") from error
        require_none(f"{backend}, {graph.file}: {problem}" for problem in differences(built, graph, tensors))
        targets = capabilities or _only_target(backend)
        target = "-".join(f"sm{name.replace('.', '')}" for name in targets) or "default"
        stem = f"{PurePosixPath(graph.file).stem}-{_sha256(content)[:12]}"
        entry = _written(
            sources,
            built.serialized,
            backend=backend,
            version=built.version,
            targets=targets,
            source=graph.file,
            file=f"engines/{backend}-{built.version}-{target}/{stem}.engine",
            profile=astuple(profile),
            detail=f"inspected ({origin}), not run",
        )
        engines.append(entry)
        current.note(f"{stem}.engine {len(built.serialized) / 1e6:.1f} MB")
        current.note(*(f"{backend} warns: {warning}" for warning in built.warnings))
    current.note(f"built for {backend} {engines[0].version}, target {target}")
    return tuple(engines)


def _compile_c(backend: str, sources: EngineSources, current: Phase) -> tuple[EngineEntry, ...]:
    """For every target that this machine can run: what cannot be proven here is not built."""
    header, source = sources.content(C_HEADER), sources.content(C_SOURCE)
    engines = []
    least = host_targets()[-1]
    there = {target for entry in sources.present if entry.backend == backend for target in entry.targets}
    for target in host_targets():
        if target in there:
            continue
        try:
            library = compile_c(header.decode(), source.decode(), target)
        except EngineBuildError as error:
            if target == least:
                raise
            # An old compiler may not know the level; every one knows the least.
            current.note(f"NOT {target}: {str(error).splitlines()[-1]}")
            continue
        engines.append(
            _written(
                sources,
                library.content,
                backend=backend,
                version=library.compiler,
                targets=(target,),
                source=C_SOURCE,
                file=f"engines/c/{target}/librfsq_tokenizer.so",
            )
        )
        current.note(f"{target} {len(library.content) / 1000:.0f} kB, {library.compiler}")
    return tuple(engines)


def _compile_cuda(backend: str, sources: EngineSources, current: Phase) -> tuple[EngineEntry, ...]:
    """For this machine's GPU: what cannot be proven here is not built."""
    source, gpu = sources.content(CUDA_SOURCE), _gpu()
    # Here, because it needs cuda-python, which a machine without a GPU need not have.
    from rfsq.runtime.backends.gpu.kernels import KernelError, compile_kernels, nvrtc_version

    try:
        version = nvrtc_version()
        # The source says itself where a product and a sum round once; everything else rounds as IEEE 754 has it.
        content = compile_kernels(
            source.decode(), CUDA_SOURCE.rpartition("/")[2], gpu.compute_capability, may_fuse=False
        )
    except KernelError as error:
        raise EngineBuildError(str(error)) from error
    entry = _written(
        sources,
        content,
        backend=backend,
        version=version,
        targets=(gpu.compute_capability,),
        source=CUDA_SOURCE,
        file=f"engines/cuda/sm{gpu.compute_capability.replace('.', '')}/rfsq_tokenizer.cubin",
    )
    current.note(f"{entry.file.rpartition('/')[2]} {len(content) / 1000:.0f} kB, {version}, {gpu}")
    return (entry,)


def _written(sources: EngineSources, content: bytes, **known: Any) -> EngineEntry:
    """Write an engine that nothing has run yet. known: the fields of its entry that are not the same for all."""
    unproven = {"profile": (1, 1, MOST_CHUNKS), "detail": "compiled, not run", **known}
    unproven["source_sha256"] = _sha256(sources.content(known["source"]))
    entry = EngineEntry(status="built", precision="not measured", device="", kernel_cache="", **unproven)
    sources.staged.write(entry.file, content)
    return entry


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _only_target(backend: str) -> tuple[str, ...]:
    """This machine's GPU for a library that builds for no other; empty for one with a portable target."""
    return () if find_tensorrt(backend).compute_capabilities else (_gpu().compute_capability,)


def _gpu() -> GpuDevice:
    """Raises BackendUnavailableError where there is none, or no cuda-python to use it."""
    try:
        from rfsq.runtime.backends.gpu.driver import open_device
    except ImportError as error:
        raise BackendUnavailableError(
            f"CUDA cannot be used: {error}; install cuda-python and NVRTC with: {install('gpu')}"
        ) from error
    return open_device()
