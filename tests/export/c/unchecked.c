/*
 * Compiled with a source whose checks let every value through: as where another thread writes after they have looked. In
 * arrays of exactly their size, where a sanitizer sees every step beyond them.
 */
#include "rfsq_tokenizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { STEPS = 9 * RFSQ_CHUNK_LENGTH, ACTIONS = STEPS * RFSQ_ACTION_DIM };
enum { TOKENS = STEPS * RFSQ_LATENT_DIM * RFSQ_NUM_LAYERS, STATS = STEPS * RFSQ_NUM_LAYERS * 2 };

int main(void)
{
    const float floats[] = {NAN, -NAN, INFINITY, -INFINITY, 3.4e38f, -3.4e38f, 0, 0.5f};
    const int32_t levels[] = {-1, INT32_MIN, RFSQ_NUM_LEVELS, INT32_MAX};
    float *actions = malloc(ACTIONS * sizeof *actions), *stats = malloc(STATS * sizeof *stats);
    int32_t *tokens = malloc(TOKENS * sizeof *tokens);
    if (actions == NULL || stats == NULL || tokens == NULL)
        return 1;
    for (int round = 0; round < 200; ++round) {
        for (int i = 0; i < ACTIONS; ++i)
            actions[i] = floats[rand() % 8];
        for (int i = 0; i < STATS; ++i)
            stats[i] = floats[rand() % 8];
#ifdef HAS_STATS
        if (rfsq_encode(actions, 9, tokens, NULL) != RFSQ_OK)
            return 2;
#else
        if (rfsq_encode(actions, 9, tokens) != RFSQ_OK)
            return 2;
#endif
        for (int i = 0; i < TOKENS; ++i) {
            if ((uint32_t)tokens[i] >= RFSQ_NUM_LEVELS)
                return 3;
            tokens[i] = levels[rand() % 4];
        }
#ifdef HAS_STATS
        if (DECODE(tokens, stats, 9, actions) != RFSQ_OK)
            return 4;
#else
        if (DECODE(tokens, 9, actions) != RFSQ_OK)
            return 4;
#endif
    }
    free(actions), free(stats), free(tokens);
    puts("nothing found");
    return 0;
}
