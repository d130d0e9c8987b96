/* Gated softmax attention mixer, sequence-parallel.
 *
 *   h -> in (q | gate per head, k, v) -> norm and rotary on q, k -> k, v into KV blocks ->
 * attention -> * sigmoid(gate)
 *     -> out -> += x
 *
 * Document, full: KV rows (one segment per worker) are gathered one row ahead of the row being
 * computed, and the owner of the queries folds all keys in ascending order (Liu et al. 2023, Ring
 * Attention; here the order is fixed). Document, sparse: a segment needs the sinks, the window
 * before it and the chosen blocks; only those travel. Forks: queries are everywhere, every KV
 * segment gives one fresh partial (m, l, o), and the partials are merged by integer sums that have
 * no order (see lr_merge_args). The document's last, unfinished block is copied into every fork's
 * tail when the document is sealed, so the document's partials cover whole blocks only. */
#include "worker/layers/attention_impl.h"

#include <math.h>

/* ---- projections
 * --------------------------------------------------------------------------------------------------
 */

static struct lr_projection project(const struct lr_step *step, const struct lr_layer *layer)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_attention_weights *w = &layer->attention;
    struct lr_projection p = {.stride = lr_attention_columns(dims)};
    p.k = 2 * dims->n_heads * dims->head_dim;
    p.v = p.k + dims->n_kv_heads * dims->head_dim;
    p.rows = lr_step_act(session, step->n_rows * p.stride);
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
    rope.x = lr_act_at(engine->ops, p.rows, p.k);
    rope.n_heads = dims->n_kv_heads;
    rope.head_stride = dims->head_dim;
    rope.w = w->k_norm;
    engine->ops->norm_rope(&engine->exec, &rope);
    return p;
}

/* attended [n, n_heads * head_dim] * sigmoid(gate) -> out projection, added to the residual stream.
 */
static void
finish(const struct lr_step *step, const struct lr_layer *layer, const struct lr_projection *p, lr_act *attended)
{
    const struct lr_engine *engine = step->session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    int64_t width = dims->n_heads * dims->head_dim;
    struct lr_sigmoid_gate_args gate = {.x = attended,
                                        .x_stride = width,
                                        .gate = lr_act_at(engine->ops, p->rows, dims->head_dim),
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
                               .accumulate = 1,
                               .wide = 1};
    engine->ops->gemm(&engine->exec, &out);
}

struct lr_softmax lr_softmax_take(struct lr_session *session, int64_t n_rows)
{
    const struct lr_model_dims *dims = &session->engine->model.dims;
    int64_t n = n_rows * dims->n_heads;
    return (struct lr_softmax){.m = LR_STEP_TENSOR(session, float, n),
                               .l = LR_STEP_TENSOR(session, float, n),
                               .o = LR_STEP_TENSOR(session, float, n * dims->head_dim)};
}

size_t lr_softmax_bytes(const struct lr_model_dims *dims, int64_t n_rows)
{
    int64_t n = n_rows * dims->n_heads;
    return 2 * lr_tensor_bytes(n, sizeof(float)) + lr_tensor_bytes(n * dims->head_dim, sizeof(float));
}

struct lr_attention_args
lr_attention_call(const struct lr_step *step, const struct lr_projection *p, const struct lr_softmax *softmax)
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
                                      .n_lists = 1,
                                      .first = 1,
                                      .m = softmax->m,
                                      .l = softmax->l,
                                      .o = softmax->o};
}

static enum lr_status prefill(struct lr_step *step, const struct lr_layer *layer, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_model_dims *dims = &session->engine->model.dims;
    struct lr_projection p = project(step, layer);
    lr_act *y = lr_step_act(session, step->n_rows * dims->n_heads * dims->head_dim);
    LR_TRY(lr_attend_document(step, layer->mixer_index, &p, y, err));
    if (step->n_rows > 0)
        finish(step, layer, &p, y);
    return LR_OK;
}

static enum lr_status extend(struct lr_step *step, const struct lr_layer *layer, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_model_dims *dims = &session->engine->model.dims;
    struct lr_projection p = project(step, layer);
    lr_act *y = lr_step_act(session, step->n_rows * dims->n_heads * dims->head_dim);
    LR_TRY(lr_attend_forks(step, layer->mixer_index, &p, y, err));
    finish(step, layer, &p, y);
    return LR_OK;
}

/* The projection and the attended rows. */
static size_t row_bytes_of(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int64_t n_rows)
{
    return lr_tensor_bytes(n_rows * lr_attention_columns(dims), lr_act_bytes(ops)) +
           lr_tensor_bytes(n_rows * dims->n_heads * dims->head_dim, lr_act_bytes(ops));
}

static struct lr_step_bytes prefill_bytes(const struct lr_model_dims *dims,
                                          const struct lr_kernel_ops *ops,
                                          int n_workers,
                                          const struct lr_session_options *options)
{
    struct lr_step_bytes bytes = lr_attend_document_bytes(dims, ops, n_workers, options);
    bytes.tensors += row_bytes_of(dims, ops, options->segment_tokens);
    return bytes;
}

static struct lr_step_bytes extend_bytes(const struct lr_model_dims *dims,
                                         const struct lr_kernel_ops *ops,
                                         int n_workers,
                                         const struct lr_session_options *options,
                                         int64_t n_rows)
{
    struct lr_step_bytes bytes = lr_attend_forks_bytes(dims, n_workers, options, n_rows);
    bytes.tensors += row_bytes_of(dims, ops, n_rows);
    return bytes;
}

const struct lr_layer_ops lr_attention_layer = {
    .name = "attention",
    .prefill_bytes = prefill_bytes,
    .extend_bytes = extend_bytes,
    .prefill = prefill,
    .extend = extend,
};
