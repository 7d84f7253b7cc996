/* --- beliefs: some blocks for each chunk -------------------------------------------------------------------------- */

/*
 * Words of the first token are read by every block that decodes classes. Those of the others are turned into bits by
 * blocks that go before, a warp for each token. A class gives values and variances of its own; the block of a chunk that
 * is through last mixes them, always in one order: so a chunk has the same bits, however many blocks it had.
 */

constexpr int ALL_CLASSES = CLASSES + 1, WARPS = FEW_THREADS / WARP, FLAT_BITS = (L * TOKEN_BITS + 3) / 4 * 4;
constexpr float LARGEST_FLOAT = 0x1.fffffep+127f, LOG2_E = 0x1.715476p+0f, LOG_2 = 0x1.62e430p-1f;

/*
 * What the blocks of a chunk tell each other. bits: of tokens behind the first; found: what each class decodes to, and
 * its variances. All but these are 0 before a launch and after it.
 */
struct alignas(16) Slot {
    unsigned told, illegal, done, unused;
    float bits[FLAT_BITS], found[ALL_CLASSES][2][ROWS];
};

struct alignas(16) Workspace {
    unsigned turn, unused[3];
    Slot slots[1];
};
static_assert(sizeof(Slot) == SLOT_BYTES && sizeof(Workspace) == SLOT_BYTES + 16, "as the runtime allocates them");

/* What is written of chunks; all but the actions may be null. */
struct Answer {
    float *actions, *deviations, *mode_probability;
    int *mode;
};

/* What is asked. classes: of a pair; else null, and bits are the words. consumers: blocks that decode classes. */
struct Question {
    const float *classes, *bits, *sharpness;
    int terms, num_tokens, consumers;

    __device__ __forceinline__ bool is_pair() const { return classes != nullptr; }
    __device__ __forceinline__ bool has(int term) const { return terms & term; }
    __device__ __forceinline__ int num_bits() const { return num_tokens * TOKEN_BITS - CLASS_BITS; }
    __device__ __forceinline__ int producers() const { return is_pair() ? 0 : (num_tokens - 1 + WARPS - 1) / WARPS; }
    __device__ __forceinline__ float scale(int i) const
    {
        return sharpness == nullptr ? LOG2_E : fminf(sharpness[i] * LOG2_E, LARGEST_FLOAT);
    }
};

__device__ __forceinline__ float infinity() { return __int_as_float(0x7F800000); }

__device__ __forceinline__ float power_of_two(float x)
{
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
    return x;
}

__device__ __forceinline__ float largest_of_lanes(float x)
{
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

/* How numbers are read: powers of logits, or what is given. */
struct Reading {
    bool is_logits;
    float largest, scale;

    __device__ __forceinline__ float power(float x) const
    {
        return is_logits ? power_of_two((x - largest) * scale) : fmaxf(x, 0.0f);
    }
    __device__ __forceinline__ bool is_illegal(float x) const { return is_logits ? !(x < infinity()) : !(x >= 0); }
    /* sum: of all powers. */
    __device__ __forceinline__ bool is_none(float sum) const
    {
        return is_logits ? largest == -infinity() : !(fabsf(sum - 1) <= SUM_TOLERANCE);
    }
};

/* By one warp. */
template <int COUNT> __device__ __forceinline__ Reading reading_of(const Question &question, const float *given, int i)
{
    float largest = -infinity();
    if constexpr (COUNT % (4 * WARP) == 0) {
#pragma unroll 8
        for (int place = threadIdx.x % WARP; place < COUNT / 4; place += WARP) {
            const float4 four = reinterpret_cast<const float4 *>(given)[place];
            largest = fmaxf(fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w)), largest);
        }
    } else {
#pragma unroll 8
        for (int place = threadIdx.x % WARP; place < COUNT; place += WARP)
            largest = fmaxf(largest, given[place]);
    }
    return {question.has(IS_LOGITS), largest_of_lanes(largest), question.scale(i)};
}

