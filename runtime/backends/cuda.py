"""The generated CUDA engine: one fused kernel for each way, compiled for this kind of GPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..bundle.folder import Bundle
from ..bundle.manifest import (
    GraphEntry,
    TensorEntry,
    TokenType,
    kernel_name,
    token_types,
)
from ..bundle.models import ModelEntry
from .contract import Backend, EngineInUse, engine_for
from .gpu.backend import GpuBackend
from .gpu.driver import open_device
from .gpu.kernels import KernelArguments, KernelLibrary

#: A grid has so many blocks at most, and a step may have one of its own.
_MOST_STEPS = 2**31 - 1
#: Up to so many steps a block for each is faster than a thread for each.
FEW_STEPS = 8192


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
                for token_type in token_types(model.vocabulary)
                for graph in graphs
            ]
            super().__init__(*names, functions)
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

    def close(self) -> None:
        for variant in self._variants.values():
            variant.close()
        super().close()
        self._library.close()


def variants_of(functions: Sequence[CudaFunction]) -> dict[str, list[CudaFunction]]:
    """What gates judge beside the functions themselves: tokens of other types, and kernels for many steps.

    Numpy arrays go through in slices that may be too small for these, and gates judge less at a time.
    """
    variants = {}
    for token_type in dict.fromkeys(function.token_type for function in functions):
        own = [function for function in functions if function.token_type == token_type]
        if token_type != "int32":
            variants[f"{token_type} tokens"] = [function.with_few_steps(FEW_STEPS) for function in own]
        if any(function.has_many for function in own):
            name = "many steps" if token_type == "int32" else f"{token_type} tokens, many steps"
            variants[name] = [function.with_few_steps(0) for function in own]
    return variants


def with_tokens(graph: GraphEntry, token_type: TokenType) -> GraphEntry:
    def changed(tensor: TensorEntry) -> TensorEntry:
        return replace(tensor, dtype=token_type) if tensor.name == "tokens" else tensor

    return replace(graph, inputs=tuple(map(changed, graph.inputs)), outputs=tuple(map(changed, graph.outputs)))


class CudaFunction:
    """The kernels of one encoder or decoder."""

    reads_once = True

    def __init__(self, library: KernelLibrary, model: ModelEntry, graph: GraphEntry) -> None:
        tokens = next(tensor for tensor in (*graph.inputs, *graph.outputs) if tensor.name == "tokens")
        prefix = graph.prefix if graph.role == "decoder" else None
        self._few = library.kernel(kernel_name(prefix, tokens.dtype, "few"))
        # Some sizes have none.
        self._many = library.find(kernel_name(prefix, tokens.dtype, "many"))
        #: Beyond so many steps the kernel for many is taken, where there is one.
        self.few_steps = FEW_STEPS
        self.graph, self.token_type = graph, tokens.dtype
        self.chunk_length, self.num_arguments = model.chunk_length, len(graph.inputs) + len(graph.outputs) + 1
        self.max_batch, self.has_many = _MOST_STEPS // self.chunk_length, self._many is not None

    def with_few_steps(self, few_steps: int) -> CudaFunction:
        """Another of the same kernels."""
        function = copy.copy(self)
        function.few_steps = few_steps
        return function

    def new_program(self) -> _CudaProgram:
        return _CudaProgram(self)

    def close(self) -> None:
        """The library is closed by the backend."""

    def launch(self, steps: int, arguments: KernelArguments, stream: int) -> None:
        if self._many is None or steps <= self.few_steps:
            self._few.launch(steps, arguments, stream)
        else:
            self._many.launch(-(-steps // self._many.threads), arguments, stream)


class _CudaProgram:
    """Needs no memory of its own."""

    def __init__(self, function: CudaFunction) -> None:
        self._function, self._steps = function, 0
        self._arguments = KernelArguments(function.num_arguments)

    def bind(self, batch: int, addresses: Sequence[int]) -> None:
        self._steps = batch * self._function.chunk_length
        self._arguments.set((*addresses, self._steps))

    def enqueue(self, stream: int) -> None:
        self._function.launch(self._steps, self._arguments, stream)

    def close(self) -> None:
        """Holds nothing."""
