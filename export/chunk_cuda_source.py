"""CUDA source of a chunk tokenizer with its tables inside, from the same plan as the C source.

The arithmetic is written once, in `templates/rfsq_chunk_tokenizer.cu`; what is generated are sizes and tables in front
of it and the kernels that `runtime/backends/cuda.py` launches behind it.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rfsq.export.c_tables import Array, IntArray, filled, number, table
from rfsq.export.chunk_c_source import (
    MOST_SPELLED,
    at_budgets,
    check_size,
    most_ranks,
    packed_table,
    padded,
    sure_cost,
)
from rfsq.export.chunk_plan import ACTION_LIMIT, ChunkPlan
from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.runtime.bundle.beliefs import ENGINE_SUM_TOLERANCE
from rfsq.runtime.bundle.manifest import (
    CHUNKS_OF_BLOCK,
    CHUNKS_OF_WINDOW,
    IS_LOGITS,
    KEEPS_MODE,
    TAKES_TURNS,
    TOKEN_TYPES,
    KernelKind,
    TokenType,
    belief_kernel_name,
    belief_slot_bytes,
    kernel_name,
    sorter_name,
    token_types,
)

#: Numbers in the tables, which have each basis twice. NVRTC takes 20 seconds and 7 GB for so many.
MOST_NUMBERS = 12 * 2**20
_WARP = 32
#: What static shared memory has.
_SHARED_BYTES = 48 * 1024
#: Threads of a block: at most so many where a chunk has one; where chunks share one, of encoders and decoders; and
#: where they are sorted.
_MOST_FEW_THREADS, _MANY_THREADS, _DECODER_THREADS, _SORT_THREADS = 512, 256, 128, 1024
#: Warps of a block that encodes one chunk: on one multiprocessor more would wait for each other.
_MOST_FEW_WARPS = 16
#: Chunks whose tokens a decoder's thread reads together.
_GROUP = 8
#: Blocks of the decoder for many that share a multiprocessor: registers for so many.
_DECODER_BLOCKS = 5
#: Levels of so many bits are looked up; of more, they are computed.
_LEVEL_BITS = 9
#: Two chunks are decoded in one word.
_MOST_PAIRED_RANKS = 15
#: As in the template: a place of no bit, behind every token.
_NO_PLACE = 2**16 - 1


@dataclass(frozen=True)
class _Blocks:
    """How kernels are divided: warps of the encoders, 0 where chunks cannot share a block.

    holds_basis: whether a decoder for many has room for that of a class.
    """

    few_threads: int
    few_warps: int
    many_warps: int
    has_many_decoders: bool
    holds_basis: bool


def cuda_chunk_tokenizer(plan: ChunkPlan, fingerprint: str) -> str:
    """fingerprint: stated in the source.

    Raises SourceTooLargeError for more than MOST_NUMBERS, BuildInputError for numbers that float32 does not hold.
    """
    sizes, tables = plan.sizes, _tables(plan)
    check_size(plan, tables.values(), MOST_NUMBERS, "cuda")
    blocks = _blocks(plan)
    kernels = [_belief_kernel("words", plan), _belief_kernel("bits", plan)]
    kernels += [
        kernel for token in token_types(2**sizes.token_bits, "uint16") for kernel in _kernels(plan, token, blocks)
    ]
    source = filled(
        "rfsq_chunk_tokenizer.cu",
        SIZES="\n".join(_sizes(plan, blocks)),
        TABLES="\n".join(_table(name, values) for name, values in tables.items()),
        ARITHMETIC=filled("arithmetic.cu").rstrip(),
        DECODE_FEW=filled("rfsq_chunk_decode_few.cu").rstrip(),
        DECODE_MANY=filled("rfsq_chunk_decode_many.cu").rstrip(),
        ENCODE=filled("rfsq_chunk_encode.cu").rstrip(),
        BELIEFS=filled("chunk_beliefs.cu").rstrip(),
        KERNELS="\n".join(kernels).rstrip(),
    )
    return f"/* Generated, do not edit; fingerprint {fingerprint}. */\n{source}"


def _sizes(plan: ChunkPlan, blocks: _Blocks) -> list[str]:
    sizes = plan.sizes
    return [
        f"constexpr int T = {sizes.chunk_length}, A = {sizes.action_dim}, L = {sizes.num_tokens};",
        f"constexpr int CLASSES = {sizes.num_classes - 1}, M = {plan.num_latents}, BUDGETS = {len(plan.budget_bits)};",
        f"constexpr int TOKEN_BITS = {sizes.token_bits}, CLASS_BITS = {sizes.class_bits}, MOST_BITS = {MOST_BITS};",
        f"constexpr int RANKS = {most_ranks(plan)}, PLACE_WORDS = {_place_words(plan)}, LEVEL_BITS = {_LEVEL_BITS};",
        f"constexpr int GROUP = {_GROUP}, TILE = {CHUNKS_OF_BLOCK['decoder']}, WINDOW = {CHUNKS_OF_WINDOW};",
        f"constexpr int FEW_THREADS = {blocks.few_threads}, SORT_THREADS = {_SORT_THREADS};",
        f"constexpr int MANY_THREADS = {_DECODER_THREADS}, MANY_BLOCKS = {_DECODER_BLOCKS};",
        f"constexpr bool HOLDS_BASIS = {str(blocks.holds_basis).lower()};",
        f"constexpr float ACTION_LIMIT = {number(ACTION_LIMIT)}, SURE_COST = {number(sure_cost(plan))};",
        "/* The cost of a class that is not sent. */",
        f"constexpr float NEVER = {number(float(np.finfo(np.float32).max))};",
        f"[[maybe_unused]] constexpr float SUM_OF_WEIGHTS = {number(float(plan.weights.astype(np.float64).sum()))};",
        f"constexpr int IS_LOGITS = {IS_LOGITS}, KEEPS_MODE = {KEEPS_MODE}, TAKES_TURNS = {TAKES_TURNS};",
        f"constexpr int SLOT_BYTES = {_slot_bytes(plan)};",
        f"constexpr float SUM_TOLERANCE = {number(ENGINE_SUM_TOLERANCE)};",
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

    wanted = max(4 * values, latents)
    many_warps = warps(CHUNKS_OF_BLOCK["encoder"], _MANY_THREADS // _WARP)
    # As `Tile` of the template.
    tile = CHUNKS_OF_BLOCK["decoder"]
    decoder = 4 * (2 ** (_LEVEL_BITS + 1) + tile * (latents + 2) + 2 * latents + 5) + 2 * tokens * (tile + 8) + 32
    return _Blocks(
        few_threads=min(-(-wanted // _WARP) * _WARP, _MOST_FEW_THREADS),
        few_warps=warps(1, _MOST_FEW_WARPS),
        # Fewer would keep a multiprocessor idle.
        many_warps=many_warps if many_warps >= min(4, classes) else 0,
        has_many_decoders=decoder <= _SHARED_BYTES and most_ranks(plan) <= _MOST_PAIRED_RANKS,
        holds_basis=decoder + 4 * latents * rows <= _SHARED_BYTES,
    )


def _place_words(plan: ChunkPlan) -> int:
    """Words of 32 bits of the places of a latent: so many that they are loaded four at a time."""
    return -(-most_ranks(plan) // 8) * 4


def _padded_latents(plan: ChunkPlan) -> int:
    return -(-plan.num_latents // 4) * 4


def _tables(plan: ChunkPlan) -> dict[str, Array | IntArray]:
    """Latents lie side by side, and so do the values that a decoder's threads have."""
    length = plan.sizes.chunk_length
    used = most_ranks(plan) + 1
    basis = padded(plan.basis, -1, 4)
    return {
        "OFFSETS": padded(np.tile(plan.offset, length), -1, 4),
        "UNITS": padded(np.tile(plan.units, length), -1, 4),
        "INVERSE_UNITS": np.tile(plan.inverse_units, length),
        "WEIGHTS": plan.weights,
        "BOUNDS": np.asarray(plan.bounds),
        "MEAN": padded(plan.mean, -1, 4),
        "ENCODER_BASIS": padded(basis, 1, 4),
        "DECODER_BASIS": np.ascontiguousarray(padded(basis, 1, 4).swapaxes(1, 2)),
        "INVERSE_WIDTH": padded(plan.inverse_width, -1, 4),
        "WIDTH": padded(plan.width[..., :used].swapaxes(1, 2), -1, 4),
        # What pads the latents has one level.
        "BUDGET_HALF": np.exp2(padded(plan.counts.swapaxes(0, 1), -1, 4) - 1.0),
        "BUDGET_WIDTH": padded(at_budgets(plan), -1, 4),
        "PLACE": _places(plan),
    }


