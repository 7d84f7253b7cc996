/*
 * Random distributions of per-step tokens, legal and not, in arrays of exactly their size on the heap, where a sanitizer
 * sees every step beyond them. Exit status 1 where the engine accepts what is illegal, refuses what is legal, or writes
 * where it refuses.
 */
#include "rfsq_tokenizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { A = RFSQ_CHUNK_LENGTH * RFSQ_ACTION_DIM, K = RFSQ_NUM_LEVELS, L = RFSQ_NUM_LAYERS };
enum { TOKENS = RFSQ_CHUNK_LENGTH * RFSQ_LATENT_DIM * RFSQ_NUM_LAYERS, MOST_CHUNKS = 29 };

static void require(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "not so: %s\n", what);
        exit(1);
    }
}

/* Never NULL, as no array is, and misaligned by all but a float's own alignment. */
static float *array(size_t count)
{
    char *begin = malloc(count * sizeof(float) + 4);
    require(begin != NULL, "there is memory");
    memset(begin, 0x5a, count * sizeof(float) + 4);
    return (float *)(begin + 4);
}

static void release(float *array)
{
    free((char *)array - 4);
}

static void once(size_t chunks, int is_logits, int keeps_mode, int coarse)
{
    const float illegal[] = {NAN, -NAN, INFINITY, is_logits ? NAN : -1};
    const float extremes[] = {-INFINITY, 3.4e38f, -3.4e38f, 0, 90, 1e-45f};
    float *given = array(chunks * TOKENS * K), *sharpness = array(L), *actions = array(chunks * A);
    float *deviations = array(chunks * A), *mode_probability = array(chunks);
    for (int l = 0; l < L; ++l)
        sharpness[l] = 1;
    for (size_t i = 0; i < chunks * TOKENS * K; ++i)
        given[i] = is_logits ? rand() % 4 ? (float)(rand() % 100 - 50) : extremes[rand() % 6] : 1.0f / K;
    for (size_t i = 0; i < chunks * TOKENS; ++i)
        if (is_logits && given[i * K] < -1e38f)
            given[i * K] = 0;
    require(BELIEVE(given, sharpness, is_logits, keeps_mode, coarse, chunks, actions, deviations, mode_probability)
                == RFSQ_OK,
            "what is legal is decoded");
    for (size_t i = 0; i < chunks * A; ++i)
        require(isfinite(actions[i]) && deviations[i] >= 0, "actions and deviations are numbers");
    for (size_t i = 0; i < chunks; ++i)
        require(mode_probability[i] > 0 && mode_probability[i] < 1.001f, "the mode is possible");
    if (chunks > 0) {
        const size_t place = (size_t)rand() % (chunks * TOKENS * K);
        float *untouched = array(chunks * A);
        given[place] = illegal[rand() % 4];
        require(BELIEVE(given, sharpness, is_logits, keeps_mode, coarse, chunks, untouched, NULL, NULL)
                    == RFSQ_ILLEGAL_VALUE,
                "what is illegal is refused");
        const size_t step = place / (RFSQ_LATENT_DIM * RFSQ_NUM_LAYERS * K);
        const size_t first = step / RFSQ_CHECKED_STEPS * RFSQ_CHECKED_STEPS * RFSQ_ACTION_DIM * sizeof(float);
        for (size_t i = first; i < chunks * A * sizeof(float); ++i)
            require(((const char *)untouched)[i] == 0x5a, "what is refused writes nothing");
        release(untouched);
    }
    release(given), release(sharpness), release(actions), release(deviations), release(mode_probability);
}

int main(void)
{
    srand(1);
    for (size_t chunks = 0; chunks <= MOST_CHUNKS; ++chunks)
        for (int way = 0; way < 8; ++way)
            once(chunks, way & 1, way >> 1 & 1, way >> 2 ? L : 1);
    puts("nothing found");
    return 0;
}
