/* Memory is planned before the first token: every array of a session has its size here, and what
 * does not fit is refused with the numbers. */
#include "worker/plan.h"

#include "worker/session_impl.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { BLOCK = LR_KV_BLOCK_TOKENS };

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

int64_t lr_plan_local_blocks(const struct lr_session_options *options, int n_workers)
{
    int64_t segments = ceil_div(options->max_tokens, options->segment_tokens);
    int64_t own = ceil_div(segments, n_workers) * (options->segment_tokens / BLOCK);
    return lr_min_i64(own, ceil_div(options->max_tokens, BLOCK));
}

int64_t lr_plan_fork_blocks(const struct lr_session_options *options)
{
    return ceil_div(options->max_fork_tokens, BLOCK) + 1;
}

struct lr_kv_shape lr_plan_kv_shape(const struct lr_model_dims *dims, enum lr_dtype dtype)
{
    return (struct lr_kv_shape){
        .n_heads = dims->n_heads, .n_kv_heads = dims->n_kv_heads, .head_dim = dims->head_dim, .dtype = dtype};
}

size_t lr_plan_state_bytes(const struct lr_model_dims *dims,
                           const struct lr_session_options *options,
                           int n_workers,
                           size_t block_bytes)
{
    size_t wave = (size_t)options->segment_tokens * (size_t)n_workers;
    size_t bytes = wave * sizeof(int32_t);
    bytes += (size_t)dims->n_delta_layers * (lr_state_floats(dims) + lr_tail_floats(dims) + 32) * sizeof(float);
    bytes += (size_t)dims->n_attention_layers * (block_bytes + 64);
    size_t summary = (size_t)(dims->n_kv_heads * dims->head_dim * dims->n_attention_layers) * sizeof(float);
    if (options->top_k_blocks > 0)
        bytes += summary * (size_t)ceil_div(options->max_tokens, BLOCK);
    if (options->decode_pages > 0)
        bytes += 2 * summary * (size_t)lr_plan_local_blocks(options, n_workers);
    return bytes + 4096;
}

size_t
lr_plan_fork_bytes(const struct lr_model_dims *dims, const struct lr_session_options *options, size_t block_bytes)
{
    size_t layers = (size_t)dims->n_delta_layers;
    size_t state = layers * (lr_state_floats(dims) + lr_tail_floats(dims) + 32) * sizeof(float);
    size_t kv = (size_t)(dims->n_attention_layers * lr_plan_fork_blocks(options)) * block_bytes;
    return (size_t)options->max_forks * (state + kv + sizeof(struct lr_fork) + 256);
}

size_t lr_plan_workspace_bytes(const struct lr_model_dims *dims,
                               const struct lr_kernel_ops *ops,
                               int n_workers,
                               int replicated,
                               const struct lr_session_options *options)
{
    enum { LOGITS_ROWS = 128 };
    int64_t segment = lr_min_i64(options->segment_tokens, options->max_tokens);
    struct lr_session_options clipped = *options;
    clipped.segment_tokens = ceil_div(segment, BLOCK) * BLOCK;
    int64_t fork_rows = lr_fork_step_rows(dims, options, n_workers);
    size_t row = (size_t)(2 * dims->d + dims->rotary_dim) * sizeof(float) + sizeof(int64_t) + sizeof(int32_t);
    size_t document = 0, forks = 0;
    for (int kind = 0; kind < 2; kind++) {
        const struct lr_layer_ops *layer = lr_layer_ops_of((enum lr_mixer)kind);
        int64_t n = kind == LR_MIXER_ATTENTION ? dims->n_attention_layers : dims->n_delta_layers;
        if (n == 0)
            continue;
        size_t a = layer->prefill_bytes(dims, ops, n_workers, &clipped);
        size_t b = layer->extend_bytes(dims, ops, n_workers, options, fork_rows);
        document = a > document ? a : document;
        forks = b > forks ? b : forks;
    }
    size_t a = lr_ffn_bytes(dims, n_workers, replicated, clipped.segment_tokens);
    size_t b = lr_ffn_bytes(dims, n_workers, replicated, fork_rows);
    size_t logits = (size_t)(dims->vocab + 2 * dims->d) * sizeof(float);
    document = a > document ? a : document;
    forks = b > forks ? b : forks;
    document = LOGITS_ROWS * logits > document ? LOGITS_ROWS * logits : document;
    forks = (size_t)options->max_forks * logits > forks ? (size_t)options->max_forks * logits : forks;
    document += (size_t)clipped.segment_tokens * row;
    forks += (size_t)fork_rows * row + (size_t)options->max_forks * sizeof(void *);
    return (document > forks ? document : forks) + 65536;
}

static size_t read_kb_line(const char *path, const char *key)
{
    FILE *file = fopen(path, "re");
    if (!file)
        return SIZE_MAX;
    char line[256];
    size_t found = SIZE_MAX;
    while (fgets(line, sizeof line, file)) {
        uintmax_t value;
        size_t length = strlen(key);
        if (strncmp(line, key, length) == 0 && sscanf(line + length, " %" SCNuMAX, &value) == 1)
            found = (size_t)value;
    }
    fclose(file);
    return found;
}

size_t lr_plan_available_bytes(int workers_on_host)
{
    size_t kb = read_kb_line("/proc/meminfo", "MemAvailable:");
    size_t bytes = kb == SIZE_MAX ? SIZE_MAX / 2 : kb * 1024;
    size_t limit = read_kb_line("/sys/fs/cgroup/memory.max", "");
    size_t used = read_kb_line("/sys/fs/cgroup/memory.current", "");
    if (limit != SIZE_MAX && used != SIZE_MAX && limit > used && limit - used < bytes)
        bytes = limit - used;
    return bytes / (size_t)workers_on_host;
}

void lr_session_plan(const struct lr_model_dims *dims,
                     const struct lr_kernel_ops *ops,
                     size_t weights_bytes,
                     int n_workers,
                     int replicated,
                     const struct lr_session_options *options,
                     struct lr_memory_plan *plan)
{
    size_t block_bytes = ops->kv_block_bytes(lr_plan_kv_shape(dims, options->kv_dtype));
    *plan = (struct lr_memory_plan){.weights_bytes = weights_bytes};
    plan->kv_bytes = (size_t)(dims->n_attention_layers * lr_plan_local_blocks(options, n_workers)) * block_bytes;
    plan->state_bytes = lr_plan_state_bytes(dims, options, n_workers, block_bytes);
    plan->fork_bytes = lr_plan_fork_bytes(dims, options, block_bytes);
    plan->workspace_bytes = lr_plan_workspace_bytes(dims, ops, n_workers, replicated, options);
    plan->total_bytes =
        plan->weights_bytes + plan->kv_bytes + plan->state_bytes + plan->fork_bytes + plan->workspace_bytes;
}
