"""The escape class of chunk tokens as nodes of ONNX. Definition: `escape_encode`, `escape_decode` of the reference."""

import numpy as np

from rfsq.export.chunk_builder import ChunkBuilder, powers
from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.rfsq_ref.chunk_code import ChunkSizes
from rfsq.rfsq_ref.chunk_escape import BLOCK_BITS, BLOCK_VALUES

#: What each digit of a word counts: 81, 27, 9, 3, 1.
_TERNARY = 3.0 ** np.arange(BLOCK_VALUES - 1, -1, -1)


def num_blocks(sizes: ChunkSizes) -> int:
    """Words of an escaped chunk."""
    return -(-sizes.num_values // BLOCK_VALUES)


def escape_digits(build: ChunkBuilder, sizes: ChunkSizes, chunks: str) -> tuple[str, str]:
    """Escape's words [batch, blocks] of chunks [batch, N], and the 18 digits [batch, N] behind each ternary one.

    Exact for every float32 x. With d the ternary digit, the digits are floor(2^17 (3 x + 3 - 2 d)). Take 2^17 x = i + f
    with i an integer: 3 i + 2^17 (3 - 2 d) is one, too, and floor(3 f) follows from comparisons.
    """
    blocks, values = num_blocks(sizes), np.arange(num_blocks(sizes) * BLOCK_VALUES)
    ternary = _thirds(build, chunks, "ternary")
    filled = build.columns(ternary, values.clip(max=sizes.num_values - 1), "ternary.filled")
    counts = np.where(values < sizes.num_values, np.tile(_TERNARY, blocks), 0).reshape(blocks, BLOCK_VALUES)
    by_word = build.reshape(filled, (-1, blocks, BLOCK_VALUES), "ternary.of_words")
    words = build.reduced("ReduceSum", build.times(by_word, counts, "ternary.counted"), 2, "words")

    half = 2.0 ** (MOST_BITS - 1)
    scaled = build.times(chunks, half, "finer.scaled")
    whole = build.apply("Round", [scaled], "finer.whole")
    fraction = build.apply("Sub", [scaled, whole], "finer.fraction")
    parts = [
        build.times(whole, 3, "finer.thrice"),
        build.times(ternary, -2 * half, "finer.from_ternary"),
        _thirds(build, fraction, "finer.thirds"),
        build.reaches(fraction, 0, "finer.above"),
        build.numbers("finer.lowest", 3 * half - 2),
    ]
    return words, build.clipped(build.apply("Sum", parts, "finer.sum"), 0, 2 * half - 1, "finer")


def _thirds(build: ChunkBuilder, value: str, output: str) -> str:
    """How many of -1/3 and 1/3 a value has reached: 0, 1 or 2. No float32 is either; these are the next above."""
    low, high = float(np.nextafter(np.float32(-1 / 3), np.float32(0))), float(np.float32(1 / 3))
    reached = build.reaches(value, low, f"{output}.low"), build.reaches(value, high, f"{output}.high")
    return build.apply("Add", reached, output)


def escape_chunks(build: ChunkBuilder, sizes: ChunkSizes, signs: str) -> str:
    """Chunks [batch, N] decoded as escape's.

    signs: [batch, (L + 1) * token_bits], 1 and -1 for bits, and 0 for those that are missing: so are the last ones.
    """
    blocks, num_values = num_blocks(sizes), sizes.num_values
    first, end = sizes.class_bits, sizes.num_tokens * sizes.token_bits
    places = first + np.arange(blocks * BLOCK_BITS)
    found = build.columns(signs, places.clip(max=end), "words.found")
    by_word = build.reshape(found, (-1, blocks, BLOCK_BITS), "words.signs")
    # From signs to a number: (sum of sign 2^k + 255) / 2; and half a unit, so that no product falls short.
    halves = build.times(by_word, powers(BLOCK_BITS) / 2, "words.halves")
    summed = build.reduced("ReduceSum", halves, 2, "words.sum", keep=True)
    raised = build.plus(summed, 2 ** (BLOCK_BITS - 1), "words.raised")
    words = build.apply("Min", [raised, build.numbers("words.last", 3**BLOCK_VALUES - 0.5)], "words")
    # Digit k of w is floor(w / 3^k) - 3 floor(w / 3^(k + 1)).
    over = build.times(build.floor_of(words, 1 / (3 * _TERNARY), "ternary.over"), 3, "ternary.multiple")
    digits = build.apply("Sub", [build.floor_of(words, 1 / _TERNARY, "ternary.under"), over], "ternary.digits")
    middles = build.times(build.plus(digits, -1, "ternary.centred"), 2, "ternary.middles")
    # A word counts once its last bit is there.
    last = build.apply("Gather", [by_word, build.integers("words.end", [BLOCK_BITS - 1])], "words.last_sign", axis=2)
    there = build.apply("Mul", [middles, build.apply("Abs", [last], "words.there")], "ternary.there")
    flat = build.reshape(there, (-1, blocks * BLOCK_VALUES), "ternary.flat")
    thirds = build.columns(flat, np.arange(num_values), "ternary")
    layers = min(MOST_BITS, -(-(sizes.code_bits - blocks * BLOCK_BITS) // num_values))
    if layers > 0:
        places = first + blocks * BLOCK_BITS + np.arange(layers * num_values)
        found = build.columns(signs, places.clip(max=end), "finer.found")
        by_layer = build.reshape(found, (-1, layers, num_values), "finer.signs")
        steps = build.times(by_layer, 0.5 ** np.arange(1, layers + 1)[:, None], "finer.steps")
        thirds = build.apply("Add", [thirds, build.reduced("ReduceSum", steps, 1, "finer")], "thirds")
    return build.apply("Div", [thirds, build.numbers("three", 3)], "escaped")
