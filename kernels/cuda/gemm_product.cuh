/* The one matrix product of the CUDA backend: dense layers and experts run the same persistent kernel.
 *
 *   rows of a (sorted by expert)      tiles of 128 rows, none spans two experts     y
 *   offsets[e] ... offsets[e + 1]  -> x COLUMNS columns of W_e                   -> masked stores
 *
 *   warpgroup 0: one thread keeps a ring of stages full (a [128 x 64] and W [COLUMNS x 64], copy engine)
 *   warpgroups 1, 2: 64 rows each: wgmma over the stages in ascending k, then the epilogue from registers
 *
 * The two consumers share the stages but not their pace: while one is in its epilogue the other has the tensor cores.
 * A tile of at most 64 rows leaves the second consumer idle and costs half.
 *
 * Every output element is one chain of wgmma steps over ascending k in every instance of the kernel, so a row's bits
 * depend neither on the number of rows nor on the tile that it falls into. */
#ifndef LR_KERNELS_CUDA_GEMM_PRODUCT_CUH
#define LR_KERNELS_CUDA_GEMM_PRODUCT_CUH

#include "kernels/cuda/gemm_epilogue.cuh"
#include "kernels/cuda/gemm_wgmma.cuh"
#include "kernels/cuda/tma.cuh"

namespace lr
{

constexpr int TILE_K = 64;                  /* columns of a stage: one swizzled block */
constexpr int WARPGROUP_ROWS = 64;
constexpr int WARPGROUP_THREADS = 128;
constexpr int PRODUCT_THREADS = 3 * WARPGROUP_THREADS;
constexpr int ROWS_BLOCK_BYTES = WARPGROUP_ROWS * TILE_K * 2;
constexpr int CONSUMER_WARPS = 8;
constexpr int PRODUCER_REGISTERS = 40;
constexpr int CONSUMER_REGISTERS = 232;
constexpr int GROUP_TILES = 16; /* row tiles that walk the columns together, so that both operands stay in L2 */

template <int COLUMNS> struct product_ring {
    static constexpr int A_BYTES = TILE_ROWS * TILE_K * 2;
    static constexpr int STAGE_BYTES = A_BYTES + COLUMNS * TILE_K * 2;
    static constexpr int N_STAGES = 192 * 1024 / STAGE_BYTES;
    static constexpr int BARRIER_BYTES = 2 * 8 * N_STAGES;
    static constexpr int BYTES = N_STAGES * STAGE_BYTES + BARRIER_BYTES; /* the list of tiles follows */
};

/* Where a tile lies. */
struct tile {
    int64_t row;  /* its first row */
    int n_rows;   /* 1..TILE_ROWS */
    int column;   /* its first output column */
    int expert;
};

/* Finds tiles by their number, which must ascend from call to call. `before` [n_experts + 1]: row tiles in front of
 * each expert. */
struct tile_walk {
    const int64_t *offsets;
    const int32_t *before;
    int64_t n_rows;
    int n_experts, n_column_tiles, columns;
    int expert;

    __device__ __forceinline__ bool find(int64_t number, tile &t)
    {
        while (expert < n_experts && number >= static_cast<int64_t>(before[expert + 1]) * n_column_tiles)
            expert++;
        if (expert == n_experts)
            return false;
        const int n_row_tiles = before[expert + 1] - before[expert];
        const int local = static_cast<int>(number - static_cast<int64_t>(before[expert]) * n_column_tiles);
        const int group = local / (GROUP_TILES * n_column_tiles);
        const int in_group = local - group * GROUP_TILES * n_column_tiles;
        const int group_rows = min(GROUP_TILES, n_row_tiles - group * GROUP_TILES);
        const int column_tile = in_group / group_rows;
        const int row_tile = group * GROUP_TILES + in_group - column_tile * group_rows;
        const int64_t first = offsets != nullptr ? __ldg(offsets + expert) - __ldg(offsets) : 0;
        const int64_t end = offsets != nullptr ? __ldg(offsets + expert + 1) - __ldg(offsets) : n_rows;
        t.row = first + static_cast<int64_t>(row_tile) * TILE_ROWS;
        t.n_rows = static_cast<int>(min(end - t.row, static_cast<int64_t>(TILE_ROWS)));
        t.column = column_tile * columns;
        t.expert = expert;
        return true;
    }
};

/* One warp: before[e] for all experts. */
static __device__ __forceinline__ void count_tiles(const product_params &p, int32_t *before)
{
    const int lane = threadIdx.x % 32;
    int total = 0;
    for (int base = 0; base < p.n_experts; base += 32) {
        const int e = base + lane;
        int64_t n_rows = 0;
        if (e < p.n_experts)
            n_rows = p.offsets != nullptr ? p.offsets[e + 1] - p.offsets[e] : p.n_rows;
        int sum = static_cast<int>((n_rows + TILE_ROWS - 1) / TILE_ROWS);
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, sum, step);
            sum += lane >= step ? other : 0;
        }
        if (e < p.n_experts)
            before[e + 1] = total + sum;
        total += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (lane == 0)
        before[0] = 0;
}

