/* --- beliefs ----------------------------------------------------------------------------------------------------- */

/* @EXPONENTS@ */

/* FIRST_BITS: those of the first token behind its class; PART: so many words are added up at once. */
enum { ALL_CLASSES = CLASSES + 1, FIRST_BITS = TOKEN_BITS - CLASS_BITS, WORDS = 1 << TOKEN_BITS, PART = 64 };

/*
 * What is believed of a chunk. weights: of each class, up to a factor, 0 where it cannot be. ones: probabilities that a
 * code bit is 1; `first` has those in the first token, given each class, and `given_class` puts them in their place.
 * There is room for a block of escape more, which compilers would warn of.
 */
struct belief {
    double weights[ALL_CLASSES], first[ALL_CLASSES][FIRST_BITS + 1], ones[CODE_BITS + BLOCK_BITS];
};

/* What is given of chunks: distributions of words, or of classes, and bits. */
struct given {
    int is_logits, num_tokens;
    const float *words, *classes, *bits;
};

/* How numbers are read: e^(sharpness (x - largest)) of logits, with scale = sharpness / ln 2, or as they are. */
struct reading {
    int is_logits;
    float largest, scale;
};

static inline double sum_of(int count, const float *restrict x)
{
    _Alignas(64) double sums[LANES] = {0};
    double sum, rest = 0;
    const int whole = count / LANES * LANES;
    for (int i = 0; i < whole; i += LANES)
        for (int lane = 0; lane < LANES; ++lane)
            sums[lane] += x[i + lane];
    for (int i = whole; i < count; ++i)
        rest += x[i];
    sum_lanes(1, sums, &sum);
    return sum + rest;
}

/* The other way round, too: a whole number that is in the order of floats, and the float of such a number. */
static inline uint32_t ordered(uint32_t bits)
{
    return bits ^ (bits >> 31) * 0x7fffffffu;
}

/* As a whole number, for which compilers take vectors. */
static inline float largest_of(int count, const float *restrict x)
{
    int32_t largest = INT32_MIN;
    for (int i = 0; i < count; ++i) {
        const int32_t value = (int32_t)ordered(bits_of(x[i]));
        largest = value > largest ? value : largest;
    }
    return float_of(ordered((uint32_t)largest));
}

/* Whether one distribution is legal. */
static inline int is_distribution(int is_logits, int count, const float *restrict given)
{
    int illegal = 0, possible = 0;
    if (is_logits) {
        for (int i = 0; i < count; ++i) {
            illegal |= !(given[i] < HUGE_VALF);
            possible |= given[i] > -HUGE_VALF;
        }
        illegal |= !possible;
    } else {
        for (int i = 0; i < count; ++i)
            illegal |= !(given[i] >= 0);
        illegal |= !(fabs(sum_of(count, given) - 1) <= SUM_TOLERANCE);
    }
    return !illegal;
}

static inline struct reading reading_of(int is_logits, float sharpness, int count, const float *restrict given)
{
    const struct reading reading = {is_logits, largest_of(count, given), scale_of(sharpness)};
    return reading;
}

/* powers [count] of what is given, as probable but for a factor. */
static inline void read_powers(struct reading reading, int count, const float *restrict given, float *restrict powers)
{
    if (reading.is_logits)
        for (int i = 0; i < count; ++i)
            powers[i] = power_of((given[i] - reading.largest) * reading.scale);
    else
        for (int i = 0; i < count; ++i)
            powers[i] = given[i];
}

/*
 * The words of so many bits: what they add up to, returned, and added to sums [bits][2] of those with a 0 and of those
 * with a 1 in each bit, the highest first. All of a bit are added at last, when its two halves are left.
 */
static inline double add_words(struct reading reading, int bits, const float *restrict given, double (*restrict sums)[2])
{
    const int words = 1 << bits, part = words < PART ? words : PART;
    _Alignas(64) float powers[PART];
    _Alignas(64) double folded[PART] = {0};
    double all = 0;
    int low = bits;
    while (1 << low > part)
        --low;
    for (int first = 0; first < words; first += part) {
        read_powers(reading, part, given + first, powers);
        for (int i = 0; i < part; ++i)
            folded[i] += powers[i];
        const double sum = sum_of(part, powers);
        all += sum;
        for (int bit = 0; bit < bits - low; ++bit)
            sums[bit][first >> (bits - 1 - bit) & 1] += sum;
    }
    for (int bit = bits - low; bit < bits; ++bit) {
        const int half = 1 << (bits - 1 - bit);
        for (int i = 0; i < half; ++i) {
            sums[bit][0] += folded[i];
            sums[bit][1] += folded[half + i];
            folded[i] += folded[half + i];
        }
    }
    return all;
}

