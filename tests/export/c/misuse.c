/*
 * Random batches, legal and not, in arrays of exactly their size on the heap, where a sanitizer sees every step beyond
 * them. Compile as driver.c. Exit status 1 where the engine accepts what is illegal, refuses what is legal, or writes
 * where it refuses.
 */
#include "rfsq_tokenizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { T = RFSQ_CHUNK_LENGTH, A = RFSQ_ACTION_DIM, D = RFSQ_LATENT_DIM, L = RFSQ_NUM_LAYERS, K = RFSQ_NUM_LEVELS };

static void require(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "not so: %s\n", what);
        exit(1);
    }
}

/* Never NULL, as no array is, and misaligned by all but a float's own alignment. */
static void *array(size_t count, size_t size)
{
    char *begin = malloc(count * size + 4);
    require(begin != NULL, "there is memory");
    memset(begin, 0x5a, count * size + 4);
    return begin + 4;
}

static void release(void *array)
{
    free((char *)array - 4);
}

/* From the block on that holds the illegal value; `step_bytes` of the array belong to each step. */
static int is_untouched(const void *array, size_t steps, size_t step_bytes, size_t illegal_step)
{
    const size_t first = illegal_step / RFSQ_CHECKED_STEPS * RFSQ_CHECKED_STEPS;
    for (size_t i = first * step_bytes; i < steps * step_bytes; ++i)
        if (((const char *)array)[i] != 0x5a)
            return 0;
    return 1;
}

static float uniform(float low, float high)
{
    return low + (high - low) * ((float)rand() / (float)RAND_MAX);
}

static int encode(const float *actions, size_t chunks, int32_t *tokens, float *stats)
{
#ifdef HAS_STATS
    return rfsq_encode(actions, chunks, tokens, stats);
#else
    (void)stats;
    return rfsq_encode(actions, chunks, tokens);
#endif
}

static int decode(const int32_t *tokens, const float *stats, size_t chunks, float *actions)
{
#ifdef HAS_STATS
    return DECODE(tokens, stats, chunks, actions);
#else
    (void)stats;
    return DECODE(tokens, chunks, actions);
#endif
}

static void once(size_t chunks)
{
    const float illegal_actions[] = {NAN, INFINITY, -INFINITY, nextafterf(RFSQ_ACTION_LIMIT, INFINITY)};
    const float extreme_actions[] = {0, -0.0f, 1e-45f, -RFSQ_ACTION_LIMIT, RFSQ_ACTION_LIMIT};
    const int32_t illegal_tokens[] = {-1, K, INT32_MIN, INT32_MAX};
    const size_t steps = chunks * T;
    float *actions = array(steps * A, sizeof(float)), *decoded = array(steps * A, sizeof(float));
    int32_t *tokens = array(steps * D * L, sizeof(int32_t)), *unwritten = array(steps * D * L, sizeof(int32_t));
    float *stats = array(steps * L * 2, sizeof(float));

    for (size_t i = 0; i < steps * A; ++i)
        actions[i] = rand() % 8 ? uniform(-3, 3) : extreme_actions[rand() % 5];
    require(encode(actions, chunks, tokens, stats) == RFSQ_OK, "legal actions are encoded");
    for (size_t i = 0; i < steps * D * L; ++i)
        require(tokens[i] >= 0 && tokens[i] < K, "tokens are levels");
    /* Huge actions have statistics as any others. */
    require(decode(tokens, stats, chunks, decoded) == RFSQ_OK, "tokens of the encoder are decoded");
    for (size_t i = 0; i < steps * A; ++i)
        require(isfinite(decoded[i]), "actions are finite");
    if (steps > 0) {
        memset(decoded, 0x5a, steps * A * sizeof *decoded);
        size_t place = (size_t)rand() % (steps * D * L);
        tokens[place] = illegal_tokens[rand() % 4];
        require(decode(tokens, stats, chunks, decoded) == RFSQ_ILLEGAL_VALUE, "illegal tokens are refused");
        require(is_untouched(decoded, steps, A * sizeof *decoded, place / (D * L)), "what is refused writes no action");
        place = (size_t)rand() % (steps * A);
        actions[place] = illegal_actions[rand() % 4];
        require(encode(actions, chunks, unwritten, stats) == RFSQ_ILLEGAL_VALUE, "illegal actions are refused");
        require(is_untouched(unwritten, steps, D * L * sizeof *unwritten, place / A), "what is refused writes no token");
    }
#ifdef HAS_STATS
    require(encode(actions, 0, unwritten, NULL) == RFSQ_OK, "nobody need want statistics");
#endif
    release(actions), release(decoded), release(tokens), release(unwritten), release(stats);
}

int main(void)
{
    srand(1);
    for (int round = 0; round < 20; ++round)
        for (size_t chunks = 0; chunks < 30; ++chunks)
            once(chunks);
    puts("nothing found");
    return 0;
}
