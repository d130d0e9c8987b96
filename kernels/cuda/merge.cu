/* Merging partials of attention by sums of 64-bit integers, whose order cannot matter.
 *
 *   bounds       bound[row, head] = (max m, max |o|, l)              a maximum over all partials and workers
 *   accumulate   w = 2^(m_p - max m);  sums += rint(o_p w 2^e)       an exact sum over partials and workers
 *   finish       y = sum_o / sum_l
 *
 * One thread block a row and head; its warps take the partials in turn, the lanes the channels. m is in log2 units. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/hopper.cuh"

#include <math.h>

namespace lr
{

constexpr int MERGE_WARPS = 8;
constexpr int MERGE_THREADS = 32 * MERGE_WARPS;

static __device__ __forceinline__ float warp_max(float x)
{
    for (int i = 16; i > 0; i /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, i));
    return x;
}

__global__ void merge_bounds_kernel(const lr_merge_args a)
{
    const int64_t n = a.n_rows * a.n_heads, at = blockIdx.x;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float m = -INFINITY, bound = 0.0f;
    for (int64_t p = warp; p < a.n_partials; p += MERGE_WARPS) {
        const float *o = a.o + (p * n + at) * a.head_dim;
        m = fmaxf(m, a.m[p * n + at]);
        bound = fmaxf(bound, a.l[p * n + at]);
        for (int64_t d = lane; d < a.head_dim; d += 32)
            bound = fmaxf(bound, fabsf(o[d]));
    }
    __shared__ float all[2][MERGE_WARPS];
    bound = warp_max(bound);
    if (lane == 0) {
        all[0][warp] = m;
        all[1][warp] = bound;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < MERGE_WARPS; i++) {
            m = fmaxf(m, all[0][i]);
            bound = fmaxf(bound, all[1][i]);
        }
        a.bound[2 * at] = m;
        a.bound[2 * at + 1] = bound;
    }
}

__global__ void merge_accumulate_kernel(const lr_merge_args a)
{
    extern __shared__ unsigned long long sums[];
    const int64_t n = a.n_rows * a.n_heads, at = blockIdx.x, width = a.head_dim + 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int64_t d = threadIdx.x; d < width; d += MERGE_THREADS)
        sums[d] = 0;
    __syncthreads();
    const float top = a.bound[2 * at];
    int exponent;
    frexp(static_cast<double>(a.bound[2 * at + 1]) * static_cast<double>(a.n_partials_total), &exponent);
    const double scale = ldexp(1.0, 61 - exponent);
    /* lane's channels, and l behind the last one */
    for (int64_t d = lane; d < width; d += 32) {
        long long sum = 0;
        for (int64_t p = warp; p < a.n_partials; p += MERGE_WARPS) {
            const float m = a.m[p * n + at];
            if (m == -INFINITY)
                continue;
            const float x = d < a.head_dim ? a.o[(p * n + at) * a.head_dim + d] : a.l[p * n + at];
            sum += __double2ll_rn(static_cast<double>(x) * (static_cast<double>(exp2_fast(m - top)) * scale));
        }
        atomicAdd(&sums[d], static_cast<unsigned long long>(sum));
    }
    __syncthreads();
    for (int64_t d = threadIdx.x; d < width; d += MERGE_THREADS)
        a.sums[at * width + d] = static_cast<int64_t>(sums[d]);
}

__global__ void merge_finish_kernel(const lr_merge_args a)
{
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, d = i % a.head_dim, at = i / a.head_dim;
    if (at >= a.n_rows * a.n_heads)
        return;
    const int64_t *sums = a.sums + at * (a.head_dim + 1);
    const float l = static_cast<float>(sums[a.head_dim]);
    __nv_bfloat16 *y = static_cast<__nv_bfloat16 *>(a.y) + at / a.n_heads * a.y_stride + at % a.n_heads * a.head_dim;
    y[d] = __float2bfloat16_rn(l != 0.0f ? static_cast<float>(sums[d]) / l : 0.0f);
}

} // namespace lr

void lr_cuda_merge_bounds(const struct lr_exec *exec, const struct lr_merge_args *args)
{
    const int64_t n = args->n_rows * args->n_heads;
    if (n == 0)
        return;
    lr::merge_bounds_kernel<<<static_cast<unsigned>(n), lr::MERGE_THREADS, 0, static_cast<cudaStream_t>(exec->stream)>>>(
        *args);
    lr_cuda_note(exec, cudaGetLastError(), "merge_bounds");
}

void lr_cuda_merge_accumulate(const struct lr_exec *exec, const struct lr_merge_args *args)
{
    const int64_t n = args->n_rows * args->n_heads;
    if (n == 0)
        return;
    const size_t bytes = static_cast<size_t>(args->head_dim + 1) * sizeof *args->sums;
    lr::merge_accumulate_kernel<<<static_cast<unsigned>(n), lr::MERGE_THREADS, bytes,
                                  static_cast<cudaStream_t>(exec->stream)>>>(*args);
    lr_cuda_note(exec, cudaGetLastError(), "merge_accumulate");
}

void lr_cuda_merge_finish(const struct lr_exec *exec, const struct lr_merge_args *args)
{
    const int64_t n = args->n_rows * args->n_heads * args->head_dim;
    if (n == 0)
        return;
    lr::merge_finish_kernel<<<static_cast<unsigned>((n + 255) / 256), 256, 0, static_cast<cudaStream_t>(exec->stream)>>>(
        *args);
    lr_cuda_note(exec, cudaGetLastError(), "merge_finish");
}