/* Probabilities that bits are 1, of the sums over words. */
static inline void to_ones(int bits, double (*restrict sums)[2], double *restrict ones)
{
    for (int bit = 0; bit < bits; ++bit)
        ones[bit] = sums[bit][1] / (sums[bit][0] + sums[bit][1]);
}

static void believe_words(struct given given, const float *restrict sharpness, struct belief *restrict belief)
{
    const struct reading reading = reading_of(given.is_logits, sharpness[0], WORDS, given.words);
    double sums[TOKEN_BITS][2];
    for (int class = 0; class < ALL_CLASSES; ++class) {
        /* Numbers behind the last class mean it, too. */
        const int end = class < ESCAPE ? class + 1 : 1 << CLASS_BITS;
        memset(sums, 0, sizeof sums);
        belief->weights[class] = 0;
        for (int number = class; number < end; ++number)
            belief->weights[class] += add_words(reading, FIRST_BITS, given.words + (number << FIRST_BITS), sums);
        if (belief->weights[class] > 0)
            to_ones(FIRST_BITS, sums, belief->first[class]);
    }
    for (int token = 1; token < given.num_tokens; ++token) {
        const float *const words = given.words + token * WORDS;
        memset(sums, 0, sizeof sums);
        add_words(reading_of(given.is_logits, sharpness[token], WORDS, words), TOKEN_BITS, words, sums);
        to_ones(TOKEN_BITS, sums, belief->ones + token * TOKEN_BITS - CLASS_BITS);
    }
}

static inline double one_of_logit(float logit, float sharpness)
{
    const double power = power_of(-fabsf(logit * scale_of(sharpness)));
    return (logit < 0 ? power : 1) / (1 + power);
}

static void believe_bits(struct given given, const float *restrict sharpness, struct belief *restrict belief)
{
    float powers[ALL_CLASSES];
    const struct reading reading = reading_of(given.is_logits, sharpness[0], ALL_CLASSES, given.classes);
    read_powers(reading, ALL_CLASSES, given.classes, powers);
    for (int class = 0; class < ALL_CLASSES; ++class)
        belief->weights[class] = powers[class];
    for (int j = 0; j < given.num_tokens * TOKEN_BITS - CLASS_BITS; ++j) {
        const double one = given.is_logits ? one_of_logit(given.bits[j], sharpness[1 + j]) : given.bits[j];
        belief->ones[j] = one;
        for (int class = 0; class < ALL_CLASSES && j < FIRST_BITS; ++class)
            belief->first[class][j] = one;
    }
}

static inline void given_class(struct belief *belief, int class)
{
    memcpy(belief->ones, belief->first[class], FIRST_BITS * sizeof(double));
}

/* Cells and levels [PADDED] of the latents as so many bits are expected; `share` [num_bits] of each in its latent. */
struct cells {
    double cells[PADDED], levels[PADDED], share[CODE_BITS + BLOCK_BITS];
    float width[PADDED];
};

/* `half_log_ratio`, which is right where p is near q, too, because `apart` says by how much. */
static inline float half_log_ratio_apart(float p, float q, float apart)
{
    int32_t e;
    half_log_ratio(p, q, &e);
    const float scaled = p * power_of_two(-e);
    const float s = (e == 0 ? apart : scaled - q) / (scaled + q), square = s * s;
    const float series = 1 + square * (1.0f / 3 + square * (1.0f / 5 + square * (1.0f / 7 + square * (1.0f / 9))));
    return (float)e * (float)HALF_LOG_2 + s * series;
}

/*
 * Variances [ROWS] of the values of a class. A bit that is 1 with probability p adds p (1 - p) D^2 to that of its
 * latent: by D it moves the latent, the other bits as they are expected.
 */
