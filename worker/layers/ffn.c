/* The feed-forward half of a block: a dense SwiGLU, or a mixture of experts with a gated shared
 * expert.
 *
 * Experts may be divided over the workers. For a document, every worker routes the tokens of its
 * segment: they travel to the experts' owners, sorted by expert, and every expert's result comes
 * home, where the token's owner sums them in ascending expert id (an owner of several experts never
 * adds them up: the sum would depend on the number of workers). The shared expert is computed while
 * tokens travel. For forks the rows are everywhere: each worker computes its own experts' rows and
 * the results are gathered. */
#include "worker/session_impl.h"

#include <string.h>

/* A dispatch round is cut so that the rows a worker may receive at the worst stay below this. */
#define ROUND_BUDGET_BYTES ((int64_t)512 << 20)

struct routing {
    int32_t *ids;    /* [n, k] ascending */
    float *weights;  /* [n, k] */
    int64_t *counts; /* [n_experts] rows of each expert */
    int64_t *order;  /* [n * k] token of each sorted row */
    int64_t *row_of; /* [n, k] sorted row of each (token, choice) */
};

static int64_t widest(const struct lr_model_dims *dims)
{
    return lr_max_i64(dims->dense_ffn, lr_max_i64(dims->expert_ffn, dims->shared_ffn));
}

/* Tokens per dispatch round: a function of the model and of the number of workers only. */
static int64_t round_rows(const struct lr_model_dims *dims, int n_workers, int64_t n_rows)
{
    int64_t row_bytes = dims->top_k * (dims->d * 2 + dims->expert_ffn) * (int64_t)sizeof(float);
    int64_t rows = ROUND_BUDGET_BYTES / lr_max_i64(1, row_bytes * n_workers);
    return lr_min_i64(n_rows, lr_max_i64(rows, 64));
}

static void run_mlp(
    const struct lr_step *step, const struct lr_mlp_weights *w, const float *x, int64_t n_rows, float *y, float *hidden)
{
    const struct lr_engine *engine = step->session->engine;
    int64_t offsets[2] = {0, n_rows};
    struct lr_experts_args args = {.x = x,
                                   .y = y,
                                   .hidden = hidden,
                                   .offsets = offsets,
                                   .n_experts = 1,
                                   .gate = &w->gate,
                                   .up = &w->up,
                                   .down = &w->down,
                                   .activation = engine->model.dims.activation};
    engine->ops->experts(&engine->exec, &args);
}

static enum lr_status dense(struct lr_step *step, const struct lr_layer *layer)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_mlp_weights *w = &layer->ffn.dense;
    int64_t n = step->n_rows;
    float *hidden = LR_STEP_ARRAY(session, float, n * w->gate.n);
    float *y = LR_STEP_ARRAY(session, float, n * dims->d);
    run_mlp(step, w, step->h, n, y, hidden);
    struct lr_moe_combine_args add = {.x = step->x, .n_rows = n, .d = dims->d, .shared = y};
    engine->ops->moe_combine(&engine->exec, &add);
    return LR_OK;
}

/* Router, then a counting sort of the (token, choice) pairs by expert; within an expert, tokens
 * ascend. */
static struct routing route(struct lr_step *step, const struct lr_layer *layer, const float *h, int64_t n)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    int64_t experts = dims->n_experts, k = dims->top_k;
    struct routing routing = {.ids = LR_STEP_ARRAY(session, int32_t, n * k),
                              .weights = LR_STEP_ARRAY(session, float, n *k),
                              .counts = LR_STEP_ARRAY(session, int64_t, experts),
                              .order = LR_STEP_ARRAY(session, int64_t, n * k),
                              .row_of = LR_STEP_ARRAY(session, int64_t, n * k)};
    float *logits = LR_STEP_ARRAY(session, float, n *experts);
    int64_t *next = LR_STEP_ARRAY(session, int64_t, experts);
    struct lr_gemm_args gemm = {
        .a = h, .a_stride = dims->d, .w = &layer->ffn.router, .y = logits, .y_stride = experts, .n_rows = n};
    engine->ops->gemm(&engine->exec, &gemm);
    struct lr_router_args router = {.logits = logits,
                                    .n_rows = n,
                                    .n_experts = experts,
                                    .top_k = k,
                                    .renormalize = dims->renormalize,
                                    .ids = routing.ids,
                                    .weights = routing.weights};
    engine->ops->router(&engine->exec, &router);
    memset(routing.counts, 0, (size_t)experts * sizeof *routing.counts);
    for (int64_t i = 0; i < n * k; i++)
        routing.counts[routing.ids[i]]++;
    int64_t first = 0;
    for (int64_t e = 0; e < experts; e++) {
        next[e] = first;
        first += routing.counts[e];
    }
    for (int64_t i = 0; i < n * k; i++) {
        int64_t row = next[routing.ids[i]]++;
        routing.order[row] = i / k;
        routing.row_of[i] = row;
    }
    return routing;
}

