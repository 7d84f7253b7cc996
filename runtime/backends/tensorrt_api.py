"""The one place that knows how TensorRT 10, TensorRT 11 and TensorRT-RTX differ.

Differences are found by asking the library for the feature, never by comparing versions. Serves the export, which
builds engines, and the robot, which runs them; needs nothing but the TensorRT Python package itself.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal, NamedTuple

from ..bundle.backend_specs import BACKENDS, compiled_from, is_package_installed
from ..bundle.errors import BackendUnavailableError, EngineRefusedError, InferenceError, OutOfGpuMemoryError

_LOG = logging.getLogger(__name__)

#: All others, `INFO` and `VERBOSE`, are for debugging.
_LEVELS = {"INTERNAL_ERROR": logging.CRITICAL, "ERROR": logging.ERROR, "WARNING": logging.WARNING}
#: TensorRT's names of types that are not numpy's in capitals.
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class LogMessage:
    """One message of TensorRT; `severity` is its own word, such as `WARNING`."""

    severity: str
    text: str

    @property
    def is_error(self) -> bool:
        return self.severity in ("ERROR", "INTERNAL_ERROR")


class NoDeviceError(BackendUnavailableError):
    """TensorRT is installed but finds no usable GPU or driver; the message quotes TensorRT."""


class ProfileShapes(NamedTuple):
    """The shapes one input may take: the smallest, the one tuned for, the largest."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


@dataclass(frozen=True)
class EngineTensor:
    """An input or output: `dtype` in numpy's words, `shape` with -1 where dynamic, `profile` for inputs alone."""

    name: str
    mode: Literal["input", "output"]
    dtype: str
    shape: tuple[int, ...]
    profile: ProfileShapes | None = None