/* A bit is kept as the lesser of both probabilities, with a sign where that is the one of 0: so neither end is lost. */
__device__ __forceinline__ float bit_of(float zero, float one)
{
    return one <= zero ? one / (zero + one) : -(zero / (zero + one));
}
__device__ __forceinline__ bool is_likely(float bit) { return __float_as_uint(bit) >> 31; }
__device__ __forceinline__ float one_of(float bit) { return is_likely(bit) ? 1 - fabsf(bit) : bit; }
__device__ __forceinline__ float zero_of(float bit) { return is_likely(bit) ? fabsf(bit) : 1 - bit; }
__device__ __forceinline__ float variance_of(float bit) { return fabsf(bit) * (1 - fabsf(bit)); }

/* --- from words to bits ------------------------------------------------------------------------------------------- */

/* In every lane i the sum over all lanes of number i. */
template <int HALF = WARP / 2> __device__ __forceinline__ float sum_of_own(float (&numbers)[WARP])
{
    const bool is_upper = threadIdx.x & HALF;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        const float kept = is_upper ? numbers[i + HALF] : numbers[i];
        numbers[i] = kept + __shfl_xor_sync(ALL_LANES, is_upper ? numbers[i] : numbers[i + HALF], HALF);
    }
    if constexpr (HALF > 1)
        return sum_of_own<HALF / 2>(numbers);
    return numbers[0];
}

/*
 * The words of BITS bits, by one warp: lane 2 b has the sum of those with a 0 in bit b, the highest first, and the lane
 * behind it that of those with a 1.
 */
template <int BITS> __device__ __forceinline__ float halves(const Reading &reading, const float *words, bool &is_illegal)
{
    constexpr int VECTOR = BITS >= 7 ? 2 : 0, IN_LANES = BITS - VECTOR < 5 ? BITS - VECTOR : 5;
    constexpr int TURN_BITS = BITS - VECTOR - IN_LANES;
    static_assert(2 * BITS <= WARP, "both sums of a bit have a lane");
    const int lane = threadIdx.x % WARP;
    float sums[WARP] = {}, own = 0;
#pragma unroll 8
    for (int turn = 0; turn < 1 << TURN_BITS; ++turn) {
        float powers[1 << VECTOR] = {}, sum = 0;
        if (lane < 1 << IN_LANES) {
            alignas(16) float given[1 << VECTOR];
            const float *const source = words + ((turn << IN_LANES | lane) << VECTOR);
            if constexpr (VECTOR == 2)
                *reinterpret_cast<float4 *>(given) = *reinterpret_cast<const float4 *>(source);
            else
                given[0] = source[0];
#pragma unroll
            for (int j = 0; j < 1 << VECTOR; ++j) {
                is_illegal |= reading.is_illegal(given[j]);
                powers[j] = reading.power(given[j]);
            }
        }
        if constexpr (VECTOR == 2) {
            const float low = powers[0] + powers[1], high = powers[2] + powers[3];
            sums[2 * BITS - 4] += low, sums[2 * BITS - 3] += high;
            sums[2 * BITS - 2] += powers[0] + powers[2], sums[2 * BITS - 1] += powers[1] + powers[3];
            sum = low + high;
        } else {
            sum = powers[0];
        }
        own += sum;
#pragma unroll
        for (int b = 0; b < TURN_BITS; ++b) {
            const float one = turn >> (TURN_BITS - 1 - b) & 1 ? sum : 0;
            sums[2 * b] += sum - one, sums[2 * b + 1] += one;
        }
    }
#pragma unroll
    for (int b = 0; b < IN_LANES; ++b) {
        const float one = lane >> (IN_LANES - 1 - b) & 1 ? own : 0;
        sums[2 * (TURN_BITS + b)] += own - one, sums[2 * (TURN_BITS + b) + 1] += one;
    }
    return sum_of_own(sums);
}

/* Bits [BITS] of such sums, by one warp. */
template <int BITS> __device__ __forceinline__ void write_bits(float half, float *bits)
{
    const int lane = threadIdx.x % WARP;
    const float one = __shfl_xor_sync(ALL_LANES, half, 1);
    if (lane % 2 == 0 && lane < 2 * BITS)
        bits[lane / 2] = bit_of(half, one);
}

