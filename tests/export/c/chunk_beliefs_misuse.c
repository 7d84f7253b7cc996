/*
 * Random distributions of chunk tokens, legal and not, in arrays of exactly their size on the heap, where a sanitizer
 * sees every step beyond them. Exit status 1 where the engine accepts what is illegal, refuses what is legal, or writes
 * where it refuses.
 */
#include "rfsq_tokenizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { L = RFSQ_NUM_TOKENS, N = RFSQ_CHUNK_LENGTH * RFSQ_ACTION_DIM, V = RFSQ_VOCABULARY, C = RFSQ_NUM_CLASSES };
enum { CHUNKS = 3 };

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

/* Logits, or probabilities that are all the same; of bits none has a sum. */
static float *random_given(size_t distributions, size_t size, int is_logits)
{
    const float extremes[] = {-INFINITY, 3.4e38f, -3.4e38f, 0, 90, 1e-45f};
    float *given = array(distributions * size);
    for (size_t i = 0; i < distributions * size; ++i) {
        given[i] = is_logits ? rand() % 4 ? (float)(rand() % 100 - 50) : extremes[rand() % 6] : 1.0f / (float)size;
        if (is_logits && i % size == 0)
            given[i] = 0;
    }
    return given;
}

/* Of numbers below `count`. */
static size_t bits_of(size_t count)
{
    size_t bits = 0;
    while ((size_t)1 << bits < count)
        ++bits;
    return bits;
}

static void once(size_t length, int is_pair, int is_logits, int keeps_mode)
{
    const size_t bits = length * bits_of(V) - bits_of(C), places = is_pair ? 1 + bits : length;
    const float illegal[] = {NAN, -NAN, INFINITY, is_logits ? NAN : -1};
    float *first = is_pair ? random_given(CHUNKS, C, is_logits) : random_given(CHUNKS * length, V, is_logits);
    float *second = random_given(CHUNKS, bits, is_logits), *sharpness = array(places);
    float *actions = array(CHUNKS * N), *deviations = array(CHUNKS * N), *mode_probability = array(CHUNKS);
    int32_t mode[CHUNKS];
    for (size_t i = 0; i < places; ++i)
        sharpness[i] = 1;
#define BELIEVE(...)                                                                                                   \
    (is_pair ? rfsq_decode_bit_beliefs(first, second, bits, sharpness, is_logits, keeps_mode, CHUNKS, __VA_ARGS__)     \
             : rfsq_decode_beliefs(first, length, sharpness, is_logits, keeps_mode, CHUNKS, __VA_ARGS__))
    require(BELIEVE(actions, deviations, mode_probability, mode) == RFSQ_OK, "what is legal is decoded");
    for (size_t i = 0; i < CHUNKS * N; ++i)
        require(isfinite(actions[i]) && deviations[i] >= 0, "actions and deviations are numbers");
    for (size_t i = 0; i < CHUNKS; ++i)
        require(mode_probability[i] > 0 && mode_probability[i] < 1.001f, "the mode is possible"), require(mode[i] >= 0 && mode[i] < (int32_t)C, "the mode is a class");
    float *untouched = array(CHUNKS * N);
    if (is_pair && rand() % 2)
        second[(size_t)rand() % (CHUNKS * bits)] = illegal[rand() % 4];
    else
        first[(size_t)rand() % (is_pair ? CHUNKS * C : CHUNKS * length * V)] = illegal[rand() % 4];
    require(BELIEVE(untouched, NULL, NULL, NULL) == RFSQ_ILLEGAL_VALUE, "what is illegal is refused");
    for (size_t i = 0; i < CHUNKS * N * sizeof(float); ++i)
        require(((const char *)untouched)[i] == 0x5a, "what is refused writes nothing");
    release(first), release(second), release(sharpness), release(untouched);
    release(actions), release(deviations), release(mode_probability);
}

int main(void)
{
    srand(1);
    for (size_t length = 1; length <= L; ++length)
        for (int way = 0; way < 8; ++way)
            once(length, way & 1, way >> 1 & 1, way >> 2);
    puts("nothing found");
    return 0;
}
