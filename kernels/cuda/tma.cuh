/* The copy engine's instructions: a box of a matrix into shared memory, reported to an mbarrier. One thread issues
 * them. Device code only. */
#ifndef LR_KERNELS_CUDA_TMA_CUH
#define LR_KERNELS_CUDA_TMA_CUH

#include "kernels/cuda/hopper.cuh"
#include <cuda.h>

namespace lr
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

/* The box whose first element is [batch, row, column]; with CLUSTER > 1 to the same place in every block of the cluster,
 * each of whose barriers hears of it. */
template <int CLUSTER>
static __device__ __forceinline__ void tensor_load(uint32_t shared, const CUtensorMap *map, uint64_t *barrier,
                                                   int column, int row, int batch)
{
    if constexpr (CLUSTER == 1) {
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared),
                     "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(batch)
                     : "memory");
    } else {
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared),
                     "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(column), "r"(row),
                     "r"(batch), "h"(static_cast<uint16_t>((1 << CLUSTER) - 1))
                     : "memory");
    }
}

/* ---- clusters ---- */

static __device__ __forceinline__ int cluster_rank()
{
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

static __device__ __forceinline__ void cluster_sync()
{
    asm volatile("barrier.cluster.arrive.release;\n"
                 "barrier.cluster.wait.acquire;" ::: "memory");
}

/* Arrives at the barrier that lies at the same address in block `rank` of the cluster. */
static __device__ __forceinline__ void barrier_arrive_remote(uint64_t *barrier, int rank)
{
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                 "}\n" ::"r"(shared_address(barrier)),
                 "r"(rank)
                 : "memory");
}

} // namespace lr

#endif
