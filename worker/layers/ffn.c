/* The feed-forward half of a block: a dense SwiGLU, or a mixture of experts with a gated shared
 * expert.
 *
 * Experts may be divided over the workers. For a document, every worker routes the tokens of its
 * segment: they travel to the experts' owners, sorted by expert, and every expert's result comes
 * home, where the token's owner sums them in ascending expert id (an owner of several experts never
 * adds them up: the sum would depend on the number of workers). The shared expert is computed while the host learns how
 * many rows go where, and the worker's own rows while the others travel. For forks the rows are everywhere: each worker
 * computes its own experts' rows and the results are gathered. */
#include "worker/session_impl.h"

/* A dispatch round is cut so that the rows a worker may receive at the worst stay below this. A device has memory to
 * spare, and every round costs it a wait for the counts. */
#define ROUND_BUDGET_BYTES ((int64_t)512 << 20)
#define DEVICE_ROUND_BUDGET_BYTES ((int64_t)6 << 30)

struct routing {
    int32_t *ids;     /* [n, k] ascending */
    float *weights;   /* [n, k] */
    int64_t *offsets; /* [n_experts + 1]: the sorted rows of each expert */
    int64_t *order;   /* [n * k] token of each sorted row */
    int64_t *row_of;  /* [n, k] sorted row of each (token, choice) */
};

/* Tokens per dispatch round: a function of the model, the backend and the number of workers. The bytes of the results
 * do not depend on it. */
static int64_t
round_rows(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int n_workers, int64_t n_rows)
{
    int64_t row_bytes = dims->top_k * (dims->d * 2 + dims->expert_ffn) * (int64_t)lr_act_bytes(ops);
    int64_t budget = ops->host_memory ? ROUND_BUDGET_BYTES : DEVICE_ROUND_BUDGET_BYTES;
    int64_t rows = budget / lr_max_i64(1, row_bytes * n_workers);
    return lr_min_i64(n_rows, lr_max_i64(rows, 64));
}

static void run_mlp(const struct lr_step *step,
                    const struct lr_mlp_weights *w,
                    const lr_act *x,
                    int64_t n_rows,
                    lr_act *y,
                    lr_act *hidden)
{
    const struct lr_engine *engine = step->session->engine;
    struct lr_experts_args args = {.x = x,
                                   .y = y,
                                   .hidden = hidden,
                                   .n_experts = 1,
                                   .n_rows = n_rows,
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
    lr_act *hidden = lr_step_act(session, n * w->gate.n);
    lr_act *y = lr_step_act(session, n * dims->d);
    run_mlp(step, w, step->h, n, y, hidden);
    struct lr_moe_combine_args add = {.x = step->x, .n_rows = n, .d = dims->d, .shared = y};
    engine->ops->moe_combine(&engine->exec, &add);
    return LR_OK;
}

/* Router, then the (token, choice) pairs sorted by expert; within an expert, tokens ascend. */
static struct routing route(struct lr_step *step, const struct lr_layer *layer, const lr_act *h, int64_t n)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    int64_t experts = dims->n_experts, k = dims->top_k;
    struct routing routing = {.ids = LR_STEP_TENSOR(session, int32_t, n * k),
                              .weights = LR_STEP_TENSOR(session, float, n *k),
                              .offsets = LR_STEP_TENSOR(session, int64_t, experts + 1),
                              .order = LR_STEP_TENSOR(session, int64_t, n * k),
                              .row_of = LR_STEP_TENSOR(session, int64_t, n * k)};
    float *logits = LR_STEP_TENSOR(session, float, n *experts);
    struct lr_gemm_args gemm = {
        .a = h, .a_stride = dims->d, .w = &layer->ffn.router, .y = logits, .y_stride = experts, .n_rows = n, .wide = 1};
    engine->ops->gemm(&engine->exec, &gemm);
    struct lr_router_args router = {.logits = logits,
                                    .n_rows = n,
                                    .n_experts = experts,
                                    .top_k = k,
                                    .renormalize = dims->renormalize,
                                    .ids = routing.ids,
                                    .weights = routing.weights};
    engine->ops->router(&engine->exec, &router);
    struct lr_expert_sort_args sort = {.ids = routing.ids,
                                       .n_rows = n,
                                       .top_k = k,
                                       .n_experts = experts,
                                       .offsets = routing.offsets,
                                       .order = routing.order,
                                       .row_of = routing.row_of};
    engine->ops->expert_sort(&engine->exec, &sort);
    return routing;
}

