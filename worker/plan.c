/* Memory is planned before the first token: every array of a session has its size here, and what
 * does not fit is refused with the numbers. */
#include "worker/plan.h"

#include "worker/session_impl.h"

enum { BLOCK = LR_KV_BLOCK_TOKENS };

int64_t lr_plan_local_blocks(const struct lr_session_options *options, int n_workers)
{
    int64_t segments = lr_ceil_div(options->max_tokens, options->segment_tokens);
    int64_t own = lr_ceil_div(segments, n_workers) * (options->segment_tokens / BLOCK);
    return lr_min_i64(own, lr_ceil_div(options->max_tokens, BLOCK));
}

int64_t lr_plan_fork_blocks(const struct lr_session_options *options)
{
    return lr_ceil_div(options->max_fork_tokens, BLOCK) + 1;
}

struct lr_kv_shape lr_plan_kv_shape(const struct lr_model_dims *dims, enum lr_dtype dtype)
{
    return (struct lr_kv_shape){
        .n_heads = dims->n_heads, .n_kv_heads = dims->n_kv_heads, .head_dim = dims->head_dim, .dtype = dtype};
}

int64_t lr_plan_slabs(const struct lr_session_options *options, int n_workers)
{
    return lr_ceil_div(lr_ceil_div(options->max_tokens, options->segment_tokens), n_workers);
}

int64_t lr_plan_slab_blocks(const struct lr_session_options *options)
{
    return lr_min_i64(options->segment_tokens / BLOCK, lr_ceil_div(options->max_tokens, BLOCK));
}

int64_t lr_plan_slot_blocks(const struct lr_model_dims *dims, const struct lr_session_options *options)
{
    int64_t pages = options->decode_pages > 0 ? options->max_forks * dims->n_kv_heads : 0;
    return lr_max_i64(lr_plan_slab_blocks(options), pages);
}

int64_t lr_plan_resident_blocks(const struct lr_session_options *options, int n_workers)
{
    int64_t slabs = lr_plan_slabs(options, n_workers) - options->host_slabs;
    return lr_min_i64(slabs * lr_plan_slab_blocks(options), lr_plan_local_blocks(options, n_workers));
}

static size_t block_bytes_of(const struct lr_model_dims *dims,
                             const struct lr_kernel_ops *ops,
                             const struct lr_session_options *options)
{
    return ops->kv_block_bytes(lr_plan_kv_shape(dims, options->kv_dtype));
}

/* Stage and slots. */
static size_t transit_bytes(const struct lr_model_dims *dims,
                            const struct lr_kernel_ops *ops,
                            const struct lr_session_options *options)
{
    int64_t blocks = lr_plan_slab_blocks(options) + LR_KV_SLOTS * lr_plan_slot_blocks(dims, options);
    return (size_t)blocks * block_bytes_of(dims, ops, options);
}

size_t lr_plan_kv_bytes(const struct lr_model_dims *dims,
                        const struct lr_kernel_ops *ops,
                        const struct lr_session_options *options,
                        int n_workers)
{
    size_t homes = (size_t)(dims->n_attention_layers * lr_plan_resident_blocks(options, n_workers)) *
                   block_bytes_of(dims, ops, options);
    return homes + (options->host_slabs > 0 ? transit_bytes(dims, ops, options) : 0);
}

size_t lr_plan_kv_host_bytes(const struct lr_model_dims *dims,
                             const struct lr_kernel_ops *ops,
                             const struct lr_session_options *options,
                             int n_workers)
{
    int64_t blocks = lr_plan_local_blocks(options, n_workers) - lr_plan_resident_blocks(options, n_workers);
    return (size_t)(dims->n_attention_layers * blocks) * block_bytes_of(dims, ops, options);
}

size_t lr_plan_host_bytes(const struct lr_session_options *options, int n_workers)
{
    return lr_tensor_bytes(options->segment_tokens * n_workers, sizeof(int32_t)) +
           lr_tensor_bytes(options->max_forks, sizeof(struct lr_fork));
}

/* Recurrent states and convolution tails of one timeline. */
static size_t timeline_bytes(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops)
{
    return lr_tensor_bytes(dims->n_delta_layers * (int64_t)lr_state_floats(dims), sizeof(float)) +
           lr_tensor_bytes(dims->n_delta_layers * (int64_t)lr_tail_elements(dims), lr_act_bytes(ops));
}

