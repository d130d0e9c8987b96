/* The one matrix product of the CUDA backend: dense layers and experts run the same persistent kernel.
 *
 *   rows of a, sorted by expert        tiles of 128 rows, none spans two experts     y
 *   offsets[e] ... offsets[e + 1]  ->  x COLUMNS rows of W_e                     ->  whole blocks, masked ends
 *
 *   warpgroup 0: one thread keeps a ring of stages full (a [128 x 64] and W [COLUMNS x 64], copy engine)
 *   warpgroups 1, 2: 64 rows each: wgmma over the stages in ascending k, then the epilogue
 *
 * The consumers share the stages but not their pace: while one is in its epilogue the other has the tensor cores. Of an
 * expert's last tile only the 64-row blocks that have rows are fetched and multiplied.
 *
 * Every output element is one chain of wgmma steps over ascending k in every instance of the kernel, so a row's bits
 * depend neither on the number of rows nor on the tile that it falls into. */
#ifndef LR_KERNELS_CUDA_GEMM_PRODUCT_CUH
#define LR_KERNELS_CUDA_GEMM_PRODUCT_CUH

#include "kernels/cuda/gemm.h"
#include "kernels/cuda/gemm_epilogue.cuh"
#include "kernels/cuda/gemm_wgmma.cuh"
#include "kernels/cuda/tma.cuh"

namespace lr::LR_CUDA_ACT
{

constexpr int TILE_K = 64; /* columns of a stage: one swizzled block */
constexpr int BLOCK_ROWS = 64; /* of a consumer */
constexpr int WARPGROUP_THREADS = 128;
constexpr int CONSUMERS = 2;
constexpr int TILE_ROWS = CONSUMERS * BLOCK_ROWS;
constexpr int CONSUMER_WARPS = 4 * CONSUMERS;
constexpr int PRODUCT_THREADS = (1 + CONSUMERS) * WARPGROUP_THREADS;
constexpr int BLOCK_BYTES = BLOCK_ROWS * TILE_K * 2;
constexpr int PRODUCER_REGISTERS = 40;
constexpr int CONSUMER_REGISTERS = 232;
constexpr int GROUP = 16; /* row tiles that walk the columns together, so that both operands stay in L2 */

/* An instance: tiles of COLUMNS rows of W. */
template <int COLUMNS_> struct product_shape {
    static constexpr int COLUMNS = COLUMNS_;
    static constexpr int A_BYTES = TILE_ROWS * TILE_K * 2, B_BYTES = COLUMNS * TILE_K * 2;
    static constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
    /* a narrow tile leaves room for a list of LR_MAX_EXPERTS experts */
    static constexpr int N_STAGES =
        (226 * 1024 - CONSUMERS * STAGING_BYTES - (COLUMNS > 64 ? 0 : 4 * LR_MAX_EXPERTS)) / STAGE_BYTES;
    static constexpr int BYTES = CONSUMERS * STAGING_BYTES + N_STAGES * (STAGE_BYTES + 2 * 8);
    static constexpr int MAX_EXPERTS = (227 * 1024 - BYTES) / 4 - 1; /* the list of tiles follows */
};

/* For much work, and for little: many small tiles. */
typedef product_shape<256> large_shape;
typedef product_shape<64> small_shape;

/* Columns of y that a tile covers. */
template <class SHAPE, output_kind OUTPUT>
constexpr int OUTPUT_COLUMNS = OUTPUT == output_kind::SWIGLU ? SHAPE::COLUMNS / 2 : SHAPE::COLUMNS;

/* What the tensor maps are made of, on the host: a [n_rows, k]; W or, with SwiGLU, gate and up [n_experts, n, k];
 * y [n_rows, n] if it is not float32. */
struct product_operands {
    matrix_view a, b[2], y;
};

/* Where a tile lies. */
struct tile {
    int64_t row; /* its first row */
    int n_rows;
    int column_tile;
    int expert;
};

/* Finds tiles by their number, which must ascend from call to call. `before` [n_experts + 1]: row tiles in front of
 * each expert. */
struct tile_walk {
    const int64_t *offsets;
    const int32_t *before;
    int64_t n_rows;
    int n_experts, n_column_tiles;
    int expert;

