#include "client/job.h"

#include "base/clock.h"

#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

enum { FEED_TOKENS = 1 << 18 };

enum lr_status lr_job_open(struct lr_job *job,
                           const struct lr_job_options *options,
                           struct lr_comm *comm,
                           int with_tokenizer,
                           struct lr_error *err)
{
    *job = (struct lr_job){.comm = comm, .options = *options};
    double begin = lr_clock_seconds();
    struct lr_engine_options engine = {.model_dir = options->model_dir,
                                       .device = options->device,
                                       .transport = options->transport,
                                       .act = options->act,
                                       .isa = options->isa,
                                       .n_threads = options->n_threads,
                                       .spin_us = options->spin_us,
                                       .experts = options->experts};
    LR_TRY(lr_engine_open(&engine, comm, &job->engine, err));
    enum lr_status status = LR_OK;
    if (with_tokenizer)
        status = lr_tokenizer_load(options->model_dir, &job->tokenizer, err);
    status = lr_agree(comm, status, err);
    if (status != LR_OK)
        lr_job_close(job);
    job->load_seconds = lr_clock_seconds() - begin;
    return status;
}

void lr_job_close(struct lr_job *job)
{
    lr_session_close(job->session);
    lr_tokenizer_free(job->tokenizer);
    lr_engine_close(&job->engine);
    *job = (struct lr_job){0};
}

enum lr_status lr_job_share_ids(struct lr_job *job,
                                const int32_t *ids,
                                int64_t n_ids,
                                enum lr_status mine,
                                int32_t **shared,
                                int64_t *n_shared,
                                struct lr_error *err)
{
    LR_TRY(lr_agree(job->comm, job->comm->rank == 0 ? mine : LR_OK, err));
    LR_TRY(lr_comm_broadcast(job->comm, "number of tokens", 0, &n_ids, sizeof n_ids, err));
    int32_t *copy = malloc((size_t)(n_ids > 0 ? n_ids : 1) * sizeof *copy);
    enum lr_status status = LR_OK;
    if (!copy)
        status = lr_fail(err, LR_NO_MEMORY, "no memory for %lld tokens", (long long)n_ids);
    status = lr_agree(job->comm, status, err);
    if (status == LR_OK && job->comm->rank == 0 && n_ids > 0)
        memcpy(copy, ids, (size_t)n_ids * sizeof *copy);
    if (status == LR_OK)
        status = lr_comm_broadcast(job->comm, "tokens", 0, copy, (size_t)n_ids * sizeof *copy, err);
    if (status != LR_OK) {
        free(copy);
        return status;
    }
    *shared = copy;
    *n_shared = n_ids;
    return LR_OK;
}

void lr_job_choose_attention(struct lr_job *job, int64_t n_tokens)
{
    switch (job->options.attention) {
    case LR_CHOOSE_FULL:
        job->attention = LR_ATTENTION_FULL;
        break;
    case LR_CHOOSE_SPARSE:
        job->attention = LR_ATTENTION_SPARSE;
        break;
    case LR_CHOOSE_AUTO:
        job->attention = n_tokens > LR_AUTO_FULL_TOKENS ? LR_ATTENTION_SPARSE : LR_ATTENTION_FULL;
        break;
    }
}

/* Sends the document to all workers in portions and appends them; only worker 0 ever holds it whole. */
static enum lr_status feed(struct lr_job *job, const struct lr_job_document *document, struct lr_error *err)
{
    int32_t *portion = malloc(FEED_TOKENS * sizeof *portion);
    enum lr_status status = LR_OK;
    if (!portion)
        status = lr_fail(err, LR_NO_MEMORY, "no memory for a portion of the document");
    status = lr_agree(job->comm, status, err);
    for (int64_t first = 0; status == LR_OK && first < document->n_ids; first += FEED_TOKENS) {
        int64_t n = document->n_ids - first < FEED_TOKENS ? document->n_ids - first : FEED_TOKENS;
        if (job->comm->rank == 0)
            memcpy(portion, document->ids + first, (size_t)n * sizeof *portion);
        status = lr_comm_broadcast(job->comm, "document", 0, portion, (size_t)n * sizeof *portion, err);
        if (status == LR_OK)
            status = lr_session_append(job->session, portion, n, err);
    }
    free(portion);
    return status == LR_OK ? lr_session_seal(job->session, err) : status;
}

int64_t lr_job_segment_tokens(const struct lr_job *job)
{
    return job->options.segment_tokens ? job->options.segment_tokens : lr_default_segment_tokens(job->engine.ops);
}

static struct lr_session_options session_options(struct lr_job *job, const struct lr_job_document *document)
{
    lr_job_choose_attention(job, document->n_ids);
    const struct lr_kernel_ops *ops = job->engine.ops;
    const enum lr_dtype kv_dtypes[] = {ops->act_dtype, LR_F32, LR_BF16, LR_F16}; /* of enum lr_kv_choice */
    return (struct lr_session_options){
        .segment_tokens = lr_job_segment_tokens(job),
        .attention = job->attention,
        .window = LR_SPARSE_WINDOW,
        .sinks = LR_SPARSE_SINKS,
        .top_k_blocks = job->attention == LR_ATTENTION_SPARSE ? job->options.top_k_blocks : 0,
        .decode_pages = job->options.decode_pages,
        .kv_dtype = kv_dtypes[job->options.kv_dtype],
        .max_tokens = document->n_ids,
        .max_forks = document->max_forks,
        .max_fork_tokens = document->max_fork_tokens,
        .kv_device_bytes = (size_t)job->options.kv_device_bytes,
        .kv_host_bytes = (size_t)job->options.kv_host_bytes};
}

enum lr_status lr_job_check_memory(struct lr_job *job, const struct lr_job_document *document, struct lr_error *err)
{
    struct lr_session_options options = session_options(job, document);
    return lr_session_fit(&job->engine, &options, err);
}

enum lr_status lr_job_open_session(struct lr_job *job,
                                   const struct lr_job_document *document,
                                   const struct lr_session_hooks *hooks,
                                   struct lr_error *err)
{
    struct lr_session_options options = session_options(job, document);
    return lr_session_open(&job->engine, &options, hooks, &job->session, err);
}

enum lr_status lr_job_read(struct lr_job *job, const struct lr_job_document *document, struct lr_error *err)
{
    double begin = lr_clock_seconds();
    LR_TRY(feed(job, document, err));
    job->prefill_seconds = lr_clock_seconds() - begin;
    return LR_OK;
}

enum lr_status lr_job_memory(struct lr_job *job, struct lr_memory_use *uses, struct lr_error *err)
{
    struct lr_memory_use mine;
    lr_session_memory(job->session, &mine);
    return lr_comm_all_gather(job->comm, "memory", &mine, sizeof mine, uses, err);
}

enum lr_status lr_job_peak_rss(struct lr_job *job, int64_t *bytes, struct lr_error *err)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    int64_t mine = (int64_t)usage.ru_maxrss * 1024;
    return lr_comm_all_gather(job->comm, "peak memory", &mine, sizeof mine, bytes, err);
}

enum lr_status lr_job_expert_rows(struct lr_job *job, int64_t *rows, struct lr_error *err)
{
    int64_t mine = job->engine.local_expert_rows;
    return lr_comm_all_gather(job->comm, "expert rows", &mine, sizeof mine, rows, err);
}
