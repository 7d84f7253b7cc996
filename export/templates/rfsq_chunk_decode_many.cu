/* --- decoder of many chunks --------------------------------------------------------------------------------------- */

/*
 * A first kernel sorts the chunks of each window by class. In the second a block decodes TILE chunks of one class at a
 * time: what it reads of the class serves all of them. Threads have a latent of GROUP chunks, then four values of GROUP
 * chunks. The class is the sorter's: the second kernel takes no more than bits from the tokens, which somebody else
 * might change meanwhile.
 */
#if HAS_MANY_DECODERS
constexpr int GROUPS = TILE / GROUP, QUADS = ROWS / 4;
/* Of a window: each class ends with one that is not full. */
constexpr int MOST_TILES = WINDOW / TILE + CLASSES + 1;
/* Rows of tokens lie so that those of neighbours are in other banks of shared memory. */
constexpr int WORD_ROW = TILE + 8;
static_assert(GROUP == 8 && TILE % GROUP == 0, "tokens of 16 bits of a group are loaded at once");
static_assert(WINDOW <= 1 << 16 && TILE < 1 << 8 && ESCAPE < 1 << 8, "a tile is one word");
static_assert(WINDOW % SORT_THREADS == 0, "threads sort the same number of chunks");

struct Window {
    /* Of the first window: how many tiles blocks have taken, of all windows, beside the first of each. */
    int num_taken;
    /*
     * Where the chunks of a tile begin in `chunks`, their number from bit 16 on, their class from bit 24 on. Tiles that
     * are not needed stand behind the others and are 0.
     */
    unsigned tiles[MOST_TILES];
    uint16 chunks[WINDOW];
};

/* A block sorts the chunks of a window by class: escape first, because that takes longest. */
template <class Token>
__device__ __forceinline__ void sort_by_class(const Token *tokens, Window *windows, Chunks chunks, int num_tokens)
{
    constexpr int EACH = WINDOW / SORT_THREADS;
    __shared__ int counts[CLASSES + 1], firsts[CLASSES + 1];
    __shared__ uint16 sorted[WINDOW];
    Window &window = windows[blockIdx.x];
    const Chunks first = (Chunks)blockIdx.x * WINDOW, left = chunks - first;
    const int valid = left < WINDOW ? (int)left : WINDOW;
    tokens += first * num_tokens;
    /* All are under way before one is waited for. */
    uint16 classes[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int i = k * SORT_THREADS + threadIdx.x;
        classes[k] = (uint16)(i < valid ? tokens[i * num_tokens] : 0);
    }
    if (threadIdx.x == 0)
        window.num_taken = 0;
    for (int c = threadIdx.x; c <= CLASSES; c += SORT_THREADS)
        counts[c] = 0;
    for (int tile = threadIdx.x; tile < MOST_TILES; tile += SORT_THREADS)
        window.tiles[tile] = 0;
    __syncthreads();
    int ranks[EACH];
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        classes[k] = (uint16)class_of(classes[k]);
        if (k * SORT_THREADS + threadIdx.x < valid)
            ranks[k] = atomicAdd(&counts[classes[k]], 1);
    }
    __syncthreads();
    for (int c = threadIdx.x; c <= CLASSES; c += SORT_THREADS) {
        int start = 0, tile = 0;
        for (int before = CLASSES; before > c; --before)
            start += counts[before], tile += (counts[before] + TILE - 1) / TILE;
        firsts[c] = start;
        for (int rank = 0; rank < counts[c]; rank += TILE) {
            const int rest = counts[c] - rank, count = rest < TILE ? rest : TILE;
            window.tiles[tile++] = (unsigned)(start + rank) | (unsigned)count << 16 | (unsigned)c << 24;
        }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        const int i = k * SORT_THREADS + threadIdx.x;
        if (i < valid)
            sorted[firsts[classes[k]] + ranks[k]] = (uint16)i;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < valid; i += SORT_THREADS)
        window.chunks[i] = sorted[i];
}

/* Two words of 16 bits, the first in the lower half. */
__device__ __forceinline__ unsigned both(unsigned first, unsigned second) { return __byte_perm(first, second, 0x5410); }

