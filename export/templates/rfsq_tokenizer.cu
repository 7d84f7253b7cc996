/*
 * One kernel for each way and kind of token. The `few` kernels are for a control loop: a block for each step, threads
 * side by side, so that a chunk takes hardly longer than launching it. The `many` kernels are for data: every thread
 * has a step of its own, weights are numbers in the instructions, and tokens are moved in whole lines.
 *
 * Both add up in the same order and say where a product and a sum round once (fmaf; compile with --fmad=false): a step
 * has the same bits, whichever kernel it went through.
 */

/* @SIZES@ */

/* Hidden units in four parts that are added up one by one and then together: smaller errors, and four threads. */
constexpr int QUARTER = (H + 3) / 4, PADDED_H = 4 * QUARTER;
/* A hidden unit's weights side by side: [inputs][bias][outputs], filled up to whole vectors. */
constexpr int ROW = (A + 1 + D + 3) / 4 * 4;
constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu, EVERY_BIT = 0xFFFFFFFFu, EVERY_BYTE = 0x01010101u, EVERY_SIGN = 0x80808080u;
/* What a token of a step becomes whose actions are illegal: -1, and 255 among bytes. */
constexpr int ILLEGAL_TOKEN = -1;

constexpr float LOG2_E = 0x1.715476p+0f;

typedef unsigned char uint8;
typedef long long Steps;

/* How latents follow from tokens: each from its own, from all of the step, or with the step's statistics. */
enum Latents { OWN_TOKENS, ALL_TOKENS, STATISTICS };

/* Whether what Mish is given and gives is times log2(e), with which the weights before and behind it reckon; and whether
 * it is known to stay below 40 without that, so that nothing overflows on the way. */
enum Scale { PLAIN, SCALED, SCALED_BELOW_40 };

/* @TABLES@ */

/* --- arithmetic -------------------------------------------------------------------------------------------------- */

/* @ARITHMETIC@ */

/* One instruction each: 2^x and 1 / x within two units of the last place, what is below 2^-126 as 0. */
__device__ __forceinline__ float power_of_two(float x)
{
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
    return x;
}

__device__ __forceinline__ float reciprocal(float x)
{
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
    return x;
}

/* sum + the products of four tokens and four weights, bytes without and with a sign. */
__device__ __forceinline__ int add_products(unsigned tokens, int weights, int sum)
{
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(tokens), "r"(weights));
    return sum;
}

/* x tanh(log(1 + exp(x))) = x n / (n + 2) with n = e (e + 2), e = exp(x); from x = 20 on the fraction is 1. */
template <Scale SCALE> __device__ __forceinline__ float mish(float x)
{
    const float exponent = SCALE == SCALED_BELOW_40 ? x : SCALE == SCALED ? fminf(x, 29.0f) : fminf(x, 20.0f) * LOG2_E;
    const float e = power_of_two(exponent);
    const float n = e * (e + 2);
    return x * (n * reciprocal(n + 2));
}

/* Action a without the offset of its dimension, before any sum: near the offset this is exact, and what a sum of large
 * numbers would lose is still there. */
__device__ __forceinline__ float from_offset(float action, int a)
{
#if HAS_OFFSET
    action -= OFFSET[a];
#endif
    return action;
}

/* The way back, behind all sums: one rounding of a number as large as the action. */
__device__ __forceinline__ float to_action(float sum, int a)
{
#if HAS_OFFSET
    sum += OFFSET[a];
#endif
    return sum;
}

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

/* Whether the next layer's weights have room in shared memory beside `others` numbers, what aligns them, and the hidden
 * units. */
__device__ constexpr bool have_room(int outputs, int others)
{
    return (int)sizeof(float) * (outputs * (PADDED_H + 4) + PADDED_H + others + 4) <= SHARED_BYTES;
}

/* bias + weights * hidden; four neighbouring threads have the same arguments, and all threads of a warp take part.
 * second: the weights, from `hidden_layer`; where they had no room they are read from `rows`. */
