/* --- beliefs ----------------------------------------------------------------------------------------------------- */

/* @EXPONENTS@ */

/* So many tokens are computed with at once. */
enum { GROUP = 64 };

/*
 * What a call asks for. scale and is_fine, of the tokens from any layer on: sharpness / ln 2, and 1 where it is none of
 * the mode, else 0.
 */
struct belief {
    int is_logits, keeps_mode;
    float scale[2 * L + GROUP], is_fine[2 * L + GROUP];
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

/* @LANES@ */

/* In pairs, of which none waits for all before it. */
static inline lanes largest_of(const lanes *levels)
{
    lanes largest = levels[K - 1];
    for (int k = 0; k + 1 < K; k += 2)
        largest = LARGER(largest, LARGER(levels[k], levels[k + 1]));
    return largest;
}

static inline lanes smallest_of(const lanes *levels)
{
    lanes smallest = levels[K - 1];
    for (int k = 0; k + 1 < K; k += 2)
        smallest = SMALLER(smallest, SMALLER(levels[k], levels[k + 1]));
    return smallest;
}

/* The first level that is the largest, as a float. */
static inline lanes likeliest_of(const lanes *levels)
{
    const lanes largest = largest_of(levels);
    lanes level = FILLED(0);
    for (int k = K - 1; k >= 0; --k)
        level = WHERE_AT_MOST(largest, levels[k], FILLED((float)k), level);
    return level;
}

/*
 * Logits [GROUP][K] -> e^(sharpness (logit - largest)) [K][GROUP], and the likeliest levels [GROUP] unless NULL: of the
 * logits, since exponentials of near ones are the same. Of what is illegal, some are not a number.
 */
static inline void exponentials(const float *restrict scale, const float *restrict given,
                                float (*restrict levels)[GROUP], float *restrict likeliest)
{
    for (int i = 0; i < GROUP; i += AT_ONCE) {
        lanes logits[K];
        load_levels(given + i * K, logits);
        const lanes largest = largest_of(logits), sharpness = LOAD(scale + i);
        if (likeliest != NULL)
            STORE(likeliest + i, likeliest_of(logits));
        for (int k = 0; k < K; ++k)
            STORE(levels[k] + i, (logits[k] - largest) * sharpness);
    }
    powers(K * GROUP, levels[0]);
}

/* Tokens of the mode [GROUP] become their likeliest level for certain. */
static inline void keep_mode(const float *restrict is_fine, const float *restrict likeliest, float *restrict means,
                             float *restrict variances)
{
    /* Less itself, what is not a number stays so. */
    for (int i = 0; i < GROUP; ++i)
        means[i] = is_fine[i] > 0 ? means[i] : likeliest[i] + (means[i] - means[i]);
    for (int i = 0; variances != NULL && i < GROUP; ++i)
        variances[i] *= is_fine[i];
}

/* `mean`, or not a number where p are no probabilities. */
static inline lanes of_probabilities(const lanes *p, lanes sum, lanes mean)
{
    const lanes above = sum - (1 - SUM_TOLERANCE), below = 1 + SUM_TOLERANCE - sum;
    return WHERE_AT_MOST(FILLED(0), SMALLER(smallest_of(p), SMALLER(above, below)), mean, FILLED(NAN));
}

/*
 * given [GROUP][K], the first of them of layer `layer` -> means and variances of the tokens, and certainties: how
 * probable the likeliest level is of a token of the mode, else 1; all [GROUP], the last two NULL where they are not
 * wanted. Means of what is illegal are not a number.
 *
 * A token is a sum: 1 for each level that it lies above. So its mean is that of the probabilities to lie above a level,
 * and its variance that of products with those not to: nothing is taken from anything that is near.
 */
static inline void group_moments(const struct belief *belief, int layer, const float *restrict given,
                                 float *restrict means, float *restrict variances, float *restrict certainties)
{
    const float *const is_fine = belief->is_fine + layer;
    const int is_logits = belief->is_logits;
    _Alignas(64) float levels[K][GROUP], likeliest[GROUP];
    if (is_logits)
        exponentials(belief->scale + layer, given, levels, belief->keeps_mode ? likeliest : NULL);
    for (int i = 0; i < GROUP; i += AT_ONCE) {
        lanes p[K], above[K - 1], means_above[K - 1];
        if (is_logits)
            for (int k = 0; k < K; ++k)
                p[k] = LOAD(levels[k] + i);
        else
            load_levels(given + i * K, p);
        above[K - 2] = means_above[K - 2] = p[K - 1];
        for (int k = K - 3; k >= 0; --k) {
            above[k] = above[k + 1] + p[k + 1];
            means_above[k] = means_above[k + 1] + above[k];
        }
        const lanes sum = above[0] + p[0], inverse = 1 / sum, mean = means_above[0] * inverse;
        STORE(means + i, is_logits ? mean : of_probabilities(p, sum, mean));
        if (belief->keeps_mode && !is_logits)
            STORE(likeliest + i, likeliest_of(p));
        if (variances != NULL) {
            lanes below = p[0], variance = FILLED(0);
            for (int k = 0; k < K - 2; ++k) {
                variance += below * (means_above[k] + means_above[k + 1]);
                below += p[k + 1];
            }
            variance += below * means_above[K - 2];
            STORE(variances + i, variance * (inverse * inverse));
        }
        if (certainties != NULL) {
            const lanes largest = is_logits ? FILLED(1) : largest_of(p);
            STORE(certainties + i, LARGER(largest * inverse, LOAD(is_fine + i)));
        }
    }
    if (belief->keeps_mode)
        keep_mode(is_fine, likeliest, means, variances);
}

/* The same of so many tokens, the first of them of layer 0. */
static inline void moments(const struct belief *belief, int layers, int count, const float *restrict given,
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
        group_moments(belief, layer, group, means + first, variances == NULL ? NULL : variances + first,
                      certainties == NULL ? NULL : certainties + first);
    }
}

