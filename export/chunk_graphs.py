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

from rfsq.export.chunk_plan import ACTION_LIMIT, ChunkPlan
from rfsq.export.graph_builder import GraphBuilder, LinearForm, batched
from rfsq.rfsq_ref.chunk_code import BLOCK_BITS, BLOCK_VALUES, MOST_BITS, ChunkSizes, ranks
from rfsq.runtime.bundle.arrays import Float32Array

#: The dynamic axis of tokens: how many of each chunk are decoded.
LENGTH = "length"
#: What each digit of a word of escape counts: 81, 27, 9, 3, 1.
_TERNARY = 3.0 ** np.arange(BLOCK_VALUES - 1, -1, -1)


def chunk_encoder_graph(plan: ChunkPlan, form: LinearForm = LinearForm.GEMM) -> bytes:
    """actions float32 [batch, T, A] -> tokens int32 [batch, L].

    Every class is decoded at every budget: it takes memory for several float32 [C - 1, batch, N], and in the form
    `reduce` a library must be able to count [C - 1, batch, N, M] in int32.
    """
    sizes = plan.sizes
    build = _ChunkBuilder(form)
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
    is_kept = build.apply("Less", [least, build.numbers("never", math.inf)], "best.is_kept")
    chosen = build.apply("Where", [is_kept, best, build.integers("escape", sizes.escape)], "class")
    kept = build.of_class(trial.digits, best, plan.num_latents, "best.digits")
    row = build.apply("Concat", [kept, *_escape_digits(build, sizes, chunks)], "row", axis=1)
    tokens = _tokens(build, plan, row, chosen)
    if form.is_marked:
        tokens = build.apply("Where", [is_legal, tokens, build.numbers("illegal", -1)], "tokens.or_mark")
    build.apply("Cast", [tokens], "tokens", to=TensorProto.INT32)
    inputs = [batched("actions", TensorProto.FLOAT, sizes.chunk_length, sizes.action_dim)]
    return build.model("chunk_encoder", inputs, [batched("tokens", TensorProto.INT32, sizes.num_tokens)])


def chunk_decoder_graph(plan: ChunkPlan, form: LinearForm = LinearForm.GEMM) -> bytes:
    """The first tokens of each chunk, int32 [batch, length], length 1 ... L -> actions float32 [batch, T, A]."""
    sizes = plan.sizes
    build = _ChunkBuilder(form)
    numbers, is_legal = build.apply("Cast", ["tokens"], "numbers", to=TensorProto.FLOAT), ""
    if form.is_marked:
        middle = (2**sizes.token_bits - 1) / 2
        from_middle = build.apply("Sub", [numbers, build.numbers("middle", middle)], "numbers.from_middle")
        is_legal = build.all_of(build.is_within(from_middle, middle, "numbers.limit"), "is_legal")
    row = _filled_up(build, sizes, numbers)
    signs = _signs(build, sizes, row)
    first = build.apply("Gather", [row, build.integers("first", [0])], "first_token", axis=1)
    class_number = build.floor_of(first, 2.0 ** (sizes.class_bits - sizes.token_bits), "class.number")
    is_escaped = build.apply("Greater", [class_number, build.numbers("last_kept", sizes.escape - 1)], "is_escaped")
    chunks = build.apply(
        "Where", [is_escaped, _escaped(build, sizes, signs), _kept(build, plan, signs, class_number)], "chunks"
    )
    actions = build.apply("Mul", [chunks, build.numbers("units", np.tile(plan.units, sizes.chunk_length))], "scaled")
    if plan.offset.any():
        offset = build.numbers("offset", np.tile(plan.offset, sizes.chunk_length))
        actions = build.apply("Add", [actions, offset], "shifted")
    if form.is_marked:
        actions = build.apply("Where", [is_legal, actions, build.numbers("illegal", math.nan)], "actions.or_mark")
    build.reshape(actions, (-1, sizes.chunk_length, sizes.action_dim), "actions")
    outputs = [batched("actions", TensorProto.FLOAT, sizes.chunk_length, sizes.action_dim)]
    return build.model("chunk_decoder", [batched("tokens", TensorProto.INT32, LENGTH)], outputs)


