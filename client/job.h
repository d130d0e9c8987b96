/* The work that run, needle and logits share: open a model, read a document once, ask questions. Every worker of the
 * world runs the same calls; the document's text and the answers are on worker 0 only. */
#ifndef LR_CLIENT_JOB_H
#define LR_CLIENT_JOB_H

#include "worker/generate.h"
#include "worker/weights/tokenizer.h"

enum lr_attention_choice { LR_CHOOSE_AUTO, LR_CHOOSE_FULL, LR_CHOOSE_SPARSE };

/* auto: the type of the activations */
enum lr_kv_choice { LR_KV_AUTO, LR_KV_F32, LR_KV_BF16, LR_KV_F16 };

/* auto: full attention up to this many document tokens, sparse beyond. */
enum { LR_AUTO_FULL_TOKENS = 131072 };

struct lr_job_options {
    const char *model_dir;
    int n_threads; /* a worker */
    int spin_us;
    enum lr_device device;
    enum lr_transport transport;
    enum lr_act_choice act;
    enum lr_isa isa;
    enum lr_experts_placement experts;
    enum lr_attention_choice attention;
    enum lr_kv_choice kv_dtype;
    int64_t segment_tokens; /* 0: the device's default */
    int64_t top_k_blocks, decode_pages;
    int64_t kv_device_bytes, kv_host_bytes; /* 0: what is free */
};

struct lr_job {
    struct lr_comm *comm;
    struct lr_job_options options;
    struct lr_engine engine;
    struct lr_tokenizer *tokenizer; /* NULL where the job needs none */
    struct lr_session *session;
    enum lr_attention_mode attention; /* chosen, once the document's length is known */
    double load_seconds, prefill_seconds, decode_seconds;
};

/* Loads the model, and the tokenizer if it is wanted. Collective. */
LR_MUST_USE enum lr_status lr_job_open(struct lr_job *job,
                                       const struct lr_job_options *options,
                                       struct lr_comm *comm,
                                       int with_tokenizer,
                                       struct lr_error *err);
void lr_job_close(struct lr_job *job);

/* Tokens of a text that ends up on every worker: worker 0 brings ids (n_ids may differ elsewhere); the others get a
 * copy. The caller frees *shared. `mine` is worker 0's outcome of making them. Collective. */
LR_MUST_USE enum lr_status lr_job_share_ids(struct lr_job *job,
                                            const int32_t *ids,
                                            int64_t n_ids,
                                            enum lr_status mine,
                                            int32_t **shared,
                                            int64_t *n_shared,
                                            struct lr_error *err);

/* Tokens of a segment: what was asked for, or the device's default. */
int64_t lr_job_segment_tokens(const struct lr_job *job);

/* Fills job->attention for a document of n_tokens. */
void lr_job_choose_attention(struct lr_job *job, int64_t n_tokens);

/* A document and the questions that a session is for. */
struct lr_job_document {
    const int32_t *ids; /* worker 0 */
    int64_t n_ids;      /* on every worker */
    int64_t max_forks, max_fork_tokens;
};
/* Before there is a document: LR_NO_MEMORY with the numbers where one of n_ids tokens would not fit. Collective. */
LR_MUST_USE enum lr_status
lr_job_check_memory(struct lr_job *job, const struct lr_job_document *document, struct lr_error *err);

/* Opens the session; then the document goes through it. Collective. */
LR_MUST_USE enum lr_status lr_job_open_session(struct lr_job *job,
                                               const struct lr_job_document *document,
                                               const struct lr_session_hooks *hooks,
                                               struct lr_error *err);
LR_MUST_USE enum lr_status
lr_job_read(struct lr_job *job, const struct lr_job_document *document, struct lr_error *err);

/* Of every worker's session, [size], on all. Collective. */
LR_MUST_USE enum lr_status lr_job_memory(struct lr_job *job, struct lr_memory_use *uses, struct lr_error *err);

/* Peak resident bytes of every worker, [size], on all. Collective. */
LR_MUST_USE enum lr_status lr_job_peak_rss(struct lr_job *job, int64_t *bytes, struct lr_error *err);

/* Rows that each worker's experts have computed, [size], on all. Collective. */
LR_MUST_USE enum lr_status lr_job_expert_rows(struct lr_job *job, int64_t *rows, struct lr_error *err);

#endif
