/* What attention needs beside hopper.cuh: bulk copies that report to an mbarrier, and named barriers that one side only
 * passes. Device code only, sm_90a. */
#ifndef LR_KERNELS_CUDA_ATTENTION_MMA_CUH
#define LR_KERNELS_CUDA_ATTENTION_MMA_CUH

#include "kernels/cuda/hopper.cuh"

namespace lr::LR_CUDA_ACT
{

/* The one arrival of the current phase, which then also waits for n_bytes of copies. */
static __device__ __forceinline__ void barrier_expect(uint64_t *barrier, uint32_t n_bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_bytes)
                 : "memory");
}

/* n_bytes (a multiple of 16) from global to shared memory, reported to the barrier. */
static __device__ __forceinline__ void copy_bulk(void *shared, const void *global, uint32_t n_bytes, uint64_t *barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(n_bytes), "r"(shared_address(barrier))
                 : "memory");
}

/* Counts towards the named barrier without waiting for it. */
static __device__ __forceinline__ void named_arrive(uint32_t id, uint32_t n_threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

/* Sixteen bytes of shared memory. */
static __device__ __forceinline__ int4 load_shared(uint32_t shared)
{
    int4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(shared));
    return x;
}

} // namespace lr::LR_CUDA_ACT

#endif