template <int INPUTS, bool HAVE_ROOM>
__device__ __forceinline__ float weighted_sum(const float *rows, const float (*second)[PADDED_H + 4], int output,
                                              const float *hidden, float bias)
{
    constexpr int STRIDE = HAVE_ROOM ? 4 : ROW;
    const int quarter = threadIdx.x % 4;
    const float *weights = HAVE_ROOM ? second[output] + quarter : rows + quarter * QUARTER * ROW + INPUTS + 1 + output;
    float part = 0;
#pragma unroll 32
    for (int i = 0; i < QUARTER; ++i)
        part = fmaf(weights[i * STRIDE], hidden[i * 4 + quarter], part);
    float sum = bias;
#pragma unroll
    for (int q = 0; q < 4; ++q)
        sum += __shfl_sync(ALL_LANES, part, q, 4);
    return sum;
}

/* What a hidden unit has before Mish. */
template <int INPUTS> __device__ __forceinline__ float hidden_sum(const float (&row)[ROW], const float *inputs)
{
    float sum = row[INPUTS];
#pragma unroll
    for (int i = 0; i < INPUTS; ++i)
        sum = fmaf(row[i], inputs[i], sum);
    return sum;
}

/* One layer from `inputs` in shared memory to `hidden`, and the weights of the next to where `weighted_sum` wants them,
 * if they have room. row: this thread's first, loaded before what it has to wait for. */
template <int INPUTS, int OUTPUTS, bool HAVE_ROOM, Scale SCALE>
__device__ __forceinline__ void hidden_layer(const float *rows, float (&row)[ROW], const float *inputs, float *hidden,
                                             float (*second)[PADDED_H + 4])
{
    for (int h = threadIdx.x; h < PADDED_H; h += FEW_THREADS) {
        if (h != threadIdx.x)
            load_row(rows + h * ROW, row);
        if constexpr (HAVE_ROOM) {
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o)
                second[o][beside(h)] = row[INPUTS + 1 + o];
        }
        hidden[beside(h)] = mish<SCALE>(hidden_sum<INPUTS>(row, inputs));
    }
}

/* Exact until it is rounded: unsigned sums may run over on the way, the result does not. */
template <class Decoder, class Token>
__device__ __forceinline__ float latent_from_own(int d, const Token (&tokens)[Decoder::LAYERS])
{
    typedef typename Decoder::Unsigned Unsigned;
    Unsigned sum = Decoder::latent_start(d);
#pragma unroll
    for (int l = 0; l < Decoder::LAYERS; ++l)
        sum += (Unsigned)Decoder::fixed_weight(d, l) * (Unsigned)tokens[l];
    return (float)(typename Decoder::Signed)sum * Decoder::LATENT_STEP;
}

/* Sums of sigma times what a token is above the middle, which is exact; the smallest first. */
template <int LAYERS, class Token>
__device__ __forceinline__ float latent_from_stats(const Token (&tokens)[LAYERS], const float *stats, bool &is_illegal)
{
    float sum = 0, means = 0;
#pragma unroll
    for (int l = LAYERS - 1; l >= 0; --l) {
        is_illegal |= !are_legal_stats(stats[2 * l], stats[2 * l + 1]);
        sum = fmaf((float)tokens[l] - (K - 1) * 0.5f, stats[2 * l + 1], sum);
        means += stats[2 * l];
    }
    return fmaf(sum, LEVEL_STEP, means);
}

/* In four parts, which are added up together: smaller errors, and shorter to wait for. */
template <class Decoder>
__device__ __forceinline__ float latent_from_all(int d, const float *levels)
{
    constexpr int TOKENS = D * Decoder::LAYERS, PART = (TOKENS + 3) / 4;
    float parts[4] = {};
#pragma unroll 4
    for (int i = 0; i < PART; ++i)
#pragma unroll
        for (int part = 0; part < 4; ++part)
            if (part * PART + i < TOKENS)
                parts[part] = fmaf(Decoder::token_weight(part * PART + i, d), levels[part * PART + i], parts[part]);
    return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + Decoder::latent_bias(d);
}

