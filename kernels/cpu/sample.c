/* Sampling: a token's weight is an integer, so nothing needs sorting. A search narrows the order of choice down to one
 * token: cut the range into bins, count and weigh each, keep the bin in which the goal lies.
 *
 *   first cut    linear in the exponent           |  |  |##|  |  |  ...
 *   next cuts    linear in the token's place            |  |  |#|  |
 */
#include "kernels/sample.h"

#include "kernels/cpu/cpu.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/simd.h"

enum { BINS = 2048, CHUNK = 512 };

/* Tokens of one bin, or of all bins before one. */
struct mass {
    uint64_t n_tokens, weight;
};

/* What a goal is measured in. */
enum measure { TOKENS, WEIGHT };

static uint64_t measured(struct mass mass, enum measure measure)
{
    return measure == TOKENS ? mass.n_tokens : mass.weight;
}

struct row {
    const float *logits;
    int64_t vocab;
    float largest;
    double scale; /* 1 / temperature */
};

struct cut {
    struct mass bins[BINS];
    int32_t last[BINS]; /* a token of the bin */
};

static void add(struct cut *cut, int bin, uint64_t weight, int64_t id)
{
    cut->bins[bin].n_tokens++;
    cut->bins[bin].weight += weight;
    cut->last[bin] = (int32_t)id;
}

/* By exponent: all tokens that have a weight. */
static void cut_exponents(const struct row *row, struct cut *cut)
{
    uint64_t weights[CHUNK];
    int32_t bins[CHUNK];
    memset(cut, 0, sizeof *cut);
    for (int64_t first = 0; first < row->vocab; first += CHUNK) {
        int64_t n = row->vocab - first < CHUNK ? row->vocab - first : CHUNK;
        for (int64_t i = 0; i < n; i++) {
            double x = lr_sample_exponent(row->logits[first + i], row->largest, row->scale);
            weights[i] = lr_sample_weight(x);
            bins[i] = lr_sample_bin(x, BINS);
        }
        for (int64_t i = 0; i < n; i++)
            if (bins[i] < BINS)
                add(cut, bins[i], weights[i], first + i);
    }
}

/* By place: the tokens of places [begin, end), 2^shift places a bin. */
static void cut_places(const struct row *row, uint64_t begin, uint64_t end, int shift, struct cut *cut)
{
    memset(cut, 0, sizeof *cut);
    for (int64_t i = 0; i < row->vocab; i++) {
        uint64_t offset = lr_sample_place(lr_sample_key(row->logits[i]), i) - begin;
        if (offset < end - begin)
            add(cut, (int)(offset >> shift),
                lr_sample_weight(lr_sample_exponent(row->logits[i], row->largest, row->scale)), i);
    }
}

static int bin_of_key(const struct row *row, uint32_t key)
{
    return lr_sample_bin(lr_sample_exponent(lr_sample_logit(key), row->largest, row->scale), BINS);
}

/* The first key, from the largest logit's on, whose exponent lies in bin `bin` or behind it. */
static uint32_t first_key(const struct row *row, int bin)
{
    uint32_t low = lr_sample_key(row->largest), high = lr_sample_key(-INFINITY);
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (bin_of_key(row, middle) >= bin)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* The first bin up to which the cut measures `goal`, which it does reach; *before gets what lies before the bin. */
static int find_bin(const struct cut *cut, enum measure measure, uint64_t goal, struct mass *before)
{
    *before = (struct mass){0, 0};
    for (int bin = 0;; bin++) {
        struct mass with = {before->n_tokens + cut->bins[bin].n_tokens, before->weight + cut->bins[bin].weight};
        if (measured(with, measure) >= goal)
            return bin;
        *before = with;
    }
}

/* The first token in order up to which, itself included, the row measures `goal`; *weight: the sum up to there. */
static int32_t
find_token(const struct row *row, const struct cut *first, enum measure measure, uint64_t goal, uint64_t *weight)
{
    struct cut next;
    const struct cut *cut = first;
    struct mass before;
    int bin = find_bin(cut, measure, goal, &before);
    uint64_t begin = 0, end = 0;
    *weight = before.weight;
    if (cut->bins[bin].n_tokens > 1) {
        begin = lr_sample_place(first_key(row, bin), 0);
        end = lr_sample_place(first_key(row, bin + 1), 0);
    }
    while (cut->bins[bin].n_tokens > 1) {
        int shift = 0;
        while ((end - begin - 1) >> shift >= BINS)
            shift++;
        goal -= measured(before, measure);
        cut_places(row, begin, end, shift, &next);
        cut = &next;
        bin = find_bin(cut, measure, goal, &before);
        *weight += before.weight;
        begin += (uint64_t)bin << shift;
        end = end - begin < (uint64_t)1 << shift ? end : begin + ((uint64_t)1 << shift);
    }
    *weight += cut->bins[bin].weight;
    return cut->last[bin];
}

static int32_t draw(const struct row *row, const struct lr_sampling *sampling, int64_t position)
{
    struct cut cut;
    struct mass all = {0, 0};
    cut_exponents(row, &cut);
    for (int bin = 0; bin < BINS; bin++) {
        all.n_tokens += cut.bins[bin].n_tokens;
        all.weight += cut.bins[bin].weight;
    }
    uint64_t total = all.weight, unused;
    if (sampling->top_k > 0 && (uint64_t)sampling->top_k < all.n_tokens)
        find_token(row, &cut, TOKENS, (uint64_t)sampling->top_k, &total);
    uint64_t kept = total;
    if (sampling->top_p < 1.0f)
        find_token(row, &cut, WEIGHT, lr_sample_nucleus(sampling->top_p, total), &kept);
    uint64_t target = lr_sample_high_product(lr_sample_bits(sampling->seed, position), kept);
    return find_token(row, &cut, WEIGHT, target + 1, &unused);
}

static void sample_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_sample_args *a = args;
    for (int64_t t = first; t < last; t++) {
        struct row row = {.logits = a->logits + t * a->vocab, .vocab = a->vocab};
        uint64_t best = UINT64_MAX;
        for (int64_t i = 0; i < a->vocab; i++) {
            uint64_t place = lr_sample_place(lr_sample_key(row.logits[i]), i);
            best = place < best ? place : best;
        }
        row.largest = lr_sample_logit((uint32_t)(best >> LR_SAMPLE_ID_BITS));
        if (!isfinite(row.largest)) {
            a->ids[t] = -1;
        } else if (a->sampling[t].temperature <= 0.0f) {
            a->ids[t] = (int32_t)(best & (((uint64_t)1 << LR_SAMPLE_ID_BITS) - 1));
        } else {
            row.scale = 1.0 / (double)a->sampling[t].temperature;
            a->ids[t] = draw(&row, &a->sampling[t], a->positions[t]);
        }
    }
}

void LR_ISA(lr_sample)(const struct lr_exec *exec, const struct lr_sample_args *args)
{
    lr_run_rows(exec, args->n_rows, args->vocab, sample_rows, args);
}
