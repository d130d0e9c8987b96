/* Which portable kernel a fold takes: by the padded head dimension, and by how many rows a tile can be filled with. The
 * row's bits are the same in all of them. */
#include "kernels/cuda/attention_portable.cuh"

namespace lr::LR_CUDA_ACT::portable
{

/* For many rows, and for few. */
using many_64 = tile_shape<64, 2, 4, 4, 3>;
using many_128 = tile_shape<128, 2, 4, 3, 2>;
using few_64 = tile_shape<64, 1, 4, 6, 3>;
using few_128 = tile_shape<128, 1, 4, 3, 3>;
using any_256 = tile_shape<256, 1, 4, 2, 2>;

/* What sm_86 gives a thread block is the least of all; an A100 divides 164 KiB, and takes 1 for itself with each block. */
static_assert(sizeof(tile_shared<any_256>) <= 99 * 1024, "one block on sm_86");
static_assert(2 * (sizeof(tile_shared<many_128>) + 1024) <= 164 * 1024, "two blocks on an A100");

template <class many, class few>
static cudaError_t launch_either(const lr_cuda_fold &fold, int64_t tile_rows, cudaStream_t stream)
{
    return tile_rows <= few::ROWS ? launch<few>(fold, stream) : launch<many>(fold, stream);
}

} // namespace lr::LR_CUDA_ACT::portable

using namespace lr::portable;

void LR_CUDA(fold_rows_portable)(const struct lr_exec *exec, const struct lr_cuda_fold *fold, const char *slot)
{
    const int64_t tile_rows = fold->max_tokens * (fold->shape.n_heads / fold->shape.n_kv_heads);
    cudaStream_t stream = static_cast<cudaStream_t>(exec->stream);
    cudaError_t error = cudaErrorInvalidValue;
    switch (LR_CUDA(padded_head_dim)(fold->shape.head_dim)) {
    case 64:
        error = launch_either<many_64, few_64>(*fold, tile_rows, stream);
        break;
    case 128:
        error = launch_either<many_128, few_128>(*fold, tile_rows, stream);
        break;
    case 256:
        error = launch<any_256>(*fold, stream);
        break;
    }
    lr_cuda_note(exec, error, slot);
}
