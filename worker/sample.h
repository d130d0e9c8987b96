/* Choosing the next token from logits. Pure functions; the random number is a function of (seed,
 * position), so the same question with the same seed gives the same text on any number of workers.
 */
#ifndef LR_WORKER_SAMPLE_H
#define LR_WORKER_SAMPLE_H

#include "base/status.h"
#include <stdint.h>

struct lr_sampling {
    float temperature; /* 0: greedy, the lowest id among the largest logits */
    int32_t top_k;     /* 0: all; else only the k largest logits (ties: the lower id) */
    float top_p;       /* 1: all; else the fewest tokens, by falling probability, whose sum reaches top_p */
    uint64_t seed;
};

/* Uniform in [0, 1): a counter-based generator (splitmix64's finaliser, Steele et al. 2014) of seed
 * and position. */
double lr_sample_uniform(uint64_t seed, int64_t position);

/* The next token for `position`. Softmax, sums and comparisons run in float64 over tokens sorted by
 * (falling logit, rising id), so the choice depends on the logits' bits only. `scratch` holds
 * `vocab` ints. NaN logits lose. */
int32_t
lr_sample(const struct lr_sampling *sampling, const float *logits, int64_t vocab, int64_t position, int32_t *scratch);

#endif
