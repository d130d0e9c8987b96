/* Attention for heads of up to 64 channels. Three consumers where the rows fill them: a query block with a list of its
 * own has 128 rows for each query head of its KV head. */
#include "kernels/cuda/attention_kernel.cuh"
#include "kernels/cuda/attention_launch.h"

int lr_cuda_fold_64(const struct lr_cuda_fold *fold, int n_multiprocessors, cudaStream_t stream)
{
    const int64_t rows = lr::tile_rows(*fold);
    if (rows <= lr::UNIT)
        return lr::launch<64, 1>(*fold, n_multiprocessors, stream);
    if (rows <= 8 * lr::UNIT && rows % (3 * lr::UNIT) != 0)
        return lr::launch<64, 2>(*fold, n_multiprocessors, stream);
    return lr::launch<64, 3>(*fold, n_multiprocessors, stream);
}