/* This worker's experts over n_rows rows sorted by expert; offsets [n_local + 1]. */
static void run_experts(struct lr_step *step,
                        const struct lr_layer *layer,
                        const lr_act *x,
                        const int64_t *offsets,
                        int64_t n_local,
                        int64_t n_rows,
                        lr_act *y)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    engine->local_expert_rows += n_rows;
    if (n_rows == 0)
        return;
    struct lr_experts_args args = {.x = x,
                                   .y = y,
                                   .hidden = lr_step_act(session, n_rows * engine->model.dims.expert_ffn),
                                   .offsets = offsets,
                                   .n_experts = n_local,
                                   .n_rows = n_rows,
                                   .gate = layer->ffn.expert_gate,
                                   .up = layer->ffn.expert_up,
                                   .down = layer->ffn.expert_down,
                                   .activation = engine->model.dims.activation};
    engine->ops->experts(&engine->exec, &args);
}

static void gather(const struct lr_step *step, const lr_act *x, const int64_t *rows, int64_t n_rows, lr_act *y)
{
    const struct lr_engine *engine = step->session->engine;
    engine->ops->gather_rows(&engine->exec, x, (size_t)engine->model.dims.d * lr_act_bytes(engine->ops), rows, n_rows,
                             y);
}

struct shared_result {
    lr_act *y;   /* [n, d]; NULL where the model has no shared expert */
    float *gate; /* [n] */
};

static struct shared_result run_shared(struct lr_step *step, const struct lr_layer *layer, const lr_act *h, int64_t n)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    struct shared_result result = {0};
    if (layer->ffn.shared.gate.n == 0)
        return result;
    result.y = lr_step_act(session, n * dims->d);
    result.gate = LR_STEP_TENSOR(session, float, n);
    lr_act *hidden = lr_step_act(session, n * dims->shared_ffn);
    run_mlp(step, &layer->ffn.shared, h, n, result.y, hidden);
    struct lr_gemm_args gate = {.a = h,
                                .a_stride = dims->d,
                                .w = &layer->ffn.shared_gate,
                                .y = result.gate,
                                .y_stride = 1,
                                .n_rows = n,
                                .wide = 1};
    engine->ops->gemm(&engine->exec, &gate);
    return result;
}

static void combine(const struct lr_step *step,
                    int64_t first_row,
                    int64_t n,
                    const struct routing *routing,
                    const lr_act *y,
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
    const struct lr_model_dims *dims = &session->engine->model.dims;
    int64_t n = step->n_rows, rows = n * dims->top_k;
    if (n == 0)
        return LR_OK;
    struct routing routing = route(step, layer, step->h, n);
    lr_act *x = lr_step_act(session, rows * dims->d);
    lr_act *y = lr_step_act(session, rows * dims->d);
    gather(step, step->h, routing.order, rows, x);
    run_experts(step, layer, x, routing.offsets, dims->n_experts, rows, y);
    struct shared_result shared = run_shared(step, layer, step->h, n);
    combine(step, 0, n, &routing, y, &shared);
    return LR_OK;
}

/* ---- experts on other workers
 * ------------------------------------------------------------------------------------- */

static size_t offsets_bytes(const struct lr_engine *engine)
{
    return (size_t)(engine->model.dims.n_experts + 1) * sizeof(int64_t);
}

