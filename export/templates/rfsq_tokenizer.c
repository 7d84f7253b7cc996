#include "rfsq_tokenizer.h"

#include <math.h>
#include <string.h>

/*
 * STEPS steps are computed at once, features side by side: [STEPS][features] everywhere. The features of a layer are the
 * lanes, which a compiler turns into vector instructions of any width without reordering a sum; the steps are sums that
 * are independent of each other, as many as a processor can have under way.
 */
enum { STEPS = 8, LANES = 8, CHECKED_STEPS = RFSQ_CHECKED_STEPS };
enum { CACHE_LINE = 64, FETCHED_STEPS = 16 };
enum { T = RFSQ_CHUNK_LENGTH, A = RFSQ_ACTION_DIM, D = RFSQ_LATENT_DIM, L = RFSQ_NUM_LAYERS, K = RFSQ_NUM_LEVELS };

_Static_assert(CHECKED_STEPS % STEPS == 0, "values are checked in whole blocks");

/* Features up to a whole number of lanes; the tables below are filled up with zeros. */
#define PADDED(features) (((features) + LANES - 1) / LANES * LANES)

/* The same for what is the inputs of a layer with few outputs, which are as many lanes as any processor has. */
enum { WIDE_LANES = 16 };
#define WIDE(features) (((features) + WIDE_LANES - 1) / WIDE_LANES * WIDE_LANES)

/* @TABLES@ */

_Static_assert(sizeof ENCODER_FIRST_BIAS == PADDED(H) * sizeof(float), "the tables are padded as the code expects");
#if HAS_OFFSET
_Static_assert(sizeof OFFSETS == STEPS * A * sizeof(float), "the tables are repeated as the code expects");
#endif

/* A hint alone: what it names need not be there. */
#ifdef __GNUC__
#define FETCH(address) __builtin_prefetch(address)
#else
#define FETCH(address) ((void)(address))
#endif

/* @ONE_COPY@ */

/* --- arithmetic -------------------------------------------------------------------------------------------------- */

/* @ARITHMETIC@ */

/* The lowest whole number that is not below x, for |x| < 2^31. */
static inline int32_t ceiling(float x)
{
    const int32_t toward_zero = (int32_t)x;
    return toward_zero + ((float)toward_zero < x);
}

