/* What gemm.cu and experts.cu share on the host's side. */
#ifndef LR_KERNELS_CUDA_GEMM_H
#define LR_KERNELS_CUDA_GEMM_H

#include "kernels/cuda/act.h"
#include "kernels/cuda/tma.h"
#include "kernels/ops.h"

namespace lr::LR_CUDA_ACT
{

/* Elements between two rows of a packed weight: k rounded up to whole 16 bytes, which is what the copy engine and
 * 16-byte loads want. The elements behind k are zero. */
static inline int64_t weight_stride(int64_t k)
{
    return (k + 7) / 8 * 8;
}

static inline int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* Whether y may be written in pieces of `piece` elements of `element_bytes`. */
static inline bool stores_are_wide(const void *y, int64_t y_stride, int64_t n, int piece, int element_bytes)
{
    return n % piece == 0 && y_stride % piece == 0 && reinterpret_cast<uintptr_t>(y) % (piece * element_bytes) == 0;
}

/* For shapes that the copy engine cannot read: one warp an output element, the reduced dimension over its lanes. With
 * `up` it is the first half of SwiGLU; with `offsets` the weights are those of the row's expert, batch_elements apart.
 * Correct for everything, and slow. */
struct plain_params {
    const act *a;
    int64_t a_stride;
    const act *w, *up;
    int64_t w_stride, batch_elements;
    const int64_t *offsets;
    int64_t n_experts;
    int64_t n_rows, n, k;
    const float *bias;
    void *y;
    int64_t y_stride;
    lr_activation activation;
    int accumulate, wide;
};

cudaError_t launch_plain_product(cudaStream_t stream, const plain_params &p);

} // namespace lr::LR_CUDA_ACT

#endif
