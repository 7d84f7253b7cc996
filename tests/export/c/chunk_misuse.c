/*
 * Random batches of chunk tokens, legal and not, in arrays of exactly their size on the heap, where a sanitizer sees
 * every step beyond them. Exit status 1 where the engine accepts what is illegal, refuses what is legal, or writes where
 * it refuses.
 */
#include "rfsq_tokenizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { L = RFSQ_NUM_TOKENS, N = RFSQ_CHUNK_LENGTH * RFSQ_ACTION_DIM };
enum { CHECKED = RFSQ_CHECKED_STEPS / RFSQ_CHUNK_LENGTH, MOST_CHUNKS = 2 * CHECKED + 1 };

static void require(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "not so: %s\n", what);
        exit(1);
    }
}

/* Never NULL, as no array is, and misaligned by all but a float's own alignment. */
static void *array(size_t count)
{
    char *begin = malloc(count * 4 + 4);
    require(begin != NULL, "there is memory");
    memset(begin, 0x5a, count * 4 + 4);
    return begin + 4;
}

static void release(void *array)
{
    free((char *)array - 4);
}

/* From the chunks on that are checked together with the illegal value. */
static int is_untouched(const void *array, size_t chunks, size_t chunk_bytes, size_t illegal_chunk)
{
    for (size_t i = illegal_chunk / CHECKED * CHECKED * chunk_bytes; i < chunks * chunk_bytes; ++i)
        if (((const char *)array)[i] != 0x5a)
            return 0;
    return 1;
}

static float any_action(void)
{
    const float extremes[] = {0, -0.0f, 1e-45f, 1, -1, RFSQ_ACTION_LIMIT, -RFSQ_ACTION_LIMIT};
    return rand() % 8 ? 2 * ((float)rand() / (float)RAND_MAX) - 1 : extremes[rand() % 7];
}

static void encode(size_t chunks)
{
    const float illegal[] = {NAN, INFINITY, -INFINITY, nextafterf(RFSQ_ACTION_LIMIT, INFINITY)};
    float *actions = array(chunks * N);
    int32_t *tokens = array(chunks * L), *unwritten = array(chunks * L);
    for (size_t i = 0; i < chunks * N; ++i)
        actions[i] = any_action();
    require(rfsq_encode(actions, chunks, tokens) == RFSQ_OK, "legal actions are encoded");
    for (size_t i = 0; i < chunks * L; ++i)
        require(tokens[i] >= 0 && tokens[i] < RFSQ_VOCABULARY, "tokens are of the vocabulary");
    if (chunks > 0) {
        const size_t place = (size_t)rand() % (chunks * N);
        actions[place] = illegal[rand() % 4];
        require(rfsq_encode(actions, chunks, unwritten) == RFSQ_ILLEGAL_VALUE, "illegal actions are refused");
        require(is_untouched(unwritten, chunks, L * sizeof *unwritten, place / N), "nothing is written then");
    }
    release(actions);
    release(tokens);
    release(unwritten);
}

static void decode(size_t chunks, size_t length)
{
    const int32_t illegal[] = {-1, RFSQ_VOCABULARY, INT32_MIN, INT32_MAX};
    int32_t *tokens = array(chunks * length);
    float *actions = array(chunks * N), *unwritten = array(chunks * N);
    for (size_t i = 0; i < chunks * length; ++i)
        tokens[i] = rand() % 8 ? rand() % RFSQ_VOCABULARY : RFSQ_VOCABULARY - 1;
    require(rfsq_decode(tokens, length, chunks, actions) == RFSQ_OK, "legal tokens are decoded");
    for (size_t i = 0; i < chunks * N; ++i)
        require(isfinite(actions[i]), "actions are finite");
    require(rfsq_decode(tokens, 0, chunks, unwritten) == RFSQ_ILLEGAL_VALUE, "a chunk has tokens");
    require(rfsq_decode(tokens, L + 1, chunks, unwritten) == RFSQ_ILLEGAL_VALUE, "a chunk has no more tokens");
    require(is_untouched(unwritten, chunks, N * sizeof *unwritten, 0), "nothing is written then");
    if (chunks > 0) {
        const size_t place = (size_t)rand() % (chunks * length);
        tokens[place] = illegal[rand() % 4];
        require(rfsq_decode(tokens, length, chunks, unwritten) == RFSQ_ILLEGAL_VALUE, "illegal tokens are refused");
        require(is_untouched(unwritten, chunks, N * sizeof *unwritten, place / length), "nothing is written then");
    }
    release(tokens);
    release(actions);
    release(unwritten);
}

int main(void)
{
    for (size_t chunks = 0; chunks <= MOST_CHUNKS; ++chunks) {
        encode(chunks);
        for (size_t length = 1; length <= L; ++length)
            decode(chunks, length);
    }
    puts("nothing found");
    return 0;
}
