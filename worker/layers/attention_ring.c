/* Full attention of a document's segment: rows of KV, one segment a worker, are gathered in ascending order, the next
 * while the last is being folded.
 *
 *   row 0      all segments of wave 0          whole: as much to fold for every query
 *   ...
 *   row w      those of this wave              worker r folds r whole segments and the half of its own
 *
 * The last row would keep the last worker longest, and in the last wave some workers have few queries or none. So in a
 * full wave the last row is shared by pairs of workers, and in one that is not full the queries are divided anew. */
#include "worker/layers/attention_ring.h"
#include "worker/kv_tier.h"
#include "worker/plan.h"

/* ---- rows of KV ---- */

/* Bytes that worker r has of row `row`. */
static void row_sizes(const struct lr_step *step, int64_t row, size_t *sizes)
{
    const struct lr_session *session = step->session;
    for (int r = 0; r < session->engine->comm->size; r++) {
        int64_t tokens = row < step->wave->index ? step->wave->segment : lr_wave_length(step->wave, r);
        sizes[r] = (size_t)lr_ceil_div(tokens, LR_BLOCK) * session->block_bytes;
    }
}

/* My slab of a row is being read until the request has been waited for. */
static enum lr_status start_row(const struct lr_step *step,
                                int64_t layer,
                                int64_t row,
                                char *buffer,
                                size_t *sizes,
                                struct lr_comm_request *request,
                                struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_comm *comm = session->engine->links;
    row_sizes(step, row, sizes);
    const char *mine = NULL;
    if (row < step->wave->index)
        mine = lr_kv_enter(session, layer, row, step->wave->index);
    else if (sizes[comm->rank])
        mine = lr_kv_own(step, layer);
    return lr_comm_all_gather_v_start(comm, "kv row", mine, sizes, buffer, request, err);
}

static struct lr_kv_row
gathered_row(const struct lr_step *step, int64_t row, const char *buffer, struct lr_kv_ref *refs)
{
    int64_t tokens = step->session->engine->comm->size * step->wave->segment, first = row * tokens;
    return (struct lr_kv_row){.buffer = buffer,
                              .first = first,
                              .is_first = row == 0,
                              .is_last = row == step->wave->index,
                              .end = row < step->wave->index ? first + tokens : step->wave->end,
                              .refs = refs};
}

void lr_row_fold(
    const struct lr_step *step, const struct lr_kv_row *row, int64_t from, int64_t to, struct lr_attention_args *args)
{
    const struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    struct lr_kv_list list = {.refs = row->refs};
    for (int64_t position = from; position < lr_min_i64(row->end, to); position += LR_BLOCK)
        row->refs[list.n_refs++] = (struct lr_kv_ref){
            .data = row->buffer + (size_t)((position - row->first) / LR_BLOCK) * session->block_bytes,
            .position = position,
            .n_keys = (int32_t)lr_min_i64(row->end - position, LR_BLOCK)};
    args->lists = &list;
    engine->ops->attention(&engine->exec, args);
}

struct lr_attention_args
lr_some_rows(const struct lr_step *step, const struct lr_attention_args *args, int64_t first, int64_t n)
{
    const struct lr_kernel_ops *ops = step->session->engine->ops;
    struct lr_attention_args some = *args;
    int64_t heads = args->shape.n_heads;
    some.q = lr_act_at(ops, (lr_act *)args->q, first * args->q_stride);
    some.positions = args->positions + first;
    some.n_rows = n;
    some.m += first * heads;
    some.l += first * heads;
    some.o += first * heads * args->shape.head_dim;
    if (args->y)
        some.y = lr_act_at(ops, args->y, first * args->y_stride);
    return some;
}

size_t lr_query_bytes(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int64_t n)
{
    return (size_t)(2 * n * dims->n_heads * dims->head_dim) * lr_act_bytes(ops);
}

size_t lr_attended_bytes(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int64_t n)
{
    return (size_t)(n * dims->n_heads * dims->head_dim) * lr_act_bytes(ops);
}

void lr_queries_pack(
    const struct lr_step *step, const struct lr_attention_args *args, int64_t first, int64_t n, void *to)
{
    const struct lr_engine *engine = step->session->engine;
    size_t row_bytes = lr_query_bytes(&engine->model.dims, engine->ops, 1);
    if (n > 0)
        engine->ops->memory.copy_rows(&engine->exec, to, row_bytes,
                                      lr_act_at(engine->ops, (lr_act *)args->q, first * args->q_stride),
                                      (size_t)args->q_stride * lr_act_bytes(engine->ops), row_bytes, n);
}

/* ---- the ring ---- */

/* What one layer's ring has at hand. */
struct ring {
    char *buffers[2];
    size_t *sizes[2];
    struct lr_comm_request requests[2];
    struct lr_kv_ref *refs;
    bool is_full; /* the wave: then `loan`, else `spread` */
    struct lr_loan loan;
    struct lr_spread spread;
};

static enum lr_status
begin_ring(struct lr_step *step, struct ring *ring, const struct lr_attention_args *args, struct lr_error *err)
{
    struct lr_session *session = step->session;
    int n_workers = session->engine->links->size;
    int64_t row_blocks =
        lr_min_i64(n_workers * lr_blocks_per_segment(session), lr_ceil_div(session->options.max_tokens, LR_BLOCK));
    *ring = (struct ring){.refs = LR_STEP_TABLE(session, struct lr_kv_ref, row_blocks),
                          .is_full = lr_wave_length(step->wave, n_workers - 1) == step->wave->segment};
    for (int i = 0; i < 2; i++) {
        ring->buffers[i] = LR_STEP_TENSOR(session, char, (size_t)row_blocks * session->block_bytes);
        ring->sizes[i] = LR_STEP_TABLE(session, size_t, n_workers);
    }
    if (!ring->is_full)
        return lr_spread_begin(step, &ring->spread, args, err);
    lr_loan_take(step, &ring->loan);
    return LR_OK;
}

