/* Forks: questions and answers from the end of a sealed document.
 *
 * Rows of several forks go through the layers together, time-major (see lr_batch). The dense parts
 * are computed by every worker; attention over the document's KV and experts stay where they are. A
 * row's result does not depend on its neighbours, so a question gets the same answer alone and
 * among others. */
#include "worker/kv_tier.h"

#include <stdlib.h>
#include <string.h>

enum lr_status lr_session_fork(struct lr_session *session, struct lr_fork **out, struct lr_error *err)
{
    if (!session->sealed)
        return lr_fail(err, LR_INVALID, "a fork needs a sealed document");
    for (int64_t i = 0; i < session->options.max_forks; i++) {
        struct lr_fork *fork = &session->forks[i];
        if (fork->in_use)
            continue;
        fork->in_use = 1;
        lr_fork_rewind(fork);
        *out = fork;
        return LR_OK;
    }
    return lr_fail(err, LR_FULL, "all %lld forks of the session are in use", (long long)session->options.max_forks);
}

void lr_fork_rewind(struct lr_fork *fork)
{
    struct lr_session *session = fork->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_memory_ops *memory = &engine->ops->memory;
    const struct lr_model_dims *dims = &engine->model.dims;
    size_t layers = (size_t)dims->n_delta_layers;
    memory->copy(&engine->exec, fork->states, session->states, layers * lr_state_floats(dims) * sizeof(float));
    memory->copy(&engine->exec, fork->tails, session->tails,
                 layers * lr_tail_elements(dims) * lr_act_bytes(engine->ops));
    fork->position = session->n_tokens;
    if (!fork->kv)
        return;
    size_t layer_bytes = (size_t)session->fork_blocks * session->block_bytes;
    memory->zero(&engine->exec, fork->kv, (size_t)dims->n_attention_layers * layer_bytes);
    memory->copy_rows(&engine->exec, fork->kv, layer_bytes, session->edge_blocks, session->block_bytes,
                      session->block_bytes, dims->n_attention_layers);
}

void lr_fork_release(struct lr_fork *fork)
{
    fork->in_use = 0;
}

int64_t lr_fork_position(const struct lr_fork *fork)
{
    return fork->position;
}

/* ---- batches
 * ------------------------------------------------------------------------------------------------------
 */

/* The inputs of a call, sorted by falling number of tokens. */
struct entry {
    const struct lr_fork_input *input;
    int64_t source; /* its place in the caller's array */
    int64_t end;    /* position behind its last token */
};

static int more_tokens_first(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    if (x->input->n_ids != y->input->n_ids)
        return x->input->n_ids > y->input->n_ids ? -1 : 1;
    return x->source < y->source ? -1 : 1;
}

static enum lr_status check_inputs(const struct lr_session *session,
                                   const struct lr_fork_input *inputs,
                                   int64_t n_inputs,
                                   struct lr_error *err)
{
    int64_t vocab = session->engine->model.dims.vocab;
    int64_t end = session->n_tokens + session->options.max_fork_tokens;
    for (int64_t i = 0; i < n_inputs; i++) {
        const struct lr_fork_input *input = &inputs[i];
        if (input->n_ids < 1)
            return lr_fail(err, LR_INVALID, "question %lld has no tokens", (long long)i + 1);
        if (input->fork->position + input->n_ids > end)
            return lr_fail(err, LR_INVALID,
                           "question %lld and its answer would take %lld tokens, more than the %lld "
                           "that were planned for",
                           (long long)i + 1, (long long)(input->fork->position + input->n_ids - session->n_tokens),
                           (long long)session->options.max_fork_tokens);
        for (int64_t j = 0; j < input->n_ids; j++)
            if (input->ids[j] < 0 || input->ids[j] >= vocab)
                return lr_fail(err, LR_INVALID, "token id %d of question %lld is outside the vocabulary of %lld",
                               input->ids[j], (long long)i + 1, (long long)vocab);
    }
    return LR_OK;
}

/* What one call of lr_forks_extend carries through its steps. */
struct extension {
    struct lr_session *session;
    struct entry *entries; /* [n] sorted */
    int64_t n;
    struct lr_fork_output output;
};

/* Slices [first, end) of the sorted inputs whose rows fit one step. */
static int64_t choose_slices(const struct extension *extension, int64_t first, int64_t *slice_first)
{
    int64_t slice = first, rows = 0, active = extension->n;
    int64_t most = extension->entries[0].input->n_ids;
    slice_first[0] = 0;
    while (slice < most) {
        while (active > 0 && extension->entries[active - 1].input->n_ids <= slice)
            active--;
        if (rows > 0 && rows + active > extension->session->max_rows)
            break;
        rows += active;
        slice_first[++slice - first] = rows;
    }
    return slice;
}

