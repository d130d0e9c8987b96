/* The activation type that a file of this directory is compiled for. Kernels are written once and compiled once for
 * each type, as kernels/cpu is once for each instruction set:
 *
 *                   LR_CUDA(gemm)        act              LR_CUDA_ACT
 *   as it is        lr_cuda_gemm_bf16    __nv_bfloat16    bf16           8 bits, the range of float32
 *   LR_CUDA_F16     lr_cuda_gemm_f16     __half           f16            11 bits, up to 65504
 *
 * open.c picks a table. Weights, keys and values are of the same type; sums, states and logits are float32 in both.
 * C and CUDA C++. */
#ifndef LR_KERNELS_CUDA_ACT_H
#define LR_KERNELS_CUDA_ACT_H

#ifdef LR_CUDA_F16
#define LR_CUDA_ACT f16
#define LR_CUDA(name) lr_cuda_##name##_f16
#define LR_CUDA_DTYPE LR_F16
#else
#define LR_CUDA_ACT bf16
#define LR_CUDA(name) lr_cuda_##name##_bf16
#define LR_CUDA_DTYPE LR_BF16
#endif

#ifdef __CUDACC__

#ifdef LR_CUDA_F16
#define LR_CUDA_MMA "f16" /* in the names of mma and wgmma */
#else
#define LR_CUDA_MMA "bf16"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace lr
{
/* What follows in lr::LR_CUDA_ACT is another function in each compilation, and still called lr::name. */
inline namespace LR_CUDA_ACT
{

#ifdef LR_CUDA_F16
using act = __half;

static __host__ __device__ __forceinline__ float from_act(act x)
{
    return __half2float(x);
}

static __host__ __device__ __forceinline__ act to_act(float x)
{
    return __float2half_rn(x);
}

/* Two floats rounded to the activation type, `low` in the lower half. */
static __device__ __forceinline__ uint32_t pack_act(float low, float high)
{
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

static __device__ __forceinline__ float low_of(uint32_t packed)
{
    return __half2float(__ushort_as_half(static_cast<unsigned short>(packed)));
}

static __device__ __forceinline__ float high_of(uint32_t packed)
{
    return __half2float(__ushort_as_half(static_cast<unsigned short>(packed >> 16)));
}
#else
using act = __nv_bfloat16;

static __host__ __device__ __forceinline__ float from_act(act x)
{
    return __bfloat162float(x);
}

static __host__ __device__ __forceinline__ act to_act(float x)
{
    return __float2bfloat16_rn(x);
}

/* Two floats rounded to the activation type, `low` in the lower half. */
static __device__ __forceinline__ uint32_t pack_act(float low, float high)
{
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

static __device__ __forceinline__ float low_of(uint32_t packed)
{
    return __uint_as_float(packed << 16);
}

static __device__ __forceinline__ float high_of(uint32_t packed)
{
    return __uint_as_float(packed & 0xffff0000u);
}
#endif

} // namespace LR_CUDA_ACT
} // namespace lr

#endif

#endif
