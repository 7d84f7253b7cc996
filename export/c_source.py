"""C source of a tokenizer with the weights inside: plain C11, no dependency, no allocation, no global state.

The arithmetic is written once, in `templates/rfsq_tokenizer.c`. Generated are the tables of a plan in front of it, the
functions behind it, and their declarations in `templates/rfsq_tokenizer.h`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rfsq.export.c_builder import C_FLAGS, HEADER_NAME, SOURCE_NAME
from rfsq.export.c_tables import Array, filled, number, table
from rfsq.export.plan import Affine, DecoderPlan, DeployMode, EncoderPlan, Plan, action_limit, middle_level
from rfsq.rfsq_ref.quantizer import SIGMA_EPSILON
from rfsq.runtime.bundle.backend_specs import BACKENDS
from rfsq.runtime.bundle.beliefs import ENGINE_SUM_TOLERANCE
from rfsq.runtime.bundle.validation import STATS_LIMIT

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

    Raises BuildInputError for numbers that float32 does not hold.
    """
    plans: list[Plan] = [encoder, *decoders]
    functions = [_encoder_function(encoder), *map(_decoder_function, decoders)]
    if not encoder.has_stats:
        # No policy predicts the statistics that would travel beside the tokens.
        functions += map(_belief_function, decoders)
    source = filled(
        SOURCE_NAME,
        TABLES="\n".join(_tables(encoder, decoders)),
        ARITHMETIC=filled("arithmetic.c").rstrip(),
        ONE_COPY=filled("one_copy.c").rstrip(),
        BELIEFS="" if encoder.has_stats else beliefs("beliefs.c"),
        FUNCTIONS="\n".join(functions).rstrip(),
    )
    header = filled(
        HEADER_NAME,
        FINGERPRINT=fingerprint,
        MODE=mode.value,
        CHUNK_LENGTH=encoder.chunk_length,
        ACTION_DIM=encoder.action_dim,
        LATENT_DIM=encoder.latent_dim,
        NUM_LAYERS=encoder.num_layers,
        NUM_LEVELS=encoder.num_levels,
        ACTION_LIMIT=number(action_limit(encoder)),
        CHECKED_STEPS=BACKENDS["c"].checked_steps,
        DECLARATIONS="\n".join(
            [*map(_declaration, plans), *(() if encoder.has_stats else map(_belief_declaration, decoders))]
        ).rstrip(),
    )
    note = f"/* Generated, do not edit; fingerprint {fingerprint}. Compile with {' '.join(C_FLAGS)} */\n"
    return CTokenizer(header, note + source)


def beliefs(template: str) -> str:
    """What decodes probabilities, from the template of this name."""
    parts = {part.upper(): filled(f"{part}.c").rstrip() for part in ("exponents", "lanes")}
    return filled(template, **parts).rstrip()


def decoder_name(prefix: int) -> str:
    """The C function that decodes `prefix` layers."""
    return f"rfsq_decode_l{prefix}"


def belief_name(prefix: int) -> str:
    """The C function that decodes probabilities of `prefix` layers."""
    return f"rfsq_decode_beliefs_l{prefix}"


# --- tables -----------------------------------------------------------------------------------------------------------


def _tables(encoder: EncoderPlan, decoders: Sequence[DecoderPlan]) -> list[str]:
    quantizer = encoder.quantizer
    width, half_range = encoder.first.weight.shape[0], (encoder.num_levels - 1) / 2
    lines = [
        f"enum {{ H = {width}, MIDDLE_LEVEL = {middle_level(encoder.num_levels)} }};",
        f"#define HAS_OFFSET {int(encoder.offset.any())}",
        f"#define HAS_CONSTANT_BINS {int(quantizer is not None)}",
        f"#define SIGMA_EPSILON {number(0 if quantizer else SIGMA_EPSILON)}",
        f"#define LEVEL_STEP {number(1 / half_range)}",
        f"#define STATS_LIMIT {number(STATS_LIMIT)}",
        f"#define SUM_TOLERANCE {number(ENGINE_SUM_TOLERANCE)}",
        "#define EACH_LAYER(LAYER) " + " ".join(f"LAYER({layer})" for layer in range(encoder.num_layers)),
        *_layer("ENCODER_FIRST", encoder.first),
        *_layer("ENCODER_SECOND", encoder.second),
    ]
    if quantizer is not None:
        lines += [_padded_table("BIN_RATIO", quantizer.ratio), _padded_table("BIN_SHIFT", quantizer.shift)]
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
        if decoder.latents is not None:
            lines.append(_padded_table(f"{name}_HIDDEN_BY_UNIT", decoder.hidden.weight))
        if decoder.latents is not None and decoder.own_tokens is None:
            lines.append(_padded_table(f"{name}_LATENTS_BY_TOKEN", decoder.latents.weight))
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
    return f"{_signature(plan)}\n{{\n    return encode(actions, num_chunks, tokens, {stats});\n}}\n"