/* `mish`, and its derivative f + x e (1 + e) (1 - f)^2, with f = n / (n + 2), where slopes are not NULL. */
static inline void mish_with_slopes(int count, float *restrict values, float *restrict slopes)
{
    for (int i = 0; i < count; ++i)
        values[i] = values[i] > -86.0f ? values[i] : -86.0f;
    for (int i = 0; i < count; ++i) {
        const float e = exponential(values[i] < 20.0f ? values[i] : 20.0f);
        const float n = e * (e + 2), f = n / (n + 2), left = 1 - f;
        if (slopes != NULL)
            slopes[i] = f + values[i] * ((1 + e) * left) * (e * left);
        values[i] *= f;
    }
}

/* Standard deviations [STEPS][A] of actions, by the slopes [STEPS][WIDE(H)] of the hidden layer. */
static inline void to_deviations(const struct belief_decoder decoder, const float *restrict slopes,
                                 const float *restrict spread, float *restrict deviations)
{
    static _Alignas(64) const float none[PADDED(D)] = {0};
    /* Whole vectors: so compilers write nothing for what would be left. */
    const int inputs = decoder.inputs / 8 * 8;
    /* Of every eighth input one sum, as in `linear_to_few`. */
    _Alignas(64) float sums[A * STEPS * 8], sums_of_4[A * STEPS * 4], sums_of_2[A * STEPS * 2], variances[A * STEPS];
    for (int a = 0; a < A; ++a) {
        _Alignas(64) float by_unit[STEPS * WIDE(H)], by_latent[STEPS * PADDED(D)], by_token[STEPS * L * PADDED(D)];
        float *slope = by_latent;
        for (int s = 0; s < STEPS; ++s)
            for (int h = 0; h < WIDE(H); ++h)
                by_unit[s * WIDE(H) + h] = decoder.decoder.second_weight[a * WIDE(H) + h] * slopes[s * WIDE(H) + h];
        linear(H, WIDE(H), D, decoder.hidden_by_unit, none, by_unit, by_latent);
        if (decoder.by_token != NULL) {
            /* Of `linear`, GCC would compute one output at a time here. */
            for (int s = 0; s < STEPS; ++s)
                for (int i = 0; i < inputs; ++i) {
                    float sum = 0;
                    for (int d = 0; d < D; ++d)
                        sum += by_latent[s * PADDED(D) + d] * decoder.by_token[d * inputs + i];
                    by_token[s * inputs + i] = sum;
                }
            slope = by_token;
        }
        for (int i = 0; i < STEPS * inputs; ++i)
            slope[i] *= slope[i] * spread[i];
        for (int s = 0; s < STEPS; ++s) {
            float sum[8] = {0};
            for (int first = 0; first < inputs; first += 8)
                for (int lane = 0; lane < 8; ++lane)
                    sum[lane] += slope[s * inputs + first + lane];
            memcpy(sums + (a * STEPS + s) * 8, sum, sizeof sum);
        }
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
    int32_t levels[STEPS * D * L], broken[STEPS], certain = 0;
    float decoded[STEPS * A];
    for (int s = 0; s < steps; ++s) {
        broken[s] = 0;
        for (int i = s * tokens; i < (s + 1) * tokens; ++i)
            broken[s] |= (means[i] + 0x1.8p+23f) - 0x1.8p+23f != means[i];
        certain |= !broken[s];
    }
    if (!certain)
        return;
    for (int s = 0; s < steps; ++s)
        for (int i = s * tokens; i < (s + 1) * tokens; ++i)
            levels[i] = broken[s] ? 0 : (int32_t)means[i];
    decoder.decode_some(levels, NULL, (size_t)steps, decoded);
    for (int s = 0; s < steps; ++s)
        for (int a = 0; a < A; ++a)
            actions[s * A + a] = broken[s] ? actions[s * A + a] : decoded[s * A + a];
}

/*
 * At most STEPS steps of given [steps][D][layers][K]; deviations and certainties may be NULL. certainties: how probable
 * the least certain coarse token of each step is. Whether all are legal.
 */
static inline int believe_block(const struct belief_decoder decoder, const struct belief *belief, int steps,
                                const float *given, float *actions, float *deviations, float *certainties)
{
    /* The tokens that are known are computed with in whole groups, and those of all steps in whole blocks. */
    enum { MOST = STEPS * D * L + GROUP };
    const int tokens = D * decoder.decoder.layers;
    _Alignas(64) float means[MOST], variances[MOST], of_tokens[MOST];
    _Alignas(64) float latents[STEPS * PADDED(D)], hidden[STEPS * WIDE(H)], slopes[STEPS * WIDE(H)];
    int illegal = 0;
    moments(belief, decoder.decoder.layers, steps * tokens, given, means, deviations == NULL ? NULL : variances,
            certainties == NULL ? NULL : of_tokens);
    for (int i = steps * tokens; i < STEPS * tokens; ++i)
        means[i] = variances[i] = 0;
    for (int s = 0; certainties != NULL && s < steps; ++s) {
        /* Of what is not negative, the least is the least of its bits. */
        uint32_t least = bits_of(1);
        for (int i = s * tokens; i < (s + 1) * tokens; ++i)
            least = bits_of(of_tokens[i]) < least ? bits_of(of_tokens[i]) : least;
        certainties[s] = float_of(least);
    }
    decoder.to_latents(means, latents);
    for (int i = 0; i < STEPS * PADDED(D); ++i)
        illegal |= latents[i] != latents[i];
    if (illegal)
        return 0;
    linear(D, PADDED(D), WIDE(H), decoder.decoder.hidden_weight, decoder.decoder.hidden_bias, latents, hidden);
    mish_with_slopes(STEPS * WIDE(H), hidden, deviations == NULL ? NULL : slopes);
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
                           deviations == NULL ? NULL : spread + step * A,
                           certainties == NULL ? NULL : certainties + step))
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
    if (coarse < 0 || coarse > layers || !are_sharpness((size_t)layers, sharpness))
        return RFSQ_ILLEGAL_VALUE;
    for (int layer = 0; layer < layers; ++layer) {
        belief.scale[layer] = scale_of(sharpness[layer]);
        belief.is_fine[layer] = layer >= coarse;
    }
    for (int first = layers; first < layers + GROUP; first += layers) {
        memcpy(belief.scale + first, belief.scale, (size_t)layers * sizeof *belief.scale);
        memcpy(belief.is_fine + first, belief.is_fine, (size_t)layers * sizeof *belief.is_fine);
    }
    for (size_t step = 0; step < steps; step += CHECKED_STEPS) {
        const size_t left = steps - step, count = left < CHECKED_STEPS ? left : CHECKED_STEPS;
        float certainties[CHECKED_STEPS];
        const int status = believe_checked(decoder, &belief, count, given + step * step_values, actions + step * A,
                                           deviations == NULL ? NULL : deviations + step * A,
                                           mode_probability == NULL ? NULL : certainties);
        if (status != RFSQ_OK)
            return status;
        for (size_t s = step; mode_probability != NULL && s < step + count; ++s) {
            float *const least = mode_probability + s / T;
            *least = s % T == 0 || certainties[s - step] < *least ? certainties[s - step] : *least;
        }
    }
    return RFSQ_OK;
}
