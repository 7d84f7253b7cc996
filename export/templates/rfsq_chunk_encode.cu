/* --- encoder ------------------------------------------------------------------------------------------------------ */

/* What a warp of an encoder works in. */
template <int CHUNKS> struct Desk {
    float centred[ROWS * CHUNKS], y[PADDED], latents[PADDED];
    int words[L];
};

/* Latent m of chunks centred [ROWS][CHUNKS] on the mean of a class: four sums that are added up at last. */
template <int CHUNKS>
__device__ __forceinline__ void encode_latent(int c, int m, const float *centred, float (&z)[CHUNKS])
{
    float parts[4][CHUNKS] = {};
#pragma unroll 1
    for (int n = 0; n < ROWS; n += 4)
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const float weight = ENCODER_BASIS[c][n + part][m];
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk)
                parts[part][chunk] = fmaf(weight, centred[(n + part) * CHUNKS + chunk], parts[part][chunk]);
        }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
        z[chunk] = (parts[0][chunk] + parts[1][chunk]) + (parts[2][chunk] + parts[3][chunk]);
}

/* -1 < y < 1: from 6.3 on every grid has y in its last cell, and up to 7 it is below 1. */
__device__ __forceinline__ float companded(int c, int m, float z)
{
    return hyperbolic_tangent(z * INVERSE_WIDTH[c][m], 7.0f);
}

/* A companded latent as it is decoded at a budget, in a grid of 2 * half levels. */
__device__ __forceinline__ float latent_at(float y, float half, float width)
{
    return width * level_of(2 * (float)(int)fmaf(y, half, half) + 1, 2 * half);
}

/*
 * What a class costs each of the chunks x [ROWS][CHUNKS]: the squared errors of its latents at the budgets, each with
 * its weight; and what no latent holds. To costs [CHUNKS][CLASSES].
 */
template <int CHUNKS>
__device__ __forceinline__ void try_class(int c, const float *x, Desk<CHUNKS> &desk, float *costs)
{
    const int lane = threadIdx.x % WARP;
    float sums[CHUNKS] = {};
    for (int i = lane; i < ROWS * CHUNKS; i += WARP)
        desk.centred[i] = x[i] - MEAN[c][i / CHUNKS];
    __syncwarp();
#if HAS_REST
    float rests[CHUNKS] = {};
    for (int n = lane; n < ROWS; n += WARP)
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk)
            rests[chunk] = fmaf(desk.centred[n * CHUNKS + chunk], desk.centred[n * CHUNKS + chunk], rests[chunk]);
#endif
    for (int m = lane; m < PADDED; m += WARP) {
        float z[CHUNKS], y[CHUNKS];
        encode_latent<CHUNKS>(c, m, desk.centred, z);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            y[chunk] = companded(c, m, z[chunk]);
#if HAS_REST
            rests[chunk] = fmaf(-z[chunk], z[chunk], rests[chunk]);
#endif
        }
#pragma unroll 1
        for (int budget = 0; budget < BUDGETS; ++budget) {
            const float half = BUDGET_HALF[c][budget][m], width = BUDGET_WIDTH[c][budget][m];
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk) {
                const float error = z[chunk] - latent_at(y[chunk], half, width);
                sums[chunk] = fmaf(WEIGHTS[budget] * error, error, sums[chunk]);
            }
        }
    }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        float cost = sum_of_lanes(sums[chunk]);
#if HAS_REST
        cost = fmaf(SUM_OF_WEIGHTS, fmaxf(sum_of_lanes(rests[chunk]), 0.0f), cost);
#endif
        if (lane == 0)
            costs[chunk * CLASSES + c] = cost;
    }
    __syncwarp();
}

/* The first class of the least cost. */
__device__ __forceinline__ int cheapest(const float *costs)
{
    int best = 0;
    for (int c = threadIdx.x % WARP; c < CLASSES; c += WARP)
        best = costs[c] < costs[best] ? c : best;
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        const int other = __shfl_xor_sync(ALL_LANES, best, distance);
        if (costs[other] < costs[best] || (costs[other] == costs[best] && other < best))
            best = other;
    }
    return best;
}

/* Whether a class, which compands a chunk to desk.y, errs nowhere by more than escape would. x: its values, CHUNKS
 * apart. */
template <int CHUNKS>
__device__ __forceinline__ bool keeps_bound(int c, const float *x, Desk<CHUNKS> &desk)
{
    const int lane = threadIdx.x % WARP;
    for (int budget = 0; budget < BUDGETS; ++budget) {
        for (int m = lane; m < PADDED; m += WARP)
            desk.latents[m] = latent_at(desk.y[m], BUDGET_HALF[c][budget][m], BUDGET_WIDTH[c][budget][m]);
        __syncwarp();
        bool errs = false;
        for (int n = lane; n < N; n += WARP) {
            const float value = clamped(MEAN[c][n] + to_value(c, n, desk.latents));
            errs |= !(fabsf(value - x[n * CHUNKS]) <= BOUNDS[budget]);
        }
        if (__any_sync(ALL_LANES, errs))
            return false;
    }
    return true;
}

