#include "worker/session.h"

#include "base/log.h"
#include "base/memory.h"
#include "worker/kv_tier.h"
#include "worker/plan.h"
#include "worker/session_impl.h"

#include <stdlib.h>
#include <string.h>

enum { BLOCK = LR_KV_BLOCK_TOKENS };

/* ---- opening
 * ------------------------------------------------------------------------------------------------------
 */

static enum lr_status
check_options(const struct lr_engine *engine, const struct lr_session_options *o, struct lr_error *err)
{
    if (o->segment_tokens < LR_MIN_SEGMENT_TOKENS || o->segment_tokens > LR_MAX_SEGMENT_TOKENS ||
        (o->segment_tokens & (o->segment_tokens - 1)) != 0)
        return lr_fail(err, LR_INVALID, "segment of %lld tokens: it must be a power of two from %d to %d",
                       (long long)o->segment_tokens, LR_MIN_SEGMENT_TOKENS, LR_MAX_SEGMENT_TOKENS);
    if (o->max_tokens < 1 || o->max_tokens > INT64_C(1) << 36)
        return lr_fail(err, LR_INVALID, "a document of %lld tokens: it must have 1 to 2^36", (long long)o->max_tokens);
    if (o->max_forks < 0 || o->max_fork_tokens < 0)
        return lr_fail(err, LR_INVALID, "%lld forks of %lld tokens", (long long)o->max_forks,
                       (long long)o->max_fork_tokens);
    const struct lr_kernel_ops *ops = engine->ops;
    if (ops->host_memory && o->kv_dtype != LR_F32 && o->kv_dtype != LR_BF16)
        return lr_fail(err, LR_UNSUPPORTED, "the %s backend keeps KV in f32 or bf16", ops->name);
    if (!ops->host_memory && o->kv_dtype != ops->act_dtype)
        return lr_fail(err, LR_UNSUPPORTED, "the %s backend keeps KV in the type of its activations: %s", ops->name,
                       ops->act_dtype == LR_F16 ? "f16" : "bf16");
    return LR_OK;
}

static double gib(size_t bytes)
{
    return (double)bytes / (double)(1u << 30);
}

/* Keys and values of half the size, where the backend has them. */
static const char *smaller_kv(const struct lr_engine *engine, const struct lr_session_options *options)
{
    return engine->ops->host_memory && options->kv_dtype == LR_F32 ? ", --kv-dtype bf16" : "";
}

/* Whether the plan fits: the backend's memory, and the host's behind it. */
static enum lr_status check_plan(const struct lr_engine *engine,
                                 const struct lr_session_options *options,
                                 size_t available,
                                 struct lr_error *err)
{
    const struct lr_memory_ops *memory = &engine->ops->memory;
    struct lr_memory_plan plan;
    lr_session_plan(&engine->model.dims, engine->ops, 0, engine->comm->size, engine->experts_replicated, options,
                    &plan);
    if (plan.total_bytes > available)
        return lr_fail(err, LR_NO_MEMORY,
                       "%lld tokens on %d workers need %.2f GiB a worker (KV %.2f, states %.2f, "
                       "forks %.2f, workspace %.2f) and %.2f GiB are free; use more workers%s, fewer questions at once "
                       "or a shorter document",
                       (long long)options->max_tokens, engine->comm->size, gib(plan.total_bytes), gib(plan.kv_bytes),
                       gib(plan.state_bytes), gib(plan.fork_bytes), gib(plan.workspace_bytes), gib(available),
                       smaller_kv(engine, options));
    int sharing = engine->comm->host_workers > 0 ? engine->comm->host_workers : 1;
    size_t free_bytes = memory->available_host() / (size_t)sharing;
    size_t host =
        options->kv_host_bytes > 0 && options->kv_host_bytes < free_bytes ? options->kv_host_bytes : free_bytes;
    if (plan.kv_host_bytes > host)
        return lr_fail(
            err, LR_NO_MEMORY,
            "%lld tokens on %d workers have %.2f GiB of keys and values a worker that the backend's memory does "
            "not hold, and %.2f GiB of host memory may be used for them; use more workers%s, a larger --kv-host-memory "
            "or a shorter document",
            (long long)options->max_tokens, engine->comm->size, gib(plan.kv_host_bytes), gib(host),
            smaller_kv(engine, options));
    return LR_OK;
}