template <class Decoder, class Token>
__device__ __forceinline__ void decode_few(const Token *tokens, const float *stats, float *actions)
{
    constexpr int LAYERS = Decoder::LAYERS;
    constexpr int LEVELS = Decoder::LATENTS == ALL_TOKENS ? D * LAYERS : 1;
    constexpr bool HAVE_ROOM = have_room(A, D + LEVELS);
    alignas(16) __shared__ float latents[D];
    __shared__ float levels[LEVELS], hidden[PADDED_H], second[HAVE_ROOM ? A : 1][PADDED_H + 4];
    const Steps step = blockIdx.x;
    alignas(16) float row[ROW];
    if (threadIdx.x < PADDED_H)
        load_row(Decoder::rows() + threadIdx.x * ROW, row);
    bool is_illegal = false;
    for (int d = threadIdx.x; d < D; d += FEW_THREADS) {
        alignas(16) Token own[LAYERS];
        load_tokens<LAYERS>(tokens + (step * D + d) * LAYERS, own);
#pragma unroll
        for (int l = 0; l < LAYERS; ++l) {
            is_illegal |= (unsigned)own[l] >= (unsigned)K;
            if constexpr (Decoder::LATENTS == ALL_TOKENS)
                levels[d * LAYERS + l] = (float)own[l];
        }
        if constexpr (Decoder::LATENTS == OWN_TOKENS)
            latents[d] = latent_from_own<Decoder>(d, own);
        else if constexpr (Decoder::LATENTS == STATISTICS)
            latents[d] = latent_from_stats(own, stats + step * (LAYERS * 2), is_illegal);
    }
    is_illegal = __syncthreads_or(is_illegal);
    if constexpr (Decoder::LATENTS == ALL_TOKENS) {
        for (int d = threadIdx.x; d < D; d += FEW_THREADS)
            latents[d] = latent_from_all<Decoder>(d, levels);
        __syncthreads();
    }
    hidden_layer<D, A, HAVE_ROOM, Decoder::SCALE>(Decoder::rows(), row, latents, hidden, second);
    __syncthreads();
    for (int first = 0; first < A; first += FEW_THREADS / 4) {
        const int wanted = first + threadIdx.x / 4, a = wanted < A ? wanted : A - 1;
        const float sum = weighted_sum<D, HAVE_ROOM>(Decoder::rows(), second, a, hidden, Decoder::bias(a));
        if (wanted < A && threadIdx.x % 4 == 0)
            actions[step * A + a] = is_illegal ? not_a_number() : to_action(sum, a);
    }
}

