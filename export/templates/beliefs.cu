/* --- beliefs: a block for each step ------------------------------------------------------------------------------- */

/*
 * What the blocks of a chunk tell each other: how far its least certain coarse token is from certain, as `doubt` counts
 * it, and how many steps have told. Both are 0 before a launch and after it.
 */
struct Gathered {
    unsigned doubt, steps;
};

constexpr float LARGEST_FLOAT = 0x1.fffffep+127f;
__device__ __forceinline__ float infinity() { return __int_as_float(0x7F800000); }

/* In the order of falling probability, as a whole number; of what is illegal, the largest. */
constexpr unsigned ILLEGAL_DOUBT = EVERY_BIT;
__device__ __forceinline__ unsigned doubt_of(float probability)
{
    return __float_as_uint(1.0f) - __float_as_uint(fminf(probability, 1.0f));
}
__device__ __forceinline__ float probability_of(unsigned doubt)
{
    return doubt == ILLEGAL_DOUBT ? not_a_number() : __int_as_float(__float_as_uint(1.0f) - doubt);
}

/* So many lanes share a token, with so many levels each; of more than HELD, each is loaded whenever it is needed. */
__device__ constexpr int lanes_of_token(int lanes = 1) { return lanes < WARP && lanes * 8 < K ? lanes_of_token(2 * lanes) : lanes; }
constexpr int LANES = lanes_of_token(), LEVELS_EACH = (K + LANES - 1) / LANES, HELD = 8;

struct Moments {
    float mean, variance, certainty;
    int likeliest;
    bool is_illegal;
};

__device__ __forceinline__ float sum_of_token(float x)
{
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

/* What LANES neighbouring threads find of a token's levels [K]; scale: what differences of logits are multiplied by. */
__device__ __forceinline__ Moments moments_of(const float *given, bool is_logits, float scale)
{
    const int lane = threadIdx.x % LANES;
    float held[LEVELS_EACH <= HELD ? LEVELS_EACH : 1] = {};
    auto level = [&](int i) { return i * LANES + lane; };
    auto load = [&](int i) { return level(i) < K ? given[level(i)] : -infinity(); };
    auto at = [&](int i) { return LEVELS_EACH <= HELD ? held[LEVELS_EACH <= HELD ? i : 0] : load(i); };
    if constexpr (LEVELS_EACH <= HELD)
#pragma unroll
        for (int i = 0; i < LEVELS_EACH; ++i)
            held[i] = load(i);
    Moments found;
    float largest = -infinity();
    found.is_illegal = false, found.likeliest = K;
#pragma unroll (LEVELS_EACH <= HELD ? HELD : 1)
    for (int i = 0; i < LEVELS_EACH; ++i) {
        const float x = at(i);
        found.is_illegal |= is_logits ? !(x < infinity()) : level(i) < K && !(x >= 0);
        if (x > largest || found.likeliest == K)
            largest = x, found.likeliest = level(i);
    }
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, largest, distance);
        const int place = __shfl_xor_sync(ALL_LANES, found.likeliest, distance);
        found.is_illegal |= __shfl_xor_sync(ALL_LANES, (int)found.is_illegal, distance);
        if (other > largest || (other == largest && place < found.likeliest))
            largest = other, found.likeliest = place;
    }
    auto power = [&](int i) { return is_logits ? power_of_two((at(i) - largest) * scale) : fmaxf(at(i), 0.0f); };
    float sum = 0, first = 0, second = 0;
#pragma unroll (LEVELS_EACH <= HELD ? HELD : 1)
    for (int i = 0; i < LEVELS_EACH; ++i) {
        const float p = power(i);
        if constexpr (LEVELS_EACH <= HELD)
            held[i] = p;
        sum += p, first = fmaf((float)level(i), p, first);
    }
    sum = sum_of_token(sum), first = sum_of_token(first);
    const float inverse = 1 / sum;
    found.mean = first * inverse;
