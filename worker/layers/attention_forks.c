/* Attention of forks: queries are everywhere, every range of the document's keys gives one fresh partial, and the
 * partials of all workers are merged by sums that have no order.
 *
 *   slots   0 .. n-2   ranges of the document that live here: PARTIAL_TOKENS tokens each (or one chosen page each)
 *           n-1        the fork's own tail, where that lives here
 *
 * A range's length is a constant of the session, so the partials are the same on any number of workers. */
#include "worker/kv_tier.h"
#include "worker/layers/attention_impl.h"
#include "worker/plan.h"

#include <math.h>

enum { PARTIAL_BUDGET_BYTES = 128 << 20, PARTIAL_TOKENS = 4096 };

/* Tokens of one range: segments are a multiple of it. */
static int64_t range_tokens(const struct lr_session_options *options)
{
    return lr_min_i64(options->segment_tokens, PARTIAL_TOKENS);
}

static int64_t local_ranges(const struct lr_session_options *options, int n_workers)
{
    int64_t segments = lr_ceil_div(options->max_tokens, options->segment_tokens);
    return lr_ceil_div(segments, n_workers) * (options->segment_tokens / range_tokens(options));
}

int64_t lr_fork_partials(const struct lr_session_options *options, int n_workers)
{
    return 1 + (options->decode_pages > 0 ? options->decode_pages : local_ranges(options, n_workers));
}

int64_t lr_fork_step_rows(const struct lr_model_dims *dims, const struct lr_session_options *options, int n_workers)
{
    int64_t row_bytes =
        lr_fork_partials(options, n_workers) * dims->n_heads * (dims->head_dim + 2) * (int64_t)sizeof(float);
    int64_t rows = lr_min_i64(256, PARTIAL_BUDGET_BYTES / lr_max_i64(row_bytes, 1));
    if (options->host_slabs > 0 && options->decode_pages > 0) /* one page of every row and KV head fits a slot */
        rows = lr_min_i64(rows, lr_plan_slot_blocks(dims, options) / dims->n_kv_heads);
    return lr_max_i64(rows, options->max_forks);
}

/* The KV block of a fork's tail that holds `position`. */
static char *fork_block(const struct lr_session *session, const struct lr_fork *fork, int64_t layer, int64_t position)
{
    int64_t block = position / LR_BLOCK - session->n_tokens / LR_BLOCK;
    return fork->kv + (size_t)(layer * session->fork_blocks + block) * session->block_bytes;
}

/* The fork that a row belongs to. */
static const struct lr_fork *fork_of_row(const struct lr_batch *batch, int64_t row)
{
    int64_t slice = 0;
    while (batch->slice_first[slice + 1] <= row)
        slice++;
    return batch->forks[row - batch->slice_first[slice]];
}

/* KV rows of the forks whose tails live here. */
static void store_fork_kv(const struct lr_step *step, int64_t layer, const struct lr_projection *p)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_batch *batch = step->batch;
    void **blocks = LR_STEP_TABLE(session, void *, step->n_rows);
    for (int64_t j = 0; j < batch->n_slices; j++)
        for (int64_t f = 0; f < lr_batch_slice_rows(batch, j); f++) {
            int64_t row = batch->slice_first[j] + f;
            const struct lr_fork *fork = batch->forks[f];
            blocks[row] = fork->kv ? fork_block(session, fork, layer, step->positions[row]) : NULL;
        }
    struct lr_kv_store_rows_args args = {.shape = session->kv_shape,
                                         .k = lr_act_at(engine->ops, p->rows, p->k),
                                         .k_stride = p->stride,
                                         .v = lr_act_at(engine->ops, p->rows, p->v),
                                         .v_stride = p->stride,
                                         .n_rows = step->n_rows,
                                         .positions = step->positions,
                                         .blocks = blocks};
    engine->ops->kv_store_rows(&engine->exec, &args);
}

/* One item for the tail of every fork that lives here: its own tokens and the document's unfinished block. */
static void list_tails(const struct lr_step *step, int64_t layer, int64_t slot, struct lr_partial_work *work)
{
    struct lr_session *session = step->session;
    const struct lr_batch *batch = step->batch;
    int64_t first_block = session->n_tokens / LR_BLOCK;
    for (int64_t row = 0, n; row < step->n_rows; row += n) {
        /* a single fork's rows follow one another: one item for all of them */
        n = batch->n_forks == 1 ? step->n_rows - row : 1;
        const struct lr_fork *fork = fork_of_row(batch, row);
        if (!fork->kv)
            continue;
        int64_t end = step->positions[row + n - 1] + 1, n_blocks = lr_ceil_div(end, LR_BLOCK) - first_block;
        struct lr_kv_ref *refs = LR_STEP_TABLE(session, struct lr_kv_ref, n_blocks);
        struct lr_kv_list *list = LR_STEP_TABLE(session, struct lr_kv_list, 1);
        for (int64_t i = 0; i < n_blocks; i++) {
            int64_t position = (first_block + i) * LR_BLOCK;
            refs[i] = (struct lr_kv_ref){.data = fork_block(session, fork, layer, position),
                                         .position = position,
                                         .n_keys = (int32_t)lr_min_i64(end - position, LR_BLOCK)};
        }
        *list = (struct lr_kv_list){.refs = refs, .n_refs = n_blocks};
        work->items[work->n_items++] =
            (struct lr_partial_item){.slot = slot, .first_row = row, .n_rows = n, .lists = list, .n_lists = 1};
    }
}

