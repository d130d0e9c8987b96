/* A session: one document's timeline, spread over the workers, and the forks that ask questions of
 * it.
 *
 *   tokens   0 ........................... n_tokens | fork 0: question, answer ...
 *            |seg 0|seg 1|seg 2|seg 3| ... |part|    | fork 1: ...
 *   worker     0     1     0     1              (P = 2: segment s belongs to worker s mod P)
 *
 * Document tokens are appended in any portions and processed in waves of one segment per worker;
 * tokens that do not fill a wave are held back until they do or the document is sealed, so the
 * result never depends on the portions. After sealing, recurrent states and convolution tails are
 * everywhere, KV blocks stay with their owner, and forks may be made. Forks share the document's KV
 * and own their states and a tail of KV.
 *
 * State after a failure: the session is good for nothing but lr_session_close. */
#ifndef LR_WORKER_SESSION_H
#define LR_WORKER_SESSION_H

#include "worker/engine.h"

enum lr_attention_mode { LR_ATTENTION_FULL, LR_ATTENTION_SPARSE };

enum { LR_SPARSE_WINDOW = 1024, LR_SPARSE_SINKS = 128, LR_DEFAULT_SEGMENT_TOKENS = 4096 };
/* A GPU wants more rows at once. */
enum { LR_DEFAULT_DEVICE_SEGMENT_TOKENS = 65536 };

static inline int64_t lr_default_segment_tokens(const struct lr_kernel_ops *ops)
{
    return ops->host_memory ? LR_DEFAULT_SEGMENT_TOKENS : LR_DEFAULT_DEVICE_SEGMENT_TOKENS;
}

enum { LR_MIN_SEGMENT_TOKENS = 128, LR_MAX_SEGMENT_TOKENS = 65536 };

struct lr_session_options {
    int64_t segment_tokens; /* a power of two, 128 .. 65536 */
    enum lr_attention_mode attention;
    int64_t window, sinks;   /* sparse */
    int64_t top_k_blocks;    /* sparse: further blocks per query block and KV head */
    int64_t decode_pages;    /* forks: 0 = attend to everything, else the best N pages (Quest) */
    enum lr_dtype kv_dtype;  /* CPU: LR_F32 or LR_BF16; a device: the type of its activations */
    int64_t max_tokens;      /* document */
    int64_t max_forks;       /* alive at once */
    int64_t max_fork_tokens; /* question and answer of one fork */
    size_t kv_device_bytes;  /* of the backend's memory for the document's keys and values; 0: what is free */
    size_t kv_host_bytes;    /* of host memory for those that do not fit; 0: what is free */
    int64_t host_slabs;      /* of each layer: how many do not fit (see kv_tier.h); lr_session_open fills it in */
};

/* What a session on this worker needs, in bytes; see lr_session_plan. */
struct lr_memory_plan {
    size_t weights_bytes, kv_bytes, state_bytes, fork_bytes, workspace_bytes; /* of the backend's memory */
    size_t kv_host_bytes;                                                     /* keys and values behind it */
    size_t host_bytes;                                                        /* of ordinary host memory */
    size_t total_bytes;        /* of the backend's memory, and kv_host_bytes and host_bytes where that is the host's */
    int64_t slabs, host_slabs; /* of each attention layer: all, and those in host memory */
};

/* The exact sizes of what lr_session_open would take on the worker with the most (worker 0). */
void lr_session_plan(const struct lr_model_dims *dims,
                     const struct lr_kernel_ops *ops,
                     size_t weights_bytes,
                     int n_workers,
                     int replicated,
                     const struct lr_session_options *options,
                     struct lr_memory_plan *plan);

/* What a session was planned to take on this worker, what it reserved, and what the memory lacks for it, in bytes. */
struct lr_memory_use {
    size_t planned_bytes, reserved_bytes; /* of the backend's memory, without the model's */
    size_t taken_bytes; /* device: by how much less is free since before the session was opened, divided by the workers
                           that share it. Host: what has been touched */
    size_t kv_bytes;    /* of the planned ones: the document's keys and values */
    size_t host_planned_bytes, host_reserved_bytes; /* keys and values in host memory behind it */
    int64_t slabs, host_slabs;                      /* of each attention layer: all, and those in host memory */
};

/* Divides the document's keys and values between the backend's memory, of which `available` bytes are free, and the
 * host's: fills options->host_slabs, 0 where all of them fit and no limit of the options forbids it. With `spill` 0
 * they go to the host's memory only where a limit says so. LR_NO_MEMORY with the numbers where not even a stage and two
 * slots fit. */
