"""CUDA source of a tokenizer with the weights inside, from the same plans as the C source.

The arithmetic is written once, in `templates/rfsq_tokenizer.cu`; what is generated are sizes and tables in front of it
and the kernels that `runtime/backends/cuda.py` launches behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rfsq.export.c_tables import Array, IntArray, filled, number, table
from rfsq.export.plan import Affine, DecoderPlan, EncoderPlan, Plan, action_limit, middle_level
from rfsq.rfsq_ref.quantizer import SIGMA_EPSILON
from rfsq.runtime.bundle.beliefs import ENGINE_SUM_TOLERANCE
from rfsq.runtime.bundle.manifest import (
    IS_LOGITS,
    KEEPS_MODE,
    TOKEN_TYPES,
    TokenType,
    belief_kernel_name,
    kernel_name,
    token_types,
)
from rfsq.runtime.bundle.validation import STATS_LIMIT

_WARP = 32
_MOST_THREADS = 1024
_LOG2_E = float(np.log2(np.e))
#: What static shared memory has, and what a thread's registers hold beside everything else.
_SHARED_BYTES, _REGISTERS = 48 * 1024, 24
#: Warps of a block of the many kernels: the first for which there is room.
_WARPS = (8, 4)
#: What a byte of the many kernels holds beside the mark of what is illegal.
_MOST_LEVELS_OF_MANY = 128
#: Below it, SCALED_BELOW_40 of the template overflows nowhere; rounding is added to what is compared with it.
_MOST_BELOW_40 = 40.0
#: Up to so many hidden units the many kernels hold every weight in an instruction.
_MOST_WRITTEN_OUT = 128
#: Threads of a block that decodes the beliefs of a step.
_MOST_BELIEF_THREADS = 256


def cuda_tokenizer(encoder: EncoderPlan, decoders: Sequence[DecoderPlan], fingerprint: str) -> str:
    """decoders: of ascending prefixes, the last of all layers; fingerprint: stated in the source.

    Raises BuildInputError for numbers that float32 does not hold.
    """
    types = token_types(encoder.num_levels)
    plans: list[Plan] = [encoder, *decoders]
    kernels = [kernel for plan in plans for token in types for kernel in _kernels(plan, token)]
    has_beliefs = not encoder.has_stats
    if has_beliefs:
        kernels += map(_belief_kernel, decoders)
    source = filled(
        "rfsq_tokenizer.cu",
        SIZES="\n".join(_sizes(encoder, any(map(_has_many, plans)))),
        TABLES="\n".join(_tables(encoder, decoders)),
        ARITHMETIC=filled("arithmetic.cu").rstrip(),
        BELIEFS=filled("beliefs.cu").rstrip() if has_beliefs else "",
        KERNELS="\n".join(kernels).rstrip(),
    )
    return f"/* Generated, do not edit; fingerprint {fingerprint}. */\n{source}"


# --- sizes and tables -------------------------------------------------------------------------------------------------


def _sizes(encoder: EncoderPlan, has_many: bool) -> list[str]:
    width, action_dim, latent_dim = encoder.first.weight.shape[0], encoder.action_dim, encoder.latent_dim
    levels, has_constant_bins = encoder.num_levels, encoder.quantizer is not None
    # Four threads for each output, one for each hidden unit.
    wanted = max(width, 4 * max(action_dim, latent_dim))
    threads = min(-(-wanted // _WARP) * _WARP, _MOST_THREADS)
    epsilon = 0 if has_constant_bins else SIGMA_EPSILON
    fitting = [n for n in _WARPS if _staged_bytes(action_dim, latent_dim, encoder.num_layers, n) <= _SHARED_BYTES]
    return [
        f"constexpr int A = {action_dim}, D = {latent_dim}, L = {encoder.num_layers}, K = {levels}, H = {width};",
        f"constexpr int WARPS = {(fitting or _WARPS[-1:])[0]}, SHARED_BYTES = {_SHARED_BYTES};",
        f"constexpr int MOST_WRITTEN_OUT = {_MOST_WRITTEN_OUT}, T = {encoder.chunk_length};",
        f"constexpr int MIDDLE_LEVEL = {middle_level(levels)}, FEW_THREADS = {threads};",
        f"[[maybe_unused]] constexpr int BELIEF_THREADS = {_belief_threads(encoder)};",
        "/* How a call takes what is given of beliefs; bits of its terms. */",
        f"[[maybe_unused]] constexpr int IS_LOGITS = {IS_LOGITS}, KEEPS_MODE = {KEEPS_MODE};",
        f"[[maybe_unused]] constexpr float SUM_TOLERANCE = {number(ENGINE_SUM_TOLERANCE)};",
        f"constexpr float ACTION_LIMIT = {number(action_limit(encoder))}, STATS_LIMIT = {number(STATS_LIMIT)};",
        f"[[maybe_unused]] constexpr float SIGMA_EPSILON = {number(epsilon)}, LEVEL_STEP = {number(2 / (levels - 1))};",
        f"#define HAS_OFFSET {int(encoder.offset.any())}",
        f"#define HAS_CONSTANT_BINS {int(has_constant_bins)}",
        f"#define HAS_MANY {int(has_many)}",
    ]


def _tables(encoder: EncoderPlan, decoders: Sequence[DecoderPlan]) -> list[str]:
    lines = [
        _rows("ENCODER_ROWS", encoder.first, encoder.second),
        _device("ENCODER_BIAS", encoder.second.bias),
        "struct Encoder {",
        f"    {_member('float', 'row(int h, int i)', 'ENCODER_ROWS[h][i]')}",
        "};",
    ]
    if encoder.offset.any():
        lines.append(_device("OFFSET", encoder.offset))
    if encoder.quantizer is not None:
        lines += [_device("BIN_RATIO", encoder.quantizer.ratio), _device("BIN_SHIFT", encoder.quantizer.shift)]
    return [*lines, *(line for decoder in decoders for line in _decoder(decoder))]


def _rows(name: str, first: Affine, second: Affine, scale: float = 1.0) -> str:
    """A hidden unit in each row: its weights, its bias, its weights in the next layer. Filled up to four parts.

    scale: what the hidden unit's sum is multiplied with, and its value as well.
    """
    inputs, bias, outputs = (part.astype(np.float64) for part in (first.weight, first.bias, second.weight))
    rows = np.hstack([inputs * scale, bias[:, None] * scale, outputs.T / scale]).astype(np.float32)
    return _device(name, np.pad(rows, [(0, -rows.shape[0] % 4), (0, -rows.shape[1] % 4)]))


def _device(name: str, values: Array | IntArray, c_type: str = "float") -> str:
    """Where an index is known to the compiler, the number itself is in the instruction."""
    return table(f"alignas(16) __device__ constexpr {c_type}", name, values)


def _decoder(plan: DecoderPlan) -> list[str]:
    """Its tables, and a struct through which the template reaches them."""
    name = f"L{plan.prefix}"
    lines = [_rows(f"{name}_ROWS", plan.hidden, plan.second, _LOG2_E), _device(f"{name}_BIAS", plan.second.bias)]
    kind, members, scale = "STATISTICS", [], "SCALED"
    if plan.latents is not None and plan.own_tokens is not None:
        fixed = fixed_point(plan.own_tokens, plan.latents.bias, plan.num_levels)
        kind, scale = "OWN_TOKENS", "SCALED_BELOW_40" if fixed.largest_sum(plan.hidden) < _MOST_BELOW_40 else "SCALED"
        signed = "int" if fixed.bits == 32 else "long long"
        lines += [
            _device(f"{name}_TOKEN_WEIGHT", fixed.weight, signed),
            _device(f"{name}_LATENT_START", fixed.start, signed),
            _device(f"{name}_MEAN_WEIGHT", plan.own_tokens),
            _device(f"{name}_MIDDLE", _middle(plan.own_tokens, plan.latents.bias, plan.num_levels)),
        ]
        members = [
            f"typedef {signed} Signed;",
            f"typedef unsigned {signed} Unsigned;",
            f"static constexpr float LATENT_STEP = {number(fixed.step)};",
            _member(signed, "fixed_weight(int d, int l)", f"{name}_TOKEN_WEIGHT[d][l]"),
            _member(signed, "latent_start(int d)", f"{name}_LATENT_START[d]"),
            _member("float", "mean_weight(int d, int l)", f"{name}_MEAN_WEIGHT[d][l]"),
            _member("float", "middle(int d)", f"{name}_MIDDLE[d]"),
        ]
        if _has_many(plan):
            lines.append(_device(f"{name}_WORD_WEIGHT", fixed.words(), "int"))
            members.append(_member("int", "word_weight(int d, int i)", f"{name}_WORD_WEIGHT[d][i]"))
    elif plan.latents is not None:
        kind = "ALL_TOKENS"
        lines += [
            _device(f"{name}_TOKEN_WEIGHT", np.ascontiguousarray(plan.latents.weight.T)),
            _device(f"{name}_LATENT_BIAS", plan.latents.bias),
        ]
        members = [
            _member("float", "token_weight(int i, int d)", f"{name}_TOKEN_WEIGHT[i][d]"),
            _member("float", "latent_bias(int d)", f"{name}_LATENT_BIAS[d]"),
        ]
    members = [
        f"static constexpr int LAYERS = {plan.prefix};",
        f"static constexpr Latents LATENTS = {kind};",
        f"static constexpr Scale SCALE = {scale};",
        _member("const float *", "rows()", f"&{name}_ROWS[0][0]"),
        _member("float", "row(int h, int i)", f"{name}_ROWS[h][i]"),
        _member("float", "bias(int a)", f"{name}_BIAS[a]"),
        *members,
    ]
    return [*lines, f"struct {name} {{", *(f"    {member}" for member in members), "};"]


def _member(c_type: str, signature: str, value: str) -> str:
    return f"static __device__ __forceinline__ {c_type} {signature} {{ return {value}; }}"


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """latents = step * (weight @ tokens + start), exact in whole numbers of `bits` bits; weight [D, l], start [D]."""

    weight: IntArray
    start: IntArray
    step: float
    num_levels: int
    bits: int

    def words(self) -> IntArray:
        """[D, 4 * n]: for each latent its weights for the four tokens of each of n words, byte by byte.

        Tokens lie one after the other, so that a latent's may begin and end within a word: others' have no weight in
        it. A weight is the sum of its bytes, of -128 ... 127, times 1, 256, 256² and 256³.
        """
        latent_dim, layers = self.weight.shape
        num_words = max((layers * (d + 1) - 1) // 4 - layers * d // 4 + 1 for d in range(latent_dim))
        rest = np.zeros((latent_dim, 4 * num_words), np.int64)
        for d in range(latent_dim):
            rest[d, layers * d % 4 :][:layers] = self.weight[d]
        words = np.zeros((latent_dim, num_words, 4), np.uint32)
        for byte in range(4):
            digits = (rest + 128) % 256 - 128
            rest = (rest - digits) // 256
            words[..., byte] = np.ascontiguousarray(digits.astype(np.int8)).view("<u4")
        assert not rest.any()
        return words.reshape(latent_dim, -1).view(np.int32).astype(np.int64)

    def largest_sum(self, hidden: Affine) -> float:
        """No hidden unit's sum is larger, whatever the legal tokens and however float32 rounds on the way."""
        highest = self.step * (np.maximum(self.weight, 0).sum(1) * (self.num_levels - 1.0) + self.start)
        lowest = self.step * (np.minimum(self.weight, 0).sum(1) * (self.num_levels - 1.0) + self.start)
        weight, bias = hidden.weight.astype(np.float64), hidden.bias.astype(np.float64)
        sums = np.maximum(weight * highest, weight * lowest).sum(1) + bias
        # One rounding for each latent, each product's weight and each sum; twice as much is certain.
        terms = (np.abs(weight) * np.maximum(np.abs(highest), np.abs(lowest))).sum(1) + np.abs(bias)
        return float((sums + terms * (weight.shape[1] + 3) * 2.0**-23).max())


