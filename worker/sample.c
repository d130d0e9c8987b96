#include "worker/sample.h"

#include <math.h>
#include <stdlib.h>

static uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double lr_sample_uniform(uint64_t seed, int64_t position)
{
    uint64_t bits = mix(mix(seed + 0x9e3779b97f4a7c15u) + (uint64_t)position * 0x9e3779b97f4a7c15u);
    return (double)(bits >> 11) * 0x1p-53;
}

static int32_t greedy(const float *logits, int64_t vocab)
{
    int32_t best = 0;
    for (int64_t i = 1; i < vocab; i++)
        if (logits[i] > logits[best] || isnan(logits[best]))
            best = (int32_t)i;
    return best;
}

/* Larger logit first, then the lower id; NaN last. */
static int before(const float *logits, int32_t a, int32_t b)
{
    float x = isnan(logits[a]) ? -INFINITY : logits[a], y = isnan(logits[b]) ? -INFINITY : logits[b];
    return x > y || (x == y && a < b);
}

static int compare_tokens(const void *a, const void *b, void *logits)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return before(logits, x, y) ? -1 : x != y;
}

int32_t
lr_sample(const struct lr_sampling *sampling, const float *logits, int64_t vocab, int64_t position, int32_t *scratch)
{
    if (sampling->temperature <= 0.0f)
        return greedy(logits, vocab);
    for (int64_t i = 0; i < vocab; i++)
        scratch[i] = (int32_t)i;
    qsort_r(scratch, (size_t)vocab, sizeof *scratch, compare_tokens, (void *)(size_t)logits);
    int64_t n = sampling->top_k > 0 && sampling->top_k < vocab ? sampling->top_k : vocab;
    double scale = 1.0 / (double)sampling->temperature, top = logits[scratch[0]], total = 0.0;
    for (int64_t i = 0; i < n; i++)
        total += exp(((double)logits[scratch[i]] - top) * scale);
    double kept = 0.0;
    int64_t n_kept = 0;
    while (n_kept < n && (n_kept == 0 || kept < (double)sampling->top_p * total))
        kept += exp(((double)logits[scratch[n_kept++]] - top) * scale);
    double target = lr_sample_uniform(sampling->seed, position) * kept, sum = 0.0;
    for (int64_t i = 0; i < n_kept; i++) {
        sum += exp(((double)logits[scratch[i]] - top) * scale);
        if (target < sum)
            return scratch[i];
    }
    return scratch[n_kept - 1];
}
