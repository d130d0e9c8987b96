/* Shared by the files of the attention mixer: attention.c (projections, the layer's table),
 * attention_document.c (ring and sparse attention of a document), attention_forks.c (questions and
 * answers), attention_pages.c (selection of pages for decoding). */
#ifndef LR_WORKER_LAYERS_ATTENTION_IMPL_H
#define LR_WORKER_LAYERS_ATTENTION_IMPL_H

#include "worker/session_impl.h"

enum { LR_BLOCK = LR_KV_BLOCK_TOKENS };

/* The projected rows [n, stride]: per query head q | gate, then k, then v at their offsets. */
struct lr_projection {
    lr_act *rows;
    int64_t stride, k, v;
};

/* Running softmax of rows: m, l [n_rows, n_heads], o [n_rows, n_heads, head_dim]. */
struct lr_softmax {
    float *m, *l, *o;
};

static inline int64_t lr_blocks_per_segment(const struct lr_session *session)
{
    return session->options.segment_tokens / LR_BLOCK;
}

/* Columns of the input projection. */
static inline int64_t lr_attention_columns(const struct lr_model_dims *dims)
{
    return 2 * (dims->n_heads + dims->n_kv_heads) * dims->head_dim;
}

/* Softmax states of n_rows rows from the step's workspace, contents undefined. */
struct lr_softmax lr_softmax_take(struct lr_session *session, int64_t n_rows);
size_t lr_softmax_bytes(const struct lr_model_dims *dims, int64_t n_rows);

/* Arguments that every attention call of a document's step shares; nothing folded yet. */
struct lr_attention_args
lr_attention_call(const struct lr_step *step, const struct lr_projection *p, const struct lr_softmax *softmax);

/* Stores the segment's KV and folds what its queries may see: y [n_rows, n_heads * head_dim]. Collective. */
LR_MUST_USE enum lr_status lr_attend_document(
    struct lr_step *step, int64_t layer, const struct lr_projection *p, lr_act *y, struct lr_error *err);
struct lr_step_bytes lr_attend_document_bytes(const struct lr_model_dims *dims,
                                              const struct lr_kernel_ops *ops,
                                              int n_workers,
                                              const struct lr_session_options *options);

/* Stores the forks' KV and attends: y [n_rows, n_heads * head_dim]. Collective. */
LR_MUST_USE enum lr_status
lr_attend_forks(struct lr_step *step, int64_t layer, const struct lr_projection *p, lr_act *y, struct lr_error *err);
struct lr_step_bytes lr_attend_forks_bytes(const struct lr_model_dims *dims,
                                           int n_workers,
                                           const struct lr_session_options *options,
                                           int64_t n_rows);

/* The partials of a step in the making: what is to be folded into which slot. */
struct lr_partial_work {
    struct lr_partial_item *items;
    int64_t n_items;
};

/* A page for one row and KV head: its bound, and its absolute block number; -1: none. */
struct lr_offer {
    float bound;
    int32_t page;
};

/* chosen [n_rows][KV head][decode_pages], best first (see attention_pages.c). Collective. */
LR_MUST_USE enum lr_status lr_choose_pages(struct lr_step *step,
                                           int64_t layer,
                                           const struct lr_projection *p,
                                           const struct lr_offer **chosen,
                                           struct lr_error *err);
/* Adds one item for each row and slot [first, end): the slot's chosen pages, where they are here, for the kernels that
 * follow, up to lr_kv_gather_leave. */
void lr_list_pages(struct lr_step *step,
                   int64_t layer,
                   const struct lr_offer *chosen,
                   int64_t first,
                   int64_t end,
                   struct lr_partial_work *work);
struct lr_step_bytes lr_list_pages_bytes(const struct lr_model_dims *dims,
                                         int n_workers,
                                         const struct lr_session_options *options,
                                         int64_t n_rows);

#endif
