"""ONNX graphs of chunk tokens: an encoder that tries all classes, and one decoder for every number of tokens.

Formulas: `chunk_plan.py`. Code bits are digits of integers that float32 holds exactly, so that no runtime needs shifts.
C classes, L tokens, N = T * A values, M latents.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto

from rfsq.export.chunk_builder import ChunkBuilder, powers
from rfsq.export.chunk_escape import escape_chunks, escape_digits, num_blocks
from rfsq.export.chunk_plan import ACTION_LIMIT, ChunkPlan
from rfsq.export.graph_builder import LinearForm, batched
from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.rfsq_ref.chunk_code import ChunkSizes, ranks
from rfsq.rfsq_ref.chunk_escape import BLOCK_BITS
from rfsq.runtime.bundle.arrays import Float32Array
from rfsq.runtime.bundle.decoding import bit_places

#: The dynamic axis of tokens: how many of each chunk are decoded.
LENGTH = "length"

#: The cost of a class that breaks the bound. Not infinity: of costs that are all infinite, ONNX Runtime on CUDA finds
#: the least at a place that there is not.
_NEVER = 3e38


def chunk_encoder_graph(plan: ChunkPlan, form: LinearForm = LinearForm.GEMM) -> bytes:
    """actions float32 [batch, T, A] -> tokens int32 [batch, L].

    Every class is decoded at every budget: it takes memory for several float32 [C - 1, batch, N], and in the form
    `reduce` a library must be able to count [C - 1, batch, N, M] in int32.
    """
    sizes = plan.sizes
    build = ChunkBuilder(form)
    actions, is_legal = build.reshape("actions", (-1, sizes.num_values), "actions.flat"), ""
    if form.is_marked:
        within = build.is_within(actions, ACTION_LIMIT, "actions.limit")
        is_legal = build.all_of(within, "is_legal")
        # No index may come from a NaN.
        actions = build.apply("Where", [within, actions, build.numbers("nothing", 0)], "actions.legal")
    chunks = _normalised(build, plan, actions)
    trial = _trial(build, plan, chunks)
    costs = build.apply("Transpose", [_costs(build, plan, chunks, trial)], "costs.by_chunk", perm=[1, 0])
    best = build.apply("ArgMin", [costs], "best", axis=1)
    least = build.reduced("ReduceMin", costs, 1, "least", keep=True)
    is_kept = build.apply("Less", [least, build.numbers("never", _NEVER)], "best.is_kept")
    chosen = build.apply("Where", [is_kept, best, build.integers("escape", sizes.escape)], "class")
    kept = build.of_class(trial.digits, best, plan.num_latents, "best.digits")
    row = build.apply("Concat", [kept, *escape_digits(build, sizes, chunks)], "row", axis=1)
    tokens = _tokens(build, plan, row, chosen)
    if form.is_marked:
        tokens = build.apply("Where", [is_legal, tokens, build.numbers("illegal", -1)], "tokens.or_mark")
    build.apply("Cast", [tokens], "tokens", to=TensorProto.INT32)
    inputs = [batched("actions", TensorProto.FLOAT, sizes.chunk_length, sizes.action_dim)]
    return build.model("chunk_encoder", inputs, [batched("tokens", TensorProto.INT32, sizes.num_tokens)])


def chunk_decoder_graph(plan: ChunkPlan, form: LinearForm = LinearForm.GEMM) -> bytes:
    """The first tokens of each chunk, int32 [batch, length], length 1 ... L -> actions float32 [batch, T, A]."""
    sizes = plan.sizes
    build = ChunkBuilder(form)
    numbers, is_legal = build.apply("Cast", ["tokens"], "numbers", to=TensorProto.FLOAT), ""
    if form.is_marked:
        middle = (2**sizes.token_bits - 1) / 2
        from_middle = build.plus(numbers, -middle, "numbers.from_middle")
        is_legal = build.all_of(build.is_within(from_middle, middle, "numbers.limit"), "is_legal")
    row = _filled_up(build, sizes, numbers)
    signs = _signs(build, sizes, row)
    first = build.columns(row, [0], "first_token")
    class_number = build.floor_of(first, 2.0 ** (sizes.class_bits - sizes.token_bits), "class.number")
    is_escaped = build.apply("Greater", [class_number, build.numbers("last_kept", sizes.escape - 1)], "is_escaped")
    decoded = escape_chunks(build, sizes, signs), _kept(build, plan, signs, class_number)
    chunks = build.apply("Where", [is_escaped, *decoded], "chunks")
    actions = build.times(chunks, np.tile(plan.units, sizes.chunk_length), "scaled")
    if plan.offset.any():
        actions = build.plus(actions, np.tile(plan.offset, sizes.chunk_length), "shifted")
    if form.is_marked:
        actions = build.apply("Where", [is_legal, actions, build.numbers("illegal", math.nan)], "actions.or_mark")
    build.reshape(actions, (-1, sizes.chunk_length, sizes.action_dim), "actions")
    outputs = [batched("actions", TensorProto.FLOAT, sizes.chunk_length, sizes.action_dim)]
    return build.model("chunk_decoder", [batched("tokens", TensorProto.INT32, LENGTH)], outputs)


# Encoding -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """Every chunk in every class but escape: latents and their digits [C - 1, batch, M], and the squares [C - 1, batch]
    that no latent holds; nothing where M = N."""

    latents: str
    digits: str
    rest: str


def _normalised(build: ChunkBuilder, plan: ChunkPlan, actions: str) -> str:
    """Actions [batch, N] to chunks [batch, N] in [-1, 1]."""
    length = plan.sizes.chunk_length
    if plan.offset.any():
        actions = build.plus(actions, -np.tile(plan.offset, length), "from_offset")
    return build.clipped(build.times(actions, np.tile(plan.inverse_units, length), "in_units"), -1, 1, "chunks")


def _trial(build: ChunkBuilder, plan: ChunkPlan, chunks: str) -> _Trial:
    centred = build.apply("Sub", [chunks, build.numbers("mean", plan.mean[:, None])], "centred")
    latents = build.product(centred, "basis", plan.basis, "latents")
    scaled = build.times(latents, plan.inverse_width[:, None], "latents.scaled")
    raised = build.plus(build.apply("Tanh", [scaled], "companded"), 1, "companded.raised")
    cells = build.floor_of(raised, 2.0 ** (MOST_BITS - 1), "cells")
    digits = build.clipped(cells, 0, 2**MOST_BITS - 1, "digits")
    if plan.num_latents == plan.sizes.num_values:
        return _Trial(latents, digits, "")
    squares = [build.reduced("ReduceSumSquare", value, 2, f"{value}.energy") for value in (centred, latents)]
    return _Trial(latents, digits, build.apply("Relu", [build.apply("Sub", squares, "rest.difference")], "rest"))


def _costs(build: ChunkBuilder, plan: ChunkPlan, chunks: str, trial: _Trial) -> str:
    """What each class costs, [C - 1, batch]; infinite where it does not keep the bounds."""
    costs, errors = [], []
    mean = build.numbers("mean", plan.mean[:, None])
    for budget, (weight, bound) in enumerate(zip(plan.weights, plan.bounds, strict=True)):
        name = f"budget_{budget}"
        decoded = _decoded_at(build, plan, trial.digits, budget)
        lost = build.apply("Sub", [trial.latents, decoded], f"{name}.lost")
        squares = build.reduced("ReduceSumSquare", lost, 2, f"{name}.squares")
        costs.append(build.times(squares, weight, f"{name}.cost"))
        centred = build.product(decoded, "basis.transposed", plan.basis.transpose(0, 2, 1), f"{name}.centred")
        found = build.clipped(build.apply("Add", [centred, mean], f"{name}.whole"), -1, 1, f"{name}.found")
        error = build.apply("Abs", [build.apply("Sub", [found, chunks], f"{name}.difference")], f"{name}.error")
        worst = build.reduced("ReduceMax", error, 2, f"{name}.worst")
        errors.append(build.times(worst, 1 / bound, f"{name}.in_bounds"))
    if trial.rest:
        costs.append(build.times(trial.rest, plan.weights.sum(), "rest.cost"))
    is_kept = build.apply("LessOrEqual", [build.apply("Max", errors, "errors"), build.numbers("one", 1)], "is_kept")
    summed = build.apply("Sum", costs, "costs.summed")
    return build.apply("Where", [is_kept, summed, build.numbers("never", _NEVER)], "costs")


def _decoded_at(build: ChunkBuilder, plan: ChunkPlan, digits: str, budget: int) -> str:
    """Latents [C - 1, batch, M] as they are decoded at a budget, from so many of their digits."""
    name = f"budget_{budget}"
    bits = plan.counts[budget][:, None]
    # Of 2^n cells each latent is in the middle of one: y = 2 middle / 2^n - 1.
    cells = build.floor_of(digits, 2.0 ** (bits - MOST_BITS), f"{name}.cells")
    middle = build.plus(cells, 0.5, f"{name}.middle")
    beyond = build.apply("Sub", [build.numbers(f"{name}.all_cells", 2.0**bits), middle], f"{name}.beyond")
    width = np.take_along_axis(plan.width[:, None], bits[..., None], axis=-1)[..., 0]
    spread = build.log_ratio(middle, beyond, f"{name}.spread")
    return build.times(spread, width / 2, f"{name}.decoded")


def _tokens(build: ChunkBuilder, plan: ChunkPlan, row: str, chosen: str) -> str:
    """The tokens [batch, L] as float32, of a class int64 [batch, 1], from a row of integers.

    row: [batch, M + blocks + N], the digits of the class's latents, escape's words, and the digits of its values.
    """
    sizes = plan.sizes
    places, scales = _bit_sources(plan)
    index = build.reshape(chosen, (-1,), "class.index")
    sources = build.apply("GatherElements", [row, build.rows(places, index, "bits.places")], "bits.sources", axis=1)
    shifted = build.apply("Mul", [sources, build.rows(scales, index, "bits.scales")], "bits.shifted")
    bits = build.last_bit(shifted, "bits")
    grouped = build.reshape(bits, (-1, sizes.num_tokens, sizes.token_bits), "bits.of_tokens")
    coded = build.reduced("ReduceSum", build.times(grouped, powers(sizes.token_bits), "bits.counted"), 2, "tokens.code")
    number = build.apply("Cast", [chosen], "class.number", to=TensorProto.FLOAT)
    first = np.where(np.arange(sizes.num_tokens) == 0, 2.0 ** (sizes.token_bits - sizes.class_bits), 0)
    return build.apply("Add", [coded, build.times(number, first, "tokens.class")], "tokens.numbers")


def _bit_sources(plan: ChunkPlan) -> tuple[npt.NDArray[np.int32], Float32Array]:
    """For each class, the entry of the row that each bit of the tokens [C, L * token_bits] comes from, and what that is
    multiplied by, so that the bit is its last before the point. 0 for bits that are 0, the class's own among them."""
    sizes, latents, blocks = plan.sizes, plan.num_latents, num_blocks(plan.sizes)
    places = np.zeros((sizes.num_classes, sizes.class_bits + sizes.code_bits), np.int32)
    scales = np.zeros(places.shape, np.float32)
    rank = ranks(torch.from_numpy(plan.order)).numpy()
    places[:-1, sizes.class_bits :] = plan.order
    scales[:-1, sizes.class_bits :] = 2.0 ** (rank + 1 - MOST_BITS)
    words = np.repeat(np.arange(blocks), BLOCK_BITS)
    finer = np.tile(np.arange(sizes.num_values), MOST_BITS)
    escape_places = np.concatenate((latents + words, latents + blocks + finer))[: sizes.code_bits]
    escape_scales = np.concatenate(
        (np.tile(1 / powers(BLOCK_BITS), blocks), np.repeat(1 / powers(MOST_BITS), sizes.num_values))
    )[: sizes.code_bits]
    used = slice(sizes.class_bits, sizes.class_bits + len(escape_places))
    places[-1, used], scales[-1, used] = escape_places, escape_scales
    return places, scales


