/* Row gathering and the weighted sum that brings expert outputs home. */
#include "kernels/cuda/backend.h"

#include "kernels/cuda/act.h"

namespace lr::LR_CUDA_ACT
{

constexpr int WARPS = 4;

/* ---- gather: one warp a few rows, whose loads are all under way before the first store ---- */

constexpr int GATHER_ROWS = 4;

template <class PIECE>
static __global__ void __launch_bounds__(WARPS * 32)
    gather_kernel(const PIECE *x, int64_t n_pieces, const int64_t *rows, int64_t n_rows, PIECE *y)
{
    const int lane = threadIdx.x % 32;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32) * GATHER_ROWS;
    const int n = static_cast<int>(min(n_rows - first, static_cast<int64_t>(GATHER_ROWS)));
    const PIECE *from[GATHER_ROWS];
    for (int r = 0; r < GATHER_ROWS; r++)
        from[r] = r < n ? x + __ldg(rows + first + r) * n_pieces : x;
    for (int64_t i = lane; i < n_pieces; i += 32) {
        PIECE piece[GATHER_ROWS];
#pragma unroll
        for (int r = 0; r < GATHER_ROWS; r++)
            if (r < n)
                piece[r] = __ldg(from[r] + i);
#pragma unroll
        for (int r = 0; r < GATHER_ROWS; r++)
            if (r < n)
                y[(first + r) * n_pieces + i] = piece[r];
    }
}

template <class PIECE>
static cudaError_t launch_gather(cudaStream_t stream, const void *x, size_t row_bytes, const int64_t *rows,
                                 int64_t n_rows, void *y)
{
    const int64_t n_blocks = (n_rows + WARPS * GATHER_ROWS - 1) / (WARPS * GATHER_ROWS);
    gather_kernel<PIECE><<<static_cast<unsigned>(n_blocks), WARPS * 32, 0, stream>>>(
        static_cast<const PIECE *>(x), static_cast<int64_t>(row_bytes / sizeof(PIECE)), rows, n_rows,
        static_cast<PIECE *>(y));
    return cudaGetLastError();
}

/* ---- combine: a thread has COLUMNS neighbouring columns of a row ---- */

template <int COLUMNS> struct act_piece;
template <> struct act_piece<8> {
    typedef uint4 type;
};
template <> struct act_piece<1> {
    typedef uint16_t type;
};

static __device__ __forceinline__ void fold(float (&sum)[8], float w, uint4 piece)
{
    const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum[2 * i] = fmaf(w, low_of(words[i]), sum[2 * i]);
        sum[2 * i + 1] = fmaf(w, high_of(words[i]), sum[2 * i + 1]);
    }
}

static __device__ __forceinline__ void fold(float (&sum)[1], float w, uint16_t piece)
{
    sum[0] = fmaf(w, low_of(piece), sum[0]);
}

template <int COLUMNS>
static __global__ void __launch_bounds__(256) combine_kernel(const lr_moe_combine_args args)
{
    typedef typename act_piece<COLUMNS>::type piece;
    constexpr int BATCH = 4; /* rows of y under way together */
    const int64_t n_pieces = args.d / COLUMNS, n = args.n_rows * n_pieces;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (i >= n)
        return;
    const int64_t row = i / n_pieces, at = i % n_pieces;
    const piece *y = static_cast<const piece *>(args.y) + at;
    const int64_t *row_of = args.row_of + row * args.top_k;
    const float *weights = args.weights + row * args.top_k;
    float sum[COLUMNS] = {};
    for (int64_t k = 0; k < args.top_k; k += BATCH) {
        piece pieces[BATCH];
        float w[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++)
            if (k + j < args.top_k) {
                pieces[j] = __ldg(y + __ldg(row_of + k + j) * n_pieces);
                w[j] = __ldg(weights + k + j);
            }
#pragma unroll
        for (int j = 0; j < BATCH; j++)
            if (k + j < args.top_k)
                fold(sum, w[j], pieces[j]);
    }
    if (args.shared != nullptr) {
        const float factor =
            args.shared_gate != nullptr ? __fdiv_rn(1.0f, 1.0f + expf(-__ldg(args.shared_gate + row))) : 1.0f;
        fold(sum, factor, __ldg(static_cast<const piece *>(args.shared) + i));
    }
    float *x = args.x + i * COLUMNS;
    if constexpr (COLUMNS == 8) {
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
            const float4 old = *reinterpret_cast<const float4 *>(x + j);
            *reinterpret_cast<float4 *>(x + j) =
                make_float4(old.x + sum[j], old.y + sum[j + 1], old.z + sum[j + 2], old.w + sum[j + 3]);
        }
    } else {
        x[0] += sum[0];
    }
}

static bool aligned(const void *pointer)
{
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

static cudaError_t combine(cudaStream_t stream, const lr_moe_combine_args &args)
{
    const bool wide = args.d % 8 == 0 && aligned(args.x) && aligned(args.y) && aligned(args.shared);
    const int64_t n_blocks = (args.n_rows * (wide ? args.d / 8 : args.d) + 255) / 256;
    if (wide)
        combine_kernel<8><<<static_cast<unsigned>(n_blocks), 256, 0, stream>>>(args);
    else
        combine_kernel<1><<<static_cast<unsigned>(n_blocks), 256, 0, stream>>>(args);
    return cudaGetLastError();
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(gather_rows)(const struct lr_exec *exec, const void *x, size_t row_bytes, const int64_t *rows,
                         int64_t n_rows, void *y)
{
    if (n_rows == 0 || row_bytes == 0)
        return;
    const cudaStream_t stream = static_cast<cudaStream_t>(exec->stream);
    const bool wide = row_bytes % 16 == 0 && lr::aligned(x) && lr::aligned(y);
    const cudaError_t error = wide ? lr::launch_gather<uint4>(stream, x, row_bytes, rows, n_rows, y)
                                   : lr::launch_gather<uint16_t>(stream, x, row_bytes, rows, n_rows, y);
    lr_cuda_note(exec, error, "gather_rows");
}

void LR_CUDA(moe_combine)(const struct lr_exec *exec, const struct lr_moe_combine_args *args)
{
    if (args->n_rows > 0)
        lr_cuda_note(exec, lr::combine(static_cast<cudaStream_t>(exec->stream), *args), "moe_combine");
}
