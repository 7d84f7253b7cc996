/*
 * Encodes the chunks of standard input and writes their tokens, and the actions decoded from them, to standard output:
 * for the processors that a test has to emulate.
 */
#include "rfsq_tokenizer.h"

#include <stdio.h>

enum { N = RFSQ_CHUNK_LENGTH * RFSQ_ACTION_DIM, L = RFSQ_NUM_TOKENS, MOST_CHUNKS = 1024 };

static float actions[MOST_CHUNKS * N], decoded[MOST_CHUNKS * N];
static int32_t tokens[MOST_CHUNKS * L];

int main(void)
{
    const size_t chunks = fread(actions, sizeof *actions * N, MOST_CHUNKS, stdin);
    if (rfsq_encode(actions, chunks, tokens) != RFSQ_OK || rfsq_decode(tokens, L, chunks, decoded) != RFSQ_OK)
        return 1;
    fwrite(tokens, sizeof *tokens * L, chunks, stdout);
    fwrite(decoded, sizeof *decoded * N, chunks, stdout);
    return fflush(stdout) == 0 ? 0 : 2;
}
