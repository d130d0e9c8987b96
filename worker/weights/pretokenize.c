#include "worker/weights/pretokenize.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PATTERN_BYTES = 1 << 16, JIT_STACK_BYTES = 1 << 20 };

/* Unicode's White_Space, as the inside of a character class. */
static const char white_space[] = "\\x09-\\x0d\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}"
                                  "\\x{202f}\\x{205f}\\x{3000}";

struct lr_split {
    pcre2_code *code;
    pcre2_match_data *match;
    pcre2_match_context *limits;
    pcre2_jit_stack *stack;
    int matches_only;
    int has_jit;
};

static void free_split(struct lr_split *split)
{
    if (!split)
        return;
    pcre2_match_data_free(split->match);
    pcre2_match_context_free(split->limits);
    pcre2_jit_stack_free(split->stack);
    pcre2_code_free(split->code);
    free(split);
}

void lr_pretokenizer_free(struct lr_pretokenizer *pretokenizer)
{
    for (int i = 0; i < pretokenizer->n_splits; i++)
        free_split(pretokenizer->splits[i]);
    memset(pretokenizer, 0, sizeof *pretokenizer);
}

/* The pattern with \s and \S spelled out. The result is at most 128 times as long; the caller frees it. */
static char *spell_out(const char *pattern, size_t n, size_t *length)
{
    char *out = malloc(n * (sizeof white_space + 4) + 1);
    size_t at = 0;
    int in_class = 0;
    for (size_t i = 0; out && i < n; i++) {
        int space = pattern[i] == '\\' && i + 1 < n && (pattern[i + 1] == 's' || (pattern[i + 1] == 'S' && !in_class));
        if (space) {
            const char *open = in_class ? "" : pattern[i + 1] == 'S' ? "[^" : "[";
            size_t opening = strlen(open);
            memcpy(out + at, open, opening);
            memcpy(out + at + opening, white_space, sizeof white_space - 1);
            at += opening + sizeof white_space - 1;
            if (!in_class)
                out[at++] = ']';
            i++;
            continue;
        }
        out[at++] = pattern[i];
        if (pattern[i] == '\\' && i + 1 < n)
            out[at++] = pattern[++i];
        else if (pattern[i] == '[')
            in_class = 1;
        else if (pattern[i] == ']')
            in_class = 0;
    }
    *length = at;
    return out;
}

static enum lr_status compile(struct lr_split *split, const char *pattern, size_t n, struct lr_error *err)
{
    size_t length;
    char *spelled = spell_out(pattern, n, &length);
    if (!spelled)
        return lr_fail(err, LR_NO_MEMORY, "no memory for a pattern of %zu bytes", n);
    int code;
    PCRE2_SIZE where;
    split->code = pcre2_compile((PCRE2_SPTR)spelled, length, PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &code,
                                &where, NULL);
    free(spelled);
    if (!split->code) {
        PCRE2_UCHAR why[128];
        pcre2_get_error_message(code, why, sizeof why);
        return lr_fail(err, LR_CORRUPT, "the pattern '%.80s' does not compile: %s", pattern, (const char *)why);
    }
    split->match = pcre2_match_data_create_from_pattern(split->code, NULL);
    split->limits = pcre2_match_context_create(NULL);
    if (!split->match || !split->limits)
        return lr_fail(err, LR_NO_MEMORY, "no memory for a pattern of %zu bytes", n);
    pcre2_set_match_limit(split->limits, 20000000);
    split->has_jit = pcre2_jit_compile(split->code, PCRE2_JIT_COMPLETE) == 0;
    if (split->has_jit) {
        split->stack = pcre2_jit_stack_create(32 * 1024, JIT_STACK_BYTES, NULL);
        if (split->stack)
            pcre2_jit_stack_assign(split->limits, NULL, split->stack);
    }
    return LR_OK;
}

