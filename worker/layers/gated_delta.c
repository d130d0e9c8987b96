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

/* Arrays of n_rows rows: the projection, the convolution's output, gates, the rule's output. */
static size_t row_bytes_of(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int64_t n_rows)
{
    const struct lr_delta_shape *s = &dims->delta;
    size_t act = lr_act_bytes(ops);
    return lr_tensor_bytes(n_rows * columns_of(dims).total, act) + lr_tensor_bytes(n_rows * dims->conv_channels, act) +
           lr_tensor_bytes(n_rows * s->n_v_heads * s->dv, act) +
           2 * lr_tensor_bytes(n_rows * s->n_v_heads, sizeof(float));
}

static struct lr_step_bytes prefill_bytes(const struct lr_model_dims *dims,
                                          const struct lr_kernel_ops *ops,
                                          int n_workers,
                                          const struct lr_session_options *options)
{
    const struct lr_delta_shape *s = &dims->delta;
    int64_t rows = options->segment_tokens, state = (int64_t)lr_state_floats(dims);
    struct lr_step_bytes bytes = {.tables = lr_tensor_bytes(n_workers, sizeof(size_t))};
    bytes.tensors = row_bytes_of(dims, ops, rows) + lr_tensor_bytes(s->n_v_heads * s->dk * s->dk, sizeof(float)) +
                    3 * lr_tensor_bytes(state, sizeof(float)) +
                    lr_tensor_bytes((int64_t)ops->delta_work_floats(*s, rows), sizeof(float)) +
                    lr_tensor_bytes(n_workers * (int64_t)lr_tail_elements(dims), lr_act_bytes(ops)) +
                    lr_tensor_bytes((int64_t)lr_tail_elements(dims), lr_act_bytes(ops));
    return bytes;
}

static struct lr_step_bytes extend_bytes(const struct lr_model_dims *dims,
                                         const struct lr_kernel_ops *ops,
                                         int n_workers,
                                         const struct lr_session_options *options,
                                         int64_t n_rows)
{
    (void)n_workers, (void)options;
    return (struct lr_step_bytes){.tensors = row_bytes_of(dims, ops, n_rows),
                                  .tables = 2 * lr_tensor_bytes(n_rows, sizeof(void *))};
}

/* Starts to gather the convolution inputs just before each worker's segment. `tails` holds
 * [n_workers][taps-1][channels]: the last rows of every worker's segment; all but the last active segment are longer
 * than a tail. */
static enum lr_status gather_tails(struct lr_step *step,
                                   const lr_act *in,
                                   int64_t in_stride,
                                   lr_act *tails,
                                   struct lr_comm_request *request,
                                   struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_kernel_ops *ops = engine->ops;
    const struct lr_model_dims *dims = &engine->model.dims;
    int64_t taps = dims->conv_taps - 1;
    size_t row_bytes = (size_t)dims->conv_channels * lr_act_bytes(ops);
    size_t *sizes = LR_STEP_TABLE(session, size_t, engine->links->size);
    lr_act *mine = lr_step_act(session, (int64_t)lr_tail_elements(dims));
    for (int r = 0; r < engine->links->size; r++)
        sizes[r] = (size_t)lr_min_i64(lr_wave_length(step->wave, r), taps) * row_bytes;
    int64_t rows = lr_min_i64(step->n_rows, taps);
    ops->memory.copy_rows(&engine->exec, mine, row_bytes, lr_act_at(ops, in, (step->n_rows - rows) * in_stride),
                          (size_t)in_stride * lr_act_bytes(ops), row_bytes, rows);
    return lr_comm_all_gather_v_start(engine->links, "convolution tails", mine, sizes, tails, request, err);
}

/* The session's tail after the wave: the last taps-1 rows of (what came before, the last active
 * segment). */
