/* Embedding rows, the delta rule's gates, and the attention's output gate. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/rows.cuh"

namespace lr::LR_CUDA_ACT
{

/* ---- embed: y [n_rows, d] float32 = table[ids], four columns a unit ---- */

static __device__ __forceinline__ float widen(float x)
{
    return x;
}

static __device__ __forceinline__ float widen(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}

static __device__ __forceinline__ float widen(__half x)
{
    return __half2float(x);
}

/* Four elements of 8 or 16 bytes by one load. */
template <class Element> struct alignas(4 * sizeof(Element)) quad {
    Element v[4];
};

constexpr int EMBED_UNITS = 4; /* a thread */

template <class Element, bool ALIGNED>
static __global__ void __launch_bounds__(ROW_THREADS)
    embed_kernel(const Element *table, int64_t d, const int32_t *ids, struct divider quads, uint32_t n_units, float *y)
{
    struct quad<Element> x[EMBED_UNITS];
#pragma unroll
    for (int u = 0; u < EMBED_UNITS; u++) {
        const uint32_t unit = (blockIdx.x * EMBED_UNITS + u) * ROW_THREADS + threadIdx.x;
        if (unit >= n_units)
            continue;
        const uint32_t row = quads.of(unit), column = (unit - row * quads.d) * 4;
        const Element *from = table + ids[row] * d + column;
        if constexpr (ALIGNED)
            x[u] = *reinterpret_cast<const struct quad<Element> *>(from);
        else
            for (int j = 0; j < 4 && column + j < d; j++)
                x[u].v[j] = from[j];
    }
#pragma unroll
    for (int u = 0; u < EMBED_UNITS; u++) {
        const uint32_t unit = (blockIdx.x * EMBED_UNITS + u) * ROW_THREADS + threadIdx.x;
        if (unit >= n_units)
            continue;
        const uint32_t row = quads.of(unit), column = (unit - row * quads.d) * 4;
        float *to = y + row * d + column;
        if constexpr (ALIGNED)
            *reinterpret_cast<float4 *>(to) =
                make_float4(widen(x[u].v[0]), widen(x[u].v[1]), widen(x[u].v[2]), widen(x[u].v[3]));
        else
            for (int j = 0; j < 4 && column + j < d; j++)
                to[j] = widen(x[u].v[j]);
    }
}

template <class Element>
static void
embed(const struct lr_exec *exec, const void *table, int64_t d, const int32_t *ids, int64_t n_rows, float *y)
{
    const Element *elements = static_cast<const Element *>(table);
    const struct divider quads = divider_by((d + 3) / 4);
    const uint32_t n_units = static_cast<uint32_t>(n_rows * quads.d);
    const unsigned n_blocks = blocks_for(n_units, EMBED_UNITS * ROW_THREADS);
    if (are_aligned(4 * sizeof(Element), table) && are_aligned(16, y) && d % 4 == 0)
        embed_kernel<Element, true><<<n_blocks, ROW_THREADS, 0, stream_of(exec)>>>(elements, d, ids, quads, n_units, y);
    else
        embed_kernel<Element, false>
            <<<n_blocks, ROW_THREADS, 0, stream_of(exec)>>>(elements, d, ids, quads, n_units, y);
}

/* ---- sigmoid_gate: y = x sigmoid(gate), a piece a unit ---- */

constexpr int GATE_UNITS = 2; /* a thread */

template <bool ALIGNED>
static __global__ void __launch_bounds__(ROW_THREADS) sigmoid_gate_kernel(const struct lr_sigmoid_gate_args a,
                                                                          struct divider row_pieces,
                                                                          struct divider head_pieces,
                                                                          uint32_t n_units)
{
    struct piece x[GATE_UNITS], gate[GATE_UNITS];
    act *to[GATE_UNITS];
    int n[GATE_UNITS];
#pragma unroll
    for (int u = 0; u < GATE_UNITS; u++) {
        const uint32_t unit = (blockIdx.x * GATE_UNITS + u) * ROW_THREADS + threadIdx.x;
        const uint32_t index = row_pieces.of(unit), in_row = unit - index * row_pieces.d, head = head_pieces.of(in_row);
        const int64_t row = index, column = (in_row - head * head_pieces.d) * 8, in_x = head * a.head_dim + column;
        n[u] = unit < n_units ? static_cast<int>(a.head_dim - column) : 0;
        to[u] = static_cast<act *>(a.y) + row * a.y_stride + in_x;
        x[u] = load_piece<ALIGNED>(static_cast<const act *>(a.x) + row * a.x_stride + in_x, n[u]);
        gate[u] = load_piece<ALIGNED>(
            static_cast<const act *>(a.gate) + row * a.gate_stride + head * a.gate_head_stride + column, n[u]);
    }
#pragma unroll
    for (int u = 0; u < GATE_UNITS; u++) {
#pragma unroll
        for (int j = 0; j < 8; j++)
            x[u].v[j] *= sigmoid_fast(gate[u].v[j]);
        store_piece<ALIGNED>(to[u], x[u], n[u]);
    }
}

/* ---- delta_gates: a thread stays with its head and walks down the rows ---- */