/* The bits of a token behind the first, by each warp of a block. */
__device__ __forceinline__ void produce(const Question &question, const float *words, int producer, Slot *slot)
{
    const int token = 1 + producer * WARPS + threadIdx.x / WARP;
    if (token >= question.num_tokens)
        return;
    const float *const own = words + (Chunks)token * VOCABULARY;
    const Reading reading = reading_of<VOCABULARY>(question, own, token);
    bool is_illegal = false;
    const float half = halves<TOKEN_BITS>(reading, own, is_illegal);
    write_bits<TOKEN_BITS>(half, slot->bits + token * TOKEN_BITS);
    const float sum = __shfl_sync(ALL_LANES, half, 0, WARP) + __shfl_sync(ALL_LANES, half, 1, WARP);
    is_illegal = __any_sync(ALL_LANES, is_illegal) || reading.is_none(sum);
    __syncwarp();
    if (threadIdx.x % WARP == 0) {
        if (is_illegal)
            slot->illegal = 1;
        __threadfence();
        atomicAdd(&slot->told, 1u);
    }
}

/* --- what is known of a chunk ------------------------------------------------------------------------------------- */

/* In shared memory. weights: of all classes, up to a factor. */
struct Known {
    float weights[ALL_CLASSES], bits[FLAT_BITS];
};

/* What follows from the weights. */
struct Mixture {
    float total, largest;
    int likeliest, possible;
};

/* Weights of classes by words, LANES neighbouring threads for each class. Whether this thread saw what is illegal. */
__device__ __forceinline__ bool read_word_classes(const Reading &reading, const float *words, float *weights)
{
    constexpr int LANES = ROOM >= 5 ? 32 : ROOM >= 2 ? 4 : 1;
    bool is_illegal = false;
    for (int turn = 0; turn < ALL_CLASSES; turn += FEW_THREADS / LANES) {
        const int wanted = turn + threadIdx.x / LANES, c = wanted < ALL_CLASSES ? wanted : ESCAPE;
        /* Numbers behind the last class mean it, too. */
        const int end = c < ESCAPE ? c + 1 << ROOM : VOCABULARY;
        float weight = 0;
#pragma unroll 4
        for (int word = (c << ROOM) + threadIdx.x % LANES; word < end; word += LANES) {
            is_illegal |= reading.is_illegal(words[word]);
            weight += reading.power(words[word]);
        }
#pragma unroll
        for (int distance = LANES / 2; distance > 0; distance /= 2)
            weight += __shfl_xor_sync(ALL_LANES, weight, distance);
        if (wanted < ALL_CLASSES && threadIdx.x % LANES == 0)
            weights[c] = weight;
    }
    return is_illegal;
}

/* The bits of the first word behind the number of class c, by one warp. */
__device__ __forceinline__ void read_first_bits(const Reading &reading, const float *words, int c, float *bits)
{
    if constexpr (ROOM > 0) {
        bool is_illegal = false;
        float half = halves<ROOM>(reading, words + (c << ROOM), is_illegal);
        /* Numbers behind the last class mean it, too. */
        for (int number = c + 1; c == ESCAPE && number < 1 << CLASS_BITS; ++number)
            half += halves<ROOM>(reading, words + (number << ROOM), is_illegal);
        write_bits<ROOM>(half, bits + CLASS_BITS);
    }
}

/* The same of a pair, and its bits. */
__device__ __forceinline__ bool read_pair(const Question &question, const Reading &reading, const float *classes,
                                          const float *bits, Known &known)
{
    bool is_illegal = false;
    for (int c = threadIdx.x; c < ALL_CLASSES; c += FEW_THREADS) {
        is_illegal |= reading.is_illegal(classes[c]);
        known.weights[c] = reading.power(classes[c]);
    }
    for (int j = threadIdx.x; j < question.num_bits(); j += FEW_THREADS) {
        const float given = bits[j];
        if (reading.is_logits) {
            is_illegal |= !(given < infinity());
            const float power = power_of_two(-fabsf(given * question.scale(1 + j))), lesser = power / (1 + power);
            known.bits[CLASS_BITS + j] = given < 0 ? lesser : -lesser;
        } else {
            is_illegal |= !(given >= 0 && given <= 1);
            known.bits[CLASS_BITS + j] = given <= 0.5f ? fabsf(given) : given - 1 == 0 ? -0.0f : given - 1;
        }
    }
    return is_illegal;
}