enum lr_status lr_session_fit(const struct lr_engine *engine, struct lr_session_options *options, struct lr_error *err)
{
    /* modules, transfer buffers and the like still come after the plan */
    const size_t spare_bytes = engine->ops->host_memory ? 0 : (size_t)256 << 20;
    size_t available = engine->ops->memory.available() / (size_t)engine->workers_on_device;
    size_t usable = available > spare_bytes ? available - spare_bytes : 0;
    LR_TRY(lr_agree(engine->comm,
                    lr_session_divide(&engine->model.dims, engine->ops, engine->comm->size, engine->experts_replicated,
                                      usable, !engine->ops->host_memory, options, err),
                    err));
    float host_slabs = (float)options->host_slabs; /* at most 2^24: exact */
    LR_TRY(lr_comm_max_f32(engine->comm, "slabs in host memory", &host_slabs, 1, err));
    options->host_slabs = (int64_t)host_slabs;
    return lr_agree(engine->comm, check_plan(engine, options, available, err), err);
}

/* An arena over backend memory of exactly that size. */
static enum lr_status
reserve_backend(const struct lr_engine *engine, struct lr_arena *arena, size_t size_bytes, struct lr_error *err)
{
    void *base;
    LR_TRY(engine->ops->memory.reserve(size_bytes, &base, err));
    *arena = lr_arena_over(base, size_bytes);
    return LR_OK;
}

static void release_backend(const struct lr_engine *engine, struct lr_arena *arena)
{
    if (arena->base)
        engine->ops->memory.release(arena->base, arena->capacity_bytes);
    *arena = (struct lr_arena){0};
}

static enum lr_status reserve(struct lr_session *session, struct lr_error *err)
{
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_session_options *o = &session->options;
    size_t in_host = lr_plan_kv_host_bytes(dims, engine->ops, o, engine->comm->size);
    struct lr_step_bytes step =
        lr_plan_step_bytes(dims, engine->ops, engine->comm->size, engine->experts_replicated, o);
    LR_TRY(lr_arena_reserve(&session->host, lr_plan_host_bytes(o, engine->comm->size), err));
    LR_TRY(lr_arena_reserve(&session->tables, step.tables, err));
    LR_TRY(
        reserve_backend(engine, &session->kv_memory, lr_plan_kv_bytes(dims, engine->ops, o, engine->comm->size), err));
    if (in_host > 0) {
        void *base;
        LR_TRY(engine->ops->memory.reserve_host(in_host, &base, err));
        session->kv_host = lr_arena_over(base, in_host);
    }
    LR_TRY(reserve_backend(engine, &session->memory,
                           lr_plan_state_bytes(dims, engine->ops, o, engine->comm->size) +
                               lr_plan_fork_bytes(dims, engine->ops, o, engine->comm->size),
                           err));
    return reserve_backend(engine, &session->workspace, step.tensors, err);
}

static void carve_forks(struct lr_session *session)
{
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    struct lr_arena *arena = &session->memory;
    size_t layers = (size_t)dims->n_delta_layers;
    size_t blocks = (size_t)(dims->n_attention_layers * session->fork_blocks);
    session->forks = lr_arena_alloc(&session->host, (size_t)session->options.max_forks, sizeof(struct lr_fork));
    session->last_rows = lr_arena_alloc(arena, (size_t)(session->max_rows * dims->d), sizeof(float));
    for (int64_t i = 0; session->forks && i < session->options.max_forks; i++) {
        struct lr_fork *fork = &session->forks[i];
        fork->session = session;
        fork->index = (int)i;
        fork->states = lr_arena_alloc(arena, layers * lr_state_floats(dims), sizeof(float));
        fork->tails = lr_arena_alloc(arena, layers * lr_tail_elements(dims), lr_act_bytes(engine->ops));
        if (i % engine->comm->size == engine->comm->rank)
            fork->kv = lr_arena_alloc(arena, blocks, session->block_bytes);
    }
}

static void carve_tier(struct lr_session *session)
{
    const struct lr_model_dims *dims = &session->engine->model.dims;
    const struct lr_session_options *o = &session->options;
    int n_workers = session->engine->comm->size;
    struct lr_kv_tier *tier = &session->tier;
    size_t layers = (size_t)dims->n_attention_layers, block = session->block_bytes;
    tier->slab_blocks = lr_plan_slab_blocks(o);
    tier->slot_blocks = lr_plan_slot_blocks(dims, o);
    tier->resident_slabs = lr_plan_slabs(o, n_workers) - o->host_slabs;
    tier->resident_blocks = lr_plan_resident_blocks(o, n_workers);
    size_t in_host = (size_t)(session->local_blocks - tier->resident_blocks);
    tier->device = lr_arena_alloc(&session->kv_memory, layers * (size_t)tier->resident_blocks, block);
    if (o->host_slabs == 0)
        return;
    tier->host = lr_arena_alloc(&session->kv_host, layers * in_host, block);
    tier->stage = lr_arena_alloc(&session->kv_memory, (size_t)tier->slab_blocks, block);
    for (int i = 0; i < LR_KV_SLOTS; i++)
        tier->slots[i] = lr_arena_alloc(&session->kv_memory, (size_t)tier->slot_blocks, block);
}

