/*
 * One kernel for each way and kind of token. The `few` kernels are for a control loop: a block for each step, threads
 * side by side, so that a chunk takes hardly longer than launching it. The `many` kernels are for data: every thread
 * has steps of its own, weights pass through shared memory once for all of them, and tokens are moved in whole lines.
 *
 * Both add up in the same order and say where a product and a sum round once (fmaf; compile with --fmad=false): a step
 * has the same bits, whichever kernel it went through.
 */

/* @SIZES@ */

/* Hidden units in four parts that are added up one by one and then together: smaller errors, and four threads. */
constexpr int QUARTER = (H + 3) / 4, PADDED_H = 4 * QUARTER;
/* A hidden unit's weights side by side: [inputs][bias][outputs], filled up to whole vectors. */
constexpr int ROW = (A + 1 + D + 3) / 4 * 4;
constexpr int WARP = 32, WARPS = 4;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu, EVERY_BYTE = 0x01010101u, EVERY_SIGN = 0x80808080u;
/* What a token of a step becomes whose actions are illegal: -1, and 255 among bytes. */
constexpr int ILLEGAL_TOKEN = -1;

typedef unsigned char uint8;
typedef long long Steps;

/* How latents follow from tokens: each from its own, from all of the step, or with the step's statistics. */
enum Latents { OWN_TOKENS, ALL_TOKENS, STATISTICS };

/* @TABLES@ */

/* --- arithmetic -------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7FFFFFFF); }

/* x tanh(log(1 + exp(x))) = x n / (n + 2) with n = e (e + 2), e = exp(x); from x = 20 on the fraction is 1. */
__device__ __forceinline__ float mish(float x)
{
    float e, reciprocal;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(fminf(x, 20.0f) * 0x1.715476p+0f));
    const float n = e * (e + 2), divisor = n + 2;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(divisor));
    return x * (n * reciprocal);
}

/* tanh(x) = m / (m + 2) with m = exp(2 x) - 1 = 2^n exp(r) - 1; from |x| = 10 on it is 1. */
__device__ __forceinline__ float hyperbolic_tangent(float x)
{
    const float twice = 2 * fmaxf(fminf(x, 10.0f), -10.0f);
    /* Adding 1.5 * 2^23 rounds to a whole number. */
    const float n = fmaf(twice, 0x1.715476p+0f, 0x1.8p+23f) - 0x1.8p+23f;
    /* ln 2 in two parts, of which the first has so few digits that n times it is exact. */
    const float r = fmaf(n, -0x1.7f7d1cp-20f, fmaf(n, -0x1.62e4p-1f, twice));
    /* Taylor's series: |r| <= ln 2 / 2, so what is left out is below 2^-27 of exp(r) - 1. */
    float sum = 1.0f / 40320;
    sum = fmaf(sum, r, 1.0f / 5040);
    sum = fmaf(sum, r, 1.0f / 720);
    sum = fmaf(sum, r, 1.0f / 120);
    sum = fmaf(sum, r, 1.0f / 24);
    sum = fmaf(sum, r, 1.0f / 6);
    sum = fmaf(sum, r, 0.5f);
    const float tail = fmaf(sum * r, r, r);
    const float power = __int_as_float(((int)n + 127) << 23);
    const float m = fmaf(power, tail, power - 1);
    return m / (m + 2);
}

__device__ __forceinline__ bool is_legal_action(float action) { return fabsf(action) <= ACTION_LIMIT; }

/* Whether an encoder can give them, generously: see the runtime's validation. */
__device__ __forceinline__ bool are_legal_stats(float mean, float sigma)
{
    return fabsf(mean) <= STATS_LIMIT && sigma > 0 && sigma <= STATS_LIMIT;
}

__device__ __forceinline__ void load_row(const float *source, float (&row)[ROW])
{
#pragma unroll
    for (int i = 0; i < ROW / 4; ++i)
        reinterpret_cast<float4 *>(row)[i] = reinterpret_cast<const float4 *>(source)[i];
}

