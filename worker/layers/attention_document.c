/* Attention of a document's segment: storing KV, then full attention (attention_ring.c) or sparse attention over fetched
 * blocks. See attention.c for the whole picture. */
#include "worker/layers/attention_impl.h"

#include <string.h>

/* ---- document: storing KV
 * ----------------------------------------------------------------------------------------- */

/* Summaries of the segment's blocks; `means` may be NULL. */
static void summarize_blocks(
    struct lr_session *session, int64_t layer, int64_t first_block, int64_t end_token, float *means)
{
    const struct lr_engine *engine = session->engine;
    int64_t size = session->kv_shape.n_kv_heads * session->kv_shape.head_dim;
    int64_t n_blocks = lr_ceil_div(end_token, LR_BLOCK) - first_block;
    int64_t per_segment = lr_blocks_per_segment(session);
    int64_t local = first_block / per_segment / engine->comm->size * per_segment;
    int64_t page = (layer * session->local_blocks + local) * size;
    struct lr_kv_ref *refs = LR_STEP_TABLE(session, struct lr_kv_ref, n_blocks);
    for (int64_t i = 0; i < n_blocks; i++)
        refs[i] = (struct lr_kv_ref){.data = lr_session_block(session, layer, first_block + i),
                                     .position = (first_block + i) * LR_BLOCK,
                                     .n_keys = (int32_t)lr_min_i64(end_token - (first_block + i) * LR_BLOCK, LR_BLOCK)};
    struct lr_block_summary_args args = {.shape = session->kv_shape,
                                         .blocks = refs,
                                         .n_blocks = n_blocks,
                                         .mean = means,
                                         .min = session->page_min ? session->page_min + page : NULL,
                                         .max = session->page_max ? session->page_max + page : NULL};
    engine->ops->block_summary(&engine->exec, &args);
}

/* Means of the wave's blocks, from everyone to everyone, into session->block_means. */
static enum lr_status share_means(struct lr_step *step, int64_t layer, const float *mine, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_comm *comm = session->engine->links;
    int64_t size = session->kv_shape.n_kv_heads * session->kv_shape.head_dim;
    int64_t n_blocks = lr_ceil_div(session->options.max_tokens, LR_BLOCK);
    size_t *sizes = LR_STEP_TABLE(session, size_t, comm->size);
    for (int r = 0; r < comm->size; r++)
        sizes[r] = (size_t)(lr_ceil_div(lr_wave_length(step->wave, r), LR_BLOCK) * size) * sizeof(float);
    float *all = session->block_means + (layer * n_blocks + step->wave->first / LR_BLOCK) * size;
    return lr_comm_all_gather_v(comm, "block means", mine, sizes, all, err);
}

static enum lr_status store_kv(struct lr_step *step, int64_t layer, const struct lr_projection *p, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    int64_t start = lr_wave_start(step->wave, engine->comm->rank), n = step->n_rows;
    int64_t n_blocks = lr_ceil_div(n, LR_BLOCK);
    void **blocks = LR_STEP_TABLE(session, void *, n_blocks);
    for (int64_t i = 0; i < n_blocks; i++)
        blocks[i] = lr_session_block(session, layer, start / LR_BLOCK + i);
    struct lr_kv_store_args args = {.shape = session->kv_shape,
                                    .k = lr_act_at(engine->ops, p->rows, p->k),
                                    .k_stride = p->stride,
                                    .v = lr_act_at(engine->ops, p->rows, p->v),
                                    .v_stride = p->stride,
                                    .n_rows = n,
                                    .position = start,
                                    .blocks = blocks};
    if (n > 0)
        engine->ops->kv_store(&engine->exec, &args);
    if (!session->block_means && !session->page_min)
        return LR_OK;
    int64_t size = session->kv_shape.n_kv_heads * session->kv_shape.head_dim;
    float *means = session->block_means ? LR_STEP_TENSOR(session, float, (n_blocks + 1) * size) : NULL;
    if (n > 0)
        summarize_blocks(session, layer, start / LR_BLOCK, start + n, means);
    return means ? share_means(step, layer, means, err) : LR_OK;
}

