/* Rotary frequencies from a config's rope parameters: default, linear, yarn (Peng et al. 2023) and
 * llama3. Both spellings: "rope_parameters", and the older "rope_scaling" beside "rope_theta". */
#ifndef LR_WORKER_MODELS_ROPE_SCALING_H
#define LR_WORKER_MODELS_ROPE_SCALING_H

#include "base/status.h"
#include <jansson.h>
#include <stdint.h>

struct lr_rope {
    int64_t rotary_dim;
    double *inv_freq; /* [rotary_dim / 2], malloc'd, the caller's */
    double attention_factor;
};

LR_MUST_USE enum lr_status lr_rope_read(const char *path,
                                        json_t *config,
                                        int64_t head_dim,
                                        double default_partial_factor,
                                        int64_t max_position_embeddings,
                                        struct lr_rope *out,
                                        struct lr_error *err);

#endif
