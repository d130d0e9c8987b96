/* Which kernel for Hopper a fold takes: by the padded head dimension, and by how many rows a tile can be filled with.
 * The row's bits are the same in all of them; but lists of half blocks are folded in steps of 64 keys, others in steps
 * of 128 (of 64 with 256 channels). */
#include "kernels/cuda/attention_kernel.cuh"

void LR_CUDA(fold_rows_hopper)(const struct lr_exec *exec, const struct lr_cuda_fold *fold, const char *slot)
{
    const int64_t tile_rows = fold->max_tokens * (fold->shape.n_heads / fold->shape.n_kv_heads);
    cudaStream_t stream = static_cast<cudaStream_t>(exec->stream);
    const int n = lr_cuda_multiprocessors(exec);
    uint32_t *taken = lr_cuda_counter(exec);
    cudaError_t error = cudaErrorInvalidValue;
    switch (LR_CUDA(padded_head_dim)(fold->shape.head_dim)) {
    case 64:
        if (fold->half_blocks)
            error = lr::launch<64, 2, 64>(*fold, n, taken, stream);
        else if (tile_rows <= lr::UNIT)
            error = lr::launch<64, 1, 128>(*fold, n, taken, stream);
        else if (tile_rows <= 8 * lr::UNIT)
            error = lr::launch<64, 2, 128>(*fold, n, taken, stream);
        else
            error = lr::launch<64, 3, 128>(*fold, n, taken, stream);
        break;
    case 128:
        if (fold->half_blocks)
            error = lr::launch<128, 2, 64>(*fold, n, taken, stream);
        else if (tile_rows <= lr::UNIT)
            error = lr::launch<128, 1, 128>(*fold, n, taken, stream);
        else
            error = lr::launch<128, 2, 128>(*fold, n, taken, stream);
        break;
    case 256:
        if (tile_rows <= lr::UNIT)
            error = lr::launch<256, 1, 64>(*fold, n, taken, stream);
        else
            error = lr::launch<256, 2, 64>(*fold, n, taken, stream);
        break;
    }
    lr_cuda_note(exec, error, slot);
}