@dataclass(frozen=True, eq=False)
class TrtApi:
    """One TensorRT library, with the differences between its versions behind methods.

    backend: `tensorrt` or `tensorrt-rtx`; module: NVIDIA's Python module; logger: the one `ILogger` to give to
    everything that is made from it; collections: the lists that each of its messages is added to.
    """

    backend: str
    version: str
    module: Any
    logger: Any
    collections: list[list[LogMessage]]

    @property
    def tag(self) -> str:
        """Backend and version in one word fit for a file name: an engine runs only on the version that built it."""
        return f"{self.backend}-{self.version}"

    @contextlib.contextmanager
    def collect_messages(self) -> Iterator[list[LogMessage]]:
        """A list that grows by every message of TensorRT until the block ends.

        Who collects judges and quotes what comes, so meanwhile the log has it for debugging alone.
        """
        messages: list[LogMessage] = []
        self.collections.append(messages)
        try:
            yield messages
        finally:
            self.collections[:] = [kept for kept in self.collections if kept is not messages]

    # --- building -------------------------------------------------------------------------------------------------

    @property
    def network_flags(self) -> int:
        """Flags for `Builder.create_network`: the types in the graph are obeyed, not reinterpreted.

        Where strong typing cannot be asked for, it is the only way there is.
        """
        flag = getattr(getattr(self.module, "NetworkDefinitionCreationFlag", None), "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """Targets that can be named, such as `8.9`, in rising order; empty if only the GPU present can be built for."""
        members = getattr(getattr(self.module, "ComputeCapability", None), "__members__", {})
        numbers = sorted(int(name[2:]) for name in members if re.fullmatch(r"SM\d{2,}", name))
        return tuple(f"{number // 10}.{number % 10}" for number in numbers)

    def check_compute_capabilities(self, wanted: Sequence[str]) -> None:
        """Raises ValueError, naming the valid ones, unless an engine can be built for each of `wanted`."""
        offered = self.compute_capabilities
        unknown = [name for name in wanted if name not in offered]
        if not unknown:
            return
        found = f"compute capability {', '.join(map(repr, unknown))} cannot be targeted by {self.tag}"
        if offered:
            raise ValueError(f"{found}; valid are {', '.join(offered)}, or none for the library's portable default")
        raise ValueError(f"{found}: it builds for the GPU of this machine alone; name none and build on the target")

    def apply_build_settings(self, config: Any, compute_capabilities: Sequence[str]) -> None:
        """Sets on an `IBuilderConfig` what must hold for every engine: no TF32, and the targets asked for.

        Raises ValueError for a target that the library does not offer or refuses.
        """
        verbosity = getattr(self.module, "ProfilingVerbosity", None)
        if verbosity is not None:
            # NVIDIA's tools can then say what the layers of an engine became.
            config.profiling_verbosity = verbosity.DETAILED
        tf32 = getattr(getattr(self.module, "BuilderFlag", None), "TF32", None)
        if tf32 is not None:
            config.clear_flag(tf32)
        self.check_compute_capabilities(compute_capabilities)
        if not compute_capabilities:
            return
        config.num_compute_capabilities = len(compute_capabilities)
        for index, name in enumerate(compute_capabilities):
            target = getattr(self.module.ComputeCapability, f"SM{name.replace('.', '')}")
            if not config.set_compute_capability(target, index):
                raise ValueError(f"{self.tag} refused compute capability {name!r}")

    def network_tensors(self, network: Any, profile: Any) -> tuple[EngineTensor, ...]:
        """Inputs and outputs of an `INetworkDefinition`, with the shapes held by an `IOptimizationProfile`."""
        inputs = (network.get_input(index) for index in range(network.num_inputs))
        outputs = (network.get_output(index) for index in range(network.num_outputs))
        return (
            *(_network_tensor(tensor, "input", profile.get_shape(tensor.name)) for tensor in inputs),
            *(_network_tensor(tensor, "output", None) for tensor in outputs),
        )

    # --- running --------------------------------------------------------------------------------------------------

    def create_runtime(self) -> Any:
        """A new `Runtime` that refuses engines with host code inside. Raises NoDeviceError where there is no GPU."""
        with self.collect_messages() as messages:
            try:
                runtime = self.module.Runtime(self.logger)
            except (TypeError, RuntimeError) as error:
                raise NoDeviceError(self._no_device(quote(messages) or str(error))) from error
        # Version-compatible engines carry a library that would be loaded and run: code of the bundle's author.
        if hasattr(runtime, "engine_host_code_allowed"):
            runtime.engine_host_code_allowed = False
        return runtime

    def deserialize(self, runtime: Any, serialized: bytes) -> Any:
        """The `ICudaEngine` of a serialised engine. Its bytes must have been hashed by the caller: they are code.

        `runtime` has to outlive the engine. Raises EngineRefusedError when TensorRT rejects the bytes, NoDeviceError
        when it could not judge them for want of a GPU.
        """
        with self.collect_messages() as messages:
            engine = runtime.deserialize_cuda_engine(serialized)
        if engine is not None:
            return engine
        if lacks_device(messages):
            raise NoDeviceError(self._no_device(quote(messages)))
        raise EngineRefusedError(
            f"{self.tag} refuses the engine of {len(serialized)} bytes: {quote(messages)}; build it again "
            "with this version and for this GPU"
        )

    def create_context(self, engine: Any, kernel_cache: Any | None) -> Any:
        """A new `IExecutionContext`; kernel_cache: of `create_kernel_cache` for this engine, or None.

        Before it runs it has to be given memory (`memory_size`). Raises OutOfGpuMemoryError, or InferenceError with
        TensorRT's own words.
        """
        without_memory = self._without_memory
        with self.collect_messages() as messages:
            config = self._runtime_config(engine)
            if config is not None:
                if kernel_cache is not None:
                    config.set_runtime_cache(kernel_cache)
                if without_memory is not None:
                    config.set_execution_context_allocation_strategy(without_memory)
                context = engine.create_execution_context(config)
            elif without_memory is not None:
                context = engine.create_execution_context(without_memory)
            else:
                context = engine.create_execution_context()
        if context is None:
            reason = quote(messages)
            kind = OutOfGpuMemoryError if re.search("out of memory", reason, re.IGNORECASE) else InferenceError
            raise kind(f"{self.tag} could not make an engine ready: {reason}")
        return context

    @property
    def _without_memory(self) -> Any | None:
        """The strategy by which a context takes no memory; None where the library has none.

        By default every context takes as much as the largest batch of its engine needs, whatever batch it is for.
        """
        strategies = getattr(self.module, "ExecutionContextAllocationStrategy", None)
        can_be_given = hasattr(getattr(self.module, "IExecutionContext", None), "set_device_memory")
        return getattr(strategies, "USER_MANAGED", None) if can_be_given else None

    def memory_size(self, context: Any) -> int:
        """Bytes of the GPU that a context of `create_context` has to be given, by `set_device_memory`, for the shapes
        that are set; 0 where it needs none, or has taken its own. Raises InferenceError."""
        if self._without_memory is None:
            return 0
        with self.collect_messages() as messages:
            size = int(context.update_device_memory_size_for_shapes())
        if reason := quote(messages):
            raise InferenceError(f"{self.tag} could not say how much memory an engine needs: {reason}")
        return size

    def create_kernel_cache(self, engine: Any, content: bytes) -> Any | None:
        """TensorRT-RTX compiles kernels when an engine first runs; with this cache, only the first time ever.

        content: of a cache that was serialised, whose hash the caller has checked, or nothing to begin anew. None where
        the library has no such cache. Raises EngineRefusedError for content that it does not accept.
        """
        config = self._runtime_config(engine)
        if config is None or not hasattr(config, "create_runtime_cache"):
            return None
        kernel_cache = config.create_runtime_cache()
        with self.collect_messages() as messages:
            is_accepted = not content or kernel_cache.deserialize(content)
        if not is_accepted:
            raise EngineRefusedError(f"{self.tag} refuses the cache of compiled kernels: {quote(messages)}")
        return kernel_cache

    def _runtime_config(self, engine: Any) -> Any | None:
        """An `IRuntimeConfig` that compiles kernels for a shape before it first runs, never while it runs."""
        strategies = getattr(self.module, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:
            return None
        config = engine.create_runtime_config()
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        return config

    def engine_tensors(self, engine: Any) -> tuple[EngineTensor, ...]:
        """Inputs and outputs of an `ICudaEngine`, in its order, with the shapes of its first profile."""
        found = []
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            is_input = engine.get_tensor_mode(name) == self.module.TensorIOMode.INPUT
            profile = _profile_shapes(engine.get_tensor_profile_shape(name, 0)) if is_input else None
            dtype, shape = _dtype_name(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name))
            found.append(EngineTensor(name, "input" if is_input else "output", dtype, shape, profile))
        return tuple(found)

    def _no_device(self, reason: str) -> str:
        # The one phrase of CUDA's that a person needs stands inside an account of where TensorRT was at that moment.
        cause = re.search(r"\(cudaError \d+: ([^()]+)\)", reason)
        reason = cause[1] if cause else reason
        return f"{self.tag} finds no usable GPU here: {reason}; check the driver with nvidia-smi"


def _network_tensor(tensor: Any, mode: Literal["input", "output"], shapes: Any) -> EngineTensor:
    profile = None if shapes is None else _profile_shapes(shapes)
    return EngineTensor(tensor.name, mode, _dtype_name(tensor.dtype), tuple(tensor.shape), profile)


def _profile_shapes(shapes: Sequence[Sequence[int]]) -> ProfileShapes:
    return ProfileShapes(*map(tuple, shapes))


def _dtype_name(dtype: Any) -> str:
    return _DTYPES.get(dtype.name, str(dtype.name).lower())


def find_tensorrt(backend: str) -> TrtApi:
    """The library behind backend `tensorrt` or `tensorrt-rtx`; the same object at every call.

    Raises BackendUnavailableError for another name, and when the package is missing or does not load.
    """
    known = compiled_from("graphs")
    if backend not in known:
        raise BackendUnavailableError(f"no TensorRT backend {backend!r}; there are {', '.join(sorted(known))}")
    packages, cure = BACKENDS[backend].packages, f"install it with: {BACKENDS[backend].install}"
    for name in filter(is_package_installed, packages):
        try:
            return _api_of(backend, importlib.import_module(name))
        except (ImportError, OSError) as error:
            raise BackendUnavailableError(f"{name} is installed but does not load: {error}; {cure}") from error
    raise BackendUnavailableError(f"found no package {' or '.join(packages)}; {cure}")


@cache
def _api_of(backend: str, module: ModuleType) -> TrtApi:
    # Cached because TensorRT keeps the first logger it meets for the whole process and warns about any other.
    collections: list[list[LogMessage]] = []

    class ForwardingLogger(module.ILogger):  # type: ignore[misc,name-defined]  # the vendor module has no types
        def __init__(self) -> None:
            # pybind11 rejects an object whose base was initialised through super().
            module.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            # TensorRT calls this from C++ code that cannot take an exception: it would end the process.
            with contextlib.suppress(Exception):
                for messages in tuple(collections):
                    messages.append(LogMessage(severity.name, text))
                level = logging.DEBUG if collections else _LEVELS.get(severity.name, logging.DEBUG)
                _LOG.log(level, "TensorRT %s: %s", severity.name, text)

    version = str(vars(module).get("__version__", "unknown"))
    return TrtApi(backend, version, module, ForwardingLogger(), collections)


def quote(messages: Sequence[LogMessage]) -> str:
    """Its errors, each once."""
    return " | ".join(dict.fromkeys(message.text for message in messages if message.is_error))


def lacks_device(messages: Sequence[LogMessage]) -> bool:
    """Whether CUDA stopped TensorRT: its error comes first; after a faulty engine's own error it only follows."""
    first = next((message.text for message in messages if message.is_error), "")
    return re.search(r"cudaError|Cuda Runtime|CUDA (initialization|driver)", first) is not None
