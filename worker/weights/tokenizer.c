#include "worker/weights/tokenizer_impl.h"

#include "base/utf8.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

/* ---- normal forms ---- */

static int is_ascii(const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)text[i] >= 0x80)
            return 0;
    return 1;
}

static enum lr_status copy_text(const char *text, size_t n, char **out, size_t *n_out, struct lr_error *err)
{
    *out = malloc(n + 1);
    if (!*out)
        return lr_fail(err, LR_NO_MEMORY, "no memory for a text of %zu bytes", n);
    memcpy(*out, text, n);
    (*out)[n] = '\0';
    *n_out = n;
    return LR_OK;
}

enum lr_status
lr_normalize(enum lr_normal_form form, const char *text, size_t n, char **out, size_t *n_out, struct lr_error *err)
{
    static const utf8proc_option_t options[] = {
        [LR_NORMAL_NFC] = UTF8PROC_STABLE | UTF8PROC_COMPOSE,
        [LR_NORMAL_NFD] = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE,
        [LR_NORMAL_NFKC] = UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT,
        [LR_NORMAL_NFKD] = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT,
    };
    if (form == LR_NORMAL_NONE || is_ascii(text, n))
        return copy_text(text, n, out, n_out, err);
    utf8proc_uint8_t *mapped = NULL;
    utf8proc_ssize_t length = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)n, &mapped, options[form]);
    if (length < 0)
        return lr_fail(err, length == UTF8PROC_ERROR_NOMEM ? LR_NO_MEMORY : LR_INVALID,
                       "a text of %zu bytes cannot be normalised: %s", n, utf8proc_errmsg(length));
    *out = (char *)mapped;
    *n_out = (size_t)length;
    return LR_OK;
}

/* ---- added tokens ---- */

static int by_first_byte(const void *a, const void *b)
{
    const struct lr_added_token *x = a, *y = b;
    int first = (unsigned char)x->content[0] - (unsigned char)y->content[0];
    if (first != 0)
        return first;
    return (x->n_bytes < y->n_bytes) - (x->n_bytes > y->n_bytes);
}

void lr_added_set_sort(struct lr_added_set *set)
{
    if (set->n_tokens > 0)
        qsort(set->tokens, (size_t)set->n_tokens, sizeof *set->tokens, by_first_byte);
    int64_t at = 0;
    for (int byte = 0; byte <= 256; byte++) {
        while (at < set->n_tokens && (unsigned char)set->tokens[at].content[0] < byte)
            at++;
        set->first_of[byte] = at;
    }
}

/* The longest added token that begins at text[at], or NULL. */
static const struct lr_added_token *match_at(const struct lr_added_set *set, const char *text, size_t n, size_t at)
{
    unsigned char first = (unsigned char)text[at];
    for (int64_t i = set->first_of[first]; i < set->first_of[first + 1]; i++) {
        const struct lr_added_token *token = &set->tokens[i];
        if (token->n_bytes <= n - at && memcmp(text + at, token->content, token->n_bytes) == 0)
            return token;
    }
    return NULL;
}

static int32_t code_point_at(const char *text, size_t n, size_t at, size_t *bytes)
{
    utf8proc_int32_t code;
    utf8proc_ssize_t length = utf8proc_iterate((const utf8proc_uint8_t *)text + at, (utf8proc_ssize_t)(n - at), &code);
    *bytes = length > 0 ? (size_t)length : 1;
    return length > 0 ? code : -1;
}

static int32_t code_point_before(const char *text, size_t at, size_t *bytes)
{
    size_t start = at - 1, length;
    while (start > 0 && at - start < 4 && ((unsigned char)text[start] & 0xc0) == 0x80)
        start--;
    *bytes = at - start;
    return code_point_at(text, at, start, &length);
}

static int is_white_space(int32_t code)
{
    return (code >= 9 && code <= 13) || code == 0x20 || code == 0x85 || code == 0xa0 || code == 0x1680 ||
           (code >= 0x2000 && code <= 0x200a) || code == 0x2028 || code == 0x2029 || code == 0x202f || code == 0x205f ||
           code == 0x3000;
}

/* \w: letters, marks, decimal digits, letter numbers, connectors, and the two joiners */
static int is_word(int32_t code)
{
    switch (utf8proc_category(code)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
        return 1;
    default:
        return code == 0x200c || code == 0x200d;
    }
}

static int stands_alone(const char *text, size_t n, size_t first, size_t last)
{
    size_t bytes;
    return (first == 0 || !is_word(code_point_before(text, first, &bytes))) &&
           (last == n || !is_word(code_point_at(text, n, last, &bytes)));
}

/* ---- encoding ---- */

struct encoding {
    struct lr_tokenizer *tokenizer;
    int flags;
    struct lr_token_buffer *out;
};

typedef enum lr_status take_piece(const struct encoding *e, const char *text, size_t n, struct lr_error *err);

static enum lr_status take_word(void *context, const char *word, size_t n, struct lr_error *err)
{
    const struct encoding *e = context;
    return lr_bpe_encode(e->tokenizer->bpe, word, n, e->out, err);
}