size_t lr_plan_state_bytes(const struct lr_model_dims *dims,
                           const struct lr_kernel_ops *ops,
                           const struct lr_session_options *options,
                           int n_workers)
{
    int64_t summary = dims->n_kv_heads * dims->head_dim * dims->n_attention_layers;
    size_t bytes =
        timeline_bytes(dims, ops) + lr_tensor_bytes(dims->n_attention_layers, block_bytes_of(dims, ops, options));
    if (options->top_k_blocks > 0)
        bytes += lr_tensor_bytes(summary * lr_ceil_div(options->max_tokens, BLOCK), sizeof(float));
    if (options->decode_pages > 0)
        bytes += 2 * lr_tensor_bytes(summary * lr_plan_local_blocks(options, n_workers), sizeof(float));
    return bytes;
}

size_t lr_plan_fork_bytes(const struct lr_model_dims *dims,
                          const struct lr_kernel_ops *ops,
                          const struct lr_session_options *options,
                          int n_workers)
{
    size_t kv =
        lr_tensor_bytes(dims->n_attention_layers * lr_plan_fork_blocks(options), block_bytes_of(dims, ops, options));
    return (size_t)options->max_forks * timeline_bytes(dims, ops) +
           (size_t)lr_ceil_div(options->max_forks, n_workers) * kv +
           lr_tensor_bytes(lr_fork_step_rows(dims, options, n_workers) * dims->d, sizeof(float));
}

static struct lr_step_bytes larger(struct lr_step_bytes a, struct lr_step_bytes b)
{
    return (struct lr_step_bytes){a.tensors > b.tensors ? a.tensors : b.tensors,
                                  a.tables > b.tables ? a.tables : b.tables};
}

static struct lr_step_bytes together(struct lr_step_bytes a, struct lr_step_bytes b)
{
    return (struct lr_step_bytes){a.tensors + b.tensors, a.tables + b.tables};
}

/* Logits of n_rows document positions: the rows gathered and normed, and the host's copy. */
static struct lr_step_bytes
logits_bytes(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int64_t n_rows)
{
    size_t logits = lr_tensor_bytes(n_rows * dims->vocab, sizeof(float));
    return (struct lr_step_bytes){.tensors = logits + lr_tensor_bytes(n_rows * dims->d, sizeof(float)) +
                                             lr_tensor_bytes(n_rows * dims->d, lr_act_bytes(ops)) +
                                             lr_tensor_bytes(n_rows, sizeof(int64_t)),
                                  .tables = (ops->host_memory ? 0 : logits) + lr_tensor_bytes(n_rows, sizeof(int64_t))};
}

/* Logits of the forks' last tokens, and the tokens to come. */
static struct lr_step_bytes
head_bytes(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int64_t n_forks)
{
    size_t next = lr_tensor_bytes(n_forks, sizeof(int32_t));
    return (struct lr_step_bytes){.tensors = lr_tensor_bytes(n_forks * dims->vocab, sizeof(float)) +
                                             lr_tensor_bytes(n_forks * dims->d, lr_act_bytes(ops)) + next,
                                  .tables = lr_tensor_bytes(n_forks, sizeof(struct lr_sampling)) +
                                            lr_tensor_bytes(n_forks, sizeof(int64_t)) + next};
}

/* What lr_step_begin takes, and the arrays that describe the rows. */
static struct lr_step_bytes
begin_bytes(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int64_t n_rows)
{
    return (struct lr_step_bytes){
        .tensors = 2 * lr_tensor_bytes(n_rows * (dims->rotary_dim / 2), sizeof(float)) +
                   lr_tensor_bytes(n_rows * dims->d, sizeof(float)) +
                   lr_tensor_bytes(n_rows * dims->d, lr_act_bytes(ops)) + lr_tensor_bytes(n_rows, sizeof(int64_t)),
        .tables = 3 * lr_tensor_bytes(n_rows, sizeof(int64_t)) + lr_tensor_bytes(n_rows, sizeof(int32_t))};
}