LR_MUST_USE enum lr_status lr_session_divide(const struct lr_model_dims *dims,
                                             const struct lr_kernel_ops *ops,
                                             int n_workers,
                                             int replicated,
                                             size_t available,
                                             int spill,
                                             struct lr_session_options *options,
                                             struct lr_error *err);

/* LR_NO_MEMORY with the numbers where a session of these options would not fit on one of the workers; fills in
 * options->host_slabs, the same on all. Collective. */
LR_MUST_USE enum lr_status
lr_session_fit(const struct lr_engine *engine, struct lr_session_options *options, struct lr_error *err);

struct lr_session;
struct lr_fork;

/* Told after each wave, on every worker. A non-zero return cancels: LR_CANCELLED everywhere must be
 * agreed by the caller (it is called at the same point on all workers). */
struct lr_wave_report {
    int64_t tokens_done, tokens_total; /* total: max_tokens of the options */
    int64_t waves_done, waves_total;
};

/* Called on worker 0 with the logits [vocab] of a document or fork position, ascending positions. They are numbers: a
 * NaN among them, or an infinite largest, ends the work before. */
typedef enum lr_status lr_logits_sink(void *context, int64_t position, const float *logits, struct lr_error *err);

struct lr_session_hooks {
    void (*on_wave)(void *context, const struct lr_wave_report *report);
    void *wave_context;
    lr_logits_sink *on_logits; /* NULL: no logits of the document are computed */
    void *logits_context;
    const int64_t *positions; /* [n_positions] ascending, whose logits are wanted; NULL: all of them */
    int64_t n_positions;
};

/* Plans the memory, refuses with LR_NO_MEMORY and the numbers what does not fit, and allocates. */
LR_MUST_USE enum lr_status lr_session_open(struct lr_engine *engine,
                                           const struct lr_session_options *options,
                                           const struct lr_session_hooks *hooks,
                                           struct lr_session **out,
                                           struct lr_error *err);
void lr_session_close(struct lr_session *session);

void lr_session_memory(const struct lr_session *session, struct lr_memory_use *use);

/* Adds document tokens. Ids must be in the vocabulary. */
LR_MUST_USE enum lr_status
lr_session_append(struct lr_session *session, const int32_t *ids, int64_t n_ids, struct lr_error *err);
/* Ends the document: processes what was held back. */
LR_MUST_USE enum lr_status lr_session_seal(struct lr_session *session, struct lr_error *err);
int64_t lr_session_tokens(const struct lr_session *session);

/* Share of the causal (query, key) pairs that the document's attention layers have looked at; 1 for
 * full. Collective. */
LR_MUST_USE enum lr_status lr_session_density(struct lr_session *session, double *density, struct lr_error *err);

/* A fork that stands at the end of the sealed document. LR_FULL when max_forks are alive. */
LR_MUST_USE enum lr_status lr_session_fork(struct lr_session *session, struct lr_fork **out, struct lr_error *err);
/* Puts a fork back to the end of the document. */
void lr_fork_rewind(struct lr_fork *fork);
void lr_fork_release(struct lr_fork *fork);
int64_t lr_fork_position(const struct lr_fork *fork);

/* Tokens for several forks at once. The bits of a fork do not depend on the other forks, nor on how its tokens are
 * divided over calls. */
struct lr_fork_input {
    struct lr_fork *fork;
    const int32_t *ids;
    int64_t n_ids;
};

/* What worker 0 wants to have of them: of the last tokens, or of every token of a single fork. */
struct lr_fork_output {
    int32_t *next;                      /* [n_forks] each fork's next token, chosen on the device; -1 where the logits
                                           are no numbers: see lr_fail_logits. It may be where the ids lie. NULL: none */
    const struct lr_sampling *sampling; /* how */
    float *logits;                      /* [n_forks, vocab]; NULL: none */
    lr_logits_sink *sink;               /* NULL: nobody */
    void *sink_context;
};
/* output: NULL where nothing is wanted. Collective. */
LR_MUST_USE enum lr_status lr_forks_extend(struct lr_session *session,
                                           const struct lr_fork_input *inputs,
                                           int64_t n_inputs,
                                           const struct lr_fork_output *output,
                                           struct lr_error *err);

/* Says that a position's logits hold a NaN, or that the largest is infinite. */
enum lr_status lr_fail_logits(const struct lr_engine *engine, int64_t position, struct lr_error *err);

#endif
