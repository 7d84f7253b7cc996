/*
 * One kernel for each way and type of tokens, in two kinds. The `few` kernels are for a control loop: a block for each
 * chunk. The `many` kernels are for data: chunks share what is read of a class. Encoders try every class on some chunks
 * at once; decoders sort the chunks by their class first.
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

/* Nearly always the float next to a / b, for numbers far from the ends of their range. */
__device__ __forceinline__ float quotient(float a, float b)
{
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
    const float nearly = a * inverse;
    return fmaf(fmaf(-nearly, b, a), inverse, nearly);
}

/*
 * atanh((p - q) / (p + q)) = log(p / q) / 2, where neither is more than 2^19 times the other, in any unit. That is e ln 2 / 2 + atanh(s), s = (p' - q) / (p' + q), p' = p / 2^e. The difference of two floats' bits is nearly
 * 2^23 times the logarithm of their ratio to base 2; e is that, rounded.
 */
__device__ __forceinline__ float level_between(float p, float q)
{
    constexpr int BIAS = 64;
    const unsigned biased = (__float_as_uint(p) - __float_as_uint(q) + (BIAS << 23) + (1 << 22)) >> 23;
    const int e = (int)biased - BIAS;
    const float scaled = p * __int_as_float((127 - e) << 23);
    const float s = quotient(scaled - q, scaled + q), square = s * s;
    /* Taylor's series: |s| <= 1/5, so what is left out is below 2^-26 of the sum. */
    float sum = 1.0f / 9;
    sum = fmaf(sum, square, 1.0f / 7);
    sum = fmaf(sum, square, 1.0f / 5);
    sum = fmaf(sum, square, 1.0f / 3);
    /* ln 2 / 2 in two parts, of which the first has so few digits that e times it is exact. */
    return fmaf((float)e, 0x1.62e4p-2f, fmaf((float)e, 0x1.7f7d1cp-21f, fmaf(s * square, sum, s)));
}

/* atanh(p / levels - 1) of the middle of a cell. */
__device__ __forceinline__ float level_of(float p, float levels) { return level_between(p, 2 * levels - p); }

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
 * What latents [PADDED] add to the mean of value n of a class. In four parts, each of them and all of them from the
 * last latent on, which is the smallest as a rule: so little is lost.
 */
__device__ __forceinline__ float to_value(int c, int n, const float *latents)
{
    float sum = 0;
#pragma unroll 1
    for (int quarter = 3; quarter >= 0; --quarter) {
        float part = 0;
#pragma unroll 2
        for (int m = (quarter + 1) * QUARTER - 1; m >= quarter * QUARTER; --m)
            part = fmaf(DECODER_BASIS[c][m][n], latents[m], part);
        sum += part;
    }
    return sum;
}

/* --- what decoders share ------------------------------------------------------------------------------------------ */

__device__ __forceinline__ int class_of(uint16 word)
{
    const int c = word >> ROOM;
    return c < ESCAPE ? c : ESCAPE;
}

/*
 * The places of the bits of a latent, two a word: 32 times the token, plus how far left the token is to be rotated for
 * the bit to stand where it counts, the first at the top of 32. Of two tokens in one word, the first in its lower half,
 * the same turn brings the bit of the second to where it counts in the lower half.
 */
struct Places {
    uint4 words[PLACE_WORDS / 4];
};

__device__ __forceinline__ Places places_of(int c, int m)
{
    Places places;
    const uint4 *const source = reinterpret_cast<const uint4 *>(PLACE[c][m]);
#pragma unroll
    for (int i = 0; i < PLACE_WORDS / 4; ++i)
        places.words[i] = source[i];
    return places;
}

/* rank: known when this is compiled. */
__device__ __forceinline__ unsigned place_at(const Places &places, int rank)
{
    const uint4 four = places.words[rank / 8];
    const unsigned two = rank / 2 % 4 == 0 ? four.x : rank / 2 % 4 == 1 ? four.y : rank / 2 % 4 == 2 ? four.z : four.w;
    return rank % 2 ? two >> 16 : two & 0xFFFF;
}

/* How many bits of a latent are there. */
__device__ __forceinline__ int count_of(const Places &places, int num_tokens)
{
    int count = 0;
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank)
        count += (int)(place_at(places, rank) / 32) < num_tokens;
    return count;
}

/* Bit `place` of a code, behind the bits of the class. Its tokens are STRIDE apart. */
template <int STRIDE> __device__ __forceinline__ int bit_at(const uint16 *words, int place)
{
    place += CLASS_BITS;
    return words[place / TOKEN_BITS * STRIDE] >> (TOKEN_BITS - 1 - place % TOKEN_BITS) & 1;
}

/* Value n from so many bits of escape: the middle of its cell. */
template <int STRIDE> __device__ __forceinline__ float escape_value(int n, int num_bits, const uint16 *words)
{
    const int first = n / BLOCK_VALUES * BLOCK_BITS;
    int cell = 0, levels = 1;
    if (first + BLOCK_BITS <= num_bits) {
        for (int bit = 0; bit < BLOCK_BITS; ++bit)
            cell = 2 * cell + bit_at<STRIDE>(words, first + bit);
        /* Words that no encoder sends mean the last that it may send. */
        cell = cell < BLOCK_WORDS ? cell : BLOCK_WORDS - 1;
        for (int i = n % BLOCK_VALUES; i < BLOCK_VALUES - 1; ++i)
            cell /= 3;
        cell %= 3, levels = 3;
    }
    for (int place = BLOCKS * BLOCK_BITS + n; place < num_bits; place += N)
        cell = 2 * cell + bit_at<STRIDE>(words, place), levels *= 2;
    return (float)(2 * cell + 1) / (float)levels - 1;
}

__device__ __forceinline__ void put(float *action, float value, float unit, float offset, bool is_illegal)
{
    __stcs(action, is_illegal ? not_a_number() : fmaf(value, unit, offset));
}

/* @DECODE_FEW@ */

/* @DECODE_MANY@ */

/* @ENCODE@ */

/* @BELIEFS@ */

/* --- kernels ------------------------------------------------------------------------------------------------------ */

/* @KERNELS@ */