/* Whole blocks of the document in this worker's slab. */
static int64_t slab_blocks(const struct lr_session *session, int64_t slab)
{
    const struct lr_comm *comm = session->engine->comm;
    int64_t per_segment = lr_blocks_per_segment(session);
    int64_t first = (slab * comm->size + comm->rank) * per_segment;
    return lr_max_i64(0, lr_min_i64(per_segment, session->n_tokens / LR_BLOCK - first));
}

/* One item for each range of a slab, whose blocks lie at `data`; slots from `slot` on. Returns the next slot. */
static int64_t
list_ranges(const struct lr_step *step, int64_t slab, const char *data, int64_t slot, struct lr_partial_work *work)
{
    struct lr_session *session = step->session;
    const struct lr_comm *comm = session->engine->comm;
    int64_t start = (slab * comm->size + comm->rank) * lr_blocks_per_segment(session);
    int64_t n_blocks = slab_blocks(session, slab), per_range = range_tokens(&session->options) / LR_BLOCK;
    for (int64_t first = 0; first < n_blocks; first += per_range) {
        int64_t n = lr_min_i64(per_range, n_blocks - first);
        struct lr_kv_ref *refs = LR_STEP_TABLE(session, struct lr_kv_ref, n);
        struct lr_kv_list *list = LR_STEP_TABLE(session, struct lr_kv_list, 1);
        for (int64_t i = 0; i < n; i++)
            refs[i] = (struct lr_kv_ref){.data = data + (size_t)(first + i) * session->block_bytes,
                                         .position = (start + first + i) * LR_BLOCK,
                                         .n_keys = LR_BLOCK};
        *list = (struct lr_kv_list){.refs = refs, .n_refs = n};
        work->items[work->n_items++] = (struct lr_partial_item){
            .slot = slot++, .first_row = 0, .n_rows = step->n_rows, .lists = list, .n_lists = 1};
    }
    return slot;
}

/* Folds the items listed so far, all of slots [first, end), and empties the list. */
static void fold_slots(
    const struct lr_step *step, struct lr_partials_args args, struct lr_partial_work *work, int64_t first, int64_t end)
{
    const struct lr_engine *engine = step->session->engine;
    int64_t per_slot = args.n_rows * args.shape.n_heads;
    for (int64_t i = 0; i < work->n_items; i++)
        work->items[i].slot -= first;
    args.items = work->items;
    args.n_items = work->n_items;
    args.n_slots = end - first;
    args.m += first * per_slot;
    args.l += first * per_slot;
    args.o += first * per_slot * args.shape.head_dim;
    if (end > first)
        engine->ops->partials(&engine->exec, &args);
    work->n_items = 0;
}

/* The document that lives here, range by range: what is on the device together with the tails, where all of it is;
 * else the host's slabs one after the other. */
static void attend_ranges(const struct lr_step *step,
                          int64_t layer,
                          const struct lr_partials_args *args,
                          struct lr_partial_work *work)
{
    struct lr_session *session = step->session;
    int64_t n_slabs = 0, slot = 0, folded = 0;
    while (slab_blocks(session, n_slabs) > 0)
        n_slabs++;
    for (int64_t slab = 0; slab < n_slabs; slab++) {
        int away = slab >= session->tier.resident_slabs;
        if (away && work->n_items > 0) {
            fold_slots(step, *args, work, folded, slot);
            folded = slot;
        }
        slot = list_ranges(step, slab, lr_kv_enter(session, layer, slab, n_slabs), slot, work);
        if (away) {
            fold_slots(step, *args, work, folded, slot);
            folded = slot;
            lr_kv_leave(session);
        }
    }
    list_tails(step, layer, args->n_slots - 1, work);
    fold_slots(step, *args, work, folded, args->n_slots);
}

/* The chosen pages, in groups of slots whose pages fit a slot of the tier, and the tails. */
static enum lr_status attend_pages(struct lr_step *step,
                                   int64_t layer,
                                   const struct lr_projection *p,
                                   const struct lr_partials_args *args,
                                   struct lr_partial_work *work,
                                   struct lr_error *err)
{
    struct lr_session *session = step->session;
    int64_t n_pages = session->options.decode_pages, group = n_pages;
    if (lr_kv_is_tiered(session))
        group = session->tier.slot_blocks / (step->n_rows * session->kv_shape.n_kv_heads);
    const struct lr_offer *offers;
    LR_TRY(lr_choose_pages(step, layer, p, &offers, err));
    for (int64_t first = 0; first < n_pages; first += group) {
        int64_t end = lr_min_i64(first + group, n_pages);
        struct lr_step_mark mark = lr_step_mark(session);
        lr_list_pages(step, layer, offers, first, end, work);
        if (end == n_pages) {
            list_tails(step, layer, n_pages, work);
            end++;
        }
        fold_slots(step, *args, work, first, end);
        lr_kv_gather_leave(session);
        lr_step_rewind(session, mark);
    }
    return LR_OK;
}