static void spread_class(const struct cells *of, const double *restrict ones, int class, int num_bits,
                         double *restrict variances)
{
    _Alignas(64) float upper[CODE_BITS + BLOCK_BITS], lower[CODE_BITS + BLOCK_BITS], apart[CODE_BITS + BLOCK_BITS];
    _Alignas(64) double spread[PADDED] = {0};
    for (int j = 0; j < num_bits; ++j) {
        /* With a 1, a latent is atanh(above / levels - 1), and with a 0, atanh(below / levels - 1). */
        const int latent = ORDER[class][j];
        const double p = 2 * of->cells[latent] + 1, all = 2 * of->levels[latent], step = of->levels[latent] * of->share[j];
        const double above = p + (1 - ones[j]) * step, below = p - ones[j] * step;
        upper[j] = (float)(above * (all - below));
        lower[j] = (float)(below * (all - above));
        apart[j] = (float)(all * step);
    }
    for (int j = 0; j < num_bits; ++j) {
        const float moved = half_log_ratio_apart(upper[j], lower[j], apart[j]);
        apart[j] = (float)(ones[j] * (1 - ones[j])) * (moved * moved);
    }
    for (int j = 0; j < num_bits; ++j)
        spread[ORDER[class][j]] += apart[j];
    for (int m = 0; m < PADDED; ++m)
        spread[m] *= of->width[m] * of->width[m];
    for (int n = 0; n < ROWS; n += SUMS)
        add_latents(class, n, 1, spread, variances + n);
    /* What lies between -1 and 1 has no greater variance. */
    for (int n = 0; n < ROWS; ++n)
        variances[n] = variances[n] < 1 ? variances[n] : 1;
}

/* Expected values x [ROWS] of a class, from so many code bits, and with `variances` [ROWS] their variances. */
static void believe_class(const double *restrict ones, int class, int num_bits, float *restrict x,
                          double *restrict variances)
{
    /* As in `decode_class`: cells are expected ones. */
    struct cells of;
    double shares[PADDED];
    for (int m = 0; m < PADDED; ++m) {
        of.cells[m] = 0;
        of.levels[m] = shares[m] = 1;
    }
    for (int j = 0; j < num_bits; ++j) {
        const int latent = ORDER[class][j];
        of.cells[latent] = 2 * of.cells[latent] + ones[j];
        of.levels[latent] *= 2;
        of.share[j] = shares[latent];
        shares[latent] /= 2;
    }
    _Alignas(64) double z[PADDED];
    _Alignas(64) float small[PADDED];
    _Alignas(64) int32_t e[PADDED];
    for (int m = 0; m < PADDED; ++m) {
        const double p = 2 * of.cells[m] + 1;
        small[m] = half_log_ratio((float)p, (float)(2 * of.levels[m] - p), &e[m]);
    }
    for (int m = 0; m < PADDED; ++m)
        of.width[m] = WIDTH[class][m][(bits_of((float)of.levels[m]) >> 23) - 127];
    for (int m = 0; m < PADDED; ++m)
        z[m] = of.width[m] * (e[m] * HALF_LOG_2 + small[m]);
    to_chunk(class, z, x);
    if (variances != NULL)
        spread_class(&of, ones, class, num_bits, variances);
}

