/* Gated softmax attention mixer, sequence-parallel.
 *
 *   h -> in (q | gate per head, k, v) -> norm and rotary on q, k -> k, v into KV blocks -> attention -> * sigmoid(gate)
 *     -> out -> += x
 *
 * Document, full: KV rows (one segment per worker) are gathered one row ahead of the row being computed, and the owner
 * of the queries folds all keys in ascending order (Liu et al. 2023, Ring Attention; here the order is fixed).
 * Document, sparse: a segment needs the sinks, the window before it and the chosen blocks; only those travel.
 * Forks: queries are everywhere, every KV segment gives one fresh partial (m, l, o), and the partials are merged by
 * integer sums that have no order (see lr_merge_args). The document's last, unfinished block is copied into every
 * fork's tail when the document is sealed, so the document's partials cover whole blocks only. */
#include "worker/session_impl.h"

#include <math.h>
#include <string.h>

enum { BLOCK = LR_KV_BLOCK_TOKENS, PARTIAL_BUDGET_BYTES = 128 << 20 };

/* The projected rows and the offsets of their parts. */
struct projection {
    float *rows; /* [n, stride] */
    int64_t stride, k, v;
};

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t in_columns(const struct lr_model_dims *dims)
{
    return 2 * (dims->n_heads + dims->n_kv_heads) * dims->head_dim;
}

static int64_t blocks_per_segment(const struct lr_session *session)
{
    return session->options.segment_tokens / BLOCK;
}

/* ---- projections -------------------------------------------------------------------------------------------------- */

static struct projection project(const struct lr_step *step, const struct lr_layer *layer)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_attention_weights *w = &layer->attention;
    struct projection p = {.stride = in_columns(dims)};
    p.k = 2 * dims->n_heads * dims->head_dim;
    p.v = p.k + dims->n_kv_heads * dims->head_dim;
    p.rows = LR_STEP_ARRAY(session, float, step->n_rows *p.stride);
    struct lr_gemm_args in = {.a = step->h,
                              .a_stride = dims->d,
                              .w = &w->in,
                              .bias = w->in_bias,
                              .y = p.rows,
                              .y_stride = p.stride,
                              .n_rows = step->n_rows};
    engine->ops->gemm(&engine->exec, &in);
    struct lr_norm_rope_args rope = {.x = p.rows,
                                     .x_stride = p.stride,
                                     .n_rows = step->n_rows,
                                     .n_heads = dims->n_heads,
                                     .head_stride = 2 * dims->head_dim,
                                     .head_dim = dims->head_dim,
                                     .rotary_dim = dims->rotary_dim,
                                     .w = w->q_norm,
                                     .cos = step->cos,
                                     .sin = step->sin,
                                     .eps = dims->norm_eps};
    engine->ops->norm_rope(&engine->exec, &rope);
    rope.x = p.rows + p.k;
    rope.n_heads = dims->n_kv_heads;
    rope.head_stride = dims->head_dim;
    rope.w = w->k_norm;
    engine->ops->norm_rope(&engine->exec, &rope);
    return p;
}

/* attended [n, n_heads * head_dim] * sigmoid(gate) -> out projection, added to the residual stream. */
static void finish(const struct lr_step *step, const struct lr_layer *layer,
                   const struct projection *p, float *attended)
{
    const struct lr_engine *engine = step->session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    int64_t width = dims->n_heads * dims->head_dim;
    struct lr_sigmoid_gate_args gate = {.x = attended,
                                        .x_stride = width,
                                        .gate = p->rows + dims->head_dim,
                                        .gate_stride = p->stride,
                                        .gate_head_stride = 2 * dims->head_dim,
                                        .y = attended,
                                        .y_stride = width,
                                        .n_rows = step->n_rows,
                                        .n_heads = dims->n_heads,
                                        .head_dim = dims->head_dim};
    engine->ops->sigmoid_gate(&engine->exec, &gate);
    struct lr_gemm_args out = {.a = attended,
                               .a_stride = width,
                               .w = &layer->attention.out,
                               .bias = layer->attention.out_bias,
                               .y = step->x,
                               .y_stride = dims->d,
                               .n_rows = step->n_rows,
                               .accumulate = 1};
    engine->ops->gemm(&engine->exec, &out);
}

