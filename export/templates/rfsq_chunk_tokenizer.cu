/*
 * One kernel for each way and type of tokens, in two kinds. The `few` kernels are for a control loop: a block for each
 * chunk. The `many` kernels are for data: chunks share what is read of a class. Encoders try every class on some chunks
 * at once; decoders sort the chunks of a block by their class first.
 *
 * All add up in the same order and say where a product and a sum round once (fmaf; compile with --fmad=false): a chunk
 * has the same bits, whichever kernel it went through.
 */

/* @SIZES@ */

constexpr int N = T * A, WARP = 32;
/* Values and latents up to whole groups of four; the tables are filled up with zeros. */
constexpr int ROWS = (N + 3) / 4 * 4, QUARTER = (M + 3) / 4, PADDED = 4 * QUARTER;
/* The class number that means escape; the tables are of those before it. Numbers behind it mean escape, too. */
constexpr int ESCAPE = CLASSES;
constexpr int ROOM = TOKEN_BITS - CLASS_BITS, CODE_BITS = L * TOKEN_BITS - CLASS_BITS;
constexpr unsigned VOCABULARY = 1u << TOKEN_BITS;
/* Of escape: so many values with three levels each are a word of eight bits; then each value gets its further bits. */
constexpr int BLOCK_VALUES = 5, BLOCK_BITS = 8, BLOCK_WORDS = 243, BLOCKS = (N + BLOCK_VALUES - 1) / BLOCK_VALUES;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;
/* What a token of a chunk becomes whose actions are illegal: -1, and 65535 among words of 16 bits. */
constexpr int ILLEGAL_TOKEN = -1;

typedef unsigned short uint16;
typedef long long Chunks;

/* @TABLES@ */

/* --- arithmetic -------------------------------------------------------------------------------------------------- */

/* @ARITHMETIC@ */

/*
 * atanh(p / levels - 1) = log(p / q) / 2, q = 2 levels - p, for the middle of a cell: p odd, levels from 1 to 2^18.
 * That is e ln 2 / 2 + atanh(s), s = (p' - q) / (p' + q), p' = p / 2^e. The difference of two floats' bits is nearly
 * 2^23 times the logarithm of their ratio to base 2; e is that, rounded.
 */
__device__ __forceinline__ float level_of(float p, float levels)
{
    constexpr int BIAS = 64;
    const float q = 2 * levels - p;
    const unsigned biased = (__float_as_uint(p) - __float_as_uint(q) + (BIAS << 23) + (1 << 22)) >> 23;
    const int e = (int)biased - BIAS;
    const float scaled = p * __int_as_float((127 - e) << 23);
    const float s = (scaled - q) / (scaled + q), square = s * s;
    /* Taylor's series: |s| <= 1/5, so what is left out is below 2^-26 of the sum. */
    float sum = 1.0f / 9;
    sum = fmaf(sum, square, 1.0f / 7);
    sum = fmaf(sum, square, 1.0f / 5);
    sum = fmaf(sum, square, 1.0f / 3);
    /* ln 2 / 2 in two parts, of which the first has so few digits that e times it is exact. */
    return fmaf((float)e, 0x1.62e4p-2f, fmaf((float)e, 0x1.7f7d1cp-21f, fmaf(s * square, sum, s)));
}

__device__ __forceinline__ float clamped(float x) { return fmaxf(fminf(x, 1.0f), -1.0f); }

