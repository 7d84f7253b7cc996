"""The generated CUDA engine: one fused kernel for each way, compiled for this kind of GPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..bundle.folder import Bundle
from ..bundle.manifest import (
    CHUNKS_OF_BLOCK,
    CHUNKS_OF_WINDOW,
    GraphEntry,
    TensorEntry,
    TokenType,
    bytes_of_window,
    kernel_name,
    sorter_name,
    tiles_of_window,
    token_types,
)
from ..bundle.models import ChunkModel, ModelEntry
from .beliefs import BeliefAnswer, BeliefQuestion
from .contract import Backend, EngineInUse, engine_for
from .cuda_beliefs import BeliefFunction, BeliefKernels
from .gpu.arrays import GpuArray, GpuStream
from .gpu.backend import CapturedCall, GpuBackend, Runner
from .gpu.belief_arrays import BeliefTerms, belief_terms
from .gpu.driver import DeviceMemory, open_device
from .gpu.kept import Kept
from .gpu.kernels import Kernel, KernelArguments, KernelLibrary

#: A grid has so many blocks at most, and a step or a chunk may have one of its own.
_MOST_BLOCKS = 2**31 - 1
#: Up to so many steps a block for each is faster than a thread for each.
FEW_STEPS = 8192
#: Up to so many chunks of chunk tokens a block for each is faster than one for several.
FEW_CHUNKS = {"encoder": 512, "decoder": 10_000}


class CudaBackend(GpuBackend):
    """Raises BackendUnavailableError where there is no GPU, or no engine for it."""

    def __init__(self, bundle: Bundle) -> None:
        gpu, model = open_device(), bundle.manifest.model
        self._entry = engine_for(bundle, "cuda", (gpu.compute_capability,), f"CUDA kernels for {gpu}")
        self._library = KernelLibrary(bundle.content(self._entry.file))
        graphs = bundle.manifest.graphs_of("reduce")
        names = ("cuda", f"generated CUDA, {self._entry.version}, {gpu}", str(gpu))
        try:
            functions = [
                CudaFunction(self._library, model, with_tokens(graph, token_type))
                for token_type in token_types(model.vocabulary, model.narrow_type)
                for graph in graphs
            ]
            super().__init__(*names, functions)
            self._belief_kernels = BeliefKernels(self._library, model)
            # Runners by their terms: a control loop asks on the same ones again and again.
            self._belief_runners: Kept[Runner] = Kept(Runner, Runner.close)
            self._variants = {variant: GpuBackend(*names, chosen) for variant, chosen in variants_of(functions).items()}
        except BaseException:
            self._library.close()
            raise

    @property
    def variants(self) -> Mapping[str, Backend]:
        """The kernels that numpy arrays do not reach, or not in calls as small as those of gates."""
        return self._variants

    @property
    def engines_in_use(self) -> tuple[EngineInUse, ...]:
        return (EngineInUse(self._entry),)

    @property
    def has_beliefs(self) -> bool:
        """Whether this engine decodes probabilities."""
        return self._belief_kernels.are_there

    def decode_belief_into(self, question: BeliefQuestion, answer: BeliefAnswer) -> None:
        terms = belief_terms(question, answer[1:])
        outputs = [array for array in answer if array is not None]
        with self._belief_runners.borrowed(BeliefFunction(terms, self._belief_kernels)) as runner:
            runner.run_on_host(question.given, outputs)

    def decode_belief_on_gpu(self, terms: BeliefTerms, arrays: Sequence[GpuArray], stream: GpuStream) -> None:
        with self._belief_runners.borrowed(BeliefFunction(terms, self._belief_kernels)) as runner:
            runner.run_on_gpu(arrays, stream)

    def bind_decode_belief(self, terms: BeliefTerms, arrays: Sequence[GpuArray], stream: GpuStream) -> CapturedCall:
        with self._belief_runners.borrowed(BeliefFunction(terms, self._belief_kernels)) as runner:
            bound: CapturedCall = runner.bind(arrays, stream)
            return bound

    def close(self) -> None:
        self._belief_runners.close()
        for variant in self._variants.values():
            variant.close()
        super().close()
        self._library.close()


def variants_of(functions: Sequence[CudaFunction]) -> dict[str, list[CudaFunction]]:
    """What gates judge beside the functions themselves: tokens of other types, and kernels for many.

    Numpy arrays go through in slices that may be too small for these, and gates judge less at a time.
    """
    variants = {}
    for token_type in dict.fromkeys(function.token_type for function in functions):
        own = [function for function in functions if function.token_type == token_type]
        if token_type != "int32":
            variants[f"{token_type} tokens"] = [function.with_few(function.few) for function in own]
        if any(function.has_many for function in own):
            name = "many steps" if token_type == "int32" else f"{token_type} tokens, many steps"
            variants[name] = [function.with_few(0) for function in own]
    return variants


def with_tokens(graph: GraphEntry, token_type: TokenType) -> GraphEntry:
    def changed(tensor: TensorEntry) -> TensorEntry:
        return replace(tensor, dtype=token_type) if tensor.name == "tokens" else tensor

    return replace(graph, inputs=tuple(map(changed, graph.inputs)), outputs=tuple(map(changed, graph.outputs)))


class CudaFunction:
    """The kernels of one encoder or decoder. They count steps or, of chunk tokens, chunks."""

    reads_once = True

    def __init__(self, library: KernelLibrary, model: ModelEntry, graph: GraphEntry) -> None:
        token_type = graph.tokens.dtype
        prefix = graph.prefix if graph.role == "decoder" else None
        self._few = library.kernel(kernel_name(prefix, token_type, "few"))
        # Some sizes have none.
        self._many = library.find(kernel_name(prefix, token_type, "many"))
        is_of_steps = bool(model.token_grid)
        self.few = FEW_STEPS if is_of_steps else FEW_CHUNKS[graph.role]
        # A thread has a step of its own.
        self._of_block = 0 if is_of_steps else CHUNKS_OF_BLOCK[graph.role]
        self.per_chunk = model.chunk_length if is_of_steps else 1
        self.graph, self.token_type = graph, token_type
        #: Decoders of chunk tokens are told how many of them a chunk has.
        self.takes_length = prefix is not None and not is_of_steps
        # Before they decode many, they sort them.
        self._sorter: Kernel | None = None
        self._tiles = self._window_bytes = 0
        if self._many is not None and prefix is not None and isinstance(model, ChunkModel):
            self._sorter = library.find(sorter_name(prefix, token_type))
            if self._sorter is not None:
                self._tiles, self._window_bytes = tiles_of_window(model.num_classes), bytes_of_window(model.num_classes)
            else:
                # An engine of another version, which sorts otherwise.
                self._many = None
        self.has_many = self._many is not None
        #: Arrays, how many steps or chunks, of how many tokens, and a workspace.
        self.num_arguments = len(graph.inputs) + len(graph.outputs) + 1 + self.takes_length + 1
        self.max_batch = _MOST_BLOCKS // self.per_chunk

    def with_few(self, few: int) -> CudaFunction:
        """Another of the same kernels, which takes that for many, where there is one, beyond so many."""
        function = copy.copy(self)
        function.few = few
        return function

    def new_program(self) -> _CudaProgram:
        return _CudaProgram(self)

    def close(self) -> None:
        """The library is closed by the backend."""

    def workspace_bytes(self, count: int) -> int:
        """Of the GPU's memory that a launch for so many needs; its address is the last argument."""
        return _windows_of(count) * self._window_bytes if count > self.few else 0

    def launch(self, count: int, arguments: KernelArguments, stream: int) -> None:
        if self._many is None or count <= self.few:
            self._few.launch(count, arguments, stream)
        elif self._sorter is None:
            self._many.launch(-(-count // (self._of_block or self._many.threads)), arguments, stream)
        else:
            windows = _windows_of(count)
            self._sorter.launch(windows, arguments, stream)
            # Blocks take one tile after the other.
            self._many.launch(min(windows * self._tiles, self._many.resident_blocks), arguments, stream)


def _windows_of(count: int) -> int:
    return -(-count // CHUNKS_OF_WINDOW)


class _CudaProgram:
    """Has memory of its own where chunks are sorted, for as many as it was bound to."""

    def __init__(self, function: CudaFunction) -> None:
        self._function, self._count = function, 0
        self._arguments = KernelArguments(function.num_arguments)
        self._workspace: DeviceMemory | None = None

    def bind(self, shape: tuple[int, ...], addresses: Sequence[int]) -> None:
        function = self._function
        self._count = shape[0] * function.per_chunk
        needed = function.workspace_bytes(self._count)
        if needed > (self._workspace.num_bytes if self._workspace else 0):
            self.close()
            self._workspace = DeviceMemory(needed)
        numbers = (self._count, *(shape[-1:] if function.takes_length else ()))
        self._arguments.set((*addresses, *numbers, self._workspace.address if self._workspace else 0))

    def enqueue(self, stream: int) -> None:
        self._function.launch(self._count, self._arguments, stream)

    def close(self) -> None:
        if self._workspace:
            # Waits for what is under way in it.
            self._workspace.close()
            self._workspace = None