/* The tokens of one latent. */
template <int LAYERS, class Token>
__device__ __forceinline__ void load_tokens(const Token *source, Token (&tokens)[LAYERS])
{
    constexpr int BYTES = LAYERS * sizeof(Token);
    if constexpr (BYTES % 16 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 16; ++i)
            reinterpret_cast<uint4 *>(tokens)[i] = reinterpret_cast<const uint4 *>(source)[i];
    } else if constexpr (BYTES % 8 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 8; ++i)
            reinterpret_cast<uint2 *>(tokens)[i] = reinterpret_cast<const uint2 *>(source)[i];
    } else {
#pragma unroll
        for (int l = 0; l < LAYERS; ++l)
            tokens[l] = source[l];
    }
}

/* --- few steps: a block for each ---------------------------------------------------------------------------------- */

/* Where hidden unit h lies in shared memory: those that four threads add up side by side. */
__device__ __forceinline__ int beside(int h) { return h % QUARTER * 4 + h / QUARTER; }

/* bias + weights * hidden; four neighbouring threads have the same arguments, and all threads of a warp take part. */
__device__ __forceinline__ float weighted_sum(const float *weights, const float *hidden, float bias)
{
    const int quarter = threadIdx.x % 4;
    float part = 0;
#pragma unroll
    for (int i = 0; i < QUARTER; ++i)
        part = fmaf(weights[i * 4 + quarter], hidden[i * 4 + quarter], part);
    float sum = bias;
#pragma unroll
    for (int q = 0; q < 4; ++q)
        sum += __shfl_sync(ALL_LANES, part, q, 4);
    return sum;
}

/* One layer from `inputs` in shared memory to `hidden`, and the weights of the next to where `weighted_sum` wants them.
 * row: this thread's first, loaded before what it has to wait for. */
template <int INPUTS, int OUTPUTS>
__device__ __forceinline__ void hidden_layer(const float *rows, float (&row)[ROW], const float *inputs, float *hidden,
                                             float (*second)[PADDED_H + 4])
{
    for (int h = threadIdx.x; h < PADDED_H; h += FEW_THREADS) {
        if (h != threadIdx.x)
            load_row(rows + h * ROW, row);
        float sum = row[INPUTS];
#pragma unroll
        for (int i = 0; i < INPUTS; ++i)
            sum = fmaf(row[i], inputs[i], sum);
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o)
            second[o][beside(h)] = row[INPUTS + 1 + o];
        hidden[beside(h)] = mish(sum);
    }
}

template <class Decoder, class Token>
__device__ __forceinline__ void decode_few(const Token *tokens, const float *stats, float *actions)
{
    constexpr int LAYERS = Decoder::LAYERS;
    __shared__ alignas(16) float latents[D], levels[Decoder::LATENTS == ALL_TOKENS ? D * LAYERS : 1];
    __shared__ float hidden[PADDED_H], second[A][PADDED_H + 4];
    const Steps step = blockIdx.x;
    alignas(16) float row[ROW];
    if (threadIdx.x < PADDED_H)
        load_row(Decoder::rows() + threadIdx.x * ROW, row);
    bool is_illegal = false;
    for (int d = threadIdx.x; d < D; d += FEW_THREADS) {
        alignas(16) Token own[LAYERS];
        load_tokens<LAYERS>(tokens + (step * D + d) * LAYERS, own);
        float sum = Decoder::LATENTS == STATISTICS ? 0 : Decoder::latent_bias(d);
#pragma unroll
        for (int l = 0; l < LAYERS; ++l) {
            is_illegal |= (unsigned)own[l] >= (unsigned)K;
            const float level = (float)own[l];
            if constexpr (Decoder::LATENTS == OWN_TOKENS) {
                sum = fmaf(Decoder::token_weight(d, l), level, sum);
            } else if constexpr (Decoder::LATENTS == ALL_TOKENS) {
                levels[d * LAYERS + l] = level;
            } else {
                const float *const stat = stats + (step * LAYERS + l) * 2;
                is_illegal |= !are_legal_stats(stat[0], stat[1]);
                sum += fmaf(fmaf(level, LEVEL_STEP, -1.0f), stat[1], stat[0]);
            }
        }
        latents[d] = sum;
    }
    is_illegal = __syncthreads_or(is_illegal);
    if constexpr (Decoder::LATENTS == ALL_TOKENS) {
        for (int d = threadIdx.x; d < D; d += FEW_THREADS) {
            float sum = latents[d];
#pragma unroll 8
            for (int i = 0; i < D * LAYERS; ++i)
                sum = fmaf(Decoder::token_weight(i, d), levels[i], sum);
            latents[d] = sum;
        }
        __syncthreads();
    }
    hidden_layer<D, A>(Decoder::rows(), row, latents, hidden, second);
    __syncthreads();
    for (int first = 0; first < A; first += FEW_THREADS / 4) {
        const int wanted = first + threadIdx.x / 4, a = wanted < A ? wanted : A - 1;
        const float sum = weighted_sum(second[a], hidden, Decoder::bias(a));
        if (wanted < A && threadIdx.x % 4 == 0)
            actions[step * A + a] = is_illegal ? not_a_number() : sum;
    }
}