__device__ __forceinline__ float sum_of_lanes(float x)
{
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

/* --- from latents to values --------------------------------------------------------------------------------------- */

/*
 * What latents [PADDED][CHUNKS] add to the means of values n, n + WARP, ... of chunks of a class. In four parts, each
 * of them and all of them from the last latent on, which is the smallest as a rule: so little is lost.
 */
template <int VALUES, int CHUNKS>
__device__ __forceinline__ void to_values(int c, int n, const float *latents, float (&sums)[VALUES][CHUNKS])
{
#pragma unroll 1
    for (int quarter = 3; quarter >= 0; --quarter) {
        float parts[VALUES][CHUNKS] = {};
#pragma unroll 2
        for (int i = QUARTER - 1; i >= 0; --i) {
            const int m = quarter * QUARTER + i;
#pragma unroll
            for (int v = 0; v < VALUES; ++v) {
                const float weight = DECODER_BASIS[c][m][n + v * WARP < N ? n + v * WARP : N - 1];
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; ++chunk)
                    parts[v][chunk] = fmaf(weight, latents[m * CHUNKS + chunk], parts[v][chunk]);
            }
        }
#pragma unroll
        for (int v = 0; v < VALUES; ++v)
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk)
                sums[v][chunk] += parts[v][chunk];
    }
}

/* --- decoder ------------------------------------------------------------------------------------------------------ */

__device__ __forceinline__ int class_of(uint16 word)
{
    const int c = word >> ROOM;
    return c < ESCAPE ? c : ESCAPE;
}

/*
 * Latent m of CHUNKS chunks of a class, from so many words [CHUNKS][L]. Every bit doubles the cell and adds itself; a
 * place is where it stands: 32 times its token, plus how far that has to be shifted for the bit to become the highest.
 */
template <int CHUNKS>
__device__ __forceinline__ void decode_latent(int c, int m, int num_tokens, const uint16 *words, float *latents)
{
    unsigned places[RANKS], cells[CHUNKS] = {};
    int count = 0;
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank)
        places[rank] = PLACE[c][rank][m];
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
        const int token = places[rank] / 32;
        if (token < num_tokens) {
            ++count;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk)
                cells[chunk] =
                    __funnelshift_l((unsigned)words[chunk * L + token] << places[rank] % 32, cells[chunk], 1);
        }
    }
    const float width = WIDTH[c][count][m], levels = (float)(1 << count);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
        latents[m * CHUNKS + chunk] = width * level_of(2 * (float)cells[chunk] + 1, levels);
}

/* Bit `place` of a code, behind the bits of the class. */
__device__ __forceinline__ int bit_at(const uint16 *words, int place)
{
    place += CLASS_BITS;
    return words[place / TOKEN_BITS] >> (TOKEN_BITS - 1 - place % TOKEN_BITS) & 1;
}

/* Value n from so many bits of escape: the middle of its cell. */
__device__ __forceinline__ float escape_value(int n, int num_bits, const uint16 *words)
{
    const int first = n / BLOCK_VALUES * BLOCK_BITS;
    int cell = 0, levels = 1;
    if (first + BLOCK_BITS <= num_bits) {
        for (int bit = 0; bit < BLOCK_BITS; ++bit)
            cell = 2 * cell + bit_at(words, first + bit);
        /* Words that no encoder sends mean the last that it may send. */
        cell = cell < BLOCK_WORDS ? cell : BLOCK_WORDS - 1;
        for (int i = n % BLOCK_VALUES; i < BLOCK_VALUES - 1; ++i)
            cell /= 3;
        cell %= 3, levels = 3;
    }
    for (int place = BLOCKS * BLOCK_BITS + n; place < num_bits; place += N)
        cell = 2 * cell + bit_at(words, place), levels *= 2;
    return (float)(2 * cell + 1) / (float)levels - 1;
}

__device__ __forceinline__ void put(float *action, float value, float unit, float offset, bool is_illegal)
{
    __stcs(action, is_illegal ? not_a_number() : fmaf(value, unit, offset));
}

__device__ __forceinline__ void put_value(float *chunk, int n, float value, bool is_illegal)
{
    put(chunk + n, value, UNITS[n], OFFSETS[n], is_illegal);
}

