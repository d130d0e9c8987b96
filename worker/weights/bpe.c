#include "worker/weights/bpe.h"

#include <stdlib.h>
#include <string.h>

enum { CACHE_SLOTS = 1 << 15, CACHE_WORD_BYTES = 24, CACHE_IDS = 8 };

struct token {
    char *bytes; /* NULL: the id is free */
    size_t n;
};

struct merge {
    uint64_t pair; /* left << 32 | right; EMPTY_PAIR: free */
    int32_t rank;
    int32_t result;
};
static const uint64_t empty_pair = UINT64_MAX;

/* A word that was encoded before. */
struct cached {
    uint8_t n_bytes, n_ids; /* n_ids 0: free */
    char word[CACHE_WORD_BYTES];
    int32_t ids[CACHE_IDS];
};

/* One symbol of the word in work: a token, in a doubly linked list by position. */
struct symbol {
    int32_t id; /* -1: swallowed by its left neighbour */
    int32_t next, previous;
};

/* A pair that could be merged: lowest rank first, then leftmost. */
struct candidate {
    int32_t rank, position, result;
};

struct lr_bpe {
    struct token *tokens; /* [n_tokens] by id */
    int64_t n_tokens;
    int32_t *by_bytes; /* hash table of ids, -1 free */
    uint64_t by_bytes_mask;
    struct merge *merges; /* hash table */
    uint64_t merges_mask;
    int32_t n_merges;
    int32_t byte_ids[256];
    int whole_words;
    struct cached *cache;
    struct symbol *symbols;
    struct candidate *heap;
    size_t capacity; /* of symbols; the heap has twice as many */
    int64_t heap_size;
};

enum lr_status lr_tokens_push(struct lr_token_buffer *buffer, int32_t id, struct lr_error *err)
{
    if (buffer->n_ids == buffer->capacity) {
        int64_t capacity = buffer->capacity ? buffer->capacity * 2 : 256;
        int32_t *ids = realloc(buffer->ids, (size_t)capacity * sizeof *ids);
        if (!ids)
            return lr_fail(err, LR_NO_MEMORY, "no memory for %lld tokens", (long long)capacity);
        buffer->ids = ids;
        buffer->capacity = capacity;
    }
    buffer->ids[buffer->n_ids++] = id;
    return LR_OK;
}

/* FNV-1a */
static uint64_t hash_bytes(const char *bytes, size_t n)
{
    uint64_t h = 14695981039346656037u;
    for (size_t i = 0; i < n; i++)
        h = (h ^ (unsigned char)bytes[i]) * 1099511628211u;
    return h ^ h >> 29;
}

static uint64_t hash_pair(uint64_t pair)
{
    pair = (pair ^ pair >> 31) * 0x9e3779b97f4a7c15u;
    return pair ^ pair >> 32;
}

static uint64_t table_slots(int64_t n)
{
    uint64_t slots = 16;
    while (slots < 2 * (uint64_t)n)
        slots *= 2;
    return slots;
}

enum lr_status lr_bpe_create(int64_t n_tokens, int64_t n_merges, struct lr_bpe **out, struct lr_error *err)
{
    struct lr_bpe *bpe = calloc(1, sizeof *bpe);
    if (!bpe)
        return lr_fail(err, LR_NO_MEMORY, "no memory for a tokenizer");
    uint64_t token_slots = table_slots(n_tokens), merge_slots = table_slots(n_merges);
    bpe->n_tokens = n_tokens;
    bpe->tokens = calloc((size_t)n_tokens + 1, sizeof *bpe->tokens);
    bpe->by_bytes = malloc(token_slots * sizeof *bpe->by_bytes);
    bpe->merges = malloc(merge_slots * sizeof *bpe->merges);
    bpe->cache = calloc(CACHE_SLOTS, sizeof *bpe->cache);
    if (!bpe->tokens || !bpe->by_bytes || !bpe->merges || !bpe->cache) {
        lr_bpe_destroy(bpe);
        return lr_fail(err, LR_NO_MEMORY, "no memory for %lld tokens and %lld merges", (long long)n_tokens,
                       (long long)n_merges);
    }
    bpe->by_bytes_mask = token_slots - 1;
    bpe->merges_mask = merge_slots - 1;
    for (uint64_t i = 0; i < token_slots; i++)
        bpe->by_bytes[i] = -1;
    for (uint64_t i = 0; i < merge_slots; i++)
        bpe->merges[i].pair = empty_pair;
    *out = bpe;
    return LR_OK;
}

