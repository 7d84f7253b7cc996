/*
 * Compiled with a source whose checks let every value through: as where another thread writes after they have looked. In
 * arrays of exactly their size, where a sanitizer sees every step beyond them and beyond the tables.
 */
#include "rfsq_tokenizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { L = RFSQ_NUM_TOKENS, N = RFSQ_CHUNK_LENGTH * RFSQ_ACTION_DIM };

int main(void)
{
    const float floats[] = {NAN, -NAN, INFINITY, -INFINITY, 3.4e38f, -3.4e38f, 0.5f};
    const int32_t words[] = {-1, INT32_MIN, RFSQ_VOCABULARY, INT32_MAX};
    float *actions = malloc(N * sizeof *actions);
    if (actions == NULL)
        return 1;
    for (int round = 0; round < 2000; ++round) {
        const size_t length = (size_t)(round % L + 1);
        int32_t *tokens = malloc(length * sizeof *tokens), *found = malloc(L * sizeof *found);
        if (tokens == NULL || found == NULL)
            return 1;
        for (size_t l = 0; l < length; ++l)
            tokens[l] = rand() % 2 ? words[rand() % 4] : rand() - RAND_MAX / 2;
        if (rfsq_decode(tokens, length, 1, actions) != RFSQ_OK)
            return 2;
        for (int n = 0; n < N; ++n)
            actions[n] = floats[rand() % 7];
        if (rfsq_encode(actions, 1, found) != RFSQ_OK)
            return 3;
        for (int l = 0; l < L; ++l)
            if ((uint32_t)found[l] >= RFSQ_VOCABULARY)
                return 4;
        free(tokens), free(found);
    }
    free(actions);
    puts("nothing found");
    return 0;
}
