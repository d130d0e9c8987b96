/* Waves: the document goes through all layers, one segment per worker at a time. */
#include "worker/session_impl.h"

#include <math.h>
#include <string.h>

/* Rows of logits that travel to worker 0 at once. */
enum { LOGITS_ROWS = 128 };

enum lr_status lr_step_begin(struct lr_step *step, const int32_t *ids, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_model *model = &engine->model;
    const struct lr_model_dims *dims = &model->dims;
    int64_t n = step->n_rows, n_freq = dims->rotary_dim / 2;
    step->cos = LR_STEP_TENSOR(session, float, n *n_freq);
    step->sin = LR_STEP_TENSOR(session, float, n *n_freq);
    step->x = LR_STEP_TENSOR(session, float, n * dims->d);
    step->h = lr_step_act(session, n * dims->d);
    if (!step->h)
        return lr_fail(err, LR_INTERNAL, "workspace for %lld rows was not planned", (long long)n);
    if (dims->n_attention_layers > 0)
        engine->ops->rope_table(&engine->exec, step->positions, n, model->inv_freq, n_freq, dims->rope_factor,
                                step->cos, step->sin);
    engine->ops->embed(&engine->exec, model->embed, model->embed_dtype, dims->d, ids, n, step->x);
    return LR_OK;
}

static void norm(const struct lr_step *step, const float *w)
{
    const struct lr_engine *engine = step->session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    struct lr_rmsnorm_args args = {.x = step->x,
                                   .x_stride = dims->d,
                                   .w = w,
                                   .y = step->h,
                                   .y_stride = dims->d,
                                   .n_rows = step->n_rows,
                                   .n_cols = dims->d,
                                   .eps = dims->norm_eps,
                                   .plus_one = 1};
    if (step->n_rows > 0)
        engine->ops->rmsnorm(&engine->exec, &args);
}

enum lr_status lr_step_layers(struct lr_step *step, struct lr_error *err)
{
    struct lr_session *session = step->session;
    const struct lr_model *model = &session->engine->model;
    for (int64_t i = 0; i < model->dims.n_layers; i++) {
        const struct lr_layer *layer = &model->layers[i];
        const struct lr_layer_ops *mixer = lr_layer_ops_of(layer->mixer);
        struct lr_step_mark mark = lr_step_mark(session);
        norm(step, layer->norm1);
        LR_TRY(step->wave ? mixer->prefill(step, layer, err) : mixer->extend(step, layer, err));
        lr_step_rewind(session, mark);
        norm(step, layer->norm2);
        LR_TRY(step->wave ? lr_ffn_prefill(step, layer, err) : lr_ffn_extend(step, layer, err));
        lr_step_rewind(session, mark);
    }
    return LR_OK;
}

enum lr_status lr_step_view(
    struct lr_session *session, const void *tensor, size_t size_bytes, const void **view, struct lr_error *err)
{
    const struct lr_engine *engine = session->engine;
    *view = tensor;
    if (engine->ops->host_memory)
        return LR_OK;
    char *copy = LR_STEP_TABLE(session, char, size_bytes);
    if (!copy)
        return lr_fail(err, LR_INTERNAL, "a table of %zu bytes was not planned", size_bytes);
    *view = copy;
    return engine->ops->memory.download(&engine->exec, copy, tensor, size_bytes, err);
}

void lr_step_logits(struct lr_engine *engine, const float *x, int64_t n_rows, lr_act *normed, float *logits)
{
    const struct lr_model *model = &engine->model;
    struct lr_rmsnorm_args norm_args = {.x = x,
                                        .x_stride = model->dims.d,
                                        .w = model->final_norm,
                                        .y = normed,
                                        .y_stride = model->dims.d,
                                        .n_rows = n_rows,
                                        .n_cols = model->dims.d,
                                        .eps = model->dims.norm_eps,
                                        .plus_one = 1};
    engine->ops->rmsnorm(&engine->exec, &norm_args);
    struct lr_gemm_args head = {.a = normed,
                                .a_stride = model->dims.d,
                                .w = &model->head,
                                .y = logits,
                                .y_stride = model->dims.vocab,
                                .n_rows = n_rows,
                                .wide = 1};
    engine->ops->gemm(&engine->exec, &head);
}

enum lr_status lr_fail_logits(const struct lr_engine *engine, int64_t position, struct lr_error *err)
{
    return lr_fail(err, LR_CORRUPT, "the logits of position %lld hold NaN or infinity%s", (long long)position,
                   engine->ops->act_dtype == LR_F16
                       ? ": activations exceeded float16's range: use --act-dtype bf16"
                       : "");
}

