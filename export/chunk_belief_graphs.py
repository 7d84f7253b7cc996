"""The ONNX graph that decodes probabilities of chunk tokens. Definition: `rfsq_ref/beliefs.py`.

Every class is decoded, and they are mixed. A latent's y = tanh(z / width) is near 1 or -1 where its bits are all alike,
so 1 + y and 1 - y are sums of their own: of the probabilities that bits are 1, and of those that they are 0. C classes,
N = T * A values, M latents, R the most bits that a latent has.
"""

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from rfsq.export.chunk_builder import ChunkBuilder, powers
from rfsq.export.chunk_escape import num_blocks
from rfsq.export.chunk_graphs import bit_positions
from rfsq.export.chunk_plan import ChunkPlan
from rfsq.export.graph_builder import LinearForm, batched
from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.chunk_escape import BLOCK_BITS, BLOCK_VALUES
from rfsq.runtime.bundle.arrays import Float32Array

Places = npt.NDArray[np.int64]


def chunk_belief_graph(plan: ChunkPlan, form: LinearForm = LinearForm.GEMM) -> bytes:
    """classes float32 [batch, C] and bits float32 [batch, 2, columns] -> actions and std float32 [batch, T, A].

    bits: that each is 0, then that it is 1; both are 0 where it is not known. The columns are the bits of the first
    token behind the class, given the first class, then given the second, and so on; then all bits behind; then one that
    is never known. A host has made them (`runtime/backends/graph_beliefs.py`), so that no form marks what is illegal.
    """
    sizes = plan.sizes
    build = ChunkBuilder(form)
    kept, escaped = _kept(build, plan), _escaped(build, sizes)
    chunks, variances = (
        build.apply("Concat", [*parts], name, axis=1)
        for parts, name in zip(zip(kept, escaped, strict=True), ("chunks", "variances"), strict=True)
    )
    weights = build.reshape("classes", (-1, sizes.num_classes, 1), "weights")
    mean = _mixed(build, weights, chunks, "mean")
    distance = build.apply("Sub", [chunks, mean], "distance")
    squares = build.apply("Add", [variances, build.apply("Mul", [distance, distance], "distance.squares")], "squares")
    deviation = build.apply("Sqrt", [_mixed(build, weights, squares, "variance")], "deviation")
    actions = build.times(mean, np.tile(plan.units, sizes.chunk_length), "scaled")
    if plan.offset.any():
        actions = build.plus(actions, np.tile(plan.offset, sizes.chunk_length), "shifted")
    shape = (-1, sizes.chunk_length, sizes.action_dim)
    build.reshape(actions, shape, "actions")
    build.reshape(build.times(deviation, np.tile(plan.units, sizes.chunk_length), "std.scaled"), shape, "std")
    inputs = [
        batched("classes", TensorProto.FLOAT, sizes.num_classes),
        batched("bits", TensorProto.FLOAT, 2, _num_columns(sizes)),
    ]
    outputs = [batched(name, TensorProto.FLOAT, *shape[1:]) for name in ("actions", "std")]
    return build.model("chunk_belief", inputs, outputs)


def _mixed(build: ChunkBuilder, weights: str, values: str, output: str) -> str:
    """The sum over classes of weights [batch, C, 1] times values [batch, C, N]: [batch, 1, N]."""
    return build.reduced("ReduceSum", build.apply("Mul", [weights, values], f"{output}.parts"), 1, output, keep=True)


def _kept(build: ChunkBuilder, plan: ChunkPlan) -> tuple[str, str]:
    """Mean and variance of the chunks in every class but escape, [batch, C - 1, N]."""
    latents, variance = _latents(build, plan)
    product = _by_class(build, latents, plan.basis, 1, "centred")
    whole = build.apply("Add", [product, build.precise(build.numbers("mean.of_class", plan.mean), "offset")], "whole")
    rounded = build.apply("Cast", [whole], "whole.rounded", to=TensorProto.FLOAT)
    variances = _by_class(build, variance, plan.basis, 2, "kept.spread")
    # What lies between -1 and 1 has no greater variance.
    most = build.apply("Min", [variances, build.numbers("kept.most", 1)], "kept.variance")
    return build.clipped(rounded, -1, 1, "kept"), most