# Decoding -------------------------------------------------------------------------------------------------------------


def _filled_up(build: ChunkBuilder, sizes: ChunkSizes, numbers: str) -> str:
    """Tokens [batch, length] as float32 to [batch, L + 1], with -1 for what is missing: at least the last.

    Without Shape: ONNX Runtime computes on the processor what follows from shapes, and refuses that of a graph that is
    to run on the GPU alone.
    """
    width = sizes.num_tokens + 1
    first = build.columns(numbers, np.zeros(1, np.int64), "first")
    absent = build.plus(build.times(first, np.zeros(width), "absent.zeros"), -1, "absent")
    longer = build.apply("Concat", [numbers, absent], "row.longer", axis=1)
    return build.columns(longer, np.arange(width), "row")


def _signs(build: ChunkBuilder, sizes: ChunkSizes, row: str) -> str:
    """Bits [batch, (L + 1) * token_bits] of a row [batch, L + 1] as 1 and -1, and 0 where they are missing."""
    column = build.reshape(row, (-1, sizes.num_tokens + 1, 1), "row.column")
    bits = build.last_bit(build.times(column, 1 / powers(sizes.token_bits), "bits.shifted"), "bits")
    signs = build.plus(build.times(bits, 2, "bits.doubled"), -1, "signs.all")
    signs = build.apply("Mul", [signs, build.reaches(column, 0, "tokens.there")], "signs.there")
    return build.reshape(signs, (-1, (sizes.num_tokens + 1) * sizes.token_bits), "signs")


