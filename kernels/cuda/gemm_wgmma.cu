/* The matrix product on sm_90a: dense layers and experts run the same persistent kernel.
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
#include "kernels/cuda/backend.h"
#include "kernels/cuda/gemm_epilogue.cuh"
#include "kernels/cuda/gemm_tiles.cuh"
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
constexpr int STAGING_COLUMNS = 128;
constexpr int STAGING_BYTES = BLOCK_ROWS * STAGING_COLUMNS * 2; /* of a consumer */

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

struct product_params {
    CUtensorMap a;      /* [1, n_rows, k], boxes of 64 rows */
    CUtensorMap b[2];   /* [n_experts, n, k], boxes of COLUMNS rows; SwiGLU: gate and up, COLUMNS / 2 rows each */
    CUtensorMap stores; /* y, boxes of 64 rows */
    product_rows rows;
    product_output output;
    int n_steps; /* of TILE_K along k */
};

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
static __device__ __forceinline__ void produce(const product_params &p, tile_walk<TILE_ROWS> walk, ring<SHAPE> ring)
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

template <int SIZE>
static __device__ __forceinline__ void multiply_step(float (&sum)[SIZE], uint64_t a, uint64_t b, bool accumulate)
{
    if constexpr (SIZE == 32)
        wgmma_n64_shared(sum, a, b, accumulate);
    else if constexpr (SIZE == 64)
        wgmma_n128_shared(sum, a, b, accumulate);
    else
        wgmma_n256_shared(sum, a, b, accumulate);
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
            multiply_step(sum, a + 2 * kk, b + 2 * kk, step > 0 || kk > 0);
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

/* Four 8x8 blocks of 16-bit numbers: lane l gives the address of row l mod 8 of block l / 8. */
static __device__ __forceinline__ void store_blocks(uint32_t shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

/* N columns of 64 rows as activations through `staging`, the warpgroup's own STAGING_BYTES, as many columns at a time
 * as it holds. Returns while the copy engine still reads the last of them. */
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

/* The warpgroup's n_rows (1..64) rows from `row` on. Where there are 64 the copy engine writes them while the warpgroup
 * multiplies on; where there are fewer it would overwrite the next expert's rows. `barrier` is the warpgroup's named
 * barrier, `staging` its own shared memory. */
template <output_kind OUTPUT, bool GENERAL, int SIZE>
static __device__ __forceinline__ void store_tile(const product_params &p, float (&sum)[SIZE], int64_t row, int n_rows,
                                                  int first_column, uint32_t staging, int barrier)
{
    constexpr int N = OUTPUT == output_kind::SWIGLU ? SIZE : 2 * SIZE; /* columns of y */
    const int warp_row = threadIdx.x % 128 / 32 * 16;
    finish_sums<OUTPUT, GENERAL>(p.output, sum, first_column);
    if (!GENERAL && OUTPUT != output_kind::F32 && N % 64 == 0 && n_rows == 64)
        store_boxes<N>(p, sum, static_cast<int>(row), first_column, staging, barrier);
    else
        store_rows<OUTPUT, GENERAL>(p.output, sum, row + warp_row, n_rows - warp_row, first_column);
}

template <class SHAPE, output_kind OUTPUT, bool GENERAL>
static __device__ __forceinline__ void consume(const product_params &p, tile_walk<TILE_ROWS> walk, ring<SHAPE> ring)
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
        if (OUTPUT == output_kind::F32 && p.output.accumulate)
            prefetch_rows<BLOCK_ROWS, SHAPE::COLUMNS, WARPGROUP_THREADS>(p.output, t.row + first, n_rows, column);
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
        count_tiles<TILE_ROWS>(p.rows, before);
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
    const tile_walk<TILE_ROWS> walk = {p.rows, before, 0};
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

template <class SHAPE, output_kind OUTPUT, bool GENERAL>
static cudaError_t launch_shape(const struct lr_exec *exec, const product &from)
{
    constexpr int COLUMNS = OUTPUT_COLUMNS<SHAPE, OUTPUT>;
    const auto kernel = product_kernel<SHAPE, OUTPUT, GENERAL>;
    const int n_bytes = SHAPE::BYTES + 4 * (from.rows.n_experts + 1);
    const int64_t row_bytes = from.output.y_stride * 2;
    const matrix_view y = {from.output.y, from.output.n_columns, from.rows.n_rows, 1, row_bytes,
                           from.rows.n_rows * row_bytes};
    product_params p = {};
    cudaError_t error = tensor_map_encode(&p.a, from.a, BLOCK_ROWS);
    for (int i = 0; error == cudaSuccess && i < (OUTPUT == output_kind::SWIGLU ? 2 : 1); i++)
        error = tensor_map_encode(&p.b[i], from.b[i], COLUMNS);
    if (error == cudaSuccess && OUTPUT != output_kind::F32 && !GENERAL)
        error = tensor_map_encode(&p.stores, y, BLOCK_ROWS);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes);
    if (error != cudaSuccess)
        return error;
    p.rows = from.rows;
    p.rows.n_column_tiles = static_cast<int>(divide_up(from.output.n_columns, COLUMNS));
    p.output = from.output;
    p.n_steps = static_cast<int>(divide_up(from.a.columns, TILE_K));
    const int64_t n_tiles = bound_row_tiles(p.rows, TILE_ROWS) * p.rows.n_column_tiles;
    const int64_t n_multiprocessors = lr_cuda_multiprocessors(exec);
    const unsigned n_blocks = static_cast<unsigned>(n_tiles < n_multiprocessors ? n_tiles : n_multiprocessors);
    kernel<<<n_blocks, PRODUCT_THREADS, n_bytes, static_cast<cudaStream_t>(exec->stream)>>>(p);
    return cudaGetLastError();
}

/* Large tiles where they give every multiprocessor one; small ones where not (a step of decoding has one row: only the
 * columns are left to spread), and for what is rare. The sum of an element is the same chain in both, so this choice
 * does not show in the bits. */
template <output_kind OUTPUT> static cudaError_t launch_kind(const struct lr_exec *exec, const product &p)
{
    constexpr int COLUMNS = OUTPUT_COLUMNS<large_shape, OUTPUT>;
    const int64_t n_columns = p.output.n_columns;
    const int64_t n_large = divide_up(p.rows.n_rows, TILE_ROWS) * divide_up(n_columns, COLUMNS);
    if (p.general)
        return launch_shape<small_shape, OUTPUT, true>(exec, p);
    if (n_columns > COLUMNS / 2 && n_large >= lr_cuda_multiprocessors(exec) &&
        p.rows.n_experts <= large_shape::MAX_EXPERTS)
        return launch_shape<large_shape, OUTPUT, false>(exec, p);
    return launch_shape<small_shape, OUTPUT, false>(exec, p);
}

cudaError_t launch_product_wgmma(const struct lr_exec *exec, const product &p)
{
    switch (p.kind) {
    case output_kind::ACT:
        return launch_kind<output_kind::ACT>(exec, p);
    case output_kind::F32:
        return launch_kind<output_kind::F32>(exec, p);
    case output_kind::SWIGLU:
        return launch_kind<output_kind::SWIGLU>(exec, p);
    }
    return cudaErrorInvalidValue;
}

} // namespace lr::LR_CUDA_ACT
