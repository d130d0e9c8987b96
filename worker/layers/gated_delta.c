/* Gated DeltaNet mixer, sequence-parallel by a scan over workers.
 *
 *   h -> in (q k v z b a) -> conv + act on q k v -> l2norm q, k -> gated delta rule -> norm gated
 * by z -> out -> += x
 *
 * A segment is an affine map of the state that enters it: S_out = M S_in + B. Every worker makes
 * (M, B) of its segment from a zero state, also when it is alone, so that the bits do not depend on
 * the number of workers; S then travels from worker to worker, M stays. The convolution needs the
 * last taps-1 inputs of the segment before: those tails are gathered by everyone, which also keeps
 * the session's tail everywhere. Yang et al. 2024 (Gated Delta Networks). */
#include "worker/session_impl.h"

#include <math.h>
#include <string.h>

/* Column offsets in a row of the input projection. */
struct columns {
    int64_t k, v, z, b, a, total;
};

static struct columns columns_of(const struct lr_model_dims *dims)
{
    const struct lr_delta_shape *s = &dims->delta;
    struct columns c;
    c.k = s->n_k_heads * s->dk;
    c.v = 2 * c.k;
    c.z = dims->conv_channels;
    c.b = c.z + s->n_v_heads * s->dv;
    c.a = c.b + s->n_v_heads;
    c.total = c.a + s->n_v_heads;
    return c;
}

static size_t row_floats(const struct lr_model_dims *dims)
{
    const struct lr_delta_shape *s = &dims->delta;
    return (size_t)(columns_of(dims).total + dims->conv_channels + 2 * s->n_v_heads + s->n_v_heads * s->dv);
}

static size_t prefill_bytes(const struct lr_model_dims *dims,
                            const struct lr_kernel_ops *ops,
                            int n_workers,
                            const struct lr_session_options *options)
{
    const struct lr_delta_shape *s = &dims->delta;
    size_t rows = (size_t)options->segment_tokens;
    size_t maps = (size_t)(s->n_v_heads * s->dk * s->dk) + 3 * lr_state_floats(dims);
    size_t tails = ((size_t)n_workers + 2) * lr_tail_floats(dims);
    size_t floats = rows * row_floats(dims) + maps + tails + ops->delta_work_floats(*s, options->segment_tokens);
    return floats * sizeof(float) + (size_t)n_workers * 64 + 4096;
}

static size_t extend_bytes(const struct lr_model_dims *dims,
                           const struct lr_kernel_ops *ops,
                           int n_workers,
                           const struct lr_session_options *options,
                           int64_t n_rows)
{
    (void)ops, (void)n_workers, (void)options;
    size_t rows = (size_t)n_rows;
    size_t window = (rows + (size_t)dims->conv_taps) * (size_t)dims->conv_channels * 2;
    return (rows * row_floats(dims) + window) * sizeof(float) + rows * sizeof(float *) + 4096;
}

/* The convolution inputs just before each worker's segment. `tails` holds
 * [n_workers][taps-1][channels]: the last rows of every worker's segment, gathered; all but the
 * last active segment are longer than a tail. */
static enum lr_status
gather_tails(struct lr_step *step, const float *in, int64_t in_stride, float *tails, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_model_dims *dims = &session->engine->model.dims;
    struct lr_comm *comm = session->engine->comm;
    int64_t taps = dims->conv_taps - 1, channels = dims->conv_channels;
    size_t *sizes = LR_STEP_ARRAY(session, size_t, comm->size);
    float *mine = LR_STEP_ARRAY(session, float, taps *channels);
    for (int r = 0; r < comm->size; r++)
        sizes[r] = (size_t)(lr_min_i64(lr_wave_length(step->wave, r), taps) * channels) * sizeof(float);
    int64_t rows = lr_min_i64(step->n_rows, taps);
    for (int64_t i = 0; i < rows; i++)
        memcpy(mine + i * channels, in + (step->n_rows - rows + i) * in_stride, (size_t)channels * sizeof(float));
    return lr_comm_all_gather_v(comm, "convolution tails", mine, sizes, tails, err);
}

