/* What tokenizer.c and tokenizer_json.c share. Private to worker/weights. */
#ifndef LR_WORKER_WEIGHTS_TOKENIZER_IMPL_H
#define LR_WORKER_WEIGHTS_TOKENIZER_IMPL_H

#include "worker/weights/pretokenize.h"
#include "worker/weights/tokenizer.h"

/* A token that is found in the text before anything else. */
struct lr_added_token {
    char *content; /* normalised where `normalized` */
    size_t n_bytes;
    int32_t id;
    unsigned char special, single_word, lstrip, rstrip, normalized;
};

/* Added tokens of one kind, sorted by first byte, longest first. */
struct lr_added_set {
    struct lr_added_token *tokens;
    int64_t n_tokens;
    int64_t first_of[257]; /* tokens with first byte b: [first_of[b], first_of[b + 1]) */
};

enum lr_normal_form { LR_NORMAL_NONE, LR_NORMAL_NFC, LR_NORMAL_NFD, LR_NORMAL_NFKC, LR_NORMAL_NFKD };

struct lr_tokenizer {
    struct lr_bpe *bpe;
    struct lr_added_set plain;      /* looked for in the text as it comes */
    struct lr_added_set normalized; /* looked for behind the normalizer */
    char **added_bytes;             /* [n_ids] what an added token decodes to, or NULL */
    int64_t n_ids;
    enum lr_normal_form form;
    struct lr_pretokenizer words;
};

/* Text in a normal form; the caller frees it. */
LR_MUST_USE enum lr_status
lr_normalize(enum lr_normal_form form, const char *text, size_t n, char **out, size_t *n_out, struct lr_error *err);

void lr_added_set_sort(struct lr_added_set *set);

#endif
