/* The matrix product for every device since sm_80: dense layers and experts run the same persistent kernel.
 *
 *   rows of a, sorted by expert        tiles of ROWS rows, none spans two experts     y
 *   offsets[e] ... offsets[e + 1]  ->  x COLUMNS rows of W_e                      ->  whole blocks, masked ends
 *
 *   global memory --cp.async--> ring of stages: a [ROWS x TILE_K], W [COLUMNS x TILE_K]
 *                 --ldmatrix--> fragments, one step of 16 ahead --mma--> sums [WARP_ROWS x WARP_COLUMNS] of each warp
 *
 * All the threads of a block copy, N_STAGES - 1 stages ahead and on into the next tile, so that the ring is full when a
 * tile begins.
 *
 * Every output element is one chain of mma steps over ascending k in every instance of the kernel, so a row's bits
 * depend neither on the number of rows nor on the tile that it falls into. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/gemm_epilogue.cuh"
#include "kernels/cuda/gemm_tiles.cuh"
#include "kernels/cuda/mma.cuh"

namespace lr::LR_CUDA_ACT
{

constexpr int TILE_K = 64; /* columns of a stage: one swizzled block */
constexpr int K_STEPS = TILE_K / 16;
constexpr int PIECES = TILE_K / 8; /* of 16 bytes in a row of a stage */

/* An instance: tiles of ROWS x COLUMNS, cut among WARPS_DOWN x WARPS_ACROSS warps. */
template <int ROWS_, int COLUMNS_, int WARPS_DOWN, int WARPS_ACROSS_, int N_STAGES_, int BLOCKS_> struct mma_shape {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, WARPS_ACROSS = WARPS_ACROSS_, N_STAGES = N_STAGES_;
    static constexpr int BLOCKS = BLOCKS_; /* that share a multiprocessor, where it has the memory */
    static constexpr int THREADS = 32 * WARPS_DOWN * WARPS_ACROSS;
    static constexpr int WARP_ROWS = ROWS / WARPS_DOWN, WARP_COLUMNS = COLUMNS / WARPS_ACROSS;
    static constexpr int COPY_ROWS = THREADS / PIECES; /* that the block copies at a time */
    static constexpr int A_BYTES = ROWS * TILE_K * 2, STAGE_BYTES = A_BYTES + COLUMNS * TILE_K * 2;
};

typedef mma_shape<128, 256, 2, 4, 3, 1> large_shape;  /* 144 KiB of shared memory: sm_80, sm_90, sm_100 */
typedef mma_shape<128, 128, 2, 2, 3, 2> medium_shape; /* 96 KiB: every device */
typedef mma_shape<64, 64, 4, 1, 5, 2> small_shape;    /* 80 KiB and a list of LR_MAX_EXPERTS: every device */

/* Columns of y that a tile covers. */
template <class SHAPE, output_kind OUTPUT>
constexpr int OUTPUT_COLUMNS = OUTPUT == output_kind::SWIGLU ? SHAPE::COLUMNS / 2 : SHAPE::COLUMNS;

struct mma_params {
    matrix_view a, b[2]; /* SWIGLU: gate and up */
    product_rows rows;
    product_output output;
    int n_steps; /* of TILE_K along k */
};

