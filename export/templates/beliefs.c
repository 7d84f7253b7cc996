/* --- beliefs ----------------------------------------------------------------------------------------------------- */

/* So many tokens are computed with at once, one in each lane. */
enum { GROUP = 64 };

/* What a call asks for; sharpness / ln 2, and whether it is coarse (1 or 0), of each token, from any token on. */
struct belief {
    int is_logits, keeps_mode;
    float scale[L + GROUP], is_coarse[L + GROUP];
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
#if defined __AVX__ && defined __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLES 1
#endif
#endif
#ifdef HAS_SHUFFLES
    /* Compilers make single loads and stores of the loop below, which take as long as all that is computed. */
    typedef float four __attribute__((vector_size(16)));
    typedef float eight __attribute__((vector_size(32)));
#define EACH_HALF(x, y, a, b, c, d) __builtin_shufflevector(x, y, a, b, c, d, a + 4, b + 4, c + 4, d + 4)
    for (int k = 0; K >= 4 && k < K; k += 4) {
        /* The last four levels may be some of those before once more. */
        const int first = k + 4 <= K ? k : K - 4;
        for (int i = 0; i < GROUP; i += 8) {
            eight rows[4], columns[4];
            for (int j = 0; j < 4; ++j) {
                four low, high;
                memcpy(&low, given + (i + j) * K + first, sizeof low);
                memcpy(&high, given + (i + j + 4) * K + first, sizeof high);
                rows[j] = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
            }
            const eight low01 = EACH_HALF(rows[0], rows[1], 0, 8, 1, 9), low23 = EACH_HALF(rows[2], rows[3], 0, 8, 1, 9);
            const eight high01 = EACH_HALF(rows[0], rows[1], 2, 10, 3, 11);
            const eight high23 = EACH_HALF(rows[2], rows[3], 2, 10, 3, 11);
            columns[0] = EACH_HALF(low01, low23, 0, 1, 8, 9);
            columns[1] = EACH_HALF(low01, low23, 2, 3, 10, 11);
            columns[2] = EACH_HALF(high01, high23, 0, 1, 8, 9);
            columns[3] = EACH_HALF(high01, high23, 2, 3, 10, 11);
            for (int j = 0; j < 4; ++j)
                memcpy(levels[first + j] + i, &columns[j], sizeof columns[j]);
        }
    }
    if (K >= 4)
        return;
#undef EACH_HALF
#endif
    for (int k = 0; k < K; ++k)
        for (int i = 0; i < GROUP; ++i)
            levels[k][i] = given[i * K + k];
}

/* 2^y for -127 <= y <= 0: exact for whole y, and 0 for -127. */
static inline float power_of(float y)
{
    const float shifted = y + 0x1.8p+23f, f = y - (shifted - 0x1.8p+23f), square = f * f;
    /* Fitted to 2^f with a relative error of at most 1e-7; in pairs, as in `exponential`. */
    const float low = 0x1p+0f + 0x1.62e42ap-1f * f, high = 0x1.ebf9c2p-3f + 0x1.c6b6dap-5f * f;
    const float p = low + square * (high + square * (0x1.3ce8b2p-7f + 0x1.5bd97cp-10f * f));
    return float_of(bits_of(p) + (bits_of(shifted) << 23));
}

/*
 * Logits [K][GROUP] -> e^(sharpness (logit - largest)) in their place. Whether all are legal: not a number, an infinity
 * above all, or no level that is possible, leave a sum that is not a number.
 */
static inline int exponentials(const float *restrict scale, const float *restrict largest, float (*restrict levels)[GROUP])
{
    int illegal = 0;
    _Alignas(64) float sums[GROUP] = {0};
    for (int k = 0; k < K; ++k)
        for (int i = 0; i < GROUP; ++i) {
            const float y = (levels[k][i] - largest[i]) * scale[i], limited = -127.0f > y ? -127.0f : y;
            sums[i] += limited;
            levels[k][i] = power_of(limited);
        }
    for (int i = 0; i < GROUP; ++i)
        illegal |= !(sums[i] <= 0);
    return !illegal;
}

/* Whether probabilities [K][GROUP] are legal; totals: their sums. */
static inline int are_probabilities(const float *restrict totals, float (*restrict levels)[GROUP])
{
    int illegal = 0;
    _Alignas(64) float least[GROUP];
    memcpy(least, levels[0], sizeof least);
    for (int k = 1; k < K; ++k)
        for (int i = 0; i < GROUP; ++i)
            least[i] = levels[k][i] < least[i] ? levels[k][i] : least[i];
    /* What is not a number is not among the least, but in the sum. */
    for (int i = 0; i < GROUP; ++i)
        illegal |= !(least[i] >= 0) | !(fabsf(totals[i] - 1) <= SUM_TOLERANCE);
    return !illegal;
}

/*
 * given [GROUP][K], the first of them of layer `layer` -> means and variances of the tokens, and certainties: how
 * probable the likeliest level is of a coarse token, else 1; all [GROUP]. Whether all are legal.
 */