/* The session's tail after the wave: the last taps-1 rows of (what came before, the last active
 * segment). */
static void advance_tail(const struct lr_step *step, const float *tails, float *session_tail)
{
    const struct lr_model_dims *dims = &step->session->engine->model.dims;
    int64_t taps = dims->conv_taps - 1, channels = dims->conv_channels;
    int last = step->wave->n_active - 1;
    int64_t rows = lr_min_i64(lr_wave_length(step->wave, last), taps);
    const float *before = last > 0 ? tails + (last - 1) * taps * channels : session_tail;
    memmove(session_tail, before + rows * channels, (size_t)((taps - rows) * channels) * sizeof(float));
    memcpy(session_tail + (taps - rows) * channels, tails + last * taps * channels,
           (size_t)(rows * channels) * sizeof(float));
}

/* Hands the state through the wave's workers in order. s_in: the state that enters my segment. */
static enum lr_status scan_states(struct lr_step *step,
                                  float *session_state,
                                  const float *m,
                                  const float *b,
                                  float *s_in,
                                  float *s_out,
                                  struct lr_error *err)
{
    struct lr_engine *engine = step->session->engine;
    struct lr_comm *comm = engine->comm;
    size_t bytes = lr_state_floats(&engine->model.dims) * sizeof(float);
    int last = step->wave->n_active - 1;
    if (comm->rank == 0)
        memcpy(s_in, session_state, bytes);
    for (int r = 0; r <= last; r++) {
        if (r > 0)
            LR_TRY(lr_comm_pass(comm, "delta state", r - 1, s_out, r, s_in, bytes, err));
        if (r == comm->rank) {
            struct lr_delta_fold_args fold = {
                .shape = engine->model.dims.delta, .m = m, .b = b, .s_in = s_in, .s_out = s_out};
            engine->ops->delta_fold(&engine->exec, &fold);
        }
    }
    if (last > 0)
        return lr_comm_pass(comm, "delta state", last, s_out, 0, session_state, bytes, err);
    if (comm->rank == 0)
        memcpy(session_state, s_out, bytes);
    return LR_OK;
}

/* Normalises q and k, which stand in the first columns of the convolution's output, and makes beta
 * and g. */
static void prepare_qk_gates(const struct lr_step *step,
                             const struct lr_gated_delta_weights *w,
                             float *mixed,
                             const float *in,
                             float *beta,
                             float *g)
{
    const struct lr_engine *engine = step->session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_delta_shape *s = &dims->delta;
    struct columns c = columns_of(dims);
    struct lr_l2norm_args norm = {.x = mixed,
                                  .x_stride = dims->conv_channels,
                                  .n_rows = step->n_rows,
                                  .n_heads = s->n_k_heads,
                                  .head_dim = s->dk,
                                  .eps = 1e-6f,
                                  .scale = 1.0f / sqrtf((float)s->dk)};
    engine->ops->l2norm(&engine->exec, &norm);
    norm.x = mixed + c.k;
    norm.scale = 1.0f;
    engine->ops->l2norm(&engine->exec, &norm);
    struct lr_delta_gates_args gates = {.b = in + c.b,
                                        .a = in + c.a,
                                        .ba_stride = c.total,
                                        .a_log = w->a_log,
                                        .dt_bias = w->dt_bias,
                                        .beta = beta,
                                        .g = g,
                                        .n_rows = step->n_rows,
                                        .n_heads = s->n_v_heads};
    engine->ops->delta_gates(&engine->exec, &gates);
}