struct Tile {
    /* The levels of all latents of LEVEL_BITS bits at most. */
    float levels[2 << LEVEL_BITS];
    /* Of the class, [PADDED][ROWS], where there is room. */
    alignas(16) float basis[HOLDS_BASIS ? PADDED * ROWS : 4];
    /* Of each latent the first four chunks of every group, then the other four. */
    alignas(16) float latents[PADDED * TILE];
    /* Tokens [L][WORD_ROW]. */
    alignas(16) uint16 words[L * WORD_ROW];
    /* Of each latent of the class: how many bits it has, and what its levels are multiplied by. */
    int counts[PADDED];
    float widths[PADDED];
    int chunks[TILE], are_illegal[TILE], following;
};

/* What a thread does of a tile: something of every group, one after the other; rows are latents, or four values. */
struct Job {
    int group, row;

    __device__ __forceinline__ explicit Job(int groups) : group(threadIdx.x % groups), row(threadIdx.x / groups) {}

    __device__ __forceinline__ void advance(int groups)
    {
        group += MANY_THREADS % groups, row += MANY_THREADS / groups;
        if (group >= groups)
            group -= groups, ++row;
    }
};

__device__ __forceinline__ void load_class(int c, int num_tokens, Tile &tile)
{
    for (int m = threadIdx.x; m < PADDED; m += MANY_THREADS) {
        const int count = count_of(places_of(c, m), num_tokens);
        tile.counts[m] = count, tile.widths[m] = WIDTH[c][count][m];
    }
    const float4 *const basis = reinterpret_cast<const float4 *>(DECODER_BASIS[c]);
    if (HOLDS_BASIS)
#pragma unroll 4
        for (int i = threadIdx.x; i < PADDED * QUADS; i += MANY_THREADS)
            reinterpret_cast<float4 *>(tile.basis)[i] = basis[i];
}

/* The tokens of a tile. Half a warp reads those of a group, side by side. */
template <class Token>
__device__ __forceinline__ void read_tokens(const Token *tokens, int num_tokens, int groups, Tile &tile)
{
    constexpr int READERS = 16, STEPS = (L + READERS - 1) / READERS, AT_ONCE = STEPS < 3 ? STEPS : 3;
    for (int group = threadIdx.x / READERS; group < groups; group += MANY_THREADS / READERS) {
        const Token *rows[GROUP];
#pragma unroll
        for (int i = 0; i < GROUP; ++i)
            rows[i] = tokens + tile.chunks[group * GROUP + i] * num_tokens + threadIdx.x % READERS;
        uint16 *words = tile.words + threadIdx.x % READERS * WORD_ROW + group * GROUP;
#pragma unroll 1
        for (int left = num_tokens - threadIdx.x % READERS; left > 0; left -= AT_ONCE * READERS) {
            unsigned own[AT_ONCE][GROUP];
#pragma unroll
            for (int step = 0; step < AT_ONCE; ++step)
#pragma unroll
                for (int i = 0; i < GROUP; ++i)
                    own[step][i] = step * READERS < left ? (unsigned)rows[i][step * READERS] : 0;
#pragma unroll
            for (int step = 0; step < AT_ONCE; ++step) {
                const unsigned(&eight)[GROUP] = own[step];
                unsigned any = 0;
#pragma unroll
                for (int i = 0; i < GROUP; ++i)
                    any |= eight[i];
                if (any >= VOCABULARY)
#pragma unroll
                    for (int i = 0; i < GROUP; ++i)
                        if (eight[i] >= VOCABULARY)
                            tile.are_illegal[group * GROUP + i] = 1;
                if (step * READERS < left)
                    *reinterpret_cast<uint4 *>(words + step * READERS * WORD_ROW) = {
                        both(eight[0], eight[1]), both(eight[2], eight[3]), both(eight[4], eight[5]),
                        both(eight[6], eight[7])};
            }
#pragma unroll
            for (int i = 0; i < GROUP; ++i)
                rows[i] += AT_ONCE * READERS;
            words += AT_ONCE * READERS * WORD_ROW;
        }
    }
}

