/* Which kernel a fold takes: by the padded head dimension, and by how many rows a tile can be filled with. A row's bits
 * are the same in all kernels of its head dimension. */
#include "kernels/cuda/attention_launch.h"

int64_t lr_cuda_padded_head_dim(int64_t head_dim)
{
    return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : head_dim <= 256 ? 256 : 0;
}

void lr_cuda_fold_rows(const struct lr_exec *exec, const struct lr_cuda_fold *fold, const char *slot)
{
    cudaStream_t stream = static_cast<cudaStream_t>(exec->stream);
    const int n = lr_cuda_multiprocessors(exec);
    int error = cudaErrorInvalidValue;
    switch (lr_cuda_padded_head_dim(fold->shape.head_dim)) {
    case 64:
        error = lr_cuda_fold_64(fold, n, stream);
        break;
    case 128:
        error = lr_cuda_fold_128(fold, n, stream);
        break;
    case 256:
        error = lr_cuda_fold_256(fold, n, stream);
        break;
    }
    lr_cuda_note(exec, error, slot);
}