constexpr int GATE_ROWS = 8; /* a thread */

static __device__ __forceinline__ float softplus(float x)
{
    return x > 20.0f ? x : log1pf(expf(x));
}

/* Blocks of `heads` x `rows` threads; blockIdx.y: the heads behind the first 256. */
static __global__ void __launch_bounds__(ROW_THREADS) delta_gates_kernel(const struct lr_delta_gates_args p)
{
    const int64_t head = blockIdx.y * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    if (head >= p.n_heads)
        return;
    const act *b = static_cast<const act *>(p.b) + (p.b_index != nullptr ? p.b_index[head] : head);
    const act *a = static_cast<const act *>(p.a) + (p.a_index != nullptr ? p.a_index[head] : head);
    const float rate = -expf(p.a_log[head]), dt_bias = p.dt_bias[head];
    const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.y * GATE_ROWS) + threadIdx.y;
    float raw_b[GATE_ROWS], raw_a[GATE_ROWS];
#pragma unroll
    for (int i = 0; i < GATE_ROWS; i++) {
        const int64_t row = first + i * static_cast<int64_t>(blockDim.y);
        raw_b[i] = row < p.n_rows ? from_act(b[row * p.ba_stride]) : 0.0f;
        raw_a[i] = row < p.n_rows ? from_act(a[row * p.ba_stride]) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < GATE_ROWS; i++) {
        const int64_t row = first + i * static_cast<int64_t>(blockDim.y);
        if (row < p.n_rows) {
            p.beta[row * p.n_heads + head] = 1.0f / (1.0f + expf(-raw_b[i]));
            p.g[row * p.n_heads + head] = rate * softplus(raw_a[i] + dt_bias);
        }
    }
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(embed)(const struct lr_exec *exec,
                   const void *table,
                   enum lr_dtype dtype,
                   int64_t d,
                   const int32_t *ids,
                   int64_t n_rows,
                   float *y)
{
    const int64_t most = LR_CUDA_MAX_UPLOAD_BYTES / static_cast<int64_t>(sizeof *ids);
    lr::for_row_slices(n_rows, (d + 3) / 4, [&](int64_t slice, int64_t n_slice) {
        for (int64_t first = slice; first < slice + n_slice; first += most) {
            const int64_t n = slice + n_slice - first < most ? slice + n_slice - first : most;
            const int32_t *copy =
                static_cast<const int32_t *>(lr_cuda_upload(exec, ids + first, static_cast<size_t>(n) * sizeof *ids));
            if (dtype == LR_F32)
                lr::embed<float>(exec, table, d, copy, n, y + first * d);
            else if (dtype == LR_BF16)
                lr::embed<__nv_bfloat16>(exec, table, d, copy, n, y + first * d);
            else
                lr::embed<__half>(exec, table, d, copy, n, y + first * d);
        }
    });
    lr_cuda_note(exec, cudaGetLastError(), "embed");
}

void LR_CUDA(sigmoid_gate)(const struct lr_exec *exec, const struct lr_sigmoid_gate_args *args)
{
    const bool aligned =
        lr::are_aligned(16, args->x, args->gate, args->y) &&
        (args->x_stride | args->gate_stride | args->gate_head_stride | args->y_stride | args->head_dim) % 8 == 0;
    const int64_t head_pieces = (args->head_dim + 7) / 8, row_pieces = args->n_heads * head_pieces;
    lr::for_row_slices(args->n_rows, row_pieces, [&](int64_t first, int64_t n) {
        struct lr_sigmoid_gate_args a = *args;
        a.x = static_cast<const lr::act *>(a.x) + first * a.x_stride;
        a.gate = static_cast<const lr::act *>(a.gate) + first * a.gate_stride;
        a.y = static_cast<lr::act *>(a.y) + first * a.y_stride;
        const uint32_t n_units = static_cast<uint32_t>(n * row_pieces);
        const auto kernel = aligned ? lr::sigmoid_gate_kernel<true> : lr::sigmoid_gate_kernel<false>;
        kernel<<<lr::blocks_for(n_units, lr::GATE_UNITS * lr::ROW_THREADS), lr::ROW_THREADS, 0, lr::stream_of(exec)>>>(
            a, lr::divider_by(row_pieces), lr::divider_by(head_pieces), n_units);
    });
    lr_cuda_note(exec, cudaGetLastError(), "sigmoid_gate");
}

void LR_CUDA(delta_gates)(const struct lr_exec *exec, const struct lr_delta_gates_args *args)
{
    if (args->n_rows <= 0 || args->n_heads <= 0)
        return;
    const int64_t heads = args->n_heads < lr::ROW_THREADS ? args->n_heads : lr::ROW_THREADS;
    const unsigned rows = static_cast<unsigned>(lr::ROW_THREADS / heads);
    const dim3 grid(lr::blocks_for(args->n_rows, rows * lr::GATE_ROWS), lr::blocks_for(args->n_heads, heads));
    lr::delta_gates_kernel<<<grid, dim3(static_cast<unsigned>(heads), rows), 0, lr::stream_of(exec)>>>(*args);
    lr_cuda_note(exec, cudaGetLastError(), "delta_gates");
}