def _places(plan: ChunkPlan) -> IntArray:
    """[C - 1, M, most ranks]: where the bits of a latent stand, first to last.

    32 times the token plus how far left the token has to be rotated for the bit to stand where it counts, the first at
    the top of 32.
    """
    sizes = plan.sizes
    found = np.full((len(plan.order), _padded_latents(plan), 2 * _place_words(plan)), _NO_PLACE, np.int64)
    for own, order in zip(found, plan.order, strict=True):
        ranks = np.zeros(plan.num_latents, np.int64)
        for place, latent in enumerate(order, sizes.class_bits):
            token, bit = divmod(place, sizes.token_bits)
            rank = ranks[latent]
            own[latent, rank] = 32 * token + (32 - sizes.token_bits + bit - rank) % 32
            ranks[latent] += 1
    return found


def _table(name: str, values: Array | IntArray) -> str:
    kind = "alignas(16) __device__ const"
    if np.issubdtype(values.dtype, np.integer):
        return table(f"{kind} uint16", name, values)
    return table(f"{kind} float", name, values) if values.size <= MOST_SPELLED else packed_table(kind, name, values)


def _kernels(plan: ChunkPlan, token: TokenType, blocks: _Blocks) -> list[str]:
    """One for few chunks and, where the sizes suit it, one for many."""
    c_type, length = TOKEN_TYPES[token], plan.sizes.num_tokens
    encoded = f"const float *actions, {c_type} *tokens, Chunks chunks"
    decoded = f"const {c_type} *tokens, float *actions, Chunks chunks, Chunks num_tokens"

    def encoder(chunks: int, warps: int) -> str:
        name = kernel_name(None, token, "few" if chunks == 1 else "many")
        return _kernel(name, str(_WARP * warps), encoded, f"encode<{chunks}, {warps}>(actions, tokens, chunks)")

    few, many = (kernel_name(length, token, kind) for kind in typing.get_args(KernelKind))
    kernels = [
        encoder(1, blocks.few_warps),
        _kernel(few, "FEW_THREADS", decoded, "decode_few(tokens, actions, (int)num_tokens)"),
    ]
    if blocks.many_warps:
        kernels.append(encoder(CHUNKS_OF_BLOCK["encoder"], blocks.many_warps))
    if blocks.has_many_decoders:
        # All decoders have the same arguments, as far as they take them.
        sorting = "sort_by_class(tokens, windows, chunks, (int)num_tokens)"
        kernels.append(_kernel(sorter_name(length, token), "SORT_THREADS", f"{decoded}, Window *windows", sorting))
        call = "decode_many(tokens, actions, chunks, (int)num_tokens, windows)"
        kernels.append(_kernel(many, "MANY_THREADS, MANY_BLOCKS", f"{decoded}, Window *windows", call))
    return kernels