class _ChunkBuilder(GraphBuilder):
    """What both graphs are made of."""

    def numbers(self, name: str, value: npt.ArrayLike) -> str:
        return self.constant(name, np.asarray(value, np.float32))

    def integers(self, name: str, value: npt.ArrayLike) -> str:
        return self.constant(name, np.asarray(value, np.int64))

    def reduced(self, operator: str, value: str, axis: int, output: str, *, keep: bool = False) -> str:
        return self.apply(operator, [value, self.integers(f"axis_{axis}", [axis])], output, keepdims=int(keep))

    def clipped(self, value: str, low: float, high: float, output: str) -> str:
        return self.apply(
            "Clip", [value, self.scalar(f"{output}.low", low), self.scalar(f"{output}.high", high)], output
        )

    def all_of(self, conditions: str, output: str) -> str:
        """Whether all of bool [batch, n] hold: bool [batch, 1]."""
        ones = self.apply("Cast", [conditions], f"{output}.ones", to=TensorProto.FLOAT)
        least = self.reduced("ReduceMin", ones, 1, f"{output}.least", keep=True)
        return self.apply("Cast", [least], output, to=TensorProto.BOOL)

    def floor_of(self, value: str, scale: npt.ArrayLike, output: str) -> str:
        """floor(value * scale)."""
        return self.apply(
            "Floor", [self.apply("Mul", [value, self.numbers(f"{output}.scale", scale)], f"{output}.scaled")], output
        )

    def last_bit(self, shifted: str, output: str) -> str:
        """The last bit of floor(shifted), as 0 or 1: floor(s) - 2 floor(s / 2)."""
        halves = self.floor_of(shifted, 0.5, f"{output}.halves")
        even = self.apply("Mul", [halves, self.numbers("two", 2)], f"{output}.even")
        return self.apply("Sub", [self.apply("Floor", [shifted], f"{output}.floor"), even], output)

    def log_ratio(self, above: str, below: str, output: str) -> str:
        """log(above / below): 2 atanh y of 1 + y and 1 - y, which is what no runtime lacks."""
        return self.apply("Log", [self.apply("Div", [above, below], f"{output}.ratio")], output)

    def product(self, rows: str, name: str, matrices: Float32Array, output: str) -> str:
        """rows [C, batch, n] times the constants `name` [C, n, m]: [C, batch, m]."""
        if self.form is not LinearForm.REDUCE:
            return self.apply("MatMul", [rows, self.numbers(name, matrices)], output)
        wide = self.apply("Unsqueeze", [rows, self.integers("axis_2", [2])], f"{output}.wide")
        weight = self.numbers(name, matrices.transpose(0, 2, 1)[:, None])
        return self.reduced("ReduceSum", self.apply("Mul", [wide, weight], f"{output}.products"), 3, output)

    def of_class(self, values: str, index: str, width: int, output: str) -> str:
        """Of values [C, batch, width] those of the class index int64 [batch, 1]: [batch, width]."""
        zeros = self.integers(f"{output}.zeros", np.zeros((1, 1, width)))
        wide = self.apply("Add", [index, zeros], f"{output}.index")
        return self.reshape(
            self.apply("GatherElements", [values, wide], f"{output}.found", axis=0), (-1, width), output
        )


