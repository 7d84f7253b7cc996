"""Engines on their way into a bundle: compiled, opened as the robot would, and recorded as measured."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rfsq.export.batches import Profile
from rfsq.export.bundle_writer import StagedBundle
from rfsq.export.c_builder import CBuildError, compile_c
from rfsq.export.cuda_flags import CUDA_FLAGS
from rfsq.export.errors import EngineBuildError, require_none
from rfsq.export.progress import StepList
from rfsq.runtime.backends.c import CBackend
from rfsq.runtime.backends.contract import MOST_CHUNKS, Backend
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.backends.registry import GPU_ENGINES, create_backend
from rfsq.runtime.backends.tensorrt_api import TENSORRT_BACKENDS, available_tensorrt, find_tensorrt
from rfsq.runtime.bundle.errors import BackendUnavailableError
from rfsq.runtime.bundle.folder import Bundle
from rfsq.runtime.bundle.manifest import C_SOURCE, CUDA_SOURCE, EngineEntry, GraphEntry

if TYPE_CHECKING:
    from rfsq.runtime.backends.gpu.driver import GpuDevice

#: What can run a bundle's graphs as they are: the first anywhere, the second where its library finds a GPU.
_GRAPH_BACKENDS = ("onnxruntime", "onnxruntime-cuda")


def compile_graphs(
    graphs: Sequence[tuple[GraphEntry, bytes]],
    backends: Sequence[str] | None,
    profile: Profile,
    compute_capabilities: Sequence[str],
    staged: StagedBundle,
    steps: StepList,
) -> tuple[EngineEntry, ...]:
    """Compile every graph for every TensorRT asked for, for every one installed where `backends` is None.

    What comes out is inspected and recorded as built; whether it is right is for the gates to say.
    """
    wanted = available_tensorrt() if backends is None else backends
    if not set(wanted) & set(TENSORRT_BACKENDS):
        return ()
    # Here, because it needs onnx and polygraphy, which a robot that compiles C alone need not have.
    from rfsq.export.trt_builder import EngineRequest, build_engine, check_engine, inspect_engine

    engines = []
    for backend in (name for name in TENSORRT_BACKENDS if name in wanted):
        with steps.step(f"compile {backend}") as step:
            for graph, content in graphs:
                built = build_engine(EngineRequest(backend, content, profile, tuple(compute_capabilities)))
                require_none(f"{backend}, {graph.file}: {problem}" for problem in check_engine(built, content))
                description = inspect_engine(built)
                targets = built.compute_capabilities or _only_target(backend)
                target = "-".join(f"sm{name.replace('.', '')}" for name in targets) or "default"
                stem = graph.file.rpartition("/")[2].removesuffix(".onnx")
                file = f"engines/{backend}-{built.version}-{target}/{stem}-{built.onnx_sha256[:12]}.engine"
                staged.write(file, built.serialized)
                engines.append(
                    _unproven(
                        backend=backend,
                        version=built.version,
                        targets=targets,
                        source=graph.file,
                        source_sha256=built.onnx_sha256,
                        file=file,
                        profile=(profile.minimum, profile.optimum, profile.maximum),
                        detail=f"inspected ({description.source}), not run",
                    )
                )
                step.note(f"{file.rpartition('/')[2]} {len(built.serialized) / 1e6:.1f} MB")
            step.note(f"built for {backend} {built.version}, target {target}")
    return tuple(engines)


def compile_source(header: str, source: str, staged: StagedBundle, steps: StepList) -> tuple[EngineEntry, ...]:
    """Compile the generated C for every target that this machine can run: what cannot be proven here is not built.

    Raises CBuildError.
    """
    engines = []
    with steps.step("compile c") as step:
        *better, least = host_targets()
        for target in (*better, least):
            try:
                library = compile_c(header, source, target)
            except CBuildError as error:
                if target == least:
                    raise
                # An old compiler may not know the level; every one knows the least.
                step.note(f"NOT {target}: {str(error).splitlines()[-1]}")
                continue
            file = f"engines/c/{target}/librfsq_tokenizer.so"
            staged.write(file, library.content)
            engines.append(
                _unproven(
                    backend="c",
                    version=library.compiler,
                    targets=(target,),
                    source=C_SOURCE,
                    source_sha256=hashlib.sha256(source.encode()).hexdigest(),
                    file=file,
                    profile=(1, 1, MOST_CHUNKS),
                    detail="compiled, not run",
                )
            )
            step.note(f"{target} {len(library.content) / 1000:.0f} kB, {library.compiler}")
    return tuple(engines)


def find_gpu() -> GpuDevice | None:
    """This machine's GPU, where there is one, with cuda-python to use it and NVRTC to compile for it."""
    try:
        from rfsq.runtime.backends.gpu.driver import open_device
        from rfsq.runtime.backends.gpu.kernels import KernelError, nvrtc_version

        gpu = open_device()
    except (ImportError, BackendUnavailableError):
        return None
    try:
        nvrtc_version()
    except KernelError as error:
        print(f"  the generated CUDA is not compiled for {gpu}: {error}")
        return None
    return gpu


