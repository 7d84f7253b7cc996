/*
 * Times a bundle's tokenizer from C, on one core: single chunks, and a million steps in batches and in one call.
 *
 *     make time-c                                                  builds it against build/bundle and runs it
 *     make time-c BUNDLE=my_bundle TIME_FLAGS=-march=x86-64-v3     for another bundle and kind of processor
 *     build/time_tokenizer [STEPS]                                 default: 1000000 steps
 *
 * Single calls are timed one by one, as a control loop makes them, in turns with an empty call between the same two
 * readings of the clock: what the machine itself takes away (its clock, its interrupts, its neighbours) shows there.
 * The actions are random, and so are probabilities and logits; the decoder gets the encoder's tokens. Exit status: 1
 * where there is no memory or a function refuses, 2 for a wrong command line.
 *
 * The decoder is that of all L = 8 layers: for another one name it and its layers, such as -DDECODE=rfsq_decode_l3
 * -DBELIEVE=rfsq_decode_beliefs_l3 -DLAYERS=3. A `dynamic` model needs -DHAS_STATS, and decodes no probabilities. All
 * can be added to TIME_FLAGS.
 */
#define _POSIX_C_SOURCE 200809L

#include "rfsq_tokenizer.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#ifndef DECODE
#define DECODE rfsq_decode_l8
#endif
#ifndef BELIEVE
#define BELIEVE rfsq_decode_beliefs_l8
#endif
#ifndef LAYERS
#define LAYERS RFSQ_NUM_LAYERS
#endif

#ifndef SINGLE_CALLS
#define SINGLE_CALLS 100000
#endif
/* FEW chunks come over and over in single calls: what a policy says has just been written. */
enum { WARM_UP_CALLS = 2000, PASSES = 5, MOST_STEPS = 1000000000, FEW = 8 };

/* Numbers in one chunk. */
#define T ((size_t)RFSQ_CHUNK_LENGTH)
#define ACTIONS (T * RFSQ_ACTION_DIM)
#define TOKENS (T * RFSQ_LATENT_DIM * RFSQ_NUM_LAYERS)
#define PREFIX_TOKENS (T * RFSQ_LATENT_DIM * LAYERS)
#define STATS (T * RFSQ_NUM_LAYERS * 2)
#define PREFIX_STATS (T * LAYERS * 2)
#define LEVELS (PREFIX_TOKENS * RFSQ_NUM_LEVELS)

struct arrays {
    float *actions, *decoded, *stats;
    int32_t *tokens;
    /* Of FEW chunks, and what is written of one. */
    float *probabilities, *logits, *sharpness, *deviations, *mode_probability;
};

typedef int (*call)(const struct arrays *arrays, size_t first, size_t num_chunks);

static int encode(const struct arrays *arrays, size_t first, size_t num_chunks)
{
#ifdef HAS_STATS
    return rfsq_encode(arrays->actions + first * ACTIONS, num_chunks, arrays->tokens + first * TOKENS,
                       arrays->stats + first * STATS);
#else
    return rfsq_encode(arrays->actions + first * ACTIONS, num_chunks, arrays->tokens + first * TOKENS);
#endif
}

/* A prefix lies packed at the beginning of the same arrays, where the encoder's tokens stood: any tokens will do. */
static int decode(const struct arrays *arrays, size_t first, size_t num_chunks)
{
#ifdef HAS_STATS
    return DECODE(arrays->tokens + first * PREFIX_TOKENS, arrays->stats + first * PREFIX_STATS, num_chunks,
                  arrays->decoded + first * ACTIONS);
#else
    return DECODE(arrays->tokens + first * PREFIX_TOKENS, num_chunks, arrays->decoded + first * ACTIONS);
#endif
}

#ifndef HAS_STATS
static int believe(const struct arrays *arrays, const float *given, int is_logits, float *deviations)
{
    return BELIEVE(given, arrays->sharpness, is_logits, 0, 1, 1, arrays->decoded, deviations,
                   deviations == NULL ? NULL : arrays->mode_probability);
}

static int probabilities(const struct arrays *arrays, size_t first, size_t num_chunks)
{
    (void)num_chunks;
    return believe(arrays, arrays->probabilities + first * LEVELS, 0, NULL);
}

static int probabilities_std(const struct arrays *arrays, size_t first, size_t num_chunks)
{
    (void)num_chunks;
    return believe(arrays, arrays->probabilities + first * LEVELS, 0, arrays->deviations);
}

static int logits(const struct arrays *arrays, size_t first, size_t num_chunks)
{
    (void)num_chunks;
    return believe(arrays, arrays->logits + first * LEVELS, 1, NULL);
}

static int logits_std(const struct arrays *arrays, size_t first, size_t num_chunks)
{
    (void)num_chunks;
    return believe(arrays, arrays->logits + first * LEVELS, 1, arrays->deviations);
}
#endif

static int empty(const struct arrays *arrays, size_t first, size_t num_chunks)
{
    (void)arrays, (void)first, (void)num_chunks;
    return RFSQ_OK;
}

static double nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

