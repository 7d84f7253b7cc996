/* --- beliefs ----------------------------------------------------------------------------------------------------- */

#ifdef __AVX__
#include <immintrin.h>
#endif

/* @EXPONENTS@ */

/* So many tokens are computed with at once, one in each lane. */
enum { GROUP = 64 };

/* What a call asks for; sharpness / ln 2, and whether it is coarse (1 or 0), of each token, from any token on. */
struct belief {
    int is_logits, keeps_mode;
    float scale[2 * L + GROUP], is_coarse[2 * L + GROUP];
};

/*
 * What differs between the decoders. to_latents: means of tokens [STEPS][D][layers] -> latents [STEPS][PADDED(D)].
 * to_spread: variances of tokens -> those of `inputs`, [STEPS][inputs], which latents are sums of: what each latent's
 * own tokens add up to, or else every token. by_token: the latents' weights of every token, [PADDED(D)][inputs]; NULL
 * where the inputs are the latents.
 */
struct belief_decoder {
    struct decoder decoder;
    decode_some *decode_some;
    int inputs;
    void (*to_latents)(const float *restrict means, float *restrict latents);
    void (*to_spread)(const float *restrict variances, float *restrict spread);
    const float *hidden_by_unit, *by_token;
};

/* given [GROUP][K] -> [K][GROUP]. */
static inline void transpose(const float *restrict given, float (*restrict levels)[GROUP])
{
#ifdef __AVX__
    /* Of the loop below, compilers make loads and stores of single floats, which take longer than all that follows. */
    for (int k = 0; K >= 4 && k < K; k += 4) {
        /* The last four levels may be some of those before once more. */
        const int first = k + 4 <= K ? k : K - 4;
        for (int i = 0; i < GROUP; i += 8) {
            const float *const from = given + i * K + first;
#define ROW(j)                                                                                                         \
    _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + (j)*K)), _mm_loadu_ps(from + ((j) + 4) * K), 1)
            const __m256 low01 = _mm256_unpacklo_ps(ROW(0), ROW(1)), high01 = _mm256_unpackhi_ps(ROW(0), ROW(1));
            const __m256 low23 = _mm256_unpacklo_ps(ROW(2), ROW(3)), high23 = _mm256_unpackhi_ps(ROW(2), ROW(3));
#undef ROW
            _mm256_store_ps(levels[first] + i, _mm256_shuffle_ps(low01, low23, 0x44));
            _mm256_store_ps(levels[first + 1] + i, _mm256_shuffle_ps(low01, low23, 0xee));
            _mm256_store_ps(levels[first + 2] + i, _mm256_shuffle_ps(high01, high23, 0x44));
            _mm256_store_ps(levels[first + 3] + i, _mm256_shuffle_ps(high01, high23, 0xee));
        }
    }
    if (K >= 4)
        return;
#endif
    for (int k = 0; k < K; ++k)
        for (int i = 0; i < GROUP; ++i)
            levels[k][i] = given[i * K + k];
}

/* The largest of all levels of token i. */
static inline float largest_of(float (*restrict levels)[GROUP], int i)
{
    float largest = levels[0][i];
#define LEVEL(k) largest = levels[k][i] > largest ? levels[k][i] : largest;
    EACH_LEVEL(LEVEL)
#undef LEVEL
    return largest;
}