/* The same of escape. */
static void believe_escape(const double *restrict ones, int num_bits, float *restrict x, double *restrict variances)
{
    double cells[BLOCKS * BLOCK_VALUES] = {0}, spread[BLOCKS * BLOCK_VALUES] = {0}, levels[BLOCKS * BLOCK_VALUES];
    const int blocks = num_bits / BLOCK_BITS < BLOCKS ? num_bits / BLOCK_BITS : BLOCKS;
    for (int n = 0; n < BLOCKS * BLOCK_VALUES; ++n)
        levels[n] = n < blocks * BLOCK_VALUES ? 3 : 1;
    for (int block = 0; block < blocks; ++block) {
        /* How probable each word of the first bits is: each further bit makes two of one. */
        double words[1 << BLOCK_BITS] = {1};
        for (int bit = 0; bit < BLOCK_BITS; ++bit) {
            const double one = ones[block * BLOCK_BITS + bit];
            for (int word = 1 << bit; word-- > 0;) {
                words[2 * word + 1] = words[word] * one;
                words[2 * word] = words[word] * (1 - one);
            }
        }
        for (int word = 0; word < 1 << BLOCK_BITS; ++word) {
            int digits = word < BLOCK_WORDS ? word : BLOCK_WORDS - 1;
            for (int i = BLOCK_VALUES; i-- > 0; digits /= 3) {
                cells[block * BLOCK_VALUES + i] += words[word] * (digits % 3);
                spread[block * BLOCK_VALUES + i] += words[word] * (digits % 3) * (digits % 3);
            }
        }
        for (int i = block * BLOCK_VALUES; i < (block + 1) * BLOCK_VALUES; ++i)
            spread[i] -= cells[i] * cells[i];
    }
    for (int place = BLOCKS * BLOCK_BITS; place < num_bits; ++place) {
        const int n = (place - BLOCKS * BLOCK_BITS) % N;
        const double one = ones[place];
        cells[n] = 2 * cells[n] + one;
        spread[n] = 4 * spread[n] + one * (1 - one);
        levels[n] *= 2;
    }
    for (int n = 0; n < N; ++n) {
        x[n] = (float)((2 * cells[n] + 1) / levels[n] - 1);
        if (variances != NULL)
            variances[n] = spread[n] > 0 ? spread[n] * (2 / levels[n]) * (2 / levels[n]) : 0;
    }
}

static void believe_chunk(struct belief *restrict belief, int class, int num_bits, float *restrict x,
                          double *restrict variances)
{
    given_class(belief, class);
    if (class < ESCAPE)
        believe_class(belief->ones, class, num_bits, x, variances);
    else
        believe_escape(belief->ones, num_bits, x, variances);
}

/* Whether all is certain: then tokens [num_tokens] are those. */
static int are_tokens(struct belief *belief, int likeliest, double total, int num_tokens, int32_t *restrict tokens)
{
    if (belief->weights[likeliest] != total)
        return 0;
    given_class(belief, likeliest);
    memset(tokens, 0, (size_t)num_tokens * sizeof *tokens);
    tokens[0] = likeliest << FIRST_BITS;
    for (int j = 0; j < num_tokens * TOKEN_BITS - CLASS_BITS; ++j) {
        const double one = belief->ones[j];
        if (one != 0 && one != 1)
            return 0;
        put_bit(tokens, j, (int32_t)one);
    }
    return 1;
}

/* What a mixture of classes is expected to be, or with keeps_mode the likeliest class of it. */
static void decode_belief(struct belief *belief, int keeps_mode, int num_tokens, float *actions, float *deviations,
                          float *mode_probability, int32_t *mode)
{
    const int num_bits = num_tokens * TOKEN_BITS - CLASS_BITS;
    int likeliest = 0;
    double total = 0;
    for (int class = 0; class < ALL_CLASSES; ++class) {
        total += belief->weights[class];
        likeliest = belief->weights[class] > belief->weights[likeliest] ? class : likeliest;
    }
    if (mode_probability != NULL)
        *mode_probability = (float)(belief->weights[likeliest] / total);
    if (mode != NULL)
        *mode = likeliest;
    if (keeps_mode)
        total = belief->weights[likeliest];
    /* The likeliest class; then, by how much the mixture differs from it, and its squares. */
    float x[ROWS], other[ROWS];
    double variances[ROWS], of_other[ROWS], shifts[N] = {0}, squares[N] = {0};
    believe_chunk(belief, likeliest, num_bits, x, deviations == NULL ? NULL : variances);
    for (int class = 0; class < ALL_CLASSES && !keeps_mode; ++class) {
        const double share = belief->weights[class] / total;
        if (class == likeliest || !(share > 0))
            continue;
        believe_chunk(belief, class, num_bits, other, deviations == NULL ? NULL : of_other);
        for (int n = 0; n < N; ++n) {
            const double shift = (double)other[n] - x[n];
            shifts[n] += share * shift;
            squares[n] += share * (shift * shift);
        }
        for (int n = 0; deviations != NULL && n < N; ++n)
            squares[n] += share * of_other[n];
    }
    for (int n = 0; deviations != NULL && n < N; ++n) {
        const double variance = belief->weights[likeliest] / total * variances[n] + squares[n] - shifts[n] * shifts[n];
        deviations[n] = sqrtf((float)(variance > 0 ? variance : 0)) * UNITS[n];
    }
    /* What is certain decodes to the same bits as its tokens do, whatever compilers make of the sums here. */
    int32_t tokens[L];
    if (are_tokens(belief, likeliest, total, num_tokens, tokens))
        decode_chunk(num_tokens, tokens, actions);
    else
        for (int n = 0; n < N; ++n)
            actions[n] = (float)(x[n] + shifts[n]) * UNITS[n] + OFFSETS[n];
}

