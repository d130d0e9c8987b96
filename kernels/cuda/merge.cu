/* Merging partials of attention by sums of 64-bit integers, whose order cannot matter.
 *
 *   bounds       bound[row, head] = (max m, max |o|, l)              a maximum over all partials and workers
 *   accumulate   w = 2^(m_p - max m);  sums += rint(o_p w 2^e)       an exact sum over partials and workers
 *   finish       y = sum_o / sum_l
 *
 * One thread block a row and head; its warps take the partials in turn, the lanes the channels. m is in log2 units. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/mma.cuh"

#include <math.h>

namespace lr::LR_CUDA_ACT
{

constexpr int MERGE_WARPS = 16;
constexpr int MERGE_THREADS = 32 * MERGE_WARPS;
constexpr int LANE_CHANNELS = 8; /* heads of up to 256 channels */

static __device__ __forceinline__ float warp_max(float x)
{
    for (int i = 16; i > 0; i /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

__global__ void __launch_bounds__(MERGE_THREADS) merge_bounds_kernel(const lr_merge_args a)
{
    const int64_t n = a.n_rows * a.n_heads, at = blockIdx.x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float m = -INFINITY, bound = 0.0f;
#pragma unroll 2
    for (int64_t p = warp; p < a.n_partials; p += MERGE_WARPS) {
        const float *o = a.o + (p * n + at) * a.head_dim;
        m = fmaxf(m, a.m[p * n + at]);
        bound = fmaxf(bound, a.l[p * n + at]);
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++)
            if (lane + 32 * i < a.head_dim)
                bound = fmaxf(bound, fabsf(o[lane + 32 * i]));
    }
    __shared__ float all[2][MERGE_WARPS];
    bound = warp_max(bound);
    if (lane == 0) {
        all[0][warp] = m;
        all[1][warp] = bound;
    }
    __syncthreads();
    if (warp == 0) {
        m = warp_max(lane < MERGE_WARPS ? all[0][lane] : -INFINITY);
        bound = warp_max(lane < MERGE_WARPS ? all[1][lane] : 0.0f);
        if (lane == 0) {
            a.bound[2 * at] = m;
            a.bound[2 * at + 1] = bound;
        }
    }
}

__global__ void __launch_bounds__(MERGE_THREADS) merge_accumulate_kernel(const lr_merge_args a)
{
    __shared__ unsigned long long sums[32 * LANE_CHANNELS + 1];
    const int64_t n = a.n_rows * a.n_heads, at = blockIdx.x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = static_cast<int>(a.head_dim) + 1;
    for (int d = threadIdx.x; d < width; d += MERGE_THREADS)
        sums[d] = 0;
    __syncthreads();
    const float top = a.bound[2 * at];
    int exponent;
    frexp(static_cast<double>(a.bound[2 * at + 1]) * static_cast<double>(a.n_partials_total), &exponent);
    const double scale = ldexp(1.0, 61 - exponent);
    long long sum[LANE_CHANNELS] = {}, sum_l = 0;
#pragma unroll 2
    for (int64_t p = warp; p < a.n_partials; p += MERGE_WARPS) {
        const float *o = a.o + (p * n + at) * a.head_dim;
        const float m = a.m[p * n + at], l = a.l[p * n + at];
        /* an empty partial weighs nothing, also where all are empty */
        const double factor = m == -INFINITY ? 0.0 : static_cast<double>(exp2_fast(m - top)) * scale;
        sum_l += __double2ll_rn(static_cast<double>(l) * factor);
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++)
            if (lane + 32 * i < a.head_dim)
                sum[i] += __double2ll_rn(static_cast<double>(o[lane + 32 * i]) * factor);
    }
#pragma unroll
    for (int i = 0; i < LANE_CHANNELS; i++)
        if (lane + 32 * i < a.head_dim)
            atomicAdd(&sums[lane + 32 * i], static_cast<unsigned long long>(sum[i]));
    if (lane == 0)
        atomicAdd(&sums[a.head_dim], static_cast<unsigned long long>(sum_l));
    __syncthreads();
    for (int d = threadIdx.x; d < width; d += MERGE_THREADS)
        a.sums[at * width + d] = static_cast<int64_t>(sums[d]);
}

__global__ void merge_finish_kernel(const lr_merge_args a)
{
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, d = i % a.head_dim,
                  at = i / a.head_dim;
    if (at >= a.n_rows * a.n_heads)
        return;
    const int64_t *sums = a.sums + at * (a.head_dim + 1);
    const float l = static_cast<float>(sums[a.head_dim]);
    act *y = static_cast<act *>(a.y) + at / a.n_heads * a.y_stride + at % a.n_heads * a.head_dim;
    y[d] = to_act(l != 0.0f ? static_cast<float>(sums[d]) / l : 0.0f);
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(merge_bounds)(const struct lr_exec *exec, const struct lr_merge_args *args)
{
    const int64_t n = args->n_rows * args->n_heads;
    if (n == 0)
        return;
    lr::merge_bounds_kernel<<<static_cast<unsigned>(n), lr::MERGE_THREADS, 0,
                              static_cast<cudaStream_t>(exec->stream)>>>(*args);
    lr_cuda_note(exec, cudaGetLastError(), "merge_bounds");
}

void LR_CUDA(merge_accumulate)(const struct lr_exec *exec, const struct lr_merge_args *args)
{
    const int64_t n = args->n_rows * args->n_heads;
    if (n == 0)
        return;
    lr::merge_accumulate_kernel<<<static_cast<unsigned>(n), lr::MERGE_THREADS, 0,
                                  static_cast<cudaStream_t>(exec->stream)>>>(*args);
    lr_cuda_note(exec, cudaGetLastError(), "merge_accumulate");
}

void LR_CUDA(merge_finish)(const struct lr_exec *exec, const struct lr_merge_args *args)
{
    const int64_t n = args->n_rows * args->n_heads * args->head_dim;
    if (n == 0)
        return;
    lr::merge_finish_kernel<<<static_cast<unsigned>((n + 255) / 256), 256, 0,
                              static_cast<cudaStream_t>(exec->stream)>>>(*args);
    lr_cuda_note(exec, cudaGetLastError(), "merge_finish");
}
