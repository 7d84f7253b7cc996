"""Builds TensorRT and TensorRT-RTX engines from ONNX bytes, and checks what came out.

Engines are FP32 in storage and strongly typed, with one optimisation profile over the batch. Building twice need not
give the same bytes: TensorRT-RTX writes counters of its own into the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from typing import Literal

from rfsq.export.errors import BuildInputError, EngineBuildError
from rfsq.runtime.backends.contract import MOST_CHUNKS
from rfsq.runtime.backends.tensorrt_api import EngineTensor, NoDeviceError, ProfileShapes, TrtApi, find_tensorrt
from rfsq.runtime.bundle.manifest import GraphEntry


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


@dataclass(frozen=True)
class BuiltEngine:
    """A serialised engine, the tensors of its network, and what TensorRT complained about, each complaint once."""

    backend: str
    version: str
    profile: Profile
    serialized: bytes = field(repr=False)
    tensors: tuple[EngineTensor, ...]
    warnings: tuple[str, ...]


def build_engine(
    backend: str, onnx_bytes: bytes, profile: Profile, compute_capabilities: tuple[str, ...] = ()
) -> BuiltEngine:
    """Build one engine.

    Args:
        backend: `tensorrt` or `tensorrt-rtx`.
        onnx_bytes: the graph; its first dimension alone is dynamic.
        profile: batch sizes B.
        compute_capabilities: such as `("8.9", "12.0")`; empty for the library's default targets, which is the present
            GPU for `tensorrt` and the portable engine for `tensorrt-rtx`.

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
            serialized, tensors = _build(api, onnx_bytes, profile, compute_capabilities)
        except (TypeError, ValueError, RuntimeError) as error:
            reasons = dict.fromkeys([str(error), *(message.text for message in messages if message.is_error)])
            raise EngineBuildError("\n  ".join([f"{api.tag} could not build the engine:", *reasons])) from error
    warnings = (message.text for message in messages if message.is_error or message.severity == "WARNING")
    return BuiltEngine(backend, api.version, profile, serialized, tensors, tuple(dict.fromkeys(warnings)))


def _build(
    api: TrtApi, onnx_bytes: bytes, batches: Profile, compute_capabilities: tuple[str, ...]
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
        shapes = _shapes_at(tensor.name, tuple(tensor.shape), batches)
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise ValueError("it gave no engine")
    return bytes(serialized), api.network_tensors(network, profile)


def _shapes_at(name: str, shape: tuple[int, ...], batches: Profile) -> ProfileShapes:
    """The shapes an input of `shape` (-1 where dynamic) takes at the three batch sizes."""
    if not shape or shape[0] != -1 or -1 in shape[1:]:
        raise ValueError(f"input {name!r} has shape {shape}; expected a dynamic first dimension and no other")
    return ProfileShapes(*((batch, *shape[1:]) for batch in astuple(batches)))


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
        EngineTensor(part.name, "input", part.dtype, part.shape, _shapes_at(part.name, part.shape, built.profile))
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