/* The copying side: what a thread copies next. It has one piece of every COPY_ROWS-th row. */
template <class SHAPE, output_kind OUTPUT> struct feeder {
    const mma_params &p;
    tile_walk<SHAPE::ROWS> walk;
    uint32_t stages;
    int64_t number;
    const char *a, *b[2];
    int n_rows, n_columns; /* that exist from the thread's first row of a, of W on */
    int step, stage;
    bool more;

    __device__ __forceinline__ feeder(const mma_params &params, const int32_t *before, uint32_t first_stage)
        : p(params), walk{params.rows, before, 0}, stages(first_stage), number(blockIdx.x), step(0), stage(0)
    {
        begin_tile();
    }

    __device__ __forceinline__ void begin_tile()
    {
        tile t;
        more = walk.find(number, t);
        if (!more)
            return;
        const int row = threadIdx.x / PIECES, column = t.column_tile * OUTPUT_COLUMNS<SHAPE, OUTPUT> + row;
        const int piece_bytes = threadIdx.x % PIECES * 16;
        a = static_cast<const char *>(p.a.data) + (t.row + row) * p.a.row_bytes + piece_bytes;
        n_rows = t.n_rows - row;
        n_columns = p.output.n_columns - column;
#pragma unroll
        for (int i = 0; i < (OUTPUT == output_kind::SWIGLU ? 2 : 1); i++)
            b[i] = static_cast<const char *>(p.b[i].data) + t.expert * p.b[i].batch_bytes + column * p.b[i].row_bytes +
                   piece_bytes;
    }

    /* Starts the copies of one stage; an empty group when there are no more tiles. */
    __device__ __forceinline__ void next()
    {
        if (more) {
            const int k = step * TILE_K, piece = static_cast<int>(threadIdx.x) % PIECES;
            const int n_bytes = max(min((static_cast<int>(p.a.columns) - k - 8 * piece) * 2, 16), 0);
            const uint32_t to = stages + stage * SHAPE::STAGE_BYTES + swizzled(threadIdx.x / PIECES, piece);
#pragma unroll
            for (int i = 0; i < SHAPE::ROWS; i += SHAPE::COPY_ROWS)
                copy_async_part(to + i * TILE_K * 2, a + k * 2 + i * p.a.row_bytes, i < n_rows ? n_bytes : 0);
#pragma unroll
            for (int i = 0; i < SHAPE::COLUMNS; i += SHAPE::COPY_ROWS) {
                const int which = source_matrix(i), row = source_row(i);
                copy_async_part(to + SHAPE::A_BYTES + i * TILE_K * 2, b[which] + k * 2 + row * p.b[which].row_bytes,
                                row < n_columns ? n_bytes : 0);
            }
            if (++step == p.n_steps) {
                step = 0;
                number += gridDim.x;
                begin_tile();
            }
        }
        copy_commit();
        stage = stage + 1 == SHAPE::N_STAGES ? 0 : stage + 1;
    }

    /* Where row i (a multiple of COPY_ROWS, as a warp's half is) of a stage's W comes from. With SWIGLU a warp's
     * columns are half gate, half up, so that it holds both factors of an element of y. */
    static constexpr __device__ __forceinline__ int source_matrix(int i)
    {
        return OUTPUT == output_kind::SWIGLU ? i / (SHAPE::WARP_COLUMNS / 2) % 2 : 0;
    }
    static constexpr __device__ __forceinline__ int source_row(int i)
    {
        constexpr int HALF = SHAPE::WARP_COLUMNS / 2;
        static_assert(OUTPUT != output_kind::SWIGLU || HALF % SHAPE::COPY_ROWS == 0, "halves of whole copies");
        return OUTPUT == output_kind::SWIGLU ? i / SHAPE::WARP_COLUMNS * HALF + i % HALF : i;
    }
};

/* A warp's operands of one step of 16. */
template <class SHAPE> struct fragments {
    uint32_t a[SHAPE::WARP_ROWS / 16][4], b[SHAPE::WARP_COLUMNS / 16][4];

    /* a_tile, b_tile: the addresses of the lane's piece of the stage's first step. */
    __device__ __forceinline__ void load(uint32_t a_tile, uint32_t b_tile, int k_step)
    {
#pragma unroll
        for (int i = 0; i < SHAPE::WARP_ROWS / 16; i++)
            load_matrix(a[i], (a_tile ^ k_step * 32) + i * 16 * TILE_K * 2);
#pragma unroll
        for (int i = 0; i < SHAPE::WARP_COLUMNS / 16; i++)
            load_matrix(b[i], (b_tile ^ k_step * 32) + i * 16 * TILE_K * 2);
    }
};

