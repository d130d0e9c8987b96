/* Which portable kernel a fold takes: by the padded head dimension, and by how many rows a tile can be filled with. The
 * row's bits are the same in all of them. */
#include "kernels/cuda/attention_portable.cuh"

void lr_cuda_fold_rows_portable(const struct lr_exec *exec, const struct lr_cuda_fold *fold, const char *slot)
{
    const bool small = fold->max_tokens * (fold->shape.n_heads / fold->shape.n_kv_heads) <= 64;
    cudaStream_t stream = static_cast<cudaStream_t>(exec->stream);
    cudaError_t error = cudaErrorInvalidValue;
    switch (lr_cuda_padded_head_dim(fold->shape.head_dim)) {
    case 64:
        error = small ? lr::portable::launch<64, 1>(*fold, stream) : lr::portable::launch<64, 2>(*fold, stream);
        break;
    case 128:
        error = small ? lr::portable::launch<128, 1>(*fold, stream) : lr::portable::launch<128, 2>(*fold, stream);
        break;
    case 256:
        error = lr::portable::launch<256, 1>(*fold, stream);
        break;
    }
    lr_cuda_note(exec, error, slot);
}
