/* The router: softmax over a row's logits, the top_k largest, their weights.
 *
 *   LANES lanes a row, expert e in lane e mod LANES, PER_LANE of them in registers
 *
 * A round finds the largest p that is not taken yet, and of equals the lowest expert. Lane k keeps the choice of round
 * k; at the end every lane counts how many choices are lower than its own, which is the place of its own. With more
 * experts or choices than the registers hold, p and the choices lie in shared memory. */
#include "kernels/cuda/backend.h"

#include <cuda_runtime.h>
#include <math.h>

namespace lr::LR_CUDA_ACT
{

constexpr int WARPS = 4;
constexpr unsigned ALL = 0xffffffffu;

/* Of the LANES lanes around each. */
template <int LANES> static __device__ __forceinline__ float lanes_max(float x)
{
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2)
        x = fmaxf(x, __shfl_xor_sync(ALL, x, step));
    return x;
}

template <int LANES> static __device__ __forceinline__ float lanes_sum(float x)
{
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2)
        x += __shfl_xor_sync(ALL, x, step);
    return x;
}

template <int LANES> static __device__ __forceinline__ unsigned lanes_max(unsigned x)
{
    if constexpr (LANES == 32) {
        return __reduce_max_sync(ALL, x);
    } else {
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2)
            x = max(x, __shfl_xor_sync(ALL, x, step));
        return x;
    }
}

/* Orders like p; 0 for what cannot be chosen: taken (-1) or a NaN. */
static __device__ __forceinline__ unsigned rank_key(float p)
{
    return p >= 0.0f ? __float_as_uint(p) + 1 : 0;
}

/* The choice of a round from each lane's best: its key, and its expert turned round so that the lower one wins. */
template <int LANES> static __device__ __forceinline__ int choose(unsigned key, int expert, unsigned &best_key)
{
    best_key = lanes_max<LANES>(key);
    return static_cast<int>(~lanes_max<LANES>(key == best_key && key != 0 ? ~static_cast<unsigned>(expert) : 0u));
}

template <int LANES, int PER_LANE>
static __global__ void __launch_bounds__(WARPS * 32) router_kernel(const lr_router_args args)
{
    constexpr int ROWS = 32 / LANES; /* of a warp */
    const int lane = threadIdx.x % LANES;
    const int n_experts = static_cast<int>(args.n_experts), top_k = static_cast<int>(args.top_k);
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    const int64_t row = warp * ROWS + threadIdx.x % 32 / LANES;
    const bool there = row < args.n_rows;
    float p[PER_LANE], largest = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int e = i * LANES + lane;
        p[i] = there && e < n_experts ? __ldg(args.logits + row * n_experts + e) : -INFINITY;
        largest = fmaxf(largest, p[i]);
    }
    largest = lanes_max<LANES>(largest);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        p[i] = i * LANES + lane < n_experts ? expf(p[i] - largest) : 0.0f;
        sum += p[i];
    }
    sum = lanes_sum<LANES>(sum);
#pragma unroll
    for (int i = 0; i < PER_LANE; i++)
        p[i] = i * LANES + lane < n_experts ? __fdiv_rn(p[i], sum) : -1.0f;

    int chosen = INT32_MAX;
    float weight = 0.0f, total = 0.0f;
    for (int k = 0; k < top_k; k++) {
        unsigned key = 0, best_key;
        int expert = 0;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (rank_key(p[i]) > key) {
                key = rank_key(p[i]);
                expert = i * LANES + lane;
            }
        expert = choose<LANES>(key, expert, best_key);
        float best = __uint_as_float(best_key - 1);
        if (__any_sync(ALL, best_key == 0)) { /* a row without a number: the lowest expert that is left */
            int lowest = 0;
            for (int i = 0; i < k; i++)
                for (int j = 0; j < k; j++)
                    lowest += __shfl_sync(ALL, chosen, j, LANES) == lowest;
            expert = best_key == 0 ? lowest : expert;
            best = best_key == 0 ? NAN : best;
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            p[i] = i * LANES + lane == expert ? -1.0f : p[i];
        if (lane == k) {
            chosen = expert;
            weight = best;
        }
        total += best;
    }
    int place = 0;
    for (int k = 0; k < top_k; k++)
        place += __shfl_sync(ALL, chosen, k, LANES) < chosen;
    if (there && lane < top_k) {
        args.ids[row * top_k + place] = chosen;
        args.weights[row * top_k + place] = args.renormalize ? __fdiv_rn(weight, total) : weight;
    }
}

