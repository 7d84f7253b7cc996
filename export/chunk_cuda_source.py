"""CUDA source of a chunk tokenizer with its tables inside, from the same plan as the C source.

The arithmetic is written once, in `templates/rfsq_chunk_tokenizer.cu`; what is generated are sizes and tables in front
of it and the kernels that `runtime/backends/cuda.py` launches behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rfsq.export.c_source import Array, IntArray, filled, number, table
from rfsq.export.chunk_c_source import at_budgets, check_size, most_ranks, padded, sure_cost
from rfsq.export.chunk_plan import ACTION_LIMIT, ChunkPlan
from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.runtime.bundle.manifest import CHUNKS_OF_BLOCK, TOKEN_TYPES, KernelKind, TokenType, kernel_name, token_types

#: Numbers in the tables. NVRTC takes 9 seconds and 2 GB for so many.
MOST_NUMBERS = 2**21
_WARP = 32
#: What static shared memory has.
_SHARED_BYTES = 48 * 1024
#: Threads of a block: at most so many where a chunk has one, and so many where chunks share one.
_MOST_FEW_THREADS, _MANY_THREADS = 512, 256
#: Warps of a block that encodes one chunk: on one multiprocessor more would wait for each other.
_MOST_FEW_WARPS = 16
#: Chunks that a warp decodes side by side.
_GROUP = 8
#: Blocks of the many decoders that share a multiprocessor: registers for so many, and shared memory.
_MANY_BLOCKS = 4
#: As in the template: a place of no bit, behind every token.
_NO_PLACE = 2**16 - 1


@dataclass(frozen=True)
class _Blocks:
    """How kernels are divided: warps of the encoders, 0 where chunks cannot share a block."""

    few_threads: int
    few_warps: int
    many_warps: int
    has_many_decoders: bool


def cuda_chunk_tokenizer(plan: ChunkPlan, fingerprint: str) -> str:
    """fingerprint: stated in the source.

    Raises SourceTooLargeError for more than MOST_NUMBERS, BuildInputError for numbers that float32 does not hold.
    """
    sizes, tables = plan.sizes, _tables(plan)
    check_size(plan, tables.values(), MOST_NUMBERS, "cuda")
    blocks = _blocks(plan)
    kernels = [
        kernel for token in token_types(2**sizes.token_bits, "uint16") for kernel in _kernels(plan, token, blocks)
    ]
    source = filled(
        "rfsq_chunk_tokenizer.cu",
        SIZES="\n".join(_sizes(plan, blocks)),
        TABLES="\n".join(table(_kind(values), name, values) for name, values in tables.items()),
        ARITHMETIC=filled("arithmetic.cu").rstrip(),
        KERNELS="\n".join(kernels).rstrip(),
    )
    return f"/* Generated, do not edit; fingerprint {fingerprint}. */\n{source}"


def _sizes(plan: ChunkPlan, blocks: _Blocks) -> list[str]:
    sizes = plan.sizes
    return [
        f"constexpr int T = {sizes.chunk_length}, A = {sizes.action_dim}, L = {sizes.num_tokens};",
        f"constexpr int CLASSES = {sizes.num_classes - 1}, M = {plan.num_latents}, BUDGETS = {len(plan.budget_bits)};",
        f"constexpr int TOKEN_BITS = {sizes.token_bits}, CLASS_BITS = {sizes.class_bits}, MOST_BITS = {MOST_BITS};",
        f"constexpr int RANKS = {most_ranks(plan)}, GROUP = {_GROUP}, DECODED_CHUNKS = {CHUNKS_OF_BLOCK['decoder']};",
        f"constexpr int FEW_THREADS = {blocks.few_threads};",
        f"constexpr int MANY_THREADS = {_MANY_THREADS}, MANY_BLOCKS = {_MANY_BLOCKS};",
        f"constexpr float ACTION_LIMIT = {number(ACTION_LIMIT)}, SURE_COST = {number(sure_cost(plan))};",
        "/* The cost of a class that is not sent. */",
        f"constexpr float NEVER = {number(float(np.finfo(np.float32).max))};",
        f"[[maybe_unused]] constexpr float SUM_OF_WEIGHTS = {number(float(plan.weights.astype(np.float64).sum()))};",
        "/* Whether latents hold less than all of a chunk. */",
        f"#define HAS_REST {int(plan.num_latents < sizes.num_values)}",
        f"#define HAS_MANY_DECODERS {int(blocks.has_many_decoders)}",
    ]


def _blocks(plan: ChunkPlan) -> _Blocks:
    values, latents, tokens = plan.sizes.num_values, _padded_latents(plan), plan.sizes.num_tokens
    classes, rows = plan.sizes.num_classes - 1, -(-values // 4) * 4

    def warps(chunks: int, most: int) -> int:
        """Of an encoder that takes so many chunks at once: so many have room."""
        desk, shared = 4 * (rows * chunks + 2 * latents + tokens), 4 * chunks * (rows + classes + 1)
        return max(min((_SHARED_BYTES - shared) // desk, most, classes), 0)

    slots = CHUNKS_OF_BLOCK["decoder"] + (classes + 1) * (_GROUP - 1)
    decoder = 4 * (classes + 2) + 2 * slots + _MANY_THREADS // _WARP * _GROUP * (4 * latents + 2 * tokens) + 16
    wanted = max(4 * values, latents)
    many_warps = warps(CHUNKS_OF_BLOCK["encoder"], _MANY_THREADS // _WARP)
    return _Blocks(
        few_threads=min(-(-wanted // _WARP) * _WARP, _MOST_FEW_THREADS),
        few_warps=warps(1, _MOST_FEW_WARPS),
        # Fewer would keep a multiprocessor idle.
        many_warps=many_warps if many_warps >= min(4, classes) else 0,
        has_many_decoders=decoder <= _SHARED_BYTES,
    )


def _padded_latents(plan: ChunkPlan) -> int:
    return -(-plan.num_latents // 4) * 4


def _tables(plan: ChunkPlan) -> dict[str, Array | IntArray]:
    """Latents lie side by side, and so do the values that a decoder's threads have."""
    length = plan.sizes.chunk_length
    used = most_ranks(plan) + 1
    basis = padded(plan.basis, -1, 4)
    return {
        "OFFSETS": np.tile(plan.offset, length),
        "UNITS": np.tile(plan.units, length),
        "INVERSE_UNITS": np.tile(plan.inverse_units, length),
        "WEIGHTS": plan.weights,
        "BOUNDS": np.asarray(plan.bounds),
        "MEAN": padded(plan.mean, -1, 4),
        "ENCODER_BASIS": padded(basis, 1, 4),
        "DECODER_BASIS": np.ascontiguousarray(basis.swapaxes(1, 2)),
        "INVERSE_WIDTH": padded(plan.inverse_width, -1, 4),
        "WIDTH": padded(plan.width[..., :used].swapaxes(1, 2), -1, 4),
        # What pads the latents has one level.
        "BUDGET_HALF": np.exp2(padded(plan.counts.swapaxes(0, 1), -1, 4) - 1.0),
        "BUDGET_WIDTH": padded(at_budgets(plan), -1, 4),
        "PLACE": _places(plan),
    }


