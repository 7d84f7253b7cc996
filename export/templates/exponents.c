#ifdef __AVX__
#include <immintrin.h>
#endif

/* 2^y for y <= 0: exact for whole y, and 0 from -127 on. What is not a number stays so. */
static inline float power_of(float y)
{
    /* The smaller magnitude as a whole number: of floats, GCC would compute each side of the limit by itself. */
    const uint32_t bits = bits_of(y), lowest = bits_of(-127);
    const float limited = float_of(bits < lowest ? bits : lowest);
    const float shifted = limited + 0x1.8p+23f, f = limited - (shifted - 0x1.8p+23f), square = f * f;
    /* Fitted to 2^f with a relative error of at most 1e-7, in pairs: no step waits for all before it. */
    const float low = 0x1p+0f + 0x1.62e42ap-1f * f, high = 0x1.ebf9c2p-3f + 0x1.c6b6dap-5f * f;
    const float p = low + square * (high + square * (0x1.3ce8b2p-7f + 0x1.5bd97cp-10f * f));
    const float power = float_of(bits_of(p) + (bits_of(shifted) << 23));
    return y <= 0 ? power : y;
}

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

/* What a difference of logits is multiplied by to be an exponent of `power_of`: sharpness / ln 2, and finite. */
static inline float scale_of(float sharpness)
{
    return clamped(sharpness * 0x1.715476p+0f, 0, 0x1.fffffep+127f);
}