/* One warp a row, everything in shared memory. */
static __global__ void __launch_bounds__(WARPS * 32) wide_router_kernel(const lr_router_args args)
{
    extern __shared__ float shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int n_experts = static_cast<int>(args.n_experts), top_k = static_cast<int>(args.top_k);
    float *p = shared + warp * (n_experts + 2 * top_k), *weights = p + n_experts;
    int *chosen = reinterpret_cast<int *>(weights + top_k);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + warp;
    if (row >= args.n_rows)
        return;
    const float *logits = args.logits + row * n_experts;
    float largest = -INFINITY, sum = 0.0f, total = 0.0f;
    for (int e = lane; e < n_experts; e += 32)
        largest = fmaxf(largest, logits[e]);
    largest = lanes_max<32>(largest);
    for (int e = lane; e < n_experts; e += 32) {
        p[e] = expf(logits[e] - largest);
        sum += p[e];
    }
    sum = lanes_sum<32>(sum);
    for (int e = lane; e < n_experts; e += 32)
        p[e] = __fdiv_rn(p[e], sum);
    for (int k = 0; k < top_k; k++) {
        unsigned key = 0, best_key;
        int expert = 0;
        for (int e = lane; e < n_experts; e += 32)
            if (rank_key(p[e]) > key) {
                key = rank_key(p[e]);
                expert = e;
            }
        expert = choose<32>(key, expert, best_key);
        const float best = best_key == 0 ? NAN : __uint_as_float(best_key - 1);
        __syncwarp();
        if (best_key == 0) {
            expert = 0;
            for (int i = 0; i < k; i++)
                for (int j = 0; j < k; j++)
                    expert += chosen[j] == expert;
        }
        __syncwarp();
        if (lane == expert % 32) {
            p[expert] = -1.0f;
            chosen[k] = expert;
            weights[k] = best;
        }
        total += best;
    }
    __syncwarp();
    for (int k = lane; k < top_k; k += 32) {
        int place = 0;
        for (int j = 0; j < top_k; j++)
            place += chosen[j] < chosen[k];
        args.ids[row * top_k + place] = chosen[k];
        args.weights[row * top_k + place] = args.renormalize ? __fdiv_rn(weights[k], total) : weights[k];
    }
}

template <int LANES, int PER_LANE> static cudaError_t launch_router(cudaStream_t stream, const lr_router_args &args)
{
    constexpr int64_t ROWS = WARPS * (32 / LANES);
    const int64_t n_blocks = (args.n_rows + ROWS - 1) / ROWS;
    router_kernel<LANES, PER_LANE><<<static_cast<unsigned>(n_blocks), WARPS * 32, 0, stream>>>(args);
    return cudaGetLastError();
}

static cudaError_t route(cudaStream_t stream, const lr_router_args &args)
{
    if (args.n_experts <= 8)
        return launch_router<8, 1>(stream, args);
    if (args.n_experts <= 32)
        return launch_router<32, 1>(stream, args);
    if (args.n_experts <= 128 && args.top_k <= 32)
        return launch_router<32, 4>(stream, args);
    if (args.n_experts <= 512 && args.top_k <= 32)
        return launch_router<32, 16>(stream, args);
    const int n_bytes = static_cast<int>(WARPS * (args.n_experts + 2 * args.top_k) * 4);
    const cudaError_t error =
        cudaFuncSetAttribute(wide_router_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes);
    if (error != cudaSuccess)
        return error;
    wide_router_kernel<<<static_cast<unsigned>((args.n_rows + WARPS - 1) / WARPS), WARPS * 32, n_bytes, stream>>>(args);
    return cudaGetLastError();
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(router)(const struct lr_exec *exec, const struct lr_router_args *args)
{
    if (args->n_rows > 0)
        lr_cuda_note(exec, lr::route(static_cast<cudaStream_t>(exec->stream), *args), "router");
}