template <class Token>
__device__ __forceinline__ void encode_few(const float *actions, Token *tokens, float *stats)
{
    __shared__ float inputs[A], hidden[PADDED_H], second[D][PADDED_H + 4];
    const Steps step = blockIdx.x;
    alignas(16) float row[ROW];
    if (threadIdx.x < PADDED_H)
        load_row(&ENCODER_ROWS[0][0] + threadIdx.x * ROW, row);
#if HAS_CONSTANT_BINS
    float ratio[L], shift[L];
    const int first_latent = threadIdx.x / 4 < D ? threadIdx.x / 4 : D - 1;
#pragma unroll
    for (int l = 0; l < L; ++l)
        ratio[l] = BIN_RATIO[l][first_latent], shift[l] = BIN_SHIFT[l][first_latent];
#else
    __shared__ float latents[D];
#endif
    bool is_illegal = false;
    for (int a = threadIdx.x; a < A; a += FEW_THREADS) {
        const float action = actions[step * A + a];
        is_illegal |= !is_legal_action(action);
        inputs[a] = action;
    }
    is_illegal = __syncthreads_or(is_illegal);
    hidden_layer<A, D>(&ENCODER_ROWS[0][0], row, inputs, hidden, second);
    __syncthreads();
    for (int first = 0; first < D; first += FEW_THREADS / 4) {
        const int wanted = first + threadIdx.x / 4, d = wanted < D ? wanted : D - 1;
        float latent = hyperbolic_tangent(weighted_sum(second[d], hidden, ENCODER_BIAS[d]));
#if HAS_CONSTANT_BINS
        Token *const own = tokens + (step * D + d) * L;
#pragma unroll
        for (int l = 0; l < L; ++l) {
            if (first != 0)
                ratio[l] = BIN_RATIO[l][d], shift[l] = BIN_SHIFT[l][d];
            const float bins = fmaf(latent, ratio[l], shift[l]);
            const float count = ceilf(fminf(fmaxf(bins, -MIDDLE_LEVEL), K - 1 - MIDDLE_LEVEL));
            latent = bins - count;
            if (wanted < D && l % 4 == threadIdx.x % 4)
                own[l] = (Token)(is_illegal ? ILLEGAL_TOKEN : (int)count + MIDDLE_LEVEL);
        }
#else
        if (wanted < D && threadIdx.x % 4 == 0)
            latents[d] = latent;
#endif
    }
#if !HAS_CONSTANT_BINS
    constexpr float HALF_RANGE = (K - 1) * 0.5f;
    for (int l = 0; l < L; ++l) {
        __syncthreads();
        float sum = 0, squares = 0;
#pragma unroll 16
        for (int d = 0; d < D; ++d)
            sum += latents[d];
        const float mean = sum / D;
#pragma unroll 16
        for (int d = 0; d < D; ++d)
            squares = fmaf(latents[d] - mean, latents[d] - mean, squares);
        const float sigma = sqrtf(squares / (D - 1)) + SIGMA_EPSILON;
        __syncthreads();
        for (int d = threadIdx.x; d < D; d += FEW_THREADS) {
            const float centred = latents[d] - mean;
            const float bins = fmaf(centred / sigma, HALF_RANGE, HALF_RANGE - 0.5f);
            const float level = ceilf(fminf(fmaxf(bins, 0.0f), K - 1));
            latents[d] = fmaf(-fmaf(level, LEVEL_STEP, -1.0f), sigma, centred);
            tokens[(step * D + d) * L + l] = (Token)(is_illegal ? ILLEGAL_TOKEN : (int)level);
        }
        if (stats != nullptr && threadIdx.x < 2)
            stats[(step * L + l) * 2 + threadIdx.x] = is_illegal ? not_a_number() : threadIdx.x == 0 ? mean : sigma;
    }
#endif
}

