/* Page selection for decoding (Quest, Tang et al. 2024): instead of the whole document, a row
 * attends to the `decode_pages` blocks whose bound  sum_d max(q_d min_d, q_d max_d)  is largest,
 * per KV head, and to its own tail.
 *
 * Every worker bounds its own pages and offers its best; the offers are gathered and everyone keeps
 * the same best N (falling bound, then the lower page). A chosen page is one partial of its own, so
 * the merge does not depend on who owns it. Only whole blocks of the document are pages. */
#include "worker/layers/attention_impl.h"

struct offer {
    float bound;
    int32_t page; /* absolute block number; -1: none */
};

static int better(struct offer a, struct offer b)
{
    if (a.page < 0 || b.page < 0)
        return a.page >= 0 && b.page < 0;
    return a.bound > b.bound || (a.bound == b.bound && a.page < b.page);
}

/* Puts an offer into a list of the n best, best first. */
static void insert_offer(struct offer *best, int64_t n, struct offer offer)
{
    if (!better(offer, best[n - 1]))
        return;
    int64_t i = n - 1;
    for (; i > 0 && better(offer, best[i - 1]); i--)
        best[i] = best[i - 1];
    best[i] = offer;
}

/* Whole blocks of the document on this worker, ascending. */
static int64_t count_local_pages(const struct lr_session *session)
{
    const struct lr_comm *comm = session->engine->comm;
    int64_t per_segment = lr_blocks_per_segment(session), pages = session->n_tokens / LR_BLOCK;
    int64_t n = 0;
    for (int64_t first = comm->rank * per_segment; first < pages; first += comm->size * per_segment)
        n += lr_min_i64(per_segment, pages - first);
    return n;
}

static int32_t page_of_local(const struct lr_session *session, int64_t local)
{
    const struct lr_comm *comm = session->engine->comm;
    int64_t per_segment = lr_blocks_per_segment(session);
    int64_t segment = local / per_segment * comm->size + comm->rank;
    return (int32_t)(segment * per_segment + local % per_segment);
}

/* My best pages for each (row, KV head). */
static enum lr_status offer_pages(
    struct lr_step *step, int64_t layer, const struct lr_projection *p, struct offer *offers, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_kv_shape *shape = &session->kv_shape;
    int64_t n_best = session->options.decode_pages, n_pages = count_local_pages(session);
    int64_t summary = layer * session->local_blocks * shape->n_kv_heads * shape->head_dim;
    for (int64_t i = 0; i < step->n_rows * shape->n_kv_heads * n_best; i++)
        offers[i] = (struct offer){.page = -1};
    for (int64_t row = 0; row < step->n_rows && n_pages > 0; row++) {
        struct lr_step_mark mark = lr_step_mark(session);
        float *bounds = LR_STEP_TENSOR(session, float, shape->n_kv_heads *n_pages);
        struct lr_page_bounds_args args = {.shape = *shape,
                                           .q = lr_act_at(engine->ops, p->rows, row * p->stride),
                                           .q_stride = p->stride,
                                           .q_head_stride = 2 * shape->head_dim,
                                           .n_rows = 1,
                                           .min = session->page_min + summary,
                                           .max = session->page_max + summary,
                                           .n_pages = n_pages,
                                           .bounds = bounds};
        engine->ops->page_bounds(&engine->exec, &args);
        const void *view;
        LR_TRY(lr_step_view(session, bounds, (size_t)(shape->n_kv_heads * n_pages) * sizeof *bounds, &view, err));
        for (int64_t head = 0; head < shape->n_kv_heads; head++)
            for (int64_t i = 0; i < n_pages; i++)
                insert_offer(offers + (row * shape->n_kv_heads + head) * n_best, n_best,
                             (struct offer){.bound = ((const float *)view)[head * n_pages + i],
                                            .page = page_of_local(session, i)});
        lr_step_rewind(session, mark);
    }
    return LR_OK;
}

/* The best pages of the whole world for each (row, KV head), into `offers`. */
static enum lr_status agree_on_pages(struct lr_step *step, struct offer *offers, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_comm *comm = session->engine->comm;
    int64_t n_best = session->options.decode_pages;
    int64_t n_lists = step->n_rows * session->kv_shape.n_kv_heads, n = n_lists * n_best;
    struct offer *all = LR_STEP_TABLE(session, struct offer, comm->size * n);
    LR_TRY(lr_comm_all_gather(comm, "page offers", offers, (size_t)n * sizeof *offers, all, err));
    for (int64_t i = 0; i < n; i++)
        offers[i] = (struct offer){.page = -1};
    for (int64_t list = 0; list < n_lists; list++)
        for (int64_t i = 0; i < comm->size * n_best; i++) {
            struct offer offer = all[i / n_best * n + list * n_best + i % n_best];
            if (offer.page >= 0)
                insert_offer(offers + list * n_best, n_best, offer);
        }
    return LR_OK;
}

enum lr_status lr_list_pages(struct lr_step *step,
                             int64_t layer,
                             const struct lr_projection *p,
                             struct lr_partial_work *work,
                             struct lr_error *err)
{
    struct lr_session *session = step->session;
    int64_t n_best = session->options.decode_pages, heads = session->kv_shape.n_kv_heads;
    struct offer *offers = LR_STEP_TABLE(session, struct offer, step->n_rows * heads * n_best);
    struct lr_kv_ref *refs = LR_STEP_TABLE(session, struct lr_kv_ref, step->n_rows * heads * n_best);
    struct lr_kv_list *lists = LR_STEP_TABLE(session, struct lr_kv_list, step->n_rows * heads * n_best);
    LR_TRY(offer_pages(step, layer, p, offers, err));
    LR_TRY(agree_on_pages(step, offers, err));
    for (int64_t row = 0; row < step->n_rows; row++)
        for (int64_t slot = 0; slot < n_best; slot++) {
            int64_t first = (row * n_best + slot) * heads;
            for (int64_t head = 0; head < heads; head++) {
                int32_t page = offers[(row * heads + head) * n_best + slot].page;
                int here = page >= 0 && lr_session_block_owner(session, page) == session->engine->comm->rank;
                lists[first + head] = (struct lr_kv_list){.refs = &refs[first + head], .n_refs = here};
                if (here)
                    refs[first + head] = (struct lr_kv_ref){.data = lr_session_block(session, layer, page),
                                                            .position = (int64_t)page * LR_BLOCK,
                                                            .n_keys = LR_BLOCK};
            }
            work->items[work->n_items++] = (struct lr_partial_item){
                .slot = slot, .first_row = row, .n_rows = 1, .lists = lists + first, .n_lists = heads};
        }
    return LR_OK;
}

struct lr_step_bytes lr_list_pages_bytes(const struct lr_model_dims *dims,
                                         int n_workers,
                                         const struct lr_session_options *options,
                                         int64_t n_rows)
{
    int64_t offers = n_rows * dims->n_kv_heads * options->decode_pages;
    int64_t pages = lr_ceil_div(options->max_tokens, LR_BLOCK) + options->segment_tokens / LR_BLOCK;
    size_t bounds = lr_tensor_bytes(dims->n_kv_heads * pages, sizeof(float));
    return (struct lr_step_bytes){
        .tensors = bounds,
        .tables = bounds + lr_tensor_bytes(offers, sizeof(struct offer)) +
                  lr_tensor_bytes(n_workers * offers, sizeof(struct offer)) +
                  lr_tensor_bytes(offers, sizeof(struct lr_kv_ref)) + lr_tensor_bytes(offers, sizeof(struct lr_kv_list))};
}