static enum lr_status encode_words(const struct encoding *e, const char *text, size_t n, struct lr_error *err)
{
    struct encoding copy = *e;
    return lr_pretokenize(&e->tokenizer->words, text, n, take_word, &copy, err);
}

/* Cuts the tokens of a set out of the text and gives the rest to `take`. */
static enum lr_status cut_added(const struct encoding *e,
                                const struct lr_added_set *set,
                                const char *text,
                                size_t n,
                                take_piece *take,
                                struct lr_error *err)
{
    size_t done = 0, at = 0, bytes;
    while (set->n_tokens > 0 && at < n) {
        const struct lr_added_token *token = match_at(set, text, n, at);
        if (!token) {
            at++;
            continue;
        }
        size_t first = at, last = at + token->n_bytes;
        at = last;
        if ((token->special && !(e->flags & LR_TOKENIZE_PARSE_SPECIAL)) || first < done ||
            (token->single_word && !stands_alone(text, n, first, last)))
            continue;
        while (token->lstrip && first > done && is_white_space(code_point_before(text, first, &bytes)))
            first -= bytes;
        while (token->rstrip && last < n && is_white_space(code_point_at(text, n, last, &bytes)))
            last += bytes;
        if (first > done)
            LR_TRY(take(e, text + done, first - done, err));
        LR_TRY(lr_tokens_push(e->out, token->id, err));
        done = last;
    }
    return done < n ? take(e, text + done, n - done, err) : LR_OK;
}

static enum lr_status encode_normalized(const struct encoding *e, const char *text, size_t n, struct lr_error *err)
{
    if (e->tokenizer->form == LR_NORMAL_NONE)
        return cut_added(e, &e->tokenizer->normalized, text, n, encode_words, err);
    char *normal;
    size_t n_normal;
    LR_TRY(lr_normalize(e->tokenizer->form, text, n, &normal, &n_normal, err));
    enum lr_status status = cut_added(e, &e->tokenizer->normalized, normal, n_normal, encode_words, err);
    free(normal);
    return status;
}

enum lr_status lr_tokenizer_encode(struct lr_tokenizer *tokenizer,
                                   const char *text,
                                   size_t n_bytes,
                                   int flags,
                                   struct lr_token_buffer *out,
                                   struct lr_error *err)
{
    size_t valid = lr_utf8_valid_prefix(text, n_bytes);
    if (valid < n_bytes)
        return lr_fail(err, LR_INVALID, "the text is not valid UTF-8 at byte %zu of %zu (0x%02x)", valid, n_bytes,
                       (unsigned)(unsigned char)text[valid]);
    struct encoding e = {tokenizer, flags, out};
    return cut_added(&e, &tokenizer->plain, text, n_bytes, encode_normalized, err);
}

/* ---- decoding ---- */

int64_t lr_tokenizer_size(const struct lr_tokenizer *tokenizer)
{
    return tokenizer->n_ids;
}

static const char *token_bytes(const struct lr_tokenizer *tokenizer, int32_t id, size_t *n)
{
    if (id < 0 || id >= tokenizer->n_ids)
        return NULL;
    if (!tokenizer->added_bytes[id])
        return lr_bpe_token(tokenizer->bpe, id, n);
    *n = strlen(tokenizer->added_bytes[id]);
    return tokenizer->added_bytes[id];
}

enum lr_status lr_tokenizer_decode(const struct lr_tokenizer *tokenizer,
                                   const int32_t *ids,
                                   int64_t n_ids,
                                   char **bytes,
                                   size_t *n_bytes,
                                   struct lr_error *err)
{
    size_t total = 0, n;
    for (int64_t i = 0; i < n_ids; i++) {
        if (!token_bytes(tokenizer, ids[i], &n))
            return lr_fail(err, LR_INVALID, "id %d at place %lld is no token: ids go from 0 to %lld", ids[i],
                           (long long)i, (long long)tokenizer->n_ids - 1);
        total += n;
    }
    char *out = malloc(total + 1), *at = out;
    if (!out)
        return lr_fail(err, LR_NO_MEMORY, "no memory for a text of %zu bytes", total);
    for (int64_t i = 0; i < n_ids; i++) {
        const char *from = token_bytes(tokenizer, ids[i], &n);
        memcpy(at, from, n);
        at += n;
    }
    *at = '\0';
    *bytes = out;
    *n_bytes = total;
    return LR_OK;
}

static void free_set(struct lr_added_set *set)
{
    for (int64_t i = 0; i < set->n_tokens; i++)
        free(set->tokens[i].content);
    free(set->tokens);
}

void lr_tokenizer_free(struct lr_tokenizer *tokenizer)
{
    if (!tokenizer)
        return;
    lr_bpe_destroy(tokenizer->bpe);
    free_set(&tokenizer->plain);
    free_set(&tokenizer->normalized);
    for (int64_t i = 0; tokenizer->added_bytes && i < tokenizer->n_ids; i++)
        free(tokenizer->added_bytes[i]);
    free(tokenizer->added_bytes);
    lr_pretokenizer_free(&tokenizer->words);
    free(tokenizer);
}