/* By every warp alike. */
__device__ __forceinline__ Mixture mixture_of(const float *weights)
{
    const int lane = threadIdx.x % WARP;
    Mixture found = {0, -1, ALL_CLASSES, 0};
    float possible = 0;
    for (int c = lane; c < ALL_CLASSES; c += WARP) {
        const float weight = weights[c];
        found.total += weight, possible += weight > 0;
        if (weight > found.largest)
            found.largest = weight, found.likeliest = c;
    }
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, found.largest, distance);
        const int place = __shfl_xor_sync(ALL_LANES, found.likeliest, distance);
        if (other > found.largest || (other == found.largest && place < found.likeliest))
            found.largest = other, found.likeliest = place;
    }
    found.total = sum_of_lanes(found.total), found.possible = (int)sum_of_lanes(possible);
    return found;
}

/* All of it, of words for class c, by all threads of a block; waits for the blocks that go before. Whether all is
 * legal. */
__device__ __forceinline__ bool read_chunk(const Question &question, const float *classes, const float *bits, int c,
                                           Slot *slot, Reading &reading, Known &known, Mixture &mixture)
{
    bool is_illegal;
    if (question.is_pair()) {
        reading = reading_of<ALL_CLASSES>(question, classes, 0);
        is_illegal = read_pair(question, reading, classes, bits, known);
    } else {
        reading = reading_of<VOCABULARY>(question, bits, 0);
        is_illegal = read_word_classes(reading, bits, known.weights);
        if (threadIdx.x < WARP)
            read_first_bits(reading, bits, c, known.bits);
        if (question.num_tokens > 1) {
            if (threadIdx.x == 0) {
                while (*(volatile unsigned *)&slot->told != (unsigned)question.num_tokens - 1) {
                }
                __threadfence();
            }
            __syncthreads();
            is_illegal |= __ldcg(&slot->illegal) != 0;
            for (int i = TOKEN_BITS + threadIdx.x; i < question.num_tokens * TOKEN_BITS; i += FEW_THREADS)
                known.bits[i] = __ldcg(slot->bits + i);
        }
    }
    is_illegal = __syncthreads_or(is_illegal);
    mixture = mixture_of(known.weights);
    return !is_illegal && !reading.is_none(mixture.total);
}

/* --- a class ------------------------------------------------------------------------------------------------------ */

/* Four neighbouring threads have a latent: every fourth of its bits each. */
struct LatentPart {
    static constexpr int EACH = (RANKS + 3) / 4;
    unsigned places[EACH];
    int count;
    float width;

    __device__ __forceinline__ int rank(int i) const { return 4 * i + threadIdx.x % 4; }
    __device__ __forceinline__ bool has(int i, int num_tokens) const { return (int)(places[i] / 32) < num_tokens; }

    __device__ __forceinline__ void load(int c, int m, int num_tokens)
    {
        count = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            places[i] = PLACE[c][m][rank(i)], count += has(i, num_tokens);
        count += __shfl_xor_sync(ALL_LANES, count, 1), count += __shfl_xor_sync(ALL_LANES, count, 2);
        width = WIDTH[c][count][m];
    }

    /* See `place_at`. */
    __device__ __forceinline__ float bit(int i, const float *bits) const
    {
        return bits[places[i] / 32 * TOKEN_BITS + (places[i] + TOKEN_BITS + rank(i)) % 32];
    }

