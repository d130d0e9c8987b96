/* Full attention of a document's segment: rows of KV, one segment a worker, are gathered in ascending order, the next
 * while the last is being folded.
 *
 *   row 0      all segments of wave 0          whole: as much to fold for every worker
 *   ...
 *   row w      those of this wave              worker r folds r whole segments and the half of its own
 *
 * The last row would keep the last worker longest. Where the wave is full, workers r and h = P-1-r therefore share: h
 * lends the upper half of its queries, with their softmax states, and r folds the first h - r segments of the row for
 * them, which leaves both with as much.
 *
 *   h   lend --- fold own lower half ------------------ take back --- fold the rest of the upper half
 *   r    `-> fold h-r segments for the lent half --- return --- fold own queries
 *
 * The states are the same wherever they are folded, and the order of the keys does not change: so the bits do not. */
#include "worker/layers/attention_impl.h"
#include "worker/plan.h"

#include <stdbool.h>

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

static enum lr_status start_row(const struct lr_step *step,
                                int64_t layer,
                                int64_t row,
                                char *buffer,
                                size_t *sizes,
                                struct lr_comm_request *request,
                                struct lr_error *err)
{
    const struct lr_session *session = step->session;
    struct lr_comm *comm = session->engine->links;
    int64_t block = (row * comm->size + comm->rank) * lr_blocks_per_segment(session);
    row_sizes(step, row, sizes);
    const char *mine = sizes[comm->rank] ? lr_session_block(session, layer, block) : NULL;
    return lr_comm_all_gather_v_start(comm, "kv row", mine, sizes, buffer, request, err);
}

/* A gathered row: keys [first, end), and room for the list of some of them. */
struct kv_row {
    const char *buffer;
    int64_t first, end;
    struct lr_kv_ref *refs;
};

static struct kv_row gathered_row(const struct lr_step *step, int64_t row, const char *buffer, struct lr_kv_ref *refs)
{
    int64_t tokens = step->session->engine->comm->size * step->wave->segment, first = row * tokens;
    return (struct kv_row){.buffer = buffer,
                           .first = first,
                           .end = row < step->wave->index ? first + tokens : step->wave->end,
                           .refs = refs};
}

/* Folds keys [from, to) of the row into what `args` says. `from` is the start of a block. */
static void
fold(const struct lr_step *step, const struct kv_row *row, int64_t from, int64_t to, struct lr_attention_args *args)
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

/* ---- the last row, shared ---- */

/* Queries that one worker lends to another: rows [first, first + n) of the lender's segment.
 *
 *   queries  [n, 2 * n_heads * head_dim] as in the projection | m [n, n_heads] | l | o [n, n_heads, head_dim]  */
struct loan {
    int lender, folder;
    int64_t first, n, segments; /* `segments` of the row are folded by the other */
    char *queries, *state;
    size_t queries_bytes, state_bytes;
    struct lr_softmax softmax; /* in `state` */
};

static size_t part_bytes(int64_t n_rows, int64_t n, size_t size)
{
    return lr_tensor_bytes(n_rows * n, size);
}

static size_t loan_queries_bytes(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int64_t n)
{
    return part_bytes(n, 2 * dims->n_heads * dims->head_dim, lr_act_bytes(ops));
}

static size_t loan_state_bytes(const struct lr_model_dims *dims, int64_t n)
{
    return 2 * part_bytes(n, dims->n_heads, sizeof(float)) +
           part_bytes(n, dims->n_heads * dims->head_dim, sizeof(float));
}

/* What this worker lends, or folds for another; false for the one in the middle. */
static bool find_loan(const struct lr_step *step, struct loan *loan)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    int rank = engine->comm->rank, last = engine->comm->size - 1;
    int64_t segment = step->wave->segment;
    if (2 * rank == last)
        return false;
    *loan = (struct loan){.lender = rank > last - rank ? rank : last - rank,
                          .folder = rank > last - rank ? last - rank : rank,
                          .first = segment / 2,
                          .n = segment / 2};
    const struct lr_model_dims *dims = &engine->model.dims;
    loan->segments = loan->lender - loan->folder;
    loan->queries_bytes = loan_queries_bytes(dims, engine->ops, loan->n);
    loan->state_bytes = loan_state_bytes(dims, loan->n);
    loan->queries = LR_STEP_TENSOR(session, char, loan->queries_bytes + loan->state_bytes);
    loan->state = loan->queries + loan->queries_bytes;
    size_t small = part_bytes(loan->n, dims->n_heads, sizeof(float));
    loan->softmax = (struct lr_softmax){
        .m = (float *)loan->state, .l = (float *)(loan->state + small), .o = (float *)(loan->state + 2 * small)};
    return true;
}

/* From the step's states to the loan's, or back. */
static void
copy_states(const struct lr_step *step, const struct loan *loan, const struct lr_attention_args *args, bool back)
{
    const struct lr_engine *engine = step->session->engine;
    int64_t heads = args->shape.n_heads, first = loan->first * heads, n = loan->n * heads, dim = args->shape.head_dim;
    float *step_parts[] = {args->m + first, args->l + first, args->o + first * dim};
    float *loan_parts[] = {loan->softmax.m, loan->softmax.l, loan->softmax.o};
    for (int i = 0; i < 3; i++) {
        size_t bytes = (size_t)(i < 2 ? n : n * dim) * sizeof(float);
        engine->ops->memory.copy(&engine->exec, back ? step_parts[i] : loan_parts[i],
                                 back ? loan_parts[i] : step_parts[i], bytes);
    }
}

/* Queries and states go from the lender to the folder, or the states back. Entered by all. */
static enum lr_status start_loan(const struct lr_step *step,
                                 const struct loan *loan,
                                 bool back,
                                 size_t *sizes,
                                 struct lr_comm_request *request,
                                 struct lr_error *err)
{
    struct lr_comm *links = step->session->engine->links;
    size_t *sends = sizes, *receives = sizes + links->size;
    for (int r = 0; r < 2 * links->size; r++)
        sizes[r] = 0;
    char *data = NULL;
    if (loan) {
        size_t bytes = back ? loan->state_bytes : loan->queries_bytes + loan->state_bytes;
        int from = back ? loan->folder : loan->lender, to = back ? loan->lender : loan->folder;
        data = back ? loan->state : loan->queries;
        *(links->rank == from ? &sends[to] : &receives[from]) = bytes;
    }
    bool is_sender = loan && (links->rank == loan->lender) != back;
    return lr_comm_all_to_all_v_start(links, back ? "returned queries" : "lent queries", is_sender ? data : NULL, sends,
                                      is_sender ? NULL : data, receives, request, err);
}

/* The arguments of rows [first, first + n) of the segment. */
static struct lr_attention_args
some_rows(const struct lr_step *step, const struct lr_attention_args *args, int64_t first, int64_t n)
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
    some.y = lr_act_at(ops, args->y, first * args->y_stride);
    return some;
}

/* The lender: its lower half, and what is left of its upper half. */
static enum lr_status fold_as_lender(struct lr_step *step,
                                     const struct kv_row *row,
                                     const struct loan *loan,
                                     const struct lr_attention_args *args,
                                     size_t *sizes,
                                     struct lr_comm_request *lent,
                                     struct lr_error *err)
{
    struct lr_comm *links = step->session->engine->links;
    struct lr_comm_request returned = {0};
    int64_t end = lr_wave_start(step->wave, links->rank) + step->n_rows;
    struct lr_attention_args lower = some_rows(step, args, 0, loan->first);
    struct lr_attention_args upper = some_rows(step, args, loan->first, loan->n);
    fold(step, row, row->first, end - loan->n, &lower);
    LR_TRY(lr_comm_wait(links, lent, err));
    LR_TRY(start_loan(step, loan, true, sizes, &returned, err));
    LR_TRY(lr_comm_wait(links, &returned, err));
    copy_states(step, loan, args, true);
    upper.first = 0;
    fold(step, row, row->first + loan->segments * step->wave->segment, end, &upper);
    return LR_OK;
}