/* ---- document: sparse attention
 * ----------------------------------------------------------------------------------- */

/* The blocks that worker r's segment of this wave reads: [0, sink_end) and [window_first, end). */
struct reach {
    int64_t sink_end, window_first, end;
};

static struct reach reach_of(const struct lr_step *step, int rank)
{
    const struct lr_session_options *o = &step->session->options;
    int64_t start = lr_wave_start(step->wave, rank), n = lr_wave_length(step->wave, rank);
    struct reach reach = {0};
    if (n == 0)
        return reach;
    reach.end = lr_ceil_div(start + n, LR_BLOCK);
    reach.window_first = lr_max_i64(0, start - o->window + 1) / LR_BLOCK;
    reach.sink_end = lr_min_i64(lr_ceil_div(o->sinks, LR_BLOCK), reach.window_first);
    return reach;
}

/* Blocks that each worker needs for its segment, ascending, its own among them. */
struct needs {
    int64_t *first; /* [n_workers + 1] offsets into blocks */
    int32_t *blocks;
};

/* Most blocks one worker may need in a wave; all of what lies before it at the worst. */
static int64_t most_needs(const struct lr_session_options *o, const struct lr_model_dims *dims)
{
    int64_t own = o->segment_tokens / LR_BLOCK;
    int64_t fixed = own + lr_ceil_div(o->window, LR_BLOCK) + lr_ceil_div(o->sinks, LR_BLOCK) + 2;
    return lr_min_i64(fixed + own * dims->n_kv_heads * o->top_k_blocks, lr_ceil_div(o->max_tokens, LR_BLOCK) + 1);
}

static int64_t list_fixed_needs(const struct lr_step *step, int rank, int32_t *blocks)
{
    struct reach reach = reach_of(step, rank);
    int64_t n = 0;
    for (int64_t b = 0; b < reach.sink_end; b++)
        blocks[n++] = (int32_t)b;
    for (int64_t b = reach.window_first; b < reach.end; b++)
        blocks[n++] = (int32_t)b;
    return n;
}

/* Adds chosen blocks to an ascending list and keeps it ascending and free of repetitions. */
static int64_t merge_chosen(
    struct lr_session *session, const int32_t *chosen, int64_t n_chosen, int32_t *blocks, int64_t n, int64_t end_block)
{
    unsigned char *wanted = LR_STEP_TABLE(session, unsigned char, end_block);
    memset(wanted, 0, (size_t)end_block);
    for (int64_t i = 0; i < n; i++)
        wanted[blocks[i]] = 1;
    for (int64_t i = 0; i < n_chosen; i++)
        if (chosen[i] >= 0)
            wanted[chosen[i]] = 1;
    n = 0;
    for (int64_t b = 0; b < end_block; b++)
        if (wanted[b])
            blocks[n++] = (int32_t)b;
    return n;
}

static enum lr_status
list_needs(struct lr_step *step, const int32_t *chosen, int64_t n_chosen, struct needs *needs, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_comm *comm = session->engine->comm;
    int64_t most = most_needs(&session->options, &session->engine->model.dims);
    needs->first = LR_STEP_TABLE(session, int64_t, comm->size + 1);
    needs->blocks = LR_STEP_TABLE(session, int32_t, comm->size * most);
    needs->first[0] = 0;
    if (session->options.top_k_blocks == 0) {
        for (int r = 0; r < comm->size; r++)
            needs->first[r + 1] = needs->first[r] + list_fixed_needs(step, r, needs->blocks + needs->first[r]);
        return LR_OK;
    }
    int32_t *mine = LR_STEP_TABLE(session, int32_t, most);
    int64_t n = list_fixed_needs(step, comm->rank, mine);
    n = merge_chosen(session, chosen, n_chosen, mine, n, reach_of(step, comm->rank).end + 1);
    int64_t *counts = LR_STEP_TABLE(session, int64_t, comm->size);
    LR_TRY(lr_comm_all_gather(comm, "number of needed blocks", &n, sizeof n, counts, err));
    size_t *sizes = LR_STEP_TABLE(session, size_t, comm->size);
    for (int r = 0; r < comm->size; r++) {
        sizes[r] = (size_t)counts[r] * sizeof(int32_t);
        needs->first[r + 1] = needs->first[r] + counts[r];
    }
    return lr_comm_all_gather_v(comm, "needed blocks", mine, sizes, needs->blocks, err);
}

