"""The generated CUDA of random models, run on the processor: a C++ compiler takes the kernels as they are."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from rfsq.export.chunk_tokens import ChunkTokens
from rfsq.runtime.bundle.manifest import (
    BELIEF_HEADER_BYTES,
    CHUNKS_OF_BLOCK,
    CHUNKS_OF_WINDOW,
    IS_LOGITS,
    KEEPS_MODE,
    TAKES_TURNS,
    KernelKind,
    belief_kernel_name,
    belief_slot_bytes,
    bytes_of_window,
    kernel_name,
    sorter_name,
)
from tests.bundles import Deployed, generate_cuda
from tests.export.c_library import run
from tests.runtime.backends.gpu.fake_gpu import aligned

#: The kernels look at the same bits as different types, as CUDA allows; and what is shared by a block is static here,
#: and must not be one with that of another model's kernels in the same process. Jumps lead from stack to stack, which
#: _FORTIFY_SOURCE, the default of some systems, takes for an error.
FLAGS = (
    "-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-w",
    "-shared", "-fPIC",
)  # fmt: skip
#: What no processor has, and what stands for it.
INSTRUCTIONS = {
    'asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));': "x = ptx_ex2(x);",
    'asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));': "x = ptx_rcp(x);",
    'asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(tokens), "r"(weights));': (
        "sum = ptx_dp4a(tokens, weights, sum);"
    ),
}
CHUNK_INSTRUCTIONS = {
    'asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));': "x = ptx_ex2(x);",
    'asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));': "inverse = ptx_rcp(b);",
}
#: Stands behind every output, and has to stand there afterwards.
GUARD, GUARD_BYTES = 77, 256


class Kernels:
    """The kernels of a source. flags: more for the compiler."""

    def __init__(self, folder: Path, source: str, flags: tuple[str, ...] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernels.cpp").write_text(f'#include "cuda_on_cpu.h"\n{source}', encoding="utf-8")
        run(["g++", *FLAGS, *flags, "-I", Path(__file__).parent, "kernels.cpp", "-o", "kernels.so"], folder)
        self._library = ctypes.CDLL(str(folder / "kernels.so"))
        self._library.run_kernel.restype = ctypes.c_bool

    def run(
        self,
        name: str,
        grid: tuple[int, int],
        inputs: list[np.ndarray],
        shapes: Sequence[tuple[tuple[int, ...], str] | None],
        numbers: tuple[int, ...],
        *,
        is_backwards: bool = False,
    ) -> list[np.ndarray]:
        """grid: blocks, and threads of each; shapes: of the outputs, with their types, None for what is a null pointer;
        numbers: further arguments."""
        outputs = [given for given in shapes if given is not None]
        sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in outputs]
        written = [aligned((size + GUARD_BYTES,), np.uint8) for size in sizes]
        for memory in written:
            memory.fill(GUARD)
        arrays, left = [*map(_copied, inputs)], iter(written)
        pointers = [array.ctypes.data for array in arrays]
        pointers += [0 if given is None else next(left).ctypes.data for given in shapes]
        values = (ctypes.c_void_p * (len(pointers) + len(numbers)))(*pointers, *numbers)
        self.launch(name, grid, values, is_backwards=is_backwards)
        for memory, size in zip(written, sizes, strict=True):
            assert (memory[size:] == GUARD).all(), "written beyond the end"
        return [
            memory[:size].view(dtype).reshape(shape)
            for memory, size, (shape, dtype) in zip(written, sizes, outputs, strict=True)
        ]

    def launch(
        self, name: str, grid: tuple[int, int], values: ctypes.Array[ctypes.c_void_p], *, is_backwards: bool = False
    ) -> None:
        """values: of the kernel's parameters."""
        kernel = ctypes.cast(self._library[name], ctypes.c_void_p)
        assert self._library.run_kernel(kernel, *grid, is_backwards, values, len(values)), "threads wait"