def _slot_bytes(plan: ChunkPlan) -> int:
    sizes = plan.sizes
    return belief_slot_bytes(sizes.num_values, sizes.num_classes, sizes.num_tokens * sizes.token_bits)


def _belief_kernel(form: Literal["words", "bits"], plan: ChunkPlan) -> str:
    """Of distributions over words, or over classes and bits."""
    given, classes, bits = ("const float *words", "nullptr", "words") if form == "words" else (
        "const float *classes, const float *bits", "classes", "bits"
    )  # fmt: skip
    arguments = (
        f"{given}, float *actions, float *deviations, float *mode_probability, int *mode, const float *sharpness, "
        "Workspace *workspace, Chunks terms, Chunks num_tokens, Chunks consumers"
    )
    question = f"Question{{{classes}, {bits}, sharpness, (int)terms, (int)num_tokens, (int)consumers}}"
    body = f"believe({question}, Answer{{actions, deviations, mode_probability, mode}}, workspace)"
    return _kernel(belief_kernel_name(form, _slot_bytes(plan)), "FEW_THREADS", arguments, body)


def _kernel(name: str, threads: str, arguments: str, body: str) -> str:
    return f'extern "C" __global__ void __launch_bounds__({threads}) {name}({arguments})\n{{\n    {body};\n}}\n'