/* Where each block that I need lies: at home or in `fetched`. */
static enum lr_status
fetch_needs(struct lr_step *step, int64_t layer, const struct needs *needs, const char **where, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    struct lr_comm *comm = engine->links;
    size_t *send = LR_STEP_TABLE(session, size_t, comm->size);
    size_t *receive = LR_STEP_TABLE(session, size_t, comm->size);
    memset(send, 0, (size_t)comm->size * sizeof *send);
    memset(receive, 0, (size_t)comm->size * sizeof *receive);
    int64_t n_send = 0, n_receive = 0;
    for (int r = 0; r < comm->size; r++)
        for (int64_t i = needs->first[r]; i < needs->first[r + 1]; i++) {
            int owner = lr_session_block_owner(session, needs->blocks[i]);
            if (owner == comm->rank && r != comm->rank)
                send[r] += session->block_bytes, n_send++;
            if (owner != comm->rank && r == comm->rank)
                receive[owner] += session->block_bytes, n_receive++;
        }
    char *outgoing = LR_STEP_TENSOR(session, char, (size_t)n_send * session->block_bytes);
    char *fetched = LR_STEP_TENSOR(session, char, (size_t)n_receive * session->block_bytes);
    if (!outgoing || !fetched)
        return lr_fail(err, LR_INTERNAL, "workspace for %lld + %lld travelling blocks was not planned",
                       (long long)n_send, (long long)n_receive);
    char *next = outgoing;
    for (int r = 0; r < comm->size; r++)
        for (int64_t i = needs->first[r]; r != comm->rank && i < needs->first[r + 1]; i++)
            if (lr_session_block_owner(session, needs->blocks[i]) == comm->rank) {
                engine->ops->memory.copy(&engine->exec, next, lr_session_block(session, layer, needs->blocks[i]),
                                         session->block_bytes);
                next += session->block_bytes;
            }
    LR_TRY(lr_comm_all_to_all_v(comm, "kv blocks", outgoing, send, fetched, receive, err));
    size_t *offsets = LR_STEP_TABLE(session, size_t, comm->size);
    size_t offset = 0;
    for (int r = 0; r < comm->size; r++) {
        offsets[r] = offset;
        offset += receive[r];
    }
    for (int64_t i = needs->first[comm->rank]; i < needs->first[comm->rank + 1]; i++) {
        int owner = lr_session_block_owner(session, needs->blocks[i]);
        int64_t slot = i - needs->first[comm->rank];
        where[slot] =
            owner == comm->rank ? lr_session_block(session, layer, needs->blocks[i]) : fetched + offsets[owner];
        if (owner != comm->rank)
            offsets[owner] += session->block_bytes;
    }
    return LR_OK;
}

static struct lr_kv_ref make_ref(const struct lr_step *step, int64_t block, const char *data, int whole)
{
    int64_t end = step->wave->end;
    return (struct lr_kv_ref){.data = data,
                              .position = block * LR_BLOCK,
                              .n_keys = (int32_t)lr_min_i64(end - block * LR_BLOCK, LR_BLOCK),
                              .whole = whole};
}