/* --- many steps: some for each thread ----------------------------------------------------------------------------- */

#if HAS_MANY
/* Tokens pass through shared memory as bytes, a row of words for each of a warp's 32 steps. An odd number of words: so
 * the same word of all rows lies in different banks. */
template <int LAYERS> struct Bytes {
    static constexpr int WORDS = D * LAYERS / 4, STRIDE = WORDS | 1;
    static_assert(D * LAYERS % 4 == 0 && K <= 128, "the many kernels are for tokens in whole words");
    static __device__ __forceinline__ int place(int word) { return word / WORDS * STRIDE + word % WORDS; }
};

/* Four tokens in a word; all marked as illegal where one does not fit. */
__device__ __forceinline__ unsigned packed(int4 tokens)
{
    if ((tokens.x | tokens.y | tokens.z | tokens.w) & ~127)
        return EVERY_SIGN;
    return tokens.x | tokens.y << 8 | tokens.z << 16 | tokens.w << 24;
}

/* Sign-extended, so that 255 is -1. */
__device__ __forceinline__ int4 unpacked(unsigned word)
{
    return make_int4((signed char)word, (signed char)(word >> 8), (signed char)(word >> 16), (signed char)(word >> 24));
}

/* Tokens of `valid` steps, at most a warp's, from where they lie to `rows`; zeros behind them. */
template <int LAYERS>
__device__ __forceinline__ void stage(const int *tokens, int valid, unsigned *rows)
{
    const int lane = threadIdx.x % WARP;
#pragma unroll 8
    for (int i = lane; i < WARP * Bytes<LAYERS>::WORDS; i += WARP)
        rows[Bytes<LAYERS>::place(i)] =
            i < valid * Bytes<LAYERS>::WORDS ? packed(__ldcs(reinterpret_cast<const int4 *>(tokens) + i)) : 0;
}

template <int LAYERS>
__device__ __forceinline__ void stage(const uint8 *tokens, int valid, unsigned *rows)
{
    const int lane = threadIdx.x % WARP;
    if (valid == WARP) {
#pragma unroll 8
        for (int i = lane; i < WARP * Bytes<LAYERS>::WORDS / 4; i += WARP) {
            const uint4 words = __ldcs(reinterpret_cast<const uint4 *>(tokens) + i);
            rows[Bytes<LAYERS>::place(4 * i)] = words.x;
            rows[Bytes<LAYERS>::place(4 * i + 1)] = words.y;
            rows[Bytes<LAYERS>::place(4 * i + 2)] = words.z;
            rows[Bytes<LAYERS>::place(4 * i + 3)] = words.w;
        }
        return;
    }
    for (int i = lane; i < WARP * Bytes<LAYERS>::WORDS; i += WARP)
        rows[Bytes<LAYERS>::place(i)] =
            i < valid * Bytes<LAYERS>::WORDS ? reinterpret_cast<const unsigned *>(tokens)[i] : 0;
}

/* The way back. */
template <int LAYERS>
__device__ __forceinline__ void unstage(const unsigned *rows, int valid, int *tokens)
{
#pragma unroll 8
    for (int i = threadIdx.x % WARP; i < WARP * Bytes<LAYERS>::WORDS; i += WARP)
        if (i < valid * Bytes<LAYERS>::WORDS)
            __stcs(reinterpret_cast<int4 *>(tokens) + i, unpacked(rows[Bytes<LAYERS>::place(i)]));
}