/* The sums of a warp, in the layout of gemm_epilogue.cuh for every 16 rows. */
template <class SHAPE> struct warp_sums {
    float sum[SHAPE::WARP_ROWS / 16][SHAPE::WARP_COLUMNS / 2];

    __device__ __forceinline__ void clear()
    {
#pragma unroll
        for (auto &block : sum)
#pragma unroll
            for (float &x : block)
                x = 0.0f;
    }

    __device__ __forceinline__ void add(const fragments<SHAPE> &f)
    {
#pragma unroll
        for (int i = 0; i < SHAPE::WARP_ROWS / 16; i++)
#pragma unroll
            for (int j = 0; j < SHAPE::WARP_COLUMNS / 8; j++)
                mma_16x8x16(reinterpret_cast<float(&)[4]>(sum[i][4 * j]), f.a[i], f.b[j / 2][j % 2 * 2],
                            f.b[j / 2][j % 2 * 2 + 1]);
    }
};

template <class SHAPE, output_kind OUTPUT, bool GENERAL>
static __global__ void __launch_bounds__(SHAPE::THREADS, SHAPE::BLOCKS) mma_kernel(const __grid_constant__ mma_params p)
{
    extern __shared__ __align__(1024) uint8_t shared[];
    constexpr int N_STAGES = SHAPE::N_STAGES;
    int32_t *before = reinterpret_cast<int32_t *>(shared + N_STAGES * SHAPE::STAGE_BYTES);
    if (threadIdx.x < 32)
        count_tiles<SHAPE::ROWS>(p.rows, before);
    __syncthreads();

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_row = warp / SHAPE::WARPS_ACROSS * SHAPE::WARP_ROWS;
    const int warp_column = warp % SHAPE::WARPS_ACROSS * SHAPE::WARP_COLUMNS;
    const uint32_t stages = shared_address(shared);
    const uint32_t a_lane = stages + swizzled(warp_row + lane % 16, lane / 16);
    const uint32_t b_lane = stages + SHAPE::A_BYTES + swizzled(warp_column + lane / 16 * 8 + lane % 8, lane / 8 % 2);

    feeder<SHAPE, OUTPUT> feed(p, before, stages);
#pragma unroll
    for (int i = 0; i < N_STAGES - 1; i++)
        feed.next();
    copy_wait<N_STAGES - 2>();
    __syncthreads();
    fragments<SHAPE> f[2];
    f[0].load(a_lane, b_lane, 0);

    tile_walk<SHAPE::ROWS> walk = {p.rows, before, 0};
    tile t;
    int stage = 0;
    for (int64_t number = blockIdx.x; walk.find(number, t); number += gridDim.x) {
        const int column = t.column_tile * OUTPUT_COLUMNS<SHAPE, OUTPUT>;
        if (OUTPUT == output_kind::F32 && p.output.accumulate)
            prefetch_rows<SHAPE::ROWS, SHAPE::COLUMNS, SHAPE::THREADS>(p.output, t.row, t.n_rows, column);
        warp_sums<SHAPE> sums;
        sums.clear();
#pragma unroll 1
        for (int step = 0; step < p.n_steps; step++) {
#pragma unroll
            for (int k = 0; k < K_STEPS; k++) {
                if (k == K_STEPS - 1) { /* the next stage has arrived, and everyone is through with this one */
                    copy_wait<N_STAGES - 2>();
                    __syncthreads();
                    stage = stage + 1 == N_STAGES ? 0 : stage + 1;
                }
                const uint32_t offset = stage * SHAPE::STAGE_BYTES;
                f[(k + 1) % 2].load(a_lane + offset, b_lane + offset, (k + 1) % K_STEPS);
                if (k == 0)
                    feed.next(); /* over the stage before this one */
                sums.add(f[k % 2]);
            }
        }
        const int first_column = column + warp_column / (SHAPE::COLUMNS / OUTPUT_COLUMNS<SHAPE, OUTPUT>);
#pragma unroll
        for (int i = 0; i < SHAPE::WARP_ROWS / 16; i++) {
            const int row = warp_row + 16 * i;
            finish_sums<OUTPUT, GENERAL>(p.output, sums.sum[i], first_column);
            store_rows<OUTPUT, GENERAL>(p.output, sums.sum[i], t.row + row, t.n_rows - row, first_column);
        }
    }
    copy_wait<0>();
}

