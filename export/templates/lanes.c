#ifdef __AVX__
#include <immintrin.h>
#endif

/*
 * `lanes` are as many floats as a vector has, with which C computes as with one; AT_ONCE is how many. load_levels:
 * given [AT_ONCE][K] -> levels [K]; of a loop, compilers make loads of single floats, which take longer than all the
 * rest. WHERE_AT_MOST: x in those lanes where a <= b.
 */
#if defined(__AVX512F__) && RFSQ_NUM_LEVELS <= 8
typedef __m512 lanes;
enum { AT_ONCE = 16 };
#define FILLED(x) _mm512_set1_ps(x)
#define LOAD(from) _mm512_loadu_ps(from)
#define STORE(to, x) _mm512_storeu_ps(to, x)
#define LARGER(a, b) _mm512_max_ps(a, b)
#define SMALLER(a, b) _mm512_min_ps(a, b)
#define WHERE_AT_MOST(a, b, x, otherwise) _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), otherwise, x)

static inline void load_levels(const float *restrict given, lanes *restrict levels)
{
    /* Of two loads of two tokens each, the first four levels of all four tokens, and those behind. */
#define PLACES(k) (k), K + (k), 16 + (k), 16 + K + (k)
    static _Alignas(64) const int32_t places[2][16] = {
        {PLACES(0), PLACES(1), PLACES(2), PLACES(3)},
        {PLACES(4), PLACES(5), PLACES(6), PLACES(7)},
    };
#undef PLACES
    const __mmask16 two_tokens = (__mmask16)((1u << 2 * K) - 1);
    lanes pairs[8];
    for (int pair = 0; pair < 8; ++pair)
        pairs[pair] = _mm512_maskz_loadu_ps(two_tokens, given + 2 * pair * K);
    for (int k = 0; k < K; k += 4) {
        const __m512i place = _mm512_load_si512(places[k / 4]);
        const lanes row0 = _mm512_permutex2var_ps(pairs[0], place, pairs[1]);
        const lanes row1 = _mm512_permutex2var_ps(pairs[2], place, pairs[3]);
        const lanes row2 = _mm512_permutex2var_ps(pairs[4], place, pairs[5]);
        const lanes row3 = _mm512_permutex2var_ps(pairs[6], place, pairs[7]);
        const lanes low01 = _mm512_shuffle_f32x4(row0, row1, 0x44), high01 = _mm512_shuffle_f32x4(row0, row1, 0xee);
        const lanes low23 = _mm512_shuffle_f32x4(row2, row3, 0x44), high23 = _mm512_shuffle_f32x4(row2, row3, 0xee);
        const lanes found[] = {
            _mm512_shuffle_f32x4(low01, low23, 0x88), _mm512_shuffle_f32x4(low01, low23, 0xdd),
            _mm512_shuffle_f32x4(high01, high23, 0x88), _mm512_shuffle_f32x4(high01, high23, 0xdd),
        };
        for (int level = k; level < K && level < k + 4; ++level)
            levels[level] = found[level - k];
    }
}
#elif defined(__AVX__) && RFSQ_NUM_LEVELS >= 4
typedef __m256 lanes;
enum { AT_ONCE = 8 };
#define FILLED(x) _mm256_set1_ps(x)
#define LOAD(from) _mm256_loadu_ps(from)
#define STORE(to, x) _mm256_storeu_ps(to, x)
#define LARGER(a, b) _mm256_max_ps(a, b)
#define SMALLER(a, b) _mm256_min_ps(a, b)
#define WHERE_AT_MOST(a, b, x, otherwise) _mm256_blendv_ps(otherwise, x, _mm256_cmp_ps(a, b, _CMP_LE_OQ))

