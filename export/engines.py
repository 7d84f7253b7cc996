"""TensorRT engines on their way into a bundle: compiled, opened as the robot would, and recorded as measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from tqdm import tqdm

from export.bundle_writer import StagedBundle
from export.errors import require_none
from export.progress import StepList
from export.trt_builder import EngineRequest, Profile, build_engine, check_engine, inspect_engine
from runtime.backends import create_backend
from runtime.bundle import Bundle
from runtime.contract import Backend
from runtime.errors import BackendUnavailableError
from runtime.manifest import EngineEntry, GraphEntry
from runtime.trt_api import TENSORRT_BACKENDS, available_tensorrt, find_tensorrt

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
    engines = []
    for backend in (name for name in TENSORRT_BACKENDS if name in wanted):
        with steps.step(f"compile {backend}") as step:
            for graph, content in tqdm(graphs, desc=f"  {backend}", unit="engine", leave=False, disable=None):
                built = build_engine(EngineRequest(backend, content, profile, tuple(compute_capabilities)))
                require_none(f"{backend}, {graph.file}: {problem}" for problem in check_engine(built, content))
                description = inspect_engine(built)
                targets = built.compute_capabilities or _only_target(backend)
                target = "-".join(f"sm{name.replace('.', '')}" for name in targets) or "default"
                stem = graph.file.rpartition("/")[2].removesuffix(".onnx")
                file = f"engines/{backend}-{built.version}-{target}/{stem}-{built.onnx_sha256[:12]}.engine"
                staged.write(file, built.serialized)
                engines.append(
                    EngineEntry(
                        backend=backend,
                        version=built.version,
                        compute_capabilities=targets,
                        graph=graph.file,
                        onnx_sha256=built.onnx_sha256,
                        file=file,
                        profile=(profile.minimum, profile.optimum, profile.maximum),
                        status="built",
                        precision="not measured",
                        device="",
                        kernel_cache="",
                        detail=f"inspected ({description.source}), not run",
                    )
                )
                step.note(f"{file.rpartition('/')[2]} {len(built.serialized) / 1e6:.1f} MB")
            step.note(f"built for {backend} {built.version}, target {target}")
    return tuple(engines)


def _only_target(backend: str) -> tuple[str, ...]:
    """This machine's GPU for a library that builds for no other; empty for one with a portable target."""
    if find_tensorrt(backend).compute_capabilities:
        return ()
    from runtime.cuda_api import open_device

    return (open_device().compute_capability,)


@contextlib.contextmanager
def opened_backends(bundle: Bundle, wanted: Sequence[str] | None) -> Iterator[tuple[list[Backend], list[str]]]:
    """Every backend that runs here, and a line for every one that does not; closed when the block ends.

    wanted: None for all. Engines that are asked for may be for another machine, so only ONNX Runtime has to run.
    Raises BackendUnavailableError where it does not, on the CPU or, where it is asked for, on the GPU.
    """
    engines = {entry.backend for entry in bundle.manifest.engines}
    always, *optional = (*_GRAPH_BACKENDS, *TENSORRT_BACKENDS)
    names = [always, *(name for name in optional if wanted is None or name in wanted)]
    with contextlib.ExitStack() as stack:
        backends: list[Backend] = []
        absent: list[str] = []
        for name in names:
            if name in TENSORRT_BACKENDS and name not in engines:
                continue
            try:
                backends.append(stack.enter_context(contextlib.closing(create_backend(name, bundle))))
            except BackendUnavailableError as error:
                if name == always or (name in _GRAPH_BACKENDS and wanted is not None):
                    raise
                absent.append(f"{name}: {error}")
        yield backends, absent


def with_measurements(
    engines: Sequence[EngineEntry], backends: Sequence[Backend], staged: StagedBundle
) -> tuple[EngineEntry, ...]:
    """The entries of engines that have just passed the gates, as validated on this GPU; the others as they are.

    Kernels that TensorRT-RTX compiled on the way are written beside their engine.
    """
    measured = {}
    for backend in backends:
        if backend.name not in TENSORRT_BACKENDS:
            continue
        # Here, because it needs cuda-python, which a machine without a GPU need not have.
        from runtime.trt_backend import TrtBackend

        assert isinstance(backend, TrtBackend)
        for function in backend.engines:
            entry = function.entry
            content = function.kernel_cache_content()
            kernel_cache = f"{entry.file}.kernels" if content else ""
            if content:
                staged.write(kernel_cache, content)
            measured[entry.file] = replace(
                entry,
                status="validated",
                precision="fp32",
                device=str(backend.device),
                kernel_cache=kernel_cache,
                detail=f"passed the gates through {backend.description}",
            )
    return tuple(measured.get(entry.file, entry) for entry in engines)
