/**
 * @file rfsq_tokenizer.h
 * @brief Robust RFSQ action tokens: encoder and decoders of one model. Generated, do not edit.
 *
 * Plain C11 without allocation or global state: every function may be called from any thread, a real-time one too.
 * No array may overlap another of the same call; none needs more alignment than its type.
 *
 * Every function returns RFSQ_OK, or RFSQ_ILLEGAL_VALUE where a value is not legal: a token that is no level, an action
 * that is not finite or beyond RFSQ_ACTION_LIMIT, statistics that no encoder gives, probabilities that are none or do
 * not sum to 1 within 1/256, logits that are not a number, infinite above, or all -inf. A call of at most
 * RFSQ_CHECKED_STEPS steps then writes nothing; a longer one may have written whole blocks of so many steps before it.
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

/** Identity of weights, constants and normaliser: what tokens mean. */
#define RFSQ_FINGERPRINT "/* @FINGERPRINT@ */"
/** How residuals are normalised. */
#define RFSQ_MODE "/* @MODE@ */"
/** T: control steps of a chunk. */
#define RFSQ_CHUNK_LENGTH /* @CHUNK_LENGTH@ */
/** A: dimensions of an action. */
#define RFSQ_ACTION_DIM /* @ACTION_DIM@ */
/** D: latent dimensions. */
#define RFSQ_LATENT_DIM /* @LATENT_DIM@ */
/** L: residual layers. */
#define RFSQ_NUM_LAYERS /* @NUM_LAYERS@ */
/** K: tokens are 0 ... K - 1. */
#define RFSQ_NUM_LEVELS /* @NUM_LEVELS@ */
/** The largest |action|: beyond it float32 overflows. */
#define RFSQ_ACTION_LIMIT /* @ACTION_LIMIT@ */
/** Steps whose values are all checked before any is computed with. */
#define RFSQ_CHECKED_STEPS /* @CHECKED_STEPS@ */

/* @DECLARATIONS@ */

#ifdef __cplusplus
}
#endif

#endif
