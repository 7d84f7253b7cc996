#include "rfsq_tokenizer.h"

#include <math.h>
#include <string.h>

/*
 * A chunk is N values in one row, and a class describes it by M latents. Latents are computed in panels of LANES, which
 * a compiler turns into vector instructions of any width without reordering a sum; values come in groups of SUMS, which
 * are independent sums, as many as a processor can have under way.
 */
enum { LANES = 16, SUMS = 8 };
enum { T = RFSQ_CHUNK_LENGTH, A = RFSQ_ACTION_DIM, L = RFSQ_NUM_TOKENS, N = T * A };
enum { CHECKED_CHUNKS = RFSQ_CHECKED_STEPS / T };
/* Of escape: so many values with three levels each are a word of eight bits; then each value gets its further bits. */
enum { BLOCK_VALUES = 5, BLOCK_BITS = 8, BLOCK_WORDS = 243, BLOCKS = (N + BLOCK_VALUES - 1) / BLOCK_VALUES };

/* @TABLES@ */

/* The class number that means escape; the tables are of those before it. Numbers behind it mean escape, too. */
enum { ESCAPE = CLASSES, CODE_BITS = L * TOKEN_BITS - CLASS_BITS };
/* Values and latents up to whole groups and panels; the tables are filled up with zeros. */
enum { ROWS = (N + SUMS - 1) / SUMS * SUMS, PANELS = (M + LANES - 1) / LANES, PADDED = PANELS * LANES };

_Static_assert(sizeof BASIS == sizeof(float[CLASSES][PANELS][ROWS][LANES]), "the table is padded as the code expects");
_Static_assert(CHECKED_CHUNKS >= 1, "values are checked in whole chunks");

/* @ONE_COPY@ */

/* --- arithmetic -------------------------------------------------------------------------------------------------- */

/* @ARITHMETIC@ */

/*
 * log(p / q) / 2 = e ln 2 / 2 + atanh(s), s = (p' - q) / (p' + q), p' = p / 2^e, for p and q from 1/2 to 2^20: e, and
 * atanh(s) returned. The difference of two floats' bits is nearly 2^23 times the logarithm of their ratio to base 2; e
 * is that, rounded.
 */
static inline float half_log_ratio(float p, float q, int32_t *e)
{
    enum { BIAS = 64 };
    const uint32_t biased = (bits_of(p) - bits_of(q) + ((uint32_t)BIAS << 23) + (1u << 22)) >> 23;
    *e = (int32_t)biased - BIAS;
    const float scaled = p * power_of_two(-*e);
    const float s = (scaled - q) / (scaled + q), square = s * s;
    /* Taylor's series: |s| <= 1/5, so what is left out is below 2^-26 of the sum. */
    float sum = 1.0f / 9;
    sum = sum * square + 1.0f / 7;
    sum = sum * square + 1.0f / 5;
    sum = sum * square + 1.0f / 3;
    return s * square * sum + s;
}

/* ln 2 / 2. */
#define HALF_LOG_2 0x1.62e42fefa39efp-2

/* atanh of the middle of the cell of y, -1 < y < 1, in a grid of 2 * half levels; 0 where that is one level. */
static inline float level_of(float y, float half)
{
    const float p = 2 * (float)(int32_t)(y * half + half) + 1;
    int32_t e;
    const float small = half_log_ratio(p, 4 * half - p, &e);
    return (float)e * (float)HALF_LOG_2 + small;
}

/* Of every 2 * half neighbours in x the first half plus the second. */
static inline void add_halves(int groups, int half, const double *restrict x, double *restrict y)
{
    for (int g = 0; g < groups; ++g)
        for (int i = 0; i < half; ++i)
            y[g * half + i] = x[g * 2 * half + i] + x[g * 2 * half + half + i];
}

/* x [groups][LANES] -> its sums over the lanes, [groups], for up to SUMS groups. */
static inline void sum_lanes(int groups, const double *restrict x, double *restrict sums)
{
    _Alignas(64) double sums_of_8[SUMS * 8], sums_of_4[SUMS * 4], sums_of_2[SUMS * 2];
    add_halves(groups, 8, x, sums_of_8);
    add_halves(groups, 4, sums_of_8, sums_of_4);
    add_halves(groups, 2, sums_of_4, sums_of_2);
    add_halves(groups, 1, sums_of_2, sums);
}

/* --- classes ----------------------------------------------------------------------------------------------------- */