static inline int group_moments(const struct belief *belief, int layer, const float *restrict given,
                                float *restrict means, float *restrict variances, float *restrict certainties)
{
    const float *const is_coarse = belief->is_coarse + layer;
    _Alignas(64) float levels[K][GROUP], largest[GROUP], likeliest[GROUP] = {0}, totals[GROUP] = {0}, sums[GROUP] = {0};
    transpose(given, levels);
    memcpy(largest, levels[0], sizeof largest);
    for (int k = 1; k < K; ++k)
        for (int i = 0; i < GROUP; ++i)
            largest[i] = levels[k][i] > largest[i] ? levels[k][i] : largest[i];
    if (belief->keeps_mode)
        for (int k = K; k-- > 0;)
            for (int i = 0; i < GROUP; ++i)
                likeliest[i] = levels[k][i] == largest[i] ? (float)k : likeliest[i];
    if (belief->is_logits) {
        if (!exponentials(belief->scale + layer, largest, levels))
            return 0;
        for (int i = 0; i < GROUP; ++i)
            largest[i] = 1;
    }
    for (int k = 0; k < K; ++k)
        for (int i = 0; i < GROUP; ++i) {
            totals[i] += levels[k][i];
            sums[i] += (float)k * levels[k][i];
        }
    if (!belief->is_logits && !are_probabilities(totals, levels))
        return 0;
    for (int i = 0; i < GROUP; ++i) {
        totals[i] = 1 / totals[i];
        means[i] = sums[i] * totals[i];
        sums[i] = 0;
    }
    for (int k = 0; k < K; ++k)
        for (int i = 0; i < GROUP; ++i) {
            const float distance = (float)k - means[i];
            sums[i] += levels[k][i] * distance * distance;
        }
    for (int i = 0; i < GROUP; ++i) {
        variances[i] = sums[i] * totals[i];
        certainties[i] = is_coarse[i] > 0 ? largest[i] * totals[i] : 1;
    }
    if (belief->keeps_mode)
        for (int i = 0; i < GROUP; ++i) {
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

/* Of hidden values x [count] the derivative of Mish: f + 4 x e (1 + e) / (n + 2)^2, with e, n and f = n / (n + 2). */
static inline void mish_slope(int count, const float *restrict values, float *restrict slopes)
{
    _Alignas(64) float limited[STEPS * WIDE(H)];
    for (int i = 0; i < count; ++i)
        limited[i] = clamped(values[i], -86, 20);
    for (int i = 0; i < count; ++i) {
        const float e = exponential(limited[i]), n = e * (e + 2), inverse = 1 / (n + 2);
        slopes[i] = n * inverse + 4 * limited[i] * (e * inverse) * ((1 + e) * inverse);
    }
}

/* Standard deviations [STEPS][A] of actions, by the slopes [STEPS][WIDE(H)] of the hidden layer. */
static inline void to_deviations(const struct belief_decoder decoder, const float *restrict slopes,
                                 const float *restrict spread, float *restrict deviations)
{
    static const _Alignas(64) float none[L * PADDED(D)] = {0};
    const int inputs = decoder.inputs;
    for (int a = 0; a < A; ++a) {
        _Alignas(64) float by_unit[STEPS * WIDE(H)], by_latent[STEPS * PADDED(D)], by_token[STEPS * L * PADDED(D)];
        _Alignas(64) float sums[STEPS * 8] = {0}, sums_of_4[STEPS * 4], sums_of_2[STEPS * 2], variance[STEPS];
        const float *slope = by_latent;
        for (int s = 0; s < STEPS; ++s)
            for (int h = 0; h < WIDE(H); ++h)
                by_unit[s * WIDE(H) + h] = decoder.decoder.second_weight[a * WIDE(H) + h] * slopes[s * WIDE(H) + h];
        linear(H, WIDE(H), D, decoder.hidden_by_unit, none, by_unit, by_latent);
        if (decoder.by_token != NULL) {
            linear(D, PADDED(D), inputs, decoder.by_token, none, by_latent, by_token);
            slope = by_token;
        }
        for (int s = 0; s < STEPS; ++s)
            for (int i = 0; i < inputs; i += 8)
                for (int lane = 0; lane < 8; ++lane) {
                    const float x = slope[s * inputs + i + lane];
                    sums[s * 8 + lane] += x * x * spread[s * inputs + i + lane];
                }
        add_halves(STEPS, 4, sums, sums_of_4);
        add_halves(STEPS, 2, sums_of_4, sums_of_2);
        add_halves(STEPS, 1, sums_of_2, variance);
        for (int s = 0; s < STEPS; ++s)
            deviations[s * A + a] = sqrtf(variance[s]);
    }
}

/* Whether all means are whole numbers: then tokens [count] are these levels. */
static inline int are_levels(int count, const float *restrict means, int32_t *restrict tokens)
{
    int broken = 0;
    for (int i = 0; i < count; ++i)
        broken |= (means[i] + 0x1.8p+23f) - 0x1.8p+23f != means[i];
    if (broken)
        return 0;
    for (int i = 0; i < count; ++i)
        tokens[i] = (int32_t)means[i];
    return 1;
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
    _Alignas(64) float latents[STEPS * PADDED(D)], hidden[STEPS * WIDE(H)];
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
    if (deviations != NULL) {
        _Alignas(64) float slopes[STEPS * WIDE(H)], spread[STEPS * L * PADDED(D)];
        mish_slope(STEPS * WIDE(H), hidden, slopes);
        decoder.to_spread(variances, spread);
        to_deviations(decoder, slopes, spread, deviations);
    }
    /* What is certain decodes to the same bits as its tokens do, whatever compilers make of the sums here. */
    int32_t levels[STEPS * D * L];
    if (are_levels(tokens, means, levels))
        return decoder.decode_some(levels, NULL, (size_t)steps, actions) == RFSQ_OK;
    to_actions(decoder.decoder, hidden, actions);
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
    struct belief belief = {.is_logits = is_logits, .keeps_mode = keeps_mode && coarse > 0};
    if (coarse < 0 || coarse > layers)
        return RFSQ_ILLEGAL_VALUE;
    for (int i = 0, layer = 0; i < layers + GROUP; ++i, layer = layer + 1 < layers ? layer + 1 : 0) {
        belief.scale[i] = sharpness[layer] * 0x1.715476p+0f;
        belief.is_coarse[i] = layer < coarse;
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