template <class Token>
__device__ __forceinline__ void encode_few(const float *actions, Token *tokens, float *stats)
{
    constexpr bool HAVE_ROOM = have_room(D, A + D);
    __shared__ float inputs[A], hidden[PADDED_H], second[HAVE_ROOM ? D : 1][PADDED_H + 4];
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
        inputs[a] = from_offset(action, a);
    }
    is_illegal = __syncthreads_or(is_illegal);
    hidden_layer<A, D, HAVE_ROOM, PLAIN>(&ENCODER_ROWS[0][0], row, inputs, hidden, second);
    __syncthreads();
    for (int first = 0; first < D; first += FEW_THREADS / 4) {
        const int wanted = first + threadIdx.x / 4, d = wanted < D ? wanted : D - 1;
        const float sum = weighted_sum<A, HAVE_ROOM>(&ENCODER_ROWS[0][0], second, d, hidden, ENCODER_BIAS[d]);
        float latent = hyperbolic_tangent(sum, 10.0f);
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
/* Tokens pass through shared memory as bytes, a row of words for each of a warp's 32 steps. Where a row has a multiple
 * of four words, four are moved at once. A row has an odd number of such groups: so the same group of neighbouring rows
 * lies in different banks. */
template <int LAYERS> struct Bytes {
    static constexpr int WORDS = D * LAYERS / 4, GROUP = WORDS % 4 == 0 ? 4 : 1, GROUPS = WORDS / GROUP;
    static constexpr int STRIDE = GROUP * (GROUPS | 1);
    static_assert(D * LAYERS % 4 == 0 && K <= 128, "the many kernels are for tokens in whole words");
};

template <int WORDS> struct Group;
template <> struct Group<1> {
    typedef unsigned type;
};
template <> struct Group<4> {
    typedef uint4 type;
};
template <int LAYERS> using GroupOf = typename Group<Bytes<LAYERS>::GROUP>::type;

/* Four tokens in a word; all marked as illegal where one does not fit. */
__device__ __forceinline__ unsigned packed(int4 tokens)
{
    if ((tokens.x | tokens.y | tokens.z | tokens.w) & ~127)
        return EVERY_SIGN;
    return tokens.x | tokens.y << 8 | tokens.z << 16 | tokens.w << 24;
}

/* How __byte_perm replaces byte i of its first word by the lowest of the second, and all above it by anything. */
__device__ constexpr unsigned PUT_BYTE[4] = {0x4444, 0x4440, 0x4410, 0x4210};

/* Sign-extended, so that 255 is -1. */
__device__ __forceinline__ int4 unpacked(unsigned word)
{
    return make_int4((signed char)word, (signed char)(word >> 8), (signed char)(word >> 16), (signed char)(word >> 24));
}

/* Tokens of `valid` steps, at most a warp's, from where they lie to `rows`; zeros behind them. */
template <int LAYERS>
__device__ __forceinline__ void stage(const int *tokens, int valid, unsigned *rows)
{
    constexpr int WORDS = Bytes<LAYERS>::WORDS;
#pragma unroll 8
    for (int i = threadIdx.x % WARP; i < WARP * WORDS; i += WARP)
        rows[i / WORDS * Bytes<LAYERS>::STRIDE + i % WORDS] =
            i < valid * WORDS ? packed(__ldcs(reinterpret_cast<const int4 *>(tokens) + i)) : 0;
}

template <int LAYERS>
__device__ __forceinline__ void stage(const uint8 *tokens, int valid, unsigned *rows)
{
    constexpr int GROUPS = Bytes<LAYERS>::GROUPS, GROUP = Bytes<LAYERS>::GROUP;
#pragma unroll 8
    for (int i = threadIdx.x % WARP; i < WARP * GROUPS; i += WARP) {
        GroupOf<LAYERS> group = {};
        if (i < valid * GROUPS)
            group = __ldcs(reinterpret_cast<const GroupOf<LAYERS> *>(tokens) + i);
        *reinterpret_cast<GroupOf<LAYERS> *>(rows + i / GROUPS * Bytes<LAYERS>::STRIDE + i % GROUPS * GROUP) = group;
    }
}

/* The way back. */
template <int LAYERS>
__device__ __forceinline__ void unstage(const unsigned *rows, int valid, int *tokens)
{
    constexpr int WORDS = Bytes<LAYERS>::WORDS;
#pragma unroll 8
    for (int i = threadIdx.x % WARP; i < WARP * WORDS; i += WARP)
        if (i < valid * WORDS)
            __stcs(reinterpret_cast<int4 *>(tokens) + i,
                   unpacked(rows[i / WORDS * Bytes<LAYERS>::STRIDE + i % WORDS]));
}

template <int LAYERS>
__device__ __forceinline__ void unstage(const unsigned *rows, int valid, uint8 *tokens)
{
    constexpr int GROUPS = Bytes<LAYERS>::GROUPS, GROUP = Bytes<LAYERS>::GROUP;
#pragma unroll 8
    for (int i = threadIdx.x % WARP; i < WARP * GROUPS; i += WARP)
        if (i < valid * GROUPS)
            __stcs(reinterpret_cast<GroupOf<LAYERS> *>(tokens) + i,
                   *reinterpret_cast<const GroupOf<LAYERS> *>(rows + i / GROUPS * Bytes<LAYERS>::STRIDE
                                                              + i % GROUPS * GROUP));
}

/* A row, from or to the registers of the thread that has its step. */
template <int LAYERS>
__device__ __forceinline__ void load_row_of_words(const unsigned *row, unsigned (&words)[Bytes<LAYERS>::WORDS])
{
#pragma unroll
    for (int i = 0; i < Bytes<LAYERS>::GROUPS; ++i)
        reinterpret_cast<GroupOf<LAYERS> *>(words)[i] = reinterpret_cast<const GroupOf<LAYERS> *>(row)[i];
}

template <int LAYERS>
__device__ __forceinline__ void store_row_of_words(const unsigned (&words)[Bytes<LAYERS>::WORDS], unsigned *row)
{
#pragma unroll
    for (int i = 0; i < Bytes<LAYERS>::GROUPS; ++i)
        reinterpret_cast<GroupOf<LAYERS> *>(row)[i] = reinterpret_cast<const GroupOf<LAYERS> *>(words)[i];
}

__device__ __forceinline__ int valid_steps(Steps steps, Steps first)
{
    const Steps left = steps - first;
    return left < 0 ? 0 : left < WARP ? (int)left : WARP;
}

/* sums += second * Mish(first * inputs + bias); Layers::row has the weights. Written out for every
 * hidden unit, unless there are so many that the code would leave its cache: then each weight is in an instruction. */
template <class Layers, Scale SCALE, int INPUTS, int OUTPUTS>
__device__ __forceinline__ void both_layers(const float (&inputs)[INPUTS], float (&sums)[OUTPUTS])
{
#pragma unroll (H <= MOST_WRITTEN_OUT ? 4 : 1)
    for (int quarter = 0; quarter < 4; ++quarter) {
        float parts[OUTPUTS] = {};
#pragma unroll (H <= MOST_WRITTEN_OUT ? QUARTER : 4)
        for (int unit = 0; unit < QUARTER; ++unit) {
            const int h = quarter * QUARTER + unit;
            float sum = Layers::row(h, INPUTS);
#pragma unroll
            for (int i = 0; i < INPUTS; ++i)
                sum = fmaf(Layers::row(h, i), inputs[i], sum);
            sum = mish<SCALE>(sum);
#pragma unroll
            for (int o = 0; o < OUTPUTS; ++o)
                parts[o] = fmaf(Layers::row(h, INPUTS + 1 + o), sum, parts[o]);
        }
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o)
            sums[o] += parts[o];
    }
}

