/* Spreading independent rows over the pool. */
#ifndef LR_KERNELS_CPU_ROWS_H
#define LR_KERNELS_CPU_ROWS_H

#include "base/pool.h"
#include "kernels/ops.h"

typedef void lr_rows_body(const void *args, int64_t first, int64_t last);

struct lr_rows_job {
    lr_rows_body *body;
    const void *args;
    int64_t n_rows;
    int64_t rows_per_task;
};

static void lr_rows_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct lr_rows_job *job = context;
    int64_t first = task * job->rows_per_task, last = first + job->rows_per_task;
    job->body(job->args, first, last < job->n_rows ? last : job->n_rows);
}

/* Runs body over [0, n_rows) in tasks of about 16,384 elements; a job of one task stays on the calling thread. */
static inline void
lr_run_rows(const struct lr_exec *exec, int64_t n_rows, int64_t row_elements, lr_rows_body *body, const void *args)
{
    struct lr_rows_job job = {body, args, n_rows, 1 + 16384 / (row_elements > 0 ? row_elements : 1)};
    int64_t n_tasks = (n_rows + job.rows_per_task - 1) / job.rows_per_task;
    if (n_tasks == 1)
        body(args, 0, n_rows);
    else if (n_tasks > 1)
        lr_pool_run(exec->pool, n_tasks, lr_rows_task, &job);
}

#endif