static void start_softmax(const struct lr_model_dims *dims, int64_t n_rows, float *m, float *l, float *o)
{
    int64_t n = n_rows * dims->n_heads;
    for (int64_t i = 0; i < n; i++)
        m[i] = -INFINITY;
    memset(l, 0, (size_t)n * sizeof *l);
    memset(o, 0, (size_t)(n * dims->head_dim) * sizeof *o);
}

static struct lr_attention_args attention_args(const struct lr_step *step, const struct projection *p)
{
    const struct lr_session *session = step->session;
    const struct lr_model_dims *dims = &session->engine->model.dims;
    return (struct lr_attention_args){.shape = session->kv_shape,
                                      .q = p->rows,
                                      .q_stride = p->stride,
                                      .q_head_stride = 2 * dims->head_dim,
                                      .n_rows = step->n_rows,
                                      .positions = step->positions,
                                      .scale = 1.0f / sqrtf((float)dims->head_dim),
                                      .n_lists = 1};
}

/* ---- document: storing KV ----------------------------------------------------------------------------------------- */

static void summarize_blocks(struct lr_session *session, int64_t layer, int64_t first_block,
                             int64_t end_token, float *means)
{
    const struct lr_engine *engine = session->engine;
    int64_t size = session->kv_shape.n_kv_heads * session->kv_shape.head_dim;
    int64_t n_blocks = ceil_div(end_token, BLOCK) - first_block;
    int64_t per_segment = blocks_per_segment(session);
    int64_t local = first_block / per_segment / engine->comm->size * per_segment;
    for (int64_t i = 0; i < n_blocks; i++) {
        int64_t block = first_block + i;
        struct lr_kv_ref ref = {.data = lr_session_block(session, layer, block),
                                .position = block * BLOCK,
                                .n_keys = (int32_t)lr_min_i64(end_token - block * BLOCK, BLOCK)};
        int64_t page = (layer * session->local_blocks + local + i) * size;
        struct lr_block_summary_args args = {
            .shape = session->kv_shape,
            .blocks = &ref,
            .n_blocks = 1,
            .mean = means ? means + i * size : NULL,
            .min = session->page_min ? session->page_min + page : NULL,
            .max = session->page_max ? session->page_max + page : NULL};
        engine->ops->block_summary(&engine->exec, &args);
    }
}

/* Means of the wave's blocks, from everyone to everyone, into session->block_means. */
static enum lr_status share_means(struct lr_step *step, int64_t layer, const float *mine,
                                  struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_comm *comm = session->engine->comm;
    int64_t size = session->kv_shape.n_kv_heads * session->kv_shape.head_dim;
    int64_t n_blocks = ceil_div(session->options.max_tokens, BLOCK);
    size_t *sizes = LR_STEP_ARRAY(session, size_t, comm->size);
    for (int r = 0; r < comm->size; r++)
        sizes[r] = (size_t)(ceil_div(lr_wave_length(step->wave, r), BLOCK) * size) * sizeof(float);
    float *all = session->block_means + (layer * n_blocks + step->wave->first / BLOCK) * size;
    return lr_comm_all_gather_v(comm, "block means", mine, sizes, all, err);
}

static enum lr_status store_kv(struct lr_step *step, int64_t layer, const struct projection *p,
                               struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    int64_t start = lr_wave_start(step->wave, engine->comm->rank), n = step->n_rows;
    int64_t n_blocks = ceil_div(n, BLOCK);
    void **blocks = LR_STEP_ARRAY(session, void *, n_blocks);
    for (int64_t i = 0; i < n_blocks; i++)
        blocks[i] = lr_session_block(session, layer, start / BLOCK + i);
    struct lr_kv_store_args args = {.shape = session->kv_shape,
                                    .k = p->rows + p->k,
                                    .k_stride = p->stride,
                                    .v = p->rows + p->v,
                                    .v_stride = p->stride,
                                    .n_rows = n,
                                    .position = start,
                                    .blocks = blocks};
    if (n > 0)
        engine->ops->kv_store(&engine->exec, &args);
    if (!session->block_means && !session->page_min)
        return LR_OK;
    int64_t size = session->kv_shape.n_kv_heads * session->kv_shape.head_dim;
    float *means =
        session->block_means ? LR_STEP_ARRAY(session, float, (n_blocks + 1) * size) : NULL;
    if (n > 0)
        summarize_blocks(session, layer, start / BLOCK, start + n, means);
    return means ? share_means(step, layer, means, err) : LR_OK;
}