def fixed_point(weight: Array, bias: Array, num_levels: int) -> FixedPoint:
    """Two bits are kept back: so no sum of rounded weights overflows, and no weight's highest byte does.

    A rounded weight is wrong by up to half a step, times the token. So that it is times how far the token lies from the
    middle, what that makes at the middle goes into `start`. With more levels than the many kernels take, 32 bits would
    be too few even so.
    """
    bits = 32 if num_levels <= _MOST_LEVELS_OF_MANY else 64
    exact, middle = weight.astype(np.float64), (num_levels - 1) / 2
    largest = (np.abs(bias) + np.abs(exact).sum(1) * (num_levels - 1)).max()
    exponent = bits - 3 - int(np.ceil(np.log2(largest))) if largest > 0 else 0
    # The step has to be a float32 itself; latents below 2^-97 alone lose digits by that.
    exponent = int(np.clip(exponent, -126, 126))
    fixed = np.rint(np.ldexp(exact, exponent))
    start = np.rint(np.ldexp(bias.astype(np.float64), exponent) + (np.ldexp(exact, exponent) - fixed).sum(1) * middle)
    # What rounding adds is far below one of the two bits.
    assert (np.abs(start) + np.abs(fixed).sum(1) * (num_levels - 1)).max() < 2.0 ** (bits - 2)
    return FixedPoint(fixed.astype(np.int64), start.astype(np.int64), 2.0**-exponent, num_levels, bits)