    /* The expected latent and, if it is wanted, its variance; the first of the four threads has them. */
    __device__ __forceinline__ void believed(const float *bits, int num_tokens, bool wants_variance, float &latent,
                                             float &variance) const
    {
        float ones[EACH], zeros[EACH], own_ones = 0, own_zeros = 0;
#pragma unroll
        for (int i = EACH - 1; i >= 0; --i) {
            const float unit = has(i, num_tokens) ? __int_as_float((127 + 31 - rank(i)) << 23) : 0;
            const float own = has(i, num_tokens) ? bit(i, bits) : 0;
            ones[i] = one_of(own) * unit, zeros[i] = zero_of(own) * unit;
            own_ones += ones[i], own_zeros += zeros[i];
        }
        const float half = __int_as_float((127 + 31 - count) << 23);
        const float other_ones = of_others(own_ones) + half, other_zeros = of_others(own_zeros) + half;
        latent = width * level_between(own_ones + other_ones, own_zeros + other_zeros);
        variance = 0;
        if (!wants_variance)
            return;
        float ones_before = 0, zeros_before = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (has(i, num_tokens)) {
                float ones_behind = 0, zeros_behind = 0;
#pragma unroll
                for (int k = EACH - 1; k > i; --k)
                    ones_behind += ones[k], zeros_behind += zeros[k];
                const float p = (ones_before + ones_behind) + other_ones, q = (zeros_before + zeros_behind) + other_zeros;
                const float unit = __int_as_float((127 + 31 - rank(i)) << 23);
                const float apart = half_log_of_more(__fdividef(unit * 0x1p32f, p * q));
                variance = fmaf(variance_of(bit(i, bits)), apart * apart, variance);
            }
            ones_before += ones[i], zeros_before += zeros[i];
        }
        variance += __shfl_xor_sync(ALL_LANES, variance, 1), variance += __shfl_xor_sync(ALL_LANES, variance, 2);
        variance *= width * width;
    }

    /* What the other three threads have: not all less one's own, which would lose what is small. */
    static __device__ __forceinline__ float of_others(float own)
    {
        const float next = __shfl_xor_sync(ALL_LANES, own, 1), other = __shfl_xor_sync(ALL_LANES, own, 2);
        return (next + other) + __shfl_xor_sync(ALL_LANES, own, 3);
    }

    /* log(1 + x) / 2 for x >= 0: how far atanh moves when a bit changes, from p and q - p to p + unit, is that of
     * unit (p + q) / (p q), of what all other bits make of both sides. */
    static __device__ __forceinline__ float half_log_of_more(float x)
    {
        const float s = __fdividef(x, 2 + x), square = s * s;
        const float small = fmaf(s * square, fmaf(square, fmaf(square, 1.0f / 7, 1.0f / 5), 1.0f / 3), s);
        return x < 0.5f ? small : 0.5f * LOG_2 * __log2f(1 + x);
    }
};

/* What is loaded of a class for the values that threads have first. */
struct ClassPart {
    static constexpr bool ARE_HELD = 4 * N <= FEW_THREADS && QUARTER <= 16, HAS_LATENT_EACH = 4 * PADDED <= FEW_THREADS;
    float held[ARE_HELD ? QUARTER : 1], mean, unit, offset;
    LatentPart latent;

    __device__ __forceinline__ void load(int c, int num_tokens)
    {
        const int n = threadIdx.x / 4 < N ? threadIdx.x / 4 : N - 1, m = threadIdx.x / 4 < PADDED ? threadIdx.x / 4 : 0;
        if constexpr (HAS_LATENT_EACH)
            latent.load(c, m, num_tokens);
        if constexpr (ARE_HELD) {
#pragma unroll
            for (int i = 0; i < QUARTER; ++i)
                held[i] = DECODER_BASIS[c][threadIdx.x % 4 * QUARTER + i][n];
            mean = MEAN[c][n], unit = UNITS[n], offset = OFFSETS[n];
        }
    }
};

