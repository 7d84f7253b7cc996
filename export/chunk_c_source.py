"""C source of a chunk tokenizer with its tables inside: plain C11, no dependency, no allocation, no global state.

The arithmetic is written once, in `templates/rfsq_chunk_tokenizer.c`. Generated are the tables of a plan in front of
it, and the sizes in `templates/rfsq_chunk_tokenizer.h`.
"""

from collections.abc import Iterable

import numpy as np

from rfsq.export.c_builder import C_FLAGS
from rfsq.export.c_source import CTokenizer, beliefs
from rfsq.export.c_tables import Array, IntArray, filled, number, table
from rfsq.export.chunk_plan import ACTION_LIMIT, ChunkPlan
from rfsq.export.errors import SourceTooLargeError
from rfsq.rfsq_ref.chunk_bits import MOST_BITS
from rfsq.runtime.bundle.backend_specs import BACKENDS
from rfsq.runtime.bundle.beliefs import ENGINE_SUM_TOLERANCE

#: Numbers in the tables. GCC takes 3 seconds and 1.5 GB for so many, in a source of 270 MB.
MOST_NUMBERS = 2**24
#: Numbers of a table that are spelled out for people. GCC takes ten times as long and as much memory for these as for
#: the same numbers in one string, and NVRTC more than twice as long.
MOST_SPELLED = 2**18

#: Every byte as it is written in a string, and characters of a line of these.
_ESCAPES = np.array([f"\\{byte:03o}".encode() for byte in range(256)])
_LINE = 128

#: As in the template.
_LANES = 16
_SUMS = 8


def c_chunk_tokenizer(plan: ChunkPlan, fingerprint: str) -> CTokenizer:
    """fingerprint: stated in the files.

    Raises SourceTooLargeError for more than MOST_NUMBERS, BuildInputError for numbers that float32 does not hold.
    """
    sizes, tables = plan.sizes, _tables(plan)
    check_size(plan, tables.values(), MOST_NUMBERS, "c")
    source = filled(
        "rfsq_chunk_tokenizer.c",
        TABLES="\n".join([*_sizes(plan), *(_table(name, values) for name, values in tables.items())]),
        ARITHMETIC=filled("arithmetic.c").rstrip(),
        ONE_COPY=filled("one_copy.c").rstrip(),
        BELIEFS=beliefs("chunk_beliefs.c"),
    )
    header = filled(
        "rfsq_chunk_tokenizer.h",
        FINGERPRINT=fingerprint,
        CHUNK_LENGTH=sizes.chunk_length,
        ACTION_DIM=sizes.action_dim,
        NUM_TOKENS=sizes.num_tokens,
        VOCABULARY=2**sizes.token_bits,
        NUM_CLASSES=sizes.num_classes,
        ACTION_LIMIT=number(ACTION_LIMIT),
        CHECKED_STEPS=BACKENDS["c"].checked_steps,
    )
    note = f"/* Generated, do not edit; fingerprint {fingerprint}. Compile with {' '.join(C_FLAGS)} */\n"
    return CTokenizer(header, note + source)


def check_size(plan: ChunkPlan, tables: Iterable[Array | IntArray], most: int, backend: str) -> None:
    """Raises SourceTooLargeError for tables of more numbers than `most`."""
    count, sizes = sum(values.size for values in tables), plan.sizes
    if count > most:
        raise SourceTooLargeError(
            f"its tables would have {count:,} numbers, for {sizes.num_classes} classes of {sizes.num_values} values "
            f"and {plan.num_latents} latents, and the backend {backend} has room for {most:,}: build without it, or "
            "fit fewer classes, a shorter chunk or fewer tokens"
        )


def _sizes(plan: ChunkPlan) -> list[str]:
    sizes = plan.sizes
    return [
        f"enum {{ CLASSES = {sizes.num_classes - 1}, M = {plan.num_latents}, BUDGETS = {len(plan.budget_bits)} }};",
        f"enum {{ TOKEN_BITS = {sizes.token_bits}, CLASS_BITS = {sizes.class_bits}, MOST_BITS = {MOST_BITS} }};",
        # Whether latents hold less than all of a chunk.
        f"#define HAS_REST {int(plan.num_latents < sizes.num_values)}",
        f"#define SURE_COST {number(sure_cost(plan))}",
        f"#define SUM_TOLERANCE {number(ENGINE_SUM_TOLERANCE)}",
        f"#define SUM_OF_WEIGHTS {number(float(plan.weights.astype(np.float64).sum()))}",
        f"typedef {'uint8_t' if plan.num_latents <= 256 else 'uint16_t'} latent_index;",
    ]