static void fetch_offsets(const struct lr_step *step, const struct routing *routing)
{
    const struct lr_engine *engine = step->session->engine;
    engine->ops->memory.fetch(&engine->exec, routing->offsets, offsets_bytes(engine));
}

/* The rows of each expert, from the offsets that were asked for with memory.fetch. */
static enum lr_status
count_rows(struct lr_step *step, const struct routing *routing, const int64_t **counts, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    int64_t experts = engine->model.dims.n_experts;
    int64_t *offsets = LR_STEP_TABLE(session, int64_t, experts + 1), *made = LR_STEP_TABLE(session, int64_t, experts);
    LR_TRY(engine->ops->memory.fetched(&engine->exec, offsets, routing->offsets, offsets_bytes(engine), err));
    for (int64_t e = 0; e < experts; e++)
        made[e] = offsets[e + 1] - offsets[e];
    *counts = made;
    return LR_OK;
}

/* received[source][local expert]: rows that each worker sends to each of my experts. */
static enum lr_status
exchange_counts(struct lr_step *step, const int64_t *counts, int64_t *received, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_comm *comm = session->engine->comm;
    int64_t experts = session->engine->model.dims.n_experts;
    size_t *send = LR_STEP_TABLE(session, size_t, comm->size);
    size_t *receive = LR_STEP_TABLE(session, size_t, comm->size);
    int64_t mine = lr_expert_range_of(experts, comm->rank, comm->size, 0).count;
    for (int r = 0; r < comm->size; r++) {
        send[r] = (size_t)lr_expert_range_of(experts, r, comm->size, 0).count * sizeof *counts;
        receive[r] = (size_t)mine * sizeof *counts;
    }
    return lr_comm_all_to_all_v(comm, "expert counts", counts, send, received, receive, err);
}

/* A round of tokens on their way to the experts and back. Rows lie packed by worker in both buffers, and within a
 * worker's by expert, so that each worker's rows go through the experts as they came. */
struct dispatch {
    const int64_t *counts;  /* [n_experts] rows that this worker has for each expert */
    int64_t *received;      /* [n_workers][n_local] rows that each worker has for each of my experts */
    size_t *send, *receive; /* [n_workers] bytes */
    int64_t *offsets;       /* [n_workers][n_local + 1] in backend memory */
    int64_t n_local, n_received;
};

static enum lr_status
plan_dispatch(struct lr_step *step, const struct routing *routing, struct dispatch *dispatch, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    int n_workers = engine->links->size;
    size_t row_bytes = (size_t)dims->d * lr_act_bytes(engine->ops);
    int64_t n_local = lr_expert_range_of(dims->n_experts, engine->links->rank, n_workers, 0).count;
    *dispatch = (struct dispatch){.received = LR_STEP_TABLE(session, int64_t, n_workers * lr_max_i64(n_local, 1)),
                                  .send = LR_STEP_TABLE(session, size_t, n_workers),
                                  .receive = LR_STEP_TABLE(session, size_t, n_workers),
                                  .offsets = LR_STEP_TENSOR(session, int64_t, n_workers * (n_local + 1)),
                                  .n_local = n_local};
    LR_TRY(count_rows(step, routing, &dispatch->counts, err));
    LR_TRY(exchange_counts(step, dispatch->counts, dispatch->received, err));
    int64_t *offsets = LR_STEP_TABLE(session, int64_t, n_workers * (n_local + 1));
    for (int r = 0; r < n_workers; r++) {
        struct lr_expert_range range = lr_expert_range_of(dims->n_experts, r, n_workers, 0);
        int64_t sent = 0, *rows = offsets + r * (n_local + 1);
        for (int64_t e = 0; e < range.count; e++)
            sent += dispatch->counts[range.first + e];
        rows[0] = 0;
        for (int64_t e = 0; e < n_local; e++)
            rows[e + 1] = rows[e] + dispatch->received[r * n_local + e];
        dispatch->send[r] = (size_t)sent * row_bytes;
        dispatch->receive[r] = (size_t)rows[n_local] * row_bytes;
        dispatch->n_received += rows[n_local];
    }
    engine->ops->memory.upload(&engine->exec, dispatch->offsets, offsets,
                               (size_t)(n_workers * (n_local + 1)) * sizeof *offsets);
    return LR_OK;
}