/* ---- document: full attention ------------------------------------------------------------------------------------- */

/* KV row `row`: one segment per worker. Bytes that worker r has of it. */
static void row_sizes(const struct lr_step *step, int64_t row, size_t *sizes)
{
    const struct lr_session *session = step->session;
    for (int r = 0; r < session->engine->comm->size; r++) {
        int64_t tokens = row < step->wave->index ? step->wave->segment : lr_wave_length(step->wave, r);
        sizes[r] = (size_t)ceil_div(tokens, BLOCK) * session->block_bytes;
    }
}

static enum lr_status start_row(const struct lr_step *step, int64_t layer, int64_t row, char *buffer,
                                size_t *sizes, struct lr_comm_request *request, struct lr_error *err)
{
    const struct lr_session *session = step->session;
    struct lr_comm *comm = session->engine->comm;
    int64_t block = (row * comm->size + comm->rank) * blocks_per_segment(session);
    row_sizes(step, row, sizes);
    const char *mine = sizes[comm->rank] ? lr_session_block(session, layer, block) : NULL;
    return lr_comm_all_gather_v_start(comm, "kv row", mine, sizes, buffer, request, err);
}

/* The blocks of one gathered row that my queries may see. */
static int64_t row_refs(const struct lr_step *step, int64_t row, const char *buffer,
                        struct lr_kv_ref *refs)
{
    const struct lr_session *session = step->session;
    int64_t first = row * session->engine->comm->size * step->wave->segment;
    int64_t end = row < step->wave->index ? first + session->engine->comm->size * step->wave->segment
                                          : step->wave->end;
    int64_t mine_end = lr_wave_start(step->wave, session->engine->comm->rank) + step->n_rows;
    int64_t n = 0;
    for (int64_t position = first; position < lr_min_i64(end, mine_end); position += BLOCK, n++)
        refs[n] = (struct lr_kv_ref){.data = buffer + (size_t)n * session->block_bytes,
                                     .position = position,
                                     .n_keys = (int32_t)lr_min_i64(end - position, BLOCK)};
    return n;
}

static enum lr_status attend_full_ring(struct lr_step *step, int64_t layer,
                                       struct lr_attention_args *args, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    int64_t row_blocks = engine->comm->size * blocks_per_segment(session);
    char *buffers[2];
    size_t *sizes[2];
    struct lr_comm_request requests[2] = {0};
    for (int i = 0; i < 2; i++) {
        buffers[i] = LR_STEP_ARRAY(session, char, (size_t)row_blocks *session->block_bytes);
        sizes[i] = LR_STEP_ARRAY(session, size_t, engine->comm->size);
    }
    struct lr_kv_ref *refs = LR_STEP_ARRAY(session, struct lr_kv_ref, row_blocks);
    LR_TRY(start_row(step, layer, 0, buffers[0], sizes[0], &requests[0], err));
    for (int64_t row = 0; row <= step->wave->index; row++) {
        int now = (int)(row & 1), next = 1 - now;
        LR_TRY(lr_comm_wait(engine->comm, &requests[now], err));
        if (row < step->wave->index)
            LR_TRY(start_row(step, layer, row + 1, buffers[next], sizes[next], &requests[next],
                             err));
        struct lr_kv_list list = {.refs = refs,
                                  .n_refs = row_refs(step, row, buffers[now], refs)};
        args->lists = &list;
        if (step->n_rows > 0 && list.n_refs > 0)
            engine->ops->attention(&engine->exec, args);
    }
    return LR_OK;
}

/* One worker: every block is at home, so the whole list is folded in one call. */
static void attend_full_alone(struct lr_step *step, int64_t layer, struct lr_attention_args *args)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    int64_t end = step->wave->end;
    struct lr_kv_list list = {.n_refs = ceil_div(end, BLOCK)};
    struct lr_kv_ref *refs = LR_STEP_ARRAY(session, struct lr_kv_ref, list.n_refs);
    for (int64_t i = 0; i < list.n_refs; i++)
        refs[i] = (struct lr_kv_ref){.data = lr_session_block(session, layer, i),
                                     .position = i * BLOCK,
                                     .n_keys = (int32_t)lr_min_i64(end - i * BLOCK, BLOCK)};
    list.refs = refs;
    args->lists = &list;
    engine->ops->attention(&engine->exec, args);
}

