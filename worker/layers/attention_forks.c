/* Attention of forks: queries are everywhere, every KV segment gives one fresh partial, and the
 * partials of all workers are merged by sums that have no order. */
#include "worker/layers/attention_impl.h"

enum { PARTIAL_BUDGET_BYTES = 128 << 20 };

int64_t lr_fork_partials(const struct lr_session_options *options, int n_workers)
{
    int64_t segments = lr_ceil_div(options->max_tokens, options->segment_tokens);
    return options->decode_pages > 0 ? options->decode_pages + 1 : lr_ceil_div(segments, n_workers) + 1;
}

int64_t lr_fork_step_rows(const struct lr_model_dims *dims, const struct lr_session_options *options, int n_workers)
{
    int64_t row_bytes =
        lr_fork_partials(options, n_workers) * dims->n_heads * (dims->head_dim + 2) * (int64_t)sizeof(float);
    int64_t rows = lr_min_i64(256, PARTIAL_BUDGET_BYTES / lr_max_i64(row_bytes, 1));
    return lr_max_i64(rows, options->max_forks);
}

/* Partials of a step: slot i holds m, l, o of all rows over the i-th KV range. */
struct partials {
    int64_t n, n_total;
    struct lr_softmax all;
};

/* Arguments for rows [row, row + n) of slot `slot`. */
static struct lr_attention_args partial_call(const struct lr_step *step,
                                             const struct lr_projection *p,
                                             const struct partials *partials,
                                             int64_t slot,
                                             int64_t row,
                                             int64_t n)
{
    const struct lr_model_dims *dims = &step->session->engine->model.dims;
    struct lr_attention_args args = lr_attention_call(step, p, &partials->all);
    int64_t at = (slot * step->n_rows + row) * dims->n_heads;
    args.m += at;
    args.l += at;
    args.o += at * dims->head_dim;
    args.q = p->rows + row * p->stride;
    args.positions += row;
    args.n_rows = n;
    return args;
}

/* KV rows of the forks whose tails live here. */
static void store_fork_kv(const struct lr_step *step, int64_t layer, const struct lr_projection *p)
{
    const struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_batch *batch = step->batch;
    int64_t first_block = session->n_tokens / LR_BLOCK;
    for (int64_t j = 0; j < batch->n_slices; j++)
        for (int64_t f = 0; f < lr_batch_slice_rows(batch, j); f++) {
            const struct lr_fork *fork = batch->forks[f];
            if (!fork->kv)
                continue;
            int64_t row = batch->slice_first[j] + f, position = step->positions[row];
            void *block = fork->kv + (size_t)(layer * session->fork_blocks + position / LR_BLOCK - first_block) *
                                         session->block_bytes;
            struct lr_kv_store_args args = {.shape = session->kv_shape,
                                            .k = p->rows + row * p->stride + p->k,
                                            .k_stride = p->stride,
                                            .v = p->rows + row * p->stride + p->v,
                                            .v_stride = p->stride,
                                            .n_rows = 1,
                                            .position = position,
                                            .blocks = &block};
            engine->ops->kv_store(&engine->exec, &args);
        }
}

/* The tail partial of every fork that lives here: its own tokens and the document's unfinished
 * block. */
static void attend_tails(const struct lr_step *step,
                         int64_t layer,
                         const struct lr_projection *p,
                         const struct partials *partials,
                         int64_t index,
                         struct lr_kv_ref *refs)
{
    const struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_batch *batch = step->batch;
    int64_t first_block = session->n_tokens / LR_BLOCK;
    for (int64_t row = 0, n; row < step->n_rows; row += n) {
        int64_t slice = 0;
        while (batch->slice_first[slice + 1] <= row)
            slice++;
        /* a single fork's rows follow one another: one call for all of them */
        n = batch->n_forks == 1 ? step->n_rows - row : 1;
        const struct lr_fork *fork = batch->forks[row - batch->slice_first[slice]];
        if (!fork->kv)
            continue;
        int64_t end = step->positions[row + n - 1] + 1;
        struct lr_kv_list list = {.refs = refs};
        for (int64_t b = first_block; b * LR_BLOCK < end; b++)
            refs[list.n_refs++] = (struct lr_kv_ref){
                .data = fork->kv + (size_t)(layer * session->fork_blocks + b - first_block) * session->block_bytes,
                .position = b * LR_BLOCK,
                .n_keys = (int32_t)lr_min_i64(end - b * LR_BLOCK, LR_BLOCK)};
        struct lr_attention_args args = partial_call(step, p, partials, index, row, n);
        args.lists = &list;
        engine->ops->attention(&engine->exec, &args);
    }
}