enum lr_status lr_pretokenizer_add(
    struct lr_pretokenizer *pretokenizer, const char *pattern, size_t n, int matches_only, struct lr_error *err)
{
    if (pretokenizer->n_splits == LR_MAX_SPLITS)
        return lr_fail(err, LR_FULL, "more than %d pre-tokenizers", LR_MAX_SPLITS);
    if (n > MAX_PATTERN_BYTES)
        return lr_fail(err, LR_UNSUPPORTED, "a pattern of %zu bytes, the most is %d", n, MAX_PATTERN_BYTES);
    struct lr_split *split = calloc(1, sizeof *split);
    if (!split)
        return lr_fail(err, LR_NO_MEMORY, "no memory for a pattern");
    split->matches_only = matches_only;
    enum lr_status status = compile(split, pattern, n, err);
    if (status == LR_OK)
        pretokenizer->splits[pretokenizer->n_splits++] = split;
    else
        free_split(split);
    return status;
}

/* JIT first; what overflows its stack goes to the interpreter. */
static int run(const struct lr_split *split, const char *text, size_t n, size_t start)
{
    int found = pcre2_match(split->code, (PCRE2_SPTR)text, n, start, PCRE2_NO_UTF_CHECK, split->match, split->limits);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT)
        found = pcre2_match(split->code, (PCRE2_SPTR)text, n, start, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, split->match,
                            split->limits);
    return found;
}

static size_t character_bytes(const char *text, size_t n, size_t at)
{
    size_t next = at + 1;
    while (next < n && ((unsigned char)text[next] & 0xc0) == 0x80)
        next++;
    return next - at;
}

struct walk {
    const struct lr_pretokenizer *pretokenizer;
    lr_take_word *take;
    void *context;
};

static enum lr_status split_text(const struct walk *walk, int depth, const char *text, size_t n, struct lr_error *err)
{
    if (n == 0)
        return LR_OK;
    if (depth == walk->pretokenizer->n_splits)
        return walk->take(walk->context, text, n, err);
    const struct lr_split *split = walk->pretokenizer->splits[depth];
    size_t done = 0, start = 0;
    while (start < n) {
        int found = run(split, text, n, start);
        if (found == PCRE2_ERROR_NOMATCH)
            break;
        if (found < 0) {
            PCRE2_UCHAR why[128];
            pcre2_get_error_message(found, why, sizeof why);
            return lr_fail(err, LR_CORRUPT, "tokenizer.json: a pattern gave up on a text of %zu bytes: %s", n,
                           (const char *)why);
        }
        /* read before the levels below reuse nothing of ours: each split has its own match data */
        const PCRE2_SIZE *range = pcre2_get_ovector_pointer(split->match);
        size_t first = range[0], last = range[1];
        if (last <= first) { /* an empty match cuts nothing; \K may even put its start behind its end */
            start = (last > start ? last : start);
            start += start < n ? character_bytes(text, n, start) : 1;
            continue;
        }
        if (first < done) /* \K again: never hand out bytes twice */
            first = done;
        if (first > done && !split->matches_only)
            LR_TRY(split_text(walk, depth + 1, text + done, first - done, err));
        if (last > first)
            LR_TRY(split_text(walk, depth + 1, text + first, last - first, err));
        done = start = last > done ? last : done;
    }
    return done < n && !split->matches_only ? split_text(walk, depth + 1, text + done, n - done, err) : LR_OK;
}

enum lr_status lr_pretokenize(const struct lr_pretokenizer *pretokenizer,
                              const char *text,
                              size_t n,
                              lr_take_word *take,
                              void *context,
                              struct lr_error *err)
{
    struct walk walk = {pretokenizer, take, context};
    if (!pretokenizer->add_prefix_space || n == 0 || text[0] == ' ')
        return split_text(&walk, 0, text, n, err);
    char *spaced = malloc(n + 1);
    if (!spaced)
        return lr_fail(err, LR_NO_MEMORY, "no memory for a text of %zu bytes", n);
    spaced[0] = ' ';
    memcpy(spaced + 1, text, n);
    enum lr_status status = split_text(&walk, 0, spaced, n + 1, err);
    free(spaced);
    return status;
}