# Encoding -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """Every chunk in every class but escape: latents and their digits [C - 1, batch, M], and the squares [C - 1, batch]
    that no latent holds; nothing where M = N."""

    latents: str
    digits: str
    rest: str


def _normalised(build: _ChunkBuilder, plan: ChunkPlan, actions: str) -> str:
    """Actions [batch, N] to chunks [batch, N] in [-1, 1]."""
    length = plan.sizes.chunk_length
    if plan.offset.any():
        actions = build.apply("Sub", [actions, build.numbers("offset", np.tile(plan.offset, length))], "from_offset")
    inverse_units = build.numbers("inverse_units", np.tile(plan.inverse_units, length))
    return build.clipped(build.apply("Mul", [actions, inverse_units], "in_units"), -1, 1, "chunks")


def _trial(build: _ChunkBuilder, plan: ChunkPlan, chunks: str) -> _Trial:
    centred = build.apply("Sub", [chunks, build.numbers("mean", plan.mean[:, None])], "centred")
    latents = build.product(centred, "basis", plan.basis, "latents")
    inverse_width = build.numbers("inverse_width", plan.inverse_width[:, None])
    companded = build.apply("Tanh", [build.apply("Mul", [latents, inverse_width], "latents.scaled")], "companded")
    raised = build.apply("Add", [companded, build.numbers("one", 1)], "companded.raised")
    cells = build.floor_of(raised, 2.0 ** (MOST_BITS - 1), "cells")
    digits = build.clipped(cells, 0, 2**MOST_BITS - 1, "digits")
    if plan.num_latents == plan.sizes.num_values:
        return _Trial(latents, digits, "")
    squares = [build.reduced("ReduceSumSquare", value, 2, f"{value}.energy") for value in (centred, latents)]
    return _Trial(latents, digits, build.apply("Relu", [build.apply("Sub", squares, "rest.difference")], "rest"))


def _costs(build: _ChunkBuilder, plan: ChunkPlan, chunks: str, trial: _Trial) -> str:
    """What each class costs, [C - 1, batch]; infinite where it does not keep the bounds."""
    costs, errors = [], []
    mean = build.numbers("mean", plan.mean[:, None])
    for budget, (weight, bound) in enumerate(zip(plan.weights, plan.bounds, strict=True)):
        name = f"budget_{budget}"
        decoded = _decoded_at(build, plan, trial.digits, budget)
        lost = build.apply("Sub", [trial.latents, decoded], f"{name}.lost")
        squares = build.reduced("ReduceSumSquare", lost, 2, f"{name}.squares")
        costs.append(build.apply("Mul", [squares, build.numbers(f"{name}.weight", weight)], f"{name}.cost"))
        centred = build.product(decoded, "basis.transposed", plan.basis.transpose(0, 2, 1), f"{name}.centred")
        found = build.clipped(build.apply("Add", [centred, mean], f"{name}.whole"), -1, 1, f"{name}.found")
        error = build.apply("Abs", [build.apply("Sub", [found, chunks], f"{name}.difference")], f"{name}.error")
        worst = build.reduced("ReduceMax", error, 2, f"{name}.worst")
        errors.append(build.apply("Mul", [worst, build.numbers(f"{name}.steps", 1 / bound)], f"{name}.in_steps"))
    if trial.rest:
        weights = build.numbers("weights", plan.weights.sum())
        costs.append(build.apply("Mul", [trial.rest, weights], "rest.cost"))
    is_kept = build.apply("LessOrEqual", [build.apply("Max", errors, "errors"), build.numbers("one", 1)], "is_kept")
    return build.apply(
        "Where", [is_kept, build.apply("Sum", costs, "costs.all"), build.numbers("never", math.inf)], "costs"
    )


def _decoded_at(build: _ChunkBuilder, plan: ChunkPlan, digits: str, budget: int) -> str:
    """Latents [C - 1, batch, M] as they are decoded at a budget, from so many of their digits."""
    name = f"budget_{budget}"
    bits = plan.counts[budget][:, None]
    # Of 2^n cells each latent is in the middle of one: y = 2 middle / 2^n - 1.
    cells = build.floor_of(digits, 2.0 ** (bits - MOST_BITS), f"{name}.cells")
    middle = build.apply("Add", [cells, build.numbers("half", 0.5)], f"{name}.middle")
    beyond = build.apply("Sub", [build.numbers(f"{name}.all_cells", 2.0**bits), middle], f"{name}.beyond")
    width = np.take_along_axis(plan.width[:, None], bits[..., None], axis=-1)[..., 0]
    spread = build.log_ratio(middle, beyond, f"{name}.spread")
    return build.apply("Mul", [spread, build.numbers(f"{name}.width", width / 2)], f"{name}.decoded")


def _escape_digits(build: _ChunkBuilder, sizes: ChunkSizes, chunks: str) -> tuple[str, str]:
    """Escape's words [batch, blocks] of chunks [batch, N], and the 18 digits [batch, N] behind each ternary one.

    Exact for every float32 x. With d the ternary digit, the digits are floor(2^17 (3 x + 3 - 2 d)). Take 2^17 x = i + f
    with i an integer: 3 i + 2^17 (3 - 2 d) is one, too, and floor(3 f) follows from comparisons.
    """
    blocks = _blocks(sizes)
    ternary = _thirds(build, chunks, "ternary")
    values = np.arange(blocks * BLOCK_VALUES)
    grouped = build.apply(
        "Gather", [ternary, build.integers("grouped.values", values.clip(max=sizes.num_values - 1))], "grouped", axis=1
    )
    weights = np.where(values < sizes.num_values, np.tile(_TERNARY, blocks), 0).reshape(blocks, BLOCK_VALUES)
    digits = build.reshape(grouped, (-1, blocks, BLOCK_VALUES), "grouped.blocks")
    weighted = build.apply("Mul", [digits, build.numbers("grouped.weights", weights)], "grouped.weighted")
    words = build.reduced("ReduceSum", weighted, 2, "words")

    half = 2.0 ** (MOST_BITS - 1)
    scaled = build.apply("Mul", [chunks, build.numbers("finer.half", half)], "finer.scaled")
    whole = build.apply("Round", [scaled], "finer.whole")
    fraction = build.apply("Sub", [scaled, whole], "finer.fraction")
    is_above = build.apply("GreaterOrEqual", [fraction, build.numbers("nothing", 0)], "finer.is_above")
    parts = [
        build.apply("Mul", [whole, build.numbers("three", 3)], "finer.thrice"),
        build.apply("Mul", [ternary, build.numbers("finer.step", -2 * half)], "finer.from_ternary"),
        _thirds(build, fraction, "finer.thirds"),
        build.apply("Cast", [is_above], "finer.above", to=TensorProto.FLOAT),
        build.numbers("finer.lowest", 3 * half - 2),
    ]
    finer = build.clipped(build.apply("Sum", parts, "finer.sum"), 0, 2 * half - 1, "finer")
    return words, finer


def _thirds(build: _ChunkBuilder, value: str, output: str) -> str:
    """How many of -1/3 and 1/3 a value has reached: 0, 1 or 2. No float32 is either; these are the next above."""
    reached = []
    for name, least in (("low", np.nextafter(np.float32(-1 / 3), np.float32(0))), ("high", np.float32(1 / 3))):
        is_reached = build.apply(
            "GreaterOrEqual", [value, build.numbers(f"third.{name}", least)], f"{output}.is_{name}"
        )
        reached.append(build.apply("Cast", [is_reached], f"{output}.{name}", to=TensorProto.FLOAT))
    return build.apply("Add", reached, output)


def _tokens(build: _ChunkBuilder, plan: ChunkPlan, row: str, chosen: str) -> str:
    """The tokens [batch, L] as float32, of a class int64 [batch, 1], from a row of integers.

    row: [batch, M + blocks + N], the digits of the class's latents, escape's words, and the digits of its values.
    """
    sizes = plan.sizes
    places, scales = _bit_sources(plan)
    index = build.reshape(chosen, (-1,), "class.index")
    place = build.apply("Gather", [build.constant("places", places), index], "bits.places", axis=0)
    scale = build.apply("Gather", [build.numbers("scales", scales), index], "bits.scales", axis=0)
    sources = build.apply("GatherElements", [row, place], "bits.sources", axis=1)
    bits = build.last_bit(build.apply("Mul", [sources, scale], "bits.shifted"), "bits")
    grouped = build.reshape(bits, (-1, sizes.num_tokens, sizes.token_bits), "bits.of_tokens")
    weighted = build.apply("Mul", [grouped, build.numbers("powers", _powers(sizes.token_bits))], "bits.weighted")
    coded = build.reduced("ReduceSum", weighted, 2, "tokens.code")
    number = build.apply("Cast", [chosen], "class.number", to=TensorProto.FLOAT)
    first = np.where(np.arange(sizes.num_tokens) == 0, 2.0 ** (sizes.token_bits - sizes.class_bits), 0)
    named = build.apply("Mul", [number, build.numbers("class.weight", first)], "tokens.class")
    return build.apply("Add", [coded, named], "tokens.numbers")


def _bit_sources(plan: ChunkPlan) -> tuple[npt.NDArray[np.int32], Float32Array]:
    """For each class, the entry of the row that each bit of the tokens [C, L * token_bits] comes from, and what that is
    multiplied by, so that the bit is its last before the point. 0 for bits that are 0, the class's own among them."""
    sizes, latents, blocks = plan.sizes, plan.num_latents, _blocks(plan.sizes)
    places = np.zeros((sizes.num_classes, sizes.class_bits + sizes.code_bits), np.int32)
    scales = np.zeros(places.shape, np.float32)
    rank = ranks(torch.from_numpy(plan.order), latents).numpy()
    places[:-1, sizes.class_bits :] = plan.order
    scales[:-1, sizes.class_bits :] = 2.0 ** (rank + 1 - MOST_BITS)
    words = np.repeat(np.arange(blocks), BLOCK_BITS)
    finer = np.tile(np.arange(sizes.num_values), MOST_BITS)
    escape_places = np.concatenate((latents + words, latents + blocks + finer))[: sizes.code_bits]
    escape_scales = np.concatenate(
        (np.tile(1 / _powers(BLOCK_BITS), blocks), np.repeat(1 / _powers(MOST_BITS), sizes.num_values))
    )[: sizes.code_bits]
    used = slice(sizes.class_bits, sizes.class_bits + len(escape_places))
    places[-1, used], scales[-1, used] = escape_places, escape_scales
    return places, scales