/* Values of class c to `put`, with their variances; latents and spread: shared memory. */
template <class Put>
__device__ __forceinline__ void believe_class(ClassPart &part, int c, const float *bits, int num_tokens,
                                              bool wants_variance, float *latents, float *spread, Put put_value)
{
    const int quarter = threadIdx.x % 4;
    for (int turn = 0; turn < PADDED; turn += FEW_THREADS / 4) {
        const int wanted = turn + threadIdx.x / 4, m = wanted < PADDED ? wanted : PADDED - 1;
        if (!ClassPart::HAS_LATENT_EACH)
            part.latent.load(c, m, num_tokens);
        float latent, variance;
        part.latent.believed(bits, num_tokens, wants_variance, latent, variance);
        if (wanted < PADDED && quarter == 0)
            latents[m] = latent, spread[m] = variance;
    }
    __syncthreads();
    /* As `decode_few`. */
    for (int turn = 0; turn < N; turn += FEW_THREADS / 4) {
        const int wanted = turn + threadIdx.x / 4, n = wanted < N ? wanted : N - 1;
        float part_sum = 0, part_variance = 0, sum = 0, variance = 0;
#pragma unroll
        for (int i = QUARTER - 1; i >= 0; --i) {
            const int m = quarter * QUARTER + i;
            const float basis = ClassPart::ARE_HELD ? part.held[ClassPart::ARE_HELD ? i : 0] : DECODER_BASIS[c][m][n];
            part_sum = fmaf(basis, latents[m], part_sum);
            part_variance = fmaf(basis * basis, spread[m], part_variance);
        }
#pragma unroll
        for (int q = 3; q >= 0; --q)
            sum += __shfl_sync(ALL_LANES, part_sum, q, 4), variance += __shfl_sync(ALL_LANES, part_variance, q, 4);
        if (!ClassPart::ARE_HELD)
            part.mean = MEAN[c][n], part.unit = UNITS[n], part.offset = OFFSETS[n];
        if (wanted < N && quarter == 0)
            put_value(n, clamped(part.mean + sum), fminf(variance, 1.0f), part.unit, part.offset);
    }
}

/* The five values of a word of escape: cells and their variances. By one warp; block: of values and bits. */
__device__ __forceinline__ void believe_block(const float *bits, int block, float *cells, float *spread)
{
    const int lane = threadIdx.x % WARP;
    float shares[BLOCK_VALUES][3] = {}, share = 1;
#pragma unroll
    for (int bit = 0; bit < 5; ++bit)
        share *= lane >> (4 - bit) & 1 ? one_of(bits[bit]) : zero_of(bits[bit]);
#pragma unroll
    for (int low = 0; low < 8; ++low) {
        float own = share;
#pragma unroll
        for (int bit = 5; bit < BLOCK_BITS; ++bit)
            own *= low >> (7 - bit) & 1 ? one_of(bits[bit]) : zero_of(bits[bit]);
        int rest = lane * 8 + low;
        rest = rest < BLOCK_WORDS ? rest : BLOCK_WORDS - 1;
#pragma unroll
        for (int i = BLOCK_VALUES - 1; i >= 0; --i, rest /= 3)
#pragma unroll
            for (int digit = 0; digit < 3; ++digit)
                shares[i][digit] += rest % 3 == digit ? own : 0;
    }
#pragma unroll
    for (int i = 0; i < BLOCK_VALUES; ++i) {
#pragma unroll
        for (int digit = 0; digit < 3; ++digit)
            shares[i][digit] = sum_of_lanes(shares[i][digit]);
        const int n = block * BLOCK_VALUES + i;
        const float none = shares[i][0], one = shares[i][1], two = shares[i][2];
        if (lane == i && n < N)
            cells[n] = one + 2 * two, spread[n] = none * one + 4 * (none * two) + one * two;
    }
}

