/* Which set of kernels folds rows, and what both agree on. */
#include "kernels/cuda/attention.h"

int64_t LR_CUDA(padded_head_dim)(int64_t head_dim)
{
    return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : head_dim <= 256 ? 256 : 0;
}

void LR_CUDA(fold_rows)(const struct lr_exec *exec, const struct lr_cuda_fold *fold, const char *slot)
{
    if (lr_cuda_hopper_kernels(exec))
        LR_CUDA(fold_rows_hopper)(exec, fold, slot);
    else
        LR_CUDA(fold_rows_portable)(exec, fold, slot);
}