/* Latent d, the same as `latent_from_own`, from words of four tokens. */
template <class Decoder>
__device__ __forceinline__ float latent_from_words(int d, const unsigned (&words)[D * Decoder::LAYERS / 4])
{
    unsigned sum = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        int part = n == 0 ? Decoder::latent_start(d) : 0;
#pragma unroll
        for (int i = 0; i <= ((d + 1) * Decoder::LAYERS - 1) / 4 - d * Decoder::LAYERS / 4; ++i) {
            const int weights = Decoder::word_weight(d, i * 4 + n);
            if (weights != 0)
                part = add_products(words[d * Decoder::LAYERS / 4 + i], weights, part);
        }
        sum += (unsigned)part << 8 * n;
    }
    return (float)(int)sum * Decoder::LATENT_STEP;
}

template <class Decoder, class Token>
__device__ __forceinline__ void decode_many(const Token *tokens, float *actions, Steps steps)
{
    constexpr int LAYERS = Decoder::LAYERS, STRIDE = Bytes<LAYERS>::STRIDE;
    alignas(16) __shared__ unsigned staged[WARPS][WARP * (STRIDE > A ? STRIDE : A)];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    unsigned *const own = staged[warp];
    const Steps first = ((Steps)blockIdx.x * WARPS + warp) * WARP;
    const int valid = valid_steps(steps, first);
    stage<LAYERS>(tokens + first * (D * LAYERS), valid, own);
    __syncwarp();
    alignas(16) unsigned words[Bytes<LAYERS>::WORDS];
    load_row_of_words<LAYERS>(own + lane * STRIDE, words);
    unsigned marks = 0;
    /* Adding up to 127 + 128 - K sets the highest bit of what is K or more. */
#pragma unroll
    for (int w = 0; w < Bytes<LAYERS>::WORDS; ++w)
        marks |= words[w] | (words[w] + (128 - K) * EVERY_BYTE);
    const bool is_illegal = marks & EVERY_SIGN;
    float latents[D], sums[A];
#pragma unroll
    for (int d = 0; d < D; ++d)
        latents[d] = latent_from_words<Decoder>(d, words);
#pragma unroll
    for (int a = 0; a < A; ++a)
        sums[a] = Decoder::bias(a);
    both_layers<Decoder, Decoder::SCALE>(latents, sums);
    float *const outputs = reinterpret_cast<float *>(own);
    __syncwarp();
#pragma unroll
    for (int a = 0; a < A; ++a)
        outputs[lane * A + a] = is_illegal ? not_a_number() : to_action(sums[a], a);
    __syncwarp();
#pragma unroll
    for (int i = lane; i < WARP * A; i += WARP)
        if (i < valid * A)
            __stcs(actions + first * A + i, outputs[i]);
}