class CudaOnCpu:
    """encode and decode by one kind of kernel. is_backwards: blocks and threads take their turns from the last on.

    flags: more for the compiler; without: what to leave out of the source.
    """

    def __init__(self, folder: Path, deployed: Deployed, *, flags: tuple[str, ...] = (), without: str = "") -> None:
        self._recipe = deployed.recipe
        self.source = source = generate_cuda(deployed)
        for found, replacement in INSTRUCTIONS.items():
            assert source.count(found) == 1, found
            source = source.replace(found, replacement)
        self._kernels = Kernels(folder, source.replace(without, "") if without else source, flags)

    def has(self, prefix: int | None, token_type: str, kind: KernelKind) -> bool:
        return f" {kernel_name(prefix, token_type, kind)}(" in self.source

    def encode(
        self, actions: np.ndarray, token_type: str, kind: KernelKind, *, is_backwards: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """actions [S, A] -> tokens [S, D, L] and, of a `dynamic` model, stats [S, L, 2]."""
        sizes = self._recipe.config
        shapes: list[tuple[tuple[int, ...], str]] = [
            ((len(actions), sizes.latent_dim, sizes.num_layers), token_type),
            *([((len(actions), sizes.num_layers, 2), "float32")] if self._recipe.mode.has_stats else []),
        ]
        tokens, *stats = self._run(kernel_name(None, token_type, kind), [actions], shapes, is_backwards)
        return tokens, stats[0] if stats else None

    def decode(
        self, tokens: np.ndarray, stats: np.ndarray | None, kind: KernelKind, *, is_backwards: bool = False
    ) -> np.ndarray:
        """tokens [S, D, l] (and stats [S, l, 2]) -> actions [S, A]."""
        name = kernel_name(tokens.shape[-1], tokens.dtype.name, kind)
        inputs = [tokens] if stats is None else [tokens, stats]
        shape = (len(tokens), self._recipe.config.action_dim)
        [actions] = self._run(name, inputs, [(shape, "float32")], is_backwards)
        return actions

    def beliefs(
        self,
        given: np.ndarray,
        *,
        is_logits: bool,
        keeps_mode: bool = False,
        coarse: int = 1,
        sharpness: np.ndarray | None = None,
        has_all: bool = True,
        is_backwards: bool = False,
    ) -> list[np.ndarray]:
        """given [B, T, D, l, K] -> actions and, with has_all, std [B, T, A], mode_probability [B], mode
        [B, T, D, coarse]."""
        sizes, (batch, length, latents, layers, _) = self._recipe.config, given.shape
        actions = ((batch, length, sizes.action_dim), "float32")
        others = actions, ((batch,), "float32"), ((batch, length, latents, coarse), "int32")
        gathered = np.zeros((batch, 2), np.uint32)
        terms = is_logits * IS_LOGITS + keeps_mode * KEEPS_MODE
        numbers = (0 if sharpness is None else sharpness.ctypes.data, gathered.ctypes.data, terms, coarse)
        found = self._kernels.run(
            belief_kernel_name(layers),
            (batch * length, constant(self.source, "BELIEF_THREADS")),
            [given],
            [actions, *(output if has_all else None for output in others)],
            numbers,
            is_backwards=is_backwards,
        )
        assert not gathered.any(), "what the blocks tell each other is not as it was"
        return found

    def _run(
        self, name: str, inputs: list[np.ndarray], shapes: list[tuple[tuple[int, ...], str]], is_backwards: bool
    ) -> list[np.ndarray]:
        steps = len(inputs[0])
        # As the runtime launches them: a block for each step, or a thread.
        threads = constant(self.source, "WARPS") * 32 if name.endswith("many") else constant(self.source, "FEW_THREADS")
        blocks = -(-steps // threads) if name.endswith("many") else steps
        return self._kernels.run(name, (blocks, threads), inputs, shapes, (steps,), is_backwards=is_backwards)


class ChunkCudaOnCpu:
    """The same of chunk tokens. replaced: what else stands for something in the source."""

    def __init__(self, folder: Path, deployed: ChunkTokens, replaced: Mapping[str, str] | None = None) -> None:
        self._model, self.source = deployed.model, deployed.cuda_source()
        source = self.source
        for found, replacement in {**CHUNK_INSTRUCTIONS, **(replaced or {})}.items():
            assert source.count(found) == 1, found
            source = source.replace(found, replacement)
        self._kernels = Kernels(folder, source)

    def has(self, role: str, token_type: str, kind: KernelKind) -> bool:
        return f" {self._name(role, token_type, kind)}(" in self.source

    def encode(
        self, actions: np.ndarray, token_type: str, kind: KernelKind, *, is_backwards: bool = False
    ) -> np.ndarray:
        """actions [B, T, A] -> tokens [B, L]."""
        shape = self._model.tokens_shape(len(actions))
        return self._run("encoder", kind, actions, (shape, token_type), (), is_backwards)

    def decode(
        self,
        tokens: np.ndarray,
        kind: KernelKind,
        *,
        is_backwards: bool = False,
        sorted_by: np.ndarray | None = None,
        blocks: int = 7,
    ) -> np.ndarray:
        """tokens [B, l] -> actions [B, T, A].

        sorted_by: what the tokens of many chunks were when they were sorted; blocks: so many decode these. Where there
        are fewer than tiles, each takes several.
        """
        numbers: tuple[int, ...] = tokens.shape[1:]
        if kind == "many":
            memory = self._sort(tokens if sorted_by is None else sorted_by, is_backwards=is_backwards)
            numbers = (*numbers, memory.ctypes.data)
        shape = self._model.actions_shape(len(tokens))
        return self._run("decoder", kind, tokens, (shape, "float32"), numbers, is_backwards, blocks)

    def beliefs(
        self,
        given: tuple[np.ndarray, ...],
        *,
        is_logits: bool,
        keeps_mode: bool = False,
        sharpness: np.ndarray | None = None,
        consumers: int = 3,
        has_all: bool = True,
        is_backwards: bool = False,
    ) -> list[np.ndarray]:
        """Words [B, l, V], or classes [B, C] and bits [B, n] -> actions and, with has_all, std [B, T, A],
        mode_probability [B], mode [B]. consumers: blocks of a chunk that decode classes."""
        model, batch = self._model, len(given[0])
        consumers = min(consumers, model.num_classes)
        size = belief_slot_bytes(
            model.chunk_length * model.action_dim, model.num_classes, model.depth * model.token_bits
        )
        name = belief_kernel_name("words" if len(given) == 1 else "bits", size)
        tokens = given[0].shape[1] if len(given) == 1 else (model.class_bits + given[1].shape[1]) // model.token_bits
        memory = aligned((BELIEF_HEADER_BYTES + batch * size + GUARD_BYTES,), np.uint8)
        memory[-GUARD_BYTES:] = GUARD
        actions, chunks = (model.actions_shape(batch), "float32"), (batch,)
        # What others wait for goes first, in whichever order the blocks come.
        terms = is_logits * IS_LOGITS + keeps_mode * KEEPS_MODE + TAKES_TURNS
        sharp = 0 if sharpness is None else sharpness.ctypes.data
        threads = self._threads(name)
        producers = 0 if len(given) == 2 else -(-(tokens - 1) // (threads // 32))
        found = self._kernels.run(
            name,
            (batch * (producers + consumers), threads),
            list(given),
            [actions, *(part if has_all else None for part in (actions, (chunks, "float32"), (chunks, "int32")))],
            (sharp, memory.ctypes.data, terms, tokens, consumers),
            is_backwards=is_backwards,
        )
        assert (memory[-GUARD_BYTES:] == GUARD).all(), "written beyond the end"
        told = memory[BELIEF_HEADER_BYTES:-GUARD_BYTES].reshape(batch, size)[:, :16]
        assert not told.any(), "what blocks tell each other is not as it was"
        assert not memory[:BELIEF_HEADER_BYTES].any(), "it is still somebody's turn"
        return found

    def _sort(self, tokens: np.ndarray, *, is_backwards: bool) -> np.ndarray:
        """The workspace of the decoder."""
        count, length = tokens.shape
        windows = -(-count // CHUNKS_OF_WINDOW)
        memory = aligned((windows * bytes_of_window(self._model.num_classes) + GUARD_BYTES,), np.uint8)
        memory.fill(GUARD)
        name = sorter_name(self._model.depth, tokens.dtype.name)
        numbers = (count, length, memory.ctypes.data)
        # Of actions it writes none.
        grid, actions = (windows, self._threads(name)), ((0,), "float32")
        self._kernels.run(name, grid, [tokens], [actions], numbers, is_backwards=is_backwards)
        assert (memory[-GUARD_BYTES:] == GUARD).all(), "written beyond the end"
        return memory

    def _name(self, role: str, token_type: str, kind: KernelKind) -> str:
        return kernel_name(self._model.depth if role == "decoder" else None, token_type, kind)

    def _run(
        self,
        role: Literal["encoder", "decoder"],
        kind: KernelKind,
        given: np.ndarray,
        output: tuple[tuple[int, ...], str],
        numbers: tuple[int, ...],
        is_backwards: bool,
        many_decoders: int = 0,
    ) -> np.ndarray:
        name = self._name(role, output[1] if role == "encoder" else given.dtype.name, kind)
        blocks = len(given)
        if kind == "many":
            blocks = many_decoders if role == "decoder" else -(-blocks // CHUNKS_OF_BLOCK["encoder"])
        grid = (blocks, self._threads(name))
        [found] = self._kernels.run(name, grid, [given], [output], (len(given), *numbers), is_backwards=is_backwards)
        return found

    def _threads(self, name: str) -> int:
        """As the runtime launches a kernel: with as many as it is compiled for."""
        bound = re.search(rf"__launch_bounds__\((\w+)[^)]*\) {name}\(", self.source)
        assert bound is not None, name
        return int(bound[1]) if bound[1].isdigit() else constant(self.source, bound[1])


def constant(source: str, name: str) -> int:
    """The value of a whole number that a source states."""
    found = re.search(rf"\b{name} = (\d+)", source)
    assert found is not None
    return int(found[1])


def _copied(array: np.ndarray) -> np.ndarray:
    """Where arrays of the GPU lie: at a multiple of 256 bytes."""
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy
