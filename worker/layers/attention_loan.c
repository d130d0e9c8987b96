/* The last row of a full wave: workers r and h = P-1-r share what they have of it. h lends the upper half of its
 * queries, with their softmax states, and r folds the first h - r segments of the row for them, which leaves both with
 * as much.
 *
 *   h   lend --- fold own lower half ------------------ take back --- fold the rest of the upper half
 *   r    `-> fold h-r segments for the lent half --- return --- fold own queries */
#include "worker/layers/attention_ring.h"

/* A loan's memory:  queries [n] | m [n, n_heads] | l | o [n, n_heads, head_dim]  */
static size_t small_bytes(const struct lr_model_dims *dims, int64_t n)
{
    return lr_tensor_bytes(n * dims->n_heads, sizeof(float));
}

static size_t state_bytes(const struct lr_model_dims *dims, int64_t n)
{
    return 2 * small_bytes(dims, n) + lr_tensor_bytes(n * dims->n_heads * dims->head_dim, sizeof(float));
}

static size_t queries_bytes(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int64_t n)
{
    return lr_tensor_bytes((int64_t)lr_query_bytes(dims, ops, n), 1);
}

void lr_loan_take(const struct lr_step *step, struct lr_loan *loan)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    int rank = engine->comm->rank, mirror = engine->comm->size - 1 - rank;
    int64_t n = step->wave->segment / 2;
    *loan = (struct lr_loan){.lender = rank > mirror ? rank : mirror,
                             .folder = rank > mirror ? mirror : rank,
                             .first = step->wave->segment - n,
                             .n = n,
                             .has_part = rank != mirror,
                             .queries_bytes = queries_bytes(dims, engine->ops, n),
                             .state_bytes = state_bytes(dims, n),
                             .sizes = LR_STEP_TABLE(session, size_t, 2 * engine->comm->size)};
    if (!loan->has_part)
        return;
    loan->segments = loan->lender - loan->folder;
    loan->queries = LR_STEP_TENSOR(session, char, loan->queries_bytes + loan->state_bytes);
    loan->state = loan->queries + loan->queries_bytes;
    size_t small = small_bytes(dims, n);
    loan->softmax = (struct lr_softmax){
        .m = (float *)loan->state, .l = (float *)(loan->state + small), .o = (float *)(loan->state + 2 * small)};
}

/* From the step's states to the loan's, or back. */
static void
copy_states(const struct lr_step *step, const struct lr_loan *loan, const struct lr_attention_args *args, bool back)
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

/* Queries and states go from the lender to the folder, or the states back. */
static enum lr_status start_moving(const struct lr_step *step,
                                   const struct lr_loan *loan,
                                   bool back,
                                   struct lr_comm_request *request,
                                   struct lr_error *err)
{
    struct lr_comm *links = step->session->engine->links;
    size_t *sends = loan->sizes, *receives = loan->sizes + links->size;
    for (int r = 0; r < 2 * links->size; r++)
        loan->sizes[r] = 0;
    char *data = back ? loan->state : loan->queries;
    bool sends_it = (links->rank == loan->lender) != back;
    if (loan->has_part) {
        size_t bytes = back ? loan->state_bytes : loan->queries_bytes + loan->state_bytes;
        int other = links->rank == loan->lender ? loan->folder : loan->lender;
        *(sends_it ? &sends[other] : &receives[other]) = bytes;
    }
    return lr_comm_all_to_all_v_start(links, back ? "returned queries" : "lent queries", sends_it ? data : NULL, sends,
                                      sends_it ? NULL : data, receives, request, err);
}

enum lr_status lr_loan_lend(const struct lr_step *step,
                            struct lr_loan *loan,
                            const struct lr_attention_args *args,
                            struct lr_error *err)
{
    if (loan->has_part && step->session->engine->links->rank == loan->lender) {
        lr_queries_pack(step, args, loan->first, loan->n, loan->queries);
        copy_states(step, loan, args, false);
    }
    return start_moving(step, loan, false, &loan->lent, err);
}

/* The lender: its lower half, and what is left of its upper half. */
static enum lr_status fold_as_lender(struct lr_step *step,
                                     struct lr_loan *loan,
                                     const struct lr_kv_row *row,
                                     const struct lr_attention_args *args,
                                     struct lr_error *err)
{
    struct lr_comm *links = step->session->engine->links;
    struct lr_comm_request returned = {0};
    int64_t end = lr_wave_start(step->wave, links->rank) + step->n_rows;
    struct lr_attention_args lower = lr_some_rows(step, args, 0, loan->first);
    struct lr_attention_args upper = lr_some_rows(step, args, loan->first, loan->n);
    lr_row_fold(step, row, row->first, end - loan->n, &lower);
    LR_TRY(lr_comm_wait(links, &loan->lent, err));
    LR_TRY(start_moving(step, loan, true, &returned, err));
    LR_TRY(lr_comm_wait(links, &returned, err));
    copy_states(step, loan, args, true);
    upper.first = 0;
    lr_row_fold(step, row, row->first + loan->segments * step->wave->segment, end, &upper);
    return LR_OK;
}

/* The folder: what was lent to it, then its own. */
static enum lr_status fold_as_folder(struct lr_step *step,
                                     struct lr_loan *loan,
                                     const struct lr_kv_row *row,
                                     struct lr_attention_args *args,
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
    LR_TRY(lr_comm_wait(links, &loan->lent, err));
    lr_row_fold(step, row, row->first, row->first + loan->segments * step->wave->segment, &other);
    LR_TRY(start_moving(step, loan, true, &returned, err));
    lr_row_fold(step, row, row->first, lr_wave_start(step->wave, links->rank) + step->n_rows, args);
    return lr_comm_wait(links, &returned, err);
}

/* The one in the middle has nothing to share, and goes along. */
static enum lr_status fold_in_the_middle(struct lr_step *step,
                                         struct lr_loan *loan,
                                         const struct lr_kv_row *row,
                                         struct lr_attention_args *args,
                                         struct lr_error *err)
{
    struct lr_comm *links = step->session->engine->links;
    struct lr_comm_request returned = {0};
    lr_row_fold(step, row, row->first, lr_wave_start(step->wave, links->rank) + step->n_rows, args);
    LR_TRY(lr_comm_wait(links, &loan->lent, err));
    LR_TRY(start_moving(step, loan, true, &returned, err));
    return lr_comm_wait(links, &returned, err);
}

enum lr_status lr_loan_fold(struct lr_step *step,
                            struct lr_loan *loan,
                            const struct lr_kv_row *row,
                            struct lr_attention_args *args,
                            struct lr_error *err)
{
    if (!loan->has_part)
        return fold_in_the_middle(step, loan, row, args, err);
    if (step->session->engine->links->rank == loan->lender)
        return fold_as_lender(step, loan, row, args, err);
    return fold_as_folder(step, loan, row, args, err);
}

struct lr_step_bytes lr_loan_bytes(const struct lr_model_dims *dims,
                                   const struct lr_kernel_ops *ops,
                                   int n_workers,
                                   const struct lr_session_options *options)
{
    int64_t n = options->segment_tokens / 2;
    return (struct lr_step_bytes){.tensors = queries_bytes(dims, ops, n) + state_bytes(dims, n),
                                  .tables = lr_tensor_bytes(2 * n_workers, sizeof(size_t)) +
                                            lr_tensor_bytes(n, sizeof(int64_t))};
}
