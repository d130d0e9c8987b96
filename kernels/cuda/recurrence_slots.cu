/* The delta rule's slots of the operations table, over the recurrence's own interface. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/recurrence.h"
#include <cuda_runtime_api.h>

static struct lr_recurrence_args recurrence_of(const struct lr_exec *exec, const struct lr_delta_segment_args *args)
{
    struct lr_recurrence_args r = {};
    r.rule = LR_RECURRENCE_DELTA;
    r.shape = args->shape;
    r.q = args->q;
    r.k = args->k;
    r.v = args->v;
    r.q_stride = r.k_stride = r.v_stride = args->qkv_stride;
    r.g = args->g;
    r.beta = args->beta;
    r.scale = 1.0f; /* q comes scaled */
    r.n_rows = args->n_rows;
    r.n_sequences = 1;
    r.hopper = lr_cuda_hopper_kernels(exec);
    r.work = args->work;
    return r;
}

size_t LR_CUDA(delta_work_floats)(struct lr_delta_shape shape, int64_t n_rows)
{
    return LR_CUDA(recurrence_work_bytes)(LR_RECURRENCE_DELTA, shape, n_rows, 1) / sizeof(float);
}

void LR_CUDA(delta_summary)(const struct lr_exec *exec, const struct lr_delta_segment_args *args, float *m, float *b)
{
    const struct lr_recurrence_args r = recurrence_of(exec, args);
    int error = LR_CUDA(recurrence_prepare)(exec->stream, &r);
    if (error == cudaSuccess)
        error = LR_CUDA(recurrence_summary)(exec->stream, &r, m, b);
    lr_cuda_note(exec, error, "delta_summary");
}

void LR_CUDA(delta_output)(const struct lr_exec *exec,
                          const struct lr_delta_segment_args *args,
                          const float *s_in,
                          lr_act *o,
                          int64_t o_stride)
{
    const struct lr_recurrence_args r = recurrence_of(exec, args);
    lr_cuda_note(exec, LR_CUDA(recurrence_output)(exec->stream, &r, s_in, o, o_stride, nullptr), "delta_output");
}

void LR_CUDA(delta_fold)(const struct lr_exec *exec, const struct lr_delta_fold_args *args)
{
    lr_cuda_note(exec, LR_CUDA(recurrence_fold)(exec->stream, args), "delta_fold");
}

void LR_CUDA(delta_step)(const struct lr_exec *exec, const struct lr_delta_step_args *args)
{
    if (args->n_rows == 0)
        return;
    struct lr_delta_step_args step = *args;
    step.states = static_cast<float *const *>(lr_cuda_upload(exec, static_cast<const void *>(args->states),
                                                             static_cast<size_t>(args->n_rows) * sizeof *args->states));
    lr_cuda_note(exec, LR_CUDA(recurrence_step)(exec->stream, &step), "delta_step");
}
