/* A wave that is not full: some workers have few queries or none. Each worker that has more to fold than the mean lends
 * its last queries to those that have less, before the first row; they fold all rows for them, and send home what was
 * attended.
 *
 *   worker 0   |kept.............|lent..|        worker 1   |own..|borrowed|
 *
 * Everyone makes the same plan, from the wave alone. */
#include "worker/layers/attention_ring.h"

#include <math.h>

/* A loan is at least this part of a segment: the calls for it have to fill a device. */
enum { LEAST_PART = 32 };

/* ---- the plan ---- */

/* Keys that the queries of worker r see, all together. */
static double load_of(const struct lr_wave *wave, int r)
{
    double start = (double)lr_wave_start(wave, r), n = (double)lr_wave_length(wave, r);
    return n * (start + (n + 1) / 2);
}

/* What worker `from` lends to each, by what they can still take: amounts [n_workers] rows, and their sum. The last n
 * rows of a segment see n keys - n^2 / 2, where `keys` are what its last query sees. */
static int64_t plan_lender(const struct lr_wave *wave, int n_workers, int from, double *spare, int64_t *amounts)
{
    int64_t least = lr_max_i64(1, wave->segment / LEAST_PART), left = lr_wave_length(wave, from);
    for (int to = 0; to < n_workers; to++) {
        double load = spare[to] < -spare[from] ? spare[to] : -spare[from];
        double keys = (double)(lr_wave_start(wave, from) + left);
        int64_t n = load > 0.0 ? lr_min_i64(left, (int64_t)(keys - sqrt(keys * keys - 2.0 * load))) : 0;
        amounts[to] = n < least ? 0 : n - n % lr_min_i64(least, LR_BLOCK);
        load = (double)amounts[to] * (keys - (double)amounts[to] / 2.0);
        spare[to] -= load;
        spare[from] += load;
        left -= amounts[to];
    }
    return lr_wave_length(wave, from) - left;
}

/* What of the plan concerns this worker. */
static void
note_lender(struct lr_spread *spread, int rank, int n_workers, int from, int64_t first, const int64_t *amounts)
{
    for (int to = 0; to < n_workers; to++) {
        if (from == rank)
            spread->lent[to] = amounts[to];
        if (to == rank) {
            spread->borrowed[from] = amounts[to];
            spread->first[from] = first;
            spread->n_borrowed += amounts[to];
        }
        first += amounts[to];
    }
}

void lr_spread_plan(
    const struct lr_wave *wave, int n_workers, int rank, double *spare, int64_t *amounts, struct lr_spread *spread)
{
    double mean = 0.0;
    spread->kept = lr_wave_length(wave, rank);
    spread->n_borrowed = 0;
    for (int r = 0; r < n_workers; r++)
        mean += load_of(wave, r) / n_workers;
    for (int r = 0; r < n_workers; r++)
        spare[r] = mean - load_of(wave, r);
    for (int from = 0; from < n_workers; from++) {
        int64_t lent = plan_lender(wave, n_workers, from, spare, amounts);
        note_lender(spread, rank, n_workers, from, lr_wave_length(wave, from) - lent, amounts);
        spread->kept -= from == rank ? lent : 0;
    }
}

static void plan(const struct lr_step *step, struct lr_spread *spread)
{
    struct lr_session *session = step->session;
    const struct lr_comm *links = session->engine->links;
    *spread = (struct lr_spread){.lent = LR_STEP_TABLE(session, int64_t, links->size),
                                 .borrowed = LR_STEP_TABLE(session, int64_t, links->size),
                                 .first = LR_STEP_TABLE(session, int64_t, links->size),
                                 .sizes = LR_STEP_TABLE(session, size_t, 2 * links->size)};
    double *spare = LR_STEP_TABLE(session, double, links->size);
    int64_t *amounts = LR_STEP_TABLE(session, int64_t, links->size);
    lr_spread_plan(step->wave, links->size, links->rank, spare, amounts, spread);
}

/* ---- moving ---- */

/* Rows of `row_bytes` to those who borrow and from those who lend; or, `back`, the other way. */
static enum lr_status start_moving(const struct lr_step *step,
                                   struct lr_spread *spread,
                                   bool back,
                                   const void *data,
                                   void *received,
                                   size_t row_bytes,
                                   struct lr_error *err)
{
    struct lr_comm *links = step->session->engine->links;
    size_t *sends = spread->sizes, *receives = spread->sizes + links->size;
    for (int r = 0; r < links->size; r++) {
        sends[r] = (size_t)(back ? spread->borrowed[r] : spread->lent[r]) * row_bytes;
        receives[r] = (size_t)(back ? spread->lent[r] : spread->borrowed[r]) * row_bytes;
    }
    return lr_comm_all_to_all_v_start(links, back ? "spread rows" : "spread queries", data, sends, received, receives,
                                      &spread->request, err);
}