/* One panel of latents, z [LANES], of the chunk x [ROWS]. */
static inline void to_latents(int class, int panel, const float *restrict x, float *restrict z)
{
    const float *const basis = BASIS[class][panel][0], *const mean = MEAN[class];
    _Alignas(64) float centred[ROWS];
    for (int n = 0; n < ROWS; ++n)
        centred[n] = x[n] - mean[n];
    for (int lane = 0; lane < LANES; ++lane) {
        float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0, sum4 = 0, sum5 = 0, sum6 = 0, sum7 = 0;
        for (int n = 0; n < ROWS; n += SUMS) {
            sum0 += centred[n] * basis[n * LANES + lane];
            sum1 += centred[n + 1] * basis[(n + 1) * LANES + lane];
            sum2 += centred[n + 2] * basis[(n + 2) * LANES + lane];
            sum3 += centred[n + 3] * basis[(n + 3) * LANES + lane];
            sum4 += centred[n + 4] * basis[(n + 4) * LANES + lane];
            sum5 += centred[n + 5] * basis[(n + 5) * LANES + lane];
            sum6 += centred[n + 6] * basis[(n + 6) * LANES + lane];
            sum7 += centred[n + 7] * basis[(n + 7) * LANES + lane];
        }
        z[lane] = ((sum0 + sum1) + (sum2 + sum3)) + ((sum4 + sum5) + (sum6 + sum7));
    }
}

/* y [LANES] = tanh of latents of this panel, each in the units of its width; -1 < y < 1. */
static inline void compand(int class, int panel, const float *restrict z, float *restrict y)
{
    for (int lane = 0; lane < LANES; ++lane)
        y[lane] = z[lane] * INVERSE_WIDTH[class][panel * LANES + lane];
    /* From 6.3 on every grid has y in its last cell, and up to 7 it is below 1. */
    hyperbolic_tangent(LANES, 7, y);
}

/* Not a number stays one: no robot may take what a broken table gives for the end of its range. */
static inline float clipped(float x)
{
    return x < -1 ? -1 : x > 1 ? 1 : x;
}

/* What z [PADDED] adds up to in SUMS values from n on, by the basis or by its squares. */
static inline void add_latents(int class, int n, int is_squared, const double *restrict z, double *restrict sums)
{
    _Alignas(64) double products[SUMS * LANES];
    for (int i = 0; i < SUMS; ++i)
        for (int lane = 0; lane < LANES; ++lane) {
            double sum = 0;
            for (int panel = 0; panel < PANELS; ++panel) {
                const float basis = BASIS[class][panel][n + i][lane];
                sum += z[panel * LANES + lane] * (is_squared ? basis * basis : basis);
            }
            products[i * LANES + lane] = sum;
        }
    sum_lanes(SUMS, products, sums);
}

/*
 * The chunk x [ROWS], clipped to [-1, 1], of all latents z [PADDED]. In double: tokens that no encoder sends may name
 * latents far beyond [-1, 1], of which float32 would lose more than a chunk may err by.
 */
static inline void to_chunk(int class, const double *restrict z, float *restrict x)
{
    for (int n = 0; n < ROWS; n += SUMS) {
        double sums[SUMS];
        add_latents(class, n, 0, z, sums);
        for (int i = 0; i < SUMS; ++i)
            x[n + i] = clipped((float)(MEAN[class][n + i] + sums[i]));
    }
}

/* --- encoder ----------------------------------------------------------------------------------------------------- */

/*
 * What one panel of latents adds to the cost of a class: their squared errors at the budgets, each with its weight.
 * held: what latents hold of the chunk's square so far.
 */
static inline double panel_cost(int class, int panel, const float *restrict x, double *restrict held)
{
    _Alignas(64) float z[LANES], y[LANES], costs[LANES] = {0};
    _Alignas(64) double terms[LANES];
    double sum;
    to_latents(class, panel, x, z);
    compand(class, panel, z, y);
#if HAS_REST
    for (int lane = 0; lane < LANES; ++lane)
        terms[lane] = (double)z[lane] * z[lane];
    sum_lanes(1, terms, &sum);
    *held += sum;
#else
    (void)held;
#endif
    for (int budget = 0; budget < BUDGETS; ++budget)
        for (int lane = 0; lane < LANES; ++lane) {
            const float half = BUDGET_HALF[class][panel][budget][lane];
            const float error = z[lane] - BUDGET_WIDTH[class][panel][budget][lane] * level_of(y[lane], half);
            costs[lane] += WEIGHTS[budget] * error * error;
        }
    for (int lane = 0; lane < LANES; ++lane)
        terms[lane] = costs[lane];
    sum_lanes(1, terms, &sum);
    return sum;
}

