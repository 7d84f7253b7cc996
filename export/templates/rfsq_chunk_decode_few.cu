/* --- decoder of few chunks ---------------------------------------------------------------------------------------- */

/* Latent m of a class. What it takes is all under way before the tokens are known. */
struct Latent {
    Places places;
    int count;
    float width;

    __device__ __forceinline__ void load(int c, int m, int num_tokens)
    {
        places = places_of(c, m), count = count_of(places, num_tokens), width = WIDTH[c][count][m];
    }

    __device__ __forceinline__ float decoded(const uint16 *words) const
    {
        unsigned cell = 1u << (31 - count);
#pragma unroll
        for (int rank = 0; rank < RANKS; ++rank)
            if (rank < count) {
                const unsigned place = place_at(places, rank), word = words[place / 32];
                cell |= __funnelshift_l(word, word, place) & 1u << (31 - rank);
            }
        return width * level_of((float)cell, 0x1p31f);
    }
};

template <class Token>
__device__ __forceinline__ void decode_few(const Token *tokens, float *actions, int num_tokens)
{
    /* So few that each thread loads its weights when the class is known, and does not wait for them later. */
    constexpr bool ARE_HELD = 4 * N <= FEW_THREADS && QUARTER <= 16, HAS_LATENT_EACH = PADDED <= FEW_THREADS;
    __shared__ uint16 words[L];
    __shared__ float latents[PADDED];
    const Token *const own = tokens + (Chunks)blockIdx.x * num_tokens;
    float *const chunk = actions + (Chunks)blockIdx.x * N;
    /*
     * Every thread reads the class itself: what depends on it is under way before the threads meet. It is loaded for
     * escape, too, from the last class. Which way all of them go is decided behind the barrier, by the one copy in
     * `words`: somebody else might change the tokens meanwhile.
     */
    const int read = class_of((uint16)own[0]), c = read < ESCAPE ? read : CLASSES - 1, quarter = threadIdx.x % 4;
    bool is_illegal = false;
    for (int l = threadIdx.x; l < num_tokens; l += FEW_THREADS) {
        const unsigned token = own[l];
        is_illegal |= token >= VOCABULARY;
        words[l] = (uint16)token;
    }
    float held[ARE_HELD ? QUARTER : 1];
    const int first_n = threadIdx.x / 4 < N ? threadIdx.x / 4 : N - 1;
    float mean = MEAN[c][first_n], unit = UNITS[first_n], offset = OFFSETS[first_n];
    if constexpr (ARE_HELD)
#pragma unroll
        for (int i = 0; i < QUARTER; ++i)
            held[i] = DECODER_BASIS[c][quarter * QUARTER + i][first_n];
    Latent latent;
    if (HAS_LATENT_EACH && threadIdx.x < PADDED)
        latent.load(c, threadIdx.x, num_tokens);
    is_illegal = __syncthreads_or(is_illegal);
    if (class_of(words[0]) == ESCAPE) {
        for (int n = threadIdx.x; n < N; n += FEW_THREADS)
            put(chunk + n, escape_value<1>(n, num_tokens * TOKEN_BITS - CLASS_BITS, words), UNITS[n], OFFSETS[n],
                is_illegal);
        return;
    }
    for (int m = threadIdx.x; m < PADDED; m += FEW_THREADS) {
        if (!HAS_LATENT_EACH)
            latent.load(c, m, num_tokens);
        latents[m] = latent.decoded(words);
    }
    __syncthreads();
    /* As `to_value`, with a thread for each part. */
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