enum lr_status lr_spread_begin(struct lr_step *step,
                               struct lr_spread *spread,
                               const struct lr_attention_args *args,
                               struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    plan(step, spread);
    int64_t n_lent = step->n_rows - spread->kept;
    spread->outgoing = LR_STEP_TENSOR(session, char, lr_query_bytes(dims, engine->ops, n_lent));
    spread->queries = LR_STEP_TENSOR(session, char, lr_query_bytes(dims, engine->ops, spread->n_borrowed));
    spread->y = LR_STEP_TENSOR(session, char, lr_attended_bytes(dims, engine->ops, spread->n_borrowed));
    spread->softmax = lr_softmax_take(session, spread->n_borrowed);
    spread->positions = LR_STEP_TABLE(session, int64_t, spread->n_borrowed);
    int64_t *position = spread->positions;
    for (int r = 0; r < engine->links->size; r++)
        for (int64_t i = 0; i < spread->borrowed[r]; i++)
            *position++ = lr_wave_start(step->wave, r) + spread->first[r] + i;
    lr_queries_pack(step, args, spread->kept, n_lent, spread->outgoing);
    return start_moving(step, spread, false, spread->outgoing, spread->queries, lr_query_bytes(dims, engine->ops, 1),
                        err);
}

/* ---- folding ---- */

/* The arguments of all borrowed rows. */
static struct lr_attention_args
borrowed_args(const struct lr_step *step, const struct lr_spread *spread, const struct lr_attention_args *args)
{
    const struct lr_model_dims *dims = &step->session->engine->model.dims;
    struct lr_attention_args borrowed = *args;
    borrowed.q = spread->queries;
    borrowed.q_stride = 2 * dims->n_heads * dims->head_dim;
    borrowed.positions = spread->positions;
    borrowed.n_rows = spread->n_borrowed;
    borrowed.m = spread->softmax.m;
    borrowed.l = spread->softmax.l;
    borrowed.o = spread->softmax.o;
    borrowed.y = args->y ? spread->y : NULL;
    borrowed.y_stride = dims->n_heads * dims->head_dim;
    return borrowed;
}

enum lr_status lr_spread_fold(struct lr_step *step,
                              struct lr_spread *spread,
                              const struct lr_kv_row *row,
                              const struct lr_attention_args *args,
                              struct lr_error *err)
{
    struct lr_comm *links = step->session->engine->links;
    int64_t start = lr_wave_start(step->wave, links->rank);
    struct lr_attention_args own = lr_some_rows(step, args, 0, spread->kept);
    if (spread->kept > 0)
        lr_row_fold(step, row, row->first, lr_min_i64(row->end, start + spread->kept), &own);
    LR_TRY(lr_comm_wait(links, &spread->request, err));
    struct lr_attention_args borrowed = borrowed_args(step, spread, args);
    int64_t first = 0;
    for (int r = 0; r < links->size; r++) {
        int64_t n = spread->borrowed[r], end = lr_wave_start(step->wave, r) + spread->first[r] + n;
        struct lr_attention_args part = lr_some_rows(step, &borrowed, first, n);
        if (n > 0)
            lr_row_fold(step, row, row->first, lr_min_i64(row->end, end), &part);
        first += n;
    }
    return LR_OK;
}

enum lr_status lr_spread_end(struct lr_step *step,
                             struct lr_spread *spread,
                             const struct lr_attention_args *args,
                             struct lr_error *err)
{
    const struct lr_engine *engine = step->session->engine;
    lr_act *home = lr_act_at(engine->ops, args->y, spread->kept * args->y_stride);
    LR_TRY(
        start_moving(step, spread, true, spread->y, home, lr_attended_bytes(&engine->model.dims, engine->ops, 1), err));
    return lr_comm_wait(engine->links, &spread->request, err);
}

struct lr_step_bytes lr_spread_bytes(const struct lr_model_dims *dims,
                                     const struct lr_kernel_ops *ops,
                                     int n_workers,
                                     const struct lr_session_options *options)
{
    /* A worker lends or borrows, at most a segment: its own rows and the borrowed ones see no more keys than those of a
     * worker that has one. */
    int64_t n = options->segment_tokens;
    return (struct lr_step_bytes){
        .tensors = lr_tensor_bytes((int64_t)lr_query_bytes(dims, ops, n), 1) +
                   lr_tensor_bytes((int64_t)lr_attended_bytes(dims, ops, n), 1) + lr_softmax_bytes(dims, n),
        .tables = 5 * lr_tensor_bytes(n_workers, sizeof(int64_t)) + lr_tensor_bytes(2 * n_workers, sizeof(size_t)) +
                  lr_tensor_bytes(n, sizeof(int64_t))};
}
