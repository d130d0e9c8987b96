/* What happens to a finished block of rows between the accumulators and global memory: bias, activation, SwiGLU, the
 * residual, rounding. A thread of a warpgroup holds, of 64 rows x N columns,
 *
 *   sum[4 i + 2 h + c]: row  16 warp + lane / 4 + 8 h,  column  8 i + 2 (lane mod 4) + c
 *
 * activations, 64 rows:  through shared memory, from which the copy engine writes while the warpgroup multiplies on
 * activations, fewer:    the copy engine would overwrite the next expert's rows. Quads of lanes exchange four pieces of 8
 *                 columns, after which every lane stores 16 bytes and a quad 64 bytes of a row in one instruction
 * float32:        a quad has 32 bytes of a row
 *
 * Device code only. */
#ifndef LR_KERNELS_CUDA_GEMM_EPILOGUE_CUH
#define LR_KERNELS_CUDA_GEMM_EPILOGUE_CUH

#include "kernels/cuda/tma.cuh"
#include "kernels/ops.h"

namespace lr::LR_CUDA_ACT
{

constexpr int STAGING_COLUMNS = 128;
constexpr int STAGING_BYTES = 64 * STAGING_COLUMNS * 2; /* of a warpgroup */

enum class output_kind { BF16, F32, SWIGLU };

struct product_params {
    CUtensorMap a;    /* [1, n_rows, k], boxes of 64 rows */
    CUtensorMap b[2]; /* [n_experts, n, k], boxes of COLUMNS rows; SwiGLU: gate and up, COLUMNS / 2 rows each */
    CUtensorMap stores; /* y, boxes of 64 rows */
    const int64_t *offsets;
    int64_t n_rows;
    int n_experts;
    int n_column_tiles;
    int n_columns; /* of y */
    int n_steps;   /* of TILE_K along k */
    void *y;
    int64_t y_stride;
    const float *bias;
    lr_activation activation;
    int accumulate;
};

static __device__ __forceinline__ float reciprocal(float x)
{
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* x / (1 + e^-x); e^-x may be infinite, its reciprocal is then 0. */
static __device__ __forceinline__ float silu(float x)
{
    return x * reciprocal(1.0f + exp2_fast(x * -1.4426950408889634f));
}

static __device__ __forceinline__ float activate(float x, lr_activation activation)
{
    switch (activation) {
    case LR_ACT_SILU:
        return silu(x);
    case LR_ACT_GELU:
        return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    case LR_ACT_GELU_TANH:
        return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * fmaf(0.044715f * x * x, x, x)));
    case LR_ACT_RELU:
        return fmaxf(x, 0.0f);
    case LR_ACT_NONE:
        break;
    }
    return x;
}

/* Transposes 4 x 4 words over a quad: word j of lane q becomes word q of lane j. */
static __device__ __forceinline__ void quad_transpose(uint32_t (&w)[4], int lane)
{
    const bool odd = lane & 1, high = lane & 2;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? w[j] : w[j + 1], 1);
        w[j] = odd ? other : w[j];
        w[j + 1] = odd ? w[j + 1] : other;
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, high ? w[j] : w[j + 2], 2);
        w[j] = high ? other : w[j];
        w[j + 2] = high ? w[j + 2] : other;
    }
}

/* Four 8x8 blocks of 16 bits: lane l gives the address of row l mod 8 of block l / 8. */
static __device__ __forceinline__ void store_blocks(uint32_t shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

/* N columns of 64 rows as activations through `staging`, the warpgroup's own STAGING_BYTES, as many columns at a time as it
 * holds. Returns while the copy engine still reads the last of them. */
template <int N, int SIZE>
static __device__ __forceinline__ void store_boxes(const product_params &p, const float (&sum)[SIZE], int row,
                                                   int first_column, uint32_t staging, int barrier)
{
    constexpr int WIDTH = N < STAGING_COLUMNS ? N : STAGING_COLUMNS;
    const int lane = threadIdx.x % 32, own_row = threadIdx.x % 128 / 32 * 16 + lane % 16;
    const bool leader = threadIdx.x % 128 == 0;
#pragma unroll
    for (int first = 0; first < N; first += WIDTH) {
        if (leader)
            store_wait_read();
        named_barrier(barrier, 128);
#pragma unroll
        for (int i = 0; i < WIDTH / 16; i++) {
            const float *x = &sum[4 * (first / 8 + 2 * i)];
            const uint32_t at = staging + i / 4 * (64 * 128) + swizzled(own_row, i % 4 * 2 + lane / 16);
            store_blocks(at, pack_act(x[0], x[1]), pack_act(x[2], x[3]), pack_act(x[4], x[5]),
                         pack_act(x[6], x[7]));
        }
        fence_to_wgmma(); /* and to the copy engine */
        named_barrier(barrier, 128);
        if (leader) {
#pragma unroll
            for (int i = 0; i < WIDTH / 64; i++)
                tensor_store(&p.stores, staging + i * (64 * 128), first_column + first + 64 * i, row);
            store_commit();
        }
    }
}

/* The first 2 N sums as activations. */
template <int N, int SIZE>
static __device__ __forceinline__ void store_pieces(const product_params &p, const float (&sum)[SIZE], int64_t row,
                                                    int n_rows, int first_column)
{
    const int lane = threadIdx.x % 32, own_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    act *y = static_cast<act *>(p.y) + (row + own_row) * p.y_stride + first_column + 8 * (lane % 4);
    const int n_columns = p.n_columns - first_column - 8 * (lane % 4);
#pragma unroll
    for (int block = 0; block < N / 32; block++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t w[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                w[j] = pack_act(sum[4 * (4 * block + j) + 2 * h], sum[4 * (4 * block + j) + 2 * h + 1]);
            quad_transpose(w, lane);
            if (own_row + 8 * h < n_rows && 32 * block < n_columns)
                *reinterpret_cast<uint4 *>(y + 8 * h * p.y_stride + 32 * block) = make_uint4(w[0], w[1], w[2], w[3]);
        }
}

/* Asks for the rows of y that a block will add to, long before it does: from device memory they would come too late. */
template <int N>
static __device__ __forceinline__ void prefetch_rows(const product_params &p, int64_t row, int n_rows, int first_column)
{
    constexpr int LINE = 32; /* floats of 128 bytes */
    const int thread = threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < 64 * N / LINE / 128; i++) {
        const int r = (thread + 128 * i) / (N / LINE), column = first_column + (thread + 128 * i) % (N / LINE) * LINE;
        const float *y = static_cast<const float *>(p.y) + (row + r) * p.y_stride + column;
        if (r < n_rows && column < p.n_columns)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(y) : "memory");
    }
}