static enum lr_status merge_partials(struct lr_step *step,
                                     const struct lr_softmax *partials,
                                     int64_t n,
                                     int64_t n_total,
                                     lr_act *y,
                                     struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    int64_t rows = step->n_rows * dims->n_heads;
    struct lr_merge_args args = {.n_rows = step->n_rows,
                                 .n_heads = dims->n_heads,
                                 .head_dim = dims->head_dim,
                                 .n_partials = n,
                                 .n_partials_total = n_total,
                                 .m = partials->m,
                                 .l = partials->l,
                                 .o = partials->o,
                                 .bound = LR_STEP_TENSOR(session, float, rows * 2),
                                 .sums = LR_STEP_TENSOR(session, int64_t, rows * (dims->head_dim + 1)),
                                 .y = y,
                                 .y_stride = dims->n_heads * dims->head_dim};
    engine->ops->merge_bounds(&engine->exec, &args);
    LR_TRY(lr_comm_max_f32(engine->links, "attention maxima", args.bound, (size_t)rows * 2, err));
    engine->ops->merge_accumulate(&engine->exec, &args);
    LR_TRY(lr_comm_sum_i64(engine->links, "attention sums", args.sums, (size_t)(rows * (dims->head_dim + 1)), err));
    engine->ops->merge_finish(&engine->exec, &args);
    return LR_OK;
}

/* Items of one step at most. */
static int64_t most_items(const struct lr_session_options *options, int n_workers, int64_t n_rows)
{
    int64_t document =
        options->decode_pages > 0 ? n_rows * options->decode_pages : lr_fork_partials(options, n_workers);
    return document + n_rows;
}

enum lr_status
lr_attend_forks(struct lr_step *step, int64_t layer, const struct lr_projection *p, lr_act *y, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_session_options *options = &session->options;
    store_fork_kv(step, layer, p);
    int64_t n = lr_fork_partials(options, engine->comm->size);
    int64_t ranges = lr_ceil_div(session->n_tokens, range_tokens(options));
    struct lr_softmax partials = lr_softmax_take(session, n * step->n_rows);
    struct lr_partial_work work = {
        .items = LR_STEP_TABLE(session, struct lr_partial_item, most_items(options, engine->comm->size, step->n_rows))};
    struct lr_partials_args args = {.shape = session->kv_shape,
                                    .q = p->rows,
                                    .q_stride = p->stride,
                                    .q_head_stride = 2 * dims->head_dim,
                                    .n_rows = step->n_rows,
                                    .positions = step->positions,
                                    .scale = 1.0f / sqrtf((float)dims->head_dim),
                                    .n_slots = n,
                                    .m = partials.m,
                                    .l = partials.l,
                                    .o = partials.o};
    if (options->decode_pages > 0)
        LR_TRY(attend_pages(step, layer, p, &args, &work, err));
    else
        attend_ranges(step, layer, &args, &work);
    return merge_partials(step, &partials, n, 1 + (options->decode_pages > 0 ? options->decode_pages : ranges), y, err);
}

struct lr_step_bytes lr_attend_forks_bytes(const struct lr_model_dims *dims,
                                           int n_workers,
                                           const struct lr_session_options *options,
                                           int64_t n_rows)
{
    int64_t rows = n_rows * dims->n_heads, items = most_items(options, n_workers, n_rows);
    int64_t tail_blocks = options->max_fork_tokens / LR_BLOCK + 3;
    struct lr_step_bytes bytes = {0};
    bytes.tensors = lr_softmax_bytes(dims, lr_fork_partials(options, n_workers) * n_rows) +
                    lr_tensor_bytes(rows * 2, sizeof(float)) +
                    lr_tensor_bytes(rows * (dims->head_dim + 1), sizeof(int64_t));
    bytes.tables = lr_tensor_bytes(n_rows, sizeof(void *)) + lr_tensor_bytes(items, sizeof(struct lr_partial_item)) +
                   (size_t)n_rows * (lr_tensor_bytes(tail_blocks, sizeof(struct lr_kv_ref)) + LR_ARENA_ALIGN_BYTES);
    if (options->decode_pages > 0) {
        struct lr_step_bytes pages = lr_list_pages_bytes(dims, n_workers, options, n_rows);
        bytes.tensors += pages.tensors;
        bytes.tables += pages.tables;
    } else {
        bytes.tables += (size_t)local_ranges(options, n_workers) *
                        (lr_tensor_bytes(range_tokens(options) / LR_BLOCK, sizeof(struct lr_kv_ref)) +
                         LR_ARENA_ALIGN_BYTES);
    }
    return bytes;
}
