/*
 * Decodes action tokens on a robot without Python: nothing but a C compiler and the two generated files of a bundle.
 *
 *     cc -std=c11 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra \
 *         -I build/bundle/engines/c examples/decode_tokens.c build/bundle/engines/c/rfsq_tokenizer.c -o decode_tokens
 *     ./decode_tokens tokens.bin                  prints the first chunk
 *     ./decode_tokens tokens.bin actions.bin      writes all of them
 *
 * tokens.bin holds raw int32 in this machine's byte order, [n][T][D][L], as numpy writes with `tokens.tofile(...)`;
 * actions.bin gets raw float32 [n][T][A] in physical units. Exit status: 0 where every chunk was decoded, 1 for input
 * that cannot be used, 2 for a wrong command line. Where it is not 0, no actions were written.
 *
 * For models whose tokens decode on their own, by default of all L = 8 layers: for another L name the decoder, such as
 * -DDECODE=rfsq_decode_l6.
 */
#include "rfsq_tokenizer.h"

#include <stdio.h>
#include <stdlib.h>

#ifndef DECODE
#define DECODE rfsq_decode_l8
#endif

/* Numbers in one chunk. */
#define TOKENS ((size_t)RFSQ_CHUNK_LENGTH * RFSQ_LATENT_DIM * RFSQ_NUM_LAYERS)
#define ACTIONS ((size_t)RFSQ_CHUNK_LENGTH * RFSQ_ACTION_DIM)

/* All chunks of a file, or NULL with a message on stderr. */
static int32_t *read_tokens(const char *path, size_t *num_chunks)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        perror(path);
        return NULL;
    }
    int32_t *tokens = NULL;
    size_t count = 0, room = 0;
    /* One chunk at a time, for a pipe too; what is left over of the last one shows in `got`. */
    size_t got = TOKENS * sizeof *tokens;
    while (got == TOKENS * sizeof *tokens) {
        if (count == room) {
            room = room == 0 ? 64 : 2 * room;
            int32_t *larger = realloc(tokens, room * TOKENS * sizeof *tokens);
            if (larger == NULL) {
                fprintf(stderr, "%s: more than %zu chunks do not fit into memory\n", path, count);
                free(tokens);
                fclose(file);
                return NULL;
            }
            tokens = larger;
        }
        got = fread(tokens + count * TOKENS, 1, TOKENS * sizeof *tokens, file);
        count += got == TOKENS * sizeof *tokens;
    }
    const int has_failed = ferror(file);
    fclose(file);
    if (has_failed) {
        fprintf(stderr, "%s: cannot be read to its end\n", path);
    } else if (got != 0) {
        fprintf(stderr, "%s: %zu bytes follow after %zu whole chunks; expected %zu bytes (int32[%d][%d][%d]) a chunk\n",
                path, got, count, TOKENS * sizeof *tokens, RFSQ_CHUNK_LENGTH, RFSQ_LATENT_DIM, RFSQ_NUM_LAYERS);
    } else if (count == 0) {
        fprintf(stderr, "%s: is empty\n", path);
    } else {
        *num_chunks = count;
        return tokens;
    }
    free(tokens);
    return NULL;
}

static int write_actions(const char *path, const float *actions, size_t num_chunks)
{
    FILE *file = fopen(path, "wb");
    if (file == NULL) {
        perror(path);
        return 1;
    }
    const size_t written = fwrite(actions, sizeof *actions * ACTIONS, num_chunks, file);
    /* A full disk may show only now. */
    if (fclose(file) != 0 || written != num_chunks) {
        fprintf(stderr, "%s: cannot be written\n", path);
        return 1;
    }
    return 0;
}

static void print_chunk(const float *actions)
{
    for (int step = 0; step < RFSQ_CHUNK_LENGTH; ++step) {
        for (int a = 0; a < RFSQ_ACTION_DIM; ++a)
            printf("%s%.9g", a == 0 ? "" : " ", (double)actions[step * RFSQ_ACTION_DIM + a]);
        printf("\n");
    }
}

int main(int argc, char **argv)
{
    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: %s TOKENS [ACTIONS]\n", argv[0]);
        return 2;
    }
    size_t num_chunks = 0;
    int32_t *tokens = read_tokens(argv[1], &num_chunks);
    if (tokens == NULL)
        return 1;
    float *actions = malloc(num_chunks * ACTIONS * sizeof *actions);
    int status = 1;
    if (actions == NULL)
        fprintf(stderr, "%zu chunks do not fit into memory\n", num_chunks);
    /* The whole file at once: where one token of it is illegal, nobody gets any action. */
    else if (DECODE(tokens, num_chunks, actions) != RFSQ_OK)
        fprintf(stderr, "%s: not all tokens are 0 ... %d: this is no file of tokens, or one of another model\n",
                argv[1], RFSQ_NUM_LEVELS - 1);
    else if (argc == 3)
        status = write_actions(argv[2], actions, num_chunks);
    else {
        print_chunk(actions);
        status = 0;
    }
    free(actions);
    free(tokens);
    return status;
}
