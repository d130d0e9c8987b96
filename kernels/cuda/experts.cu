/* Mixture of experts over sorted rows: hidden = act(gate x) * (up x), then y = down hidden. Two launches of the product
 * in gemm_product.cuh; the first computes a tile of gate and the same tile of up side by side in one accumulator, so
 * that SwiGLU needs no memory and hidden is written once, in the activation type:
 *
 *   stage:  x [128 x 64] | gate [C/2 x 64]     sum: gate columns | up columns   ->  hidden [128 x C/2]
 *                        | up   [C/2 x 64]
 *
 * The number of rows of an expert is known to the device alone: the launch is sized by the bound n_rows. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/gemm_product.cuh"

namespace lr::LR_CUDA_ACT
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
    p.a = static_cast<const act *>(args.x);
    p.a_stride = p.k = args.gate->k;
    p.w = static_cast<const act *>(args.gate->data);
    p.up = static_cast<const act *>(args.up->data);
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
    p.a = static_cast<const act *>(args.hidden);
    p.a_stride = p.k = args.down->k;
    p.w = static_cast<const act *>(args.down->data);
    p.up = nullptr;
    p.w_stride = weight_stride(p.k);
    p.batch_elements = distance(args.down, args.n_experts) / 2;
    p.y = args.y;
    p.n = p.y_stride = args.down->n;
    p.activation = LR_ACT_NONE;
    return launch_plain_product(stream, p);
}

static product_params common_params(const struct lr_experts_args &args, void *y, int64_t n)
{
    product_params p = {};
    p.offsets = args.offsets;
    p.n_rows = args.n_rows;
    p.n_experts = static_cast<int>(args.n_experts);
    p.n_columns = static_cast<int>(n);
    p.y = y;
    p.y_stride = n;
    return p;
}

static cudaError_t gate_and_up(const struct lr_exec *exec, const struct lr_experts_args &args, int64_t n_row_ends)
{
    const cudaStream_t stream = static_cast<cudaStream_t>(exec->stream);
    const int n_multiprocessors = lr_cuda_multiprocessors(exec);
    product_params p = common_params(args, args.hidden, args.gate->n);
    p.activation = args.activation;
    const product_operands operands = {rows_view(args.x, args.n_rows, args.gate->k),
                                       {weights_view(args.gate, args.n_experts), weights_view(args.up, args.n_experts)},
                                       rows_view(args.hidden, args.n_rows, args.gate->n)};
    constexpr output_kind SWIGLU = output_kind::SWIGLU;
    if (args.activation != LR_ACT_SILU || !stores_are_wide(p.y, p.y_stride, p.n_columns, 8, 2)) /* rare */
        return launch_product<small_shape, SWIGLU, true>(stream, n_multiprocessors, p, operands, n_row_ends);
    if (fills_device(p.n_rows, p.n_columns, p.n_experts, large_shape::COLUMNS / 2, n_multiprocessors))
        return launch_product<large_shape, SWIGLU, false>(stream, n_multiprocessors, p, operands, n_row_ends);
    return launch_product<small_shape, SWIGLU, false>(stream, n_multiprocessors, p, operands, n_row_ends);
}

static cudaError_t down(const struct lr_exec *exec, const struct lr_experts_args &args, int64_t n_row_ends)
{
    const cudaStream_t stream = static_cast<cudaStream_t>(exec->stream);
    const int n_multiprocessors = lr_cuda_multiprocessors(exec);
    product_params p = common_params(args, args.y, args.down->n);
    const product_operands operands = {rows_view(args.hidden, args.n_rows, args.down->k),
                                       {weights_view(args.down, args.n_experts), {}},
                                       rows_view(args.y, args.n_rows, args.down->n)};
    constexpr output_kind BF16 = output_kind::BF16;
    if (!stores_are_wide(p.y, p.y_stride, p.n_columns, 8, 2))
        return launch_product<small_shape, BF16, true>(stream, n_multiprocessors, p, operands, n_row_ends);
    if (fills_device(p.n_rows, p.n_columns, p.n_experts, large_shape::COLUMNS, n_multiprocessors))
        return launch_product<large_shape, BF16, false>(stream, n_multiprocessors, p, operands, n_row_ends);
    return launch_product<small_shape, BF16, false>(stream, n_multiprocessors, p, operands, n_row_ends);
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
    /* every expert may end in a tile that is not full */
    const int64_t n_row_ends = args.n_experts < args.n_rows ? args.n_experts : args.n_rows;
    const cudaError_t error = gate_and_up(exec, args, n_row_ends);
    return error == cudaSuccess ? down(exec, args, n_row_ends) : error;
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(experts)(const struct lr_exec *exec, const struct lr_experts_args *args)
{
    if (args->n_rows > 0)
        lr_cuda_note(exec, lr::experts(exec, *args), "experts");
}
