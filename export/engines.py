"""Compiles the engines of a bundle: from generated sources and graphs, for what is here or is asked for.

Engines of TensorRT and TensorRT-RTX are checked as they come out. They are FP32 in storage and strongly typed, with one
optimisation profile over the batch. Building twice need not give the same bytes: TensorRT-RTX writes counters of its
own into the engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from rfsq.export.bundle_writer import StagedBundle
from rfsq.export.c_builder import NO_COMPILER, compile_c, find_compiler
from rfsq.export.errors import BuildInputError, EngineBuildError, GateError, require_none
from rfsq.export.progress import Phase, phase
from rfsq.runtime.backends.contract import MOST_CHUNKS
from rfsq.runtime.backends.cpu_targets import host_targets
from rfsq.runtime.backends.tensorrt_api import EngineTensor, NoDeviceError, ProfileShapes, TrtApi, find_tensorrt
from rfsq.runtime.bundle.advice import install
from rfsq.runtime.bundle.backend_specs import BACKENDS, BackendSpec
from rfsq.runtime.bundle.errors import BackendUnavailableError, BundleError, EngineRefusedError
from rfsq.runtime.bundle.manifest import C_HEADER, C_SOURCE, CUDA_SOURCE, EngineEntry, GraphEntry, Manifest

if TYPE_CHECKING:
    from rfsq.runtime.backends.gpu.driver import GpuDevice


@dataclass(frozen=True)
class EngineSources:
    """What engines are compiled from, into and for.

    content: of each graph and source; staged: the bundle in the making, and manifest what is known of it; profile:
    batch sizes B, for engines that are tuned for some; compute_capabilities: such as 8.9, none for what the library
    builds by itself; present: engines that are in the bundle and stay.
    """

    staged: StagedBundle
    content: Callable[[str], bytes]
    manifest: Manifest
    profile: Profile
    compute_capabilities: tuple[str, ...] = ()
    present: tuple[EngineEntry, ...] = ()

    def source(self, file: str) -> bytes:
        """The content of a generated source. Raises EngineBuildError where the bundle has none."""
        try:
            return self.content(file)
        except (BundleError, FileNotFoundError) as error:
            raise EngineBuildError(f"the bundle has no {file}: its model was too large for one") from error


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
    for graph in sources.manifest.every_graph_of("reduce"):
        content, profile = sources.content(graph.file), profile_of(graph, sources.profile)
        built = build_engine(backend, content, profile, capabilities, graph.prefix)
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
    header, source = sources.source(C_HEADER), sources.source(C_SOURCE)
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
    source, gpu = sources.source(CUDA_SOURCE), _gpu()
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


@dataclass(frozen=True)
class Profile:
    """Batch sizes B of an engine: smallest, tuned for, largest. T is fixed in the graph."""

    minimum: int = 1
    optimum: int = 1
    maximum: int = 4096

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum <= MOST_CHUNKS:
            raise BuildInputError(
                f"profile has minimum {self.minimum}, optimum {self.optimum}, maximum {self.maximum}; "
                f"expected 1 <= minimum <= optimum <= maximum <= {MOST_CHUNKS}"
            )


#: Of engines that decode probabilities. Numpy makes these, some tens of chunks at a time (`graph_beliefs.py`), and a
#: chunk of chunk tokens takes 1.3 MB of the GPU.
_BELIEF_PROFILE = Profile(1, 1, 32)


def profile_of(graph: GraphEntry, wanted: Profile) -> Profile:
    """Batch sizes of this graph's engine."""
    return _BELIEF_PROFILE if graph.role == "belief" else wanted


@dataclass(frozen=True)
class BuiltEngine:
    """A serialised engine, the tensors of its network, and what TensorRT complained about, each complaint once.

    most_tokens: see `build_engine`.
    """

    backend: str
    version: str
    profile: Profile
    most_tokens: int
    serialized: bytes = field(repr=False)
    tensors: tuple[EngineTensor, ...]
    warnings: tuple[str, ...]