static void advance_tail(const struct lr_step *step, const lr_act *tails, lr_act *session_tail)
{
    const struct lr_engine *engine = step->session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_memory_ops *memory = &engine->ops->memory;
    int64_t taps = dims->conv_taps - 1;
    size_t row_bytes = (size_t)dims->conv_channels * lr_act_bytes(engine->ops);
    int last = step->wave->n_active - 1;
    int64_t rows = lr_min_i64(lr_wave_length(step->wave, last), taps);
    const char *segments = tails, *before = last > 0 ? segments + (size_t)((last - 1) * taps) * row_bytes : session_tail;
    char *tail = session_tail;
    /* row by row, upwards: `before` may be the tail itself */
    for (int64_t i = 0; i < taps - rows; i++)
        memory->copy(&engine->exec, tail + (size_t)i * row_bytes, before + (size_t)(i + rows) * row_bytes, row_bytes);
    memory->copy(&engine->exec, tail + (size_t)(taps - rows) * row_bytes, segments + (size_t)(last * taps) * row_bytes,
                 (size_t)rows * row_bytes);
}

/* States on their way: to the next worker, and from the last one to the next wave. */
struct passes {
    struct lr_comm_request onward, home;
};

/* Starts to pass a state. On CPUs it is through when this returns: nothing moves between memories of the host while the
 * host computes, and whoever receives would wait for the sender's output too. */
static enum lr_status pass_state(const struct lr_engine *engine,
                                 int from,
                                 const float *data,
                                 int to,
                                 float *received,
                                 struct lr_comm_request *request,
                                 struct lr_error *err)
{
    size_t bytes = lr_state_floats(&engine->model.dims) * sizeof(float);
    LR_TRY(lr_comm_pass_start(engine->links, "delta state", from, data, to, received, bytes, request, err));
    return engine->ops->host_memory ? lr_comm_wait(engine->links, request, err) : LR_OK;
}

/* Hands the state through the wave's workers in order. s_in: the state that enters my segment. What I send, and what
 * the next wave starts from, may be under way when this returns: end_passes. */
static enum lr_status scan_states(struct lr_step *step,
                                  float *session_state,
                                  const float *m,
                                  const float *b,
                                  float *s_in,
                                  float *s_out,
                                  struct passes *passes,
                                  struct lr_error *err)
{
    struct lr_engine *engine = step->session->engine;
    const struct lr_memory_ops *memory = &engine->ops->memory;
    struct lr_comm *links = engine->links;
    size_t bytes = lr_state_floats(&engine->model.dims) * sizeof(float);
    int last = step->wave->n_active - 1;
    if (links->rank == 0)
        memory->copy(&engine->exec, s_in, session_state, bytes);
    for (int r = 0; r <= last; r++) {
        if (r > 0) {
            struct lr_comm_request other = {0}, *request = links->rank == r - 1 ? &passes->onward : &other;
            LR_TRY(pass_state(engine, r - 1, s_out, r, s_in, request, err));
            LR_TRY(lr_comm_wait(links, &other, err));
        }
        if (r == links->rank) {
            struct lr_delta_fold_args fold = {
                .shape = engine->model.dims.delta, .m = m, .b = b, .s_in = s_in, .s_out = s_out};
            engine->ops->delta_fold(&engine->exec, &fold);
        }
    }
    if (last > 0)
        return pass_state(engine, last, s_out, 0, session_state, &passes->home, err);
    if (links->rank == 0)
        memory->copy(&engine->exec, session_state, s_out, bytes);
    return LR_OK;
}

static enum lr_status end_passes(const struct lr_step *step, struct passes *passes, struct lr_error *err)
{
    struct lr_comm *links = step->session->engine->links;
    LR_TRY(lr_comm_wait(links, &passes->onward, err));
    return lr_comm_wait(links, &passes->home, err);
}

/* q and k stand in the first columns of the convolution's output. */
static void normalise_qk(const struct lr_step *step, lr_act *mixed)
{
    const struct lr_engine *engine = step->session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_delta_shape *s = &dims->delta;
    struct lr_l2norm_args norm = {.x = mixed,
                                  .x_stride = dims->conv_channels,
                                  .n_rows = step->n_rows,
                                  .n_heads = s->n_k_heads,
                                  .head_dim = s->dk,
                                  .eps = 1e-6f,
                                  .scale = 1.0f / sqrtf((float)s->dk)};
    engine->ops->l2norm(&engine->exec, &norm);
    norm.x = lr_act_at(engine->ops, mixed, columns_of(dims).k);
    norm.scale = 1.0f;
    engine->ops->l2norm(&engine->exec, &norm);
}