static enum lr_status fold_row(struct lr_step *step,
                               struct ring *ring,
                               const struct lr_kv_row *row,
                               struct lr_attention_args *args,
                               struct lr_error *err)
{
    if (!ring->is_full)
        return lr_spread_fold(step, &ring->spread, row, args, err);
    if (row->is_last)
        return lr_loan_fold(step, &ring->loan, row, args, err);
    lr_row_fold(step, row, row->first, row->end, args);
    return LR_OK;
}

static enum lr_status
attend_ring(struct lr_step *step, int64_t layer, struct lr_attention_args *args, struct lr_error *err)
{
    struct lr_comm *links = step->session->engine->links;
    lr_act *y = args->y;
    struct ring ring;
    LR_TRY(begin_ring(step, &ring, args, err));
    LR_TRY(start_row(step, layer, 0, ring.buffers[0], ring.sizes[0], &ring.requests[0], err));
    for (int64_t i = 0; i <= step->wave->index; i++) {
        int now = (int)(i & 1), next = 1 - now;
        struct lr_kv_row row = gathered_row(step, i, ring.buffers[now], ring.refs);
        args->first = row.is_first;
        args->y = row.is_last ? y : NULL;
        if (row.is_last && ring.is_full)
            LR_TRY(lr_loan_lend(step, &ring.loan, args, err));
        LR_TRY(lr_comm_wait(links, &ring.requests[now], err));
        lr_kv_leave(step->session);
        if (!row.is_last)
            LR_TRY(start_row(step, layer, i + 1, ring.buffers[next], ring.sizes[next], &ring.requests[next], err));
        LR_TRY(fold_row(step, &ring, &row, args, err));
    }
    return ring.is_full ? LR_OK : lr_spread_end(step, &ring.spread, args, err);
}

/* Folds the n blocks from `data` on, whose first is the document's block `block`, with what went before. */
static void
fold_blocks(const struct lr_step *step, struct lr_attention_args *args, const char *data, int64_t block, int64_t n)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    struct lr_step_mark mark = lr_step_mark(session);
    struct lr_kv_ref *refs = LR_STEP_TABLE(session, struct lr_kv_ref, n);
    for (int64_t i = 0; i < n; i++)
        refs[i] = (struct lr_kv_ref){.data = data + (size_t)i * session->block_bytes,
                                     .position = (block + i) * LR_BLOCK,
                                     .n_keys = (int32_t)lr_min_i64(step->wave->end - (block + i) * LR_BLOCK, LR_BLOCK)};
    struct lr_kv_list list = {.refs = refs, .n_refs = n};
    args->lists = &list;
    engine->ops->attention(&engine->exec, args);
    args->first = 0;
    lr_step_rewind(session, mark); /* lists are copied before a slot returns */
}

/* One worker: the resident blocks are folded in one call, the host's slab by slab, the wave's own segment at last. */
static void attend_alone(struct lr_step *step, int64_t layer, struct lr_attention_args *args)
{
    struct lr_session *session = step->session;
    const struct lr_kv_tier *tier = &session->tier;
    lr_act *y = args->y;
    int64_t n_blocks = lr_ceil_div(step->wave->end, LR_BLOCK), resident = lr_min_i64(n_blocks, tier->resident_blocks);
    args->y = n_blocks == resident ? y : NULL;
    if (resident > 0)
        fold_blocks(step, args, lr_session_block(session, layer, 0), 0, resident);
    for (int64_t slab = tier->resident_slabs; slab < step->wave->index; slab++) {
        const char *data = lr_kv_enter(session, layer, slab, step->wave->index);
        fold_blocks(step, args, data, slab * tier->slab_blocks, tier->slab_blocks);
        lr_kv_leave(session);
    }
    args->y = y;
    int64_t own = step->wave->first / LR_BLOCK;
    if (n_blocks > resident)
        fold_blocks(step, args, lr_kv_own(step, layer), own, n_blocks - own);
}

enum lr_status lr_attend_full(struct lr_step *step, int64_t layer, struct lr_attention_args *args, struct lr_error *err)
{
    if (step->session->engine->comm->size > 1)
        return attend_ring(step, layer, args, err);
    attend_alone(step, layer, args);
    return LR_OK;
}

struct lr_step_bytes lr_attend_full_bytes(const struct lr_model_dims *dims,
                                          const struct lr_kernel_ops *ops,
                                          int n_workers,
                                          const struct lr_session_options *options)
{
    int64_t own = options->segment_tokens / LR_BLOCK, all = lr_ceil_div(options->max_tokens, LR_BLOCK);
    if (n_workers == 1)
        return (struct lr_step_bytes){.tables = lr_tensor_bytes(all, sizeof(struct lr_kv_ref))};
    int64_t row = lr_min_i64(n_workers * own, all);
    size_t block = ops->kv_block_bytes(lr_plan_kv_shape(dims, options->kv_dtype));
    struct lr_step_bytes loan = lr_loan_bytes(dims, ops, n_workers, options);
    struct lr_step_bytes spread = lr_spread_bytes(dims, ops, n_workers, options);
    return (struct lr_step_bytes){
        .tensors = 2 * lr_tensor_bytes(row, block) + (loan.tensors > spread.tensors ? loan.tensors : spread.tensors),
        .tables = lr_tensor_bytes(row, sizeof(struct lr_kv_ref)) + 2 * lr_tensor_bytes(n_workers, sizeof(size_t)) +
                  (loan.tables > spread.tables ? loan.tables : spread.tables)};
}