def sure_cost(plan: ChunkPlan) -> float:
    """A class of this cost keeps the bounds, with 1 % to spare, which is far more than anything rounds by.

    The cost is at least weight * |error|^2 at each budget, and no value errs by more than |error|.
    """
    return 0.99 * float(np.min(plan.weights * np.square(plan.bounds)))


def most_ranks(plan: ChunkPlan) -> int:
    """The most bits that a latent has."""
    return max(int(np.bincount(order).max()) for order in plan.order)


def at_budgets(plan: ChunkPlan) -> Array:
    """`width` of the bits that each latent has at each budget: [C - 1, budgets, M]."""
    found: Array = np.take_along_axis(plan.width[:, None], plan.counts.swapaxes(0, 1)[..., None], axis=-1)[..., 0]
    return found


def _tables(plan: ChunkPlan) -> dict[str, Array | IntArray]:
    latents = plan.num_latents
    panels = -(-latents // _LANES)

    def of_panels(values: Array | IntArray) -> Array:
        """[C - 1, ..., M] to [C - 1, panels, ..., LANES], filled up with zeros."""
        filled_up = padded(values, -1, _LANES)
        return np.moveaxis(filled_up.reshape(*values.shape[:-1], panels, _LANES), -2, 1)

    counts = plan.counts.swapaxes(0, 1)
    used = most_ranks(plan) + 1
    return {
        "OFFSETS": np.tile(plan.offset, plan.sizes.chunk_length),
        "UNITS": np.tile(plan.units, plan.sizes.chunk_length),
        "INVERSE_UNITS": np.tile(plan.inverse_units, plan.sizes.chunk_length),
        "WEIGHTS": plan.weights,
        "BOUNDS": np.asarray(plan.bounds),
        "MEAN": padded(plan.mean, 1, _SUMS),
        "BASIS": of_panels(padded(plan.basis, 1, _SUMS)),
        "INVERSE_WIDTH": padded(plan.inverse_width, 1, _LANES),
        "WIDTH": padded(plan.width[..., :used], 1, _LANES),
        # Of the levels at each budget one half; what pads the latents has one level.
        "BUDGET_HALF": np.exp2(of_panels(counts) - 1.0),
        "BUDGET_WIDTH": of_panels(at_budgets(plan)),
        "ORDER": plan.order,
    }


def padded(values: Array | IntArray, axis: int, multiple: int) -> Array:
    """With zeros behind, up to a whole multiple along the axis."""
    missing = [(0, 0)] * values.ndim
    missing[axis] = (0, -values.shape[axis] % multiple)
    return np.pad(values, missing)


def _table(name: str, values: Array | IntArray) -> str:
    if np.issubdtype(values.dtype, np.integer):
        return table("static const latent_index", name, values)
    if values.size <= MOST_SPELLED:
        return table("static _Alignas(64) const float", name, values)
    return f"""\
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the bytes of {name} are those of little-endian floats");
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverlength-strings"
{packed_table("static _Alignas(64) const", name, values)}
#pragma GCC diagnostic pop"""


def packed_table(kind: str, name: str, values: Array | IntArray) -> str:
    """A constant array of floats, as the string of their bytes. kind: what stands in front of its type.

    Raises BuildInputError for numbers of no float32.
    """
    number(float(np.abs(values).max()))
    content = np.frombuffer(values.astype("<f4").tobytes(), np.uint8)
    text = _ESCAPES[content].tobytes().decode()
    lines = "\n".join(f'"{text[start : start + _LINE]}"' for start in range(0, len(text), _LINE))
    shape = "".join(f"[{size}]" for size in values.shape)
    return f"""\
{kind} union {{ unsigned char bytes[{content.size + 1}]; float values{shape}; }} {name}_BYTES = {{
{lines}
}};
#define {name} {name}_BYTES.values"""