static void make_gates(
    const struct lr_step *step, const struct lr_gated_delta_weights *w, const lr_act *in, float *beta, float *g)
{
    const struct lr_engine *engine = step->session->engine;
    struct columns c = columns_of(&engine->model.dims);
    struct lr_delta_gates_args gates = {.b = lr_act_at(engine->ops, in, c.b),
                                        .a = lr_act_at(engine->ops, in, c.a),
                                        .ba_stride = c.total,
                                        .a_log = w->a_log,
                                        .dt_bias = w->dt_bias,
                                        .beta = beta,
                                        .g = g,
                                        .n_rows = step->n_rows,
                                        .n_heads = engine->model.dims.delta.n_v_heads};
    engine->ops->delta_gates(&engine->exec, &gates);
}

/* o -> norm gated by z -> out projection, added to the residual stream. */
static void finish(const struct lr_step *step, const struct lr_gated_delta_weights *w, lr_act *o, const lr_act *in)
{
    const struct lr_engine *engine = step->session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_delta_shape *s = &dims->delta;
    struct columns c = columns_of(dims);
    struct lr_gated_rmsnorm_args norm = {.x = o,
                                         .x_stride = s->n_v_heads * s->dv,
                                         .z = lr_act_at(engine->ops, in, c.z),
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
                               .accumulate = 1,
                               .wide = 1};
    engine->ops->gemm(&engine->exec, &out);
}

static void project_in(const struct lr_step *step, const struct lr_gated_delta_weights *w, lr_act *in)
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
    int64_t n = step->n_rows, channels = dims->conv_channels, tail = (int64_t)lr_tail_elements(dims);
    const struct lr_kernel_ops *ops = engine->ops;
    float *session_state = session->states + (size_t)layer->mixer_index * lr_state_floats(dims);
    lr_act *session_tail = lr_act_at(ops, session->tails, layer->mixer_index * tail);

    lr_act *in = lr_step_act(session, n * c.total);
    project_in(step, w, in);

    lr_act *tails = lr_step_act(session, engine->links->size * tail);
    struct lr_comm_request tails_request = {0};
    LR_TRY(gather_tails(step, in, c.total, tails, &tails_request, err));
    float *beta = LR_STEP_TENSOR(session, float, n * s->n_v_heads);
    float *g = LR_STEP_TENSOR(session, float, n * s->n_v_heads);
    make_gates(step, w, in, beta, g);
    LR_TRY(lr_comm_wait(engine->links, &tails_request, err));

    int rank = engine->links->rank;
    lr_act *mixed = lr_step_act(session, n * channels);
    struct lr_conv_args conv = {.x = in,
                                .x_stride = c.total,
                                .w = w->conv,
                                .tail = rank > 0 ? lr_act_at(ops, tails, (rank - 1) * tail) : session_tail,
                                .y = mixed,
                                .y_stride = channels,
                                .n_rows = n,
                                .n_channels = channels,
                                .n_taps = dims->conv_taps,
                                .activation = dims->activation};
    if (n > 0)
        engine->ops->conv(&engine->exec, &conv);
    advance_tail(step, tails, session_tail);
    normalise_qk(step, mixed);

    float *m = LR_STEP_TENSOR(session, float, s->n_v_heads * s->dk * s->dk);
    float *b = LR_STEP_TENSOR(session, float, lr_state_floats(dims));
    float *s_in = LR_STEP_TENSOR(session, float, lr_state_floats(dims));
    float *s_out = LR_STEP_TENSOR(session, float, lr_state_floats(dims));
    struct lr_delta_segment_args segment = {.shape = *s,
                                            .q = mixed,
                                            .k = lr_act_at(ops, mixed, c.k),
                                            .v = lr_act_at(ops, mixed, c.v),
                                            .qkv_stride = channels,
                                            .g = g,
                                            .beta = beta,
                                            .n_rows = n,
                                            .work = LR_STEP_TENSOR(session, float, ops->delta_work_floats(*s, n))};
    if (n > 0)
        ops->delta_summary(&engine->exec, &segment, m, b);
    struct passes passes = {0};
    LR_TRY(scan_states(step, session_state, m, b, s_in, s_out, &passes, err));
    if (n > 0) {
        lr_act *o = lr_step_act(session, n * s->n_v_heads * s->dv);
        ops->delta_output(&engine->exec, &segment, s_in, o, s->n_v_heads * s->dv);
        finish(step, w, o, in);
    }
    return end_passes(step, &passes, err);
}