static inline void load_levels(const float *restrict given, lanes *restrict levels)
{
    for (int k = 0; k < K; k += 4) {
        /* The last four levels may be some of those before once more. */
        const int first = k + 4 <= K ? k : K - 4;
#define HALF(j) _mm_loadu_ps(given + (j)*K + first)
#define ROW(j) _mm256_insertf128_ps(_mm256_castps128_ps256(HALF(j)), HALF((j) + 4), 1)
        const lanes low01 = _mm256_unpacklo_ps(ROW(0), ROW(1)), high01 = _mm256_unpackhi_ps(ROW(0), ROW(1));
        const lanes low23 = _mm256_unpacklo_ps(ROW(2), ROW(3)), high23 = _mm256_unpackhi_ps(ROW(2), ROW(3));
#undef ROW
#undef HALF
        levels[first] = _mm256_shuffle_ps(low01, low23, 0x44);
        levels[first + 1] = _mm256_shuffle_ps(low01, low23, 0xee);
        levels[first + 2] = _mm256_shuffle_ps(high01, high23, 0x44);
        levels[first + 3] = _mm256_shuffle_ps(high01, high23, 0xee);
    }
}
#elif defined(__GNUC__)
typedef float lanes __attribute__((vector_size(16)));
typedef int32_t lane_bits __attribute__((vector_size(16)));
enum { AT_ONCE = 4 };
#define FILLED(x) ((lanes){x, x, x, x})
#define LOAD(from) loaded(from)
#define STORE(to, x) stored(to, x)
#define LARGER(a, b) selected((a) > (b), a, b)
#define SMALLER(a, b) selected((a) < (b), a, b)
#define WHERE_AT_MOST(a, b, x, otherwise) selected((a) <= (b), x, otherwise)

static inline lanes loaded(const float *from)
{
    lanes x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline void stored(float *to, lanes x)
{
    memcpy(to, &x, sizeof x);
}

static inline lanes selected(lane_bits where, lanes x, lanes otherwise)
{
    return (lanes)(((lane_bits)x & where) | ((lane_bits)otherwise & ~where));
}

static inline void load_levels(const float *restrict given, lanes *restrict levels)
{
    for (int k = 0; k < K; ++k)
        levels[k] = (lanes){given[k], given[K + k], given[2 * K + k], given[3 * K + k]};
}
#else
typedef float lanes;
enum { AT_ONCE = 1 };
#define FILLED(x) (x)
#define LOAD(from) (*(from))
#define STORE(to, x) (*(to) = (x))
#define LARGER(a, b) ((a) > (b) ? (a) : (b))
#define SMALLER(a, b) ((a) < (b) ? (a) : (b))
#define WHERE_AT_MOST(a, b, x, otherwise) ((a) <= (b) ? (x) : (otherwise))

static inline void load_levels(const float *restrict given, lanes *restrict levels)
{
    for (int k = 0; k < K; ++k)
        levels[k] = given[k];
}
#endif

/* `power_of`, in the place of each y. */
static inline void powers(int count, float *y)
{
    int i = 0;
#ifdef __AVX512DQ__
    /* In half as many instructions: two of them do what `power_of` does before and behind its polynomial. */
#pragma GCC unroll 4
    for (; i + 16 <= count; i += 16) {
        __m512 exponent = _mm512_loadu_ps(y + i);
        /* From a register: an AMD Zen 5 takes several times as long where either of the two reads memory. */
        __asm__("" : "+v"(exponent));
        /* Less the whole number at or below it. */
        const __m512 f = _mm512_reduce_ps(exponent, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        /* Fitted to 2^f with a relative error of at most 1e-7. */
        const float factors[] = {0x1.277824p-7f, 0x1.c91cf0p-5f, 0x1.ebdb56p-3f, 0x1.62e4bap-1f, 1};
        __m512 p = _mm512_set1_ps(0x1.e975aap-10f);
        for (int term = 0; term < 5; ++term)
            p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(factors[term]));
        _mm512_storeu_ps(y + i, _mm512_scalef_ps(p, exponent));
    }
#endif
    for (; i < count; ++i)
        y[i] = power_of(y[i]);
}