/* The same as `believe_class` of escape. cells, spread: shared memory [N]. */
template <class Put>
__device__ __forceinline__ void believe_escape(const float *bits, int num_bits, float *cells, float *spread, Put put_value)
{
    const float *const code = bits + CLASS_BITS;
    for (int block = threadIdx.x / WARP; block < BLOCKS; block += WARPS)
        if ((block + 1) * BLOCK_BITS <= num_bits)
            believe_block(code + block * BLOCK_BITS, block, cells, spread);
    __syncthreads();
    for (int n = threadIdx.x; n < N; n += FEW_THREADS) {
        const bool has_word = (n / BLOCK_VALUES + 1) * BLOCK_BITS <= num_bits;
        float cell = has_word ? cells[n] : 0, variance = has_word ? spread[n] : 0, levels = has_word ? 3 : 1;
        for (int place = BLOCKS * BLOCK_BITS + n; place < num_bits; place += N) {
            cell = 2 * cell + one_of(code[place]), variance = fmaf(4.0f, variance, variance_of(code[place]));
            levels *= 2;
        }
        put_value(n, (2 * cell + 1) / levels - 1, variance * (2 / levels) * (2 / levels), UNITS[n], OFFSETS[n]);
    }
}

/* --- a chunk ------------------------------------------------------------------------------------------------------ */

__device__ __forceinline__ void put_mode(const Answer &answer, Chunks chunk, float probability, int likeliest)
{
    if (answer.mode_probability != nullptr)
        answer.mode_probability[chunk] = probability;
    if (answer.mode != nullptr)
        answer.mode[chunk] = likeliest;
}

__device__ __forceinline__ void put_value(const Answer &answer, Chunks chunk, int n, float value, float variance,
                                          float unit, float offset)
{
    put(answer.actions + chunk * N + n, value, unit, offset, false);
    if (answer.deviations != nullptr)
        answer.deviations[chunk * N + n] = sqrtf(fmaxf(variance, 0.0f)) * unit;
}

__device__ __forceinline__ void mark(const Answer &answer, Chunks chunk)
{
    for (int n = threadIdx.x; n < N; n += FEW_THREADS) {
        answer.actions[chunk * N + n] = not_a_number();
        if (answer.deviations != nullptr)
            answer.deviations[chunk * N + n] = not_a_number();
    }
    if (threadIdx.x == 0)
        put_mode(answer, chunk, not_a_number(), ILLEGAL_TOKEN);
}

/* Mean and variance of what all classes have found; four neighbouring threads have a value. */
__device__ __forceinline__ void mix(const Answer &answer, Chunks chunk, const Known &known, const Mixture &mixture,
                                    const Slot *slot)
{
    /* So many are on their way at once. */
    constexpr int EACH = (ALL_CLASSES + 3) / 4, BATCH = EACH < 20 ? EACH : 20;
    const float inverse = 1 / mixture.total;
    for (int turn = 0; turn < N; turn += FEW_THREADS / 4) {
        const int wanted = turn + threadIdx.x / 4, n = wanted < N ? wanted : N - 1;
        const float unit = UNITS[n], offset = OFFSETS[n];
        /* From the likeliest class on: so what nearly all have in common takes part in no sum. */
        const float from = __ldcg(&slot->found[mixture.likeliest][0][n]);
        float shift = 0, square = 0;
        for (int first = threadIdx.x % 4; first < ALL_CLASSES; first += 4 * BATCH) {
            float values[BATCH], variances[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int c = first + 4 * i < ALL_CLASSES ? first + 4 * i : ESCAPE;
                values[i] = __ldcg(&slot->found[c][0][n]), variances[i] = __ldcg(&slot->found[c][1][n]);
            }
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int c = first + 4 * i;
                /* Of a class that cannot be, nobody has written anything. */
                const float weight = c < ALL_CLASSES ? known.weights[c] : 0, share = weight * inverse;
                const float own = weight > 0 ? values[i] - from : 0, variance = weight > 0 ? variances[i] : 0;
                shift = fmaf(share, own, shift);
                square = fmaf(share, fmaf(own, own, variance), square);
            }
        }
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
            shift += __shfl_xor_sync(ALL_LANES, shift, distance);
            square += __shfl_xor_sync(ALL_LANES, square, distance);
        }
        if (wanted < N && threadIdx.x % 4 == 0)
            put_value(answer, chunk, n, from + shift, square - shift * shift, unit, offset);
    }
}

/* Whether all other blocks that decode classes of the chunk are through; asked once by each. */
__device__ __forceinline__ bool is_last_of(const Question &question, Slot *slot)
{
    const unsigned last = question.consumers - 1;
    return atomicInc(&slot->done, last) == last;
}