/* Slice by slice: every fork's convolution moves on by one token. */
static void convolve_forks(
    const struct lr_step *step, const struct lr_layer *layer, const lr_act *in, int64_t in_stride, lr_act *mixed)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_kernel_ops *ops = engine->ops;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_batch *batch = step->batch;
    lr_act **tails = LR_STEP_TABLE(session, lr_act *, batch->n_forks);
    for (int64_t f = 0; f < batch->n_forks; f++)
        tails[f] = lr_act_at(ops, batch->forks[f]->tails, layer->mixer_index * (int64_t)lr_tail_elements(dims));
    for (int64_t j = 0; j < batch->n_slices; j++) {
        struct lr_conv_step_args conv = {.x = lr_act_at(ops, in, batch->slice_first[j] * in_stride),
                                         .x_stride = in_stride,
                                         .w = layer->delta.conv,
                                         .tails = tails,
                                         .y = lr_act_at(ops, mixed, batch->slice_first[j] * dims->conv_channels),
                                         .y_stride = dims->conv_channels,
                                         .n_rows = lr_batch_slice_rows(batch, j),
                                         .n_channels = dims->conv_channels,
                                         .n_taps = dims->conv_taps,
                                         .activation = dims->activation};
        ops->conv_step(&engine->exec, &conv);
    }
}

static enum lr_status extend(struct lr_step *step, const struct lr_layer *layer, struct lr_error *err)
{
    (void)err;
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    const struct lr_kernel_ops *ops = engine->ops;
    const struct lr_model_dims *dims = &engine->model.dims;
    const struct lr_delta_shape *s = &dims->delta;
    const struct lr_gated_delta_weights *w = &layer->delta;
    const struct lr_batch *batch = step->batch;
    struct columns c = columns_of(dims);
    int64_t n = step->n_rows, channels = dims->conv_channels, width = s->n_v_heads * s->dv;

    lr_act *in = lr_step_act(session, n * c.total);
    project_in(step, w, in);
    lr_act *mixed = lr_step_act(session, n * channels);
    convolve_forks(step, layer, in, c.total, mixed);
    float *beta = LR_STEP_TENSOR(session, float, n * s->n_v_heads);
    float *g = LR_STEP_TENSOR(session, float, n * s->n_v_heads);
    normalise_qk(step, mixed);
    make_gates(step, w, in, beta, g);

    lr_act *o = lr_step_act(session, n * width);
    float **states = LR_STEP_TABLE(session, float *, batch->n_forks);
    for (int64_t f = 0; f < batch->n_forks; f++)
        states[f] = batch->forks[f]->states + (size_t)layer->mixer_index * lr_state_floats(dims);
    for (int64_t j = 0; j < batch->n_slices; j++) {
        int64_t row = batch->slice_first[j];
        const lr_act *q = lr_act_at(ops, mixed, row * channels);
        struct lr_delta_step_args args = {.shape = *s,
                                          .q = q,
                                          .k = lr_act_at(ops, q, c.k),
                                          .v = lr_act_at(ops, q, c.v),
                                          .qkv_stride = channels,
                                          .g = g + row * s->n_v_heads,
                                          .beta = beta + row * s->n_v_heads,
                                          .states = states,
                                          .o = lr_act_at(ops, o, row * width),
                                          .o_stride = width,
                                          .n_rows = lr_batch_slice_rows(batch, j)};
        ops->delta_step(&engine->exec, &args);
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
