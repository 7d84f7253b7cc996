"""Builds TensorRT and TensorRT-RTX engines from ONNX bytes, and checks what came out.

Engines are FP32 in storage and strongly typed, with one optimisation profile over the batch. Building twice need not
give the same bytes: TensorRT-RTX writes counters of its own into the engine, so only an engine's hash, taken when it
was built, identifies it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rfsq.export.batches import Profile
from rfsq.export.errors import EngineBuildError
from rfsq.runtime.backends.tensorrt_api import (
    EngineTensor,
    NoDeviceError,
    ProfileShapes,
    TrtApi,
    find_tensorrt,
)
from rfsq.runtime.backends.tensorrt_messages import LogMessage
from rfsq.runtime.bundle.errors import BackendUnavailableError, EngineRefusedError
from rfsq.runtime.bundle.manifest import GraphEntry


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
    with api.collect_messages() as messages:
        try:
            serialized, tensors = _build(api, request)
        except (TypeError, ValueError, RuntimeError) as error:
            raise EngineBuildError(_build_failure(api, error, messages)) from error
    return BuiltEngine(
        backend=request.backend,
        version=api.flavour.version,
        compute_capabilities=request.compute_capabilities,
        profile=request.profile,
        serialized=serialized,
        sha256=_sha256(serialized),
        onnx_sha256=_sha256(request.onnx_bytes),
        tensors=tensors,
        warnings=_warnings(messages),
    )


def _build(api: TrtApi, request: EngineRequest) -> tuple[bytes, tuple[EngineTensor, ...]]:
    trt = api.module
    builder = trt.Builder(api.logger)
    network = builder.create_network(api.network_flags)
    parser = trt.OnnxParser(network, api.logger)
    if not parser.parse(request.onnx_bytes):
        reasons = (str(parser.get_error(index)) for index in range(parser.num_errors))
        raise ValueError("\n  ".join(["Failed to parse the ONNX model", *reasons]))
    config = builder.create_builder_config()
    api.apply_build_settings(config, request.compute_capabilities)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = _shapes_at(tensor.name, tuple(tensor.shape), request.profile)
        profile.set_shape(tensor.name, shapes.minimum, shapes.optimum, shapes.maximum)
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise ValueError("it gave no engine")
    return bytes(serialized), api.network_tensors(network, profile)


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


def inspect_engine(built: BuiltEngine) -> tuple[Literal["engine", "network"], tuple[EngineTensor, ...]]:
    """The tensors that the engine itself has where TensorRT can tell, else those of its network; and whose they are.

    TensorRT deserialises engines on a machine with a GPU alone. Without one it still refuses bytes with a wrong
    header or length, but tells nothing about the tensors.

    Raises EngineRefusedError for an engine that is not the one that was built (its hash is compared before TensorRT
    sees a byte) or that TensorRT rejects.
    """
    found = _sha256(built.serialized)
    if found != built.sha256:
        raise EngineRefusedError(
            f"the engine has sha256 {found} and {len(built.serialized)} bytes, but {built.sha256} was built; "
            "it was altered or cut short, build it again"
        )
    api = find_tensorrt(built.backend)
    try:
        # Bound to a name so that the runtime outlives the engine.
        runtime = api.create_runtime()
        return "engine", api.engine_tensors(api.deserialize(runtime, built.serialized))
    except NoDeviceError:
        return "network", built.tensors


def check_engine(built: BuiltEngine, graph: GraphEntry, onnx_bytes: bytes) -> list[str]:
    """Everything in which the engine is not what the graph and the profile ask for; empty when it is right.

    Compares the graph's hash, and each tensor's name, mode, dtype, shape and profile.
    """
    problems = []
    if _sha256(onnx_bytes) != built.onnx_sha256:
        problems.append(f"built from an ONNX file with sha256 {built.onnx_sha256}, not from this {_sha256(onnx_bytes)}")
    try:
        _, found = inspect_engine(built)
    except (EngineRefusedError, BackendUnavailableError) as error:
        return [*problems, str(error)]
    expected = [
        EngineTensor(part.name, "input", part.dtype, part.shape, _shapes_at(part.name, part.shape, built.profile))
        for part in graph.inputs
    ]
    expected += [EngineTensor(part.name, "output", part.dtype, part.shape) for part in graph.outputs]
    return problems + _differences(expected, found)


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