/* ---- launch ---- */

/* The stages, and the list of tiles behind them. */
template <class SHAPE> static int shared_bytes(const product &p)
{
    return SHAPE::N_STAGES * SHAPE::STAGE_BYTES + 4 * (p.rows.n_experts + 1);
}

template <class SHAPE, output_kind OUTPUT> static int column_tiles(const product &p)
{
    return static_cast<int>(divide_up(p.output.n_columns, OUTPUT_COLUMNS<SHAPE, OUTPUT>));
}

/* Whether every multiprocessor gets a tile of this shape, and can hold it. */
template <class SHAPE, output_kind OUTPUT> static bool fills_device(const struct lr_exec *exec, const product &p)
{
    return divide_up(p.rows.n_rows, SHAPE::ROWS) * column_tiles<SHAPE, OUTPUT>(p) >= lr_cuda_multiprocessors(exec) &&
           shared_bytes<SHAPE>(p) <= lr_cuda_block_shared_bytes(exec);
}

template <class SHAPE, output_kind OUTPUT, bool GENERAL>
static cudaError_t launch_shape(const struct lr_exec *exec, const product &from)
{
    const auto kernel = mma_kernel<SHAPE, OUTPUT, GENERAL>;
    const int n_bytes = shared_bytes<SHAPE>(from);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, n_bytes);
    if (error != cudaSuccess)
        return error;
    mma_params p = {from.a, {from.b[0], from.b[1]}, from.rows, from.output, 0};
    p.rows.n_column_tiles = column_tiles<SHAPE, OUTPUT>(from);
    p.n_steps = static_cast<int>(divide_up(from.a.columns, TILE_K));
    const int64_t n_tiles = bound_row_tiles(p.rows, SHAPE::ROWS) * p.rows.n_column_tiles;
    const int64_t n_resident = static_cast<int64_t>(lr_cuda_multiprocessors(exec)) * SHAPE::BLOCKS;
    const unsigned n_blocks = static_cast<unsigned>(n_tiles < n_resident ? n_tiles : n_resident);
    kernel<<<n_blocks, SHAPE::THREADS, n_bytes, static_cast<cudaStream_t>(exec->stream)>>>(p);
    return cudaGetLastError();
}

/* The largest tiles that fill the device; wide ones only where their last column does not cost more than they save. The
 * sum of an element is the same chain in all of them. */
template <output_kind OUTPUT> static cudaError_t launch_kind(const struct lr_exec *exec, const product &p)
{
    if (p.general)
        return launch_shape<small_shape, OUTPUT, true>(exec, p);
    const bool wide = 2 * column_tiles<large_shape, OUTPUT>(p) * 10 <= column_tiles<medium_shape, OUTPUT>(p) * 11;
    if (wide && fills_device<large_shape, OUTPUT>(exec, p))
        return launch_shape<large_shape, OUTPUT, false>(exec, p);
    const bool narrow = p.output.n_columns <= OUTPUT_COLUMNS<medium_shape, OUTPUT> / 2;
    if (!narrow && fills_device<medium_shape, OUTPUT>(exec, p))
        return launch_shape<medium_shape, OUTPUT, false>(exec, p);
    return launch_shape<small_shape, OUTPUT, false>(exec, p);
}

cudaError_t launch_product_mma(const struct lr_exec *exec, const product &p)
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
