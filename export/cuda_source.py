"""CUDA source of a tokenizer with the weights inside, from the same plans as the C source.

The arithmetic is written once, in `templates/rfsq_tokenizer.cu`; what is generated are sizes and tables in front of it
and the kernels that `runtime/cuda_backend.py` launches behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.plan import (
    Affine,
    AffineQuantizer,
    DecoderPlan,
    DynamicQuantizer,
    EncoderPlan,
    action_limit,
    middle_level,
)
from export.source_tables import Array, number, own_tokens, require_countable, table
from runtime.kernel_names import TOKEN_TYPES, TokenType, kernel_name
from runtime.validation import STATS_LIMIT

_TEMPLATE = Path(__file__).parent / "templates" / "rfsq_tokenizer.cu"
_WARP = 32
_MOST_THREADS = 1024
#: Steps for each thread of the many kernels, measured: two share what is loaded, one leaves room for more threads,
#: which is better where memory is waited for.
_DECODED_STEPS: dict[TokenType, int] = {"int32": 1, "uint8": 2}
_ENCODED_STEPS = 1
#: What static shared memory has, and what a thread's registers hold beside everything else.
_SHARED_BYTES, _REGISTERS = 48 * 1024, 24
_WARPS = 4


def cuda_tokenizer(encoder: EncoderPlan, decoders: Sequence[DecoderPlan]) -> str:
    """decoders: of ascending prefixes, the last of all layers.

    Raises ValueError where float32 cannot count the levels.
    """
    require_countable(encoder.num_levels)
    kernels = [kernel for token in TOKEN_TYPES for kernel in _encoder_kernels(encoder, token)]
    kernels += [kernel for decoder in decoders for token in TOKEN_TYPES for kernel in _decoder_kernels(decoder, token)]
    source = _TEMPLATE.read_text(encoding="utf-8")
    source = source.replace("/* @SIZES@ */", "\n".join(_sizes(encoder, decoders)))
    source = source.replace("/* @TABLES@ */", "\n".join(_tables(encoder, decoders)))
    source = source.replace("/* @KERNELS@ */", "\n".join(kernels).rstrip())
    return "/* Generated, do not edit. */\n" + source


# --- sizes and tables -------------------------------------------------------------------------------------------------


def _sizes(encoder: EncoderPlan, decoders: Sequence[DecoderPlan]) -> list[str]:
    width, action_dim = encoder.first.weight.shape
    latent_dim, levels = encoder.second.weight.shape[0], encoder.num_levels
    # Four threads for each output, one for each hidden unit.
    wanted = max(width, 4 * max(action_dim, latent_dim))
    threads = min(-(-wanted // _WARP) * _WARP, _MOST_THREADS)
    epsilon = encoder.quantizer.epsilon if isinstance(encoder.quantizer, DynamicQuantizer) else 0.0
    has_many = any(_has_many(encoder, plan.prefix) for plan in decoders)
    return [
        f"constexpr int A = {action_dim}, D = {latent_dim}, L = {encoder.num_layers}, K = {levels}, H = {width};",
        f"constexpr int MIDDLE_LEVEL = {middle_level(levels)}, FEW_THREADS = {threads};",
        f"constexpr float ACTION_LIMIT = {number(action_limit(encoder))}, STATS_LIMIT = {number(STATS_LIMIT)};",
        f"[[maybe_unused]] constexpr float SIGMA_EPSILON = {number(epsilon)}, LEVEL_STEP = {number(2 / (levels - 1))};",
        f"#define HAS_CONSTANT_BINS {int(isinstance(encoder.quantizer, AffineQuantizer))}",
        f"#define HAS_MANY {int(has_many)}",
    ]


def _tables(encoder: EncoderPlan, decoders: Sequence[DecoderPlan]) -> list[str]:
    lines = [_rows("ENCODER_ROWS", encoder.first, encoder.second), _device("ENCODER_BIAS", encoder.second.bias)]
    if isinstance(encoder.quantizer, AffineQuantizer):
        lines += [_device("BIN_RATIO", encoder.quantizer.ratio), _device("BIN_SHIFT", encoder.quantizer.shift)]
    return [*lines, *(line for decoder in decoders for line in _decoder(decoder))]


def _rows(name: str, first: Affine, second: Affine) -> str:
    """A hidden unit in each row: its weights, its bias, its weights in the next layer. Filled up to four parts."""
    rows = np.hstack([first.weight, first.bias[:, None], second.weight.T])
    return _device(name, np.pad(rows, [(0, -rows.shape[0] % 4), (0, -rows.shape[1] % 4)]))


def _device(name: str, values: Array) -> str:
    """Where an index is known to the compiler, the number itself is in the instruction."""
    return table("alignas(16) __device__ constexpr float", name, values)


def _decoder(plan: DecoderPlan) -> list[str]:
    """Its tables, and a struct through which the template reaches them."""
    name = f"L{plan.prefix}"
    lines = [_rows(f"{name}_ROWS", plan.hidden, plan.second), _device(f"{name}_BIAS", plan.second.bias)]
    kind, weight, bias = "STATISTICS", "0", "0"
    if plan.latents is not None:
        own = own_tokens(plan)
        kind, weight, bias = "OWN_TOKENS", f"{name}_TOKEN_WEIGHT[i][j]", f"{name}_LATENT_BIAS[d]"
        if own is None:
            kind, own = "ALL_TOKENS", np.ascontiguousarray(plan.latents.weight.T)
        lines += [_device(f"{name}_TOKEN_WEIGHT", own), _device(f"{name}_LATENT_BIAS", plan.latents.bias)]
    return [
        *lines,
        f"struct {name} {{",
        f"    static constexpr int LAYERS = {plan.prefix};",
        f"    static constexpr Latents LATENTS = {kind};",
        f"    static __device__ __forceinline__ const float *rows() {{ return &{name}_ROWS[0][0]; }}",
        f"    static __device__ __forceinline__ float bias(int a) {{ return {name}_BIAS[a]; }}",
        f"    static __device__ __forceinline__ float token_weight(int i, int j) {{ return {weight}; }}",
        f"    static __device__ __forceinline__ float latent_bias(int d) {{ return {bias}; }}",
        "};",
    ]


# --- kernels ----------------------------------------------------------------------------------------------------------


def _encoder_kernels(plan: EncoderPlan, token: TokenType) -> list[str]:
    c_type = TOKEN_TYPES[token]
    stats, passed = (", float *stats", "stats") if plan.has_stats else ("", "nullptr")
    arguments = f"const float *actions, {c_type} *tokens{stats}, Steps steps"
    kernels = [
        _kernel(kernel_name(None, token, "few"), "FEW_THREADS", arguments, f"encode_few(actions, tokens, {passed})")
    ]
    if isinstance(plan.quantizer, AffineQuantizer) and _has_many(plan, plan.num_layers):
        body = f"encode_many<{c_type}, {_ENCODED_STEPS}>(actions, tokens, steps)"
        kernels.append(_kernel(kernel_name(None, token, "many"), "WARP * WARPS", arguments, body))
    return kernels


def _decoder_kernels(plan: DecoderPlan, token: TokenType) -> list[str]:
    c_type, decoder = TOKEN_TYPES[token], f"L{plan.prefix}"
    stats, passed = ("const float *stats, ", "stats") if plan.has_stats else ("", "nullptr")
    arguments = f"const {c_type} *tokens, {stats}float *actions, Steps steps"
    body = f"decode_few<{decoder}>(tokens, {passed}, actions)"
    kernels = [_kernel(kernel_name(plan.prefix, token, "few"), "FEW_THREADS", arguments, body)]
    if plan.latents is not None and own_tokens(plan) is not None and _has_many(plan, plan.prefix):
        body = f"decode_many<{decoder}, {c_type}, {_DECODED_STEPS[token]}>(tokens, actions, steps)"
        kernels.append(_kernel(kernel_name(plan.prefix, token, "many"), "WARP * WARPS", arguments, body))
    return kernels


def _kernel(name: str, threads: str, arguments: str, body: str) -> str:
    return f'extern "C" __global__ void __launch_bounds__({threads}) {name}({arguments})\n{{\n    {body};\n}}\n'


def _has_many(plan: EncoderPlan | DecoderPlan, layers: int) -> bool:
    """Whether the sizes suit the many kernels; else the few kernels take batches of every size."""
    decoded = plan.hidden if isinstance(plan, DecoderPlan) else plan.first
    width = decoded.weight.shape[0]
    latent_dim = plan.latent_dim if isinstance(plan, DecoderPlan) else plan.second.weight.shape[0]
    action_dim = plan.second.weight.shape[0] if isinstance(plan, DecoderPlan) else plan.first.weight.shape[1]
    row = -(-(action_dim + 1 + latent_dim) // 4) * 4
    staged = max(latent_dim * layers // 4 | 1, action_dim) * _WARP * _WARPS
    return (
        plan.num_levels <= 128
        and latent_dim * layers % 4 == 0
        and latent_dim + action_dim <= _REGISTERS
        and 4 * (-(-width // 4) * 4 * row + staged) <= _SHARED_BYTES
    )
