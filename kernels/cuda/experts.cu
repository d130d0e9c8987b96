/* Mixture of experts over sorted rows: hidden = act(gate x) * (up x), then y = down hidden. Two launches of the product
 * in gemm_product.cuh; the first computes a tile of gate and the same tile of up side by side in one accumulator, so
 * that SwiGLU needs no memory and hidden is written once, in bf16:
 *
 *   stage:  x [128 x 64] | gate [C/2 x 64]     sum: gate columns | up columns   ->  hidden [128 x C/2]
 *                        | up   [C/2 x 64]
 *
 * The number of rows of an expert is known to the device alone: the launch is sized by the bound n_rows. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/gemm_product.cuh"

namespace lr
{

/* Bytes between the weights of two experts. */
static int64_t distance(const struct lr_weight *w, int64_t n_experts)
{
    return n_experts > 1 ? static_cast<const char *>(w[1].data) - static_cast<const char *>(w[0].data)
                         : w->n * weight_stride(w->k) * 2;
}

static matrix_view weights_view(const struct lr_weight *w, int64_t n_experts)
{
    return {w->data, w->k, w->n, n_experts, weight_stride(w->k) * 2, distance(w, n_experts)};
}

static matrix_view rows_view(const void *rows, int64_t n_rows, int64_t n)
{
    return {rows, n, n_rows, 1, n * 2, n_rows * n * 2};
}

static cudaError_t experts_plain(cudaStream_t stream, const struct lr_experts_args &args)
{
    plain_params p = {};
    p.a = static_cast<const __nv_bfloat16 *>(args.x);
    p.a_stride = p.k = args.gate->k;
    p.w = static_cast<const __nv_bfloat16 *>(args.gate->data);
    p.up = static_cast<const __nv_bfloat16 *>(args.up->data);
    p.w_stride = weight_stride(p.k);
    p.batch_elements = distance(args.gate, args.n_experts) / 2;
    p.offsets = args.offsets;
    p.n_experts = args.n_experts;
    p.n_rows = args.n_rows;
    p.y = args.hidden;
    p.n = p.y_stride = args.gate->n;
    p.activation = args.activation;
    const cudaError_t error = launch_plain_product(stream, p);
    if (error != cudaSuccess)
        return error;
    p.a = static_cast<const __nv_bfloat16 *>(args.hidden);
    p.a_stride = p.k = args.down->k;
    p.w = static_cast<const __nv_bfloat16 *>(args.down->data);
    p.up = nullptr;
    p.w_stride = weight_stride(p.k);
    p.batch_elements = distance(args.down, args.n_experts) / 2;
    p.y = args.y;
    p.n = p.y_stride = args.down->n;
    p.activation = LR_ACT_NONE;
    return launch_plain_product(stream, p);
}

static product_params common_params(const struct lr_experts_args &args, void *y, int64_t n, int64_t k, int columns)
{
    product_params p = {};
    p.offsets = args.offsets;
    p.n_rows = args.n_rows;
    p.n_experts = static_cast<int>(args.n_experts);
    p.n_column_tiles = static_cast<int>(divide_up(n, columns));
    p.n_columns = static_cast<int>(n);
    p.n_steps = static_cast<int>(divide_up(k, TILE_K));
    p.y = y;
    p.y_stride = n;
    p.wide_stores = stores_are_wide(y, n, n, 8, 2);
    return p;
}

/* A bound: every expert may end in a tile that is not full. */
static int64_t bound_row_tiles(const struct lr_experts_args &args)
{
    const int64_t n_ends = args.n_experts < args.n_rows ? args.n_experts : args.n_rows;
    return args.n_rows / TILE_ROWS + n_ends;
}

static cudaError_t gate_and_up(const struct lr_exec *exec, const struct lr_experts_args &args)
{
    const cudaStream_t stream = static_cast<cudaStream_t>(exec->stream);
    const int64_t n = args.gate->n, k = args.gate->k, n_row_tiles = bound_row_tiles(args);
    const int n_multiprocessors = lr_cuda_multiprocessors(exec);
    const bool any = args.activation != LR_ACT_SILU;
    const bool fills = n_row_tiles * divide_up(n, 128) >= n_multiprocessors;
    const int columns = any || !fills ? 64 : 128; /* of hidden */
    product_params p = common_params(args, args.hidden, n, k, columns);
    p.activation = args.activation;
    cudaError_t error = tensor_map_encode(&p.a, rows_view(args.x, args.n_rows, k), WARPGROUP_ROWS);
    if (error == cudaSuccess)
        error = tensor_map_encode(&p.b[0], weights_view(args.gate, args.n_experts), columns);
    if (error == cudaSuccess)
        error = tensor_map_encode(&p.b[1], weights_view(args.up, args.n_experts), columns);
    if (error != cudaSuccess)
        return error;
    if (any)
        return launch_product<128, output_kind::SWIGLU, true>(stream, n_multiprocessors, p, n_row_tiles);
    if (columns == 64)
        return launch_product<128, output_kind::SWIGLU, false>(stream, n_multiprocessors, p, n_row_tiles);
    return launch_product<256, output_kind::SWIGLU, false>(stream, n_multiprocessors, p, n_row_tiles);
}

static cudaError_t down(const struct lr_exec *exec, const struct lr_experts_args &args)
{
    const cudaStream_t stream = static_cast<cudaStream_t>(exec->stream);
    const int64_t n = args.down->n, k = args.down->k, n_row_tiles = bound_row_tiles(args);
    const int n_multiprocessors = lr_cuda_multiprocessors(exec);
    const int columns = n_row_tiles * divide_up(n, 256) >= n_multiprocessors ? 256 : 64;
    product_params p = common_params(args, args.y, n, k, columns);
    cudaError_t error = tensor_map_encode(&p.a, rows_view(args.hidden, args.n_rows, k), WARPGROUP_ROWS);
    if (error == cudaSuccess)
        error = tensor_map_encode(&p.b[0], weights_view(args.down, args.n_experts), columns);
    if (error != cudaSuccess)
        return error;
    if (columns == 256)
        return launch_product<256, output_kind::BF16, false>(stream, n_multiprocessors, p, n_row_tiles);
    return launch_product<64, output_kind::BF16, false>(stream, n_multiprocessors, p, n_row_tiles);
}

static cudaError_t experts(const struct lr_exec *exec, const struct lr_experts_args &args)
{
    const int64_t d = args.gate->k, ffn = args.gate->n;
    if (!tensor_map_possible(rows_view(args.x, args.n_rows, d)) ||
        !tensor_map_possible(rows_view(args.hidden, args.n_rows, ffn)) ||
        !tensor_map_possible(weights_view(args.gate, args.n_experts)) ||
        !tensor_map_possible(weights_view(args.up, args.n_experts)) ||
        !tensor_map_possible(weights_view(args.down, args.n_experts)))
        return experts_plain(static_cast<cudaStream_t>(exec->stream), args);
    const cudaError_t error = gate_and_up(exec, args);
    return error == cudaSuccess ? down(exec, args) : error;
}

} // namespace lr

void lr_cuda_experts(const struct lr_exec *exec, const struct lr_experts_args *args)
{
    if (args->n_rows > 0)
        lr_cuda_note(exec, lr::experts(exec, *args), "experts");
}