void lr_bpe_destroy(struct lr_bpe *bpe)
{
    if (!bpe)
        return;
    for (int64_t i = 0; bpe->tokens && i < bpe->n_tokens; i++)
        free(bpe->tokens[i].bytes);
    free(bpe->tokens);
    free(bpe->by_bytes);
    free(bpe->merges);
    free(bpe->cache);
    free(bpe->symbols);
    free(bpe->heap);
    free(bpe);
}

int32_t lr_bpe_find(const struct lr_bpe *bpe, const char *bytes, size_t n)
{
    for (uint64_t slot = hash_bytes(bytes, n);; slot++) {
        int32_t id = bpe->by_bytes[slot & bpe->by_bytes_mask];
        if (id < 0)
            return -1;
        if (bpe->tokens[id].n == n && memcmp(bpe->tokens[id].bytes, bytes, n) == 0)
            return id;
    }
}

const char *lr_bpe_token(const struct lr_bpe *bpe, int32_t id, size_t *n)
{
    if (id < 0 || id >= bpe->n_tokens || !bpe->tokens[id].bytes)
        return NULL;
    *n = bpe->tokens[id].n;
    return bpe->tokens[id].bytes;
}

enum lr_status lr_bpe_add_token(struct lr_bpe *bpe, int32_t id, const char *bytes, size_t n, struct lr_error *err)
{
    if (id < 0 || id >= bpe->n_tokens)
        return lr_fail(err, LR_CORRUPT, "token id %d is outside 0 to %lld", id, (long long)bpe->n_tokens - 1);
    if (bpe->tokens[id].bytes)
        return lr_fail(err, LR_CORRUPT, "token id %d is given twice", id);
    int32_t other = lr_bpe_find(bpe, bytes, n);
    if (other >= 0)
        return lr_fail(err, LR_CORRUPT, "tokens %d and %d are the same %zu bytes", other, id, n);
    char *copy = malloc(n + 1);
    if (!copy)
        return lr_fail(err, LR_NO_MEMORY, "no memory for token %d", id);
    memcpy(copy, bytes, n);
    copy[n] = '\0';
    bpe->tokens[id] = (struct token){copy, n};
    uint64_t slot = hash_bytes(bytes, n);
    while (bpe->by_bytes[slot & bpe->by_bytes_mask] >= 0)
        slot++;
    bpe->by_bytes[slot & bpe->by_bytes_mask] = id;
    return LR_OK;
}

static struct merge *find_merge(const struct lr_bpe *bpe, int32_t left, int32_t right)
{
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    for (uint64_t slot = hash_pair(pair);; slot++) {
        struct merge *merge = &bpe->merges[slot & bpe->merges_mask];
        if (merge->pair == pair || merge->pair == empty_pair)
            return merge;
    }
}

enum lr_status lr_bpe_add_merge(struct lr_bpe *bpe, int32_t left, int32_t right, int32_t result, struct lr_error *err)
{
    if ((uint64_t)bpe->n_merges >= bpe->merges_mask / 2 + 1)
        return lr_fail(err, LR_FULL, "more merges than announced");
    struct merge *merge = find_merge(bpe, left, right);
    merge->pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    merge->rank = bpe->n_merges++;
    merge->result = result;
    return LR_OK;
}

enum lr_status lr_bpe_finish(struct lr_bpe *bpe, int whole_words, struct lr_error *err)
{
    bpe->whole_words = whole_words;
    for (int byte = 0; byte < 256; byte++) {
        char one = (char)byte;
        bpe->byte_ids[byte] = lr_bpe_find(bpe, &one, 1);
        if (bpe->byte_ids[byte] < 0)
            return lr_fail(err, LR_UNSUPPORTED, "the vocabulary has no token for the byte 0x%02x", (unsigned)byte);
    }
    return LR_OK;
}

static int is_before(const struct candidate *a, const struct candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->position < b->position;
}

static void heap_push(struct lr_bpe *bpe, struct candidate candidate)
{
    int64_t i = bpe->heap_size++;
    for (; i > 0 && is_before(&candidate, &bpe->heap[(i - 1) / 2]); i = (i - 1) / 2)
        bpe->heap[i] = bpe->heap[(i - 1) / 2];
    bpe->heap[i] = candidate;
}

static struct candidate heap_pop(struct lr_bpe *bpe)
{
    struct candidate top = bpe->heap[0], last = bpe->heap[--bpe->heap_size];
    int64_t i = 0;
    for (;;) {
        int64_t child = 2 * i + 1;
        if (child >= bpe->heap_size)
            break;
        if (child + 1 < bpe->heap_size && is_before(&bpe->heap[child + 1], &bpe->heap[child]))
            child++;
        if (!is_before(&bpe->heap[child], &last))
            break;
        bpe->heap[i] = bpe->heap[child];
        i = child;
    }
    bpe->heap[i] = last;
    return top;
}