def _decoder_function(plan: DecoderPlan) -> str:
    name, stats = f"l{plan.prefix}", "stats" if plan.has_stats else "NULL"
    check = "    if (stats == NULL)\n        return RFSQ_ILLEGAL_VALUE;\n" if plan.has_stats else ""
    return f"""\
{_to_latents(plan)}
ONE_COPY static int {name}_decode_some(const int32_t *tokens, const float *stats, size_t until_end, float *actions)
{{
    return decode_checked({_decoder(plan)}, tokens, stats, until_end, actions);
}}

{_signature(plan)}
{{
{check}    return decode({name}_decode_some, {plan.prefix}, tokens, {stats}, num_chunks, actions);
}}
"""


def _decoder(plan: DecoderPlan) -> str:
    """A value of C."""
    name = f"L{plan.prefix}"
    return f"""\
(struct decoder){{
        {plan.prefix}, l{plan.prefix}_to_latents,
        &{name}_HIDDEN_WEIGHT[0][0], {name}_HIDDEN_BIAS, &{name}_SECOND_WEIGHT[0][0], {name}_SECOND_BIAS,
    }}"""


def _to_latents(plan: DecoderPlan) -> str:
    """The C function from tokens to latents, with its tables.

    It is written out layer by layer: then a compiler loads the layers of many latents at once.
    """
    name, layers = f"l{plan.prefix}_to_latents", plan.prefix
    tables: list[str] = []
    if plan.latents is None:
        body = _latents_from_stats(layers)
    elif plan.own_tokens is None:
        tables = _layer(name.upper(), plan.latents)
        body = f"""\
    _Alignas(64) float levels[STEPS * D * {layers}];
    (void)stats;
    for (int i = 0; i < STEPS * D * {layers}; ++i)
        levels[i] = (float)tokens[i];
    linear(D * {layers}, D * {layers}, D, &{name.upper()}_WEIGHT[0][0], {name.upper()}_BIAS, levels, latents);"""
    else:
        weight, bias = f"{name.upper()}_WEIGHT", f"{name.upper()}_BIAS"
        tables = [_table(weight, plan.own_tokens.ravel()), _table(bias, plan.latents.bias)]
        body = f"""\
    (void)stats;
{_sums_of_own_tokens(layers, f"{weight}[i] * (float)tokens[s * (D * {layers}) + i]", f"{bias}[d]")}"""
    parameters = "const int32_t *restrict tokens, const float *restrict stats, float *restrict latents"
    return "\n".join([*tables, f"static inline void {name}({parameters})\n{{\n{body}\n}}\n"])


def _belief_function(plan: DecoderPlan) -> str:
    """Decodes probabilities of this prefix; with the first steps of it, from tokens to latents."""
    name, layers = f"l{plan.prefix}", plan.prefix
    table = f"{name.upper()}_TO_LATENTS"
    if plan.own_tokens is None:
        inputs, by_token = f"PADDED(D * {layers})", f"&{name.upper()}_LATENTS_BY_TOKEN[0][0]"
        latents = f"    linear(D * {layers}, D * {layers}, D, &{table}_WEIGHT[0][0], {table}_BIAS, means, latents);"
        spread = f"""\
    memset(spread, 0, STEPS * {inputs} * sizeof *spread);
    for (int s = 0; s < STEPS; ++s)
        memcpy(spread + s * {inputs}, variances + s * (D * {layers}), D * {layers} * sizeof *spread);"""
    else:
        inputs, by_token = "PADDED(D)", "NULL"
        place = f"s * (D * {layers}) + i"
        latents = _sums_of_own_tokens(layers, f"{table}_WEIGHT[i] * means[{place}]", f"{table}_BIAS[d]")
        squared = f"{table}_WEIGHT[i] * {table}_WEIGHT[i] * variances[{place}]"
        spread = _sums_of_own_tokens(layers, squared, "0", "spread")
    return f"""\
static inline void {name}_mean_latents(const float *restrict means, float *restrict latents)
{{
{latents}
}}

static inline void {name}_spread(const float *restrict variances, float *restrict spread)
{{
{spread}
}}

{_belief_signature(plan)}
{{
    const struct belief_decoder decoder = {{
        {_decoder(plan)},
        {name}_decode_some, {inputs}, {name}_mean_latents, {name}_spread,
        &{name.upper()}_HIDDEN_BY_UNIT[0][0], {by_token},
    }};
    return believe(decoder, given, sharpness, is_logits, keeps_mode, coarse, num_chunks, actions, deviations,
                   mode_probability);
}}
"""


def _sums_of_own_tokens(layers: int, product: str, start: str, target: str = "latents") -> str:
    """Statements that sum over each latent's own tokens; product: of token `i` in step `s`."""
    return f"""\
    _Alignas(64) float products[STEPS * D * {layers}];
    for (int s = 0; s < STEPS; ++s)
        for (int i = 0; i < D * {layers}; ++i)
            products[s * (D * {layers}) + i] = {product};
{_sums_of_neighbours("products", layers, start, target)}"""