/* This worker's experts over rows sorted by expert; counts[e] rows of local expert e. */
static void run_experts(struct lr_step *step,
                        const struct lr_layer *layer,
                        const float *x,
                        const int64_t *counts,
                        int64_t n_local,
                        float *y)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    int64_t *offsets = LR_STEP_ARRAY(session, int64_t, n_local + 1);
    offsets[0] = 0;
    for (int64_t e = 0; e < n_local; e++)
        offsets[e + 1] = offsets[e] + counts[e];
    engine->local_expert_rows += offsets[n_local];
    float *hidden = LR_STEP_ARRAY(session, float, offsets[n_local] * engine->model.dims.expert_ffn);
    struct lr_experts_args args = {.x = x,
                                   .y = y,
                                   .hidden = hidden,
                                   .offsets = offsets,
                                   .n_experts = n_local,
                                   .gate = layer->ffn.expert_gate,
                                   .up = layer->ffn.expert_up,
                                   .down = layer->ffn.expert_down,
                                   .activation = engine->model.dims.activation};
    if (offsets[n_local] > 0)
        engine->ops->experts(&engine->exec, &args);
}

struct shared_result {
    float *y, *gate; /* [n, d], [n]; NULL where the model has no shared expert */
};

static struct shared_result run_shared(struct lr_step *step, const struct lr_layer *layer, const float *h, int64_t n)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    struct shared_result result = {0};
    if (layer->ffn.shared.gate.n == 0)
        return result;
    result.y = LR_STEP_ARRAY(session, float, n * dims->d);
    result.gate = LR_STEP_ARRAY(session, float, n);
    float *hidden = LR_STEP_ARRAY(session, float, n * dims->shared_ffn);
    run_mlp(step, &layer->ffn.shared, h, n, result.y, hidden);
    struct lr_gemm_args gate = {
        .a = h, .a_stride = dims->d, .w = &layer->ffn.shared_gate, .y = result.gate, .y_stride = 1, .n_rows = n};
    engine->ops->gemm(&engine->exec, &gate);
    return result;
}

static void combine(const struct lr_step *step,
                    int64_t first_row,
                    int64_t n,
                    const struct routing *routing,
                    const float *y,
                    const struct shared_result *shared)
{
    const struct lr_engine *engine = step->session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    struct lr_moe_combine_args args = {.x = step->x + first_row * dims->d,
                                       .n_rows = n,
                                       .d = dims->d,
                                       .top_k = dims->top_k,
                                       .weights = routing->weights,
                                       .row_of = routing->row_of,
                                       .y = y,
                                       .shared = shared->y,
                                       .shared_gate = shared->gate};
    engine->ops->moe_combine(&engine->exec, &args);
}

/* All experts are here. */
static enum lr_status local_experts(struct lr_step *step, const struct lr_layer *layer)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    int64_t n = step->n_rows, rows = n * dims->top_k;
    if (n == 0)
        return LR_OK;
    struct routing routing = route(step, layer, step->h, n);
    float *x = LR_STEP_ARRAY(session, float, rows * dims->d);
    float *y = LR_STEP_ARRAY(session, float, rows * dims->d);
    engine->ops->gather_rows(&engine->exec, step->h, dims->d, routing.order, rows, x);
    run_experts(step, layer, x, routing.counts, dims->n_experts, y);
    struct shared_result shared = run_shared(step, layer, step->h, n);
    combine(step, 0, n, &routing, y, &shared);
    return LR_OK;
}

/* ---- experts on other workers
 * ------------------------------------------------------------------------------------- */