/* float32 in pairs: a quad covers a sector of 32 bytes. */
template <int N>
static __device__ __forceinline__ void store_pairs(const product_params &p, const float (&sum)[N / 2], int64_t row,
                                                   int n_rows, int first_column)
{
    const int lane = threadIdx.x % 32, own_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    constexpr int BATCH = 8; /* pairs read before the first is written */
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = own_row + 8 * h, column = first_column + 2 * (lane % 4);
        float *y = static_cast<float *>(p.y) + (row + r) * p.y_stride + column;
        const int n_columns = r < n_rows ? p.n_columns - column : 0;
#pragma unroll
        for (int block = 0; block < N / 8; block += BATCH) {
            float2 value[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                value[i] = make_float2(0.0f, 0.0f);
                if (p.accumulate && 8 * (block + i) < n_columns)
                    value[i] = *reinterpret_cast<const float2 *>(y + 8 * (block + i));
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const float *pair = &sum[4 * (block + i) + 2 * h];
                value[i] = p.accumulate ? make_float2(value[i].x + pair[0], value[i].y + pair[1])
                                        : make_float2(pair[0], pair[1]);
                if (8 * (block + i) < n_columns)
                    *reinterpret_cast<float2 *>(y + 8 * (block + i)) = value[i];
            }
        }
    }
}

/* One element at a time, for any stride and width. */
template <int N, bool WIDE, int SIZE>
static __device__ __forceinline__ void store_elements(const product_params &p, const float (&sum)[SIZE], int64_t row,
                                                      int n_rows, int first_column)
{
    const int lane = threadIdx.x % 32, own_row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 2 * N / 4; i++) {
        const int r = own_row + (i & 2) * 4, column = first_column + i / 4 * 8 + 2 * (lane % 4) + (i & 1);
        if (r >= n_rows || column >= p.n_columns)
            continue;
        const int64_t at = (row + r) * p.y_stride + column;
        if constexpr (WIDE) {
            float *y = static_cast<float *>(p.y) + at;
            *y = p.accumulate ? *y + sum[i] : sum[i];
        } else {
            act *y = static_cast<act *>(p.y) + at;
            *y = to_act(p.accumulate ? from_act(*y) + sum[i] : sum[i]);
        }
    }
}

/* The bias, where there is one. */
template <int SIZE>
static __device__ __forceinline__ void add_bias(const product_params &p, float (&sum)[SIZE], int first_column)
{
    if (p.bias == nullptr)
        return;
    const int column = first_column + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < SIZE / 4; i++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float bias = column + 8 * i + c < p.n_columns ? __ldg(p.bias + column + 8 * i + c) : 0.0f;
            sum[4 * i + c] += bias;
            sum[4 * i + 2 + c] += bias;
        }
}

/* The warpgroup's n_rows (1..64) rows from `row` on. Without GENERAL: no activation (SwiGLU: SiLU), an activation is not
 * accumulated, and y may be written in pieces of 8 elements (activations), of 2 (float32). `barrier` is the warpgroup's
 * named barrier, `staging` its own shared memory. */
template <output_kind OUTPUT, bool GENERAL, int SIZE>
static __device__ __forceinline__ void store_tile(const product_params &p, float (&sum)[SIZE], int64_t row, int n_rows,
                                                  int first_column, uint32_t staging, int barrier)
{
    constexpr int N = OUTPUT == output_kind::SWIGLU ? SIZE : 2 * SIZE; /* columns of y */
    if constexpr (OUTPUT == output_kind::SWIGLU) {
#pragma unroll
        for (int i = 0; i < SIZE / 2; i++)
            sum[i] = (GENERAL ? activate(sum[i], p.activation) : silu(sum[i])) * sum[SIZE / 2 + i];
    } else {
        add_bias(p, sum, first_column);
        if (GENERAL && p.activation != LR_ACT_NONE) {
#pragma unroll
            for (int i = 0; i < SIZE; i++)
                sum[i] = activate(sum[i], p.activation);
        }
    }
    if constexpr (GENERAL)
        store_elements<N, OUTPUT == output_kind::F32>(p, sum, row, n_rows, first_column);
    else if constexpr (OUTPUT == output_kind::F32)
        store_pairs<N>(p, sum, row, n_rows, first_column);
    else if (N % 64 == 0 && n_rows == 64)
        store_boxes<N>(p, sum, static_cast<int>(row), first_column, staging, barrier);
    else
        store_pieces<N>(p, sum, row, n_rows, first_column);
}

} // namespace lr::LR_CUDA_ACT

#endif