def build_engine(
    backend: str,
    onnx_bytes: bytes,
    profile: Profile,
    compute_capabilities: tuple[str, ...] = (),
    most_tokens: int = 0,
) -> BuiltEngine:
    """Build one engine.

    Args:
        backend: `tensorrt` or `tensorrt-rtx`.
        onnx_bytes: the graph; the first dimension of its inputs is dynamic, and that of chunk tokens in the second.
        profile: batch sizes B.
        compute_capabilities: such as `("8.9", "12.0")`; empty for the library's default targets, which is the present
            GPU for `tensorrt` and the portable engine for `tensorrt-rtx`.
        most_tokens: of a chunk, where their number is dynamic; the engine is tuned for them all.

    Raises:
        BackendUnavailableError: the library is not installed.
        EngineBuildError: anything else that stops the build.
    """
    api = find_tensorrt(backend)
    try:
        api.check_compute_capabilities(compute_capabilities)
    except ValueError as error:
        raise EngineBuildError(str(error)) from error
    with api.collect_messages() as messages:
        try:
            serialized, tensors = _build(api, onnx_bytes, (profile, most_tokens), compute_capabilities)
        except (TypeError, ValueError, RuntimeError) as error:
            reasons = dict.fromkeys([str(error), *(message.text for message in messages if message.is_error)])
            raise EngineBuildError("\n  ".join([f"{api.tag} could not build the engine:", *reasons])) from error
    warnings = (message.text for message in messages if message.is_error or message.severity == "WARNING")
    return BuiltEngine(backend, api.version, profile, most_tokens, serialized, tensors, tuple(dict.fromkeys(warnings)))


def _build(
    api: TrtApi, onnx_bytes: bytes, extents: tuple[Profile, int], compute_capabilities: tuple[str, ...]
) -> tuple[bytes, tuple[EngineTensor, ...]]:
    trt = api.module
    builder = trt.Builder(api.logger)
    network = builder.create_network(api.network_flags)
    parser = trt.OnnxParser(network, api.logger)
    if not parser.parse(onnx_bytes):
        reasons = (str(parser.get_error(index)) for index in range(parser.num_errors))
        raise ValueError("\n  ".join(["Failed to parse the ONNX model", *reasons]))
    config = builder.create_builder_config()
    api.apply_build_settings(config, compute_capabilities)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = _shapes_at(tensor.name, tuple(tensor.shape), *extents)
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise ValueError("it gave no engine")
    return bytes(serialized), api.network_tensors(network, profile)


def _shapes_at(name: str, shape: tuple[int, ...], batches: Profile, most_tokens: int) -> ProfileShapes:
    """The shapes an input of `shape` (-1 where dynamic) takes at the three batch sizes."""
    sizes = astuple(batches)
    if shape == (-1, -1) and most_tokens:
        return ProfileShapes(*zip(sizes, (1, most_tokens, most_tokens), strict=True))
    if not shape or shape[0] != -1 or -1 in shape[1:]:
        raise ValueError(f"input {name!r} has shape {shape}; expected a dynamic first dimension and no other")
    return ProfileShapes(*((batch, *shape[1:]) for batch in sizes))


def inspect_engine(built: BuiltEngine) -> tuple[Literal["engine", "network"], tuple[EngineTensor, ...]]:
    """The tensors that the engine itself has where TensorRT can tell, else those of its network; and whose they are.

    TensorRT deserialises engines on a machine with a GPU alone. Without one it still refuses bytes with a wrong
    header or length, but tells nothing about the tensors.

    Raises EngineRefusedError for an engine that TensorRT rejects.
    """
    api = find_tensorrt(built.backend)
    try:
        # Bound to a name so that the runtime outlives the engine.
        runtime = api.create_runtime()
        return "engine", api.engine_tensors(api.deserialize(runtime, built.serialized))
    except NoDeviceError:
        return "network", built.tensors


def differences(built: BuiltEngine, graph: GraphEntry, found: Sequence[EngineTensor]) -> Iterator[str]:
    """A line for everything in which the tensors of an engine are not what the graph and the profile ask for.

    Compares each tensor's name, mode, dtype, shape and profile. found: see `inspect_engine`.
    """
    expected = [
        EngineTensor(
            part.name,
            "input",
            part.dtype,
            part.shape,
            _shapes_at(part.name, part.shape, built.profile, built.most_tokens),
        )
        for part in graph.inputs
    ]
    expected += [EngineTensor(part.name, "output", part.dtype, part.shape) for part in graph.outputs]
    others = {tensor.name: tensor for tensor in found}
    for wanted in expected:
        tensor = others.pop(wanted.name, None)
        label = f"{wanted.mode} {wanted.name!r}"
        if tensor is None:
            yield f"{label} of the graph is missing"
            continue
        for what in ("mode", "dtype", "shape", "profile"):
            if getattr(tensor, what) != getattr(wanted, what):
                yield f"{label}: {what} is {getattr(tensor, what)}, the graph asks for {getattr(wanted, what)}"
    for tensor in others.values():
        yield f"{tensor.mode} {tensor.name!r} is not in the graph"