static void offer(struct lr_bpe *bpe, int32_t position)
{
    int32_t next = position >= 0 ? bpe->symbols[position].next : -1;
    if (next < 0)
        return;
    const struct merge *merge = find_merge(bpe, bpe->symbols[position].id, bpe->symbols[next].id);
    if (merge->pair != empty_pair)
        heap_push(bpe, (struct candidate){merge->rank, position, merge->result});
}

static enum lr_status make_room(struct lr_bpe *bpe, size_t n, struct lr_error *err)
{
    if (n <= bpe->capacity)
        return LR_OK;
    size_t capacity = n < 256 ? 256 : n + n / 2;
    void *symbols = realloc(bpe->symbols, capacity * sizeof *bpe->symbols);
    bpe->symbols = symbols ? symbols : bpe->symbols;
    /* a merge takes one candidate out and puts two in, at most n - 1 times, on top of n - 1 */
    void *heap = realloc(bpe->heap, 3 * capacity * sizeof *bpe->heap);
    bpe->heap = heap ? heap : bpe->heap;
    if (!symbols || !heap)
        return lr_fail(err, LR_NO_MEMORY, "no memory for a word of %zu bytes", n);
    bpe->capacity = capacity;
    return LR_OK;
}

/* Merges the symbols of a word until no pair has a rank. */
static void merge_word(struct lr_bpe *bpe, const char *word, int32_t n)
{
    for (int32_t i = 0; i < n; i++)
        bpe->symbols[i] = (struct symbol){bpe->byte_ids[(unsigned char)word[i]], i + 1 < n ? i + 1 : -1, i - 1};
    bpe->heap_size = 0;
    for (int32_t i = 0; i + 1 < n; i++)
        offer(bpe, i);
    while (bpe->heap_size > 0) {
        struct candidate top = heap_pop(bpe);
        struct symbol *left = &bpe->symbols[top.position];
        if (left->id < 0 || left->next < 0)
            continue;
        struct symbol *right = &bpe->symbols[left->next];
        const struct merge *merge = find_merge(bpe, left->id, right->id);
        if (merge->pair == empty_pair || merge->result != top.result)
            continue; /* one of the two was merged in the meantime */
        left->id = top.result;
        right->id = -1;
        left->next = right->next;
        if (left->next >= 0)
            bpe->symbols[left->next].previous = top.position;
        offer(bpe, left->previous);
        offer(bpe, top.position);
    }
}

static struct cached *find_cached(struct lr_bpe *bpe, const char *word, size_t n)
{
    return n <= CACHE_WORD_BYTES ? &bpe->cache[hash_bytes(word, n) & (CACHE_SLOTS - 1)] : NULL;
}

static void remember(struct cached *cached, const char *word, size_t n, const int32_t *ids, int64_t n_ids)
{
    if (!cached || n_ids > CACHE_IDS)
        return;
    cached->n_bytes = (uint8_t)n;
    cached->n_ids = (uint8_t)n_ids;
    memcpy(cached->word, word, n);
    memcpy(cached->ids, ids, (size_t)n_ids * sizeof *ids);
}

enum lr_status
lr_bpe_encode(struct lr_bpe *bpe, const char *word, size_t n, struct lr_token_buffer *out, struct lr_error *err)
{
    if (n == 0)
        return LR_OK;
    if (n > INT32_MAX / 4)
        return lr_fail(err, LR_INVALID, "a word of %zu bytes is longer than the tokenizer takes", n);
    if (bpe->whole_words) {
        int32_t id = lr_bpe_find(bpe, word, n);
        if (id >= 0)
            return lr_tokens_push(out, id, err);
    }
    struct cached *cached = find_cached(bpe, word, n);
    if (cached && cached->n_ids > 0 && cached->n_bytes == n && memcmp(cached->word, word, n) == 0) {
        for (int i = 0; i < cached->n_ids; i++)
            LR_TRY(lr_tokens_push(out, cached->ids[i], err));
        return LR_OK;
    }
    LR_TRY(make_room(bpe, n, err));
    merge_word(bpe, word, (int32_t)n);
    int64_t first = out->n_ids;
    for (int32_t i = 0; i >= 0; i = bpe->symbols[i].next)
        LR_TRY(lr_tokens_push(out, bpe->symbols[i].id, err));
    remember(cached, word, n, out->ids + first, out->n_ids - first);
    return LR_OK;
}