/* What came from one worker through my experts, from x to y. */
static void run_received(struct lr_step *step,
                         const struct lr_layer *layer,
                         const struct dispatch *dispatch,
                         int worker,
                         const lr_act *x,
                         lr_act *y)
{
    const struct lr_engine *engine = step->session->engine;
    int64_t row_bytes = engine->model.dims.d * (int64_t)lr_act_bytes(engine->ops);
    run_experts(step, layer, x, dispatch->offsets + worker * (dispatch->n_local + 1), dispatch->n_local,
                (int64_t)dispatch->receive[worker] / row_bytes, y);
}

/* A place in packed rows: where those of `worker` begin. */
static lr_act *rows_of(const lr_act *rows, const size_t *sizes, int worker)
{
    char *at = (char *)rows;
    for (int r = 0; r < worker; r++)
        at += sizes[r];
    return at;
}

static enum lr_status
dispatch_round(struct lr_step *step, const struct lr_layer *layer, int64_t first_row, int64_t n, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    struct lr_comm *links = engine->links;
    const struct lr_model_dims *dims = &engine->model.dims;
    int64_t d = dims->d, rows = n * dims->top_k;
    const lr_act *h = lr_act_at(engine->ops, step->h, first_row * d);
    struct routing routing = route(step, layer, h, n);
    fetch_offsets(step, &routing);
    lr_act *outgoing = lr_step_act(session, rows * d);
    gather(step, h, routing.order, rows, outgoing);
    struct shared_result shared = run_shared(step, layer, h, n);

    struct dispatch dispatch;
    LR_TRY(plan_dispatch(step, &routing, &dispatch, err));
    lr_act *incoming = lr_step_act(session, dispatch.n_received * d),
           *y = lr_step_act(session, dispatch.n_received * d);
    struct lr_comm_request request = {0};
    LR_TRY(lr_comm_all_to_all_v_start(links, "tokens to experts", outgoing, dispatch.send, incoming, dispatch.receive,
                                      &request, err));
    run_received(step, layer, &dispatch, links->rank, rows_of(outgoing, dispatch.send, links->rank),
                 rows_of(y, dispatch.receive, links->rank));
    LR_TRY(lr_comm_wait(links, &request, err));
    for (int r = 0; r < links->size; r++)
        if (r != links->rank)
            run_received(step, layer, &dispatch, r, rows_of(incoming, dispatch.receive, r),
                         rows_of(y, dispatch.receive, r));
    LR_TRY(lr_comm_all_to_all_v(links, "results of experts", y, dispatch.receive, outgoing, dispatch.send, err));
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
    int64_t per_round = round_rows(dims, engine->ops, engine->comm->size, session->options.segment_tokens);
    for (int64_t first = 0; first < most; first += per_round) {
        struct lr_step_mark mark = lr_step_mark(session);
        int64_t begin = lr_min_i64(first, step->n_rows);
        LR_TRY(dispatch_round(step, layer, begin, lr_min_i64(per_round, step->n_rows - begin), err));
        lr_step_rewind(session, mark);
    }
    return LR_OK;
}