/* The cheapest class that keeps the bound, with the chunk companded in desk.y; or ESCAPE. Costs of others are lost. */
template <int CHUNKS>
__device__ __forceinline__ int choose(const float *x, float *costs, Desk<CHUNKS> &desk)
{
    const int lane = threadIdx.x % WARP;
    for (;;) {
        const int c = cheapest(costs);
        const float cost = costs[c];
        if (cost >= NEVER)
            return ESCAPE;
        for (int n = lane; n < ROWS; n += WARP)
            desk.centred[n] = x[n * CHUNKS] - MEAN[c][n];
        __syncwarp();
        for (int m = lane; m < PADDED; m += WARP) {
            float z[1];
            encode_latent<1>(c, m, desk.centred, z);
            desk.y[m] = companded(c, m, z[0]);
        }
        __syncwarp();
        /* No value errs by more than the length of all errors, which the cost bounds: mostly nothing is decoded. */
        if (cost <= SURE_COST || keeps_bound(c, x, desk))
            return c;
        if (lane == 0)
            costs[c] = NEVER;
        __syncwarp();
    }
}

/* Bit `place` of a code, behind the bits of the class. */
__device__ __forceinline__ void put_bit(int *words, int place, int bit)
{
    place += CLASS_BITS;
    if (place < L * TOKEN_BITS)
        atomicOr(&words[place / TOKEN_BITS], bit << (TOKEN_BITS - 1 - place % TOKEN_BITS));
}

/* The bits of a class: those of the digits of y [PADDED]. */
__device__ __forceinline__ void write_code(int c, const float *y, int *words)
{
    constexpr float HALF = 1 << (MOST_BITS - 1);
    for (int m = threadIdx.x % WARP; m < PADDED; m += WARP) {
        const unsigned digits = (unsigned)(int)fmaf(y[m], HALF, HALF);
        const Places places = places_of(c, m);
#pragma unroll
        for (int rank = 0; rank < RANKS; ++rank) {
            const unsigned place = place_at(places, rank), bit = digits >> (MOST_BITS - 1 - rank) & 1;
            if (place / 32 < L)
                atomicOr(&words[place / 32], (int)(bit << (31 - (place + rank) % 32)));
        }
    }
}

/* As in the reference: exact enough in double for every float. */
__device__ __forceinline__ int escape_cell(float x)
{
    const int cell = (int)(((double)x + 1) / 2 * 3 * (1 << MOST_BITS));
    return cell < 3 << MOST_BITS ? cell : (3 << MOST_BITS) - 1;
}

/* The bits of escape: each value of a chunk in its cell of 3 * 2^MOST_BITS. */
template <int CHUNKS> __device__ __forceinline__ void write_escape(const float *x, int *words)
{
    const int lane = threadIdx.x % WARP;
    for (int block = lane; block < BLOCKS; block += WARP) {
        int word = 0;
        for (int n = block * BLOCK_VALUES; n < (block + 1) * BLOCK_VALUES; ++n)
            word = 3 * word + (n < N ? escape_cell(x[n * CHUNKS]) >> MOST_BITS : 0);
        for (int bit = 0; bit < BLOCK_BITS; ++bit)
            put_bit(words, block * BLOCK_BITS + bit, word >> (BLOCK_BITS - 1 - bit) & 1);
    }
    for (int n = lane; n < N; n += WARP) {
        const int cell = escape_cell(x[n * CHUNKS]);
        int place = BLOCKS * BLOCK_BITS + n;
        for (int bit = MOST_BITS; bit-- > 0 && place < CODE_BITS; place += N)
            put_bit(words, place, cell >> bit & 1);
    }
}

/* The tokens of one chunk, by a warp. */
template <int CHUNKS, class Token>
__device__ __forceinline__ void write_chunk(const float *x, float *costs, Desk<CHUNKS> &desk, bool is_illegal,
                                            Token *tokens)
{
    const int lane = threadIdx.x % WARP;
    const int c = choose(x, costs, desk);
    for (int l = lane; l < L; l += WARP)
        desk.words[l] = l == 0 ? c << ROOM : 0;
    __syncwarp();
    if (c == ESCAPE)
        write_escape<CHUNKS>(x, desk.words);
    else
        write_code(c, desk.y, desk.words);
    __syncwarp();
    for (int l = lane; l < L; l += WARP)
        tokens[l] = (Token)(is_illegal ? ILLEGAL_TOKEN : desk.words[l]);
    __syncwarp();
}

template <int CHUNKS, int WARPS, class Token>
__device__ __forceinline__ void encode(const float *actions, Token *tokens, Chunks chunks)
{
    __shared__ float x[ROWS * CHUNKS], costs[CHUNKS * CLASSES];
    __shared__ int are_illegal[CHUNKS];
    __shared__ Desk<CHUNKS> desks[WARPS];
    const Chunks first = (Chunks)blockIdx.x * CHUNKS, left = chunks - first;
    const int valid = left < CHUNKS ? (int)left : CHUNKS, warp = threadIdx.x / WARP;
    for (int i = threadIdx.x; i < CHUNKS; i += WARPS * WARP)
        are_illegal[i] = 0;
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += WARPS * WARP)
        x[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < valid * N; i += WARPS * WARP) {
        const float action = actions[first * N + i];
        const int chunk = i / N, n = i % N;
        if (!is_legal_action(action))
            are_illegal[chunk] = 1;
        x[n * CHUNKS + chunk] = clamped((action - OFFSETS[n]) * INVERSE_UNITS[n]);
    }
    __syncthreads();
    for (int c = warp; c < CLASSES; c += WARPS)
        try_class<CHUNKS>(c, x, desks[warp], costs);
    __syncthreads();
    for (int chunk = warp; chunk < valid; chunk += WARPS)
        write_chunk<CHUNKS>(x + chunk, costs + chunk * CLASSES, desks[warp], are_illegal[chunk],
                            tokens + (first + chunk) * L);
}
