/* The copy engine's instructions: a box of a matrix into shared memory, reported to an mbarrier. One thread issues
 * them. Device code only. */
#ifndef LR_KERNELS_CUDA_TMA_CUH
#define LR_KERNELS_CUDA_TMA_CUH

#include "kernels/cuda/hopper.cuh"
#include <cuda.h>

namespace lr::LR_CUDA_ACT
{

/* Arrives and announces n_bytes: the phase completes when that many have landed. */
static __device__ __forceinline__ void barrier_announce(uint64_t *barrier, uint32_t n_bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_bytes)
                 : "memory");
}

/* Barriers that were just initialised become visible to the copy engine. */
static __device__ __forceinline__ void barrier_init_done()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

static __device__ __forceinline__ void tensor_prefetch(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

/* The box whose first element is [batch, row, column]. */
static __device__ __forceinline__ void tensor_load(uint32_t shared, const CUtensorMap *map, uint64_t *barrier,
                                                   int column, int row, int batch)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared),
                 "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(batch)
                 : "memory");
}

/* A box from shared memory to [0, row, column]; what lies beyond the matrix is cut. The thread's stores form groups. */
static __device__ __forceinline__ void tensor_store(const CUtensorMap *map, uint32_t shared, int column, int row)
{
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
                     reinterpret_cast<uint64_t>(map)),
                 "r"(shared), "r"(column), "r"(row), "r"(0)
                 : "memory");
}

static __device__ __forceinline__ void store_commit()
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

/* Until the shared memory of the thread's stores may be written again. */
static __device__ __forceinline__ void store_wait_read()
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

/* Until they are in global memory. */
static __device__ __forceinline__ void store_wait()
{
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

} // namespace lr::LR_CUDA_ACT

#endif
