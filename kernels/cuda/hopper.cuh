/* The Hopper instructions that our kernels use, one inline function each: mbarrier, stmatrix, fences, and wgmma (in
 * wgmma.cuh); with what every device has (mma.cuh).
 *
 * Device code only, for files that are compiled for sm_90a alone: LR_CUDA_HOPPER in kernels/CMakeLists.txt. */
#ifndef LR_KERNELS_CUDA_HOPPER_CUH
#define LR_KERNELS_CUDA_HOPPER_CUH

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace lr::LR_CUDA_ACT
{

/* ---- mbarrier ----------------------------------------------------------------------------------------------------- */

static __device__ __forceinline__ void barrier_init(uint64_t *barrier, uint32_t n_arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_arrivals) : "memory");
}

static __device__ __forceinline__ void barrier_arrive(uint64_t *barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

/* Waits for the phase of the given parity (the first phase has parity 0) to complete. With LR_CUDA_BOUND_WAITS a wait of
 * seconds ends the kernel with an error instead of hanging. */
static __device__ __forceinline__ void barrier_wait(uint64_t *barrier, uint32_t parity)
{
#ifdef LR_CUDA_BOUND_WAITS
    const long long start = clock64();
    for (uint32_t done = 0; !done;) {
        asm volatile("{\n"
                     ".reg .pred done;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, done;\n"
                     "}\n"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
        if (clock64() - start > 4000000000)
            __trap();
    }
#else
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra.uni reached;\n"
                 "bra.uni again;\n"
                 "reached:\n"
                 "}\n" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
#endif
}

/* ---- fences and registers ---------------------------------------------------------------------------------------- */

/* Makes this thread's ordinary writes to shared memory visible to wgmma. */
static __device__ __forceinline__ void fence_to_wgmma()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int N> static __device__ __forceinline__ void registers_grow()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> static __device__ __forceinline__ void registers_shrink()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* Four 8x8 blocks of 16-bit numbers, transposed: lane l gives the address of row l mod 8 of block l / 8. */
static __device__ __forceinline__ void store_transposed(uint32_t shared, const uint32_t (&r)[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

} // namespace lr::LR_CUDA_ACT

#endif