/* Latent m of a group of chunks of a class, two chunks in a word. */
__device__ __forceinline__ void decode_latent(int c, int m, int group, Tile &tile)
{
    const Places places = places_of(c, m);
    const int count = tile.counts[m];
    const float width = tile.widths[m];
    const uint16 *const words = tile.words + group * GROUP;
    unsigned cells[GROUP / 2];
#pragma unroll
    for (int i = 0; i < GROUP / 2; ++i)
        cells[i] = 0x80008000u >> count;
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
        if (rank >= count)
            break;
        const unsigned place = place_at(places, rank);
        const uint4 own = *reinterpret_cast<const uint4 *>(words + place / 32 * WORD_ROW);
        const unsigned pairs[GROUP / 2] = {own.x, own.y, own.z, own.w}, mask = 0x80008000u >> rank;
#pragma unroll
        for (int i = 0; i < GROUP / 2; ++i)
            cells[i] |= __funnelshift_l(pairs[i], pairs[i], place) & mask;
    }
    /* Now they are the middles of cells, in units of 2^-15. */
    float own[GROUP];
    if (count <= LEVEL_BITS) {
#pragma unroll
        for (int i = 0; i < GROUP / 2; ++i) {
            own[2 * i] = tile.levels[cells[i] >> (31 - LEVEL_BITS)];
            own[2 * i + 1] = tile.levels[(cells[i] & 0xFFFF) >> (15 - LEVEL_BITS)];
        }
    } else {
#pragma unroll
        for (int i = 0; i < GROUP / 2; ++i) {
            own[2 * i] = level_of((float)(cells[i] >> 16), 0x1p15f);
            own[2 * i + 1] = level_of((float)(cells[i] & 0xFFFF), 0x1p15f);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float4 *>(tile.latents + m * TILE + half * TILE / 2 + group * 4) = {
            width * own[half * 4], width * own[half * 4 + 1], width * own[half * 4 + 2], width * own[half * 4 + 3]};
}

/* What latents [QUARTER][TILE] of a quarter add to four values of a group; basis: [QUARTER][ROWS]. */
__device__ __forceinline__ void add_quarter(const float *basis, const float *latents, float (&sums)[GROUP][4])
{
#pragma unroll 2
    for (int m = QUARTER - 1; m >= 0; --m) {
        const float4 weights = *reinterpret_cast<const float4 *>(basis + m * ROWS);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float4 four = *reinterpret_cast<const float4 *>(latents + m * TILE + half * TILE / 2);
            const float own[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float(&sum)[4] = sums[half * 4 + i];
                sum[0] = fmaf(weights.x, own[i], sum[0]), sum[1] = fmaf(weights.y, own[i], sum[1]);
                sum[2] = fmaf(weights.z, own[i], sum[2]), sum[3] = fmaf(weights.w, own[i], sum[3]);
            }
        }
    }
}

/* Values n ... n + 3 of those of a group's chunks that are there. */
__device__ __forceinline__ void write_values(float *actions, int c, int n, const int *chunks, const int *are_illegal,
                                             int count, const float (&sums)[GROUP][4])
{
    const float4 means = *reinterpret_cast<const float4 *>(MEAN[c] + n);
    const float4 units = *reinterpret_cast<const float4 *>(UNITS + n);
    const float4 offsets = *reinterpret_cast<const float4 *>(OFFSETS + n);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) {
        if (i >= count)
            break;
        float4 own = {fmaf(clamped(means.x + sums[i][0]), units.x, offsets.x),
                      fmaf(clamped(means.y + sums[i][1]), units.y, offsets.y),
                      fmaf(clamped(means.z + sums[i][2]), units.z, offsets.z),
                      fmaf(clamped(means.w + sums[i][3]), units.w, offsets.w)};
        if (are_illegal[i])
            own = {not_a_number(), not_a_number(), not_a_number(), not_a_number()};
        float *const action = actions + chunks[i] * N + n;
        if constexpr (N % 4 == 0)
            __stcs(reinterpret_cast<float4 *>(action), own);
        else
            for (int v = 0; v < 4 && n + v < N; ++v)
                __stcs(action + v, v == 0 ? own.x : v == 1 ? own.y : v == 2 ? own.z : own.w);
    }
}