static void carve(struct lr_session *session)
{
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_session_options *o = &session->options;
    struct lr_arena *arena = &session->memory;
    size_t layers = (size_t)dims->n_delta_layers;
    size_t summary = (size_t)(dims->n_attention_layers * dims->n_kv_heads * dims->head_dim);
    session->held = lr_arena_alloc(&session->host, (size_t)(o->segment_tokens * engine->comm->size), sizeof(int32_t));
    session->states = lr_arena_alloc(arena, layers * lr_state_floats(dims), sizeof(float));
    session->tails = lr_arena_alloc(arena, layers * lr_tail_elements(dims), lr_act_bytes(engine->ops));
    session->edge_blocks = lr_arena_alloc(arena, (size_t)dims->n_attention_layers, session->block_bytes);
    if (o->top_k_blocks > 0)
        session->block_means = lr_arena_alloc(arena, summary * (size_t)lr_ceil_div(o->max_tokens, BLOCK), sizeof(float));
    if (o->decode_pages > 0) {
        session->page_min = lr_arena_alloc(arena, summary * (size_t)session->local_blocks, sizeof(float));
        session->page_max = lr_arena_alloc(arena, summary * (size_t)session->local_blocks, sizeof(float));
    }
    carve_tier(session);
    carve_forks(session);
}

enum lr_status lr_session_open(struct lr_engine *engine,
                               const struct lr_session_options *wanted,
                               const struct lr_session_hooks *hooks,
                               struct lr_session **out,
                               struct lr_error *err)
{
    struct lr_session_options divided = *wanted, *options = &divided;
    LR_TRY(check_options(engine, options, err));
    size_t available = engine->ops->memory.available();
    LR_TRY(lr_session_fit(engine, options, err));
    struct lr_session *session = calloc(1, sizeof *session);
    enum lr_status status = LR_OK;
    if (!session)
        status = lr_fail(err, LR_NO_MEMORY, "no memory for a session");
    if (status == LR_OK) {
        session->engine = engine;
        session->options = *options;
        session->available_bytes = available;
        lr_session_plan(&engine->model.dims, engine->ops, 0, engine->comm->size, engine->experts_replicated, options,
                        &session->plan);
        session->hooks = hooks ? *hooks : (struct lr_session_hooks){0};
        session->kv_shape = lr_plan_kv_shape(&engine->model.dims, options->kv_dtype);
        session->block_bytes = engine->ops->kv_block_bytes(session->kv_shape);
        session->local_blocks = lr_plan_local_blocks(options, engine->comm->size);
        session->fork_blocks = lr_plan_fork_blocks(options);
        session->max_rows = lr_fork_step_rows(&engine->model.dims, options, engine->comm->size);
        status = reserve(session, err);
    }
    if (status == LR_OK)
        carve(session);
    status = lr_agree(engine->comm, status, err);
    if (status != LR_OK) {
        lr_session_close(session);
        return status;
    }
    *out = session;
    return LR_OK;
}

void lr_session_close(struct lr_session *session)
{
    if (!session)
        return;
    release_backend(session->engine, &session->workspace);
    release_backend(session->engine, &session->memory);
    if (session->kv_host.base)
        session->engine->ops->memory.release_host(session->kv_host.base, session->kv_host.capacity_bytes);
    release_backend(session->engine, &session->kv_memory);
    lr_arena_release(&session->tables);
    lr_arena_release(&session->host);
    free(session);
}

/* How much of the backend's memory has gone for it. */
static size_t taken_bytes(const struct lr_session *session)
{
    const struct lr_engine *engine = session->engine;
    if (engine->ops->host_memory)
        return lr_memory_resident(session->kv_memory.base, session->kv_memory.capacity_bytes) +
               lr_memory_resident(session->memory.base, session->memory.capacity_bytes) +
               lr_memory_resident(session->workspace.base, session->workspace.capacity_bytes);
    size_t now = engine->ops->memory.available();
    return now < session->available_bytes ? (session->available_bytes - now) / (size_t)engine->workers_on_device : 0;
}

void lr_session_memory(const struct lr_session *session, struct lr_memory_use *use)
{
    const struct lr_memory_plan *plan = &session->plan;
    *use = (struct lr_memory_use){.planned_bytes =
                                      plan->kv_bytes + plan->state_bytes + plan->fork_bytes + plan->workspace_bytes,
                                  .reserved_bytes = session->kv_memory.capacity_bytes + session->memory.capacity_bytes +
                                                    session->workspace.capacity_bytes,
                                  .taken_bytes = taken_bytes(session),
                                  .kv_bytes = plan->kv_bytes,
                                  .host_planned_bytes = plan->kv_host_bytes,
                                  .host_reserved_bytes = session->kv_host.capacity_bytes,
                                  .slabs = plan->slabs,
                                  .host_slabs = plan->host_slabs};
}

