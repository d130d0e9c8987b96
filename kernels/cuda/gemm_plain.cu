/* The product for shapes that no other kernel takes: rows or pointers that are not whole 16 bytes. */
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/gemm_epilogue.cuh"

namespace lr::LR_CUDA_ACT
{

constexpr int WARPS = 8;

/* The expert of a row, or -1 behind the last. */
static __device__ int64_t expert_of(const plain_params &p, int64_t row)
{
    if (p.offsets == nullptr)
        return 0;
    const int64_t at = row + p.offsets[0];
    int64_t low = 0, high = p.n_experts;
    while (low < high) { /* the first e with offsets[e + 1] > at */
        const int64_t middle = (low + high) / 2;
        if (p.offsets[middle + 1] > at)
            high = middle;
        else
            low = middle + 1;
    }
    return low < p.n_experts ? low : -1;
}

static __device__ float dot(const act *a, const act *w, int64_t k)
{
    const int lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (int64_t i = lane; i < k; i += 32)
        sum = fmaf(from_act(a[i]), from_act(w[i]), sum);
    for (int step = 16; step > 0; step /= 2)
        sum += __shfl_xor_sync(0xffffffffu, sum, step);
    return sum;
}

static __global__ void plain_kernel(const plain_params p)
{
    const int64_t n_warps = static_cast<int64_t>(gridDim.x) * WARPS;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32; i < p.n_rows * p.n; i += n_warps) {
        const int64_t row = i / p.n, column = i % p.n, expert = expert_of(p, row);
        if (expert < 0)
            continue;
        const int64_t w = expert * p.batch_elements + column * p.w_stride;
        float x = dot(p.a + row * p.a_stride, p.w + w, p.k);
        x = activate(p.bias != nullptr ? x + p.bias[column] : x, p.activation);
        if (p.up != nullptr)
            x *= dot(p.a + row * p.a_stride, p.up + w, p.k);
        if (threadIdx.x % 32 != 0)
            continue;
        const int64_t at = row * p.y_stride + column;
        if (p.wide) {
            float *y = static_cast<float *>(p.y) + at;
            *y = p.accumulate ? *y + x : x;
        } else {
            act *y = static_cast<act *>(p.y) + at;
            *y = to_act(p.accumulate ? from_act(*y) + x : x);
        }
    }
}

cudaError_t launch_plain_product(cudaStream_t stream, const plain_params &p)
{
    const int64_t n_blocks = divide_up(p.n_rows * p.n, WARPS);
    plain_kernel<<<static_cast<unsigned>(n_blocks < 65536 ? n_blocks : 65536), WARPS * 32, 0, stream>>>(p);
    return cudaGetLastError();
}

} // namespace lr::LR_CUDA_ACT
