/* Weights on the device: bf16 [n, k] row-major, rows padded with zeros to whole 16 bytes. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/gemm.h"

#include <cuda_runtime.h>
#include <string.h>

namespace lr
{

constexpr int64_t PIECE = 32768; /* elements converted between two copies, on the stack */

static uint16_t round_to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return static_cast<uint16_t>(bits >> 16 | 0x40u); /* a NaN stays one */
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static float widen_half(uint16_t half)
{
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    uint32_t exponent = half >> 10 & 31u, fraction = half & 1023u, bits;
    if (exponent == 31) {
        bits = 0x7f800000u | fraction << 13;
    } else if (exponent != 0) {
        bits = (exponent + 112u) << 23 | fraction << 13;
    } else {
        const float size = static_cast<float>(fraction) * 0x1p-24f;
        memcpy(&bits, &size, sizeof bits);
    }
    bits |= sign;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static uint16_t load_rounded(const void *rows, int64_t at, enum lr_dtype dtype)
{
    if (dtype == LR_F32)
        return round_to_bf16(static_cast<const float *>(rows)[at]);
    const uint16_t half = static_cast<const uint16_t *>(rows)[at];
    return dtype == LR_BF16 ? half : round_to_bf16(widen_half(half));
}

} // namespace lr

size_t lr_cuda_weight_bytes(int64_t n, int64_t k, enum lr_dtype)
{
    return static_cast<size_t>(n * lr::weight_stride(k)) * 2;
}

/* An error of the copy shows at the next launch, whose slot notes it. */
void lr_cuda_weight_pack(struct lr_weight *w, int64_t row, int64_t n_rows, const void *rows)
{
    const int64_t stride = lr::weight_stride(w->k), n = n_rows * stride;
    uint16_t *to = static_cast<uint16_t *>(w->data) + row * stride;
    if (w->dtype == LR_BF16 && stride == w->k) {
        cudaMemcpy(to, rows, static_cast<size_t>(n) * 2, cudaMemcpyHostToDevice);
        return;
    }
    uint16_t piece[lr::PIECE];
    for (int64_t first = 0; first < n; first += lr::PIECE) {
        const int64_t size = n - first < lr::PIECE ? n - first : lr::PIECE;
        int64_t t = first / stride, column = first % stride;
        for (int64_t i = 0; i < size; i++) {
            piece[i] = column < w->k ? lr::load_rounded(rows, t * w->k + column, w->dtype) : 0;
            if (++column == stride) {
                column = 0;
                t++;
            }
        }
        cudaMemcpy(to + first, piece, static_cast<size_t>(size) * 2, cudaMemcpyHostToDevice);
    }
}