def compile_cuda(source: str, staged: StagedBundle, steps: StepList) -> tuple[EngineEntry, ...]:
    """Compile the generated CUDA for this machine's GPU: what cannot be proven here is not built.

    Raises BackendUnavailableError without a GPU or cuda-python, EngineBuildError where NVRTC is missing or refuses the
    source.
    """
    # Here, because they need cuda-python, which a machine without a GPU need not have.
    try:
        from rfsq.runtime.backends.gpu.driver import open_device
        from rfsq.runtime.backends.gpu.kernels import KernelError, compile_kernels, nvrtc_version
    except ImportError as error:
        raise BackendUnavailableError(
            f"the generated CUDA cannot be compiled: {error}; install cuda-python and NVRTC with: pip install '.[gpu]'"
        ) from error

    with steps.step("compile cuda") as step:
        gpu = open_device()
        try:
            version = nvrtc_version()
            content = compile_kernels(source, CUDA_SOURCE.rpartition("/")[2], gpu.compute_capability, CUDA_FLAGS)
        except KernelError as error:
            raise EngineBuildError(str(error)) from error
        file = f"engines/cuda/sm{gpu.compute_capability.replace('.', '')}/rfsq_tokenizer.cubin"
        staged.write(file, content)
        step.note(f"{file.rpartition('/')[2]} {len(content) / 1000:.0f} kB, {version}, {gpu}")
    return (
        _unproven(
            backend="cuda",
            version=version,
            targets=(gpu.compute_capability,),
            source=CUDA_SOURCE,
            source_sha256=hashlib.sha256(source.encode()).hexdigest(),
            file=file,
            profile=(1, 1, MOST_CHUNKS),
            detail="compiled, not run",
        ),
    )


def _unproven(**known: Any) -> EngineEntry:
    """An engine that nothing has run yet."""
    return EngineEntry(status="built", precision="not measured", device="", kernel_cache="", **known)


def _only_target(backend: str) -> tuple[str, ...]:
    """This machine's GPU for a library that builds for no other; empty for one with a portable target."""
    if find_tensorrt(backend).compute_capabilities:
        return ()
    from rfsq.runtime.backends.gpu.driver import open_device

    return (open_device().compute_capability,)


@contextlib.contextmanager
def opened_backends(
    bundle: Bundle, wanted: Sequence[str] | None, *, required: Sequence[str] = ()
) -> Iterator[tuple[list[Backend], dict[str, str]]]:
    """Every backend that runs here, and why every other one does not; closed when the block ends.

    wanted: None for all. Engines that are asked for may be for another machine. Raises BackendUnavailableError where
    one that is required does not run.
    """
    engines = {entry.backend for entry in bundle.manifest.engines}
    names = [name for name in (*_GRAPH_BACKENDS, *GPU_ENGINES) if wanted is None or name in wanted]
    names += [name for name in required if name not in names]
    compiled = [entry.targets[0] for entry in bundle.manifest.engines if entry.backend == "c"]
    with contextlib.ExitStack() as stack:
        backends: list[Backend] = []
        absent: dict[str, str] = {}
        for name in names:
            if name in GPU_ENGINES and name not in engines:
                continue
            try:
                backends.append(stack.enter_context(contextlib.closing(create_backend(name, bundle))))
            except BackendUnavailableError as error:
                if name in required:
                    raise
                absent[name] = str(error)
        if wanted is None or "c" in wanted:
            # Of this machine's own kinds all run, the lesser ones too.
            backends += [CBackend(bundle, target) for target in host_targets() if target in compiled]
        yield backends, absent


def with_measurements(
    engines: Sequence[EngineEntry], backends: Sequence[Backend], staged: StagedBundle
) -> tuple[EngineEntry, ...]:
    """The entries of engines that have just passed the gates, as validated on what they ran on; the others as they are.

    Kernels that TensorRT-RTX compiled on the way are written beside their engine.
    """
    measured = {}
    for backend in backends:
        if isinstance(backend, CBackend):
            measured[backend.entry.file] = _validated(backend.entry, backend)
        if backend.name not in GPU_ENGINES:
            continue
        # Here, because it needs cuda-python, which a machine without a GPU need not have.
        from rfsq.runtime.backends.cuda import CudaBackend
        from rfsq.runtime.backends.tensorrt import TrtBackend

        if isinstance(backend, CudaBackend):
            measured[backend.entry.file] = _validated(backend.entry, backend)
            continue
        assert isinstance(backend, TrtBackend)
        for function in backend.engines:
            entry = function.entry
            content = function.kernel_cache_content()
            kernel_cache = f"{entry.file}.kernels" if content else ""
            if content:
                staged.write(kernel_cache, content)
            entry = _validated(entry, backend)
            measured[entry.file] = replace(entry, kernel_cache=kernel_cache)
    return tuple(measured.get(entry.file, entry) for entry in engines)


def _validated(entry: EngineEntry, backend: Backend) -> EngineEntry:
    detail = f"passed the gates through {backend.description}"
    return replace(entry, status="validated", precision="fp32", device=backend.device, detail=detail)
