/* Weights on the device: [n, k] row-major, rows padded with zeros to whole 16 bytes. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/gemm.h"

#include <cuda_runtime.h>

namespace lr::LR_CUDA_ACT
{

constexpr int64_t PIECE = 32768; /* elements converted between two copies, on the stack */

static act rounded(const void *rows, int64_t at, enum lr_dtype dtype)
{
    if (dtype == LR_F32)
        return to_act(static_cast<const float *>(rows)[at]);
    if (dtype == LR_BF16)
        return to_act(__bfloat162float(static_cast<const __nv_bfloat16 *>(rows)[at]));
    return to_act(__half2float(static_cast<const __half *>(rows)[at]));
}

} // namespace lr::LR_CUDA_ACT

size_t LR_CUDA(weight_bytes)(int64_t n, int64_t k, enum lr_dtype)
{
    return static_cast<size_t>(n * lr::weight_stride(k)) * 2;
}

/* Rounds the rows on their way, a piece at a time, or copies them where they are what the device holds. */
static void send_rows(const struct lr_weight *w, int64_t row, int64_t n_rows, const void *rows)
{
    const int64_t stride = lr::weight_stride(w->k), n = n_rows * stride;
    lr::act *to = static_cast<lr::act *>(w->data) + row * stride;
    if (w->dtype == LR_CUDA_DTYPE && stride == w->k) {
        cudaMemcpy(to, rows, static_cast<size_t>(n) * 2, cudaMemcpyHostToDevice);
        return;
    }
    lr::act piece[lr::PIECE];
    for (int64_t first = 0; first < n; first += lr::PIECE) {
        const int64_t size = n - first < lr::PIECE ? n - first : lr::PIECE;
        int64_t t = first / stride, column = first % stride;
        for (int64_t i = 0; i < size; i++) {
            piece[i] = column < w->k ? lr::rounded(rows, t * w->k + column, w->dtype) : lr::to_act(0.0f);
            if (++column == stride) {
                column = 0;
                t++;
            }
        }
        cudaMemcpy(to + first, piece, static_cast<size_t>(size) * 2, cudaMemcpyHostToDevice);
    }
}

/* A copy from pageable memory may return while its last bytes are on their way, and the kernels' stream does not wait
 * for those. An error shows at the next launch, whose slot notes it. */
void LR_CUDA(weight_pack)(struct lr_weight *w, int64_t row, int64_t n_rows, const void *rows)
{
    send_rows(w, row, n_rows, rows);
    cudaStreamSynchronize(cudaStreamLegacy);
}
