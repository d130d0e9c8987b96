#include "worker/model.h"

#include "worker/models/qwen3_next.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct lr_expert_range lr_expert_range_of(int64_t n_experts, int rank, int size, int replicated)
{
    if (replicated)
        return (struct lr_expert_range){.first = 0, .count = n_experts};
    int64_t first = n_experts * rank / size, end = n_experts * (rank + 1) / size;
    return (struct lr_expert_range){.first = first, .count = end - first};
}

int lr_expert_owner(int64_t n_experts, int64_t expert, int size)
{
    int owner = (int)(expert * size / n_experts);
    while (lr_expert_range_of(n_experts, owner, size, 0).first > expert)
        owner--;
    while (lr_expert_range_of(n_experts, owner, size, 0).first + lr_expert_range_of(n_experts, owner, size, 0).count <=
           expert)
        owner++;
    return owner;
}

static enum lr_status
read_config(const char *dir, struct lr_qwen3_next_config *config, struct lr_model_dims *dims, struct lr_error *err)
{
    LR_TRY(lr_qwen3_next_config_load(dir, config, err));
    lr_qwen3_next_dims(config, dims);
    return LR_OK;
}

static enum lr_status measure(const struct lr_qwen3_next_config *config,
                              const struct lr_model_dims *dims,
                              struct lr_expert_range range,
                              struct lr_checkpoint *checkpoint,
                              const struct lr_kernel_ops *ops,
                              size_t *bytes,
                              size_t *table_bytes,
                              struct lr_error *err)
{
    struct lr_loader loader = {.checkpoint = checkpoint, .ops = ops};
    struct lr_model scratch = {0};
    LR_TRY(lr_qwen3_next_visit(config, dims, range, &loader, &scratch, err));
    *bytes = loader.bytes;
    *table_bytes = loader.table_bytes;
    return LR_OK;
}

enum lr_status lr_model_peek(const char *dir,
                             const struct lr_kernel_ops *ops,
                             int size,
                             int replicated,
                             struct lr_model_dims *dims,
                             size_t *weight_bytes,
                             struct lr_error *err)
{
    struct lr_qwen3_next_config config;
    struct lr_checkpoint *checkpoint;
    LR_TRY(read_config(dir, &config, dims, err));
    enum lr_status status = lr_checkpoint_open(dir, &checkpoint, err);
    if (status == LR_OK) {
        struct lr_expert_range range = lr_expert_range_of(dims->n_experts, 0, size, replicated);
        size_t table_bytes;
        status = measure(&config, dims, range, checkpoint, ops, weight_bytes, &table_bytes, err);
        lr_checkpoint_close(checkpoint);
    }
    lr_qwen3_next_config_free(&config);
    return status;
}

enum lr_status lr_model_load(const char *dir,
                             const struct lr_kernel_ops *ops,
                             const struct lr_exec *exec,
                             int rank,
                             int size,
                             int replicated,
                             struct lr_model *out,
                             struct lr_error *err)
{
    struct lr_qwen3_next_config config;
    struct lr_model model = {.ops = ops};
    size_t bytes = 0, table_bytes = 0;
    void *base;
    LR_TRY(read_config(dir, &config, &model.dims, err));
    struct lr_expert_range range = lr_expert_range_of(model.dims.n_experts, rank, size, replicated);
    enum lr_status status = lr_checkpoint_open(dir, &model.checkpoint, err);
    if (status != LR_OK)
        goto free_config;
    status = measure(&config, &model.dims, range, model.checkpoint, ops, &bytes, &table_bytes, err);
    if (status == LR_OK)
        status = lr_arena_reserve(&model.tables, table_bytes, err);
    if (status == LR_OK)
        status = ops->memory.reserve(bytes, &base, err);
    if (status != LR_OK)
        goto unload;
    model.arena = lr_arena_over(base, bytes);
    struct lr_loader loader = {.checkpoint = model.checkpoint,
                               .ops = ops,
                               .exec = exec,
                               .arena = &model.arena,
                               .tables = &model.tables};
    status = lr_qwen3_next_visit(&config, &model.dims, range, &loader, &model, err);
    if (status == LR_OK)
        status = ops->memory.wait(exec, err);
    if (status != LR_OK)
        goto unload;
    snprintf(model.family, sizeof model.family, "qwen3_next");
    model.n_parameters = loader.n_parameters;
    model.n_eos = config.n_eos_token_ids;
    memcpy(model.eos, config.eos_token_ids, (size_t)model.n_eos * sizeof *model.eos);
    lr_qwen3_next_config_free(&config);
    *out = model;
    return LR_OK;
unload:
    lr_model_unload(&model);
free_config:
    lr_qwen3_next_config_free(&config);
    return status;
}

void lr_model_unload(struct lr_model *model)
{
    lr_checkpoint_close(model->checkpoint);
    if (model->arena.base)
        model->ops->memory.release(model->arena.base, model->arena.capacity_bytes);
    lr_arena_release(&model->tables);
    *model = (struct lr_model){0};
}