    __device__ __forceinline__ bool find(int64_t number, tile &t)
    {
        while (expert < n_experts && number >= static_cast<int64_t>(before[expert + 1]) * n_column_tiles)
            expert++;
        if (expert == n_experts)
            return false;
        const int n_row_tiles = before[expert + 1] - before[expert];
        const int local = static_cast<int>(number - static_cast<int64_t>(before[expert]) * n_column_tiles);
        const int group = local / (GROUP * n_column_tiles);
        const int in_group = local - group * GROUP * n_column_tiles;
        const int group_tiles = min(GROUP, n_row_tiles - group * GROUP);
        t.column_tile = in_group / group_tiles;
        const int row_tile = group * GROUP + in_group - t.column_tile * group_tiles;
        const int64_t first = offsets != nullptr ? __ldg(offsets + expert) - __ldg(offsets) : 0;
        const int64_t end = offsets != nullptr ? __ldg(offsets + expert + 1) - __ldg(offsets) : n_rows;
        t.row = first + static_cast<int64_t>(row_tile) * TILE_ROWS;
        t.n_rows = static_cast<int>(min(end - t.row, static_cast<int64_t>(TILE_ROWS)));
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

/* The ring's barriers and where the role stands in it; producer and consumers step through it alike. */
template <class SHAPE> struct ring {
    uint32_t stages, staging;
    uint64_t *full, *empty;
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ uint32_t a() const
    {
        return stages + stage * SHAPE::STAGE_BYTES;
    }
    __device__ __forceinline__ uint32_t b() const
    {
        return a() + SHAPE::A_BYTES;
    }
    /* A consumer warp is through with a stage. */
    __device__ __forceinline__ void release(int which) const
    {
        if (threadIdx.x % 32 == 0)
            barrier_arrive(&empty[which]);
    }
    __device__ __forceinline__ void advance()
    {
        if (++stage == SHAPE::N_STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

template <class SHAPE, output_kind OUTPUT>
static __device__ __forceinline__ void produce(const product_params &p, tile_walk walk, ring<SHAPE> ring)
{
    tile t;
    for (int64_t number = blockIdx.x; walk.find(number, t); number += gridDim.x) {
        const int n_blocks = (t.n_rows + BLOCK_ROWS - 1) / BLOCK_ROWS, row = static_cast<int>(t.row);
        const int column = t.column_tile * OUTPUT_COLUMNS<SHAPE, OUTPUT>;
        for (int step = 0; step < p.n_steps; step++, ring.advance()) {
            uint64_t *barrier = &ring.full[ring.stage];
            barrier_wait(&ring.empty[ring.stage], ring.parity ^ 1);
            barrier_announce(barrier, n_blocks * BLOCK_BYTES + SHAPE::B_BYTES);
            for (int block = 0; block < n_blocks; block++)
                tensor_load(ring.a() + block * BLOCK_BYTES, &p.a, barrier, step * TILE_K, row + block * BLOCK_ROWS, 0);
            tensor_load(ring.b(), &p.b[0], barrier, step * TILE_K, column, t.expert);
            if constexpr (OUTPUT == output_kind::SWIGLU)
                tensor_load(ring.b() + SHAPE::B_BYTES / 2, &p.b[1], barrier, step * TILE_K, column, t.expert);
        }
    }
}

/* The product of a consumer's rows with a tile of W. */
template <class SHAPE>
static __device__ __forceinline__ void multiply(float (&sum)[SHAPE::COLUMNS / 2], int n_steps, int consumer,
                                                ring<SHAPE> &ring)
{
    int previous = 0;
    for (int step = 0; step < n_steps; step++, ring.advance()) {
        const uint64_t a = tile_descriptor(ring.a() + consumer * BLOCK_BYTES, 0), b = tile_descriptor(ring.b(), 0);
        barrier_wait(&ring.full[ring.stage], ring.parity);
        wgmma_fence();
#pragma unroll
        for (int kk = 0; kk < TILE_K / 16; kk++)
            wgmma_shared(sum, a + 2 * kk, b + 2 * kk, step > 0 || kk > 0);
        wgmma_commit();
        if (step > 0) {
            wgmma_wait<1>();
            ring.release(previous);
        }
        previous = ring.stage;
    }
    wgmma_wait<0>();
    ring.release(previous);
}

/* A tile in which the consumer has no rows. */
template <class SHAPE> static __device__ __forceinline__ void skip(int n_steps, ring<SHAPE> &ring)
{
#pragma unroll 1
    for (int step = 0; step < n_steps; step++, ring.advance()) {
        barrier_wait(&ring.full[ring.stage], ring.parity);
        ring.release(ring.stage);
    }
}

template <class SHAPE, output_kind OUTPUT, bool GENERAL>
static __device__ __forceinline__ void consume(const product_params &p, tile_walk walk, ring<SHAPE> ring)
{
    const int consumer = threadIdx.x / WARPGROUP_THREADS - 1, first = consumer * BLOCK_ROWS;
    tile t;
    /* The second consumer starts later by what the ring holds. From then on one multiplies while the other stores. */
    if (consumer == 1 && p.n_steps >= SHAPE::N_STAGES && walk.find(blockIdx.x, t))
        barrier_wait(&ring.full[SHAPE::N_STAGES - 1], 0);
    for (int64_t number = blockIdx.x; walk.find(number, t); number += gridDim.x) {
        const int column = t.column_tile * OUTPUT_COLUMNS<SHAPE, OUTPUT>, n_rows = min(t.n_rows - first, BLOCK_ROWS);
        if (n_rows <= 0) {
            skip(p.n_steps, ring);
            continue;
        }
        if (OUTPUT == output_kind::F32 && p.accumulate)
            prefetch_rows<SHAPE::COLUMNS>(p, t.row + first, n_rows, column);
        float sum[SHAPE::COLUMNS / 2];
        multiply<SHAPE>(sum, p.n_steps, consumer, ring);
        store_tile<OUTPUT, GENERAL>(p, sum, t.row + first, n_rows, column, ring.staging + consumer * STAGING_BYTES,
                                    1 + consumer);
    }
    store_wait();
}

template <class SHAPE, output_kind OUTPUT, bool GENERAL>
static __global__ void __launch_bounds__(PRODUCT_THREADS, 1) product_kernel(const __grid_constant__ product_params p)
{
    extern __shared__ __align__(1024) uint8_t shared[];
    uint8_t *staging = shared + SHAPE::N_STAGES * SHAPE::STAGE_BYTES;
    uint64_t *full = reinterpret_cast<uint64_t *>(staging + CONSUMERS * STAGING_BYTES);
    uint64_t *empty = full + SHAPE::N_STAGES;
    int32_t *before = reinterpret_cast<int32_t *>(empty + SHAPE::N_STAGES);

    if (threadIdx.x < 32) {
        count_tiles(p, before);
        if (threadIdx.x == 0) {
            for (int i = 0; i < SHAPE::N_STAGES; i++) {
                barrier_init(&full[i], 1);
                barrier_init(&empty[i], CONSUMER_WARPS);
            }
            barrier_init_done();
            tensor_prefetch(&p.a);
            tensor_prefetch(&p.b[0]);
        }
    }
    __syncthreads();
    const tile_walk walk = {p.offsets, before, p.n_rows, p.n_experts, p.n_column_tiles, 0};
    const ring<SHAPE> ring = {shared_address(shared), shared_address(staging), full, empty};
    if (threadIdx.x < WARPGROUP_THREADS) {
        registers_shrink<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0)
            produce<SHAPE, OUTPUT>(p, walk, ring);
    } else {
        registers_grow<CONSUMER_REGISTERS>();
        consume<SHAPE, OUTPUT, GENERAL>(p, walk, ring);
    }
}

/* Fills in what follows from the shape, and launches. n_row_ends: how many tiles may not be full. */
template <class SHAPE, output_kind OUTPUT, bool GENERAL>
static cudaError_t launch_product(cudaStream_t stream, int n_multiprocessors, product_params &p,
                                  const product_operands &operands, int64_t n_row_ends)
{
    constexpr int COLUMNS = OUTPUT_COLUMNS<SHAPE, OUTPUT>;
    const auto kernel = product_kernel<SHAPE, OUTPUT, GENERAL>;
    const int n_bytes = SHAPE::BYTES + 4 * (p.n_experts + 1);
    cudaError_t error = tensor_map_encode(&p.a, operands.a, BLOCK_ROWS);
    for (int i = 0; error == cudaSuccess && i < (OUTPUT == output_kind::SWIGLU ? 2 : 1); i++)
        error = tensor_map_encode(&p.b[i], operands.b[i], COLUMNS);
    if (error == cudaSuccess && OUTPUT != output_kind::F32 && !GENERAL)
        error = tensor_map_encode(&p.stores, operands.y, BLOCK_ROWS);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes);
    if (error != cudaSuccess)
        return error;
    p.n_steps = static_cast<int>(divide_up(operands.a.columns, TILE_K));
    p.n_column_tiles = static_cast<int>(divide_up(p.n_columns, COLUMNS));
    const int64_t n_tiles = (p.n_rows / TILE_ROWS + n_row_ends) * p.n_column_tiles;
    const int n_blocks = static_cast<int>(n_tiles < n_multiprocessors ? n_tiles : n_multiprocessors);
    kernel<<<n_blocks, PRODUCT_THREADS, n_bytes, stream>>>(p);
    return cudaGetLastError();
}

/* Whether n_rows x n_columns gives every multiprocessor a tile of the large shape. */
static inline bool fills_device(int64_t n_rows, int64_t n_columns, int64_t n_experts, int tile_columns,
                                int n_multiprocessors)
{
    return n_experts <= large_shape::MAX_EXPERTS && n_columns > tile_columns / 2 &&
           divide_up(n_rows, TILE_ROWS) * divide_up(n_columns, tile_columns) >= n_multiprocessors;
}

} // namespace lr::LR_CUDA_ACT

#endif
