#include "client/needle_plant.h"

#include "kernels/sample.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* longreach-tiny was trained on facts of these kinds about names of two common words. */
static const char *const attributes[] = {"access code",   "phone number", "account number", "badge number",
                                         "ticket number", "room number",  "serial number",  "locker code",
                                         "order number",  "case number",  "invoice number", "license number"};
static const char *const words[] = {"silver", "window", "garden",  "river",  "copper",  "bridge",  "yellow", "basket",
                                    "winter", "harbor", "marble",  "candle", "purple",  "forest",  "orange", "anchor",
                                    "velvet", "ladder", "golden",  "island", "summer",  "pocket",  "gentle", "mirror",
                                    "frozen", "valley", "bright",  "hammer", "quiet",   "meadow",  "rapid",  "lantern",
                                    "hollow", "button", "crystal", "engine", "distant", "feather", "stone",  "cloud",
                                    "wooden", "table",  "green",   "market", "little",  "castle",  "broken", "arrow"};
enum { N_ATTRIBUTES = sizeof attributes / sizeof attributes[0], N_WORDS = sizeof words / sizeof words[0] };

struct dice {
    uint64_t seed;
    int64_t next;
};

static int64_t roll(struct dice *dice, int64_t n)
{
    return (int64_t)(lr_sample_uniform(dice->seed, dice->next++) * (double)n);
}

/* Two different words that no needle before has together. */
static void name_needle(struct dice *dice, struct lr_needle *needles, int64_t index)
{
    for (;;) {
        int64_t first = roll(dice, N_WORDS), second = roll(dice, N_WORDS), i;
        char name[64];
        snprintf(name, sizeof name, " of %s %s", words[first], words[second]);
        for (i = 0; i < index && !strstr(needles[i].subject, name); i++)
            continue;
        if (first == second || i < index)
            continue;
        snprintf(needles[index].subject, sizeof needles[index].subject, "%s%s", attributes[roll(dice, N_ATTRIBUTES)],
                 name);
        needles[index].value = 100000 + roll(dice, 900000);
        return;
    }
}

static int is_taken(const struct lr_needle *needles, int64_t n, size_t offset)
{
    for (int64_t i = 0; i < n; i++)
        if (needles[i].offset == offset)
            return 1;
    return 0;
}

static int is_boundary(const char *text, size_t at)
{
    return at == 0 || text[at - 1] == '\n';
}

/* The free boundary nearest to `wanted`; n + 1 where there is none. */
static size_t
nearest_boundary(const char *text, size_t n, size_t wanted, const struct lr_needle *needles, int64_t index)
{
    for (size_t away = 0; away <= n; away++) {
        if (away <= wanted && is_boundary(text, wanted - away) && !is_taken(needles, index, wanted - away))
            return wanted - away;
        if (wanted + away <= n && is_boundary(text, wanted + away) && !is_taken(needles, index, wanted + away))
            return wanted + away;
    }
    return n + 1;
}

static int by_offset(const void *a, const void *b)
{
    const struct lr_needle *x = a, *y = b;
    return (x->offset > y->offset) - (x->offset < y->offset);
}

enum lr_status lr_needles_make(
    const char *text, size_t n_bytes, int64_t n_needles, uint64_t seed, struct lr_needle *out, struct lr_error *err)
{
    struct dice dice = {.seed = seed};
    if (n_needles > N_WORDS * (N_WORDS - 1) / 2)
        return lr_fail(err, LR_INVALID, "%lld needles, there are names for %d", (long long)n_needles,
                       N_WORDS * (N_WORDS - 1) / 2);
    for (int64_t i = 0; i < n_needles; i++) {
        size_t wanted = (size_t)roll(&dice, (int64_t)n_bytes + 1);
        out[i].offset = nearest_boundary(text, n_bytes, wanted, out, i);
        if (out[i].offset > n_bytes)
            return lr_fail(err, LR_INVALID, "the document has too few lines for %lld needles", (long long)n_needles);
        out[i].depth = n_bytes > 0 ? (double)out[i].offset / (double)n_bytes : 0.0;
        name_needle(&dice, out, i);
    }
    qsort(out, (size_t)n_needles, sizeof *out, by_offset);
    return LR_OK;
}

enum lr_status lr_needles_plant(const char *text,
                                size_t n_bytes,
                                const struct lr_needle *needles,
                                int64_t n_needles,
                                char **out,
                                size_t *n_out,
                                struct lr_error *err)
{
    char *planted = malloc(n_bytes + (size_t)n_needles * 160 + 1);
    size_t from = 0, at = 0;
    if (!planted)
        return lr_fail(err, LR_NO_MEMORY, "no memory for a text of %zu bytes", n_bytes);
    for (int64_t i = 0; i < n_needles; i++) {
        memcpy(planted + at, text + from, needles[i].offset - from);
        at += needles[i].offset - from;
        from = needles[i].offset;
        at += (size_t)sprintf(planted + at, "The %s is %lld.\n", needles[i].subject, (long long)needles[i].value);
    }
    memcpy(planted + at, text + from, n_bytes - from);
    at += n_bytes - from;
    planted[at] = '\0';
    *out = planted;
    *n_out = at;
    return LR_OK;
}
