/* Sizes of a session's memory, one function per arena. All pure, but lr_plan_available_bytes, which
 * asks the system. */
#ifndef LR_WORKER_PLAN_H
#define LR_WORKER_PLAN_H

#include "worker/session.h"

/* KV blocks of the document on worker 0 (the fullest), per attention layer. */
int64_t lr_plan_local_blocks(const struct lr_session_options *options, int n_workers);
/* KV blocks of one fork's tail, per attention layer. */
int64_t lr_plan_fork_blocks(const struct lr_session_options *options);
struct lr_kv_shape lr_plan_kv_shape(const struct lr_model_dims *dims, enum lr_dtype dtype);

/* States, tails, held tokens, summaries. */
size_t lr_plan_state_bytes(const struct lr_model_dims *dims,
                           const struct lr_session_options *options,
                           int n_workers,
                           size_t block_bytes);
size_t
lr_plan_fork_bytes(const struct lr_model_dims *dims, const struct lr_session_options *options, size_t block_bytes);
size_t lr_plan_workspace_bytes(const struct lr_model_dims *dims,
                               const struct lr_kernel_ops *ops,
                               int n_workers,
                               int replicated,
                               const struct lr_session_options *options);

/* Memory this host can still give (the smaller of MemAvailable and the cgroup's room), divided by
 * its workers. */
size_t lr_plan_available_bytes(int workers_on_host);

#endif
