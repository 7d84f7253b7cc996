static inline float clamped(float x, float lowest, float highest)
{
    const float below = x < highest ? x : highest;
    return below > lowest ? below : lowest;
}

static inline uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* 2^n for whole n from -126 to 127. */
static inline float power_of_two(int32_t n)
{
    return float_of((uint32_t)(n + 127) << 23);
}

/* exp(x) - 1 = power * tail + (power - 1) for |x| <= 87; tail = exp(r) - 1 is accurate however small r is. */
static inline float exp_tail(float x, float *power)
{
    /* Adding 1.5 * 2^23 rounds to a whole number. */
    const float n = (x * 0x1.715476p+0f + 0x1.8p+23f) - 0x1.8p+23f;
    /* ln 2 in two parts, of which the first has so few digits that n times it is exact. */
    const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    /* Taylor's series: |r| <= ln 2 / 2, so what is left out is below 2^-27 of the tail. */
    float sum = 1.0f / 40320;
    sum = sum * r + 1.0f / 5040;
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    *power = power_of_two((int32_t)n);
    return sum * r * r + r;
}

/* tanh(x) = m / (m + 2) with m = exp(2 x) - 1; beyond |x| = most <= 43 as there. From 10 on it is 1. */
static inline void hyperbolic_tangent(int count, float most, float *restrict values)
{
    const uint32_t limit = bits_of(most);
    for (int i = 0; i < count; ++i) {
        /* The smaller magnitude as a whole number: of floats, GCC would compute each side of the limit by itself. */
        const uint32_t bits = bits_of(values[i]), sign = bits & 0x80000000u, magnitude = bits ^ sign;
        const float x = float_of((magnitude < limit ? magnitude : limit) | sign);
        float power;
        const float tail = exp_tail(2 * x, &power);
        const float m = power * tail + (power - 1);
        values[i] = m / (m + 2);
    }
}