/* One partial for each of the document's segments that lives here; whole blocks only. */
static void attend_segments(const struct lr_step *step,
                            int64_t layer,
                            const struct lr_projection *p,
                            const struct partials *partials,
                            struct lr_kv_ref *refs)
{
    const struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    int64_t per_segment = lr_blocks_per_segment(session), blocks = session->n_tokens / LR_BLOCK;
    int64_t index = 0;
    for (int64_t first = engine->comm->rank * per_segment; first < blocks; first += engine->comm->size * per_segment) {
        struct lr_kv_list list = {.refs = refs};
        for (int64_t b = first; b < lr_min_i64(first + per_segment, blocks); b++)
            refs[list.n_refs++] = (struct lr_kv_ref){
                .data = lr_session_block(session, layer, b), .position = b * LR_BLOCK, .n_keys = LR_BLOCK};
        struct lr_attention_args args = partial_call(step, p, partials, index++, 0, step->n_rows);
        args.lists = &list;
        engine->ops->attention(&engine->exec, &args);
    }
}

static enum lr_status
merge_partials(struct lr_step *step, const struct partials *partials, float *y, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    int64_t rows = step->n_rows * dims->n_heads;
    struct lr_merge_args args = {.n_rows = step->n_rows,
                                 .n_heads = dims->n_heads,
                                 .head_dim = dims->head_dim,
                                 .n_partials = partials->n,
                                 .n_partials_total = partials->n_total,
                                 .m = partials->all.m,
                                 .l = partials->all.l,
                                 .o = partials->all.o,
                                 .bound = LR_STEP_ARRAY(session, float, rows * 2),
                                 .sums = LR_STEP_ARRAY(session, int64_t, rows * (dims->head_dim + 1)),
                                 .y = y,
                                 .y_stride = dims->n_heads * dims->head_dim};
    engine->ops->merge_bounds(&engine->exec, &args);
    LR_TRY(lr_comm_max_f32(engine->comm, "attention maxima", args.bound, (size_t)rows * 2, err));
    engine->ops->merge_accumulate(&engine->exec, &args);
    LR_TRY(lr_comm_sum_i64(engine->comm, "attention sums", args.sums, (size_t)(rows * (dims->head_dim + 1)), err));
    engine->ops->merge_finish(&engine->exec, &args);
    return LR_OK;
}

enum lr_status
lr_attend_forks(struct lr_step *step, int64_t layer, const struct lr_projection *p, float *y, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_session_options *options = &session->options;
    store_fork_kv(step, layer, p);
    int64_t segments = lr_ceil_div(session->n_tokens, options->segment_tokens);
    struct partials partials = {.n = lr_fork_partials(options, session->engine->comm->size),
                                .n_total = 1 + (options->decode_pages > 0 ? options->decode_pages : segments)};
    partials.all = lr_softmax_start(session, partials.n * step->n_rows);
    struct lr_kv_ref *refs =
        LR_STEP_ARRAY(session, struct lr_kv_ref, lr_max_i64(lr_blocks_per_segment(session), session->fork_blocks) + 1);
    if (options->decode_pages > 0)
        LR_TRY(lr_attend_pages(step, layer, p, &partials.all, err));
    else
        attend_segments(step, layer, p, &partials, refs);
    attend_tails(step, layer, p, &partials, partials.n - 1, refs);
    return merge_partials(step, &partials, y, err);
}

size_t lr_attend_forks_bytes(const struct lr_model_dims *dims,
                             int n_workers,
                             const struct lr_session_options *options,
                             int64_t n_rows)
{
    size_t rows = (size_t)(n_rows * dims->n_heads), width = (size_t)dims->head_dim;
    size_t blocks = (size_t)((options->segment_tokens + options->max_fork_tokens) / LR_BLOCK) + 4;
    size_t bytes = lr_softmax_bytes(dims, lr_fork_partials(options, n_workers) * n_rows);
    bytes += rows * (2 * sizeof(float) + (width + 1) * sizeof(int64_t));
    bytes += blocks * sizeof(struct lr_kv_ref);
    if (options->decode_pages > 0)
        bytes += lr_attend_pages_bytes(dims, n_workers, options, n_rows);
    return bytes + 4096;
}
