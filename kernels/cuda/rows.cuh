/* What the byte-bound kernels share. They all read rows in pieces of 8 columns (16 bytes of activations), one piece a thread
 * at a time, neighbouring threads on neighbouring pieces:
 *
 *   head   | piece 0 | piece 1 | ... | piece LANES-1 | piece LANES | ...        LANES threads, PIECES pieces each
 *            lane 0    lane 1          lane LANES-1    lane 0
 *
 * Where addresses or strides are not multiples of 16 bytes the same pieces are read element by element, so that a sum
 * over a row has the same shape, and the same bits, wherever the row lies. That shape depends on the row's length only.
 *
 * Device code and the launchers' arithmetic. */
#ifndef LR_KERNELS_CUDA_ROWS_CUH
#define LR_KERNELS_CUDA_ROWS_CUH

#include "kernels/cuda/act.h"
#include "kernels/cuda/mma.cuh"
#include "kernels/ops.h"

#include <cuda_runtime.h>

namespace lr::LR_CUDA_ACT
{


constexpr int ROW_THREADS = 256; /* of a block */
constexpr float LOG2_E = 1.4426950408889634f;

/* ---- division by a number that the host knows ---- */

/* n / d for n < 2^31: multiply by ceil(2^(31 + s) / d), 2^s the power of two from d on, and shift; exact. */
struct divider {
    uint32_t d, multiplier, shift;

    __device__ __forceinline__ uint32_t of(uint32_t n) const
    {
        return static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
    }
};

static inline struct divider divider_by(int64_t d)
{
    uint32_t s = 0;
    while (static_cast<int64_t>(1) << s < d)
        s++;
    const uint64_t power = static_cast<uint64_t>(1) << (31 + s), wide = static_cast<uint64_t>(d);
    return {static_cast<uint32_t>(d), static_cast<uint32_t>((power + wide - 1) / wide), 31 + s};
}

/* Calls launch(first row, rows) for slices of rows that have less than 2^31 units each: one, but for huge calls. */
template <class Launch> static inline void for_row_slices(int64_t n_rows, int64_t units_per_row, Launch launch)
{
    if (units_per_row <= 0)
        return;
    const int64_t most = (INT32_MAX - 65536) / units_per_row;
    for (int64_t first = 0; first < n_rows; first += most)
        launch(first, n_rows - first < most ? n_rows - first : most);
}

static inline unsigned blocks_for(int64_t n_items, int64_t per_block)
{
    return static_cast<unsigned>((n_items + per_block - 1) / per_block);
}

static inline cudaStream_t stream_of(const struct lr_exec *exec)
{
    return static_cast<cudaStream_t>(exec->stream);
}

/* All of these are multiples of `bytes`. */
template <class... Address> static inline bool are_aligned(size_t bytes, Address... address)
{
    return (0 | ... | reinterpret_cast<size_t>(address)) % bytes == 0;
}

/* ---- pieces ---- */

struct piece {
    float v[8];
};

/* Columns that do not exist (from n on) are zero and not read. ALIGNED: n is a multiple of 8. */
template <bool ALIGNED> static __device__ __forceinline__ struct piece load_piece(const act *x, int n)
{
    struct piece p;
    if constexpr (ALIGNED) {
        const uint4 words = n > 0 ? *reinterpret_cast<const uint4 *>(x) : make_uint4(0, 0, 0, 0);
        const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            p.v[2 * i] = low_of(pairs[i]);
            p.v[2 * i + 1] = high_of(pairs[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            p.v[i] = i < n ? from_act(x[i]) : 0.0f;
    }
    return p;
}

template <bool ALIGNED> static __device__ __forceinline__ void store_piece(act *y, const struct piece &p, int n)
{
    if constexpr (ALIGNED) {
        if (n > 0)
            *reinterpret_cast<uint4 *>(y) = make_uint4(pack_act(p.v[0], p.v[1]), pack_act(p.v[2], p.v[3]),
                                                       pack_act(p.v[4], p.v[5]), pack_act(p.v[6], p.v[7]));
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < n)
                y[i] = to_act(p.v[i]);
    }
}

/* The same of float32. ALIGNED: 16 bytes. */
template <bool ALIGNED> static __device__ __forceinline__ struct piece load_piece(const float *x, int n)
{
    struct piece p;
    if constexpr (ALIGNED) {
        const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const float4 low = n > 0 ? reinterpret_cast<const float4 *>(x)[0] : zero;
        const float4 high = n > 0 ? reinterpret_cast<const float4 *>(x)[1] : zero;
        p = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            p.v[i] = i < n ? x[i] : 0.0f;
    }
    return p;
}

static __device__ __forceinline__ float sum_of_squares(const struct piece &p, float sum)
{
#pragma unroll
    for (int i = 0; i < 8; i++)
        sum = fmaf(p.v[i], p.v[i], sum);
    return sum;
}

/* Over the LANES neighbouring threads; everyone gets it. The whole warp calls. */
template <int LANES> static __device__ __forceinline__ float group_sum(float x)
{
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2)
        x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

/* ---- functions ---- */

/* Good to 2^-21; 0 and 1 far out. */
static __device__ __forceinline__ float sigmoid_fast(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + exp2_fast(-LOG2_E * x)));
    return y;
}

static __device__ __forceinline__ float activate(float x, enum lr_activation activation)
{
    switch (activation) {
    case LR_ACT_SILU:
        return x * sigmoid_fast(x);
    case LR_ACT_GELU:
        return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case LR_ACT_GELU_TANH:
        return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case LR_ACT_RELU:
        return x > 0.0f ? x : 0.0f;
    case LR_ACT_NONE:
        break;
    }
    return x;
}

/* ---- heads ---- */

/* How a head is spread over threads, and how many heads a thread has, so that enough loads are in flight. */
template <int LANES_, int PIECES_, int UNITS_, bool ALIGNED_> struct head_spread {
    static constexpr int LANES = LANES_, PIECES = PIECES_, UNITS = UNITS_;
    static constexpr bool ALIGNED = ALIGNED_;
    static constexpr int PER_BLOCK = ROW_THREADS / LANES * UNITS;

    /* The thread's u-th head, of the launch's. */
    static __device__ __forceinline__ uint32_t unit(int u)
    {
        return (blockIdx.x * UNITS + static_cast<uint32_t>(u)) * (ROW_THREADS / LANES) + threadIdx.x / LANES;
    }

    /* The first column of its i-th piece. */
    static __device__ __forceinline__ int column(int i)
    {
        return (static_cast<int>(threadIdx.x) % LANES + i * LANES) * 8;
    }
};

/* Calls launch with the spread for the head's size (up to LR_MAX_HEAD_DIM); UNITS where a head is one piece a thread.
 */
template <int UNITS, bool ALIGNED, class Launch> static inline void with_spread(int64_t head_dim, Launch launch)
{
    if (head_dim <= 64)
        launch(head_spread<8, 1, UNITS, ALIGNED>{});
    else if (head_dim <= 128)
        launch(head_spread<16, 1, UNITS, ALIGNED>{});
    else if (head_dim <= 256)
        launch(head_spread<32, 1, UNITS, ALIGNED>{});
    else if (head_dim <= 512)
        launch(head_spread<32, 2, 1, ALIGNED>{});
    else
        launch(head_spread<32, 4, 1, ALIGNED>{});
}

template <int UNITS, class Launch> static inline void with_spread(int64_t head_dim, bool aligned, Launch launch)
{
    if (aligned)
        with_spread<UNITS, true>(head_dim, launch);
    else
        with_spread<UNITS, false>(head_dim, launch);
}

} // namespace lr::LR_CUDA_ACT

#endif