/* counts[source][local expert]: rows that each worker sends to each of my experts. */
static enum lr_status
exchange_counts(struct lr_step *step, const int64_t *counts, int64_t *received, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_comm *comm = session->engine->comm;
    int64_t experts = session->engine->model.dims.n_experts;
    size_t *send = LR_STEP_ARRAY(session, size_t, comm->size);
    size_t *receive = LR_STEP_ARRAY(session, size_t, comm->size);
    int64_t mine = lr_expert_range_of(experts, comm->rank, comm->size, 0).count;
    for (int r = 0; r < comm->size; r++) {
        send[r] = (size_t)lr_expert_range_of(experts, r, comm->size, 0).count * sizeof *counts;
        receive[r] = (size_t)mine * sizeof *counts;
    }
    return lr_comm_all_to_all_v(comm, "expert counts", counts, send, received, receive, err);
}

/* Received rows stand by (source, expert); permutation[i] is the received row that is i-th by
 * (expert, source). totals[e] = rows of local expert e. */
static void sort_by_expert(
    const int64_t *received, int n_sources, int64_t n_local, int64_t *permutation, int64_t *totals, int64_t *first_of)
{
    int64_t first = 0;
    for (int r = 0; r < n_sources; r++)
        for (int64_t e = 0; e < n_local; e++) {
            first_of[r * n_local + e] = first;
            first += received[r * n_local + e];
        }
    int64_t next = 0;
    for (int64_t e = 0; e < n_local; e++) {
        totals[e] = 0;
        for (int r = 0; r < n_sources; r++) {
            int64_t count = received[r * n_local + e];
            for (int64_t i = 0; i < count; i++)
                permutation[next++] = first_of[r * n_local + e] + i;
            totals[e] += count;
        }
    }
}

static enum lr_status
dispatch_round(struct lr_step *step, const struct lr_layer *layer, int64_t first_row, int64_t n, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    struct lr_comm *comm = engine->comm;
    const struct lr_model_dims *dims = &engine->model.dims;
    int64_t d = dims->d, rows = n * dims->top_k;
    size_t row_bytes = (size_t)d * sizeof(float);
    const float *h = step->h + first_row * d;
    int64_t n_local = lr_expert_range_of(dims->n_experts, comm->rank, comm->size, 0).count;

    struct routing routing = route(step, layer, h, n);
    int64_t *received = LR_STEP_ARRAY(session, int64_t, comm->size * lr_max_i64(n_local, 1));
    LR_TRY(exchange_counts(step, routing.counts, received, err));
    size_t *send = LR_STEP_ARRAY(session, size_t, comm->size);
    size_t *receive = LR_STEP_ARRAY(session, size_t, comm->size);
    int64_t n_received = 0;
    for (int r = 0; r < comm->size; r++) {
        struct lr_expert_range range = lr_expert_range_of(dims->n_experts, r, comm->size, 0);
        send[r] = receive[r] = 0;
        for (int64_t e = 0; e < range.count; e++)
            send[r] += (size_t)routing.counts[range.first + e] * row_bytes;
        for (int64_t e = 0; e < n_local; e++) {
            receive[r] += (size_t)received[r * n_local + e] * row_bytes;
            n_received += received[r * n_local + e];
        }
    }
    float *outgoing = LR_STEP_ARRAY(session, float, rows *d);
    float *incoming = LR_STEP_ARRAY(session, float, n_received *d);
    engine->ops->gather_rows(&engine->exec, h, d, routing.order, rows, outgoing);
    struct lr_comm_request request = {0};
    LR_TRY(lr_comm_all_to_all_v_start(comm, "tokens to experts", outgoing, send, incoming, receive, &request, err));
    struct shared_result shared = run_shared(step, layer, h, n);
    LR_TRY(lr_comm_wait(comm, &request, err));

    int64_t *permutation = LR_STEP_ARRAY(session, int64_t, n_received);
    int64_t *inverse = LR_STEP_ARRAY(session, int64_t, n_received);
    int64_t *totals = LR_STEP_ARRAY(session, int64_t, n_local);
    int64_t *first_of = LR_STEP_ARRAY(session, int64_t, comm->size * lr_max_i64(n_local, 1));
    sort_by_expert(received, comm->size, n_local, permutation, totals, first_of);
    for (int64_t i = 0; i < n_received; i++)
        inverse[permutation[i]] = i;
    float *x = LR_STEP_ARRAY(session, float, n_received *d);
    float *y = LR_STEP_ARRAY(session, float, n_received *d);
    engine->ops->gather_rows(&engine->exec, incoming, d, permutation, n_received, x);
    run_experts(step, layer, x, totals, n_local, y);
    engine->ops->gather_rows(&engine->exec, y, d, inverse, n_received, incoming);
    LR_TRY(lr_comm_all_to_all_v(comm, "results of experts", incoming, receive, outgoing, send, err));
    combine(step, first_row, n, &routing, outgoing, &shared);
    return LR_OK;
}

