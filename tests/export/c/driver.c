/*
 * Encodes the actions of a file, decodes their tokens, and writes all that came out:
 *
 *     driver ACTIONS OUTPUT ENCODES DECODES [IS_LOGITS HAS_STD BELIEFS]
 *
 * ENCODES and DECODES say how often the same is done, at least once, for counting instructions, and BELIEFS how often
 * one chunk's distributions are decoded, all of them alike. OUTPUT holds tokens, statistics where there are any, and the
 * actions decoded from all layers. Compile with -DDECODE=rfsq_decode_l8 -DBELIEVE=rfsq_decode_beliefs_l8 and, for a
 * `dynamic` model, -DHAS_STATS.
 */
#include "rfsq_tokenizer.h"

#include <stdio.h>
#include <stdlib.h>

enum {
    ACTIONS = RFSQ_CHUNK_LENGTH * RFSQ_ACTION_DIM,
    TOKENS = RFSQ_CHUNK_LENGTH * RFSQ_LATENT_DIM * RFSQ_NUM_LAYERS,
    STATS = RFSQ_CHUNK_LENGTH * RFSQ_NUM_LAYERS * 2,
    MOST_CHUNKS = 4096
};

static float actions[MOST_CHUNKS * ACTIONS], decoded[MOST_CHUNKS * ACTIONS];
static int32_t tokens[MOST_CHUNKS * TOKENS];
#ifdef HAS_STATS
static float stats[MOST_CHUNKS * STATS];
#else
static float given[TOKENS * RFSQ_NUM_LEVELS], sharpness[RFSQ_NUM_LAYERS], deviations[ACTIONS], mode_probability[1];

static int believe(int is_logits, int has_std)
{
    return BELIEVE(given, sharpness, is_logits, 0, 1, 1, decoded, has_std ? deviations : NULL,
                   has_std ? mode_probability : NULL);
}
#endif

static int encode(size_t chunks)
{
#ifdef HAS_STATS
    return rfsq_encode(actions, chunks, tokens, stats);
#else
    return rfsq_encode(actions, chunks, tokens);
#endif
}

static int decode(size_t chunks)
{
#ifdef HAS_STATS
    return DECODE(tokens, stats, chunks, decoded);
#else
    return DECODE(tokens, chunks, decoded);
#endif
}

int main(int argc, char **argv)
{
    if (argc != 5 && argc != 8)
        return 2;
    FILE *file = fopen(argv[1], "rb");
    if (file == NULL)
        return 3;
    const size_t chunks = fread(actions, sizeof *actions * ACTIONS, MOST_CHUNKS, file);
    fclose(file);
    for (int i = 0; i < atoi(argv[3]); ++i)
        if (encode(chunks) != RFSQ_OK)
            return 4;
    for (int i = 0; i < atoi(argv[4]); ++i)
        if (decode(chunks) != RFSQ_OK)
            return 5;
#ifndef HAS_STATS
    for (int i = 0; i < TOKENS * RFSQ_NUM_LEVELS; ++i)
        given[i] = i % RFSQ_NUM_LEVELS == 0 ? 1 - 0.1f * (RFSQ_NUM_LEVELS - 1) : 0.1f;
    for (int i = 0; i < RFSQ_NUM_LAYERS; ++i)
        sharpness[i] = 1;
    for (int i = 0; argc == 8 && i < atoi(argv[7]); ++i)
        if (believe(atoi(argv[5]), atoi(argv[6])) != RFSQ_OK)
            return 8;
#endif
    file = fopen(argv[2], "wb");
    if (file == NULL)
        return 6;
    fwrite(tokens, sizeof *tokens * TOKENS, chunks, file);
#ifdef HAS_STATS
    fwrite(stats, sizeof *stats * STATS, chunks, file);
#endif
    fwrite(decoded, sizeof *decoded * ACTIONS, chunks, file);
    return fclose(file) == 0 ? 0 : 7;
}