/* Index of `block` among my needs. */
static int64_t find_need(const int32_t *blocks, int64_t n, int32_t block)
{
    int64_t low = 0, high = n - 1;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (blocks[middle] < block)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Blocks that one query block may read: sinks, chosen, window. */
static int64_t most_refs(const struct lr_session_options *o)
{
    return o->top_k_blocks + lr_ceil_div(o->sinks, LR_BLOCK) + lr_ceil_div(o->window, LR_BLOCK) + 3;
}

/* One list for each query block and KV head: sinks, chosen blocks, window. */
static struct lr_kv_list *chosen_lists(
    const struct lr_step *step, const int32_t *chosen, const int32_t *blocks, int64_t n, const char *const *where)
{
    struct lr_session *session = step->session;
    const struct lr_session_options *o = &session->options;
    int64_t kv_heads = session->kv_shape.n_kv_heads, k = o->top_k_blocks;
    int64_t start = lr_wave_start(step->wave, session->engine->comm->rank);
    int64_t n_query_blocks = lr_ceil_div(step->n_rows, LR_BLOCK);
    int64_t most = most_refs(o);
    struct lr_kv_ref *all_refs = LR_STEP_TABLE(session, struct lr_kv_ref, n_query_blocks * kv_heads * most);
    struct lr_kv_list *lists = LR_STEP_TABLE(session, struct lr_kv_list, n_query_blocks * kv_heads);
    for (int64_t i = 0; i < n_query_blocks * kv_heads; i++) {
        int64_t query_block = start / LR_BLOCK + i / kv_heads;
        int64_t window_first = lr_max_i64(0, query_block * LR_BLOCK - o->window + 1) / LR_BLOCK;
        int64_t sink_end = lr_min_i64(lr_ceil_div(o->sinks, LR_BLOCK), window_first);
        struct lr_kv_ref *refs = all_refs + i * most;
        int64_t m = 0;
        for (int64_t b = 0; b < sink_end; b++)
            refs[m++] = make_ref(step, b, where[find_need(blocks, n, (int32_t)b)], 0);
        for (int64_t j = 0; j < k; j++) {
            int32_t b = chosen[i * k + j];
            if (b >= 0)
                refs[m++] = make_ref(step, b, where[find_need(blocks, n, b)], 1);
        }
        for (int64_t b = window_first; b <= query_block; b++)
            refs[m++] = make_ref(step, b, where[find_need(blocks, n, (int32_t)b)], 0);
        lists[i] = (struct lr_kv_list){.refs = refs, .n_refs = m};
    }
    return lists;
}

/* chosen[query block][KV head][top_k], on the host. */
static enum lr_status select_blocks(
    struct lr_step *step, int64_t layer, const struct lr_projection *p, const int32_t **chosen, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_session_options *o = &session->options;
    int64_t kv_heads = session->kv_shape.n_kv_heads;
    int64_t n_lists = lr_ceil_div(step->n_rows, LR_BLOCK) * kv_heads;
    int32_t *selected = LR_STEP_TENSOR(session, int32_t, n_lists * o->top_k_blocks);
    int64_t all_blocks = lr_ceil_div(o->max_tokens, LR_BLOCK);
    int64_t start = lr_wave_start(step->wave, engine->comm->rank);
    struct lr_block_select_args args = {.shape = session->kv_shape,
                                        .q = p->rows,
                                        .q_stride = p->stride,
                                        .q_head_stride = 2 * session->kv_shape.head_dim,
                                        .n_rows = step->n_rows,
                                        .position = start,
                                        .window = o->window,
                                        .sinks = o->sinks,
                                        .block_means = session->block_means +
                                                       layer * all_blocks * kv_heads * session->kv_shape.head_dim,
                                        .n_blocks = lr_ceil_div(start + step->n_rows, LR_BLOCK),
                                        .top_k = o->top_k_blocks,
                                        .chosen = selected};
    if (step->n_rows > 0)
        engine->ops->block_select(&engine->exec, &args);
    const void *view;
    LR_TRY(lr_step_view(session, selected, (size_t)(n_lists * o->top_k_blocks) * sizeof *selected, &view, err));
    *chosen = view;
    return LR_OK;
}

/* Chosen blocks are whole and lie before every query of their query block. */
static void count_chosen_pairs(struct lr_step *step, const int32_t *chosen, int64_t n_chosen)
{
    struct lr_session *session = step->session;
    int64_t per_block = session->options.top_k_blocks * session->kv_shape.n_kv_heads;
    for (int64_t i = 0; i < n_chosen; i++)
        if (chosen[i] >= 0)
            session->pairs_seen += LR_BLOCK * lr_min_i64(LR_BLOCK, step->n_rows - i / per_block * LR_BLOCK);
}

static enum lr_status attend_sparse(struct lr_step *step,
                                    int64_t layer,
                                    const struct lr_projection *p,
                                    struct lr_attention_args *args,
                                    struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    int64_t k = session->options.top_k_blocks;
    int64_t n_chosen = lr_ceil_div(step->n_rows, LR_BLOCK) * session->kv_shape.n_kv_heads * k;
    const int32_t *chosen = NULL;
    if (k > 0)
        LR_TRY(select_blocks(step, layer, p, &chosen, err));
    struct needs needs;
    LR_TRY(list_needs(step, chosen, n_chosen, &needs, err));
    int64_t first = needs.first[engine->comm->rank];
    int64_t n = needs.first[engine->comm->rank + 1] - first;
    const int32_t *blocks = needs.blocks + first;
    const char **where = LR_STEP_TABLE(session, const char *, n);
    LR_TRY(fetch_needs(step, layer, &needs, where, err));
    if (step->n_rows == 0)
        return LR_OK;
    args->window = session->options.window;
    args->sinks = session->options.sinks;
    struct lr_kv_list list = {0};
    if (k > 0) {
        args->lists = chosen_lists(step, chosen, blocks, n, where);
        args->n_lists = lr_ceil_div(step->n_rows, LR_BLOCK) * session->kv_shape.n_kv_heads;
        count_chosen_pairs(step, chosen, n_chosen);
    } else {
        struct lr_kv_ref *refs = LR_STEP_TABLE(session, struct lr_kv_ref, n);
        for (int64_t i = 0; i < n; i++)
            refs[i] = make_ref(step, blocks[i], where[i], 0);
        list = (struct lr_kv_list){.refs = refs, .n_refs = n};
        args->lists = &list;
    }
    engine->ops->attention(&engine->exec, args);
    return LR_OK;
}

/* Adds this segment's visible pairs, per KV head, without chosen blocks (they are counted where
 * they are known). */
static void count_pairs(struct lr_step *step)
{
    struct lr_session *session = step->session;
    const struct lr_session_options *o = &session->options;
    for (int64_t r = 0; r < step->n_rows; r++) {
        int64_t causal = step->positions[r] + 1;
        int64_t seen = causal;
        if (o->attention == LR_ATTENTION_SPARSE)
            seen = lr_min_i64(causal, o->window + lr_min_i64(o->sinks, lr_max_i64(0, causal - o->window)));
        session->pairs_seen += seen * session->kv_shape.n_kv_heads;
        session->pairs_causal += causal * session->kv_shape.n_kv_heads;
    }
}

enum lr_status lr_attend_document(
    struct lr_step *step, int64_t layer, const struct lr_projection *p, lr_act *y, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_softmax softmax = lr_softmax_take(session, step->n_rows);
    struct lr_attention_args args = lr_attention_call(step, p, &softmax);
    args.y = y;
    args.y_stride = session->kv_shape.n_heads * session->kv_shape.head_dim;
    LR_TRY(store_kv(step, layer, p, err));
    count_pairs(step);
    if (session->options.attention == LR_ATTENTION_SPARSE)
        return attend_sparse(step, layer, p, &args, err);
    return lr_attend_full(step, layer, &args, err);
}

/* Blocks that one worker may receive and may send in a wave. */
static size_t most_travelling(const struct lr_model_dims *dims, int n_workers, const struct lr_session_options *options)
{
    if (n_workers == 1)
        return 0;
    int64_t needs = most_needs(options, dims), own = options->segment_tokens / LR_BLOCK;
    int64_t away = options->top_k_blocks > 0 ? needs : lr_max_i64(0, needs - own);
    /* What I send to each of the others is bounded by its needs and by what I hold. */
    int64_t held = lr_ceil_div(lr_ceil_div(options->max_tokens, LR_BLOCK), n_workers) + own;
    return (size_t)(away + (n_workers - 1) * lr_min_i64(away, held));
}

/* Storing keys and values: pointers to blocks, and summaries. */
static struct lr_step_bytes store_bytes(const struct lr_model_dims *dims, int n_workers, int64_t own)
{
    struct lr_step_bytes bytes = {
        .tensors = lr_tensor_bytes((own + 1) * dims->n_kv_heads * dims->head_dim, sizeof(float)),
        .tables = lr_tensor_bytes(own, sizeof(void *)) + lr_tensor_bytes(own, sizeof(struct lr_kv_ref)) +
                  lr_tensor_bytes(n_workers, sizeof(size_t))};
    return bytes;
}

static struct lr_step_bytes sparse_bytes(
    const struct lr_model_dims *dims, size_t block_bytes, int n_workers, const struct lr_session_options *options)
{
    int64_t own = options->segment_tokens / LR_BLOCK, needs = most_needs(options, dims);
    int64_t lists = options->top_k_blocks > 0 ? own * dims->n_kv_heads : 1;
    int64_t chosen = lists * options->top_k_blocks;
    struct lr_step_bytes bytes = {0};
    bytes.tensors = lr_tensor_bytes((int64_t)most_travelling(dims, n_workers, options), block_bytes) +
                    LR_ARENA_ALIGN_BYTES + lr_tensor_bytes(chosen, sizeof(int32_t));
    bytes.tables = lr_tensor_bytes(n_workers + 1, sizeof(int64_t)) +
                   lr_tensor_bytes((n_workers + 1) * needs, sizeof(int32_t)) +
                   2 * lr_tensor_bytes(needs, sizeof(struct lr_kv_ref)) + 6 * lr_tensor_bytes(n_workers, sizeof(size_t)) +
                   lr_tensor_bytes(lr_ceil_div(options->max_tokens, LR_BLOCK) + 2, 1) +
                   lr_tensor_bytes(lists * most_refs(options), sizeof(struct lr_kv_ref)) +
                   lr_tensor_bytes(lists, sizeof(struct lr_kv_list)) + lr_tensor_bytes(chosen, sizeof(int32_t));
    return bytes;
}

struct lr_step_bytes lr_attend_document_bytes(const struct lr_model_dims *dims,
                                              const struct lr_kernel_ops *ops,
                                              int n_workers,
                                              const struct lr_session_options *options)
{
    struct lr_kv_shape shape = {.n_heads = dims->n_heads,
                                .n_kv_heads = dims->n_kv_heads,
                                .head_dim = dims->head_dim,
                                .dtype = options->kv_dtype};
    size_t block = ops->kv_block_bytes(shape);
    int64_t own = options->segment_tokens / LR_BLOCK;
    struct lr_step_bytes bytes = store_bytes(dims, n_workers, own);
    bytes.tensors += lr_softmax_bytes(dims, options->segment_tokens);
    if (options->attention == LR_ATTENTION_SPARSE) {
        struct lr_step_bytes sparse = sparse_bytes(dims, block, n_workers, options);
        bytes.tensors += sparse.tensors;
        bytes.tables += sparse.tables;
    } else {
        struct lr_step_bytes full = lr_attend_full_bytes(dims, ops, n_workers, options);
        bytes.tensors += full.tensors;
        bytes.tables += full.tables;
    }
    return bytes;
}
