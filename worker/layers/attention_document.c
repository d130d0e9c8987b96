/* Attention of a document's segment: storing KV, then full attention (attention_ring.c) or sparse attention over fetched
 * blocks. See attention.c for the whole picture. */
#include "worker/kv_tier.h"
#include "worker/layers/attention_impl.h"
#include "worker/plan.h"

#include <string.h>

/* ---- document: storing KV
 * ----------------------------------------------------------------------------------------- */

/* Summaries of the segment's blocks; `means` may be NULL. */
static void
summarize_blocks(const struct lr_step *step, int64_t layer, int64_t first_block, int64_t end_token, float *means)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const char *own = lr_kv_own(step, layer);
    int64_t size = session->kv_shape.n_kv_heads * session->kv_shape.head_dim;
    int64_t n_blocks = lr_ceil_div(end_token, LR_BLOCK) - first_block;
    int64_t per_segment = lr_blocks_per_segment(session);
    int64_t local = first_block / per_segment / engine->comm->size * per_segment;
    int64_t page = (layer * session->local_blocks + local) * size;
    struct lr_kv_ref *refs = LR_STEP_TABLE(session, struct lr_kv_ref, n_blocks);
    for (int64_t i = 0; i < n_blocks; i++)
        refs[i] = (struct lr_kv_ref){.data = own + (size_t)i * session->block_bytes,
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
        blocks[i] = lr_kv_own(step, layer) + (size_t)i * session->block_bytes;
    struct lr_kv_store_args args = {.shape = session->kv_shape,
                                    .k = lr_act_at(engine->ops, p->rows, p->k),
                                    .k_stride = p->stride,
                                    .v = lr_act_at(engine->ops, p->rows, p->v),
                                    .v_stride = p->stride,
                                    .n_rows = n,
                                    .position = start,
                                    .blocks = blocks};
    lr_kv_own_begin(step);
    if (n > 0)
        engine->ops->kv_store(&engine->exec, &args);
    lr_kv_own_save(step, layer);
    if (!session->block_means && !session->page_min)
        return LR_OK;
    int64_t size = session->kv_shape.n_kv_heads * session->kv_shape.head_dim;
    float *means = session->block_means ? LR_STEP_TENSOR(session, float, (n_blocks + 1) * size) : NULL;
    if (n > 0)
        summarize_blocks(step, layer, start / LR_BLOCK, start + n, means);
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

/* Blocks that each worker needs for its segment, ascending, its own among them: blocks[first[r] .. end[r]). */
struct needs {
    int64_t *first, *end; /* [n_workers] */
    int32_t *blocks;
};

static struct needs new_needs(struct lr_session *session, int32_t *blocks)
{
    int n_workers = session->engine->comm->size;
    return (struct needs){.first = LR_STEP_TABLE(session, int64_t, n_workers),
                          .end = LR_STEP_TABLE(session, int64_t, n_workers),
                          .blocks = blocks};
}

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
    int64_t most = most_needs(&session->options, &session->engine->model.dims), total = 0;
    *needs = new_needs(session, LR_STEP_TABLE(session, int32_t, comm->size * most));
    if (session->options.top_k_blocks == 0) {
        for (int r = 0; r < comm->size; r++) {
            needs->first[r] = total;
            total += list_fixed_needs(step, r, needs->blocks + total);
            needs->end[r] = total;
        }
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
        needs->first[r] = total;
        total += counts[r];
        needs->end[r] = total;
    }
    return lr_comm_all_gather_v(comm, "needed blocks", mine, sizes, needs->blocks, err);
}

