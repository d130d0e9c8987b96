#include "client/reading.h"

#include "base/file.h"
#include "client/signals.h"
#include "client/world.h"

#include <stdlib.h>

static const size_t max_document_bytes = (size_t)16 << 30;

const char *lr_attention_text(const struct lr_job *job)
{
    return job->attention == LR_ATTENTION_SPARSE ? "sparse" : "full";
}

const char *lr_memory_text(const struct lr_job *job, const struct lr_memory_use *uses)
{
    static char text[200];
    const struct lr_memory_use *most = uses;
    for (int r = 1; r < job->comm->size; r++)
        if (uses[r].taken_bytes > most->taken_bytes)
            most = &uses[r];
    int n = snprintf(text, sizeof text, "a session's %smemory: %s planned, %s reserved, %s taken",
                     job->engine.device_name[0] ? "GPU " : "", lr_bytes_text((int64_t)most->planned_bytes),
                     lr_bytes_text((int64_t)most->reserved_bytes), lr_bytes_text((int64_t)most->taken_bytes));
    if (most->host_slabs > 0)
        snprintf(text + n, sizeof text - (size_t)n, "; %s of host memory for keys and values",
                 lr_bytes_text((int64_t)most->host_reserved_bytes));
    return text;
}

json_t *lr_memory_json(const struct lr_memory_use *uses, int n_workers)
{
    json_t *memory = json_array();
    for (int r = 0; r < n_workers; r++)
        json_array_append_new(memory,
                              json_pack("{s:I, s:I, s:I, s:I, s:I}", "planned_bytes", (json_int_t)uses[r].planned_bytes,
                                        "reserved_bytes", (json_int_t)uses[r].reserved_bytes, "taken_bytes",
                                        (json_int_t)uses[r].taken_bytes, "host_planned_bytes",
                                        (json_int_t)uses[r].host_planned_bytes, "host_reserved_bytes",
                                        (json_int_t)uses[r].host_reserved_bytes));
    return memory;
}

enum lr_status lr_read_document(struct lr_job *job,
                                const char *path,
                                const struct lr_settings *settings,
                                struct lr_token_buffer *ids,
                                struct lr_error *err)
{
    char *text;
    size_t n_bytes;
    LR_TRY(lr_file_read(path, max_document_bytes, &text, &n_bytes, err));
    enum lr_status status = LR_OK;
    struct lr_error why;
    if (n_bytes == 0)
        status = lr_fail(err, LR_INVALID, "the document %s is empty", path);
    else if (lr_tokenizer_encode(job->tokenizer, text, n_bytes, settings->parse_special ? LR_TOKENIZE_PARSE_SPECIAL : 0,
                                 ids, &why) != LR_OK)
        status = lr_fail(err, why.status, "the document %s: %s", path, why.message);
    free(text);
    return status;
}

static void wave_done(void *context, const struct lr_wave_report *report)
{
    struct lr_reading *reading = context;
    char phase[64];
    snprintf(phase, sizeof phase, "wave %lld of %lld", (long long)report->waves_done + 1,
             (long long)report->waves_total);
    lr_signals_phase(report->waves_done < report->waves_total ? phase : "the last wave");
    if (!reading->root)
        return;
    snprintf(phase, sizeof phase, "wave %lld/%lld", (long long)report->waves_done, (long long)report->waves_total);
    lr_progress_update(&reading->progress, report->tokens_done, phase);
}

static void announce(const struct lr_reading *reading, const struct lr_job *job)
{
    if (!reading->root || reading->settings->quiet)
        return;
    int automatic = job->options.attention == LR_CHOOSE_AUTO, sparse = job->attention == LR_ATTENTION_SPARSE;
    const struct lr_engine *engine = &job->engine;
    fprintf(stderr, "%s tokens, %d worker%s", lr_number_text(reading->n_tokens), job->comm->size,
            job->comm->size == 1 ? "" : "s");
    if (engine->device_name[0])
        fprintf(stderr, " on %s%s%s", engine->device_name, job->comm->size > 1 ? " over " : "",
                job->comm->size > 1 ? lr_comm_transport(engine->links) : "");
    else
        fprintf(stderr, " of %d thread%s", job->options.n_threads, job->options.n_threads == 1 ? "" : "s");
    fprintf(stderr, ", %s attention%s, experts %s\n", sparse ? "sparse" : "full",
            !automatic ? ""
            : sparse   ? " (auto: more than 131,072 tokens)"
                       : " (auto: up to 131,072 tokens)",
            engine->experts_replicated ? "replicated" : "sharded");
    fflush(stderr);
}

/* Where keys and values lie, if not all in one place. */
static void announce_tiers(const struct lr_reading *reading, const struct lr_job *job)
{
    struct lr_memory_use use;
    lr_session_memory(job->session, &use);
    if (!reading->root || reading->settings->quiet || use.host_slabs == 0)
        return;
    fprintf(stderr, "keys and values: %s in %s memory, %s in host memory (%lld of %lld segments of a worker)\n",
            lr_bytes_text((int64_t)use.kv_bytes), job->engine.device_name[0] ? "GPU" : "the backend's",
            lr_bytes_text((int64_t)use.host_planned_bytes), (long long)use.host_slabs, (long long)use.slabs);
    fflush(stderr);
}

enum lr_status lr_reading_run(struct lr_reading *reading,
                              struct lr_job *job,
                              const struct lr_token_buffer *document,
                              int64_t max_forks,
                              int64_t max_fork_tokens,
                              struct lr_error *err)
{
    reading->root = job->comm->rank == 0;
    reading->n_tokens = document->n_ids;
    LR_TRY(lr_comm_broadcast(job->comm, "document length", 0, &reading->n_tokens, sizeof reading->n_tokens, err));
    struct lr_job_document input = {
        .ids = document->ids, .n_ids = reading->n_tokens, .max_forks = max_forks, .max_fork_tokens = max_fork_tokens};
    struct lr_session_hooks hooks = {.on_wave = wave_done,
                                     .wave_context = reading,
                                     .on_logits = reading->on_logits,
                                     .logits_context = reading->logits_context,
                                     .positions = reading->positions,
                                     .n_positions = reading->n_positions};
    lr_job_choose_attention(job, reading->n_tokens);
    announce(reading, job);
    LR_TRY(lr_job_open_session(job, &input, &hooks, err));
    announce_tiers(reading, job);
    int64_t wave_tokens = lr_job_segment_tokens(job) * job->comm->size;
    char phase[64];
    snprintf(phase, sizeof phase, "wave 1 of %lld", (long long)((reading->n_tokens + wave_tokens - 1) / wave_tokens));
    lr_signals_phase(phase);
    lr_progress_begin(&reading->progress, reading->root && !reading->settings->quiet, lr_world_terminal_columns(),
                      "reading", "tokens", reading->n_tokens);
    enum lr_status status = lr_job_read(job, &input, err);
    lr_progress_end(&reading->progress);
    return status;
}
