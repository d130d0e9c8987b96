/* A fixed set of threads that run one parallel loop at a time.
 *
 * The caller's thread takes part. Tasks are handed out by a shared counter, so which thread runs a
 * task is arbitrary: a task must compute the same bits whoever runs it, and every output element
 * belongs to exactly one task. Idle threads spin briefly (a decode step has hundreds of short
 * loops), then sleep. */
#ifndef LR_BASE_POOL_H
#define LR_BASE_POOL_H

#include "base/status.h"
#include <stdint.h>

struct lr_pool;

/* `thread` is 0 .. n_threads-1, for per-thread scratch memory. */
typedef void lr_pool_task(void *context, int64_t task, int thread);

/* A pool of `n_threads` (>= 1) threads, the caller's included. `spin_us` is how long an idle thread
 * spins: 0 where there are more threads than cores. Released by lr_pool_destroy, by the same
 * thread. */
LR_MUST_USE enum lr_status lr_pool_create(int n_threads, int spin_us, struct lr_pool **out, struct lr_error *err);
void lr_pool_destroy(struct lr_pool *pool);
int lr_pool_threads(const struct lr_pool *pool);

/* Runs task(context, i, thread) for i in [0, n_tasks) and returns when all are done. Not reentrant.
 */
void lr_pool_run(struct lr_pool *pool, int64_t n_tasks, lr_pool_task *task, void *context);

#endif