def _kept(build: ChunkBuilder, plan: ChunkPlan, signs: str, class_number: str) -> str:
    """Chunks [batch, N] decoded in their class, float32 [batch, 1]; escape's as if they were of the class before."""
    sizes, latents = plan.sizes, plan.num_latents
    last_kept = build.clipped(class_number, 0, sizes.escape - 1, "class.kept")
    index = build.reshape(build.apply("Cast", [last_kept], "class", to=TensorProto.INT32), (-1,), "class.index")
    decoded = _latents(build, plan, signs, index)
    basis = build.rows(plan.basis, index, "basis")
    if build.form is LinearForm.REDUCE:
        wide = build.reshape(decoded, (-1, 1, latents), "latents.wide")
        centred = build.reduced("ReduceSum", build.apply("Mul", [basis, wide], "products"), 2, "centred")
    else:
        tall = build.reshape(decoded, (-1, latents, 1), "latents.tall")
        product = build.apply("MatMul", [build.precise(basis, "basis.precise"), tall], "product")
        centred = build.reshape(product, (-1, sizes.num_values), "centred")
    mean = build.precise(build.rows(plan.mean, index, "mean"), "mean.precise")
    whole = build.apply("Add", [centred, mean], "whole")
    return build.clipped(build.apply("Cast", [whole], "whole.rounded", to=TensorProto.FLOAT), -1, 1, "kept")