# Decoding -------------------------------------------------------------------------------------------------------------


def _filled_up(build: _ChunkBuilder, sizes: ChunkSizes, numbers: str) -> str:
    """Tokens [batch, length] as float32 to [batch, L + 1], with -1 for what is missing: at least the last."""
    length = build.apply("Shape", ["tokens"], "length", start=1, end=2)
    missing = build.apply("Sub", [build.integers("row.width", [sizes.num_tokens + 1]), length], "missing")
    ends = build.apply("Concat", [build.integers("no_ends", [0, 0, 0]), missing], "ends", axis=0)
    padded = build.apply("Pad", [numbers, ends, build.numbers("absent", -1)], "padded")
    return build.reshape(padded, (-1, sizes.num_tokens + 1), "row")


def _signs(build: _ChunkBuilder, sizes: ChunkSizes, row: str) -> str:
    """Bits [batch, (L + 1) * token_bits] of a row [batch, L + 1] as 1 and -1, and 0 where they are missing."""
    column = build.reshape(row, (-1, sizes.num_tokens + 1, 1), "row.column")
    shifts = build.numbers("shifts", 1 / _powers(sizes.token_bits))
    bits = build.last_bit(build.apply("Mul", [column, shifts], "bits.shifted"), "bits")
    is_there = build.apply("GreaterOrEqual", [column, build.numbers("nothing", 0)], "is_there")
    there = build.apply("Cast", [is_there], "there", to=TensorProto.FLOAT)
    one, two = build.numbers("one", 1), build.numbers("two", 2)
    signs = build.apply("Sub", [build.apply("Mul", [bits, two], "bits.doubled"), one], "signs.all")
    signs = build.apply("Mul", [signs, there], "signs.there")
    return build.reshape(signs, (-1, (sizes.num_tokens + 1) * sizes.token_bits), "signs")


