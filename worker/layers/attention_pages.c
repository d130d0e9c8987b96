/* Page selection for decoding (Quest, Tang et al. 2024): instead of the whole document, a row
 * attends to the `decode_pages` blocks whose bound  sum_d max(q_d min_d, q_d max_d)  is largest,
 * per KV head, and to its own tail.
 *
 * Every worker bounds its own pages and offers its best; the offers are gathered and everyone keeps
 * the same best N (falling bound, then the lower page). A chosen page is one partial of its own, so
 * the merge does not depend on who owns it. Only whole blocks of the document are pages. */
#include "worker/kv_tier.h"
#include "worker/layers/attention_impl.h"

#include <stdlib.h>

static int better(struct lr_offer a, struct lr_offer b)
{
    if (a.page < 0 || b.page < 0)
        return a.page >= 0 && b.page < 0;
    return a.bound > b.bound || (a.bound == b.bound && a.page < b.page);
}

/* Puts an offer into a list of the n best, best first. */
static void insert_offer(struct lr_offer *best, int64_t n, struct lr_offer offer)
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
    struct lr_step *step, int64_t layer, const struct lr_projection *p, struct lr_offer *offers, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_kv_shape *shape = &session->kv_shape;
    int64_t n_best = session->options.decode_pages, n_pages = count_local_pages(session);
    int64_t summary = layer * session->local_blocks * shape->n_kv_heads * shape->head_dim;
    for (int64_t i = 0; i < step->n_rows * shape->n_kv_heads * n_best; i++)
        offers[i] = (struct lr_offer){.page = -1};
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
                             (struct lr_offer){.bound = ((const float *)view)[head * n_pages + i],
                                               .page = page_of_local(session, i)});
        lr_step_rewind(session, mark);
    }
    return LR_OK;
}

/* The best pages of the whole world for each (row, KV head), into `offers`. */
static enum lr_status agree_on_pages(struct lr_step *step, struct lr_offer *offers, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_comm *comm = session->engine->comm;
    int64_t n_best = session->options.decode_pages;
    int64_t n_lists = step->n_rows * session->kv_shape.n_kv_heads, n = n_lists * n_best;
    struct lr_offer *all = LR_STEP_TABLE(session, struct lr_offer, comm->size * n);
    LR_TRY(lr_comm_all_gather(comm, "page offers", offers, (size_t)n * sizeof *offers, all, err));
    for (int64_t i = 0; i < n; i++)
        offers[i] = (struct lr_offer){.page = -1};
    for (int64_t list = 0; list < n_lists; list++)
        for (int64_t i = 0; i < comm->size * n_best; i++) {
            struct lr_offer offer = all[i / n_best * n + list * n_best + i % n_best];
            if (offer.page >= 0)
                insert_offer(offers + list * n_best, n_best, offer);
        }
    return LR_OK;
}

enum lr_status lr_choose_pages(struct lr_step *step,
                               int64_t layer,
                               const struct lr_projection *p,
                               const struct lr_offer **chosen,
                               struct lr_error *err)
{
    struct lr_session *session = step->session;
    int64_t n = step->n_rows * session->kv_shape.n_kv_heads * session->options.decode_pages;
    struct lr_offer *offers = LR_STEP_TABLE(session, struct lr_offer, n);
    LR_TRY(offer_pages(step, layer, p, offers, err));
    LR_TRY(agree_on_pages(step, offers, err));
    *chosen = offers;
    return LR_OK;
}

/* The page of (row, KV head, slot) where this worker has it; else -1. */
static int32_t
page_here(const struct lr_step *step, const struct lr_offer *chosen, int64_t row, int64_t head, int64_t slot)
{
    const struct lr_session *session = step->session;
    int64_t list = row * session->kv_shape.n_kv_heads + head;
    int32_t page = chosen[list * session->options.decode_pages + slot].page;
    return page >= 0 && lr_session_block_owner(session, page) == session->engine->comm->rank ? page : -1;
}

static int compare_pages(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* The pages here of slots [first, end), ascending, each once. */
static int64_t
collect_pages(const struct lr_step *step, const struct lr_offer *chosen, int64_t first, int64_t end, int32_t *pages)
{
    int64_t n = 0, n_unique = 0;
    for (int64_t row = 0; row < step->n_rows; row++)
        for (int64_t head = 0; head < step->session->kv_shape.n_kv_heads; head++)
            for (int64_t slot = first; slot < end; slot++) {
                int32_t page = page_here(step, chosen, row, head, slot);
                if (page >= 0)
                    pages[n++] = page;
            }
    qsort(pages, (size_t)n, sizeof *pages, compare_pages);
    for (int64_t i = 0; i < n; i++)
        if (i == 0 || pages[i] != pages[i - 1])
            pages[n_unique++] = pages[i];
    return n_unique;
}

void lr_list_pages(struct lr_step *step,
                   int64_t layer,
                   const struct lr_offer *chosen,
                   int64_t first,
                   int64_t end,
                   struct lr_partial_work *work)
{
    struct lr_session *session = step->session;
    int64_t heads = session->kv_shape.n_kv_heads, most = step->n_rows * heads * (end - first);
    int32_t *pages = LR_STEP_TABLE(session, int32_t, most);
    const char **where = LR_STEP_TABLE(session, const char *, most);
    struct lr_kv_ref *refs = LR_STEP_TABLE(session, struct lr_kv_ref, most);
    struct lr_kv_list *lists = LR_STEP_TABLE(session, struct lr_kv_list, most);
    int64_t n_pages = collect_pages(step, chosen, first, end, pages);
    lr_kv_gather(session, layer, pages, n_pages, where);
    for (int64_t row = 0; row < step->n_rows; row++)
        for (int64_t slot = first; slot < end; slot++, refs += heads, lists += heads) {
            for (int64_t head = 0; head < heads; head++) {
                int32_t page = page_here(step, chosen, row, head, slot);
                lists[head] = (struct lr_kv_list){.refs = &refs[head], .n_refs = page >= 0};
                if (page < 0)
                    continue;
                const int32_t *at = bsearch(&page, pages, (size_t)n_pages, sizeof *pages, compare_pages);
                refs[head] = (struct lr_kv_ref){
                    .data = where[at - pages], .position = (int64_t)page * LR_BLOCK, .n_keys = LR_BLOCK};
            }
            work->items[work->n_items++] =
                (struct lr_partial_item){.slot = slot, .first_row = row, .n_rows = 1, .lists = lists, .n_lists = heads};
        }
}

struct lr_step_bytes lr_list_pages_bytes(const struct lr_model_dims *dims,
                                         int n_workers,
                                         const struct lr_session_options *options,
                                         int64_t n_rows)
{
    int64_t offers = n_rows * dims->n_kv_heads * options->decode_pages;
    int64_t pages = lr_ceil_div(options->max_tokens, LR_BLOCK) + options->segment_tokens / LR_BLOCK;
    size_t bounds = lr_tensor_bytes(dims->n_kv_heads * pages, sizeof(float));
    return (struct lr_step_bytes){.tensors = bounds,
                                  .tables = bounds + lr_tensor_bytes(offers, sizeof(struct lr_offer)) +
                                            lr_tensor_bytes(n_workers * offers, sizeof(struct lr_offer)) +
                                            lr_tensor_bytes(offers, sizeof(int32_t)) +
                                            lr_tensor_bytes(offers, sizeof(char *)) +
                                            lr_tensor_bytes(offers, sizeof(struct lr_kv_ref)) +
                                            lr_tensor_bytes(offers, sizeof(struct lr_kv_list))};
}