/* o -> norm gated by z -> out projection, added to the residual stream. */
static void finish(const struct lr_step *step, const struct lr_gated_delta_weights *w, float *o, const float *in)
{
    const struct lr_engine *engine = step->session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_delta_shape *s = &dims->delta;
    struct columns c = columns_of(dims);
    struct lr_gated_rmsnorm_args norm = {.x = o,
                                         .x_stride = s->n_v_heads * s->dv,
                                         .z = in + c.z,
                                         .z_stride = c.total,
                                         .w = w->norm,
                                         .y = o,
                                         .y_stride = s->n_v_heads * s->dv,
                                         .n_rows = step->n_rows,
                                         .n_heads = s->n_v_heads,
                                         .head_dim = s->dv,
                                         .eps = dims->norm_eps};
    engine->ops->gated_rmsnorm(&engine->exec, &norm);
    struct lr_gemm_args out = {.a = o,
                               .a_stride = s->n_v_heads * s->dv,
                               .w = &w->out,
                               .y = step->x,
                               .y_stride = dims->d,
                               .n_rows = step->n_rows,
                               .accumulate = 1};
    engine->ops->gemm(&engine->exec, &out);
}

static void project_in(const struct lr_step *step, const struct lr_gated_delta_weights *w, float *in)
{
    const struct lr_engine *engine = step->session->engine;
    struct lr_gemm_args args = {.a = step->h,
                                .a_stride = engine->model.dims.d,
                                .w = &w->in,
                                .y = in,
                                .y_stride = w->in.n,
                                .n_rows = step->n_rows};
    engine->ops->gemm(&engine->exec, &args);
}

static enum lr_status prefill(struct lr_step *step, const struct lr_layer *layer, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_delta_shape *s = &dims->delta;
    const struct lr_gated_delta_weights *w = &layer->delta;
    struct columns c = columns_of(dims);
    int64_t n = step->n_rows, channels = dims->conv_channels;
    float *session_state = session->states + (size_t)layer->mixer_index * lr_state_floats(dims);
    float *session_tail = session->tails + (size_t)layer->mixer_index * lr_tail_floats(dims);

    float *in = LR_STEP_ARRAY(session, float, n *c.total);
    project_in(step, w, in);

    float *tails = LR_STEP_ARRAY(session, float, engine->comm->size *(int64_t)lr_tail_floats(dims));
    LR_TRY(gather_tails(step, in, c.total, tails, err));
    int rank = engine->comm->rank;
    float *mixed = LR_STEP_ARRAY(session, float, n *channels);
    struct lr_conv_args conv = {.x = in,
                                .x_stride = c.total,
                                .w = w->conv,
                                .tail = rank > 0 ? tails + (size_t)(rank - 1) * lr_tail_floats(dims) : session_tail,
                                .y = mixed,
                                .y_stride = channels,
                                .n_rows = n,
                                .n_channels = channels,
                                .n_taps = dims->conv_taps,
                                .activation = dims->activation};
    if (n > 0)
        engine->ops->conv(&engine->exec, &conv);
    advance_tail(step, tails, session_tail);

    float *beta = LR_STEP_ARRAY(session, float, n * s->n_v_heads);
    float *g = LR_STEP_ARRAY(session, float, n * s->n_v_heads);
    prepare_qk_gates(step, w, mixed, in, beta, g);

    float *m = LR_STEP_ARRAY(session, float, s->n_v_heads * s->dk * s->dk);
    float *b = LR_STEP_ARRAY(session, float, lr_state_floats(dims));
    float *s_in = LR_STEP_ARRAY(session, float, lr_state_floats(dims));
    float *s_out = LR_STEP_ARRAY(session, float, lr_state_floats(dims));
    struct lr_delta_segment_args segment = {.shape = *s,
                                            .q = mixed,
                                            .k = mixed + c.k,
                                            .v = mixed + c.v,
                                            .qkv_stride = channels,
                                            .g = g,
                                            .beta = beta,
                                            .n_rows = n,
                                            .work =
                                                LR_STEP_ARRAY(session, float, engine->ops->delta_work_floats(*s, n))};
    if (n > 0)
        engine->ops->delta_summary(&engine->exec, &segment, m, b);
    LR_TRY(scan_states(step, session_state, m, b, s_in, s_out, err));
    if (n == 0)
        return LR_OK;
    float *o = LR_STEP_ARRAY(session, float, n * s->n_v_heads * s->dv);
    engine->ops->delta_output(&engine->exec, &segment, s_in, o, s->n_v_heads * s->dv);
    finish(step, w, o, in);
    return LR_OK;
}

