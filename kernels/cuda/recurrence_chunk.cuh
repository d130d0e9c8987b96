/* One chunk of 64 tokens in shared memory, as both passes over a sub-segment have it: blocks of q, k and v, the inverse
 * T, and what the tokens' decays amount to. Device code only, sm_80 and later. */
#ifndef LR_KERNELS_CUDA_RECURRENCE_CHUNK_CUH
#define LR_KERNELS_CUDA_RECURRENCE_CHUNK_CUH

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/recurrence_grid.cuh"

namespace lr::LR_CUDA_ACT
{

constexpr uint32_t BLOCK_BYTES = CHUNK * 128; /* 64 tokens x 64 columns of activations */

/* Per-token factors of a stage's chunk. */
struct __align__(16) chunk_decays
{
    float sum[CHUNK];        /* G, in log2 */
    float from_start[CHUNK]; /* exp(G), times the scale of q where outputs are made */
    float to_end[CHUNK];     /* exp(G_end - G) */
    float whole;             /* exp(G_end) */
};

/* 64 tokens x 64 columns into a swizzled block, zeros behind the last token. 128 threads. */
static __device__ __forceinline__ void
load_block(uint32_t block, const act *columns, int64_t stride, int64_t row, int64_t end, int thread)
{
    const int piece = thread % 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int token = thread / 8 + 16 * i;
        const bool valid = row + token < end;
        const act *source = valid ? columns + (row + token) * stride + piece * 8 : columns;
        copy_async(block + swizzled(token, piece), source, valid);
    }
}

/* T is lower triangular: of its rows only the 32-byte sectors up to the diagonal move. 128 threads. */
static __device__ __forceinline__ bool holds_inverse(int row, int piece)
{
    return piece / 2 <= row / 16;
}

static __device__ __forceinline__ void load_inverse(uint32_t block, const act *inverse, int thread)
{
    const int piece = thread % 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = thread / 8 + 16 * i;
        if (holds_inverse(row, piece)) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(block + swizzled(row, piece)),
                         "l"(inverse + row * CHUNK + piece * 8)
                         : "memory");
        }
    }
}

/* One warp: the decays of tokens [row, row + 64) from the log2 decays of tokens 2 lane and 2 lane + 1. */
static __device__ __forceinline__ float
sum_decays(struct chunk_decays *d, float first, float second, float scale, int lane)
{
    float sum = first + second;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const float below = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) {
            sum += below;
        }
    }
    const float end = __shfl_sync(0xffffffffu, sum, 31);
    float before = __shfl_up_sync(0xffffffffu, sum, 1);
    before = lane == 0 ? 0.0f : before;
    const float middle = before + first;
    d->sum[2 * lane] = middle;
    d->sum[2 * lane + 1] = sum;
    d->from_start[2 * lane] = exp2_fast(middle) * scale;
    d->from_start[2 * lane + 1] = exp2_fast(sum) * scale;
    d->to_end[2 * lane] = exp2_fast(end - middle);
    d->to_end[2 * lane + 1] = exp2_fast(end - sum);
    if (lane == 0) {
        d->whole = exp2_fast(end);
    }
    return end;
}

} // namespace lr::LR_CUDA_ACT

#endif
