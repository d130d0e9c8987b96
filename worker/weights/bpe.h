/* Byte-pair encoding: a vocabulary of byte strings and the ranked merges between them (Sennrich et
 * al. 2016, over bytes as in GPT-2). One thread. */
#ifndef LR_WORKER_WEIGHTS_BPE_H
#define LR_WORKER_WEIGHTS_BPE_H

#include "base/status.h"
#include <stddef.h>
#include <stdint.h>

struct lr_bpe;

/* Ids that a text became. Zero-initialised by the caller, who frees ids. */
struct lr_token_buffer {
    int32_t *ids;
    int64_t n_ids;
    int64_t capacity;
};

LR_MUST_USE enum lr_status lr_tokens_push(struct lr_token_buffer *buffer, int32_t id, struct lr_error *err);

LR_MUST_USE enum lr_status lr_bpe_create(int64_t n_tokens, int64_t n_merges, struct lr_bpe **out, struct lr_error *err);
void lr_bpe_destroy(struct lr_bpe *bpe);

/* A token's bytes [n] are copied. LR_CORRUPT where the id or the bytes are taken. */
LR_MUST_USE enum lr_status
lr_bpe_add_token(struct lr_bpe *bpe, int32_t id, const char *bytes, size_t n, struct lr_error *err);

/* The id of a byte string, or -1. */
int32_t lr_bpe_find(const struct lr_bpe *bpe, const char *bytes, size_t n);

/* The bytes of a token, or NULL. */
const char *lr_bpe_token(const struct lr_bpe *bpe, int32_t id, size_t *n);

/* left + right -> result; merges rank in the order in which they are added. A pair that is added
 * twice keeps the later rank, as in HuggingFace tokenizers. */
LR_MUST_USE enum lr_status
lr_bpe_add_merge(struct lr_bpe *bpe, int32_t left, int32_t right, int32_t result, struct lr_error *err);

/* Ends the building: LR_CORRUPT where a single byte has no token. `whole_words`: a word that is in
 * the vocabulary becomes that token at once (ignore_merges). */
LR_MUST_USE enum lr_status lr_bpe_finish(struct lr_bpe *bpe, int whole_words, struct lr_error *err);

/* Appends the ids of one word of n bytes. Time n log n. */
LR_MUST_USE enum lr_status
lr_bpe_encode(struct lr_bpe *bpe, const char *word, size_t n, struct lr_token_buffer *out, struct lr_error *err);

#endif