template <int LAYERS>
__device__ __forceinline__ void unstage(const unsigned *rows, int valid, uint8 *tokens)
{
    const int lane = threadIdx.x % WARP;
    if (valid == WARP) {
#pragma unroll 8
        for (int i = lane; i < WARP * Bytes<LAYERS>::WORDS / 4; i += WARP)
            __stcs(reinterpret_cast<uint4 *>(tokens) + i,
                   make_uint4(rows[Bytes<LAYERS>::place(4 * i)], rows[Bytes<LAYERS>::place(4 * i + 1)],
                              rows[Bytes<LAYERS>::place(4 * i + 2)], rows[Bytes<LAYERS>::place(4 * i + 3)]));
        return;
    }
    for (int i = lane; i < valid * Bytes<LAYERS>::WORDS; i += WARP)
        reinterpret_cast<unsigned *>(tokens)[i] = rows[Bytes<LAYERS>::place(i)];
}

__device__ __forceinline__ int valid_steps(Steps steps, Steps first)
{
    const Steps left = steps - first;
    return left < 0 ? 0 : left < WARP ? (int)left : WARP;
}

/* sums += second * Mish(first * inputs + bias) for S steps at once, weights from shared memory. */
template <int INPUTS, int OUTPUTS, int S>
__device__ __forceinline__ void both_layers(const float (*rows)[ROW], const float (&inputs)[S][INPUTS],
                                            float (&sums)[S][OUTPUTS])
{
    for (int quarter = 0; quarter < 4; ++quarter) {
        float parts[S][OUTPUTS] = {};
#pragma unroll (S == 1 ? 16 : 4)
        for (int h = quarter * QUARTER; h < (quarter + 1) * QUARTER; ++h) {
            alignas(16) float row[ROW];
            load_row(rows[h], row);
#pragma unroll
            for (int s = 0; s < S; ++s) {
                float sum = row[INPUTS];
#pragma unroll
                for (int i = 0; i < INPUTS; ++i)
                    sum = fmaf(row[i], inputs[s][i], sum);
                const float unit = mish(sum);
#pragma unroll
                for (int o = 0; o < OUTPUTS; ++o)
                    parts[s][o] = fmaf(row[INPUTS + 1 + o], unit, parts[s][o]);
            }
        }
#pragma unroll
        for (int s = 0; s < S; ++s)
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o)
                sums[s][o] += parts[s][o];
    }
}

__device__ __forceinline__ void share_rows(const float *source, float (*rows)[ROW])
{
    for (int i = threadIdx.x; i < PADDED_H * ROW / 4; i += WARP * WARPS)
        reinterpret_cast<float4 *>(&rows[0][0])[i] = reinterpret_cast<const float4 *>(source)[i];
    __syncthreads();
}