def _by_class(build: ChunkBuilder, rows: str, basis: Float32Array, power: int, output: str) -> str:
    """rows [batch, C - 1, M] times every number of the basis [C - 1, N, M] to this power: [batch, C - 1, N].

    In double, where the form has it, for the first power.
    """
    if build.form is LinearForm.REDUCE:
        parts = build.apply("Unsqueeze", [rows, build.integers("axis_2", [2])], f"{output}.wide")
        for number in range(power):
            parts = build.apply("Mul", [parts, build.numbers("basis", basis)], f"{output}.products_{number}")
        return build.reduced("ReduceSum", parts, 3, output)
    turned = build.apply("Transpose", [rows], f"{output}.rows", perm=[1, 0, 2])
    matrices = build.numbers("basis", basis.transpose(0, 2, 1))
    if power == 1:
        raised = build.precise(matrices, "basis.precise")
    else:
        raised = build.apply("Mul", [matrices, matrices], "basis.squares")
    product = build.apply("MatMul", [turned, raised], f"{output}.by_class")
    return build.apply("Transpose", [product], output, perm=[1, 0, 2])


def _latents(build: ChunkBuilder, plan: ChunkPlan) -> tuple[str, str]:
    """Mean, in double, and variance of the latents in every class but escape, [batch, C - 1, M]."""
    places = _latent_columns(plan)
    zeros, ones = _found(build, places, "layers")
    most = places.shape[-1]
    known = build.apply("Add", [zeros, ones], "layers.known")
    is_there = build.apply("Greater", [known, build.numbers("nothing", 0)], "layers.is_there")
    there = build.apply("Cast", [is_there], "layers.there", to=TensorProto.FLOAT)
    count = build.apply("Cast", [build.reduced("ReduceSum", there, 3, "count")], "count.whole", to=TensorProto.INT32)
    least = build.rows(0.5 ** np.arange(MOST_BITS + 1, dtype=np.float32), count, "least")
    halves = 0.5 ** np.arange(most)
    below, above = (
        build.apply(
            "Add",
            [build.reduced("ReduceSum", build.times(part, halves, f"{name}.steps"), 3, f"{name}.sum"), least],
            name,
        )
        for part, name in ((zeros, "below"), (ones, "above"))
    )
    starts = np.arange(plan.inverse_width.size, dtype=np.int32).reshape(plan.inverse_width.shape) * plan.width.shape[-1]
    entry = build.apply("Add", [count, build.constant("width.starts", starts)], "width.entry")
    width = build.rows(plan.width.reshape(-1), entry, "width")
    spread = build.log_ratio(build.precise(above, "above.precise"), build.precise(below, "below.precise"), "log_ratio")
    half = build.precise(build.times(width, 0.5, "width.half"), "width.precise")
    latents = build.apply("Mul", [spread, half], "latents")
    squares = build.times(build.apply("Mul", [width, width], "width.squares"), 0.25, "width.quarter")
    return latents, build.apply("Mul", [_variance(build, zeros, ones, least, most), squares], "latents.variance")


def _variance(build: ChunkBuilder, zeros: str, ones: str, least: str, most: int) -> str:
    """Variance of the latents in half widths, of the probabilities [batch, C - 1, M, R] of their bits.

    A bit r moves y by 2^-r. So log((1 + y) / (1 - y)) with a bit of 1 is that with a 0 and log(1 + 2^(1 - r) / (b a)),
    where b is 1 - y with a 1, and a is 1 + y with a 0: sums over the other bits.
    """
    halves = 0.5 ** np.arange(most)
    of_others = (halves[:, None] * (1 - np.eye(most))).astype(np.float32)
    last = build.apply("Unsqueeze", [least, build.integers("last_axis", [3])], "least.column")
    below, above = (
        build.apply("Add", [build.product(side, "others", of_others, f"{name}.sums"), last], name)
        for side, name in ((zeros, "others.below"), (ones, "others.above"))
    )
    product = build.apply("Mul", [below, above], "others.product")
    more = build.apply("Div", [build.numbers("moves", 2 * halves), product], "others.ratio")
    apart = build.log_of_one_more(more, "apart")
    uncertain = build.apply("Mul", [zeros, ones], "layers.product")
    parts = build.apply("Mul", [uncertain, build.apply("Mul", [apart, apart], "apart.squares")], "layers.variance")
    return build.reduced("ReduceSum", parts, 3, "level.variance")