#if HAS_REST
/* What no latent holds costs its square at every budget. */
static double rest_cost(int class, const float *restrict x, double held)
{
    double sum = 0;
    for (int n = 0; n < N; ++n) {
        const double centred = x[n] - MEAN[class][n];
        sum += centred * centred;
    }
    return sum > held ? SUM_OF_WEIGHTS * (sum - held) : 0;
}
#endif

/* Whether the class, which compands the chunk x to y [PADDED], errs nowhere by more than escape would. */
static int keeps_bound(int class, const float *restrict x, const float *restrict y)
{
    for (int budget = 0; budget < BUDGETS; ++budget) {
        _Alignas(64) double z[PADDED];
        _Alignas(64) float decoded[ROWS];
        int errs = 0;
        for (int panel = 0; panel < PANELS; ++panel)
            for (int lane = 0; lane < LANES; ++lane) {
                const float half = BUDGET_HALF[class][panel][budget][lane];
                const float level = level_of(y[panel * LANES + lane], half);
                z[panel * LANES + lane] = BUDGET_WIDTH[class][panel][budget][lane] * level;
            }
        to_chunk(class, z, decoded);
        for (int n = 0; n < N; ++n)
            errs |= !(fabsf(decoded[n] - x[n]) <= BOUNDS[budget]);
        if (errs)
            return 0;
    }
    return 1;
}

/* The first class of the least cost. */
static int cheapest(const double *restrict costs)
{
    double least = costs[0];
    for (int class = 1; class < CLASSES; ++class)
        least = costs[class] < least ? costs[class] : least;
    int class = 0;
    while (costs[class] > least)
        ++class;
    return class;
}

/*
 * The cheapest class that keeps the bound, and the companded latents y [PADDED] of x [ROWS] in it; or ESCAPE.
 *
 * A cost only grows from panel to panel, whatever is rounded. So only the class that is cheapest so far is looked at
 * further: when that one is complete, no other can end up below it.
 */
static int choose(const float *restrict x, float *restrict y)
{
    double costs[CLASSES], held[CLASSES];
    int stages[CLASSES];
    for (int class = 0; class < CLASSES; ++class) {
        held[class] = 0;
        costs[class] = panel_cost(class, 0, x, &held[class]);
        stages[class] = 1;
    }
    for (;;) {
        const int class = cheapest(costs), stage = stages[class]++;
        if (costs[class] >= HUGE_VAL)
            return ESCAPE;
        if (stage < PANELS) {
            costs[class] += panel_cost(class, stage, x, &held[class]);
#if HAS_REST
        } else if (stage == PANELS) {
            costs[class] += rest_cost(class, x, held[class]);
#endif
        } else {
            for (int panel = 0; panel < PANELS; ++panel) {
                _Alignas(64) float z[LANES];
                to_latents(class, panel, x, z);
                compand(class, panel, z, y + panel * LANES);
            }
            /* No value errs by more than the length of all errors, which the cost bounds: mostly nothing is decoded. */
            if (costs[class] <= SURE_COST || keeps_bound(class, x, y))
                return class;
            costs[class] = HUGE_VAL;
        }
    }
}

/* The bits of a class: those of latents companded to y [PADDED], each the next of its latent, the highest first. */
static inline void write_code(int class, const float *restrict y, int32_t *restrict tokens)
{
    /* What each latent has left, shifted up to the top. */
    uint32_t digits[PADDED];
    for (int m = 0; m < PADDED; ++m) {
        const float half = 1 << (MOST_BITS - 1);
        digits[m] = (uint32_t)(int32_t)(y[m] * half + half) << (32 - MOST_BITS);
    }
    const latent_index *order = ORDER[class];
    for (int token = 0; token < L; ++token) {
        uint32_t word = token == 0 ? (uint32_t)class : 0;
        for (int bit = token == 0 ? CLASS_BITS : 0; bit < TOKEN_BITS; ++bit) {
            const int latent = *order++;
            word = word << 1 | digits[latent] >> 31;
            digits[latent] <<= 1;
        }
        tokens[token] = (int32_t)word;
    }
}