/* Logits of every row of a single fork's step, to the caller's sink. */
static enum lr_status sink_rows(const struct extension *extension, const struct lr_step *step, struct lr_error *err)
{
    struct lr_session *session = extension->session;
    struct lr_engine *engine = session->engine;
    const struct lr_model_dims *dims = &engine->model.dims;
    enum lr_status status = LR_OK;
    lr_act *normed = lr_step_act(session, dims->d);
    float *logits = LR_STEP_TENSOR(session, float, dims->vocab);
    for (int64_t i = 0; engine->comm->rank == 0 && i < step->n_rows && status == LR_OK; i++) {
        struct lr_step_mark mark = lr_step_mark(session);
        const void *view;
        lr_step_logits(engine, step->x + i * dims->d, 1, normed, logits);
        status = lr_step_view(session, logits, (size_t)dims->vocab * sizeof *logits, &view, err);
        if (status == LR_OK)
            status = lr_sink_logits(engine, extension->output.sink, extension->output.sink_context, step->positions[i],
                                    view, err);
        lr_step_rewind(session, mark);
    }
    return lr_agree(engine->comm, status, err);
}

/* Keeps the residual rows of the tokens that were their entries' last: those of entries [ended, n_forks), because
 * entries are sorted by falling length. */
static void keep_last_rows(const struct extension *extension, const struct lr_step *step, int64_t first)
{
    struct lr_session *session = extension->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_batch *batch = step->batch;
    int64_t d = engine->model.dims.d, ended = batch->n_forks;
    int64_t *rows = LR_STEP_TABLE(session, int64_t, batch->n_forks);
    for (int64_t f = batch->n_forks - 1; f >= 0; f--) {
        int64_t tokens = lr_batch_fork_tokens(batch, f);
        if (first + tokens != extension->entries[f].input->n_ids)
            break;
        rows[f] = batch->slice_first[tokens - 1] + f;
        ended = f;
    }
    int64_t n = batch->n_forks - ended;
    if (n == 0)
        return;
    int64_t *index = LR_STEP_TENSOR(session, int64_t, n);
    engine->ops->memory.upload(&engine->exec, index, rows + ended, (size_t)n * sizeof *rows);
    engine->ops->gather_rows(&engine->exec, step->x, (size_t)d * sizeof(float), index, n,
                             session->last_rows + ended * d);
}

/* What the head makes of the entries' last tokens; backend memory, in the order of entries. Empty where not wanted. */
struct head {
    float *logits; /* [n, vocab] */
    int32_t *next; /* [n] */
};

static struct head launch_head(const struct extension *extension)
{
    struct lr_session *session = extension->session;
    struct lr_engine *engine = session->engine;
    const struct lr_fork_output *output = &extension->output;
    const struct lr_model_dims *dims = &engine->model.dims;
    int64_t n = extension->n;
    struct head head = {NULL, NULL};
    if (engine->comm->rank != 0 || (!output->next && !output->logits))
        return head;
    lr_act *normed = lr_step_act(session, n * dims->d);
    head.logits = LR_STEP_TENSOR(session, float, n * dims->vocab);
    lr_step_logits(engine, session->last_rows, n, normed, head.logits);
    if (!output->next)
        return head;
    head.next = LR_STEP_TENSOR(session, int32_t, n);
    struct lr_sampling *sampling = LR_STEP_TABLE(session, struct lr_sampling, n);
    int64_t *positions = LR_STEP_TABLE(session, int64_t, n);
    for (int64_t i = 0; i < n; i++) {
        sampling[i] = *output->sampling;
        positions[i] = extension->entries[i].end;
    }
    struct lr_sample_args args = {.logits = head.logits,
                                  .n_rows = n,
                                  .vocab = dims->vocab,
                                  .sampling = sampling,
                                  .positions = positions,
                                  .ids = head.next};
    engine->ops->sample(&engine->exec, &args);
    return head;
}

/* To the caller's arrays, in the caller's order. */
static enum lr_status take_head(const struct extension *extension, struct head head, struct lr_error *err)
{
    struct lr_session *session = extension->session;
    const struct lr_engine *engine = session->engine;
    const struct lr_fork_output *output = &extension->output;
    size_t row = (size_t)engine->model.dims.vocab;
    for (int64_t i = 0; head.logits && output->logits && i < extension->n; i++)
        LR_TRY(engine->ops->memory.download(&engine->exec, output->logits + (size_t)extension->entries[i].source * row,
                                            head.logits + (size_t)i * row, row * sizeof(float), err));
    if (!head.next)
        return LR_OK;
    int32_t *next = LR_STEP_TABLE(session, int32_t, extension->n);
    LR_TRY(engine->ops->memory.download(&engine->exec, next, head.next, (size_t)extension->n * sizeof *next, err));
    for (int64_t i = 0; i < extension->n; i++)
        output->next[extension->entries[i].source] = next[i];
    return LR_OK;
}