template <class Decoder, class Token, int S>
__device__ __forceinline__ void decode_many(const Token *tokens, float *actions, Steps steps)
{
    constexpr int LAYERS = Decoder::LAYERS, STRIDE = Bytes<LAYERS>::STRIDE;
    __shared__ alignas(16) float rows[PADDED_H][ROW];
    __shared__ unsigned staged[WARPS][WARP * (STRIDE > A ? STRIDE : A)];
    share_rows(Decoder::rows(), rows);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    unsigned *const own = staged[warp];
    for (Steps tile = (Steps)blockIdx.x * WARPS + warp; tile * (WARP * S) < steps; tile += (Steps)gridDim.x * WARPS) {
        float latents[S][D], sums[S][A];
        bool is_illegal[S];
#pragma unroll
        for (int s = 0; s < S; ++s) {
            const Steps first = (tile * S + s) * WARP;
            __syncwarp();
            stage<LAYERS>(tokens + first * (D * LAYERS), valid_steps(steps, first), own);
            __syncwarp();
            unsigned marks = 0;
#pragma unroll
            for (int w = 0; w < Bytes<LAYERS>::WORDS; ++w) {
                const unsigned word = own[lane * STRIDE + w];
                /* Adding up to 127 + 128 - K sets the highest bit of what is K or more. */
                marks |= word | (word + (128 - K) * EVERY_BYTE);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int d = (4 * w + i) / LAYERS, l = (4 * w + i) % LAYERS;
                    const float level = (float)((word >> 8 * i) & 255);
                    latents[s][d] =
                        fmaf(Decoder::token_weight(d, l), level, l == 0 ? Decoder::latent_bias(d) : latents[s][d]);
                }
            }
            is_illegal[s] = marks & EVERY_SIGN;
#pragma unroll
            for (int a = 0; a < A; ++a)
                sums[s][a] = Decoder::bias(a);
        }
        both_layers(rows, latents, sums);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            const Steps first = (tile * S + s) * WARP;
            const int valid = valid_steps(steps, first);
            float *const outputs = reinterpret_cast<float *>(own);
            __syncwarp();
#pragma unroll
            for (int a = 0; a < A; ++a)
                outputs[lane * A + a] = is_illegal[s] ? not_a_number() : sums[s][a];
            __syncwarp();
#pragma unroll
            for (int i = lane; i < WARP * A; i += WARP)
                if (i < valid * A)
                    __stcs(actions + first * A + i, outputs[i]);
        }
    }
}

template <class Token, int S>
__device__ __forceinline__ void encode_many(const float *actions, Token *tokens, Steps steps)
{
    constexpr int STRIDE = Bytes<L>::STRIDE;
    __shared__ alignas(16) float rows[PADDED_H][ROW];
    __shared__ unsigned staged[WARPS][WARP * (STRIDE > A ? STRIDE : A)];
    share_rows(&ENCODER_ROWS[0][0], rows);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    unsigned *const own = staged[warp];
    for (Steps tile = (Steps)blockIdx.x * WARPS + warp; tile * (WARP * S) < steps; tile += (Steps)gridDim.x * WARPS) {
        float inputs[S][A], latents[S][D];
        bool is_illegal[S];
#pragma unroll
        for (int s = 0; s < S; ++s) {
            const Steps first = (tile * S + s) * WARP;
            const int valid = valid_steps(steps, first);
            float *const given = reinterpret_cast<float *>(own);
            __syncwarp();
#pragma unroll
            for (int i = lane; i < WARP * A; i += WARP)
                given[i] = i < valid * A ? __ldcs(actions + first * A + i) : 0.0f;
            __syncwarp();
            is_illegal[s] = false;
#pragma unroll
            for (int a = 0; a < A; ++a) {
                inputs[s][a] = given[lane * A + a];
                is_illegal[s] |= !is_legal_action(inputs[s][a]);
            }
#pragma unroll
            for (int d = 0; d < D; ++d)
                latents[s][d] = ENCODER_BIAS[d];
        }
        both_layers(rows, inputs, latents);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            const Steps first = (tile * S + s) * WARP;
            __syncwarp();
            unsigned word = 0;
#pragma unroll
            for (int d = 0; d < D; ++d) {
                float latent = hyperbolic_tangent(latents[s][d]);
#pragma unroll
                for (int l = 0; l < L; ++l) {
                    const float bins = fmaf(latent, BIN_RATIO[l][d], BIN_SHIFT[l][d]);
                    const float count = ceilf(fminf(fmaxf(bins, -MIDDLE_LEVEL), K - 1 - MIDDLE_LEVEL));
                    latent = bins - count;
                    const int i = d * L + l;
                    word |= (unsigned)((int)count + MIDDLE_LEVEL) << 8 * (i % 4);
                    if (i % 4 == 3) {
                        own[lane * STRIDE + i / 4] = is_illegal[s] ? ALL_LANES : word;
                        word = 0;
                    }
                }
            }
            __syncwarp();
            unstage<L>(own, valid_steps(steps, first), tokens + first * (D * L));
        }
    }
}
#endif

/* --- kernels ------------------------------------------------------------------------------------------------------ */

/* @KERNELS@ */