#pragma unroll (LEVELS_EACH <= HELD ? HELD : 1)
    for (int i = 0; i < LEVELS_EACH; ++i) {
        const float p = LEVELS_EACH <= HELD ? at(i) : power(i), from_mean = (float)level(i) - found.mean;
        second = fmaf(p, from_mean * from_mean, second);
    }
    found.variance = sum_of_token(second) * inverse;
    found.certainty = is_logits ? inverse : largest * inverse;
    found.is_illegal |= is_logits ? largest == -infinity() : !(fabsf(sum - 1) <= SUM_TOLERANCE);
    return found;
}

/* The derivative of x tanh(log(1 + exp(x))): f + 4 x e (1 + e) / (n + 2)^2, with e, n and f as in `mish`. */
template <Scale SCALE> __device__ __forceinline__ float mish_slope(float x)
{
    static_assert(SCALE != PLAIN, "decoders are scaled");
    const float limited = fminf(x, 29.0f), e = power_of_two(limited), n = e * (e + 2), inverse = reciprocal(n + 2);
    return fmaf(4 / LOG2_E * limited, (e * inverse) * ((1 + e) * inverse), n * inverse);
}

/* Whether the weights of both layers, and those behind as Mish bends them, have room beside `others` numbers. */
__device__ constexpr bool have_room_for_slopes(int others)
{
    return (int)sizeof(float) * ((2 * A + D) * (PADDED_H + 4) + 2 * PADDED_H + others) <= SHARED_BYTES;
}

/*
 * Means and variances of the tokens of a step, to shared memory; the likeliest coarse ones to `mode`, if it is wanted.
 * Returns how much this thread doubts of the coarse tokens it has seen, or of any that are illegal.
 */
template <int LAYERS>
__device__ __forceinline__ unsigned believe_tokens(const float *given, const float *sharpness, int terms, int coarse,
                                                   int *mode, float *means, float *variances)
{
    constexpr int TOKENS = D * LAYERS, TURN = BELIEF_THREADS / LANES;
    unsigned doubt = 0;
    for (int turn = 0; turn < TOKENS; turn += TURN) {
        const int wanted = turn + threadIdx.x / LANES, i = wanted < TOKENS ? wanted : TOKENS - 1, layer = i % LAYERS;
        const float exponents = sharpness == nullptr ? LOG2_E : fminf(sharpness[layer] * LOG2_E, LARGEST_FLOAT);
        const Moments found = moments_of(given + (Steps)i * K, terms & IS_LOGITS, exponents);
        const bool is_coarse = layer < coarse, is_mode = is_coarse && terms & KEEPS_MODE;
        const unsigned own = found.is_illegal ? ILLEGAL_DOUBT : is_coarse ? doubt_of(found.certainty) : 0;
        doubt = own > doubt ? own : doubt;
        if (wanted < TOKENS && threadIdx.x % LANES == 0) {
            means[i] = is_mode ? (float)found.likeliest : found.mean;
            variances[i] = is_mode ? 0 : found.variance;
            if (is_coarse && mode != nullptr)
                mode[i / LAYERS * coarse + layer] = found.likeliest;
        }
    }
    return doubt;
}

/* Latent d and, where it has its own tokens, its variance. Tokens that are known give the bits that `decode` gives. */
template <class Decoder>
__device__ __forceinline__ void believe_latent(int d, const float *means, const float *variances, float *latents,
                                               float *spread)
{
    constexpr int LAYERS = Decoder::LAYERS;
    if constexpr (Decoder::LATENTS == ALL_TOKENS) {
        latents[d] = latent_from_all<Decoder>(d, means);
    } else {
        int tokens[LAYERS];
        bool are_known = true;
        float sum = 0, variance = 0;
#pragma unroll
        for (int l = LAYERS - 1; l >= 0; --l) {
            const float mean = means[d * LAYERS + l], weight = Decoder::mean_weight(d, l);
            tokens[l] = (int)mean;
            are_known &= (float)tokens[l] == mean;
            sum = fmaf(weight, mean - (K - 1) * 0.5f, sum);
            variance = fmaf(weight * weight, variances[d * LAYERS + l], variance);
        }
        latents[d] = are_known ? latent_from_own<Decoder>(d, tokens) : sum + Decoder::middle(d);
        spread[d] = variance;
    }
}