/* exp(x) for -86 <= x <= 20: 2^n p(f) with whole n and n + f = x / ln 2, |f| <= 1/2. */
static inline float exponential(float x)
{
    const float shifted = x * 0x1.715476p+0f + 0x1.8p+23f;
    const float f = x * 0x1.715476p+0f - (shifted - 0x1.8p+23f);
    const float square = f * f;
    /* Fitted to 2^f with a relative error of at most 1.9e-9; in pairs, because the next step waits for the last. */
    const float low = (0x1p+0f + 0x1.62e430p-1f * f) + square * (0x1.ebfbdap-3f + 0x1.c6aed4p-5f * f);
    const float high = (0x1.3b2dbcp-7f + 0x1.5f456ap-10f * f) + square * 0x1.41d334p-13f;
    const float p = low + square * square * high;
    /* The lowest bits of `shifted` are n; the shift drops all others, and the sum adds n to p's exponent. */
    uint32_t bits, exponent;
    memcpy(&exponent, &shifted, sizeof exponent);
    memcpy(&bits, &p, sizeof bits);
    bits += exponent << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

/* x tanh(log(1 + exp(x))) = x n / (n + 2) with n = e (e + 2), e = exp(x); from x = 20 on the fraction is 1. */
static inline void mish(int count, float *restrict values)
{
    /* A loop of its own: otherwise GCC would compute each side of the limits by itself. */
    for (int i = 0; i < count; ++i)
        /* Below -86 the function is zero to float32, but e stays where it is there. */
        values[i] = values[i] > -86.0f ? values[i] : -86.0f;
    for (int i = 0; i < count; ++i) {
        const float e = exponential(values[i] < 20.0f ? values[i] : 20.0f);
        const float n = e * (e + 2);
        values[i] *= n / (n + 2);
    }
}

/* y = weight x + bias for weight [inputs][P], bias [P], x [STEPS][stride], y [STEPS][P], with P = PADDED(outputs). */
static inline void linear(int inputs, int stride, int outputs, const float *restrict weight,
                          const float *restrict bias, const float *restrict x, float *restrict y)
{
    const int padded = PADDED(outputs);
    for (int o = 0; o < padded; ++o) {
        float sum0 = bias[o], sum1 = bias[o], sum2 = bias[o], sum3 = bias[o];
        float sum4 = bias[o], sum5 = bias[o], sum6 = bias[o], sum7 = bias[o];
        for (int i = 0; i < inputs; ++i) {
            const float w = weight[i * padded + o];
            sum0 += w * x[i];
            sum1 += w * x[stride + i];
            sum2 += w * x[2 * stride + i];
            sum3 += w * x[3 * stride + i];
            sum4 += w * x[4 * stride + i];
            sum5 += w * x[5 * stride + i];
            sum6 += w * x[6 * stride + i];
            sum7 += w * x[7 * stride + i];
        }
        y[o] = sum0;
        y[padded + o] = sum1;
        y[2 * padded + o] = sum2;
        y[3 * padded + o] = sum3;
        y[4 * padded + o] = sum4;
        y[5 * padded + o] = sum5;
        y[6 * padded + o] = sum6;
        y[7 * padded + o] = sum7;
    }
}

/* Of every 2 * half neighbours in x the first half plus the second. */
static inline void add_halves(int groups, int half, const float *restrict x, float *restrict y)
{
    for (int g = 0; g < groups; ++g)
        for (int i = 0; i < half; ++i)
            y[g * half + i] = x[g * 2 * half + i] + x[g * 2 * half + half + i];
}

/*
 * The same for few outputs of many inputs: y [STEPS][outputs], weight [outputs][P], x [STEPS][P] with P = WIDE(inputs).
 * Here the inputs are the lanes: every WIDE_LANES-th goes into one sum, and the sums are added up in pairs, which is
 * both faster than lanes without an output and closer to the exact sum than one behind the other.
 */
static inline void linear_to_few(int inputs, int outputs, const float *restrict weight, const float *restrict bias,
                                 const float *restrict x, float *restrict y)
{
    enum { W = WIDE_LANES };
    const int padded = WIDE(inputs);
    _Alignas(64) float sums[STEPS * A * W], sums_of_8[STEPS * A * 8], sums_of_4[STEPS * A * 4], sums_of_2[STEPS * A * 2];
    for (int o = 0; o < outputs; ++o)
        for (int lane = 0; lane < W; ++lane) {
            float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0, sum4 = 0, sum5 = 0, sum6 = 0, sum7 = 0;
            for (int i = 0; i < padded; i += W) {
                const float w = weight[o * padded + i + lane];
                sum0 += w * x[i + lane];
                sum1 += w * x[padded + i + lane];
                sum2 += w * x[2 * padded + i + lane];
                sum3 += w * x[3 * padded + i + lane];
                sum4 += w * x[4 * padded + i + lane];
                sum5 += w * x[5 * padded + i + lane];
                sum6 += w * x[6 * padded + i + lane];
                sum7 += w * x[7 * padded + i + lane];
            }
            sums[o * W + lane] = sum0;
            sums[(outputs + o) * W + lane] = sum1;
            sums[(2 * outputs + o) * W + lane] = sum2;
            sums[(3 * outputs + o) * W + lane] = sum3;
            sums[(4 * outputs + o) * W + lane] = sum4;
            sums[(5 * outputs + o) * W + lane] = sum5;
            sums[(6 * outputs + o) * W + lane] = sum6;
            sums[(7 * outputs + o) * W + lane] = sum7;
        }
    add_halves(STEPS * outputs, 8, sums, sums_of_8);
    add_halves(STEPS * outputs, 4, sums_of_8, sums_of_4);
    add_halves(STEPS * outputs, 2, sums_of_4, sums_of_2);
    for (int s = 0; s < STEPS; ++s)
        for (int o = 0; o < outputs; ++o)
            y[s * outputs + o] = bias[o] + (sums_of_2[(s * outputs + o) * 2] + sums_of_2[(s * outputs + o) * 2 + 1]);
}

/* --- encoder ----------------------------------------------------------------------------------------------------- */

#if HAS_CONSTANT_BINS
/* latents [STEPS][PADDED(D)] -> tokens [STEPS][D][L]: bins = remainder * ratio + shift, from the middle level on. */
static inline void quantise(float *restrict latents, int32_t *restrict tokens)
{
    _Alignas(64) int32_t levels[L][STEPS * PADDED(D)];
    for (int l = 0; l < L; ++l) {
        /* In two loops: in one, GCC would compute each side of the limits on its own. */
        _Alignas(64) float bins[STEPS * PADDED(D)], limited[STEPS * PADDED(D)];
        for (int s = 0; s < STEPS; ++s)
            for (int d = 0; d < PADDED(D); ++d) {
                const int i = s * PADDED(D) + d;
                bins[i] = latents[i] * BIN_RATIO[l][d] + BIN_SHIFT[l][d];
                limited[i] = clamped(bins[i], -MIDDLE_LEVEL, K - 1 - MIDDLE_LEVEL);
            }
        for (int i = 0; i < STEPS * PADDED(D); ++i) {
            const int32_t count = ceiling(limited[i]);
            levels[l][i] = count + MIDDLE_LEVEL;
            latents[i] = bins[i] - (float)count;
        }
    }
    /* Written out layer by layer, so that a compiler interleaves whole vectors. */
    for (int s = 0; s < STEPS; ++s)
        for (int d = 0; d < D; ++d) {
            int32_t *const token = tokens + (s * D + d) * L;
#define LAYER(l) token[l] = levels[l][s * PADDED(D) + d];
            EACH_LAYER(LAYER)
#undef LAYER
        }
}
#else
/* The same with every layer's own mean and deviation: stats [STEPS][L][2], or NULL where nobody wants them. */
static inline void quantise(const float *restrict latents, int32_t *restrict tokens, float *restrict stats)
{
    const float half_range = (K - 1) * 0.5f;
    /* Sums run over the latents here, so the steps are the lanes. */
    _Alignas(64) float residual[D][STEPS];
    _Alignas(64) int32_t levels[L][D * STEPS], by_latent[D * STEPS * L];
    for (int d = 0; d < D; ++d)
        for (int s = 0; s < STEPS; ++s)
            residual[d][s] = latents[s * PADDED(D) + d];
    for (int l = 0; l < L; ++l) {
        float mean[STEPS] = {0}, squares[STEPS] = {0}, sigma[STEPS];
        _Alignas(64) float limited[D * STEPS];
        for (int d = 0; d < D; ++d)
            for (int s = 0; s < STEPS; ++s)
                mean[s] += residual[d][s];
        for (int s = 0; s < STEPS; ++s)
            mean[s] /= D;
        for (int d = 0; d < D; ++d)
            for (int s = 0; s < STEPS; ++s) {
                residual[d][s] -= mean[s];
                squares[s] += residual[d][s] * residual[d][s];
            }
        for (int s = 0; s < STEPS; ++s)
            sigma[s] = sqrtf(squares[s] / (D - 1)) + SIGMA_EPSILON;
        if (stats != NULL)
            for (int s = 0; s < STEPS; ++s) {
                stats[(s * L + l) * 2] = mean[s];
                stats[(s * L + l) * 2 + 1] = sigma[s];
            }
        /* In two loops: in one, GCC would compute each side of the limits on its own. */
        for (int d = 0; d < D; ++d)
            for (int s = 0; s < STEPS; ++s) {
                const float bins = residual[d][s] / sigma[s] * half_range + (half_range - 0.5f);
                limited[d * STEPS + s] = clamped(bins, 0.0f, K - 1);
            }
        for (int d = 0; d < D; ++d)
            for (int s = 0; s < STEPS; ++s) {
                const int32_t level = ceiling(limited[d * STEPS + s]);
                levels[l][d * STEPS + s] = level;
                residual[d][s] -= ((float)level * LEVEL_STEP - 1) * sigma[s];
            }
    }
    /* Written out layer by layer, so that a compiler interleaves whole vectors; then a latent's tokens move as one. */
    for (int i = 0; i < D * STEPS; ++i) {
        int32_t *const token = by_latent + i * L;
#define LAYER(l) token[l] = levels[l][i];
        EACH_LAYER(LAYER)
#undef LAYER
    }
    for (int s = 0; s < STEPS; ++s)
        for (int d = 0; d < D; ++d)
            memcpy(tokens + (s * D + d) * L, by_latent + (d * STEPS + s) * L, L * sizeof *tokens);
}
#endif

/* Whether every action is one that float32 can encode; not a number is neither above nor below anything. */
static int are_legal_actions(size_t count, const float *restrict actions)
{
    int illegal = 0;
    for (size_t i = 0; i < count; ++i)
        illegal |= !(actions[i] <= RFSQ_ACTION_LIMIT) | !(actions[i] >= -RFSQ_ACTION_LIMIT);
    return !illegal;
}

static void encode_block(const float *restrict actions, int32_t *restrict tokens, float *restrict stats)
{
    _Alignas(64) float hidden[STEPS * PADDED(H)], latents[STEPS * PADDED(D)];
#if HAS_OFFSET
    /* Before any sum: near the offset this is exact, and what a sum of large numbers would lose is still there. */
    _Alignas(64) float from_offset[STEPS * A];
    for (int i = 0; i < STEPS * A; ++i)
        from_offset[i] = actions[i] - OFFSETS[i];
#else
    const float *const from_offset = actions;
#endif
    linear(A, A, H, &ENCODER_FIRST_WEIGHT[0][0], ENCODER_FIRST_BIAS, from_offset, hidden);
    mish(STEPS * PADDED(H), hidden);
    linear(H, PADDED(H), D, &ENCODER_SECOND_WEIGHT[0][0], ENCODER_SECOND_BIAS, hidden, latents);
    hyperbolic_tangent(STEPS * PADDED(D), 10, latents);
#if HAS_CONSTANT_BINS
    (void)stats;
    quantise(latents, tokens);
#else
    quantise(latents, tokens, stats);
#endif
}

/* stats: [num_chunks][T][L][2], or NULL. */
static int encode(const float *actions, size_t num_chunks, int32_t *tokens, float *stats)
{
    const size_t steps = num_chunks * T;
    for (size_t step = 0; step < steps; step += STEPS) {
        const size_t left = steps - step;
        if (step % CHECKED_STEPS == 0
            && !are_legal_actions((left < CHECKED_STEPS ? left : CHECKED_STEPS) * A, actions + step * A))
            return RFSQ_ILLEGAL_VALUE;
        float *const block_stats = stats == NULL ? NULL : stats + step * (L * 2);
        if (left >= STEPS) {
            encode_block(actions + step * A, tokens + step * (D * L), block_stats);
        } else {
            /* The last steps, filled up with zeros. */
            float last_actions[STEPS * A] = {0}, last_stats[STEPS * L * 2];
            int32_t last_tokens[STEPS * D * L];
            memcpy(last_actions, actions + step * A, left * A * sizeof *actions);
            encode_block(last_actions, last_tokens, stats == NULL ? NULL : last_stats);
            memcpy(tokens + step * (D * L), last_tokens, left * (D * L) * sizeof *tokens);
            if (stats != NULL)
                memcpy(block_stats, last_stats, left * (L * 2) * sizeof *stats);
        }
    }
    return RFSQ_OK;
}

/* --- decoders ---------------------------------------------------------------------------------------------------- */

/* What differs between the decoders; to_latents: tokens [STEPS][D][layers] (and stats) -> latents [STEPS][PADDED(D)]. */
struct decoder {
    int layers;
    void (*to_latents)(const int32_t *restrict tokens, const float *restrict stats, float *restrict latents);
    const float *hidden_weight, *hidden_bias, *second_weight, *second_bias;
};

/* Negative tokens are the largest as unsigned numbers. */
static int are_legal_tokens(size_t count, const int32_t *restrict tokens)
{
    int illegal = 0;
    for (size_t i = 0; i < count; ++i)
        illegal |= (uint32_t)tokens[i] >= (uint32_t)K;
    return !illegal;
}

/* Whether an encoder can give them, generously: see the runtime's validation. */
static inline int are_legal_stats(size_t count, const float *restrict stats)
{
    int illegal = 0;
    for (size_t i = 0; i < count; ++i)
        illegal |= !(stats[2 * i] >= -STATS_LIMIT) | !(stats[2 * i] <= STATS_LIMIT) | !(stats[2 * i + 1] > 0)
            | !(stats[2 * i + 1] <= STATS_LIMIT);
    return !illegal;
}

/* hidden: [STEPS][WIDE(H)], after Mish. */
static inline void to_actions(const struct decoder decoder, const float *restrict hidden, float *restrict actions)
{
    linear_to_few(H, A, decoder.second_weight, decoder.second_bias, hidden, actions);
#if HAS_OFFSET
    /* Behind all sums: one rounding of a number as large as the action. */
    for (int i = 0; i < STEPS * A; ++i)
        actions[i] += OFFSETS[i];
#endif
}

static inline void decode_block(const struct decoder decoder, const int32_t *restrict tokens,
                                const float *restrict stats, float *restrict actions)
{
    _Alignas(64) float latents[STEPS * PADDED(D)], hidden[STEPS * WIDE(H)];
    decoder.to_latents(tokens, stats, latents);
    linear(D, PADDED(D), WIDE(H), decoder.hidden_weight, decoder.hidden_bias, latents, hidden);
    mish(STEPS * WIDE(H), hidden);
    to_actions(decoder, hidden, actions);
}

/*
 * At most CHECKED_STEPS steps, of which no action is written unless all are legal. Every block is checked right before it
 * is computed with, so that its tokens come from memory once; those of FETCHED_STEPS later are on their way meanwhile.
 * until_end: how many steps the arrays still hold.
 */
static inline int decode_checked(const struct decoder decoder, const int32_t *tokens, const float *stats,
                                 size_t until_end, float *actions)
{
    const size_t steps = until_end < CHECKED_STEPS ? until_end : CHECKED_STEPS, layers = (size_t)decoder.layers;
    _Alignas(64) float decoded[CHECKED_STEPS * A];
    for (size_t step = 0; step < steps; step += STEPS) {
        const size_t left = steps - step, count = left < STEPS ? left : STEPS;
        const int32_t *block_tokens = tokens + step * D * layers;
        const float *block_stats = stats == NULL ? NULL : stats + step * layers * 2;
        int32_t last_tokens[STEPS * D * L];
        float last_stats[STEPS * L * 2];
        if (!are_legal_tokens(count * D * layers, block_tokens)
            || (stats != NULL && !are_legal_stats(count * layers, block_stats)))
            return RFSQ_ILLEGAL_VALUE;
        if (until_end - step >= FETCHED_STEPS + STEPS)
            for (size_t i = 0; i < STEPS * D * layers; i += CACHE_LINE / sizeof *tokens)
                FETCH(block_tokens + FETCHED_STEPS * D * layers + i);
        if (left < STEPS) {
            /* Filled up with legal values. */
            memset(last_tokens, 0, sizeof last_tokens);
            memcpy(last_tokens, block_tokens, left * D * layers * sizeof *tokens);
            block_tokens = last_tokens;
            if (stats != NULL) {
                for (int i = 0; i < STEPS * L * 2; ++i)
                    last_stats[i] = 1;
                memcpy(last_stats, block_stats, left * layers * 2 * sizeof *stats);
                block_stats = last_stats;
            }
        }
        decode_block(decoder, block_tokens, block_stats, decoded + step * A);
    }
    memcpy(actions, decoded, steps * A * sizeof *actions);
    return RFSQ_OK;
}

/* `decode_checked` of one decoder. */
typedef int decode_some(const int32_t *tokens, const float *stats, size_t until_end, float *actions);

/* stats: [num_chunks][T][layers][2], or NULL. */
static inline int decode(decode_some *some, size_t layers, const int32_t *tokens, const float *stats, size_t num_chunks,
                         float *actions)
{
    const size_t steps = num_chunks * T;
    int status = RFSQ_OK;
    for (size_t step = 0; step < steps && status == RFSQ_OK; step += CHECKED_STEPS)
        status = some(tokens + step * D * layers, stats == NULL ? NULL : stats + step * layers * 2, steps - step,
                      actions + step * A);
    return status;
}

/* @BELIEFS@ */

/* --- what the header declares ------------------------------------------------------------------------------------ */

/* @FUNCTIONS@ */