/* Bit `place` of a code, behind the bits of the class. */
static inline void put_bit(int32_t *tokens, int place, int32_t bit)
{
    place += CLASS_BITS;
    if (place < L * TOKEN_BITS)
        tokens[place / TOKEN_BITS] |= bit << (TOKEN_BITS - 1 - place % TOKEN_BITS);
}

/* The bits of escape: each value of x [ROWS] in its cell of 3 * 2^MOST_BITS. */
static void write_escape(const float *restrict x, int32_t *restrict tokens)
{
    int32_t cells[BLOCKS * BLOCK_VALUES] = {0};
    for (int n = 0; n < N; ++n) {
        /* Exact in double for every float, which is why nothing is added before the conversion. */
        const double place = (double)x[n] * (3 << (MOST_BITS - 1));
        const int32_t below = (int32_t)place - (place < (int32_t)place);
        const int32_t cell = below + (3 << (MOST_BITS - 1));
        cells[n] = cell < 3 << MOST_BITS ? cell : (3 << MOST_BITS) - 1;
    }
    memset(tokens, 0, L * sizeof *tokens);
    tokens[0] = ESCAPE << (TOKEN_BITS - CLASS_BITS);
    int place = 0;
    for (int block = 0; block < BLOCKS; ++block) {
        int32_t word = 0;
        for (int i = 0; i < BLOCK_VALUES; ++i)
            word = 3 * word + (cells[block * BLOCK_VALUES + i] >> MOST_BITS);
        for (int bit = BLOCK_BITS; bit-- > 0;)
            put_bit(tokens, place++, word >> bit & 1);
    }
    for (int bit = MOST_BITS; bit-- > 0 && place < CODE_BITS;)
        for (int n = 0; n < N; ++n)
            put_bit(tokens, place++, cells[n] >> bit & 1);
}

static void encode_chunk(const float *restrict actions, int32_t *restrict tokens)
{
    _Alignas(64) float x[ROWS] = {0}, y[PADDED];
    for (int n = 0; n < N; ++n)
        x[n] = clamped((actions[n] - OFFSETS[n]) * INVERSE_UNITS[n], -1, 1);
    const int class = choose(x, y);
    if (class == ESCAPE)
        write_escape(x, tokens);
    else
        write_code(class, y, tokens);
}

/* Whether every action is one that float32 can encode; not a number is neither above nor below anything. */
static int are_legal_actions(size_t count, const float *restrict actions)
{
    int illegal = 0;
    for (size_t i = 0; i < count; ++i)
        illegal |= !(actions[i] <= RFSQ_ACTION_LIMIT) | !(actions[i] >= -RFSQ_ACTION_LIMIT);
    return !illegal;
}

int rfsq_encode(const float *actions, size_t num_chunks, int32_t *tokens)
{
    for (size_t chunk = 0; chunk < num_chunks; ++chunk) {
        const size_t left = num_chunks - chunk;
        if (chunk % CHECKED_CHUNKS == 0
            && !are_legal_actions((left < CHECKED_CHUNKS ? left : CHECKED_CHUNKS) * N, actions + chunk * N))
            return RFSQ_ILLEGAL_VALUE;
        encode_chunk(actions + chunk * N, tokens + chunk * L);
    }
    return RFSQ_OK;
}

/* --- decoder ----------------------------------------------------------------------------------------------------- */

/* x [ROWS] from so many tokens of a class: every bit doubles the cell of its latent and adds itself. */
static inline void decode_class(int class, int num_tokens, const int32_t *restrict tokens, float *restrict x)
{
    /* In front of a latent's bits stands a one: where it is says how many they are. */
    int32_t cells[PADDED];
    for (int m = 0; m < PADDED; ++m)
        cells[m] = 1;
    const latent_index *order = ORDER[class];
    for (int token = 0; token < num_tokens; ++token)
        for (int bit = token == 0 ? TOKEN_BITS - CLASS_BITS : TOKEN_BITS; bit-- > 0;) {
            const int latent = *order++;
            cells[latent] = 2 * cells[latent] + (tokens[token] >> bit & 1);
        }
    _Alignas(64) double z[PADDED];
    _Alignas(64) float small[PADDED], width[PADDED];
    _Alignas(64) int32_t e[PADDED];
    for (int m = 0; m < PADDED; ++m) {
        const float marked = (float)cells[m], levels = float_of(bits_of(marked) & 0x7f800000u);
        const float p = 2 * (marked - levels) + 1;
        small[m] = half_log_ratio(p, 2 * levels - p, &e[m]);
    }
    for (int m = 0; m < PADDED; ++m)
        width[m] = WIDTH[class][m][(bits_of((float)cells[m]) >> 23) - 127];
    for (int m = 0; m < PADDED; ++m)
        z[m] = width[m] * (e[m] * HALF_LOG_2 + small[m]);
    to_chunk(class, z, x);
}

