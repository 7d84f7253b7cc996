"""Builds TensorRT and TensorRT-RTX engines from ONNX bytes through Polygraphy, and checks what came out.

Engines are FP32 in storage and strongly typed, with one optimisation profile over the batch. Building twice need not
give the same bytes: TensorRT-RTX writes counters of its own into the engine, so only an engine's hash, taken when it
was built, identifies it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import onnx

from rfsq.export.batches import Profile
from rfsq.export.errors import EngineBuildError
from rfsq.runtime.backends.tensorrt_api import (
    EngineDescription,
    EngineRefusedError,
    EngineTensor,
    LogMessage,
    ProfileShapes,
    TrtApi,
    find_tensorrt,
    read_engine,
)
from rfsq.runtime.bundle.errors import BackendUnavailableError

# The name under which Polygraphy looks for TensorRT-RTX, whatever the installed package is called.
_POLYGRAPHY_RTX_MODULE = "tensorrt_rtx"
_POLYGRAPHY_RTX_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"


@dataclass(frozen=True)
class EngineRequest:
    """What to build. `compute_capabilities` such as `("8.9", "12.0")`; empty for the library's default targets,
    which is the present GPU for `tensorrt` and the portable engine for `tensorrt-rtx`."""

    backend: str
    onnx_bytes: bytes = field(repr=False)
    profile: Profile
    compute_capabilities: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuiltEngine:
    """A serialised engine and all that is known about its making.

    `tensors` are those of the network before it was serialised; `sha256` is of `serialized`, `onnx_sha256` of the
    graph it was built from.
    """

    backend: str
    version: str
    compute_capabilities: tuple[str, ...]
    profile: Profile
    serialized: bytes = field(repr=False)
    sha256: str
    onnx_sha256: str
    tensors: tuple[EngineTensor, ...]
    build_seconds: float
    warnings: tuple[str, ...]


def build_engine(request: EngineRequest) -> BuiltEngine:
    """Builds one engine.

    Raises BackendUnavailableError without the library, EngineBuildError for everything that stops the build.
    """
    api = find_tensorrt(request.backend)
    try:
        api.check_compute_capabilities(request.compute_capabilities)
    except ValueError as error:
        raise EngineBuildError(str(error)) from error
    with api.collect_messages() as messages, _polygraphy_on(api) as polygraphy:
        started = time.perf_counter()
        try:
            serialized, tensors = _build(api, polygraphy, request)
        except (polygraphy.exception.PolygraphyException, TypeError, ValueError, RuntimeError) as error:
            raise EngineBuildError(_build_failure(api, error, messages)) from error
        seconds = time.perf_counter() - started
    return BuiltEngine(
        backend=request.backend,
        version=api.flavour.version,
        compute_capabilities=request.compute_capabilities,
        profile=request.profile,
        serialized=serialized,
        sha256=_sha256(serialized),
        onnx_sha256=_sha256(request.onnx_bytes),
        tensors=tensors,
        build_seconds=seconds,
        warnings=_warnings(messages),
    )


def _build(api: TrtApi, polygraphy: Any, request: EngineRequest) -> tuple[bytes, tuple[EngineTensor, ...]]:
    trt = polygraphy.backend.trt
    parsed = trt.network_from_onnx_bytes(request.onnx_bytes, strongly_typed=api.has_strongly_typed_flag)
    builder, network, _ = parsed
    # CreateConfig serves both libraries; CreateConfigRTX would leave TF32 on.
    config = trt.create_config(builder, network, profiles=[])
    api.apply_build_settings(config, request.compute_capabilities)
    profile = _batch_profile(trt, network, request.profile).to_trt(builder, network)
    config.add_optimization_profile(profile)
    serialized = bytes(trt.engine_bytes_from_network(parsed, config))
    return serialized, api.network_tensors(network, profile)


def _batch_profile(trt: Any, network: Any, batches: Profile) -> Any:
    profile = trt.Profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = _shapes_at(tensor.name, tuple(tensor.shape), batches)
        profile.add(tensor.name, shapes.minimum, shapes.optimum, shapes.maximum)
    return profile


def _shapes_at(name: str, shape: tuple[int, ...], batches: Profile) -> ProfileShapes:
    """The shapes an input of `shape` (-1 where dynamic) takes at the three batch sizes."""
    if not shape or shape[0] != -1 or -1 in shape[1:]:
        raise ValueError(f"input {name!r} has shape {shape}; expected a dynamic first dimension and no other")
    minimum, optimum, maximum = ((batch, *shape[1:]) for batch in (batches.minimum, batches.optimum, batches.maximum))
    return ProfileShapes(minimum, optimum, maximum)


def _build_failure(api: TrtApi, error: Exception, messages: Sequence[LogMessage]) -> str:
    reasons = dict.fromkeys([str(error), *(message.text for message in messages if message.is_error)])
    return "\n  ".join([f"{api.flavour.tag} could not build the engine:", *reasons])


def _warnings(messages: Sequence[LogMessage]) -> tuple[str, ...]:
    """What TensorRT complained about although it built the engine, each complaint once."""
    return tuple(
        dict.fromkeys(message.text for message in messages if message.is_error or message.severity == "WARNING")
    )


@contextlib.contextmanager
def _polygraphy_on(api: TrtApi) -> Iterator[Any]:
    """A copy of Polygraphy of its own that talks to `api`; afterwards everything is as it was.

    Polygraphy decides for TensorRT or TensorRT-RTX once per process, when it is imported. A copy that nobody else
    sees lets one process build for both, and spares the caller's Polygraphy and environment. Not for use while
    another thread imports Polygraphy.
    """
    is_rtx = api.flavour.backend == "tensorrt-rtx"
    aliases = {_POLYGRAPHY_RTX_MODULE: api.module} if is_rtx else {}
    with _environment(_POLYGRAPHY_RTX_SWITCH, "1" if is_rtx else "0"), _fresh_modules("polygraphy", aliases):
        trt = importlib.import_module("polygraphy.backend.trt")
        trt_util = importlib.import_module("polygraphy.backend.trt.util")
        # Through this logger the parser's and the builder's reasons reach the error message.
        vars(trt_util)["TRT_LOGGER"] = api.logger
        exception = importlib.import_module("polygraphy.exception")
        logger = importlib.import_module("polygraphy.logger").G_LOGGER
        logger.module_severity = logger.CRITICAL + 1
        yield SimpleNamespace(backend=SimpleNamespace(trt=trt), exception=exception)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _fresh_modules(package: str, aliases: dict[str, ModuleType]) -> Iterator[None]:
    """Within the block `package` is imported anew and `aliases` are importable; then the old modules return."""

    def take_out() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name in aliases or name.split(".")[0] == package]
        return {name: sys.modules.pop(name) for name in names}

    before = take_out()
    sys.modules.update(aliases)
    try:
        yield
    finally:
        take_out()
        sys.modules.update(before)


def inspect_engine(built: BuiltEngine) -> EngineDescription:
    """What the engine says of itself where TensorRT can tell (it needs a GPU), else what its network said.

    `source` of the answer tells which, `obstacle` why. Raises EngineRefusedError for an engine that is not the one
    that was built (its hash is compared before TensorRT sees a byte) or that TensorRT rejects.
    """
    found = _sha256(built.serialized)
    if found != built.sha256:
        raise EngineRefusedError(
            f"the engine has sha256 {found} and {len(built.serialized)} bytes, but {built.sha256} was built; "
            "it was altered or cut short, build it again"
        )
    description = read_engine(find_tensorrt(built.backend), built.serialized)
    if description.source == "engine":
        return description
    return replace(description, source="network", tensors=built.tensors)


def check_engine(built: BuiltEngine, onnx_bytes: bytes) -> list[str]:
    """Everything in which the engine is not what the graph and the profile ask for; empty when it is right.

    Compares the graph's hash, and each tensor's name, mode, dtype, shape and profile.
    """
    problems = []
    if _sha256(onnx_bytes) != built.onnx_sha256:
        problems.append(f"built from an ONNX file with sha256 {built.onnx_sha256}, not from this {_sha256(onnx_bytes)}")
    try:
        expected = _expected_tensors(onnx_bytes, built.profile)
        found = inspect_engine(built).tensors
    except (EngineRefusedError, BackendUnavailableError, ValueError) as error:
        return [*problems, str(error)]
    return problems + _differences(expected, found)


def _expected_tensors(onnx_bytes: bytes, batches: Profile) -> tuple[EngineTensor, ...]:
    graph = _onnx_graph(onnx_bytes)
    constants = {constant.name for constant in graph.initializer}
    inputs = (_onnx_tensor(value, "input") for value in graph.input if value.name not in constants)
    outputs = (_onnx_tensor(value, "output") for value in graph.output)
    return (
        *(replace(tensor, profile=_shapes_at(tensor.name, tensor.shape, batches)) for tensor in inputs),
        *outputs,
    )


def _onnx_graph(onnx_bytes: bytes) -> onnx.GraphProto:
    try:
        return onnx.load_model_from_string(onnx_bytes).graph
    except Exception as error:  # protobuf's own class is not part of onnx's interface
        raise ValueError(f"the ONNX bytes cannot be parsed: {error}") from error


def _onnx_tensor(value: onnx.ValueInfoProto, mode: Literal["input", "output"]) -> EngineTensor:
    kind = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    return EngineTensor(value.name, mode, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name, shape)


def _differences(expected: Sequence[EngineTensor], found: Sequence[EngineTensor]) -> list[str]:
    wanted = {tensor.name: tensor for tensor in expected}
    present = {tensor.name: tensor for tensor in found}
    return [
        *(f"{wanted[name].mode} {name!r} of the graph is missing" for name in wanted if name not in present),
        *(f"{present[name].mode} {name!r} is not in the graph" for name in present if name not in wanted),
        *(line for name in wanted if name in present for line in _tensor_differences(wanted[name], present[name])),
    ]


def _tensor_differences(wanted: EngineTensor, present: EngineTensor) -> list[str]:
    return [
        f"{wanted.mode} {wanted.name!r}: {what} is {getattr(present, what)}, the graph asks for {getattr(wanted, what)}"
        for what in ("mode", "dtype", "shape", "profile")
        if getattr(present, what) != getattr(wanted, what)
    ]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