template <class Token>
__device__ __forceinline__ void decode_few(const Token *tokens, float *actions, int num_tokens)
{
    /* So few that each thread loads its weights when the class is known, and does not wait for them later. */
    constexpr bool ARE_HELD = 4 * N <= FEW_THREADS && QUARTER <= 16;
    __shared__ uint16 words[L];
    __shared__ float latents[PADDED];
    const Token *const own = tokens + (Chunks)blockIdx.x * num_tokens;
    float *const chunk = actions + (Chunks)blockIdx.x * N;
    bool is_illegal = false;
    for (int l = threadIdx.x; l < num_tokens; l += FEW_THREADS) {
        const unsigned token = own[l];
        is_illegal |= token >= VOCABULARY;
        words[l] = (uint16)token;
    }
    is_illegal = __syncthreads_or(is_illegal);
    const int c = class_of(words[0]), quarter = threadIdx.x % 4;
    if (c == ESCAPE) {
        for (int n = threadIdx.x; n < N; n += FEW_THREADS)
            put_value(chunk, n, escape_value(n, num_tokens * TOKEN_BITS - CLASS_BITS, words), is_illegal);
        return;
    }
    float held[ARE_HELD ? QUARTER : 1];
    const int first_n = threadIdx.x / 4 < N ? threadIdx.x / 4 : N - 1;
    float mean = MEAN[c][first_n], unit = UNITS[first_n], offset = OFFSETS[first_n];
    if constexpr (ARE_HELD)
#pragma unroll
        for (int i = 0; i < QUARTER; ++i)
            held[i] = DECODER_BASIS[c][quarter * QUARTER + i][first_n];
    for (int m = threadIdx.x; m < PADDED; m += FEW_THREADS)
        decode_latent<1>(c, m, num_tokens, words, latents);
    __syncthreads();
    /* As `to_values`, with a thread for each part. */
    for (int first = 0; first < N; first += FEW_THREADS / 4) {
        const int wanted = first + threadIdx.x / 4, n = wanted < N ? wanted : N - 1;
        float part = 0, sum = 0;
#pragma unroll
        for (int i = QUARTER - 1; i >= 0; --i) {
            const int m = quarter * QUARTER + i;
            part = fmaf(ARE_HELD ? held[ARE_HELD ? i : 0] : DECODER_BASIS[c][m][n], latents[m], part);
        }
#pragma unroll
        for (int q = 3; q >= 0; --q)
            sum += __shfl_sync(ALL_LANES, part, q, 4);
        if (first != 0)
            mean = MEAN[c][n], unit = UNITS[n], offset = OFFSETS[n];
        if (wanted < N && quarter == 0)
            put(chunk + n, clamped(mean + sum), unit, offset, is_illegal);
    }
}

#if HAS_MANY_DECODERS
constexpr int SLOTS = DECODED_CHUNKS + (CLASSES + 1) * (GROUP - 1);
constexpr uint16 NO_CHUNK = 0xFFFF;

/*
 * The numbers of `valid` chunks by class; each class begins a new group of GROUP slots, and what is left of its last is
 * filled with NO_CHUNK. Returns how many slots that takes. starts: room for the work.
 */
template <class Token>
__device__ __forceinline__ int sort_by_class(const Token *tokens, int valid, int num_tokens, int *starts, uint16 *slots)
{
    __shared__ int num_slots;
    for (int i = threadIdx.x; i < SLOTS; i += MANY_THREADS)
        slots[i] = NO_CHUNK;
    for (int c = threadIdx.x; c <= CLASSES; c += MANY_THREADS)
        starts[c] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < valid; i += MANY_THREADS)
        atomicAdd(&starts[class_of((uint16)tokens[i * num_tokens])], 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        int end = 0;
        for (int c = 0; c <= CLASSES; ++c) {
            const int count = starts[c];
            starts[c] = end;
            end += (count + GROUP - 1) / GROUP * GROUP;
        }
        num_slots = end;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < valid; i += MANY_THREADS)
        slots[atomicAdd(&starts[class_of((uint16)tokens[i * num_tokens])], 1)] = (uint16)i;
    __syncthreads();
    return num_slots;
}