/* Slope of action a by latent d. bent: weights behind the hidden layer times its slopes; first: those before it. */
template <bool HAVE_ROOM>
__device__ __forceinline__ float slope_by_latent(const float *rows, int a, int d, const float *slopes,
                                                 const float (*bent)[PADDED_H + 4], const float (*first)[PADDED_H + 4])
{
    if constexpr (HAVE_ROOM) {
        float4 sum = {};
#pragma unroll 16
        for (int i = 0; i < QUARTER; ++i) {
            const float4 out = reinterpret_cast<const float4 *>(bent[a])[i];
            const float4 in = reinterpret_cast<const float4 *>(first[d])[i];
            sum.x = fmaf(out.x, in.x, sum.x), sum.y = fmaf(out.y, in.y, sum.y);
            sum.z = fmaf(out.z, in.z, sum.z), sum.w = fmaf(out.w, in.w, sum.w);
        }
        return (sum.x + sum.y) + (sum.z + sum.w);
    }
    float sum = 0;
    for (int h = 0; h < PADDED_H; ++h)
        sum = fmaf(rows[h * ROW + D + 1 + a] * slopes[beside(h)], rows[h * ROW + d], sum);
    return sum;
}

/* Deviations [A] of a step's actions; slopes: [A][D], by latent, or of own tokens their squares times variances. */
template <class Decoder>
__device__ __forceinline__ void to_deviations(const float *slopes, const float *variances, float *deviations)
{
    constexpr int TOKENS = D * Decoder::LAYERS, WARPS_HERE = BELIEF_THREADS / WARP;
    if constexpr (Decoder::LATENTS == ALL_TOKENS) {
        __shared__ float of_warps[A][WARPS_HERE];
#pragma unroll 8
        for (int a = 0; a < A; ++a) {
            float sum = 0;
            for (int i = threadIdx.x; i < TOKENS; i += BELIEF_THREADS) {
                float slope = 0;
#pragma unroll 16
                for (int d = 0; d < D; ++d)
                    slope = fmaf(Decoder::token_weight(i, d), slopes[a * D + d], slope);
                sum = fmaf(slope * slope, variances[i], sum);
            }
#pragma unroll
            for (int distance = WARP / 2; distance > 0; distance /= 2)
                sum += __shfl_xor_sync(ALL_LANES, sum, distance);
            if (threadIdx.x % WARP == 0)
                of_warps[a][threadIdx.x / WARP] = sum;
        }
        __syncthreads();
        for (int a = threadIdx.x; a < A; a += BELIEF_THREADS) {
            float sum = 0;
            for (int warp = 0; warp < WARPS_HERE; ++warp)
                sum += of_warps[a][warp];
            deviations[a] = sqrtf(sum);
        }
    } else {
        for (int a = threadIdx.x; a < A; a += BELIEF_THREADS) {
            float sum = 0;
#pragma unroll 16
            for (int d = 0; d < D; ++d)
                sum += slopes[a * D + d];
            deviations[a] = sqrtf(sum);
        }
    }
}

/* What is written of chunks; all but the actions may be null. */
struct Answer {
    float *actions, *deviations, *mode_probability;
    int *mode;
};

/* Tells the chunk that this step is through, by one thread when all of the block have written. The last step writes
 * what is known of all of them, and marks the chunk where one was illegal. */
template <int LAYERS>
__device__ __forceinline__ void tell(Answer answer, Steps chunk, unsigned doubt, int coarse, Gathered *gathered)
{
    Gathered *const own = gathered + chunk;
    atomicMax(&own->doubt, doubt);
    __threadfence();
    if (atomicInc(&own->steps, T - 1) != T - 1)
        return;
    doubt = atomicExch(&own->doubt, 0u);
    if (answer.mode_probability != nullptr)
        answer.mode_probability[chunk] = probability_of(doubt);
    if (doubt != ILLEGAL_DOUBT)
        return;
    for (int i = 0; i < T * A; ++i) {
        answer.actions[chunk * (T * A) + i] = not_a_number();
        if (answer.deviations != nullptr)
            answer.deviations[chunk * (T * A) + i] = not_a_number();
    }
    for (int i = 0; answer.mode != nullptr && i < T * D * coarse; ++i)
        answer.mode[chunk * (T * D * coarse) + i] = ILLEGAL_TOKEN;
}

