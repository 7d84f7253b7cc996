"""C source of a tokenizer with the weights inside: plain C11, no dependency, no allocation, no global state.

The arithmetic is written once, in `templates/rfsq_tokenizer.c`; what is generated are the tables of a plan in front of
it, the functions that the header declares behind it, and the header.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rfsq.export.c_builder import C_FLAGS, SOURCE_NAME
from rfsq.export.plan import (
    Affine,
    AffineQuantizer,
    DecoderPlan,
    DeployMode,
    DynamicQuantizer,
    EncoderPlan,
    action_limit,
    middle_level,
)
from rfsq.export.source_tables import Array, number, own_tokens, require_countable, table
from rfsq.runtime.bundle.backend_specs import BACKENDS
from rfsq.runtime.bundle.validation import STATS_LIMIT

_TEMPLATE = Path(__file__).parent / "templates" / SOURCE_NAME
#: As in the template.
_LANES = 8
_WIDE_LANES = 16
_STEPS = 8


@dataclass(frozen=True)
class CTokenizer:
    """The two files."""

    header: str
    source: str


def c_tokenizer(
    encoder: EncoderPlan, decoders: Sequence[DecoderPlan], fingerprint: str, mode: DeployMode
) -> CTokenizer:
    """decoders: of ascending prefixes, the last of all layers; fingerprint and mode: stated in the files.

    Raises BuildInputError where float32 cannot count the levels.
    """
    require_countable(encoder.num_levels)
    template = _TEMPLATE.read_text(encoding="utf-8")
    functions = [_encoder_function(encoder), *map(_decoder_function, decoders)]
    source = template.replace("/* @TABLES@ */", "\n".join(_tables(encoder, decoders)))
    source = source.replace("/* @FUNCTIONS@ */", "\n".join(functions).rstrip())
    note = f"/* Generated, do not edit; fingerprint {fingerprint}. Compile with {' '.join(C_FLAGS)} */\n"
    return CTokenizer(_header(encoder, decoders, fingerprint, mode), note + source)


def decoder_name(prefix: int) -> str:
    """The C function that decodes `prefix` layers."""
    return f"rfsq_decode_l{prefix}"


# --- tables -----------------------------------------------------------------------------------------------------------


def _tables(encoder: EncoderPlan, decoders: Sequence[DecoderPlan]) -> list[str]:
    has_constant_bins = isinstance(encoder.quantizer, AffineQuantizer)
    epsilon = encoder.quantizer.epsilon if isinstance(encoder.quantizer, DynamicQuantizer) else 0.0
    width, half_range = encoder.first.weight.shape[0], (encoder.num_levels - 1) / 2
    lines = [
        f"enum {{ H = {width}, MIDDLE_LEVEL = {middle_level(encoder.num_levels)} }};",
        f"#define HAS_OFFSET {int(encoder.offset.any())}",
        f"#define HAS_CONSTANT_BINS {int(has_constant_bins)}",
        f"#define SIGMA_EPSILON {number(epsilon)}",
        f"#define LEVEL_STEP {number(1 / half_range)}",
        f"#define STATS_LIMIT {number(STATS_LIMIT)}",
        "#define EACH_LAYER(LAYER) " + " ".join(f"LAYER({layer})" for layer in range(encoder.num_layers)),
        *_layer("ENCODER_FIRST", encoder.first),
        *_layer("ENCODER_SECOND", encoder.second),
    ]
    if isinstance(encoder.quantizer, AffineQuantizer):
        lines += [
            _padded_table("BIN_RATIO", encoder.quantizer.ratio),
            _padded_table("BIN_SHIFT", encoder.quantizer.shift),
        ]
    if encoder.offset.any():
        # Of every step that is computed at once, so that one loop runs over all of them.
        lines.append(_table("OFFSETS", np.tile(encoder.offset, _STEPS)))
    for decoder in decoders:
        name = f"L{decoder.prefix}"
        lines += [
            *_layer(f"{name}_HIDDEN", decoder.hidden, _WIDE_LANES),
            _padded_table(f"{name}_SECOND_WEIGHT", decoder.second.weight, _WIDE_LANES),
            _table(f"{name}_SECOND_BIAS", decoder.second.bias),
        ]
    return lines


def _layer(name: str, layer: Affine, lanes: int = _LANES) -> list[str]:
    """Weight [inputs][outputs] and bias, outputs filled up to whole lanes."""
    return [_padded_table(f"{name}_WEIGHT", layer.weight.T, lanes), _padded_table(f"{name}_BIAS", layer.bias, lanes)]


def _padded_table(name: str, values: Array, lanes: int = _LANES) -> str:
    """With zeros behind every row, up to whole lanes."""
    missing = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % lanes)]
    return _table(name, np.pad(values, missing))


def _table(name: str, values: Array) -> str:
    return table("static _Alignas(64) const float", name, values)


# --- functions --------------------------------------------------------------------------------------------------------


def _encoder_function(plan: EncoderPlan) -> str:
    stats = "stats" if plan.has_stats else "NULL"
    return f"{_encoder_signature(plan)}\n{{\n    return encode(actions, num_chunks, tokens, {stats});\n}}\n"


def _decoder_function(plan: DecoderPlan) -> str:
    name, stats = f"L{plan.prefix}", "stats" if plan.has_stats else "NULL"
    check = "    if (stats == NULL)\n        return RFSQ_ILLEGAL_VALUE;\n" if plan.has_stats else ""
    return f"""\
{_to_latents(plan)}
{_decoder_signature(plan)}
{{
{check}    const struct decoder decoder = {{
        {plan.prefix}, l{plan.prefix}_to_latents,
        &{name}_HIDDEN_WEIGHT[0][0], {name}_HIDDEN_BIAS, &{name}_SECOND_WEIGHT[0][0], {name}_SECOND_BIAS,
    }};
    return decode(decoder, tokens, {stats}, num_chunks, actions);
}}
"""


def _to_latents(plan: DecoderPlan) -> str:
    """Its statements are written out layer by layer: then a compiler loads the layers of many latents at once."""
    name, layers = f"l{plan.prefix}_to_latents", plan.prefix
    head = (
        f"static inline void {name}(const int32_t *restrict tokens, const float *restrict stats, "
        "float *restrict latents)\n{"
    )
    if plan.latents is None:
        return _from_stats(head, layers)
    own = own_tokens(plan)
    if own is None:
        return "\n".join(
            [
                *_layer(name.upper(), plan.latents),
                head,
                f"    _Alignas(64) float levels[STEPS * D * {layers}];",
                "    (void)stats;",
                f"    for (int i = 0; i < STEPS * D * {layers}; ++i)",
                "        levels[i] = (float)tokens[i];",
                f"    linear(D * {layers}, D * {layers}, D, &{name.upper()}_WEIGHT[0][0], {name.upper()}_BIAS, levels, "
                "latents);",
                "}",
                "",
            ]
        )
    return "\n".join(
        [
            _table(f"{name.upper()}_WEIGHT", own.ravel()),
            _table(f"{name.upper()}_BIAS", plan.latents.bias),
            head,
            "    (void)stats;",
            f"    _Alignas(64) float products[STEPS * D * {layers}];",
            "    for (int s = 0; s < STEPS; ++s)",
            f"        for (int i = 0; i < D * {layers}; ++i)",
            f"            products[s * (D * {layers}) + i] = {name.upper()}_WEIGHT[i] "
            f"* (float)tokens[s * (D * {layers}) + i];",
            *_sums_of_neighbours("products", layers, f"{name.upper()}_BIAS[d]"),
            "}",
            "",
        ]
    )


def _sums_of_neighbours(source: str, count: int, start: str) -> list[str]:
    """Statements that add up every `count` neighbours into latents: halves for as long as there is an even number."""
    lines = []
    while count % 2 == 0:
        count //= 2
        sums = f"sums_of_{count}"
        lines += [
            f"    _Alignas(64) float {sums}[STEPS * D * {count}];",
            f"    add_halves(STEPS * D, {count}, {source}, {sums});",
        ]
        source = sums
    terms = " + ".join([start, *(f"{source}[(s * D + d) * {count} + {n}]" for n in range(count))])
    return [
        *lines,
        "    memset(latents, 0, STEPS * PADDED(D) * sizeof *latents);",
        "    for (int s = 0; s < STEPS; ++s)",
        "        for (int d = 0; d < D; ++d)",
        f"            latents[s * PADDED(D) + d] = {terms};",
    ]


def _from_stats(head: str, layers: int) -> str:
    """Sums of sigma times what a token is above the middle, which is exact; the smallest first.

    What pads the latents is zero.
    """
    means = " + ".join(f"stat[{2 * layer}]" for layer in reversed(range(layers)))
    lines = [
        head,
        "    memset(latents, 0, STEPS * PADDED(D) * sizeof *latents);",
        "    for (int s = 0; s < STEPS; ++s) {",
        f"        const float *const stat = stats + s * {2 * layers};",
        f"        const float means = {means};",
        "        for (int d = 0; d < D; ++d) {",
        f"            const int32_t *const token = tokens + (s * D + d) * {layers};",
        "            float sum = 0;",
        *(
            f"            sum += ((float)token[{layer}] - (K - 1) * 0.5f) * stat[{2 * layer + 1}];"
            for layer in reversed(range(layers))
        ),
        "            latents[s * PADDED(D) + d] = sum * LEVEL_STEP + means;",
        "        }",
        "    }",
        "}",
        "",
    ]
    return "\n".join(lines)


def _encoder_signature(plan: EncoderPlan) -> str:
    stats = ", float *stats" if plan.has_stats else ""
    return f"int rfsq_encode(const float *actions, size_t num_chunks, int32_t *tokens{stats})"


def _decoder_signature(plan: DecoderPlan) -> str:
    stats = "const float *stats, " if plan.has_stats else ""
    return f"int {decoder_name(plan.prefix)}(const int32_t *tokens, {stats}size_t num_chunks, float *actions)"


# --- header -----------------------------------------------------------------------------------------------------------


def _header(encoder: EncoderPlan, decoders: Sequence[DecoderPlan], fingerprint: str, mode: DeployMode) -> str:
    return "\n".join(
        [
            _HEADER_BEGIN,
            _define(
                "FINGERPRINT", f'"{fingerprint}"', "Identity of weights, constants and normaliser: what tokens mean."
            ),
            _define("MODE", f'"{mode.value}"', "How residuals are normalised."),
            _define("CHUNK_LENGTH", encoder.chunk_length, "T: control steps of a chunk."),
            _define("ACTION_DIM", encoder.first.weight.shape[1], "A: dimensions of an action."),
            _define("LATENT_DIM", encoder.second.weight.shape[0], "D: latent dimensions."),
            _define("NUM_LAYERS", encoder.num_layers, "L: residual layers."),
            _define("NUM_LEVELS", encoder.num_levels, "K: tokens are 0 ... K - 1."),
            _define(
                "ACTION_LIMIT", number(action_limit(encoder)), "The largest |action|: beyond it float32 overflows."
            ),
            _define(
                "CHECKED_STEPS",
                BACKENDS["c"].checked_steps,
                "Steps whose values are all checked before any is computed with.",
            ),
            "",
            _documented(
                "Encode actions.",
                [
                    ("actions", "[num_chunks][T][A], physical units"),
                    ("num_chunks", "how many"),
                    ("tokens", "[num_chunks][T][D][L], written"),
                    *(
                        [("stats", "[num_chunks][T][L][2], mean and sigma, written; or NULL")]
                        if encoder.has_stats
                        else []
                    ),
                ],
                _encoder_signature(encoder),
            ),
            *(
                _documented(
                    f"Decode the first {decoder.prefix} layers.",
                    [
                        ("tokens", f"[num_chunks][T][D][{decoder.prefix}]"),
                        *(
                            [("stats", f"[num_chunks][T][{decoder.prefix}][2], as the encoder gave them")]
                            if decoder.has_stats
                            else []
                        ),
                        ("num_chunks", "how many"),
                        ("actions", "[num_chunks][T][A], physical units, written"),
                    ],
                    _decoder_signature(decoder),
                )
                for decoder in decoders
            ),
            _HEADER_END,
        ]
    )


def _define(name: str, value: object, meaning: str) -> str:
    return f"/** {meaning} */\n#define RFSQ_{name} {value}"


def _documented(brief: str, parameters: Sequence[tuple[str, str]], signature: str) -> str:
    lines = "\n".join(f" * @param {name} {meaning}" for name, meaning in parameters)
    return f"/**\n * @brief {brief}\n{lines}\n * @return RFSQ_OK or RFSQ_ILLEGAL_VALUE\n */\n{signature};\n"


_HEADER_BEGIN = """\
/**
 * @file rfsq_tokenizer.h
 * @brief Robust RFSQ action tokens: encoder and decoders of one model. Generated, do not edit.
 *
 * Plain C11 without allocation or global state: every function may be called from any thread, a real-time one too.
 * No array may overlap another of the same call; none needs more alignment than its type.
 *
 * Every function returns RFSQ_OK, or RFSQ_ILLEGAL_VALUE where a value is not legal: a token that is no level, an action
 * that is not finite or beyond RFSQ_ACTION_LIMIT, statistics that no encoder gives. A call of at most
 * RFSQ_CHECKED_STEPS steps then writes nothing; a longer one may have written whole blocks of so many steps before it.
 */
#ifndef RFSQ_TOKENIZER_H
#define RFSQ_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/** What every function returns. */
enum { RFSQ_OK = 0, RFSQ_ILLEGAL_VALUE = 1 };
"""

_HEADER_END = """\
#ifdef __cplusplus
}
#endif

#endif
"""