enum lr_status lr_sink_logits(const struct lr_engine *engine,
                              lr_logits_sink *sink,
                              void *context,
                              int64_t position,
                              const float *logits,
                              struct lr_error *err)
{
    float largest = -INFINITY;
    int n_bad = 0;
    for (int64_t i = 0; i < engine->model.dims.vocab; i++) {
        n_bad += isnan(logits[i]) != 0;
        largest = logits[i] > largest ? logits[i] : largest;
    }
    if (n_bad > 0 || isinf(largest))
        return lr_fail_logits(engine, position, err);
    return sink(context, position, logits, err);
}

/* ---- logits of document positions
 * --------------------------------------------------------------------------------- */

/* The i-th wanted position at or behind `from`; -1 when there is none before `end`. */
static int64_t wanted_position(const struct lr_session *session, int64_t index, int64_t from, int64_t end)
{
    const struct lr_session_hooks *hooks = &session->hooks;
    int64_t position = hooks->positions ? (index < hooks->n_positions ? hooks->positions[index] : end) : from + index;
    return position < end ? position : -1;
}

/* Up to LOGITS_ROWS wanted positions of one worker's segment, from the session's cursor on. */
static int64_t next_batch(struct lr_session *session, int64_t start, int64_t end, int64_t *rows)
{
    int64_t n = 0;
    while (n < LOGITS_ROWS) {
        int64_t position = wanted_position(session, session->next_logit, 0, end);
        if (position < 0)
            break;
        rows[n++] = position - start;
        session->next_logit++;
    }
    return n;
}

static enum lr_status
send_logits(struct lr_step *step, int owner, const int64_t *rows, int64_t n, int64_t start, struct lr_error *err)
{
    struct lr_session *session = step->session;
    struct lr_engine *engine = session->engine;
    const struct lr_kernel_ops *ops = engine->ops;
    const struct lr_model_dims *dims = &engine->model.dims;
    struct lr_step_mark mark = lr_step_mark(session);
    int rank = engine->comm->rank;
    float *logits = LR_STEP_TENSOR(session, float, n * dims->vocab);
    if (rank == owner) {
        float *x = LR_STEP_TENSOR(session, float, n * dims->d);
        lr_act *normed = lr_step_act(session, n * dims->d);
        int64_t *index = LR_STEP_TENSOR(session, int64_t, n);
        ops->memory.upload(&engine->exec, index, rows, (size_t)n * sizeof *rows);
        ops->gather_rows(&engine->exec, step->x, (size_t)dims->d * sizeof *x, index, n, x);
        lr_step_logits(engine, x, n, normed, logits);
    }
    size_t bytes = (size_t)(n * dims->vocab) * sizeof(float);
    if (owner != 0)
        LR_TRY(lr_comm_pass(engine->links, "logits", owner, logits, 0, logits, bytes, err));
    enum lr_status status = LR_OK;
    const void *view = logits;
    if (rank == 0)
        status = lr_step_view(session, logits, bytes, &view, err);
    for (int64_t i = 0; rank == 0 && i < n && status == LR_OK; i++)
        status = lr_sink_logits(engine, session->hooks.on_logits, session->hooks.logits_context, start + rows[i],
                                (const float *)view + i * dims->vocab, err);
    lr_step_rewind(session, mark);
    return status;
}

static enum lr_status report_logits(struct lr_step *step, struct lr_error *err)
{
    struct lr_session *session = step->session;
    int64_t rows[LOGITS_ROWS];
    enum lr_status status = LR_OK;
    for (int r = 0; r < step->wave->n_active; r++) {
        int64_t start = lr_wave_start(step->wave, r);
        int64_t end = start + lr_wave_length(step->wave, r);
        for (int64_t n; status == LR_OK && (n = next_batch(session, start, end, rows)) > 0;)
            status = send_logits(step, r, rows, n, start, err);
    }
    /* Only worker 0's sink can fail: the others learn of it here. */
    return lr_agree(session->engine->comm, status, err);
}

enum lr_status
lr_prefill_wave(struct lr_session *session, const struct lr_wave *wave, const int32_t *ids, struct lr_error *err)
{
    struct lr_engine *engine = session->engine;
    lr_step_rewind(session, (struct lr_step_mark){0});
    int64_t start = lr_wave_start(wave, engine->comm->rank);
    struct lr_step step = {.session = session, .wave = wave, .n_rows = lr_wave_length(wave, engine->comm->rank)};
    int64_t *positions = LR_STEP_TABLE(session, int64_t, step.n_rows);
    for (int64_t i = 0; i < step.n_rows; i++)
        positions[i] = start + i;
    step.positions = positions;
    LR_TRY(lr_step_begin(&step, step.n_rows ? ids + (start - wave->first) : ids, err));
    LR_TRY(lr_step_layers(&step, err));
    session->n_tokens = wave->end;
    return session->hooks.on_logits ? report_logits(&step, err) : LR_OK;
}