/* ---- document: sparse attention ----------------------------------------------------------------------------------- */

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
    reach.end = ceil_div(start + n, BLOCK);
    reach.window_first = lr_max_i64(0, start - o->window + 1) / BLOCK;
    reach.sink_end = lr_min_i64(ceil_div(o->sinks, BLOCK), reach.window_first);
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
    int64_t own = o->segment_tokens / BLOCK;
    int64_t fixed = own + ceil_div(o->window, BLOCK) + ceil_div(o->sinks, BLOCK) + 2;
    return lr_min_i64(fixed + own * dims->n_kv_heads * o->top_k_blocks,
                      ceil_div(o->max_tokens, BLOCK) + 1);
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
static int64_t merge_chosen(const struct lr_session *session, const int32_t *chosen,
                            int64_t n_chosen, int32_t *blocks, int64_t n, int64_t end_block)
{
    unsigned char *wanted =
        LR_STEP_ARRAY(((struct lr_session *)(size_t)session), unsigned char, end_block);
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

static enum lr_status list_needs(struct lr_step *step, const int32_t *chosen, int64_t n_chosen,
                                 struct needs *needs, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_comm *comm = session->engine->comm;
    int64_t most = most_needs(&session->options, &session->engine->model.dims);
    needs->first = LR_STEP_ARRAY(session, int64_t, comm->size + 1);
    needs->blocks = LR_STEP_ARRAY(session, int32_t, comm->size *most);
    needs->first[0] = 0;
    if (session->options.top_k_blocks == 0) {
        for (int r = 0; r < comm->size; r++)
            needs->first[r + 1] =
                needs->first[r] + list_fixed_needs(step, r, needs->blocks + needs->first[r]);
        return LR_OK;
    }
    int32_t *mine = LR_STEP_ARRAY(session, int32_t, most);
    int64_t n = list_fixed_needs(step, comm->rank, mine);
    n = merge_chosen(session, chosen, n_chosen, mine, n, reach_of(step, comm->rank).end + 1);
    int64_t *counts = LR_STEP_ARRAY(session, int64_t, comm->size);
    LR_TRY(lr_comm_all_gather(comm, "number of needed blocks", &n, sizeof n, counts, err));
    size_t *sizes = LR_STEP_ARRAY(session, size_t, comm->size);
    for (int r = 0; r < comm->size; r++) {
        sizes[r] = (size_t)counts[r] * sizeof(int32_t);
        needs->first[r + 1] = needs->first[r] + counts[r];
    }
    return lr_comm_all_gather_v(comm, "needed blocks", mine, sizes, needs->blocks, err);
}

/* Where each block that I need lies: at home or in `fetched`. */
static enum lr_status fetch_needs(struct lr_step *step, int64_t layer, const struct needs *needs,
                                  const char **where, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_comm *comm = session->engine->comm;
    size_t *send = LR_STEP_ARRAY(session, size_t, comm->size);
    size_t *receive = LR_STEP_ARRAY(session, size_t, comm->size);
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
    char *outgoing = LR_STEP_ARRAY(session, char, (size_t)n_send *session->block_bytes);
    char *fetched = LR_STEP_ARRAY(session, char, (size_t)n_receive *session->block_bytes);
    if (!outgoing || !fetched)
        return lr_fail(err, LR_INTERNAL, "workspace for %lld + %lld travelling blocks was not planned",
                       (long long)n_send, (long long)n_receive);
    char *next = outgoing;
    for (int r = 0; r < comm->size; r++)
        for (int64_t i = needs->first[r]; r != comm->rank && i < needs->first[r + 1]; i++)
            if (lr_session_block_owner(session, needs->blocks[i]) == comm->rank) {
                memcpy(next, lr_session_block(session, layer, needs->blocks[i]),
                       session->block_bytes);
                next += session->block_bytes;
            }
    LR_TRY(lr_comm_all_to_all_v(comm, "kv blocks", outgoing, send, fetched, receive, err));
    size_t *offsets = LR_STEP_ARRAY(session, size_t, comm->size);
    size_t offset = 0;
    for (int r = 0; r < comm->size; r++) {
        offsets[r] = offset;
        offset += receive[r];
    }
    for (int64_t i = needs->first[comm->rank]; i < needs->first[comm->rank + 1]; i++) {
        int owner = lr_session_block_owner(session, needs->blocks[i]);
        int64_t slot = i - needs->first[comm->rank];
        where[slot] = owner == comm->rank
                          ? lr_session_block(session, layer, needs->blocks[i])
                          : fetched + offsets[owner];
        if (owner != comm->rank)
            offsets[owner] += session->block_bytes;
    }
    return LR_OK;
}

static struct lr_kv_ref make_ref(const struct lr_step *step, int64_t block, const char *data,
                                 int whole)
{
    int64_t end = step->wave->end;
    return (struct lr_kv_ref){.data = data,
                              .position = block * BLOCK,
                              .n_keys = (int32_t)lr_min_i64(end - block * BLOCK, BLOCK),
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

/* One list for each query block and KV head: sinks, chosen blocks, window. */
static struct lr_kv_list *chosen_lists(const struct lr_step *step, const int32_t *chosen,
                                       const int32_t *blocks, int64_t n, const char *const *where)
{
    struct lr_session *session = step->session;
    const struct lr_session_options *o = &session->options;
    int64_t kv_heads = session->kv_shape.n_kv_heads, k = o->top_k_blocks;
    int64_t start = lr_wave_start(step->wave, session->engine->comm->rank);
    int64_t n_query_blocks = ceil_div(step->n_rows, BLOCK);
    int64_t most = k + ceil_div(o->sinks, BLOCK) + ceil_div(o->window, BLOCK) + 3;
    struct lr_kv_list *lists =
        LR_STEP_ARRAY(session, struct lr_kv_list, n_query_blocks *kv_heads);
    for (int64_t i = 0; i < n_query_blocks * kv_heads; i++) {
        int64_t query_block = start / BLOCK + i / kv_heads;
        int64_t window_first = lr_max_i64(0, query_block * BLOCK - o->window + 1) / BLOCK;
        int64_t sink_end = lr_min_i64(ceil_div(o->sinks, BLOCK), window_first);
        struct lr_kv_ref *refs = LR_STEP_ARRAY(session, struct lr_kv_ref, most);
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

static int32_t *select_blocks(struct lr_step *step, int64_t layer, const struct projection *p)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_session_options *o = &session->options;
    int64_t kv_heads = session->kv_shape.n_kv_heads;
    int64_t n_lists = ceil_div(step->n_rows, BLOCK) * kv_heads;
    int32_t *chosen = LR_STEP_ARRAY(session, int32_t, n_lists *o->top_k_blocks);
    int64_t all_blocks = ceil_div(o->max_tokens, BLOCK);
    int64_t start = lr_wave_start(step->wave, engine->comm->rank);
    struct lr_block_select_args args = {
        .shape = session->kv_shape,
        .q = p->rows,
        .q_stride = p->stride,
        .q_head_stride = 2 * session->kv_shape.head_dim,
        .n_rows = step->n_rows,
        .position = start,
        .window = o->window,
        .sinks = o->sinks,
        .block_means =
            session->block_means + layer * all_blocks * kv_heads * session->kv_shape.head_dim,
        .n_blocks = ceil_div(start + step->n_rows, BLOCK),
        .top_k = o->top_k_blocks,
        .chosen = chosen};
    if (step->n_rows > 0)
        engine->ops->block_select(&engine->exec, &args);
    return chosen;
}

static enum lr_status attend_sparse(struct lr_step *step, int64_t layer,
                                    const struct projection *p, struct lr_attention_args *args,
                                    struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    int64_t k = session->options.top_k_blocks;
    int64_t n_chosen = ceil_div(step->n_rows, BLOCK) * session->kv_shape.n_kv_heads * k;
    int32_t *chosen = k > 0 ? select_blocks(step, layer, p) : NULL;
    struct needs needs;
    LR_TRY(list_needs(step, chosen, n_chosen, &needs, err));
    int64_t first = needs.first[engine->comm->rank];
    int64_t n = needs.first[engine->comm->rank + 1] - first;
    const int32_t *blocks = needs.blocks + first;
    const char **where = LR_STEP_ARRAY(session, const char *, n);
    LR_TRY(fetch_needs(step, layer, &needs, where, err));
    if (step->n_rows == 0)
        return LR_OK;
    args->window = session->options.window;
    args->sinks = session->options.sinks;
    struct lr_kv_list list = {0};
    if (k > 0) {
        args->lists = chosen_lists(step, chosen, blocks, n, where);
        args->n_lists = ceil_div(step->n_rows, BLOCK) * session->kv_shape.n_kv_heads;
        for (int64_t i = 0; i < n_chosen; i++)
            if (chosen[i] >= 0)
                session->pairs_seen += BLOCK * lr_min_i64(BLOCK, step->n_rows - i / k / session->kv_shape.n_kv_heads * BLOCK);
    } else {
        struct lr_kv_ref *refs = LR_STEP_ARRAY(session, struct lr_kv_ref, n);
        for (int64_t i = 0; i < n; i++)
            refs[i] = make_ref(step, blocks[i], where[i], 0);
        list = (struct lr_kv_list){.refs = refs, .n_refs = n};
        args->lists = &list;
    }
    engine->ops->attention(&engine->exec, args);
    return LR_OK;
}

/* Adds this segment's visible pairs, per KV head, without chosen blocks (they are counted where they are known). */
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

static enum lr_status prefill(struct lr_step *step, const struct lr_layer *layer,
                              struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    int64_t n = step->n_rows, width = dims->n_heads * dims->head_dim;
    struct projection p = project(step, layer);
    LR_TRY(store_kv(step, layer->mixer_index, &p, err));
    float *m = LR_STEP_ARRAY(session, float, n *dims->n_heads);
    float *l = LR_STEP_ARRAY(session, float, n *dims->n_heads);
    float *o = LR_STEP_ARRAY(session, float, n *width);
    start_softmax(dims, n, m, l, o);
    struct lr_attention_args args = attention_args(step, &p);
    args.m = m, args.l = l, args.o = o;
    if (session->options.attention == LR_ATTENTION_SPARSE)
        LR_TRY(attend_sparse(step, layer->mixer_index, &p, &args, err));
    else if (engine->comm->size > 1)
        LR_TRY(attend_full_ring(step, layer->mixer_index, &args, err));
    else
        attend_full_alone(step, layer->mixer_index, &args);
    count_pairs(step);
    if (n == 0)
        return LR_OK;
    struct lr_attention_finish_args done = {.l = l,
                                            .o = o,
                                            .y = o,
                                            .y_stride = width,
                                            .n_rows = n,
                                            .n_heads = dims->n_heads,
                                            .head_dim = dims->head_dim};
    engine->ops->attention_finish(&engine->exec, &done);
    finish(step, layer, &p, o);
    return LR_OK;
}

static size_t prefill_bytes(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops,
                            int n_workers, const struct lr_session_options *options)
{
    struct lr_kv_shape shape = {.n_heads = dims->n_heads,
                                .n_kv_heads = dims->n_kv_heads,
                                .head_dim = dims->head_dim,
                                .dtype = options->kv_dtype};
    size_t rows = (size_t)options->segment_tokens, workers = (size_t)n_workers;
    size_t own = rows / BLOCK, block = ops->kv_block_bytes(shape);
    size_t all = (size_t)ceil_div(options->max_tokens, BLOCK);
    size_t bytes = rows *
                   (size_t)(in_columns(dims) + dims->n_heads * (dims->head_dim + 2)) * sizeof(float);
    bytes += own * (sizeof(void *) + (size_t)(dims->n_kv_heads * dims->head_dim) * sizeof(float));
    if (options->attention == LR_ATTENTION_SPARSE) {
        size_t needs = (size_t)most_needs(options, dims);
        size_t lists = options->top_k_blocks ? own * (size_t)dims->n_kv_heads : 1;
        size_t list = (size_t)(options->top_k_blocks + ceil_div(options->sinks, BLOCK) +
                               ceil_div(options->window, BLOCK) + 3);
        /* my own blocks stay at home; what I send is at most what the others need of me */
        size_t travelling = n_workers > 1 ? (needs - own) + (workers - 1) * lr_min_i64((int64_t)(needs - (options->top_k_blocks ? 0 : own)), (int64_t)needs) : 0;
        bytes += travelling * block + workers * needs * sizeof(int32_t) + 2 * all +
                 needs * (sizeof(void *) + sizeof(struct lr_kv_ref) + sizeof(int32_t)) +
                 lists * (list * sizeof(struct lr_kv_ref) + 128 +
                          (size_t)options->top_k_blocks * sizeof(int32_t));
    } else {
        bytes += n_workers > 1 ? 2 * workers * own * block + workers * own * sizeof(struct lr_kv_ref)
                               : all * sizeof(struct lr_kv_ref);
    }
    return bytes + workers * 128 + 16384;
}

/* ---- forks -------------------------------------------------------------------------------------------------------- */

int64_t lr_fork_partials(const struct lr_session_options *options, int n_workers)
{
    int64_t segments = ceil_div(options->max_tokens, options->segment_tokens);
    return options->decode_pages > 0 ? options->decode_pages + 1 : ceil_div(segments, n_workers) + 1;
}

int64_t lr_fork_step_rows(const struct lr_model_dims *dims,
                          const struct lr_session_options *options, int n_workers)
{
    int64_t row_bytes = lr_fork_partials(options, n_workers) * dims->n_heads *
                        (dims->head_dim + 2) * (int64_t)sizeof(float);
    int64_t rows = lr_min_i64(256, PARTIAL_BUDGET_BYTES / lr_max_i64(row_bytes, 1));
    return lr_max_i64(rows, options->max_forks);
}

struct partials {
    int64_t n, n_total;
    float *m, *l, *o; /* [n, n_rows, n_heads (, head_dim)] */
};

static struct lr_attention_args partial_args(const struct lr_step *step, const struct projection *p,
                                             const struct partials *partials, int64_t index,
                                             int64_t row)
{
    const struct lr_model_dims *dims = &step->session->engine->model.dims;
    struct lr_attention_args args = attention_args(step, p);
    int64_t at = (index * step->n_rows + row) * dims->n_heads;
    args.m = partials->m + at;
    args.l = partials->l + at;
    args.o = partials->o + at * dims->head_dim;
    args.q = p->rows + row * p->stride;
    args.positions = step->positions + row;
    args.n_rows = step->n_rows - row;
    return args;
}

/* KV rows of the forks whose tails live here. */
static void store_fork_kv(const struct lr_step *step, int64_t layer, const struct projection *p)
{
    const struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_batch *batch = step->batch;
    int64_t first_block = session->n_tokens / BLOCK;
    for (int64_t j = 0; j < batch->n_slices; j++)
        for (int64_t f = 0; f < lr_batch_slice_rows(batch, j); f++) {
            const struct lr_fork *fork = batch->forks[f];
            if (!fork->kv)
                continue;
            int64_t row = batch->slice_first[j] + f, position = step->positions[row];
            void *block = fork->kv + (size_t)(layer * session->fork_blocks + position / BLOCK -
                                              first_block) *
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

/* The tail partial of every fork that lives here: its own tokens and the document's unfinished block. */
static void attend_tails(const struct lr_step *step, int64_t layer, const struct projection *p,
                         const struct partials *partials, int64_t index, struct lr_kv_ref *refs)
{
    const struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_batch *batch = step->batch;
    int64_t first_block = session->n_tokens / BLOCK;
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
        for (int64_t b = first_block; b * BLOCK < end; b++)
            refs[list.n_refs++] = (struct lr_kv_ref){
                .data = fork->kv + (size_t)(layer * session->fork_blocks + b - first_block) *
                                       session->block_bytes,
                .position = b * BLOCK,
                .n_keys = (int32_t)lr_min_i64(end - b * BLOCK, BLOCK)};
        struct lr_attention_args args = partial_args(step, p, partials, index, row);
        args.n_rows = n;
        args.lists = &list;
        engine->ops->attention(&engine->exec, &args);
    }
}

/* One partial for each of the document's segments that lives here; whole blocks only. */
static void attend_segments(const struct lr_step *step, int64_t layer, const struct projection *p,
                            const struct partials *partials, struct lr_kv_ref *refs)
{
    const struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    int64_t per_segment = blocks_per_segment(session), blocks = session->n_tokens / BLOCK;
    int64_t index = 0;
    for (int64_t first = engine->comm->rank * per_segment; first < blocks;
         first += engine->comm->size * per_segment) {
        struct lr_kv_list list = {.refs = refs};
        for (int64_t b = first; b < lr_min_i64(first + per_segment, blocks); b++)
            refs[list.n_refs++] =
                (struct lr_kv_ref){.data = lr_session_block(session, layer, b),
                                   .position = b * BLOCK,
                                   .n_keys = BLOCK};
        struct lr_attention_args args = partial_args(step, p, partials, index++, 0);
        args.lists = &list;
        engine->ops->attention(&engine->exec, &args);
    }
}

static enum lr_status merge_partials(struct lr_step *step, const struct partials *partials, float *y,
                                     struct lr_error *err)
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
                                 .m = partials->m,
                                 .l = partials->l,
                                 .o = partials->o,
                                 .bound = LR_STEP_ARRAY(session, float, rows * 2),
                                 .sums = LR_STEP_ARRAY(session, int64_t, rows *(dims->head_dim + 1)),
                                 .y = y,
                                 .y_stride = dims->n_heads * dims->head_dim};
    engine->ops->merge_bounds(&engine->exec, &args);
    LR_TRY(lr_comm_max_f32(engine->comm, "attention maxima", args.bound, (size_t)rows * 2, err));
    engine->ops->merge_accumulate(&engine->exec, &args);
    LR_TRY(lr_comm_sum_i64(engine->comm, "attention sums", args.sums,
                           (size_t)(rows * (dims->head_dim + 1)), err));
    engine->ops->merge_finish(&engine->exec, &args);
    return LR_OK;
}

enum lr_status lr_fork_attend_pages(struct lr_step *step, int64_t layer, const float *q,
                                    int64_t q_stride, float *m, float *l, float *o,
                                    struct lr_error *err);

static enum lr_status extend(struct lr_step *step, const struct lr_layer *layer,
                             struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_session_options *options = &session->options;
    int64_t index = layer->mixer_index;
    struct projection p = project(step, layer);
    store_fork_kv(step, index, &p);

    struct partials partials = {.n = lr_fork_partials(options, engine->comm->size)};
    int64_t document_segments = ceil_div(session->n_tokens, options->segment_tokens);
    partials.n_total = 1 + (options->decode_pages > 0 ? options->decode_pages : document_segments);
    int64_t rows = partials.n * step->n_rows;
    partials.m = LR_STEP_ARRAY(session, float, rows *dims->n_heads);
    partials.l = LR_STEP_ARRAY(session, float, rows *dims->n_heads);
    partials.o = LR_STEP_ARRAY(session, float, rows *dims->n_heads *dims->head_dim);
    start_softmax(dims, rows, partials.m, partials.l, partials.o);
    struct lr_kv_ref *refs =
        LR_STEP_ARRAY(session, struct lr_kv_ref,
                      lr_max_i64(blocks_per_segment(session), session->fork_blocks) + 1);
    if (options->decode_pages > 0)
        LR_TRY(lr_fork_attend_pages(step, index, p.rows, p.stride, partials.m, partials.l,
                                    partials.o, err));
    else
        attend_segments(step, index, &p, &partials, refs);
    attend_tails(step, index, &p, &partials, partials.n - 1, refs);
    float *y = LR_STEP_ARRAY(session, float, step->n_rows *dims->n_heads *dims->head_dim);
    LR_TRY(merge_partials(step, &partials, y, err));
    finish(step, layer, &p, y);
    return LR_OK;
}

static size_t extend_bytes(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops,
                           int n_workers, const struct lr_session_options *options, int64_t n_rows)
{
    (void)ops;
    size_t rows = (size_t)n_rows, heads = (size_t)dims->n_heads, width = (size_t)dims->head_dim;
    size_t partials = (size_t)lr_fork_partials(options, n_workers);
    size_t blocks = (size_t)((options->segment_tokens + options->max_fork_tokens) / BLOCK) + 4;
    size_t bytes = rows * (size_t)in_columns(dims) * sizeof(float);
    bytes += partials * rows * heads * (width + 2) * sizeof(float);
    bytes += rows * heads * (2 + width) * sizeof(float) + rows * heads * (width + 1) * sizeof(int64_t);
    if (options->decode_pages > 0) {
        size_t lists = rows * (size_t)dims->n_kv_heads;
        size_t pages = (size_t)ceil_div(options->max_tokens, BLOCK * n_workers) + 64;
        bytes += lists * (pages * sizeof(float) +
                          (size_t)(options->decode_pages * (n_workers + 2)) * 8) + 8192;
    }
    return bytes + blocks * sizeof(struct lr_kv_ref) + 16384;
}

const struct lr_layer_ops lr_attention_layer = {
    .name = "attention",
    .prefill_bytes = prefill_bytes,
    .extend_bytes = extend_bytes,
    .prefill = prefill,
    .extend = extend,
};