/* Logits [K][GROUP] -> e^(sharpness (logit - largest)) in their place. Whether all are legal. */
static inline int exponentials(const float *restrict scale, float (*restrict levels)[GROUP])
{
    int illegal = 0;
    for (int i = 0; i < GROUP; ++i) {
        const float largest = largest_of(levels, i);
#define LEVEL(k)                                                                                                       \
    const float y##k = (levels[k][i] - largest) * scale[i];                                                            \
    levels[k][i] = power_of(y##k);
        EACH_LEVEL(LEVEL)
#undef LEVEL
        /* Not a number, an infinity above all, or no level that is possible: then a difference is not a number. */
#define EXPONENT(k) y##k
        illegal |= !(SUM_OF_LEVELS(EXPONENT) <= 0);
#undef EXPONENT
    }
    return !illegal;
}

/* Whether probabilities [K][GROUP] are legal. */
static inline int are_probabilities(float (*restrict levels)[GROUP])
{
    int illegal = 0;
    for (int i = 0; i < GROUP; ++i) {
        uint32_t signs = 0;
        /* -0 + 0 is 0, and what is not a number has a sum that is none. */
#define LEVEL(k) signs |= bits_of(levels[k][i] + 0.0f);
        EACH_LEVEL(LEVEL)
#undef LEVEL
#define PROBABILITY(k) levels[k][i]
        illegal |= (int)(signs >> 31) | !(fabsf(SUM_OF_LEVELS(PROBABILITY) - 1) <= SUM_TOLERANCE);
#undef PROBABILITY
    }
    return !illegal;
}

/*
 * given [GROUP][K], the first of them of layer `layer` -> means and variances of the tokens, and certainties: how
 * probable the likeliest level is of a coarse token, else 1; all [GROUP]. Whether all are legal. Written out level by
 * level, so that what is known of a token stays in registers.
 */
static inline int group_moments(const struct belief *belief, int layer, const float *restrict given,
                                float *restrict means, float *restrict variances, float *restrict certainties)
{
    const float *const is_coarse = belief->is_coarse + layer;
    _Alignas(64) float levels[K][GROUP], likeliest[GROUP];
    transpose(given, levels);
    for (int i = 0; belief->keeps_mode && i < GROUP; ++i) {
        float largest = levels[0][i], level = 0;
#define LEVEL(k)                                                                                                       \
    level = levels[k][i] > largest ? k : level;                                                                        \
    largest = levels[k][i] > largest ? levels[k][i] : largest;
        EACH_LEVEL(LEVEL)
#undef LEVEL
        likeliest[i] = level;
    }
    if (!(belief->is_logits ? exponentials(belief->scale + layer, levels) : are_probabilities(levels)))
        return 0;
    for (int i = 0; i < GROUP; ++i) {
#define LEVEL(k) const float p##k = levels[k][i];
        EACH_LEVEL(LEVEL)
#undef LEVEL
#define PROBABILITY(k) p##k
#define FIRST_MOMENT(k) k * p##k
#define SECOND_MOMENT(k) p##k * ((k - mean) * (k - mean))
        const float inverse = 1 / SUM_OF_LEVELS(PROBABILITY), mean = SUM_OF_LEVELS(FIRST_MOMENT) * inverse;
        means[i] = mean;
        variances[i] = SUM_OF_LEVELS(SECOND_MOMENT) * inverse;
#undef PROBABILITY
#undef FIRST_MOMENT
#undef SECOND_MOMENT
        certainties[i] = is_coarse[i] > 0 ? largest_of(levels, i) * inverse : 1;
    }
    for (int i = 0; belief->keeps_mode && i < GROUP; ++i) {
        means[i] = is_coarse[i] > 0 ? likeliest[i] : means[i];
        variances[i] = is_coarse[i] > 0 ? 0 : variances[i];
    }
    return 1;
}

/* The same of so many tokens, the first of them of layer 0. */
static inline int moments(const struct belief *belief, int layers, int count, const float *restrict given,
                          float *restrict means, float *restrict variances, float *restrict certainties)
{
    for (int first = 0; first < count; first += GROUP) {
        const int left = count - first, layer = first % layers;
        const float *group = given + first * K;
        float last[GROUP * K];
        if (left < GROUP) {
            /* Filled up with what is legal as logits and as probabilities. */
            for (int i = 0; i < GROUP * K; ++i)
                last[i] = i % K == 0;
            memcpy(last, group, (size_t)(left * K) * sizeof *given);
            group = last;
        }
        if (!group_moments(belief, layer, group, means + first, variances + first, certainties + first))
            return 0;
    }
    return 1;
}

/* `mish`, and its derivative f + 4 x e (1 + e) / (n + 2)^2, with f = n / (n + 2). */
static inline void mish_with_slopes(int count, float *restrict values, float *restrict slopes)
{
    _Alignas(64) float limited[STEPS * WIDE(H)];
    for (int i = 0; i < count; ++i)
        values[i] = values[i] > -86.0f ? values[i] : -86.0f;
    for (int i = 0; i < count; ++i)
        limited[i] = values[i] < 20.0f ? values[i] : 20.0f;
    for (int i = 0; i < count; ++i) {
        const float e = exponential(limited[i]), n = e * (e + 2), inverse = 1 / (n + 2), f = n * inverse;
        slopes[i] = f + 4 * limited[i] * (e * inverse) * ((1 + e) * inverse);
        values[i] *= f;
    }
}

/* Standard deviations [STEPS][A] of actions, by the slopes [STEPS][WIDE(H)] of the hidden layer. */
static inline void to_deviations(const struct belief_decoder decoder, const float *restrict slopes,
                                 const float *restrict spread, float *restrict deviations)
{
    static _Alignas(64) const float none[L * PADDED(D)] = {0};
    const int inputs = decoder.inputs;
    /* Of every eighth input one sum, as in `linear_to_few`. */
    _Alignas(64) float sums[A * STEPS * 8], sums_of_4[A * STEPS * 4], sums_of_2[A * STEPS * 2], variances[A * STEPS];
    for (int i = 0; i < A * STEPS * 8; ++i)
        sums[i] = 0;
    for (int a = 0; a < A; ++a) {
        _Alignas(64) float by_unit[STEPS * WIDE(H)], by_latent[STEPS * PADDED(D)], by_token[STEPS * L * PADDED(D)];
        float *slope = by_latent;
        for (int s = 0; s < STEPS; ++s)
            for (int h = 0; h < WIDE(H); ++h)
                by_unit[s * WIDE(H) + h] = decoder.decoder.second_weight[a * WIDE(H) + h] * slopes[s * WIDE(H) + h];
        linear(H, WIDE(H), D, decoder.hidden_by_unit, none, by_unit, by_latent);
        if (decoder.by_token != NULL) {
            linear(D, PADDED(D), inputs, decoder.by_token, none, by_latent, by_token);
            slope = by_token;
        }
        for (int i = 0; i < STEPS * inputs; ++i)
            slope[i] *= slope[i] * spread[i];
        for (int first = 0; first < inputs; first += 8)
            for (int s = 0; s < STEPS; ++s)
                for (int lane = 0; lane < 8; ++lane)
                    sums[(a * STEPS + s) * 8 + lane] += slope[s * inputs + first + lane];
    }
    add_halves(A * STEPS, 4, sums, sums_of_4);
    add_halves(A * STEPS, 2, sums_of_4, sums_of_2);
    add_halves(A * STEPS, 1, sums_of_2, variances);
    for (int s = 0; s < STEPS; ++s)
        for (int a = 0; a < A; ++a)
            deviations[s * A + a] = sqrtf(variances[a * STEPS + s]);
}

/*
 * Actions of the steps of which every mean is a whole number, as tokens of these levels have them: to the bit, whatever
 * compilers make of sums of other numbers. A step depends on no other of its block.
 */
static inline void decode_certain(const struct belief_decoder decoder, int steps, const float *restrict means,
                                  float *restrict actions)
{
    const int tokens = D * decoder.decoder.layers;
    int32_t levels[STEPS * D * L], broken[STEPS];
    float decoded[STEPS * A];
    int certain = 0;
    for (int s = 0; s < steps; ++s) {
        broken[s] = 0;
        for (int i = s * tokens; i < (s + 1) * tokens; ++i)
            broken[s] |= (means[i] + 0x1.8p+23f) - 0x1.8p+23f != means[i];
        for (int i = s * tokens; i < (s + 1) * tokens; ++i)
            levels[i] = broken[s] ? 0 : (int32_t)means[i];
        certain |= !broken[s];
    }
    if (!certain || decoder.decode_some(levels, NULL, (size_t)steps, decoded) != RFSQ_OK)
        return;
    for (int s = 0; s < steps; ++s)
        for (int a = 0; a < A; ++a)
            actions[s * A + a] = broken[s] ? actions[s * A + a] : decoded[s * A + a];
}

/*
 * At most STEPS steps of given [steps][D][layers][K]; deviations may be NULL. certainties: how probable the least
 * certain coarse token of each step is. Whether all are legal.
 */
static inline int believe_block(const struct belief_decoder decoder, const struct belief *belief, int steps,
                                const float *given, float *actions, float *deviations, float *certainties)
{
    /* The tokens that are known are computed with in whole groups, and those of all steps in whole blocks. */
    enum { MOST = STEPS * D * L + GROUP };
    const int layers = decoder.decoder.layers, tokens = steps * D * layers;
    _Alignas(64) float means[MOST], variances[MOST], of_tokens[MOST];
    _Alignas(64) float latents[STEPS * PADDED(D)], hidden[STEPS * WIDE(H)], slopes[STEPS * WIDE(H)];
    if (!moments(belief, layers, tokens, given, means, variances, of_tokens))
        return 0;
    for (int i = tokens; i < STEPS * D * layers; ++i)
        means[i] = variances[i] = 0;
    for (int s = 0; s < steps; ++s) {
        /* Of what is not negative, the least is the least of its bits. */
        uint32_t least = bits_of(1);
        for (int i = s * D * layers; i < (s + 1) * D * layers; ++i)
            least = bits_of(of_tokens[i]) < least ? bits_of(of_tokens[i]) : least;
        certainties[s] = float_of(least);
    }
    decoder.to_latents(means, latents);
    linear(D, PADDED(D), WIDE(H), decoder.decoder.hidden_weight, decoder.decoder.hidden_bias, latents, hidden);
    mish_with_slopes(STEPS * WIDE(H), hidden, slopes);
    if (deviations != NULL) {
        _Alignas(64) float spread[STEPS * L * PADDED(D)];
        decoder.to_spread(variances, spread);
        to_deviations(decoder, slopes, spread, deviations);
    }
    to_actions(decoder.decoder, hidden, actions);
    decode_certain(decoder, steps, means, actions);
    return 1;
}

/* At most CHECKED_STEPS steps, of which nothing is written unless all are legal; certainties [steps]. */
static inline int believe_checked(const struct belief_decoder decoder, const struct belief *belief, size_t steps,
                                  const float *given, float *actions, float *deviations, float *certainties)
{
    const size_t step_values = (size_t)(D * K * decoder.decoder.layers);
    _Alignas(64) float decoded[CHECKED_STEPS * A], spread[CHECKED_STEPS * A];
    for (size_t step = 0; step < steps; step += STEPS) {
        const size_t left = steps - step, count = left < STEPS ? left : STEPS;
        if (!believe_block(decoder, belief, (int)count, given + step * step_values, decoded + step * A,
                           deviations == NULL ? NULL : spread + step * A, certainties + step))
            return RFSQ_ILLEGAL_VALUE;
    }
    memcpy(actions, decoded, steps * A * sizeof *actions);
    if (deviations != NULL)
        memcpy(deviations, spread, steps * A * sizeof *deviations);
    return RFSQ_OK;
}

/* given: [num_chunks][T][D][layers][K]; deviations and mode_probability may be NULL. */
static inline int believe(const struct belief_decoder decoder, const float *given, const float *sharpness, int is_logits,
                          int keeps_mode, int coarse, size_t num_chunks, float *actions, float *deviations,
                          float *mode_probability)
{
    const int layers = decoder.decoder.layers;
    const size_t steps = num_chunks * T, step_values = (size_t)(D * K * layers);
    struct belief belief;
    belief.is_logits = is_logits;
    belief.keeps_mode = keeps_mode && coarse > 0;
    if (coarse < 0 || coarse > layers)
        return RFSQ_ILLEGAL_VALUE;
    for (int first = 0; first < layers + GROUP; first += layers)
        for (int layer = 0; layer < layers; ++layer) {
            belief.scale[first + layer] = scale_of(sharpness[layer]);
            belief.is_coarse[first + layer] = layer < coarse;
        }
    for (size_t step = 0; step < steps; step += CHECKED_STEPS) {
        const size_t left = steps - step, count = left < CHECKED_STEPS ? left : CHECKED_STEPS;
        float certainties[CHECKED_STEPS];
        const int status = believe_checked(decoder, &belief, count, given + step * step_values, actions + step * A,
                                           deviations == NULL ? NULL : deviations + step * A, certainties);
        if (status != RFSQ_OK)
            return status;
        for (size_t s = step; mode_probability != NULL && s < step + count; ++s) {
            float *const least = mode_probability + s / T;
            *least = s % T == 0 || certainties[s - step] < *least ? certainties[s - step] : *least;
        }
    }
    return RFSQ_OK;
}