/* Convolution of the forks' rows: each fork's inputs are lined up behind its tail, then put back
 * time-major. */
static void convolve_forks(
    const struct lr_step *step, const struct lr_layer *layer, const float *in, int64_t in_stride, float *mixed)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_batch *batch = step->batch;
    int64_t taps = dims->conv_taps - 1, channels = dims->conv_channels;
    size_t row_bytes = (size_t)channels * sizeof(float);
    size_t mark = session->workspace.used_bytes;
    float *line = LR_STEP_ARRAY(session, float, (step->n_rows + taps) * channels);
    float *made = LR_STEP_ARRAY(session, float, step->n_rows *channels);
    for (int64_t f = 0; f < batch->n_forks; f++) {
        int64_t n = lr_batch_fork_tokens(batch, f);
        float *tail = batch->forks[f]->tails + (size_t)layer->mixer_index * lr_tail_floats(dims);
        memcpy(line, tail, (size_t)taps * row_bytes);
        for (int64_t j = 0; j < n; j++)
            memcpy(line + (taps + j) * channels, in + (batch->slice_first[j] + f) * in_stride, row_bytes);
        struct lr_conv_args conv = {.x = line + taps * channels,
                                    .x_stride = channels,
                                    .w = layer->delta.conv,
                                    .tail = line,
                                    .y = made,
                                    .y_stride = channels,
                                    .n_rows = n,
                                    .n_channels = channels,
                                    .n_taps = dims->conv_taps,
                                    .activation = dims->activation};
        engine->ops->conv(&engine->exec, &conv);
        for (int64_t j = 0; j < n; j++)
            memcpy(mixed + (batch->slice_first[j] + f) * channels, made + j * channels, row_bytes);
        memcpy(tail, line + n * channels, (size_t)taps * row_bytes);
    }
    lr_arena_rewind(&session->workspace, mark);
}

static enum lr_status extend(struct lr_step *step, const struct lr_layer *layer, struct lr_error *err)
{
    (void)err;
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_delta_shape *s = &dims->delta;
    const struct lr_gated_delta_weights *w = &layer->delta;
    const struct lr_batch *batch = step->batch;
    struct columns c = columns_of(dims);
    int64_t n = step->n_rows, channels = dims->conv_channels, width = s->n_v_heads * s->dv;

    float *in = LR_STEP_ARRAY(session, float, n *c.total);
    project_in(step, w, in);
    float *mixed = LR_STEP_ARRAY(session, float, n *channels);
    convolve_forks(step, layer, in, c.total, mixed);
    float *beta = LR_STEP_ARRAY(session, float, n * s->n_v_heads);
    float *g = LR_STEP_ARRAY(session, float, n * s->n_v_heads);
    prepare_qk_gates(step, w, mixed, in, beta, g);

    float *o = LR_STEP_ARRAY(session, float, n *width);
    float **states = LR_STEP_ARRAY(session, float *, batch->n_forks);
    for (int64_t f = 0; f < batch->n_forks; f++)
        states[f] = batch->forks[f]->states + (size_t)layer->mixer_index * lr_state_floats(dims);
    for (int64_t j = 0; j < batch->n_slices; j++) {
        int64_t row = batch->slice_first[j];
        const float *q = mixed + row * channels;
        struct lr_delta_step_args args = {.shape = *s,
                                          .q = q,
                                          .k = q + c.k,
                                          .v = q + c.v,
                                          .qkv_stride = channels,
                                          .g = g + row * s->n_v_heads,
                                          .beta = beta + row * s->n_v_heads,
                                          .states = states,
                                          .o = o + row * width,
                                          .o_stride = width,
                                          .n_rows = lr_batch_slice_rows(batch, j)};
        engine->ops->delta_step(&engine->exec, &args);
    }
    finish(step, w, o, in);
    return LR_OK;
}

const struct lr_layer_ops lr_gated_delta_layer = {
    .name = "gated delta rule",
    .prefill_bytes = prefill_bytes,
    .extend_bytes = extend_bytes,
    .prefill = prefill,
    .extend = extend,
};