/* The folder: what was lent to it, then its own. */
static enum lr_status fold_as_folder(struct lr_step *step,
                                     const struct kv_row *row,
                                     const struct loan *loan,
                                     struct lr_attention_args *args,
                                     size_t *sizes,
                                     struct lr_comm_request *lent,
                                     struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_comm *links = session->engine->links;
    struct lr_comm_request returned = {0};
    int64_t *positions = LR_STEP_TABLE(session, int64_t, loan->n);
    for (int64_t i = 0; i < loan->n; i++)
        positions[i] = lr_wave_start(step->wave, loan->lender) + loan->first + i;
    struct lr_attention_args other = *args;
    other.q = loan->queries;
    other.q_stride = 2 * args->shape.n_heads * args->shape.head_dim;
    other.positions = positions;
    other.n_rows = loan->n;
    other.m = loan->softmax.m;
    other.l = loan->softmax.l;
    other.o = loan->softmax.o;
    other.y = NULL;
    LR_TRY(lr_comm_wait(links, lent, err));
    fold(step, row, row->first, row->first + loan->segments * step->wave->segment, &other);
    LR_TRY(start_loan(step, loan, true, sizes, &returned, err));
    fold(step, row, row->first, lr_wave_start(step->wave, links->rank) + step->n_rows, args);
    return lr_comm_wait(links, &returned, err);
}

/* The one in the middle has nothing to share. */
static enum lr_status fold_in_the_middle(struct lr_step *step,
                                         const struct kv_row *row,
                                         struct lr_attention_args *args,
                                         size_t *sizes,
                                         struct lr_comm_request *lent,
                                         struct lr_error *err)
{
    struct lr_comm *links = step->session->engine->links;
    struct lr_comm_request returned = {0};
    fold(step, row, row->first, lr_wave_start(step->wave, links->rank) + step->n_rows, args);
    LR_TRY(lr_comm_wait(links, lent, err));
    LR_TRY(start_loan(step, NULL, true, sizes, &returned, err));
    return lr_comm_wait(links, &returned, err);
}

/* ---- the ring ---- */

/* What one layer's ring has at hand. */
struct ring {
    char *buffers[2];
    size_t *sizes[2], *loan_sizes;
    struct lr_comm_request requests[2], lent;
    struct lr_kv_ref *refs;
    bool wave_lends, shares; /* the wave is full; this worker has a part in it */
    struct loan loan;
};

static void take_ring(struct lr_step *step, struct ring *ring)
{
    struct lr_session *session = step->session;
    int n_workers = session->engine->links->size;
    int64_t row_blocks =
        lr_min_i64(n_workers * lr_blocks_per_segment(session), lr_ceil_div(session->options.max_tokens, LR_BLOCK));
    *ring = (struct ring){.loan_sizes = LR_STEP_TABLE(session, size_t, 2 * n_workers)};
    for (int i = 0; i < 2; i++) {
        ring->buffers[i] = LR_STEP_TENSOR(session, char, (size_t)row_blocks * session->block_bytes);
        ring->sizes[i] = LR_STEP_TABLE(session, size_t, n_workers);
    }
    ring->refs = LR_STEP_TABLE(session, struct lr_kv_ref, row_blocks);
    ring->wave_lends = lr_wave_length(step->wave, n_workers - 1) == step->wave->segment;
    ring->shares = ring->wave_lends && find_loan(step, &ring->loan);
}

/* The lender's half leaves as soon as all rows before the last are folded into it. */
static enum lr_status
lend(struct lr_step *step, struct ring *ring, const struct lr_attention_args *args, struct lr_error *err)
{
    const struct lr_engine *engine = step->session->engine;
    const struct loan *loan = &ring->loan;
    if (ring->shares && engine->links->rank == loan->lender) {
        size_t row_bytes = (size_t)(2 * args->shape.n_heads * args->shape.head_dim) * lr_act_bytes(engine->ops);
        engine->ops->memory.copy_rows(&engine->exec, loan->queries, row_bytes,
                                      lr_act_at(engine->ops, (lr_act *)args->q, loan->first * args->q_stride),
                                      (size_t)args->q_stride * lr_act_bytes(engine->ops), row_bytes, loan->n);
        copy_states(step, loan, args, false);
    }
    return start_loan(step, ring->shares ? loan : NULL, false, ring->loan_sizes, &ring->lent, err);
}