enum lr_status lr_ffn_prefill(struct lr_step *step, const struct lr_layer *layer, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    if (layer->ffn.n_experts == 0)
        return step->n_rows > 0 ? dense(step, layer) : LR_OK;
    if (engine->experts_replicated)
        return local_experts(step, layer);
    /* Every worker takes part in as many rounds as worker 0, which has the most tokens, needs. */
    int64_t most = lr_wave_length(step->wave, 0);
    int64_t per_round = round_rows(dims, engine->comm->size, session->options.segment_tokens);
    for (int64_t first = 0; first < most; first += per_round) {
        size_t mark = session->workspace.used_bytes;
        int64_t begin = lr_min_i64(first, step->n_rows);
        LR_TRY(dispatch_round(step, layer, begin, lr_min_i64(per_round, step->n_rows - begin), err));
        lr_arena_rewind(&session->workspace, mark);
    }
    return LR_OK;
}

enum lr_status lr_ffn_extend(struct lr_step *step, const struct lr_layer *layer, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    struct lr_comm *comm = engine->comm;
    const struct lr_model_dims *dims = &engine->model.dims;
    if (layer->ffn.n_experts == 0)
        return dense(step, layer);
    if (engine->experts_replicated)
        return local_experts(step, layer);
    int64_t n = step->n_rows, rows = n * dims->top_k, d = dims->d;
    struct routing routing = route(step, layer, step->h, n);
    size_t *sizes = LR_STEP_ARRAY(session, size_t, comm->size);
    int64_t my_first = 0, my_rows = 0, first = 0;
    struct lr_expert_range mine = lr_expert_range_of(dims->n_experts, comm->rank, comm->size, 0);
    for (int r = 0; r < comm->size; r++) {
        struct lr_expert_range range = lr_expert_range_of(dims->n_experts, r, comm->size, 0);
        int64_t count = 0;
        for (int64_t e = 0; e < range.count; e++)
            count += routing.counts[range.first + e];
        if (r == comm->rank)
            my_first = first, my_rows = count;
        sizes[r] = (size_t)(count * d) * sizeof(float);
        first += count;
    }
    float *x = LR_STEP_ARRAY(session, float, my_rows *d);
    float *y = LR_STEP_ARRAY(session, float, rows *d);
    engine->ops->gather_rows(&engine->exec, step->h, d, routing.order + my_first, my_rows, x);
    run_experts(step, layer, x, routing.counts + mine.first, mine.count, y + my_first * d);
    struct lr_comm_request request = {0};
    LR_TRY(lr_comm_all_gather_v_start(comm, "results of experts", y + my_first * d, sizes, y, &request, err));
    struct shared_result shared = run_shared(step, layer, step->h, n);
    LR_TRY(lr_comm_wait(comm, &request, err));
    combine(step, 0, n, &routing, y, &shared);
    return LR_OK;
}

size_t lr_ffn_bytes(const struct lr_model_dims *dims, int n_workers, int replicated, int64_t n_rows)
{
    size_t n = (size_t)n_rows, d = (size_t)dims->d, k = (size_t)dims->top_k;
    size_t bytes = n * ((size_t)widest(dims) + d + 1) * sizeof(float);
    if (dims->n_experts > 0) {
        size_t experts = (size_t)dims->n_experts, ffn = (size_t)dims->expert_ffn;
        if (!replicated)
            n = (size_t)round_rows(dims, n_workers, n_rows);
        size_t incoming = replicated ? 1 : (size_t)n_workers;
        bytes += n * (experts + k * 2) * sizeof(float) + n * k * 2 * sizeof(int64_t);
        bytes += n * k * d * 2 * sizeof(float);
        bytes += incoming * n * k * ((2 * d + ffn) * sizeof(float) + 2 * sizeof(int64_t));
        bytes += experts * (size_t)(n_workers + 4) * 2 * sizeof(int64_t);
    }
    return bytes + (size_t)n_workers * 256 + 16384;
}