def _escaped(build: ChunkBuilder, sizes: ChunkSizes) -> tuple[str, str]:
    """Mean and variance of escaped chunks, [batch, 1, N]: of thirds, 2 (digit - 1) and what the bits behind add."""
    blocks, num_values = num_blocks(sizes), sizes.num_values
    zeros, ones = _found(build, _escape_columns(sizes, np.arange(blocks * BLOCK_BITS)).reshape(blocks, 1, -1), "words")
    # A word with a bit that is not known has the probability 0, and so has every digit of it.
    is_one = build.constant("words.bits", (np.arange(256)[:, None] & powers(BLOCK_BITS).astype(int)) > 0)
    shares = build.reduced(
        "ReduceProd", build.apply("Where", [is_one, ones, zeros], "words.factors"), 3, "words.shares"
    )
    by_value = build.product(shares, "words.digits", _digits_of_words(), "digits.of_words")
    flat = build.reshape(by_value, (-1, blocks * BLOCK_VALUES, 3), "digits.flat")
    digits = build.columns(flat, np.arange(num_values), "digits")
    middles = build.numbers("middles", (-2, 0, 2))
    mean = build.reduced("ReduceSum", build.apply("Mul", [digits, middles], "middles.parts"), 2, "middle", keep=True)
    distance = build.apply("Sub", [middles, mean], "middles.distance")
    squares = build.apply("Mul", [distance, distance], "middles.squares")
    parts = build.apply("Mul", [digits, squares], "middles.variance")
    means = [build.reshape(mean, (-1, 1, num_values), "middle.row")]
    variances = [build.reshape(build.reduced("ReduceSum", parts, 2, "middle.variance"), (-1, 1, num_values), "spread")]
    layers = min(MOST_BITS, -(-(sizes.code_bits - blocks * BLOCK_BITS) // num_values))
    if layers > 0:
        bits = blocks * BLOCK_BITS + np.arange(layers * num_values)
        zeros, ones = _found(build, _escape_columns(sizes, bits).reshape(1, layers, num_values), "finer")
        steps = 0.5 ** np.arange(1, layers + 1)[:, None]
        sign = build.apply("Sub", [ones, zeros], "finer.sign")
        means.append(build.reduced("ReduceSum", build.times(sign, steps, "finer.steps"), 2, "finer"))
        uncertain = build.times(build.apply("Mul", [zeros, ones], "finer.product"), 4 * steps**2, "finer.parts")
        variances.append(build.reduced("ReduceSum", uncertain, 2, "finer.variance"))
    three, nine = build.numbers("three", 3), build.numbers("nine", 9)
    value = build.apply("Div", [build.apply("Sum", means, "thirds"), three], "escaped")
    return value, build.apply("Div", [build.apply("Sum", variances, "thirds.variance"), nine], "escaped.variance")


def _found(build: ChunkBuilder, places: Places, output: str) -> tuple[str, str]:
    """The probabilities that the bits of these columns [...] are 0, and 1: [batch, ...] each."""
    found = build.apply("Gather", ["bits", build.integers(f"{output}.places", places)], f"{output}.both", axis=2)
    sides = [
        build.apply("Gather", [found, build.integers(f"side_{side}", side)], f"{output}.{side}", axis=1)
        for side in (0, 1)
    ]
    zeros, ones = (build.reshape(side, (-1, *places.shape), f"{side}.flat") for side in sides)
    return zeros, ones


def _num_columns(sizes: ChunkSizes) -> int:
    first = sizes.token_bits - sizes.class_bits
    return first * (sizes.num_classes - 1) + sizes.code_bits + 1


def _columns(sizes: ChunkSizes, classes: npt.NDArray[np.integer], bits: Places) -> Places:
    """Of code bits, given these classes; bits behind the last are never known."""
    first = sizes.token_bits - sizes.class_bits
    given_class = classes * first + bits
    behind = first * (sizes.num_classes - 1) + bits.clip(max=sizes.code_bits)
    return np.where(bits < first, given_class, behind).astype(np.int64)


def _latent_columns(plan: ChunkPlan) -> Places:
    """Of the bits of each latent, the highest first, [C - 1, M, R]."""
    positions = bit_positions(plan).astype(np.int64)
    return _columns(plan.sizes, np.arange(len(positions))[:, None, None], positions - plan.sizes.class_bits)


def _escape_columns(sizes: ChunkSizes, bits: Places) -> Places:
    return _columns(sizes, np.full_like(bits, sizes.escape), bits)


def _digits_of_words() -> Float32Array:
    """Which of the three digits each value of a word has, [256, 5 * 3]: words that no chunk has mean the last."""
    words = np.arange(256).clip(max=3**BLOCK_VALUES - 1)
    digits = words[:, None] // 3 ** np.arange(BLOCK_VALUES - 1, -1, -1) % 3
    found: Float32Array = (digits[..., None] == np.arange(3)).reshape(256, -1).astype(np.float32)
    return found
