/* A needle run's prompts as JSON, for other engines to answer:
 *   {"document": TEXT, "tokens": N, "questions": [{"prompt": TEXT, "expected": VALUE, "depth": 0 to 1}, ...]}
 * Worker 0 only. */
#ifndef LR_CLIENT_NEEDLE_PROMPTS_H
#define LR_CLIENT_NEEDLE_PROMPTS_H

#include "client/needle_plant.h"

/* The planted document of `n_bytes` bytes of UTF-8 and `n_tokens` tokens, and prompts [n_needles], one for each needle.
 * Replaces the file at `path`; after a failure it may hold a part. Blocks. */
LR_MUST_USE enum lr_status lr_needle_prompts_write(const char *path,
                                                   const char *document,
                                                   size_t n_bytes,
                                                   int64_t n_tokens,
                                                   const struct lr_needle *needles,
                                                   char *const *prompts,
                                                   int64_t n_needles,
                                                   struct lr_error *err);

#endif