static enum lr_status fold_last_row(struct lr_step *step,
                                    struct ring *ring,
                                    const struct kv_row *row,
                                    struct lr_attention_args *args,
                                    struct lr_error *err)
{
    size_t *sizes = ring->loan_sizes;
    int rank = step->session->engine->links->rank;
    if (!ring->wave_lends && step->n_rows > 0)
        fold(step, row, row->first, lr_wave_start(step->wave, rank) + step->n_rows, args);
    if (!ring->wave_lends)
        return LR_OK;
    if (!ring->shares)
        return fold_in_the_middle(step, row, args, sizes, &ring->lent, err);
    if (rank == ring->loan.lender)
        return fold_as_lender(step, row, &ring->loan, args, sizes, &ring->lent, err);
    return fold_as_folder(step, row, &ring->loan, args, sizes, &ring->lent, err);
}

static enum lr_status
attend_ring(struct lr_step *step, int64_t layer, struct lr_attention_args *args, struct lr_error *err)
{
    struct lr_comm *links = step->session->engine->links;
    lr_act *y = args->y;
    struct ring ring;
    take_ring(step, &ring);
    LR_TRY(start_row(step, layer, 0, ring.buffers[0], ring.sizes[0], &ring.requests[0], err));
    for (int64_t row = 0; row <= step->wave->index; row++) {
        int now = (int)(row & 1), next = 1 - now;
        bool is_last = row == step->wave->index;
        args->first = row == 0;
        args->y = is_last ? y : NULL;
        if (is_last && ring.wave_lends)
            LR_TRY(lend(step, &ring, args, err));
        LR_TRY(lr_comm_wait(links, &ring.requests[now], err));
        if (!is_last)
            LR_TRY(start_row(step, layer, row + 1, ring.buffers[next], ring.sizes[next], &ring.requests[next], err));
        struct kv_row gathered = gathered_row(step, row, ring.buffers[now], ring.refs);
        if (is_last)
            return fold_last_row(step, &ring, &gathered, args, err);
        if (step->n_rows > 0)
            fold(step, &gathered, gathered.first, gathered.end, args);
    }
    return LR_OK;
}

/* One worker: every block is at home, so the whole list is folded in one call. */
static void attend_alone(struct lr_step *step, int64_t layer, struct lr_attention_args *args)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    int64_t end = step->wave->end;
    struct lr_kv_list list = {.n_refs = lr_ceil_div(end, LR_BLOCK)};
    struct lr_kv_ref *refs = LR_STEP_TABLE(session, struct lr_kv_ref, list.n_refs);
    for (int64_t i = 0; i < list.n_refs; i++)
        refs[i] = (struct lr_kv_ref){.data = lr_session_block(session, layer, i),
                                     .position = i * LR_BLOCK,
                                     .n_keys = (int32_t)lr_min_i64(end - i * LR_BLOCK, LR_BLOCK)};
    list.refs = refs;
    args->lists = &list;
    engine->ops->attention(&engine->exec, args);
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
    int64_t row = lr_min_i64(n_workers * own, all), lent = options->segment_tokens / 2;
    size_t block = ops->kv_block_bytes(lr_plan_kv_shape(dims, options->kv_dtype));
    return (struct lr_step_bytes){
        .tensors = 2 * lr_tensor_bytes(row, block) +
                   lr_tensor_bytes((int64_t)(loan_queries_bytes(dims, ops, lent) + loan_state_bytes(dims, lent)), 1),
        .tables = lr_tensor_bytes(row, sizeof(struct lr_kv_ref)) + 2 * lr_tensor_bytes(n_workers, sizeof(size_t)) +
                  lr_tensor_bytes(2 * n_workers, sizeof(size_t)) + lr_tensor_bytes(lent, sizeof(int64_t))};
}
