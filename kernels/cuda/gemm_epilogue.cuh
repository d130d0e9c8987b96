/* What happens to finished sums between the accumulators and global memory: bias, activation, SwiGLU, the residual,
 * rounding. wgmma and mma leave them alike: of a warp's 16 rows x N columns a lane holds
 *
 *   sum[4 i + 2 h + c]: row  lane / 4 + 8 h,  column  8 i + 2 (lane mod 4) + c
 *
 * activations:  quads of lanes exchange four pieces of 8 columns, after which every lane stores 16 bytes and a quad
 *               64 bytes of a row in one instruction
 * float32:      a quad has 32 bytes of a row
 *
 * Device code only. */
#ifndef LR_KERNELS_CUDA_GEMM_EPILOGUE_CUH
#define LR_KERNELS_CUDA_GEMM_EPILOGUE_CUH

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/mma.cuh"

namespace lr::LR_CUDA_ACT
{

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

/* The bias, where there is one. */
template <int SIZE>
static __device__ __forceinline__ void add_bias(const product_output &o, float (&sum)[SIZE], int first_column)
{
    if (o.bias == nullptr)
        return;
    const int column = first_column + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < SIZE / 4; i++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float bias = column + 8 * i + c < o.n_columns ? __ldg(o.bias + column + 8 * i + c) : 0.0f;
            sum[4 * i + c] += bias;
            sum[4 * i + 2 + c] += bias;
        }
}

/* Sums to values of y, in place; SwiGLU: gate columns | up columns -> the first half. Without GENERAL there is no
 * activation (SwiGLU: SiLU). */
template <output_kind OUTPUT, bool GENERAL, int SIZE>
static __device__ __forceinline__ void finish_sums(const product_output &o, float (&sum)[SIZE], int first_column)
{
    if constexpr (OUTPUT == output_kind::SWIGLU) {
#pragma unroll
        for (int i = 0; i < SIZE / 2; i++)
            sum[i] = (GENERAL ? activate(sum[i], o.activation) : silu(sum[i])) * sum[SIZE / 2 + i];
    } else {
        add_bias(o, sum, first_column);
        if (GENERAL && o.activation != LR_ACT_NONE) {
#pragma unroll
            for (int i = 0; i < SIZE; i++)
                sum[i] = activate(sum[i], o.activation);
        }
    }
}

/* The stores of a warp: `row` is its first row of y, `n_rows` how many there are from it on (any number). */

template <int N, int SIZE>
static __device__ __forceinline__ void store_pieces(const product_output &o, const float (&sum)[SIZE], int64_t row,
                                                    int n_rows, int first_column)
{
    static_assert(N % 32 == 0, "whole quads of pieces");
    const int lane = threadIdx.x % 32, own_row = lane / 4, column = first_column + 8 * (lane % 4);
    act *y = static_cast<act *>(o.y) + (row + own_row) * o.y_stride + column;
    const int n_columns = o.n_columns - column;
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
                *reinterpret_cast<uint4 *>(y + 8 * h * o.y_stride + 32 * block) = make_uint4(w[0], w[1], w[2], w[3]);
        }
}

/* float32 in pairs: a quad covers a sector of 32 bytes. */
template <int N>
static __device__ __forceinline__ void store_pairs(const product_output &o, const float (&sum)[N / 2], int64_t row,
                                                   int n_rows, int first_column)
{
    const int lane = threadIdx.x % 32;
    constexpr int BATCH = 8; /* pairs read before the first is written */
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int r = lane / 4 + 8 * h, column = first_column + 2 * (lane % 4);
        float *y = static_cast<float *>(o.y) + (row + r) * o.y_stride + column;
        const int n_columns = r < n_rows ? o.n_columns - column : 0;
#pragma unroll
        for (int block = 0; block < N / 8; block += BATCH) {
            float2 value[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                value[i] = make_float2(0.0f, 0.0f);
                if (o.accumulate && 8 * (block + i) < n_columns)
                    value[i] = *reinterpret_cast<const float2 *>(y + 8 * (block + i));
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const float *pair = &sum[4 * (block + i) + 2 * h];
                value[i] = o.accumulate ? make_float2(value[i].x + pair[0], value[i].y + pair[1])
                                        : make_float2(pair[0], pair[1]);
                if (8 * (block + i) < n_columns)
                    *reinterpret_cast<float2 *>(y + 8 * (block + i)) = value[i];
            }
        }
    }
}

/* One element at a time, for any stride and width. */
template <int N, bool WIDE, int SIZE>
static __device__ __forceinline__ void store_elements(const product_output &o, const float (&sum)[SIZE], int64_t row,
                                                      int n_rows, int first_column)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * N / 4; i++) {
        const int r = lane / 4 + (i & 2) * 4, column = first_column + i / 4 * 8 + 2 * (lane % 4) + (i & 1);
        if (r >= n_rows || column >= o.n_columns)
            continue;
        const int64_t at = (row + r) * o.y_stride + column;
        if constexpr (WIDE) {
            float *y = static_cast<float *>(o.y) + at;
            *y = o.accumulate ? *y + sum[i] : sum[i];
        } else {
            act *y = static_cast<act *>(o.y) + at;
            *y = to_act(o.accumulate ? from_act(*y) + sum[i] : sum[i]);
        }
    }
}

/* Without GENERAL activations are not accumulated, and y may be written in pieces of 8 of them, of 2 floats. */
template <output_kind OUTPUT, bool GENERAL, int SIZE>
static __device__ __forceinline__ void store_rows(const product_output &o, const float (&sum)[SIZE], int64_t row,
                                                  int n_rows, int first_column)
{
    constexpr int N = OUTPUT == output_kind::SWIGLU ? SIZE : 2 * SIZE; /* columns of y */
    if constexpr (GENERAL)
        store_elements<N, OUTPUT == output_kind::F32>(o, sum, row, n_rows, first_column);
    else if constexpr (OUTPUT == output_kind::F32)
        store_pairs<N>(o, sum, row, n_rows, first_column);
    else
        store_pieces<N>(o, sum, row, n_rows, first_column);
}

/* Asks for ROWS x N floats of y that THREADS threads will add to, long before they do: from device memory they would
 * come too late. */
template <int ROWS, int N, int THREADS>
static __device__ __forceinline__ void prefetch_rows(const product_output &o, int64_t row, int n_rows, int first_column)
{
    constexpr int LINE = 32; /* floats of 128 bytes */
#pragma unroll
    for (int i = 0; i < ROWS * N / LINE / THREADS; i++) {
        const int at = threadIdx.x % THREADS + THREADS * i;
        const int r = at / (N / LINE), column = first_column + at % (N / LINE) * LINE;
        const float *y = static_cast<const float *>(o.y) + (row + r) * o.y_stride + column;
        if (r < n_rows && column < o.n_columns)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(y) : "memory");
    }
}

} // namespace lr::LR_CUDA_ACT

#endif