/* That of a later chunk. */
static inline struct given chunk_of(struct given given, size_t chunk)
{
    if (given.words != NULL) {
        given.words += chunk * (size_t)(given.num_tokens * WORDS);
        return given;
    }
    given.classes += chunk * ALL_CLASSES;
    given.bits += chunk * (size_t)(given.num_tokens * TOKEN_BITS - CLASS_BITS);
    return given;
}

static int is_legal(struct given given)
{
    int illegal = 0;
    for (int token = 0; given.words != NULL && token < given.num_tokens; ++token)
        illegal |= !is_distribution(given.is_logits, WORDS, given.words + token * WORDS);
    illegal |= given.words == NULL && !is_distribution(given.is_logits, ALL_CLASSES, given.classes);
    for (int j = 0; given.words == NULL && j < given.num_tokens * TOKEN_BITS - CLASS_BITS; ++j)
        illegal |= given.is_logits ? !(given.bits[j] < HUGE_VALF) : !(given.bits[j] >= 0) | !(given.bits[j] <= 1);
    return !illegal;
}

static int decode_beliefs(struct given given, const float *sharpness, int keeps_mode, size_t num_chunks, float *actions,
                          float *deviations, float *mode_probability, int32_t *mode)
{
    for (size_t chunk = 0; chunk < num_chunks; ++chunk) {
        if (chunk % CHECKED_CHUNKS == 0)
            for (size_t i = chunk; i < num_chunks && i < chunk + CHECKED_CHUNKS; ++i)
                if (!is_legal(chunk_of(given, i)))
                    return RFSQ_ILLEGAL_VALUE;
        const struct given own = chunk_of(given, chunk);
        struct belief belief;
        if (own.words != NULL)
            believe_words(own, sharpness, &belief);
        else
            believe_bits(own, sharpness, &belief);
        decode_belief(&belief, keeps_mode, own.num_tokens, actions + chunk * N,
                      deviations == NULL ? NULL : deviations + chunk * N,
                      mode_probability == NULL ? NULL : mode_probability + chunk, mode == NULL ? NULL : mode + chunk);
    }
    return RFSQ_OK;
}

int rfsq_decode_beliefs(const float *given, size_t num_tokens, const float *sharpness, int is_logits, int keeps_mode,
                        size_t num_chunks, float *actions, float *deviations, float *mode_probability, int32_t *mode)
{
    if (num_tokens < 1 || num_tokens > L || !are_sharpness(num_tokens, sharpness))
        return RFSQ_ILLEGAL_VALUE;
    const struct given tokens = {is_logits, (int)num_tokens, given, NULL, NULL};
    return decode_beliefs(tokens, sharpness, keeps_mode, num_chunks, actions, deviations, mode_probability, mode);
}

int rfsq_decode_bit_beliefs(const float *classes, const float *bits, size_t num_bits, const float *sharpness,
                            int is_logits, int keeps_mode, size_t num_chunks, float *actions, float *deviations,
                            float *mode_probability, int32_t *mode)
{
    const size_t num_tokens = (num_bits + CLASS_BITS) / TOKEN_BITS;
    if (num_tokens < 1 || num_tokens > L || num_tokens * TOKEN_BITS != num_bits + CLASS_BITS)
        return RFSQ_ILLEGAL_VALUE;
    if (!are_sharpness(1 + num_bits, sharpness))
        return RFSQ_ILLEGAL_VALUE;
    const struct given pair = {is_logits, (int)num_tokens, NULL, classes, bits};
    return decode_beliefs(pair, sharpness, keeps_mode, num_chunks, actions, deviations, mode_probability, mode);
}