__device__ __forceinline__ void multiply(float *actions, int c, Job job, int groups, int count, const Tile &tile)
{
    const float *const whole = HOLDS_BASIS ? tile.basis : &DECODER_BASIS[c][0][0];
    for (; job.row < QUADS; job.advance(groups)) {
        const float *const basis = whole + job.row * 4, *const latents = tile.latents + job.group * 4;
        float sums[GROUP][4] = {};
        add_quarter(basis + 3 * QUARTER * ROWS, latents + 3 * QUARTER * TILE, sums);
#pragma unroll 1
        for (int quarter = 2; quarter >= 0; --quarter) {
            float parts[GROUP][4] = {};
            add_quarter(basis + quarter * QUARTER * ROWS, latents + quarter * QUARTER * TILE, parts);
#pragma unroll
            for (int chunk = 0; chunk < GROUP; ++chunk)
#pragma unroll
                for (int v = 0; v < 4; ++v)
                    sums[chunk][v] += parts[chunk][v];
        }
        const int first = job.group * GROUP;
        write_values(actions, c, job.row * 4, tile.chunks + first, tile.are_illegal + first, count - first, sums);
    }
}

/* Chunks that escaped, from words [L][WORD_ROW]. */
__device__ __forceinline__ void decode_escaped(float *actions, int num_tokens, int count, const Tile &tile)
{
    for (int i = threadIdx.x; i < count * N; i += MANY_THREADS) {
        const int chunk = i % count, n = i / count;
        const float value = escape_value<WORD_ROW>(n, num_tokens * TOKEN_BITS - CLASS_BITS, tile.words + chunk);
        put(actions + tile.chunks[chunk] * N + n, value, UNITS[n], OFFSETS[n], tile.are_illegal[chunk]);
    }
}

template <class Token>
__device__ __forceinline__ void decode_many(const Token *tokens, float *actions, Chunks chunks, int num_tokens,
                                            Window *windows)
{
    __shared__ Tile tile;
    const int num_tiles = (int)((chunks + WINDOW - 1) / WINDOW) * MOST_TILES;
    int held = ESCAPE, index = blockIdx.x;
    unsigned own = index < num_tiles ? windows[index / MOST_TILES].tiles[index % MOST_TILES] : 0;
    for (int i = threadIdx.x + 1; i < 2 << LEVEL_BITS; i += MANY_THREADS)
        tile.levels[i] = level_of((float)i, (float)(1 << LEVEL_BITS));
    while (index < num_tiles) {
        const Window &window = windows[index / MOST_TILES];
        const Chunks first = (Chunks)(index / MOST_TILES) * WINDOW;
        const int count = own >> 16 & 0xFF, c = own >> 24, groups = (count + GROUP - 1) / GROUP;
        int following = 0;
        /* Until here the tile before this one was in shared memory. */
        __syncthreads();
        if (threadIdx.x == 0)
            following = gridDim.x + atomicAdd(&windows->num_taken, 1);
        for (int i = threadIdx.x; i < TILE; i += MANY_THREADS) {
            /* In place of chunks that are not there the first one, which is not written again. */
            tile.chunks[i] = window.chunks[(own & 0xFFFF) + (i < count ? i : 0)];
            tile.are_illegal[i] = 0;
        }
        if (c != ESCAPE && c != held)
            load_class(held = c, num_tokens, tile);
        __syncthreads();
        read_tokens(tokens + first * num_tokens, num_tokens, groups, tile);
        if (threadIdx.x == 0)
            tile.following = following;
        __syncthreads();
        /* Which chunks come next is under way while these are decoded. */
        index = tile.following;
        own = index < num_tiles ? windows[index / MOST_TILES].tiles[index % MOST_TILES] : 0;
        if (c == ESCAPE)
            decode_escaped(actions + first * N, num_tokens, count, tile);
        else if (count > 0) {
            const Job begin(groups);
            for (Job job = begin; job.row < PADDED; job.advance(groups))
                decode_latent(c, job.row, job.group, tile);
            __syncthreads();
            multiply(actions + first * N, c, begin, groups, count, tile);
        }
    }
}
#endif
