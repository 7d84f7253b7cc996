"""TensorRT and TensorRT-RTX engines of a bundle, behind the contract of GPU backends."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

from ..bundle.arrays import AnyArray
from ..bundle.errors import BundleError, EngineRefusedError, InferenceError
from ..bundle.folder import Bundle
from ..bundle.manifest import EngineEntry, GraphEntry, TensorEntry
from .beliefs import BeliefAnswer, BeliefQuestion
from .contract import EngineInUse, no_engine
from .gpu.backend import GpuBackend, Runner
from .gpu.driver import DeviceMemory, GpuDevice, open_device
from .graph_beliefs import GraphBeliefs
from .tensorrt_api import EngineTensor, TrtApi, find_tensorrt, quote

_LOG = logging.getLogger(__name__)

#: The form that no TensorRT computes in TF32, and that marks illegal input (`export/graph_builder.py`).
FORM: Final = "reduce"


class TrtBackend(GpuBackend):
    """`tensorrt` or `tensorrt-rtx` with the bundle's engines for the GPU that is here.

    Raises BackendUnavailableError where there is no library, GPU or fitting engine, EngineRefusedError for an engine
    that TensorRT rejects, BundleError for one that is not what the manifest describes.
    """

    def __init__(self, bundle: Bundle, backend: str) -> None:
        api, gpu = find_tensorrt(backend), open_device()
        graphs = bundle.manifest.every_graph_of(FORM)
        entries = choose_engines(bundle, api, gpu)
        runtime = api.create_runtime()
        self._engines: list[TrtFunction] = []
        try:
            for graph, entry in zip(graphs, entries, strict=True):
                self._engines.append(TrtFunction(api, runtime, bundle, graph, entry))
        except BaseException:
            for engine in self._engines:
                engine.close()
            raise
        beliefs = [engine for engine in self._engines if engine.graph.role == "belief"]
        functions = [engine for engine in self._engines if engine.graph.role != "belief"]
        super().__init__(backend, f"{api.tag}, {gpu}", str(gpu), functions)
        self._belief_graphs = {engine.graph.prefix: _BeliefGraph(engine) for engine in beliefs}
        self._beliefs = GraphBeliefs(bundle.manifest.model, self._belief_graphs, self.decode_into)

    @property
    def engines_in_use(self) -> tuple[EngineInUse, ...]:
        return tuple(engine.in_use() for engine in self._engines)

    @property
    def has_beliefs(self) -> bool:
        """Whether this bundle has engines for them."""
        return bool(self._belief_graphs)

    def decode_belief_into(self, question: BeliefQuestion, answer: BeliefAnswer) -> None:
        self._beliefs.decode_into(question, answer)

    def close(self) -> None:
        for graph in self._belief_graphs.values():
            graph.close()
        super().close()


class _BeliefGraph(Runner):
    """An engine of beliefs, between arrays of the host."""

    def run(self, source: AnyArray, second: AnyArray | None, target: AnyArray, other: AnyArray | None) -> None:
        self.run_on_host([array for array in (source, second) if array is not None], (target, other))


def choose_engines(bundle: Bundle, api: TrtApi, device: GpuDevice) -> list[EngineEntry]:
    """For every graph the engine that this library and this GPU can run; one validated on this GPU where there is one.

    Raises BackendUnavailableError, saying what there is and how to build what is missing.
    """
    chosen = []
    for graph in bundle.manifest.every_graph_of(FORM):
        of_graph = [entry for entry in bundle.manifest.engines if entry.source == graph.file]
        fitting = [entry for entry in of_graph if _fits(entry, api, device)]
        if not fitting:
            found = (
                f"{entry.backend} {entry.version} for {', '.join(entry.targets) or 'any GPU of the library'}"
                for entry in of_graph
            )
            raise no_engine(bundle, f"engine of {api.tag} from {graph.file} for {device}", "; ".join(found))
        chosen.append(max(fitting, key=lambda entry: entry.device == str(device)))
    return chosen


def _fits(entry: EngineEntry, api: TrtApi, device: GpuDevice) -> bool:
    is_of_library = (entry.backend, entry.version) == (api.backend, api.version)
    return is_of_library and (not entry.targets or device.compute_capability in entry.targets)


class TrtFunction:
    """One engine. Its kernels are compiled when the first program runs, and remembered in `kernel_cache`."""

    reads_once = False

    def __init__(self, api: TrtApi, runtime: Any, bundle: Bundle, graph: GraphEntry, entry: EngineEntry) -> None:
        self._api, self._runtime, self._entry = api, runtime, entry
        self.graph, self.max_batch = graph, entry.profile[2]
        self._engine = api.deserialize(runtime, bundle.content(entry.file))
        _check_tensors(entry, graph, api.engine_tensors(self._engine))
        # Kernels that were compiled for another GPU do not run on this one.
        has_kernels = bool(entry.kernel_cache) and entry.device == str(open_device())
        content = bundle.content(entry.kernel_cache) if has_kernels else b""
        try:
            self._kernel_cache = api.create_kernel_cache(self._engine, content)
        except EngineRefusedError as error:
            # It only saves time; a driver that was updated may want kernels of its own.
            _LOG.warning("%s: %s; the kernels are compiled anew", entry.kernel_cache, error)
            self._kernel_cache = api.create_kernel_cache(self._engine, b"")

    def in_use(self) -> EngineInUse:
        """With the kernels compiled so far; none where the library keeps none."""
        kernels = b"" if self._kernel_cache is None else bytes(self._kernel_cache.serialize())
        return EngineInUse(self._entry, kernels)

    def new_program(self) -> TrtProgram:
        context = self._api.create_context(self._engine, self._kernel_cache)
        return TrtProgram(self._api, context, self.graph)

    def close(self) -> None:
        # In this order: TensorRT wants the runtime to outlive the engine.
        self._kernel_cache = self._engine = self._runtime = None


class TrtProgram:
    """An execution context, and memory for the largest batch that it was bound to. A captured graph uses both, so they
    live as long as the graph."""

    def __init__(self, api: TrtApi, context: Any, graph: GraphEntry) -> None:
        self._api, self._context = api, context
        self._names = tuple(tensor.name for tensor in (*graph.inputs, *graph.outputs))
        self._inputs = graph.inputs
        self._bound: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._memory: DeviceMemory | None = None

    def bind(self, shape: tuple[int, ...], addresses: Sequence[int]) -> None:
        wanted = (shape, tuple(addresses))
        if wanted == self._bound:
            return
        context, has_memory = self._context, self._bound is not None and self._bound[0] == shape
        self._bound = None
        with self._api.collect_messages() as messages:
            is_bound = all(
                context.set_input_shape(tensor.name, tensor.shape_of(shape[0], shape[-1])) for tensor in self._inputs
            ) and all(
                context.set_tensor_address(name, address) for name, address in zip(self._names, addresses, strict=True)
            )
        if not is_bound:
            raise InferenceError(f"{self._api.tag} refuses an input of shape {list(shape)}: {quote(messages)}")
        if not has_memory:
            self._give_memory()
        self._bound = wanted

    def _give_memory(self) -> None:
        size = self._api.memory_size(self._context)
        if not size:
            return
        if self._memory is None or self._memory.num_bytes < size:
            if self._memory is not None:
                # Waits for what is under way in it.
                self._memory.close()
            self._memory = DeviceMemory(size)
        self._context.set_device_memory(self._memory.address, self._memory.num_bytes)

    def enqueue(self, stream: int) -> None:
        with self._api.collect_messages() as messages:
            is_enqueued = self._context.execute_async_v3(stream)
        if not is_enqueued:
            raise InferenceError(f"{self._api.tag} failed: {quote(messages)}")

    def close(self) -> None:
        self._context = None
        if self._memory is not None:
            self._memory.close()


def _check_tensors(entry: EngineEntry, graph: GraphEntry, found: Sequence[EngineTensor]) -> None:
    def described(tensors: Sequence[TensorEntry | EngineTensor]) -> list[tuple[str, str, tuple[int, ...]]]:
        return sorted((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)

    stated, actual = described((*graph.inputs, *graph.outputs)), described(found)
    profiles = {tensor.name: tuple(tensor.profile) for tensor in found if tensor.profile is not None}
    # A number of tokens that is not fixed goes from one to all, for which the engine is tuned.
    lengths = (1, graph.prefix, graph.prefix)
    wanted = {tensor.name: tuple(map(tensor.shape_of, entry.profile, lengths)) for tensor in graph.inputs}
    if stated != actual or profiles != wanted:
        raise BundleError(
            f"{entry.file} has the tensors {actual} for inputs of {profiles}; the manifest states {stated} for "
            f"{wanted}; build the engines again"
        )