/* The place in the ring; producer and consumers step through it alike. */
template <int N_STAGES> struct ring_place {
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance()
    {
        if (++stage == N_STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

template <int COLUMNS, output_kind OUTPUT>
static __device__ __forceinline__ void produce(const product_params &p, tile_walk walk, uint32_t stages,
                                               uint64_t *full, uint64_t *empty)
{
    using ring = product_ring<COLUMNS>;
    ring_place<ring::N_STAGES> place;
    tile t;
    for (int64_t number = blockIdx.x; walk.find(number, t); number += gridDim.x) {
        const bool both = t.n_rows > WARPGROUP_ROWS;
        const uint32_t n_bytes = ring::STAGE_BYTES - (both ? 0 : ROWS_BLOCK_BYTES);
        const int row = static_cast<int>(t.row);
        for (int step = 0; step < p.n_steps; step++) {
            const uint32_t a = stages + place.stage * ring::STAGE_BYTES, b = a + ring::A_BYTES;
            uint64_t *barrier = &full[place.stage];
            barrier_wait(&empty[place.stage], place.parity ^ 1);
            barrier_announce(barrier, n_bytes);
            tensor_load(a, &p.a, barrier, step * TILE_K, row, 0);
            if (both)
                tensor_load(a + ROWS_BLOCK_BYTES, &p.a, barrier, step * TILE_K, row + WARPGROUP_ROWS, 0);
            tensor_load(b, &p.b[0], barrier, step * TILE_K, t.column, t.expert);
            if constexpr (OUTPUT == output_kind::SWIGLU)
                tensor_load(b + COLUMNS / 2 * TILE_K * 2, &p.b[1], barrier, step * TILE_K, t.column, t.expert);
            place.advance();
        }
    }
}

template <int COLUMNS, output_kind OUTPUT, bool ANY_ACTIVATION>
static __device__ __forceinline__ void consume(const product_params &p, tile_walk walk, uint32_t stages,
                                               uint64_t *full, uint64_t *empty)
{
    using ring = product_ring<COLUMNS>;
    const int group = threadIdx.x / WARPGROUP_THREADS - 1;
    const int lane = threadIdx.x % 32;
    ring_place<ring::N_STAGES> place;
    tile t;
    for (int64_t number = blockIdx.x; walk.find(number, t); number += gridDim.x) {
        if (group * WARPGROUP_ROWS >= t.n_rows) {
            for (int step = 0; step < p.n_steps; step++, place.advance()) {
                barrier_wait(&full[place.stage], place.parity);
                if (lane == 0)
                    barrier_arrive(&empty[place.stage]);
            }
            continue;
        }
        float sum[COLUMNS / 2];
        int previous = 0;
        for (int step = 0; step < p.n_steps; step++) {
            const uint32_t base = stages + place.stage * ring::STAGE_BYTES;
            const uint64_t a = tile_descriptor(base + group * ROWS_BLOCK_BYTES, 0);
            const uint64_t b = tile_descriptor(base + ring::A_BYTES, 0);
            barrier_wait(&full[place.stage], place.parity);
            wgmma_fence();
#pragma unroll
            for (int kk = 0; kk < TILE_K / 16; kk++)
                wgmma_shared(sum, a + 2 * kk, b + 2 * kk, step > 0 || kk > 0);
            wgmma_commit();
            if (step > 0) {
                wgmma_wait<1>();
                if (lane == 0)
                    barrier_arrive(&empty[previous]);
            }
            previous = place.stage;
            place.advance();
        }
        wgmma_wait<0>();
        if (lane == 0)
            barrier_arrive(&empty[previous]);
        store_tile<OUTPUT, ANY_ACTIVATION>(p, sum, t.row + group * WARPGROUP_ROWS, t.n_rows - group * WARPGROUP_ROWS,
                                           t.column);
    }
}

template <int COLUMNS, output_kind OUTPUT, bool ANY_ACTIVATION>
static __global__ void __launch_bounds__(PRODUCT_THREADS, 1) product_kernel(const __grid_constant__ product_params p)
{
    using ring = product_ring<COLUMNS>;
    extern __shared__ __align__(1024) uint8_t shared[];
    uint64_t *full = reinterpret_cast<uint64_t *>(shared + ring::N_STAGES * ring::STAGE_BYTES);
    uint64_t *empty = full + ring::N_STAGES;
    int32_t *before = reinterpret_cast<int32_t *>(empty + ring::N_STAGES);

    if (threadIdx.x < 32) {
        count_tiles(p, before);
        if (threadIdx.x == 0) {
            for (int i = 0; i < ring::N_STAGES; i++) {
                barrier_init(&full[i], 1);
                barrier_init(&empty[i], CONSUMER_WARPS);
            }
            barrier_init_done();
            tensor_prefetch(&p.a);
            tensor_prefetch(&p.b[0]);
        }
    }
    __syncthreads();
    const int columns = OUTPUT == output_kind::SWIGLU ? COLUMNS / 2 : COLUMNS;
    const tile_walk walk = {p.offsets, before, p.n_rows, p.n_experts, p.n_column_tiles, columns, 0};
    const uint32_t stages = shared_address(shared);
    if (threadIdx.x < WARPGROUP_THREADS) {
        registers_shrink<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0)
            produce<COLUMNS, OUTPUT>(p, walk, stages, full, empty);
    } else {
        registers_grow<CONSUMER_REGISTERS>();
        consume<COLUMNS, OUTPUT, ANY_ACTIVATION>(p, walk, stages, full, empty);
    }
}

/* n_row_tiles: a bound. */
template <int COLUMNS, output_kind OUTPUT, bool ANY_ACTIVATION>
static cudaError_t launch_product(cudaStream_t stream, int n_multiprocessors, const product_params &p,
                                  int64_t n_row_tiles)
{
    const auto kernel = product_kernel<COLUMNS, OUTPUT, ANY_ACTIVATION>;
    const int n_bytes = product_ring<COLUMNS>::BYTES + 4 * (p.n_experts + 1);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes);
    if (error != cudaSuccess)
        return error;
    const int64_t n_tiles = n_row_tiles * p.n_column_tiles;
    const int n_blocks = static_cast<int>(n_tiles < n_multiprocessors ? n_tiles : n_multiprocessors);
    kernel<<<n_blocks, PRODUCT_THREADS, n_bytes, stream>>>(p);
    return cudaGetLastError();
}

} // namespace lr

#endif