def _middle(weight: Array, bias: Array, num_levels: int) -> Array:
    """Latents of tokens that are all in the middle of their levels, where what means differ from is small."""
    middle = bias + weight.astype(np.float64).sum(1) * (num_levels - 1) / 2
    return np.asarray(middle, np.float32)


# --- kernels ----------------------------------------------------------------------------------------------------------


def _kernels(plan: Plan, token: TokenType) -> list[str]:
    """One for few steps and, where the sizes suit it, one for many."""
    c_type = TOKEN_TYPES[token]
    if isinstance(plan, EncoderPlan):
        stats, passed = (", float *stats", "stats") if plan.has_stats else ("", "nullptr")
        prefix, arguments = None, f"const float *actions, {c_type} *tokens{stats}, Steps steps"
        few, many = f"encode_few(actions, tokens, {passed})", "encode_many<L>(actions, tokens, steps)"
    else:
        stats, passed = ("const float *stats, ", "stats") if plan.has_stats else ("", "nullptr")
        prefix, arguments = plan.prefix, f"const {c_type} *tokens, {stats}float *actions, Steps steps"
        few = f"decode_few<L{prefix}>(tokens, {passed}, actions)"
        many = f"decode_many<L{prefix}>(tokens, actions, steps)"
    kernels = [_kernel(kernel_name(prefix, token, "few"), "FEW_THREADS", arguments, few)]
    if _has_many(plan):
        kernels.append(_kernel(kernel_name(prefix, token, "many"), "WARP * WARPS", arguments, many))
    return kernels