struct lr_step_bytes lr_plan_step_bytes(const struct lr_model_dims *dims,
                                        const struct lr_kernel_ops *ops,
                                        int n_workers,
                                        int replicated,
                                        const struct lr_session_options *options)
{
    enum { LOGITS_ROWS = 128 };
    int64_t segment = lr_min_i64(options->segment_tokens, options->max_tokens);
    struct lr_session_options clipped = *options;
    clipped.segment_tokens = lr_ceil_div(segment, BLOCK) * BLOCK;
    int64_t fork_rows = lr_fork_step_rows(dims, options, n_workers);
    struct lr_step_bytes document = lr_ffn_bytes(dims, ops, n_workers, replicated, clipped.segment_tokens);
    struct lr_step_bytes forks = lr_ffn_bytes(dims, ops, n_workers, replicated, fork_rows);
    for (int kind = 0; kind < 2; kind++) {
        const struct lr_layer_ops *layer = lr_layer_ops_of((enum lr_mixer)kind);
        int64_t n = kind == LR_MIXER_ATTENTION ? dims->n_attention_layers : dims->n_delta_layers;
        if (n == 0)
            continue;
        document = larger(document, layer->prefill_bytes(dims, ops, n_workers, &clipped));
        forks = larger(forks, layer->extend_bytes(dims, ops, n_workers, options, fork_rows));
    }
    document = larger(document, logits_bytes(dims, ops, LOGITS_ROWS));
    document = together(document, begin_bytes(dims, ops, clipped.segment_tokens));
    forks = larger(forks, logits_bytes(dims, ops, 1));
    forks = larger(forks, head_bytes(dims, ops, options->max_forks));
    forks = together(forks, begin_bytes(dims, ops, fork_rows));
    return larger(document, forks);
}

void lr_session_plan(const struct lr_model_dims *dims,
                     const struct lr_kernel_ops *ops,
                     size_t weights_bytes,
                     int n_workers,
                     int replicated,
                     const struct lr_session_options *options,
                     struct lr_memory_plan *plan)
{
    *plan = (struct lr_memory_plan){.weights_bytes = weights_bytes};
    plan->slabs = lr_plan_slabs(options, n_workers);
    plan->host_slabs = options->host_slabs;
    plan->kv_bytes = lr_plan_kv_bytes(dims, ops, options, n_workers);
    plan->kv_host_bytes = lr_plan_kv_host_bytes(dims, ops, options, n_workers);
    plan->state_bytes = lr_plan_state_bytes(dims, ops, options, n_workers);
    plan->fork_bytes = lr_plan_fork_bytes(dims, ops, options, n_workers);
    struct lr_step_bytes step = lr_plan_step_bytes(dims, ops, n_workers, replicated, options);
    plan->workspace_bytes = step.tensors;
    plan->host_bytes = step.tables + lr_plan_host_bytes(options, n_workers);
    plan->total_bytes =
        plan->weights_bytes + plan->kv_bytes + plan->state_bytes + plan->fork_bytes + plan->workspace_bytes;
    if (ops->host_memory)
        plan->total_bytes += plan->kv_host_bytes + plan->host_bytes;
}

static double mib(size_t bytes)
{
    return (double)bytes / (double)(1u << 20);
}

enum lr_status lr_session_divide(const struct lr_model_dims *dims,
                                 const struct lr_kernel_ops *ops,
                                 int n_workers,
                                 int replicated,
                                 size_t available,
                                 int spill,
                                 struct lr_session_options *options,
                                 struct lr_error *err)
{
    size_t limit = options->kv_device_bytes > 0 ? options->kv_device_bytes : SIZE_MAX;
    struct lr_memory_plan plan;
    options->host_slabs = 0;
    lr_session_plan(dims, ops, 0, n_workers, replicated, options, &plan);
    if (plan.kv_bytes <= limit && (!spill || plan.total_bytes <= available))
        return LR_OK;
    struct lr_session_options divided = *options;
    divided.host_slabs = plan.slabs;
    struct lr_memory_plan least; /* nothing at home but stage and slots */
    lr_session_plan(dims, ops, 0, n_workers, replicated, &divided, &least);
    if (spill && plan.total_bytes > available && least.total_bytes > available)
        return LR_OK; /* for lr_session_fit to refuse, with all the numbers */
    if (spill) {
        size_t others = least.total_bytes - least.kv_bytes;
        limit = limit < available - others ? limit : others < available ? available - others : 0;
    }
    if (least.kv_bytes > limit)
        return lr_fail(err, LR_NO_MEMORY,
                       "keys and values of %.3f MiB may take %.3f MiB of %s memory, and to bring them from the host's "
                       "takes at least %.3f MiB; allow more (--kv-device-memory), or take smaller segments "
                       "(--segment-tokens, now %lld)",
                       mib(plan.kv_bytes), mib(limit), ops->host_memory ? "the backend's" : "GPU", mib(least.kv_bytes),
                       (long long)options->segment_tokens);
    size_t slabs_bytes =
        (size_t)(dims->n_attention_layers * lr_plan_slab_blocks(options)) * block_bytes_of(dims, ops, options);
    int64_t resident = (int64_t)((limit - least.kv_bytes) / slabs_bytes);
    options->host_slabs = plan.slabs - lr_min_i64(resident, plan.slabs - 1);
    return LR_OK;
}
