/* Attention for heads of 129 to 256 channels. */
#include "kernels/cuda/attention_kernel.cuh"
#include "kernels/cuda/attention_launch.h"

int lr_cuda_fold_256(const struct lr_cuda_fold *fold, int n_multiprocessors, cudaStream_t stream)
{
    return lr::tile_rows(*fold) <= lr::UNIT ? lr::launch<256, 1>(*fold, n_multiprocessors, stream)
                                            : lr::launch<256, 2>(*fold, n_multiprocessors, stream);
}