/* Index of `block` in an ascending list [n], or of the first one behind it. */
static int64_t find_block(const int32_t *blocks, int64_t n, int64_t block)
{
    int64_t low = 0, high = n;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (blocks[middle] < block)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The needs from block `first` on that are fetched and folded together: all, or, with a tier in host memory, so many
 * that nobody's fill more than a slot, not counting the own segment's. The same on all workers, for they know all
 * needs. *end: the block that comes next. */
static struct needs cut_needs(const struct lr_step *step, const struct needs *all, int64_t first, int64_t *end)
{
    struct lr_session *session = step->session;
    int n_workers = session->engine->comm->size;
    struct needs cut = new_needs(session, all->blocks);
    *end = lr_ceil_div(step->wave->end, LR_BLOCK);
    for (int r = 0; r < n_workers; r++)
        cut.first[r] = all->first[r] + find_block(all->blocks + all->first[r], all->end[r] - all->first[r], first);
    for (int r = 0; r < n_workers && lr_kv_is_tiered(session); r++) {
        int64_t past = cut.first[r] + session->tier.slot_blocks;
        if (past < all->end[r] && all->blocks[past] < lr_wave_start(step->wave, r) / LR_BLOCK)
            *end = lr_min_i64(*end, all->blocks[past]);
    }
    for (int r = 0; r < n_workers; r++)
        cut.end[r] = all->first[r] + find_block(all->blocks + all->first[r], all->end[r] - all->first[r], *end);
    return cut;
}

/* Blocks that travel: bytes to and from every worker. */
struct travel {
    size_t *send, *receive; /* [n_workers] */
    int64_t n_send, n_receive;
};

static struct travel count_travel(const struct lr_step *step, const struct needs *needs)
{
    struct lr_session *session = step->session;
    const struct lr_comm *comm = session->engine->links;
    struct travel travel = {.send = LR_STEP_TABLE(session, size_t, comm->size),
                            .receive = LR_STEP_TABLE(session, size_t, comm->size)};
    memset(travel.send, 0, (size_t)comm->size * sizeof *travel.send);
    memset(travel.receive, 0, (size_t)comm->size * sizeof *travel.receive);
    for (int r = 0; r < comm->size; r++)
        for (int64_t i = needs->first[r]; i < needs->end[r]; i++) {
            int owner = lr_session_block_owner(session, needs->blocks[i]);
            if (owner == comm->rank && r != comm->rank)
                travel.send[r] += session->block_bytes, travel.n_send++;
            if (owner != comm->rank && r == comm->rank)
                travel.receive[owner] += session->block_bytes, travel.n_receive++;
        }
    return travel;
}

/* A block of mine: in the wave's own segment, or at home in either tier. */
static const char *my_block(const struct lr_step *step, int64_t layer, int64_t block)
{
    int64_t own = lr_wave_start(step->wave, step->session->engine->comm->rank) / LR_BLOCK;
    if (block >= own)
        return lr_kv_own(step, layer) + (size_t)(block - own) * step->session->block_bytes;
    return lr_session_block(step->session, layer, block);
}

/* Where the kernels find the blocks of mine among `blocks` [n]; those of the host's tier are brought to a slot. */
static void place_mine(const struct lr_step *step, int64_t layer, const int32_t *blocks, int64_t n, const char **where)
{
    struct lr_session *session = step->session;
    const struct lr_comm *comm = session->engine->links;
    int64_t own = lr_wave_start(step->wave, comm->rank) / LR_BLOCK, n_home = 0;
    int32_t *home = LR_STEP_TABLE(session, int32_t, n);
    const char **place = LR_STEP_TABLE(session, const char *, n);
    for (int64_t i = 0; i < n; i++)
        if (lr_session_block_owner(session, blocks[i]) == comm->rank && blocks[i] < own)
            home[n_home++] = blocks[i];
    lr_kv_gather(session, layer, home, n_home, place);
    n_home = 0;
    for (int64_t i = 0; i < n; i++)
        if (lr_session_block_owner(session, blocks[i]) == comm->rank)
            where[i] = blocks[i] < own ? place[n_home++] : my_block(step, layer, blocks[i]);
}

/* Blocks of mine that others need, one behind the other; those that lie side by side are copied together. */
static void pack_needs(const struct lr_step *step, int64_t layer, const struct needs *needs, char *outgoing)
{
    const struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const char *from = NULL;
    size_t n_bytes = 0;
    for (int r = 0; r < engine->links->size; r++)
        for (int64_t i = needs->first[r]; r != engine->links->rank && i < needs->end[r]; i++) {
            if (lr_session_block_owner(session, needs->blocks[i]) != engine->links->rank)
                continue;
            const char *block = my_block(step, layer, needs->blocks[i]);
            if (n_bytes > 0 && block != from + n_bytes) {
                engine->ops->memory.copy(&engine->exec, outgoing, from, n_bytes);
                outgoing += n_bytes;
                n_bytes = 0;
            }
            from = n_bytes > 0 ? from : block;
            n_bytes += session->block_bytes;
        }
    if (n_bytes > 0)
        engine->ops->memory.copy(&engine->exec, outgoing, from, n_bytes);
}

/* Where each block that I need is: on this device, or in `fetched`. */
static enum lr_status
fetch_needs(struct lr_step *step, int64_t layer, const struct needs *needs, const char **where, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    struct lr_comm *comm = engine->links;
    struct travel travel = count_travel(step, needs);
    char *outgoing = LR_STEP_TENSOR(session, char, (size_t)travel.n_send * session->block_bytes);
    char *fetched = LR_STEP_TENSOR(session, char, (size_t)travel.n_receive * session->block_bytes);
    if (!outgoing || !fetched)
        return lr_fail(err, LR_INTERNAL, "workspace for %lld + %lld travelling blocks was not planned",
                       (long long)travel.n_send, (long long)travel.n_receive);
    int64_t first = needs->first[comm->rank];
    place_mine(step, layer, needs->blocks + first, needs->end[comm->rank] - first, where);
    pack_needs(step, layer, needs, outgoing);
    LR_TRY(lr_comm_all_to_all_v(comm, "kv blocks", outgoing, travel.send, fetched, travel.receive, err));
    size_t *offsets = LR_STEP_TABLE(session, size_t, comm->size);
    size_t offset = 0;
    for (int r = 0; r < comm->size; r++) {
        offsets[r] = offset;
        offset += travel.receive[r];
    }
    for (int64_t i = first; i < needs->end[comm->rank]; i++) {
        int owner = lr_session_block_owner(session, needs->blocks[i]);
        if (owner == comm->rank)
            continue;
        where[i - first] = fetched + offsets[owner];
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

/* Blocks that one query block may read: sinks, chosen, window. */
static int64_t most_refs(const struct lr_session_options *o)
{
    return o->top_k_blocks + lr_ceil_div(o->sinks, LR_BLOCK) + lr_ceil_div(o->window, LR_BLOCK) + 3;
}

/* My blocks that are folded together: blocks[i] is at where[i]. */
struct placed {
    const int32_t *blocks;
    const char **where;
    int64_t n;
};

/* Adds the block to a list where it is among the placed ones. */
static void add_ref(const struct lr_step *step,
                    const struct placed *placed,
                    int64_t block,
                    int whole,
                    struct lr_kv_ref *refs,
                    int64_t *n)
{
    int64_t i = find_block(placed->blocks, placed->n, block);
    if (i < placed->n && placed->blocks[i] == block)
        refs[(*n)++] = make_ref(step, block, placed->where[i], whole);
}

/* One list for each query block and KV head: sinks, chosen blocks, window, as far as they are placed. */
static struct lr_kv_list *chosen_lists(const struct lr_step *step, const int32_t *chosen, const struct placed *placed)
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
            add_ref(step, placed, b, 0, refs, &m);
        for (int64_t j = 0; j < k; j++)
            if (chosen[i * k + j] >= 0)
                add_ref(step, placed, chosen[i * k + j], 1, refs, &m);
        for (int64_t b = window_first; b <= query_block; b++)
            add_ref(step, placed, b, 0, refs, &m);
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

/* Fetches these needs and folds them. `chosen` is NULL without chosen blocks. */
static enum lr_status attend_needs(struct lr_step *step,
                                   int64_t layer,
                                   const struct needs *needs,
                                   const int32_t *chosen,
                                   struct lr_attention_args *args,
                                   struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    int rank = engine->comm->rank;
    struct placed placed = {.blocks = needs->blocks + needs->first[rank], .n = needs->end[rank] - needs->first[rank]};
    placed.where = LR_STEP_TABLE(session, const char *, placed.n);
    LR_TRY(fetch_needs(step, layer, needs, placed.where, err));
    struct lr_kv_list list = {.n_refs = placed.n};
    if (chosen) {
        args->lists = chosen_lists(step, chosen, &placed);
        args->n_lists = lr_ceil_div(step->n_rows, LR_BLOCK) * session->kv_shape.n_kv_heads;
    } else {
        struct lr_kv_ref *refs = LR_STEP_TABLE(session, struct lr_kv_ref, placed.n);
        for (int64_t i = 0; i < placed.n; i++)
            refs[i] = make_ref(step, placed.blocks[i], placed.where[i], 0);
        list.refs = refs;
        args->lists = &list;
    }
    if (step->n_rows > 0 && (placed.n > 0 || args->y)) {
        engine->ops->attention(&engine->exec, args);
        args->first = 0;
    }
    lr_kv_gather_leave(session);
    return LR_OK;
}

static enum lr_status attend_sparse(struct lr_step *step,
                                    int64_t layer,
                                    const struct lr_projection *p,
                                    struct lr_attention_args *args,
                                    struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_session_options *o = &session->options;
    int64_t n_chosen = lr_ceil_div(step->n_rows, LR_BLOCK) * session->kv_shape.n_kv_heads * o->top_k_blocks;
    const int32_t *chosen = NULL;
    if (o->top_k_blocks > 0) {
        LR_TRY(select_blocks(step, layer, p, &chosen, err));
        count_chosen_pairs(step, chosen, n_chosen);
    }
    struct needs needs;
    LR_TRY(list_needs(step, chosen, n_chosen, &needs, err));
    args->window = o->window;
    args->sinks = o->sinks;
    lr_act *y = args->y;
    int64_t last = lr_ceil_div(step->wave->end, LR_BLOCK);
    for (int64_t first = 0, end; first < last; first = end) {
        struct lr_step_mark mark = lr_step_mark(session);
        struct needs cut = cut_needs(step, &needs, first, &end);
        args->y = end == last ? y : NULL;
        LR_TRY(attend_needs(step, layer, &cut, chosen, args, err));
        lr_step_rewind(session, mark);
    }
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

/* Blocks that one worker may receive and may send at once. */
static size_t most_travelling(const struct lr_model_dims *dims, int n_workers, const struct lr_session_options *options)
{
    if (n_workers == 1)
        return 0;
    int64_t needs = most_needs(options, dims), own = options->segment_tokens / LR_BLOCK;
    int64_t away = options->top_k_blocks > 0 ? needs : lr_max_i64(0, needs - own);
    if (options->host_slabs > 0)
        away = lr_min_i64(away, lr_plan_slot_blocks(dims, options));
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
    bytes.tables = 4 * lr_tensor_bytes(n_workers, sizeof(int64_t)) +
                   lr_tensor_bytes((n_workers + 1) * needs, sizeof(int32_t)) +
                   2 * lr_tensor_bytes(needs, sizeof(struct lr_kv_ref)) + lr_tensor_bytes(needs, sizeof(int32_t)) +
                   lr_tensor_bytes(needs, sizeof(char *)) + 6 * lr_tensor_bytes(n_workers, sizeof(size_t)) +
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
