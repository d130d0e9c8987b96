/* The qwen3_next family. Called by worker/model.c only. */
#ifndef LR_WORKER_MODELS_QWEN3_NEXT_H
#define LR_WORKER_MODELS_QWEN3_NEXT_H

#include "worker/models/loader.h"
#include "worker/models/qwen3_next_config.h"

void lr_qwen3_next_dims(const struct lr_qwen3_next_config *config, struct lr_model_dims *out);

/* Visits every tensor of the model: measures them or loads them (see lr_loader). Fills the model's
 * layers and weights. */
LR_MUST_USE enum lr_status lr_qwen3_next_visit(const struct lr_qwen3_next_config *config,
                                               const struct lr_model_dims *dims,
                                               struct lr_expert_range experts_here,
                                               struct lr_loader *loader,
                                               struct lr_model *model,
                                               struct lr_error *err);

#endif