def _latents(build: ChunkBuilder, plan: ChunkPlan, signs: str, index: str) -> str:
    """Latents [batch, M] of these classes, int32 [batch]."""
    positions = bit_positions(plan)
    places = build.rows(positions.reshape(len(positions), -1), index, "bits.places")
    found = build.apply("GatherElements", [signs, places], "bits.found", axis=1)
    layers = build.reshape(found, (-1, *positions.shape[1:]), "layers")
    steps = build.times(layers, 0.5 ** np.arange(1, positions.shape[2] + 1), "layers.steps")
    level = build.reduced("ReduceSum", steps, 2, "level")
    count = build.reduced("ReduceSum", build.apply("Abs", [layers], "layers.there"), 2, "count")
    starts = np.arange(plan.inverse_width.size, dtype=np.int32).reshape(plan.inverse_width.shape) * plan.width.shape[-1]
    bits = build.apply("Cast", [count], "width.bits", to=TensorProto.INT32)
    entry = build.apply("Add", [build.rows(starts, index, "width.starts"), bits], "width.entry")
    width = build.rows(plan.width.reshape(-1) / 2, entry, "width")
    # A level has at most 18 bits: both sums are exact.
    one = build.numbers("one", 1)
    above, below = build.apply("Add", [one, level], "level.above"), build.apply("Sub", [one, level], "level.below")
    spread = build.log_ratio(build.precise(above, "above.precise"), build.precise(below, "below.precise"), "spread")
    return build.apply("Mul", [spread, build.precise(width, "width.precise")], "latents")


def bit_positions(plan: ChunkPlan) -> npt.NDArray[np.int32]:
    """Where among the bits of all tokens those of each latent stand, int32 [C - 1, M, R], the highest first, R the most
    that a latent has; where it has fewer, the first bit behind the last token."""
    return bit_places(plan.order, plan.num_latents) + np.int32(plan.sizes.class_bits)
