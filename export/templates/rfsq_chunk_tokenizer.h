/**
 * @file rfsq_tokenizer.h
 * @brief Chunk tokens of robot actions: encoder and decoder of one code. Generated, do not edit.
 *
 * Plain C11 without allocation or global state: every function may be called from any thread, a real-time one too.
 * No array may overlap another of the same call; none needs more alignment than its type.
 * Of tokens they take at most 64 KiB of stack for the largest sizes, and 8 KiB for chunks of 8 steps of 7 dimensions; of
 * beliefs 320 KiB and 16 KiB.
 *
 * Every function returns RFSQ_OK, or RFSQ_ILLEGAL_VALUE where a value is not legal: a token outside the vocabulary, a
 * number of tokens that no chunk has, an action that is not finite or beyond RFSQ_ACTION_LIMIT, probabilities that are
 * none or do not sum to 1 within 1/256, logits that are not a number, infinite above, or all -inf. A call of at most
 * RFSQ_CHECKED_STEPS steps then writes nothing; a longer one may have written whole chunks before it.
 */
#ifndef RFSQ_TOKENIZER_H
#define RFSQ_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/** What every function returns. */
enum { RFSQ_OK = 0, RFSQ_ILLEGAL_VALUE = 1 };

/** Identity of constants and normaliser: what tokens mean. */
#define RFSQ_FINGERPRINT "/* @FINGERPRINT@ */"
/** A chunk is coded as one, not step by step. */
#define RFSQ_MODE "chunk"
/** T: control steps of a chunk. */
#define RFSQ_CHUNK_LENGTH /* @CHUNK_LENGTH@ */
/** A: dimensions of an action. */
#define RFSQ_ACTION_DIM /* @ACTION_DIM@ */
/** L: tokens of a chunk. */
#define RFSQ_NUM_TOKENS /* @NUM_TOKENS@ */
/** Tokens are 0 ... RFSQ_VOCABULARY - 1. */
#define RFSQ_VOCABULARY /* @VOCABULARY@ */
/** C: classes of a chunk, escape last. */
#define RFSQ_NUM_CLASSES /* @NUM_CLASSES@ */
/** The largest |action|: beyond it float32 overflows. */
#define RFSQ_ACTION_LIMIT /* @ACTION_LIMIT@ */
/** Steps, in whole chunks, whose values are all checked before any is computed with. */
#define RFSQ_CHECKED_STEPS /* @CHECKED_STEPS@ */

/**
 * @brief Encode actions. Those that the normaliser maps beyond [-1, 1] are coded as its ends.
 * @param actions [num_chunks][T][A], physical units
 * @param num_chunks how many
 * @param tokens [num_chunks][L], written
 * @return RFSQ_OK or RFSQ_ILLEGAL_VALUE
 */
int rfsq_encode(const float *actions, size_t num_chunks, int32_t *tokens);

/**
 * @brief Decode the first tokens of chunks. Every sequence of legal tokens decodes.
 * @param tokens [num_chunks][num_tokens]
 * @param num_tokens of each chunk, 1 ... L
 * @param num_chunks how many
 * @param actions [num_chunks][T][A], physical units, written
 * @return RFSQ_OK or RFSQ_ILLEGAL_VALUE
 */
int rfsq_decode(const int32_t *tokens, size_t num_tokens, size_t num_chunks, float *actions);

/**
 * @brief Decode what is believed of the first tokens: expected values, and how far they may be off.
 * @param given [num_chunks][num_tokens][RFSQ_VOCABULARY], probabilities or logits
 * @param num_tokens of each chunk, 1 ... L
 * @param sharpness [num_tokens], what logits of each token are multiplied by: 1 / temperature, 1e-30 ... 1e30
 * @param is_logits whether `given` are logits; -inf is a word that cannot be
 * @param keeps_mode whether the likeliest class alone is decoded
 * @param num_chunks how many
 * @param actions [num_chunks][T][A], physical units, written
 * @param deviations [num_chunks][T][A], their standard deviations, written; or NULL
 * @param mode_probability [num_chunks], of the likeliest class, written; or NULL
 * @param mode [num_chunks], the likeliest classes, written; or NULL
 * @return RFSQ_OK or RFSQ_ILLEGAL_VALUE
 */
int rfsq_decode_beliefs(const float *given, size_t num_tokens, const float *sharpness, int is_logits, int keeps_mode,
                        size_t num_chunks, float *actions, float *deviations, float *mode_probability, int32_t *mode);

/**
 * @brief The same of classes, and of code bits.
 * @param classes [num_chunks][RFSQ_NUM_CLASSES], probabilities or logits, escape last; -inf is a class that cannot be
 * @param bits [num_chunks][num_bits], probabilities that they are 1, or the logits of these; -inf is surely 0
 * @param num_bits behind the class, as many as whole tokens have
 * @param sharpness [1 + num_bits], of the class and of each bit
 * @param is_logits whether both are logits
 * @param keeps_mode whether the likeliest class alone is decoded
 * @param num_chunks how many
 * @param actions [num_chunks][T][A], physical units, written
 * @param deviations [num_chunks][T][A], their standard deviations, written; or NULL
 * @param mode_probability [num_chunks], of the likeliest class, written; or NULL
 * @param mode [num_chunks], the likeliest classes, written; or NULL
 * @return RFSQ_OK or RFSQ_ILLEGAL_VALUE
 */
int rfsq_decode_bit_beliefs(const float *classes, const float *bits, size_t num_bits, const float *sharpness,
                            int is_logits, int keeps_mode, size_t num_chunks, float *actions, float *deviations,
                            float *mode_probability, int32_t *mode);

#ifdef __cplusplus
}
#endif

#endif
