__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7FFFFFFF); }

/* tanh(x) = m / (m + 2) with m = exp(2 x) - 1 = 2^n exp(r) - 1; beyond |x| = most <= 40 as there. From 10 on it is 1. */
__device__ __forceinline__ float hyperbolic_tangent(float x, float most)
{
    const float twice = 2 * fmaxf(fminf(x, most), -most);
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
