"""Beliefs on the generated CUDA engine: a kernel for each form in which they are given, and how it is launched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..bundle.manifest import (
    BELIEF_HEADER_BYTES,
    IS_LOGITS,
    KEEPS_MODE,
    TAKES_TURNS,
    GraphEntry,
    TensorEntry,
    belief_kernel_name,
    belief_slot_bytes,
)
from ..bundle.models import ChunkModel, ModelEntry
from .beliefs import mode_shape
from .gpu.belief_arrays import BeliefTerms
from .gpu.driver import DeviceMemory, open_device
from .gpu.kernels import Kernel, KernelArguments, KernelLibrary

#: A grid has so many blocks at most.
_MOST_BLOCKS = 2**31 - 1
#: What steps of a chunk tell each other: two words.
_STEP_SLOT_BYTES = 8
#: Chunk tokens of more chunks than have slots in so many bytes go through one after the other.
_MOST_SLOT_BYTES = 64 * 2**20
#: So many blocks for each multiprocessor are worth it to divide a chunk between several.
_BLOCKS_EACH = 4
_WARP = 32


class BeliefKernels:
    """The kernels of a library; none, where the engine was compiled before there were any."""

    def __init__(self, library: KernelLibrary, model: ModelEntry) -> None:
        self.model = model
        self.slot_bytes = _STEP_SLOT_BYTES
        if isinstance(model, ChunkModel):
            values, bits = model.chunk_length * model.action_dim, model.num_tokens * model.token_bits
            self.slot_bytes = belief_slot_bytes(values, model.num_classes, bits)
            # By the number of arrays that are given.
            names = {1: belief_kernel_name("words", self.slot_bytes), 2: belief_kernel_name("bits", self.slot_bytes)}
        else:
            names = {prefix: belief_kernel_name(prefix) for prefix in model.prefixes}
        found = {key: library.find(name) for key, name in names.items()}
        self._kernels: Mapping[int, Kernel] = {key: kernel for key, kernel in found.items() if kernel is not None}
        self.are_there = len(self._kernels) == len(names)

    def of(self, terms: BeliefTerms) -> Kernel:
        """The one that takes what is given so."""
        return self._kernels[len(terms.shapes) if isinstance(self.model, ChunkModel) else terms.shapes[0][-2]]


@dataclass(frozen=True)
class BeliefFunction:
    """A `GpuFunction` that decodes beliefs on these terms. Those on equal terms are equal."""

    reads_once = False

    terms: BeliefTerms
    kernels: BeliefKernels = field(compare=False)

    @property
    def graph(self) -> GraphEntry:
        model, names = self.kernels.model, ("given", "bits")
        inputs = (
            TensorEntry(name, "float32", (-1, *shape)) for name, shape in zip(names, self.terms.shapes, strict=False)
        )
        actions = TensorEntry("actions", "float32", model.actions_shape(-1))
        others = (
            TensorEntry("std", "float32", model.actions_shape(-1)),
            TensorEntry("mode_probability", "float32", (-1,)),
            TensorEntry("mode", "int32", mode_shape(model, -1)),
        )
        wanted = (tensor for tensor, is_wanted in zip(others, self.terms.wanted, strict=True) if is_wanted)
        # No file has it, and no tensor of it a second size that is not fixed.
        return GraphEntry("", "belief", model.depth, "reduce", tuple(inputs), (actions, *wanted))

    @property
    def max_batch(self) -> int:
        return _MOST_BLOCKS // self.kernels.model.chunk_length

    def new_program(self) -> BeliefProgram:
        return BeliefProgram(self)

    def close(self) -> None:
        """The library is closed by the backend."""


class BeliefProgram:
    """Has memory of its own in which blocks tell each other what they know, and the sharpness of its terms."""

    def __init__(self, function: BeliefFunction) -> None:
        self._function, self._kernel = function, function.kernels.of(function.terms)
        self._sharpness: DeviceMemory | None = None
        self._workspace: DeviceMemory | None = None
        self._launches: list[tuple[int, KernelArguments]] = []
        terms = function.terms
        self._terms = terms.is_logits * IS_LOGITS + terms.keeps_mode * KEEPS_MODE
        if terms.sharpness:
            self._sharpness = DeviceMemory(len(terms.sharpness))
            self._sharpness.write(terms.sharpness)

    def bind(self, shape: tuple[int, ...], addresses: Sequence[int]) -> None:
        graph, batch = self._function.graph, shape[0]
        tensors = (*graph.inputs, *graph.outputs)
        sizes = [math.prod(tensor.shape_of(1, 1)) * np.dtype(tensor.dtype).itemsize for tensor in tensors]
        model, slot_bytes = self._function.kernels.model, self._function.kernels.slot_bytes
        most = max(1, _MOST_SLOT_BYTES // slot_bytes) if isinstance(model, ChunkModel) else batch
        self._require(BELIEF_HEADER_BYTES * isinstance(model, ChunkModel) + min(batch, most) * slot_bytes)
        self._launches = [
            self._launch(
                [address + start * size for address, size in zip(addresses, sizes, strict=True)],
                min(most, batch - start),
            )
            for start in range(0, batch, most)
        ]

    def enqueue(self, stream: int) -> None:
        for blocks, arguments in self._launches:
            self._kernel.launch(blocks, arguments, stream)

    def close(self) -> None:
        for memory in (self._sharpness, self._workspace):
            if memory is not None:
                # Waits for what is under way in it.
                memory.close()
        self._sharpness = self._workspace = None

    def _require(self, num_bytes: int) -> None:
        """A workspace of so many bytes, zeros all, as each launch leaves it."""
        if self._workspace is None or self._workspace.num_bytes < num_bytes:
            if self._workspace is not None:
                self._workspace.close()
            self._workspace = DeviceMemory(num_bytes)
            self._workspace.clear()

    def _launch(self, addresses: Sequence[int], batch: int) -> tuple[int, KernelArguments]:
        """Blocks and arguments for so many chunks; addresses: of what is given, and of what is wanted."""
        terms, model = self._function.terms, self._function.kernels.model
        count = len(terms.shapes)
        outputs = iter(addresses[count + 1 :])
        pointers = [*addresses[: count + 1], *(next(outputs) if is_wanted else 0 for is_wanted in terms.wanted)]
        pointers += [memory.address if memory else 0 for memory in (self._sharpness, self._workspace)]
        numbers: tuple[int, ...]
        if isinstance(model, ChunkModel):
            blocks, numbers = self._of_chunks(model, batch)
        else:
            blocks, numbers = batch * model.chunk_length, (self._terms, terms.coarse)
        arguments = KernelArguments(len(pointers) + len(numbers))
        arguments.set((*pointers, *numbers))
        return blocks, arguments

    def _of_chunks(self, model: ChunkModel, batch: int) -> tuple[int, tuple[int, int, int]]:
        """Blocks, and what the kernel is told beside what blocks of per-step tokens are: with them, how chunks are
        divided."""
        shapes = self._function.terms.shapes
        tokens, producers = (model.class_bits + shapes[-1][0]) // model.token_bits, 0
        if len(shapes) == 1:
            tokens = shapes[0][0]
            producers = -(-(tokens - 1) // (self._kernel.threads // _WARP))
        worth = _BLOCKS_EACH * open_device().multiprocessors // batch
        consumers = max(1, min(worth, model.num_classes))
        blocks = batch * (producers + consumers)
        # Those that wait may take the place of those that they wait for only where all have one.
        takes_turns = producers > 0 and blocks > self._kernel.resident_blocks
        return blocks, (self._terms + takes_turns * TAKES_TURNS, tokens, consumers)