def _kept(build: _ChunkBuilder, plan: ChunkPlan, signs: str, class_number: str) -> str:
    """Chunks [batch, N] decoded in their class, float32 [batch, 1]; escape's as if they were of the class before."""
    sizes, latents = plan.sizes, plan.num_latents
    number = build.apply(
        "Cast", [build.clipped(class_number, 0, sizes.escape - 1, "class.kept")], "class", to=TensorProto.INT32
    )
    index = build.reshape(number, (-1,), "class.index")
    positions = _bit_positions(plan)
    places = build.apply("Gather", [build.constant("positions", positions), index], "bits.places", axis=0)
    found = build.apply("GatherElements", [signs, places], "bits.found", axis=1)
    layers = build.reshape(found, (-1, latents, positions.shape[1] // latents), "layers")
    steps = build.numbers("layers.steps", 0.5 ** np.arange(1, positions.shape[1] // latents + 1))
    level = build.reduced("ReduceSum", build.apply("Mul", [layers, steps], "layers.scaled"), 2, "level")
    count = build.reduced("ReduceSum", build.apply("Abs", [layers], "layers.there"), 2, "count")
    entries = MOST_BITS + 1
    parts = [
        build.apply("Cast", [count], "count.index", to=TensorProto.INT32),
        build.apply("Mul", [number, build.constant("width.rows", np.array(latents * entries, np.int32))], "width.row"),
        build.constant("width.columns", np.arange(0, latents * entries, entries, dtype=np.int32)),
    ]
    entry = build.apply("Add", [build.apply("Add", parts[:2], "width.row_entry"), parts[2]], "width.entry")
    width = build.apply("Gather", [build.numbers("widths", plan.width.reshape(-1) / 2), entry], "width", axis=0)
    one = build.numbers("one", 1)
    ends = build.apply("Add", [one, level], "level.above"), build.apply("Sub", [one, level], "level.below")
    scaled = build.apply("Mul", [build.log_ratio(*ends, "spread"), width], "latents")
    basis = build.apply("Gather", [build.numbers("basis", plan.basis), index], "basis.of_class", axis=0)
    if build.form is LinearForm.REDUCE:
        rows = build.reshape(scaled, (-1, 1, latents), "latents.row")
        centred = build.reduced("ReduceSum", build.apply("Mul", [basis, rows], "products"), 2, "centred")
    else:
        columns = build.reshape(scaled, (-1, latents, 1), "latents.column")
        centred = build.reshape(build.apply("MatMul", [basis, columns], "product"), (-1, sizes.num_values), "centred")
    mean = build.apply("Gather", [build.numbers("mean", plan.mean), index], "mean.of_class", axis=0)
    return build.clipped(build.apply("Add", [centred, mean], "whole"), -1, 1, "kept")


def _bit_positions(plan: ChunkPlan) -> npt.NDArray[np.int32]:
    """Where among the bits of all tokens the bits of each latent stand [C - 1, M * R], the highest first, R the most
    that a latent has; the first bit behind the last token where there are fewer."""
    sizes = plan.sizes
    rank = ranks(torch.from_numpy(plan.order), plan.num_latents).numpy()
    shape = (sizes.escape, plan.num_latents, int(rank.max(initial=0)) + 1)
    positions = np.full(shape, sizes.num_tokens * sizes.token_bits, np.int32)
    classes = np.arange(sizes.escape)[:, None]
    positions[classes, plan.order, rank] = sizes.class_bits + np.arange(sizes.code_bits)
    return positions.reshape(sizes.escape, -1)


def _escaped(build: _ChunkBuilder, sizes: ChunkSizes, signs: str) -> str:
    """Chunks [batch, N] decoded as escape's."""
    blocks, num_values = _blocks(sizes), sizes.num_values
    end = sizes.num_tokens * sizes.token_bits
    # Positions behind the last token are those of a bit that is never there.
    words = sizes.class_bits + np.arange(blocks * BLOCK_BITS)
    found = build.apply("Gather", [signs, build.integers("words.places", words.clip(max=end))], "words.found", axis=1)
    by_word = build.reshape(found, (-1, blocks, BLOCK_BITS), "words.signs")
    # From signs to the number: (sum of sign 2^k + 255) / 2; and half a unit, so that no product falls short.
    halves = build.numbers("words.powers", _powers(BLOCK_BITS) / 2)
    summed = build.reduced(
        "ReduceSum", build.apply("Mul", [by_word, halves], "words.scaled"), 2, "words.sum", keep=True
    )
    raised = build.apply("Add", [summed, build.numbers("words.middle", 2 ** (BLOCK_BITS - 1))], "words.raised")
    legal = build.apply("Min", [raised, build.numbers("words.last", 3**BLOCK_VALUES - 0.5)], "words")
    # Digit k of w is floor(w / 3^k) - 3 floor(w / 3^(k + 1)).
    over = build.apply(
        "Mul",
        [build.floor_of(legal, 1 / (3 * _TERNARY), "ternary.over"), build.numbers("three", 3)],
        "ternary.multiple",
    )
    digits = build.apply("Sub", [build.floor_of(legal, 1 / _TERNARY, "ternary.under"), over], "ternary.digits")
    doubled = build.apply(
        "Mul",
        [build.apply("Sub", [digits, build.numbers("one", 1)], "ternary.centred"), build.numbers("two", 2)],
        "ternary.doubled",
    )
    last = build.apply("Gather", [by_word, build.integers("words.end", [BLOCK_BITS - 1])], "words.last_sign", axis=2)
    there = build.apply("Mul", [doubled, build.apply("Abs", [last], "words.there")], "ternary.there")
    flat = build.reshape(there, (-1, blocks * BLOCK_VALUES), "ternary.flat")
    thirds = build.apply("Gather", [flat, build.integers("values", np.arange(num_values))], "ternary", axis=1)
    layers = min(MOST_BITS, -(-(sizes.code_bits - blocks * BLOCK_BITS) // num_values))
    if layers > 0:
        finer = sizes.class_bits + blocks * BLOCK_BITS + np.arange(layers * num_values)
        found = build.apply(
            "Gather", [signs, build.integers("finer.places", finer.clip(max=end))], "finer.found", axis=1
        )
        by_layer = build.reshape(found, (-1, layers, num_values), "finer.signs")
        steps = build.numbers("finer.steps", 0.5 ** np.arange(1, layers + 1)[:, None])
        finer_sum = build.reduced("ReduceSum", build.apply("Mul", [by_layer, steps], "finer.scaled"), 1, "finer")
        thirds = build.apply("Add", [thirds, finer_sum], "thirds")
    return build.apply("Div", [thirds, build.numbers("three", 3)], "escaped")


def _blocks(sizes: ChunkSizes) -> int:
    """Words of an escaped chunk."""
    return -(-sizes.num_values // BLOCK_VALUES)


def _powers(num_bits: int) -> npt.NDArray[np.float64]:
    """What each bit counts, the highest first: [num_bits]."""
    return np.exp2(np.arange(num_bits - 1, -1, -1, dtype=np.float64))