/* Up to GROUP chunks of one class, by a warp. */
template <class Token>
__device__ __forceinline__ void decode_group(const Token *tokens, float *actions, int num_tokens, const uint16 *slots,
                                             uint16 *words, float *latents)
{
    const int lane = threadIdx.x % WARP;
    /* In place of chunks that are not there the first one, which is not written again. */
    int chunks[GROUP], valid = 0;
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
        valid += slots[i] != NO_CHUNK;
        chunks[i] = slots[slots[i] != NO_CHUNK ? i : 0];
    }
    unsigned illegal = 0;
#pragma unroll 1
    for (int l = lane; l < num_tokens; l += WARP) {
        /* All are under way before one is waited for. */
        unsigned own[GROUP];
#pragma unroll
        for (int i = 0; i < GROUP; ++i)
            own[i] = __ldcs(tokens + chunks[i] * num_tokens + l);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            illegal |= (unsigned)(own[i] >= VOCABULARY) << i;
            words[i * L + l] = (uint16)own[i];
        }
    }
#pragma unroll
    for (int i = 0; i < GROUP; ++i)
        illegal |= (unsigned)(__any_sync(ALL_LANES, illegal >> i & 1) != 0) << i;
    __syncwarp();
    const int c = class_of(words[0]);
    if (c == ESCAPE) {
        for (int i = 0; i < valid; ++i)
            for (int n = lane; n < N; n += WARP)
                put_value(actions + slots[i] * N, n,
                          escape_value(n, num_tokens * TOKEN_BITS - CLASS_BITS, words + i * L), illegal >> i & 1);
    } else {
        for (int m = lane; m < PADDED; m += WARP)
            decode_latent<GROUP>(c, m, num_tokens, words, latents);
        __syncwarp();
        for (int first = lane; first < N; first += 2 * WARP) {
            float sums[2][GROUP] = {};
            to_values(c, first, latents, sums);
#pragma unroll
            for (int v = 0; v < 2; ++v) {
                const int n = first + v * WARP;
                if (n >= N)
                    break;
                const float mean = MEAN[c][n], unit = UNITS[n], offset = OFFSETS[n];
#pragma unroll
                for (int i = 0; i < GROUP; ++i)
                    if (i < valid)
                        put(actions + chunks[i] * N + n, clamped(mean + sums[v][i]), unit, offset, illegal >> i & 1);
            }
        }
    }
    __syncwarp();
}

template <class Token>
__device__ __forceinline__ void decode_many(const Token *tokens, float *actions, Chunks chunks, int num_tokens)
{
    constexpr int WARPS = MANY_THREADS / WARP;
    __shared__ int starts[CLASSES + 1];
    __shared__ uint16 slots[SLOTS], words[WARPS][GROUP * L];
    alignas(16) __shared__ float latents[WARPS][PADDED * GROUP];
    const Chunks first = (Chunks)blockIdx.x * DECODED_CHUNKS, left = chunks - first;
    const int valid = left < DECODED_CHUNKS ? (int)left : DECODED_CHUNKS, warp = threadIdx.x / WARP;
    tokens += first * num_tokens, actions += first * N;
    const int num_slots = sort_by_class(tokens, valid, num_tokens, starts, slots);
    for (int slot = warp * GROUP; slot < num_slots; slot += WARPS * GROUP)
        decode_group(tokens, actions, num_tokens, slots + slot, words[warp], latents[warp]);
}
#endif

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
            float sums[1][1] = {};
            to_values(c, n, desk.latents, sums);
            errs |= !(fabsf(clamped(MEAN[c][n] + sums[0][0]) - x[n * CHUNKS]) <= BOUNDS[budget]);
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
#pragma unroll
        for (int rank = 0; rank < RANKS; ++rank) {
            const unsigned place = PLACE[c][rank][m], bit = digits >> (MOST_BITS - 1 - rank) & 1;
            if (place / 32 < L)
                atomicOr(&words[place / 32], (int)(bit << (31 - place % 32)));
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

/* --- kernels ------------------------------------------------------------------------------------------------------ */

/* @KERNELS@ */