def _places(plan: ChunkPlan) -> IntArray:
    """[C - 1, most ranks, M]: where the bits of a latent stand, first to last.

    32 times the token plus how far left the bit has to be shifted to be the highest of 32.
    """
    sizes = plan.sizes
    found = np.full((len(plan.order), most_ranks(plan), _padded_latents(plan)), _NO_PLACE, np.int64)
    for own, order in zip(found, plan.order, strict=True):
        ranks = np.zeros(plan.num_latents, np.int64)
        for place, latent in enumerate(order, sizes.class_bits):
            token, bit = divmod(place, sizes.token_bits)
            own[ranks[latent], latent] = 32 * token + 32 - sizes.token_bits + bit
            ranks[latent] += 1
    return found


def _kind(values: Array | IntArray) -> str:
    c_type = "uint16" if np.issubdtype(values.dtype, np.integer) else "float"
    return f"alignas(16) __device__ const {c_type}"


def _kernels(plan: ChunkPlan, token: TokenType, blocks: _Blocks) -> list[str]:
    """One for few chunks and, where the sizes suit it, one for many."""
    c_type = TOKEN_TYPES[token]
    encoded = f"const float *actions, {c_type} *tokens, Chunks chunks"
    decoded = f"const {c_type} *tokens, float *actions, Chunks chunks, Chunks num_tokens"

    def encoder(chunks: int, warps: int) -> str:
        name = kernel_name(None, token, "few" if chunks == 1 else "many")
        return _kernel(name, str(_WARP * warps), encoded, f"encode<{chunks}, {warps}>(actions, tokens, chunks)")

    def decoder(kind: KernelKind, threads: str, call: str) -> str:
        return _kernel(kernel_name(plan.sizes.num_tokens, token, kind), threads, decoded, call)

    kernels = [
        encoder(1, blocks.few_warps),
        decoder("few", "FEW_THREADS", "decode_few(tokens, actions, (int)num_tokens)"),
    ]
    if blocks.many_warps:
        kernels.append(encoder(CHUNKS_OF_BLOCK["encoder"], blocks.many_warps))
    if blocks.has_many_decoders:
        kernels.append(
            decoder("many", "MANY_THREADS, MANY_BLOCKS", "decode_many(tokens, actions, chunks, (int)num_tokens)")
        )
    return kernels


def _kernel(name: str, threads: str, arguments: str, body: str) -> str:
    return f'extern "C" __global__ void __launch_bounds__({threads}) {name}({arguments})\n{{\n    {body};\n}}\n'