/* Every consumers-th class of a chunk, and what all make of it where this block is through last. */
__device__ __forceinline__ void consume(const Question &question, const Answer &answer, Chunks chunk, int consumer,
                                        Slot *slot)
{
    constexpr int MOST = PADDED > ROWS ? PADDED : ROWS;
    __shared__ Known known;
    __shared__ float latents[MOST], spread[MOST];
    __shared__ bool is_last;
    const float *const classes = question.is_pair() ? question.classes + chunk * ALL_CLASSES : nullptr;
    const Chunks numbers = question.is_pair() ? question.num_bits() : question.num_tokens * (int)VOCABULARY;
    const float *const bits = question.bits + chunk * numbers;
    const bool wants_variance = answer.deviations != nullptr;
    Mixture mixture = {};
    Reading reading = {};
    bool is_read = false, is_legal = true, is_only = false;
    auto is_skipped = [&](int c) {
        return question.has(KEEPS_MODE) ? c != mixture.likeliest : !(known.weights[c] > 0);
    };
    for (int c = consumer; c < ALL_CLASSES && is_legal; c += question.consumers) {
        if (is_read && is_skipped(c))
            continue;
        /* On their way while the chunk is read. */
        ClassPart part;
        if (c < ESCAPE)
            part.load(c, question.num_tokens);
        if (!is_read) {
            is_legal = read_chunk(question, classes, bits, c, slot, reading, known, mixture), is_read = true;
            is_only = question.has(KEEPS_MODE) || mixture.possible == 1;
            if (!is_legal || is_skipped(c))
                continue;
        } else {
            /* Nobody reads any more what is known of the class before. */
            __syncthreads();
            if (!question.is_pair() && threadIdx.x < WARP)
                read_first_bits(reading, bits, c, known.bits);
            __syncthreads();
        }
        auto put_found = [&](int n, float value, float variance, float unit, float offset) {
            if (is_only)
                put_value(answer, chunk, n, value, variance, unit, offset);
            else
                slot->found[c][0][n] = value, slot->found[c][1][n] = variance;
        };
        if (c < ESCAPE)
            believe_class(part, c, known.bits, question.num_tokens, wants_variance, latents, spread, put_found);
        else
            believe_escape(known.bits, question.num_bits(), latents, spread, put_found);
        if (is_only && threadIdx.x == 0)
            put_mode(answer, chunk, mixture.largest / mixture.total, mixture.likeliest);
    }
    if (!is_legal && consumer == 0)
        mark(answer, chunk);
    if (!is_legal || is_only) {
        /* All blocks know, and nobody waits for what they have found. */
        if (!question.is_pair() && threadIdx.x == 0 && is_last_of(question, slot))
            slot->told = slot->illegal = 0;
        return;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = is_last_of(question, slot);
        __threadfence();
    }
    __syncthreads();
    if (!is_last)
        return;
    if (threadIdx.x == 0)
        slot->told = slot->illegal = 0;
    mix(answer, chunk, known, mixture, slot);
    if (threadIdx.x == 0)
        put_mode(answer, chunk, mixture.largest / mixture.total, mixture.likeliest);
}

__device__ __forceinline__ void believe(const Question &question, const Answer &answer, Workspace *workspace)
{
    __shared__ unsigned turn;
    const unsigned producers = question.producers(), each = producers + question.consumers;
    if (threadIdx.x == 0)
        /* Who waits has to come after those it waits for, which the order of blocks alone does not promise. */
        turn = question.has(TAKES_TURNS) ? atomicInc(&workspace->turn, gridDim.x - 1) : blockIdx.x;
    __syncthreads();
    const unsigned role = turn % each;
    const Chunks chunk = turn / each;
    Slot *const slot = workspace->slots + chunk;
    if (role < producers)
        produce(question, question.bits + chunk * question.num_tokens * (int)VOCABULARY, role, slot);
    else
        consume(question, answer, chunk, role - producers, slot);
}