def _sums_of_neighbours(source: str, count: int, start: str, target: str) -> str:
    """Statements that add up every `count` neighbours into target: halves for as long as there is an even number."""
    halvings = ""
    while count % 2 == 0:
        count //= 2
        sums = f"sums_of_{count}"
        halvings += f"""\
    _Alignas(64) float {sums}[STEPS * D * {count}];
    add_halves(STEPS * D, {count}, {source}, {sums});
"""
        source = sums
    terms = " + ".join([start, *(f"{source}[(s * D + d) * {count} + {n}]" for n in range(count))])
    return f"""\
{halvings}    memset({target}, 0, STEPS * PADDED(D) * sizeof *{target});
    for (int s = 0; s < STEPS; ++s)
        for (int d = 0; d < D; ++d)
            {target}[s * PADDED(D) + d] = {terms};"""


def _latents_from_stats(layers: int) -> str:
    """Sums of sigma times what a token is above the middle, which is exact; the smallest first.

    What pads the latents is zero.
    """
    smallest_first = range(layers)[::-1]
    means = " + ".join(f"stat[{2 * layer}]" for layer in smallest_first)
    sums = "\n".join(
        f"            sum += ((float)token[{layer}] - (K - 1) * 0.5f) * stat[{2 * layer + 1}];"
        for layer in smallest_first
    )
    return f"""\
    memset(latents, 0, STEPS * PADDED(D) * sizeof *latents);
    for (int s = 0; s < STEPS; ++s) {{
        const float *const stat = stats + s * {2 * layers};
        const float means = {means};
        for (int d = 0; d < D; ++d) {{
            const int32_t *const token = tokens + (s * D + d) * {layers};
            float sum = 0;
{sums}
            latents[s * PADDED(D) + d] = sum * LEVEL_STEP + means;
        }}
    }}"""


# --- declarations -----------------------------------------------------------------------------------------------------


def _parameters(plan: Plan) -> list[tuple[str, str]]:
    """Of the C function: the declaration of each, and what the header says of it."""
    if isinstance(plan, EncoderPlan):
        stats = [("float *stats", "[num_chunks][T][L][2], mean and sigma, written; or NULL")]
        return [
            ("const float *actions", "[num_chunks][T][A], physical units"),
            ("size_t num_chunks", "how many"),
            ("int32_t *tokens", "[num_chunks][T][D][L], written"),
            *(stats if plan.has_stats else ()),
        ]
    stats = [("const float *stats", f"[num_chunks][T][{plan.prefix}][2], as the encoder gave them")]
    return [
        ("const int32_t *tokens", f"[num_chunks][T][D][{plan.prefix}]"),
        *(stats if plan.has_stats else ()),
        ("size_t num_chunks", "how many"),
        ("float *actions", "[num_chunks][T][A], physical units, written"),
    ]


def _belief_parameters(plan: DecoderPlan) -> list[tuple[str, str]]:
    return [
        ("const float *given", f"[num_chunks][T][D][{plan.prefix}][K], probabilities or logits"),
        (
            "const float *sharpness",
            f"[{plan.prefix}], factors of the logits of each layer: 1 / temperature, 1e-30 ... 1e30",
        ),
        ("int is_logits", "whether `given` are logits; -inf is a level that cannot be"),
        ("int keeps_mode", "whether the likeliest level of every coarse token is taken for certain"),
        ("int coarse", f"how many of the first layers are the mode, 0 ... {plan.prefix}"),
        ("size_t num_chunks", "how many"),
        ("float *actions", "[num_chunks][T][A], physical units, expected values, written"),
        ("float *deviations", "[num_chunks][T][A], their standard deviations, written; or NULL"),
        ("float *mode_probability", "[num_chunks], of the least certain coarse token, written; or NULL"),
    ]


def _signature(plan: Plan) -> str:
    name = "rfsq_encode" if isinstance(plan, EncoderPlan) else decoder_name(plan.prefix)
    return f"int {name}({', '.join(declaration for declaration, _ in _parameters(plan))})"


def _belief_signature(plan: DecoderPlan) -> str:
    return f"int {belief_name(plan.prefix)}({', '.join(declaration for declaration, _ in _belief_parameters(plan))})"


def _declaration(plan: Plan) -> str:
    brief = "Encode actions" if isinstance(plan, EncoderPlan) else f"Decode the first {plan.prefix} layers"
    return _documented(brief, _parameters(plan), _signature(plan))


def _belief_declaration(plan: DecoderPlan) -> str:
    brief = f"Decode what is believed of the first {plan.prefix} layers"
    return _documented(brief, _belief_parameters(plan), _belief_signature(plan))


def _documented(brief: str, parameters: list[tuple[str, str]], signature: str) -> str:
    names = (f" * @param {re.split('[ *]', declared)[-1]} {said}\n" for declared, said in parameters)
    return f"""\
/**
 * @brief {brief}.
{"".join(names)} * @return RFSQ_OK or RFSQ_ILLEGAL_VALUE
 */
{signature};
"""
