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

/* Whether all are positive, and none so large or small that a power of its logits says nothing. */
static inline int are_sharpness(size_t count, const float *sharpness)
{
    int illegal = 0;
    for (size_t i = 0; i < count; ++i)
        illegal |= !(sharpness[i] >= 1e-31f && sharpness[i] <= 1e31f);
    return !illegal;
}

/* What a difference of logits is multiplied by to be an exponent of `power_of`: sharpness / ln 2, and finite. */
static inline float scale_of(float sharpness)
{
    return clamped(sharpness * 0x1.715476p+0f, 0, 0x1.fffffep+127f);
}