def _kernel(name: str, threads: str, arguments: str, body: str) -> str:
    return f'extern "C" __global__ void __launch_bounds__({threads}) {name}({arguments})\n{{\n    {body};\n}}\n'


def _belief_threads(encoder: EncoderPlan) -> int:
    """One for each token, hidden unit and slope, as far as they have room."""
    width = int(encoder.first.weight.shape[0])
    wanted = max(encoder.latent_dim * max(encoder.num_layers, encoder.action_dim), width)
    return min(-(-wanted // _WARP) * _WARP, _MOST_BELIEF_THREADS)


def _belief_kernel(plan: DecoderPlan) -> str:
    arguments = (
        "const float *given, float *actions, float *deviations, float *mode_probability, int *mode, "
        "const float *sharpness, Gathered *gathered, Steps terms, Steps coarse"
    )
    answer = "Answer{actions, deviations, mode_probability, mode}"
    body = f"believe<L{plan.prefix}>(given, {answer}, sharpness, (int)terms, (int)coarse, gathered)"
    return _kernel(belief_kernel_name(plan.prefix), "BELIEF_THREADS", arguments, body)


def _has_many(plan: Plan) -> bool:
    """Whether there are many kernels for it, by its kind and its sizes; else the few kernels take every batch."""
    if isinstance(plan, EncoderPlan):
        is_of_kind, layers = plan.quantizer is not None, plan.num_layers
    else:
        is_of_kind, layers = plan.own_tokens is not None, plan.prefix
    return (
        is_of_kind
        and plan.num_levels <= _MOST_LEVELS_OF_MANY
        and plan.latent_dim * layers % 4 == 0
        and plan.latent_dim + plan.action_dim <= _REGISTERS
        and _staged_bytes(plan.action_dim, plan.latent_dim, layers, _WARPS[-1]) <= _SHARED_BYTES
    )


def _staged_bytes(action_dim: int, latent_dim: int, layers: int, warps: int) -> int:
    """Rows of tokens with what separates them, in which actions are moved too."""
    return 4 * max(latent_dim * layers // 4 + 4, action_dim) * _WARP * warps