/* Whether a step can be one unit: it meets no other worker and asks the device nothing on the way, and its lists fit.
 */
static int is_unit(const struct lr_session *session)
{
    const struct lr_engine *engine = session->engine;
    int64_t blocks = engine->model.dims.n_attention_layers * (session->n_tokens / LR_KV_BLOCK_TOKENS);
    return engine->links->size == 1 && session->options.decode_pages == 0 && !lr_kv_is_tiered(session) &&
           blocks * (int64_t)sizeof(struct lr_kv_ref) < LR_UNIT_UPLOAD_BYTES / 2;
}

/* Runs slices [first, end) and moves the forks on. */
static enum lr_status run_slices(
    const struct extension *extension, int64_t first, int64_t end, const int64_t *slice_first, struct lr_error *err)
{
    struct lr_session *session = extension->session;
    int64_t n_rows = slice_first[end - first], n_forks = slice_first[1];
    lr_step_rewind(session, (struct lr_step_mark){0});
    struct lr_fork **forks = LR_STEP_TABLE(session, struct lr_fork *, n_forks);
    int64_t *positions = LR_STEP_TABLE(session, int64_t, n_rows);
    int32_t *ids = LR_STEP_TABLE(session, int32_t, n_rows);
    for (int64_t f = 0; f < n_forks; f++)
        forks[f] = extension->entries[f].input->fork;
    for (int64_t j = first; j < end; j++)
        for (int64_t f = 0, row = slice_first[j - first]; row < slice_first[j - first + 1]; f++, row++) {
            positions[row] = forks[f]->position + (j - first);
            ids[row] = extension->entries[f].input->ids[j];
        }
    struct lr_batch batch = {.forks = forks, .n_forks = n_forks, .n_slices = end - first, .slice_first = slice_first};
    struct lr_step step = {.session = session, .batch = &batch, .n_rows = n_rows, .positions = positions};
    const struct lr_engine *engine = session->engine;
    int unit = batch.n_slices == 1 && is_unit(session);
    if (unit)
        engine->ops->unit_begin(&engine->exec);
    LR_TRY(lr_step_begin(&step, ids, err));
    LR_TRY(lr_step_layers(&step, err));
    keep_last_rows(extension, &step, first);
    int is_last = end == extension->entries[0].input->n_ids;
    struct head head = is_last ? launch_head(extension) : (struct head){NULL, NULL};
    if (unit)
        LR_TRY(engine->ops->unit_end(&engine->exec, err));
    for (int64_t f = 0; f < n_forks; f++)
        forks[f]->position += lr_batch_fork_tokens(&batch, f);
    LR_TRY(take_head(extension, head, err));
    return extension->output.sink ? sink_rows(extension, &step, err) : LR_OK;
}

static enum lr_status run_extension(const struct extension *extension, int64_t *slice_first, struct lr_error *err)
{
    int64_t most = extension->entries[0].input->n_ids;
    for (int64_t first = 0; first < most;) {
        int64_t end = choose_slices(extension, first, slice_first);
        LR_TRY(run_slices(extension, first, end, slice_first, err));
        first = end;
    }
    return LR_OK;
}

enum lr_status lr_forks_extend(struct lr_session *session,
                               const struct lr_fork_input *inputs,
                               int64_t n_inputs,
                               const struct lr_fork_output *output,
                               struct lr_error *err)
{
    if (n_inputs == 0)
        return LR_OK;
    if (n_inputs < 0 || n_inputs > session->max_rows || (output && output->sink && n_inputs > 1))
        return lr_fail(err, LR_INVALID, "%lld forks in one call", (long long)n_inputs);
    LR_TRY(check_inputs(session, inputs, n_inputs, err));
    enum lr_status status = LR_OK;
    struct extension extension = {.session = session, .n = n_inputs};
    if (output)
        extension.output = *output;
    int64_t most = 0;
    for (int64_t i = 0; i < n_inputs; i++)
        most = lr_max_i64(most, inputs[i].n_ids);
    extension.entries = calloc((size_t)n_inputs, sizeof *extension.entries);
    int64_t *slice_first = calloc((size_t)(most > 0 ? most : 0) + 2, sizeof *slice_first);
    if (!extension.entries || !slice_first) {
        status = lr_fail(err, LR_NO_MEMORY, "no memory to extend %lld forks", (long long)n_inputs);
        goto free_extension;
    }
    for (int64_t i = 0; i < n_inputs; i++)
        extension.entries[i] =
            (struct entry){.input = &inputs[i], .source = i, .end = inputs[i].fork->position + inputs[i].n_ids};
    qsort(extension.entries, (size_t)n_inputs, sizeof *extension.entries, more_tokens_first);
    status = run_extension(&extension, slice_first, err);
free_extension:
    free(slice_first);
    free(extension.entries);
    return status;
}