/* Bit `place` of a code, behind the bits of the class. */
static inline int32_t bit_at(const int32_t *tokens, int place)
{
    place += CLASS_BITS;
    return tokens[place / TOKEN_BITS] >> (TOKEN_BITS - 1 - place % TOKEN_BITS) & 1;
}

/* x [ROWS] from so many bits of escape: the middle of each value's cell. */
static void decode_escape(int num_bits, const int32_t *restrict tokens, float *restrict x)
{
    int32_t cells[BLOCKS * BLOCK_VALUES] = {0}, levels[BLOCKS * BLOCK_VALUES];
    const int blocks = num_bits / BLOCK_BITS < BLOCKS ? num_bits / BLOCK_BITS : BLOCKS;
    for (int n = 0; n < BLOCKS * BLOCK_VALUES; ++n)
        levels[n] = n < blocks * BLOCK_VALUES ? 3 : 1;
    for (int block = 0; block < blocks; ++block) {
        int32_t word = 0;
        for (int bit = 0; bit < BLOCK_BITS; ++bit)
            word = 2 * word + bit_at(tokens, block * BLOCK_BITS + bit);
        /* Words that no encoder sends mean the last that it may send. */
        word = word < BLOCK_WORDS ? word : BLOCK_WORDS - 1;
        for (int i = BLOCK_VALUES; i-- > 0; word /= 3)
            cells[block * BLOCK_VALUES + i] = word % 3;
    }
    const int more = num_bits - BLOCKS * BLOCK_BITS;
    for (int place = 0; place < more; ++place) {
        const int n = place % N;
        cells[n] = 2 * cells[n] + bit_at(tokens, BLOCKS * BLOCK_BITS + place);
        levels[n] *= 2;
    }
    for (int n = 0; n < N; ++n)
        x[n] = (float)(2 * cells[n] + 1) / (float)levels[n] - 1;
}

/*
 * A class, whatever the token holds. It is read once: where another thread writes tokens after they were checked, what is
 * compared with ESCAPE is still what finds the tables. Of all other tokens single bits are taken, of which any will do.
 */
static inline int class_of(const int32_t *first_token)
{
    const uint32_t word = (uint32_t)*(const volatile int32_t *)first_token;
    return (int)(word >> (TOKEN_BITS - CLASS_BITS) & ((1u << CLASS_BITS) - 1));
}

ONE_COPY static void decode_chunk(int num_tokens, const int32_t *restrict tokens, float *restrict actions)
{
    _Alignas(64) float x[ROWS];
    const int class = class_of(tokens);
    if (class < ESCAPE)
        decode_class(class, num_tokens, tokens, x);
    else
        decode_escape(num_tokens * TOKEN_BITS - CLASS_BITS, tokens, x);
    for (int n = 0; n < N; ++n)
        actions[n] = x[n] * UNITS[n] + OFFSETS[n];
}

/* Negative tokens are the largest as unsigned numbers. */
static int are_legal_tokens(size_t count, const int32_t *restrict tokens)
{
    int illegal = 0;
    for (size_t i = 0; i < count; ++i)
        illegal |= (uint32_t)tokens[i] >= RFSQ_VOCABULARY;
    return !illegal;
}

int rfsq_decode(const int32_t *tokens, size_t num_tokens, size_t num_chunks, float *actions)
{
    if (num_tokens < 1 || num_tokens > L)
        return RFSQ_ILLEGAL_VALUE;
    for (size_t chunk = 0; chunk < num_chunks; ++chunk) {
        const size_t left = num_chunks - chunk, checked = left < CHECKED_CHUNKS ? left : CHECKED_CHUNKS;
        if (chunk % CHECKED_CHUNKS == 0 && !are_legal_tokens(checked * num_tokens, tokens + chunk * num_tokens))
            return RFSQ_ILLEGAL_VALUE;
        decode_chunk((int)num_tokens, tokens + chunk * num_tokens, actions + chunk * N);
    }
    return RFSQ_OK;
}

/* @BELIEFS@ */
