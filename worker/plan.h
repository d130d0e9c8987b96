/* Sizes of a session's memory, one function per arena. All pure. */
#ifndef LR_WORKER_PLAN_H
#define LR_WORKER_PLAN_H

#include "worker/session_impl.h"

/* KV blocks of the document on worker 0 (the fullest), per attention layer. */
int64_t lr_plan_local_blocks(const struct lr_session_options *options, int n_workers);
/* KV blocks of one fork's tail, per attention layer. */
int64_t lr_plan_fork_blocks(const struct lr_session_options *options);
struct lr_kv_shape lr_plan_kv_shape(const struct lr_model_dims *dims, enum lr_dtype dtype);

/* A worker's segments, on worker 0; their blocks at most; and blocks of a slot: a slab, or one page for each fork and
 * KV head where that is more. See kv_tier.h. */
int64_t lr_plan_slabs(const struct lr_session_options *options, int n_workers);
int64_t lr_plan_slab_blocks(const struct lr_session_options *options);
int64_t lr_plan_slot_blocks(const struct lr_model_dims *dims, const struct lr_session_options *options);
/* Blocks of each attention layer at home in the backend's memory. */
int64_t lr_plan_resident_blocks(const struct lr_session_options *options, int n_workers);
/* Keys and values of the document: in the backend's memory, with stage and slots, and in the host's. */
size_t lr_plan_kv_bytes(const struct lr_model_dims *dims,
                        const struct lr_kernel_ops *ops,
                        const struct lr_session_options *options,
                        int n_workers);
size_t lr_plan_kv_host_bytes(const struct lr_model_dims *dims,
                             const struct lr_kernel_ops *ops,
                             const struct lr_session_options *options,
                             int n_workers);

/* Host memory that lives as long as the session: held tokens, forks. */
size_t lr_plan_host_bytes(const struct lr_session_options *options, int n_workers);
/* States, tails, edge blocks, summaries. */
size_t lr_plan_state_bytes(const struct lr_model_dims *dims,
                           const struct lr_kernel_ops *ops,
                           const struct lr_session_options *options,
                           int n_workers);
/* States, tails and KV of forks, on the worker that holds the most of them. */
size_t lr_plan_fork_bytes(const struct lr_model_dims *dims,
                          const struct lr_kernel_ops *ops,
                          const struct lr_session_options *options,
                          int n_workers);
/* Tensors and tables of the largest step. */
struct lr_step_bytes lr_plan_step_bytes(const struct lr_model_dims *dims,
                                        const struct lr_kernel_ops *ops,
                                        int n_workers,
                                        int replicated,
                                        const struct lr_session_options *options);

#endif