template <class Decoder>
__device__ __forceinline__ void believe(const float *given, Answer answer, const float *sharpness, int terms, int coarse,
                                        Gathered *gathered)
{
    constexpr int LAYERS = Decoder::LAYERS, TOKENS = D * LAYERS, WARPS_HERE = BELIEF_THREADS / WARP;
    constexpr int OTHERS = 2 * TOKENS + 2 * D + A * D + BELIEF_THREADS + A * WARPS_HERE + 16;
    constexpr bool HAVE_ROOM = have_room_for_slopes(OTHERS);
    alignas(16) __shared__ float latents[D], spread[D], hidden[PADDED_H], slopes[PADDED_H], by_latent[A * D];
    alignas(16) __shared__ float means[TOKENS], variances[TOKENS];
    alignas(16) __shared__ float second[HAVE_ROOM ? A : 1][PADDED_H + 4], bent[HAVE_ROOM ? A : 1][PADDED_H + 4];
    alignas(16) __shared__ float first[HAVE_ROOM ? D : 1][PADDED_H + 4];
    __shared__ unsigned doubts[BELIEF_THREADS];
    const Steps step = blockIdx.x;
    alignas(16) float row[ROW];
    if (threadIdx.x < PADDED_H)
        load_row(Decoder::rows() + threadIdx.x * ROW, row);
    int *const mode = answer.mode == nullptr ? nullptr : answer.mode + step * (D * coarse);
    doubts[threadIdx.x] = believe_tokens<LAYERS>(given + step * (TOKENS * K), sharpness, terms, coarse, mode, means, variances);
    __syncthreads();
    unsigned doubt = 0;
    if (threadIdx.x / WARP == WARPS_HERE - 1) {
        for (int i = threadIdx.x % WARP; i < BELIEF_THREADS; i += WARP)
            doubt = doubts[i] > doubt ? doubts[i] : doubt;
#pragma unroll
        for (int distance = WARP / 2; distance > 0; distance /= 2) {
            const unsigned other = __shfl_xor_sync(ALL_LANES, doubt, distance);
            doubt = other > doubt ? other : doubt;
        }
    }
    for (int d = threadIdx.x; d < D; d += BELIEF_THREADS)
        believe_latent<Decoder>(d, means, variances, latents, spread);
    __syncthreads();
    for (int h = threadIdx.x; h < PADDED_H; h += BELIEF_THREADS) {
        if (h != threadIdx.x)
            load_row(Decoder::rows() + h * ROW, row);
        const float sum = hidden_sum<D>(row, latents), slope = mish_slope<Decoder::SCALE>(sum);
        hidden[beside(h)] = mish<Decoder::SCALE>(sum);
        slopes[beside(h)] = slope;
        if constexpr (HAVE_ROOM) {
#pragma unroll
            for (int a = 0; a < A; ++a)
                second[a][beside(h)] = row[D + 1 + a], bent[a][beside(h)] = row[D + 1 + a] * slope;
#pragma unroll
            for (int d = 0; d < D; ++d)
                first[d][beside(h)] = row[d];
        }
    }
    __syncthreads();
    for (int turn = 0; turn < A; turn += BELIEF_THREADS / 4) {
        const int wanted = turn + threadIdx.x / 4, a = wanted < A ? wanted : A - 1;
        const float sum = weighted_sum<D, HAVE_ROOM>(Decoder::rows(), second, a, hidden, Decoder::bias(a));
        if (wanted < A && threadIdx.x % 4 == 0)
            answer.actions[step * A + a] = to_action(sum, a);
    }
    if (answer.deviations != nullptr) {
        for (int i = threadIdx.x; i < A * D; i += BELIEF_THREADS) {
            const float slope = slope_by_latent<HAVE_ROOM>(Decoder::rows(), i / D, i % D, slopes, bent, first);
            by_latent[i] = Decoder::LATENTS == ALL_TOKENS ? slope : slope * slope * spread[i % D];
        }
        __syncthreads();
        to_deviations<Decoder>(by_latent, variances, answer.deviations + step * A);
    }
    __syncthreads();
    if (threadIdx.x == BELIEF_THREADS - WARP)
        tell<LAYERS>(answer, step / T, doubt, coarse, gathered);
}
