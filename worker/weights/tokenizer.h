/* The tokenizer of a HuggingFace directory: byte-level BPE from tokenizer.json.
 *
 *   text -> added tokens cut out -> normalizer -> pre-tokenizer (words) -> BPE -> ids
 *
 * Equal to HuggingFace tokenizers, without its post-processor: no token is added that the text does
 * not have. One thread at a time. */
#ifndef LR_WORKER_WEIGHTS_TOKENIZER_H
#define LR_WORKER_WEIGHTS_TOKENIZER_H

#include "base/status.h"
#include "worker/weights/bpe.h"

struct lr_tokenizer;

enum { LR_TOKENIZE_PARSE_SPECIAL = 1 }; /* "<|endoftext|>" in the text becomes that token */

/* Reads model_dir/tokenizer.json. LR_UNSUPPORTED names a part that we do not have. */
LR_MUST_USE enum lr_status lr_tokenizer_load(const char *model_dir, struct lr_tokenizer **out, struct lr_error *err);

/* The same over the text of a tokenizer.json; `path` is for messages. */
LR_MUST_USE enum lr_status lr_tokenizer_parse(
    const char *json, size_t json_bytes, const char *path, struct lr_tokenizer **out, struct lr_error *err);
void lr_tokenizer_free(struct lr_tokenizer *tokenizer);

/* One more than the highest id. */
int64_t lr_tokenizer_size(const struct lr_tokenizer *tokenizer);

/* Appends the ids of the text to `out`. LR_INVALID names the byte where it stops being UTF-8. */
LR_MUST_USE enum lr_status lr_tokenizer_encode(struct lr_tokenizer *tokenizer,
                                               const char *text,
                                               size_t n_bytes,
                                               int flags,
                                               struct lr_token_buffer *out,
                                               struct lr_error *err);

/* The bytes of the ids, special tokens as their text, with a NUL behind the last; the caller frees them. They need
 * not be valid UTF-8. LR_INVALID for an id without a token. */
LR_MUST_USE enum lr_status lr_tokenizer_decode(const struct lr_tokenizer *tokenizer,
                                               const int32_t *ids,
                                               int64_t n_ids,
                                               char **bytes,
                                               size_t *n_bytes,
                                               struct lr_error *err);

#endif