enum lr_status lr_ffn_extend(struct lr_step *step, const struct lr_layer *layer, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    struct lr_comm *links = engine->links;
    const struct lr_model_dims *dims = &engine->model.dims;
    if (layer->ffn.n_experts == 0)
        return dense(step, layer);
    if (engine->experts_replicated)
        return local_experts(step, layer);
    int64_t n = step->n_rows, rows = n * dims->top_k, d = dims->d;
    struct routing routing = route(step, layer, step->h, n);
    fetch_offsets(step, &routing);
    struct shared_result shared = run_shared(step, layer, step->h, n);
    const int64_t *counts;
    LR_TRY(count_rows(step, &routing, &counts, err));
    size_t *sizes = LR_STEP_TABLE(session, size_t, links->size);
    int64_t my_first = 0, my_rows = 0, first = 0;
    struct lr_expert_range mine = lr_expert_range_of(dims->n_experts, links->rank, links->size, 0);
    for (int r = 0; r < links->size; r++) {
        struct lr_expert_range range = lr_expert_range_of(dims->n_experts, r, links->size, 0);
        int64_t count = 0;
        for (int64_t e = 0; e < range.count; e++)
            count += counts[range.first + e];
        if (r == links->rank)
            my_first = first, my_rows = count;
        sizes[r] = (size_t)(count * d) * lr_act_bytes(engine->ops);
        first += count;
    }
    lr_act *x = lr_step_act(session, my_rows * d), *y = lr_step_act(session, rows * d);
    lr_act *my_y = lr_act_at(engine->ops, y, my_first * d);
    gather(step, step->h, routing.order + my_first, my_rows, x);
    run_experts(step, layer, x, routing.offsets + mine.first, mine.count, my_rows, my_y);
    LR_TRY(lr_comm_all_gather_v(links, "results of experts", my_y, sizes, y, err));
    combine(step, 0, n, &routing, y, &shared);
    return LR_OK;
}

struct lr_step_bytes lr_ffn_bytes(
    const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int n_workers, int replicated, int64_t n_rows)
{
    size_t act = lr_act_bytes(ops);
    int64_t d = dims->d, k = dims->top_k, experts = dims->n_experts, n = n_rows;
    struct lr_step_bytes bytes = {0};
    if (experts > 0 && !replicated)
        n = round_rows(dims, ops, n_workers, n_rows);
    if (dims->dense_ffn > 0)
        bytes.tensors = lr_tensor_bytes(n_rows * dims->dense_ffn, act) + lr_tensor_bytes(n_rows * d, act);
    if (experts == 0)
        return bytes;
    int64_t most = replicated ? n * k : n_workers * n * k; /* rows that my experts may have at the worst */
    size_t routing = lr_tensor_bytes(n * k, sizeof(int32_t)) + lr_tensor_bytes(n * k, sizeof(float)) +
                     lr_tensor_bytes(experts + 1, sizeof(int64_t)) + 2 * lr_tensor_bytes(n * k, sizeof(int64_t)) +
                     lr_tensor_bytes(n * experts, sizeof(float));
    size_t shared = 2 * lr_tensor_bytes(n * lr_max_i64(d, dims->shared_ffn), act) + lr_tensor_bytes(n, sizeof(float));
    size_t moving = 2 * lr_tensor_bytes(n * k * d, act) + lr_tensor_bytes(most * dims->expert_ffn, act);
    if (!replicated) {
        int64_t offsets = experts + 2 * n_workers; /* of all workers' rows for my experts, at least */
        moving += 2 * lr_tensor_bytes(most * d, act) + lr_tensor_bytes(offsets, sizeof(int64_t)) +
                  (size_t)n_workers * LR_ARENA_ALIGN_BYTES; /* `hidden` is in a piece for each worker */
        bytes.tables = 2 * lr_tensor_bytes(experts + 1, sizeof(int64_t)) +
                       2 * lr_tensor_bytes(offsets, sizeof(int64_t)) + 5 * lr_tensor_bytes(n_workers, sizeof(size_t));
    }
    size_t mixture = routing + shared + moving;
    bytes.tensors = mixture > bytes.tensors ? mixture : bytes.tensors;
    return bytes;
}
