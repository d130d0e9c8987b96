/* The launchers behind lr_cuda_fold_rows, a file for each padded head dimension: compiling one takes a while. They
 * return the CUDA error of the launch. */
#ifndef LR_KERNELS_CUDA_ATTENTION_LAUNCH_H
#define LR_KERNELS_CUDA_ATTENTION_LAUNCH_H

#include "kernels/cuda/attention.h"

#include <cuda_runtime_api.h>

int lr_cuda_fold_64(const struct lr_cuda_fold *fold, int n_multiprocessors, cudaStream_t stream);
int lr_cuda_fold_128(const struct lr_cuda_fold *fold, int n_multiprocessors, cudaStream_t stream);
int lr_cuda_fold_256(const struct lr_cuda_fold *fold, int n_multiprocessors, cudaStream_t stream);

#endif