/* ---- the document
 * -------------------------------------------------------------------------------------------------
 */

static int64_t wave_tokens(const struct lr_session *session)
{
    return session->options.segment_tokens * session->engine->comm->size;
}

static enum lr_status run_wave(struct lr_session *session, struct lr_error *err)
{
    int64_t per_wave = wave_tokens(session);
    struct lr_wave wave = {.index = session->n_tokens / per_wave,
                           .first = session->n_tokens,
                           .end = session->n_tokens + session->n_held,
                           .segment = session->options.segment_tokens};
    wave.n_active = (int)lr_ceil_div(session->n_held, wave.segment);
    LR_TRY(lr_prefill_wave(session, &wave, session->held, err));
    session->n_held = 0;
    if (session->hooks.on_wave) {
        struct lr_wave_report report = {.tokens_done = session->n_tokens,
                                        .tokens_total = session->options.max_tokens,
                                        .waves_done = wave.index + 1,
                                        .waves_total = lr_ceil_div(session->options.max_tokens, per_wave)};
        session->hooks.on_wave(session->hooks.wave_context, &report);
    }
    return LR_OK;
}

enum lr_status lr_session_append(struct lr_session *session, const int32_t *ids, int64_t n_ids, struct lr_error *err)
{
    if (session->sealed)
        return lr_fail(err, LR_INVALID, "the document is sealed");
    int64_t before = session->n_tokens + session->n_held;
    if (n_ids > session->options.max_tokens - before)
        return lr_fail(err, LR_INVALID, "a document of more than the %lld tokens that were planned for",
                       (long long)session->options.max_tokens);
    int64_t vocab = session->engine->model.dims.vocab;
    for (int64_t i = 0; i < n_ids; i++)
        if (ids[i] < 0 || ids[i] >= vocab)
            return lr_fail(err, LR_INVALID, "token id %d at position %lld is outside the vocabulary of %lld", ids[i],
                           (long long)(before + i), (long long)vocab);
    while (n_ids > 0) {
        int64_t take = lr_min_i64(n_ids, wave_tokens(session) - session->n_held);
        memcpy(session->held + session->n_held, ids, (size_t)take * sizeof *ids);
        session->n_held += take;
        ids += take;
        n_ids -= take;
        if (session->n_held == wave_tokens(session))
            LR_TRY(run_wave(session, err));
    }
    return LR_OK;
}

/* The unfinished last block goes to everyone: every fork starts its tail with it. */
static enum lr_status share_edge(struct lr_session *session, struct lr_error *err)
{
    const struct lr_engine *engine = session->engine;
    struct lr_comm *links = engine->links;
    int64_t block = session->n_tokens / BLOCK;
    if (session->n_tokens % BLOCK == 0)
        return LR_OK; /* the edge blocks stay zero */
    lr_kv_settle(session);
    int owner = lr_session_block_owner(session, block);
    for (int64_t i = 0; i < engine->model.dims.n_attention_layers; i++) {
        char *edge = session->edge_blocks + (size_t)i * session->block_bytes;
        if (links->rank == owner)
            engine->ops->memory.copy(&engine->exec, edge, lr_session_block(session, i, block), session->block_bytes);
        LR_TRY(lr_comm_broadcast(links, "edge block", owner, edge, session->block_bytes, err));
    }
    return LR_OK;
}

enum lr_status lr_session_seal(struct lr_session *session, struct lr_error *err)
{
    if (session->sealed)
        return LR_OK;
    if (session->n_tokens + session->n_held == 0)
        return lr_fail(err, LR_INVALID, "the document is empty");
    if (session->n_held > 0)
        LR_TRY(run_wave(session, err));
    const struct lr_model_dims *dims = &session->engine->model.dims;
    size_t states = (size_t)dims->n_delta_layers * lr_state_floats(dims) * sizeof(float);
    if (states > 0)
        LR_TRY(lr_comm_broadcast(session->engine->links, "document states", 0, session->states, states, err));
    LR_TRY(share_edge(session, err));
    /* prefill ends here, also for whoever takes its time */
    LR_TRY(session->engine->ops->memory.wait(&session->engine->exec, err));
    session->sealed = 1;
    return LR_OK;
}

int64_t lr_session_tokens(const struct lr_session *session)
{
    return session->n_tokens;
}

enum lr_status lr_session_density(struct lr_session *session, double *density, struct lr_error *err)
{
    int64_t pairs[2] = {session->pairs_seen, session->pairs_causal};
    LR_TRY(lr_comm_sum_i64(session->engine->comm, "density", pairs, 2, err));
    *density = pairs[1] > 0 ? (double)pairs[0] / (double)pairs[1] : 1.0;
    return LR_OK;
}