template <int LAYERS, class Token>
__device__ __forceinline__ void encode_many(const float *actions, Token *tokens, Steps steps)
{
    static_assert(LAYERS == L, "a parameter only so that nothing of this is looked at where its sizes do not suit");
    constexpr int STRIDE = Bytes<LAYERS>::STRIDE;
    /* To a number this large a level can be added without a rounding: it then stands in the lowest byte. */
    constexpr float LARGE = 0x1.8p+23f + MIDDLE_LEVEL;
    alignas(16) __shared__ unsigned staged[WARPS][WARP * (STRIDE > A ? STRIDE : A)];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    unsigned *const own = staged[warp];
    const Steps first = ((Steps)blockIdx.x * WARPS + warp) * WARP;
    const int valid = valid_steps(steps, first);
    float *const given = reinterpret_cast<float *>(own);
#pragma unroll
    for (int i = lane; i < WARP * A; i += WARP)
        given[i] = i < valid * A ? __ldcs(actions + first * A + i) : 0.0f;
    __syncwarp();
    float inputs[A], latents[D];
    bool is_illegal = false;
#pragma unroll
    for (int a = 0; a < A; ++a) {
        const float action = given[lane * A + a];
        is_illegal |= !is_legal_action(action);
        inputs[a] = from_offset(action, a);
    }
#pragma unroll
    for (int d = 0; d < D; ++d)
        latents[d] = ENCODER_BIAS[d];
    both_layers<Encoder, PLAIN>(inputs, latents);
    __syncwarp();
    alignas(16) unsigned words[Bytes<LAYERS>::WORDS];
#pragma unroll
    for (int d = 0; d < D; ++d) {
        float latent = hyperbolic_tangent(latents[d], 10.0f);
#pragma unroll
        for (int l = 0; l < L; ++l) {
            const float bins = fmaf(latent, BIN_RATIO[l][d], BIN_SHIFT[l][d]);
            const float level = __fadd_ru(fminf(fmaxf(bins, -MIDDLE_LEVEL), K - 1 - MIDDLE_LEVEL), LARGE);
            latent = bins - (level - LARGE);
            const int i = d * L + l;
            words[i / 4] = i % 4 == 0 ? __float_as_uint(level)
                                      : __byte_perm(words[i / 4], __float_as_uint(level), PUT_BYTE[i % 4]);
        }
    }
#pragma unroll
    for (int w = 0; w < Bytes<LAYERS>::WORDS; ++w)
        words[w] = is_illegal ? EVERY_BIT : words[w];
    store_row_of_words<LAYERS>(words, own + lane * STRIDE);
    __syncwarp();
    unstage<LAYERS>(own, valid, tokens + first * (D * L));
}
#endif

/* @BELIEFS@ */

/* --- kernels ------------------------------------------------------------------------------------------------------ */

/* @KERNELS@ */
