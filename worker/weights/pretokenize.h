/* Cutting a text into words, as the pre_tokenizer of tokenizer.json says: a sequence of splits by
 * regular expression. PCRE2 in place of Oniguruma: \s and \S are spelled out, because PCRE2 counts
 * U+180E as white space and Oniguruma does not. */
#ifndef LR_WORKER_WEIGHTS_PRETOKENIZE_H
#define LR_WORKER_WEIGHTS_PRETOKENIZE_H

#include "base/status.h"
#include <stddef.h>

enum { LR_MAX_SPLITS = 8 };

struct lr_pretokenizer {
    int n_splits;
    struct lr_split *splits[LR_MAX_SPLITS];
    int add_prefix_space; /* a text that does not begin with a space gets one */
};

/* Adds a split by `pattern` [n bytes of UTF-8]. Matches become words; what lies between them too, unless
 * `matches_only`. LR_CORRUPT where the pattern does not compile, LR_FULL above LR_MAX_SPLITS. */
LR_MUST_USE enum lr_status lr_pretokenizer_add(
    struct lr_pretokenizer *pretokenizer, const char *pattern, size_t n, int matches_only, struct lr_error *err);
void lr_pretokenizer_free(struct lr_pretokenizer *pretokenizer);

/* Calls take(context, word, n) for every word of the text (valid UTF-8), in order, until it fails. */
typedef enum lr_status lr_take_word(void *context, const char *word, size_t n, struct lr_error *err);
LR_MUST_USE enum lr_status lr_pretokenize(const struct lr_pretokenizer *pretokenizer,
                                          const char *text,
                                          size_t n,
                                          lr_take_word *take,
                                          void *context,
                                          struct lr_error *err);

#endif