static int ascending(const void *left, const void *right)
{
    const double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static void require(int status, const char *what)
{
    if (status != RFSQ_OK) {
        fprintf(stderr, "%s refuses its input: this program and the bundle do not belong together\n", what);
        exit(1);
    }
}

static void *array(size_t count, size_t size)
{
    void *begin = calloc(count, size);
    if (begin == NULL) {
        fprintf(stderr, "%zu numbers do not fit into memory\n", count);
        exit(1);
    }
    return begin;
}

/* What is timed; the calls are volatile, so that the empty one is a call too. */
static const struct {
    const char *name;
    volatile call call;
} timed[] = {
    {"empty call", empty},
    {"encode", encode},
    {"decode", decode},
#ifndef HAS_STATS
    {"probabilities", probabilities},
    {"probabilities, std", probabilities_std},
    {"logits", logits},
    {"logits, std", logits_std},
#endif
};
enum { TIMED = sizeof timed / sizeof *timed, EMPTY = 0, DECODING = 2 };

static void time_single_calls(const struct arrays *arrays, size_t chunks)
{
    double *times[TIMED];
    for (int c = 0; c < TIMED; ++c)
        times[c] = array(SINGLE_CALLS, sizeof **times);
    for (int i = -WARM_UP_CALLS; i < SINGLE_CALLS; ++i)
        for (int c = 0; c < TIMED; ++c) {
            const size_t first = (size_t)(i + WARM_UP_CALLS) % (chunks < FEW ? chunks : FEW);
            const double begin = nanoseconds();
            const int status = timed[c].call(arrays, first, 1);
            const double took = nanoseconds() - begin;
            require(status, timed[c].name);
            if (i >= 0)
                times[c][i] = took;
        }
    printf("one chunk of %d steps, %d calls   median     p99   p99.9 ns   p99.9 / median   x decode\n",
           RFSQ_CHUNK_LENGTH, SINGLE_CALLS);
    for (int c = 0; c < TIMED; ++c)
        qsort(times[c], SINGLE_CALLS, sizeof **times, ascending);
    for (int c = 0; c < TIMED; ++c) {
        const double median = times[c][SINGLE_CALLS / 2], late = times[c][(size_t)SINGLE_CALLS * 999 / 1000];
        /* Both without what the readings of the clock take. */
        const double nothing = times[EMPTY][SINGLE_CALLS / 2], decoding = times[DECODING][SINGLE_CALLS / 2] - nothing;
        printf("%-34s %6.0f  %6.0f  %6.0f      %14.2f   %8.2f\n", timed[c].name, median,
               times[c][(size_t)SINGLE_CALLS * 99 / 100], late, median > 0 ? late / median : 0,
               decoding > 0 ? (median - nothing) / decoding : 0);
    }
    for (int c = 0; c < TIMED; ++c)
        free(times[c]);
}

/* The best of a few passes over all chunks, so many in each call. */
static void time_batches(const struct arrays *arrays, size_t chunks, const char *name, call function, size_t batch)
{
    double best = 0;
    for (int pass = 0; pass < PASSES; ++pass) {
        const double begin = nanoseconds();
        for (size_t first = 0; first < chunks; first += batch)
            require(function(arrays, first, chunks - first < batch ? chunks - first : batch), name);
        const double took = nanoseconds() - begin;
        best = pass == 0 || took < best ? took : best;
    }
    const double steps = (double)(chunks * T);
    printf("%s %zu chunks a call: %.1f ns a step, %.3g steps a second\n", name, batch, best / steps, steps / best * 1e9);
}

int main(int argc, char **argv)
{
    char *end = NULL;
    errno = 0;
    const long steps = argc == 2 ? strtol(argv[1], &end, 10) : 1000000;
    if (argc > 2 || (argc == 2 && (*end != '\0' || errno != 0)) || steps < 1 || steps > MOST_STEPS) {
        fprintf(stderr, "usage: %s [STEPS]\n", argv[0]);
        return 2;
    }
    const size_t chunks = ((size_t)steps + T - 1) / T;
    const struct arrays arrays = {
        array(chunks * ACTIONS, sizeof(float)),
        array(chunks * ACTIONS, sizeof(float)),
        array(chunks * STATS, sizeof(float)),
        array(chunks * TOKENS, sizeof(int32_t)),
        array(FEW * LEVELS, sizeof(float)),
        array(FEW * LEVELS, sizeof(float)),
        array(LAYERS, sizeof(float)),
        array(ACTIONS, sizeof(float)),
        array(1, sizeof(float)),
    };
    srand(1);
    for (size_t i = 0; i < chunks * ACTIONS; ++i)
        arrays.actions[i] = 2 * ((float)rand() / (float)RAND_MAX) - 1;
    for (size_t token = 0; token < FEW * PREFIX_TOKENS; ++token) {
        float sum = 0;
        for (size_t k = token * RFSQ_NUM_LEVELS; k < (token + 1) * RFSQ_NUM_LEVELS; ++k) {
            arrays.logits[k] = 8 * ((float)rand() / (float)RAND_MAX);
            arrays.probabilities[k] = 1 + arrays.logits[k];
            sum += arrays.probabilities[k];
        }
        for (size_t k = token * RFSQ_NUM_LEVELS; k < (token + 1) * RFSQ_NUM_LEVELS; ++k)
            arrays.probabilities[k] /= sum;
    }
    for (int layer = 0; layer < LAYERS; ++layer)
        arrays.sharpness[layer] = 1;
    /* Once over everything, so that no page is loaded while the clock runs. */
    require(encode(&arrays, 0, chunks), "encode");
    require(decode(&arrays, 0, chunks), "decode");

    printf("fingerprint %.16s, %zu steps\n", RFSQ_FINGERPRINT, chunks * T);
    time_single_calls(&arrays, chunks);
    const size_t batches[] = {1, 32, chunks};
    for (size_t b = 0; b < sizeof batches / sizeof *batches; ++b) {
        time_batches(&arrays, chunks, "encode", encode, batches[b]);
        time_batches(&arrays, chunks, "decode", decode, batches[b]);
    }
    free(arrays.actions), free(arrays.decoded), free(arrays.stats), free(arrays.tokens);
    free(arrays.probabilities), free(arrays.logits), free(arrays.sharpness), free(arrays.deviations);
    free(arrays.mode_probability);
    return 0;
}
