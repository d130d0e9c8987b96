/* RMSNorm of the residual stream: float32 in, activations out. A row stays in registers between its sum and its use:
 *
 *   thread t of the row's WARPS * 32 holds columns 4 (t + i * threads) .. + 3, i < QUADS
 *
 * 16-byte loads, 8-byte stores, both contiguous over a warp. Rows too long for that are read twice. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/rows.cuh"

namespace lr::LR_CUDA_ACT
{

template <bool ALIGNED> static __device__ __forceinline__ float4 load_quad(const float *x, int64_t n)
{
    if (ALIGNED)
        return n > 0 ? *reinterpret_cast<const float4 *>(x) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    return make_float4(n > 0 ? x[0] : 0.0f, n > 1 ? x[1] : 0.0f, n > 2 ? x[2] : 0.0f, n > 3 ? x[3] : 0.0f);
}

template <bool ALIGNED> static __device__ __forceinline__ void store_quad(act *y, const float4 &x, int64_t n)
{
    if (ALIGNED) {
        if (n > 0)
            *reinterpret_cast<uint2 *>(y) = make_uint2(pack_act(x.x, x.y), pack_act(x.z, x.w));
        return;
    }
    const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (i < n)
            y[i] = to_act(values[i]);
}

static __device__ __forceinline__ float sum_of_squares(const float4 &x, float sum)
{
    return fmaf(x.w, x.w, fmaf(x.z, x.z, fmaf(x.y, x.y, fmaf(x.x, x.x, sum))));
}

static __device__ __forceinline__ float4 scaled(const float4 &x, float scale, const float4 &w, float offset)
{
    return make_float4(x.x * scale * (offset + w.x), x.y * scale * (offset + w.y), x.z * scale * (offset + w.z),
                       x.w * scale * (offset + w.w));
}

/* The sum over a row's threads, in every one of them. */
template <int WARPS> static __device__ __forceinline__ float row_sum(float sum)
{
    sum = group_sum<32>(sum);
    if (WARPS == 1)
        return sum;
    __shared__ float partial[WARPS];
    if (threadIdx.x % 32 == 0)
        partial[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++)
        sum += partial[i];
    return sum;
}

template <int WARPS> struct row_spread {
    static constexpr int THREADS = WARPS * 32;
    static constexpr int ROWS = WARPS == 1 ? 8 : 1; /* of a block */
};

template <int WARPS, int QUADS, bool ALIGNED>
static __global__ void __launch_bounds__(row_spread<WARPS>::THREADS *row_spread<WARPS>::ROWS)
    rmsnorm_kernel(const struct lr_rmsnorm_args a)
{
    constexpr int THREADS = row_spread<WARPS>::THREADS;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * row_spread<WARPS>::ROWS + threadIdx.x / THREADS;
    if (row >= a.n_rows) /* all of a warp, or all of the block */
        return;
    const int64_t first = threadIdx.x % THREADS * 4;
    const float *x = a.x + row * a.x_stride;
    float4 quads[QUADS];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const int64_t column = first + i * THREADS * 4;
        quads[i] = load_quad<ALIGNED>(x + column, a.n_cols - column);
    }
#pragma unroll
    for (int i = 0; i < QUADS; i++)
        sum = sum_of_squares(quads[i], sum);
    const float scale = rsqrtf(row_sum<WARPS>(sum) / static_cast<float>(a.n_cols) + a.eps);
    act *y = static_cast<act *>(a.y) + row * a.y_stride;
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const int64_t column = first + i * THREADS * 4, left = a.n_cols - column;
        const float4 w = load_quad<ALIGNED>(a.w + column, left);
        store_quad<ALIGNED>(y + column, scaled(quads[i], scale, w, a.plus_one ? 1.0f : 0.0f), left);
    }
}

/* Rows of any length, a block each. */
template <bool ALIGNED>
static __global__ void __launch_bounds__(512) rmsnorm_long_kernel(const struct lr_rmsnorm_args a)
{
    const float *x = a.x + blockIdx.x * a.x_stride;
    act *y = static_cast<act *>(a.y) + blockIdx.x * a.y_stride;
    float sum = 0.0f;
    for (int64_t column = threadIdx.x * 4; column < a.n_cols; column += 512 * 4)
        sum = sum_of_squares(load_quad<ALIGNED>(x + column, a.n_cols - column), sum);
    const float scale = rsqrtf(row_sum<16>(sum) / static_cast<float>(a.n_cols) + a.eps);
    for (int64_t column = threadIdx.x * 4; column < a.n_cols; column += 512 * 4) {
        const int64_t left = a.n_cols - column;
        const float4 w = load_quad<ALIGNED>(a.w + column, left);
        store_quad<ALIGNED>(y + column,
                            scaled(load_quad<ALIGNED>(x + column, left), scale, w, a.plus_one ? 1.0f : 0.0f), left);
    }
}

template <int WARPS, int QUADS, bool ALIGNED>
static void launch_rmsnorm(cudaStream_t stream, const struct lr_rmsnorm_args &args)
{
    using spread = row_spread<WARPS>;
    rmsnorm_kernel<WARPS, QUADS, ALIGNED>
        <<<blocks_for(args.n_rows, spread::ROWS), spread::THREADS * spread::ROWS, 0, stream>>>(args);
}

template <bool ALIGNED> static void rmsnorm(cudaStream_t stream, const struct lr_rmsnorm_args &args)
{
    if (args.n_cols <= 256)
        launch_rmsnorm<1, 2, ALIGNED>(stream, args);
    else if (args.n_cols <= 512)
        launch_rmsnorm<1, 4, ALIGNED>(stream, args);
    else if (args.n_cols <= 1024)
        launch_rmsnorm<4, 2, ALIGNED>(stream, args);
    else if (args.n_cols <= 2048)
        launch_rmsnorm<4, 4, ALIGNED>(stream, args);
    else if (args.n_cols <= 4096)
        launch_rmsnorm<4, 8, ALIGNED>(stream, args);
    else if (args.n_cols <= 8192)
        launch_rmsnorm<8, 8, ALIGNED>(stream, args);
    else
        rmsnorm_long_kernel<ALIGNED><<<static_cast<unsigned>(args.n_rows), 512, 0, stream>>>(args);
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(rmsnorm)(const struct lr_exec *exec, const struct lr_rmsnorm_args *args)
{
    if (args->n_rows <= 0 || args->n_cols <= 0)
        return;
    const bool aligned = lr::are_aligned(16, args->x, args->w) && lr::are_aligned(8, args->y) &&
                         (args->x_stride | args->y_stride | args->n_cols) % 4 == 0;
    if (aligned)
        lr::rmsnorm<true>(lr::stream_of(exec), *args);
    else
        lr::rmsnorm<false>(lr::stream_of(exec), *args);
    lr_cuda_note(exec, cudaGetLastError(), "rmsnorm");
}
