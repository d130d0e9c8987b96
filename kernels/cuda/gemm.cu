/* Dense layers: y = act(a W^T + bias) (+ y). See gemm_product.cuh for the kernel.
 *
 * The instance follows from the shape of the call: large tiles where they fill the device, small ones where not (a step
 * of decoding has one row: only the columns are left to spread). The sum of an element is the same chain in both, so
 * this choice does not show in the bits. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/gemm_product.cuh"

namespace lr::LR_CUDA_ACT
{

template <output_kind OUTPUT>
static cudaError_t launch_gemm(const struct lr_exec *exec, product_params &p, const product_operands &operands,
                               bool general)
{
    const cudaStream_t stream = static_cast<cudaStream_t>(exec->stream);
    const int n_multiprocessors = lr_cuda_multiprocessors(exec);
    if (general) /* rare or narrow: one instance is enough */
        return launch_product<small_shape, OUTPUT, true>(stream, n_multiprocessors, p, operands, 1);
    constexpr int TILE_COLUMNS = large_shape::COLUMNS;
    if (fills_device(p.n_rows, p.n_columns, 1, TILE_COLUMNS, n_multiprocessors))
        return launch_product<large_shape, OUTPUT, false>(stream, n_multiprocessors, p, operands, 1);
    return launch_product<small_shape, OUTPUT, false>(stream, n_multiprocessors, p, operands, 1);
}

static cudaError_t gemm_plain(cudaStream_t stream, const struct lr_gemm_args &args)
{
    plain_params p = {};
    p.a = static_cast<const act *>(args.a);
    p.a_stride = args.a_stride;
    p.w = static_cast<const act *>(args.w->data);
    p.w_stride = weight_stride(args.w->k);
    p.n_rows = args.n_rows;
    p.n = args.w->n;
    p.k = args.w->k;
    p.bias = args.bias;
    p.y = args.y;
    p.y_stride = args.y_stride;
    p.activation = args.activation;
    p.accumulate = args.accumulate;
    p.wide = args.wide;
    return launch_plain_product(stream, p);
}

static cudaError_t gemm(const struct lr_exec *exec, const struct lr_gemm_args &args)
{
    const int64_t n = args.w->n, k = args.w->k, row_bytes = weight_stride(k) * 2;
    product_operands operands = {};
    operands.a = {args.a, k, args.n_rows, 1, args.a_stride * 2, args.n_rows * args.a_stride * 2};
    operands.b[0] = {args.w->data, k, n, 1, row_bytes, n * row_bytes};
    operands.y = {args.y, n, args.n_rows, 1, args.y_stride * 2, args.n_rows * args.y_stride * 2};
    if (!tensor_map_possible(operands.a))
        return gemm_plain(static_cast<cudaStream_t>(exec->stream), args);
    product_params p = {};
    p.n_rows = args.n_rows;
    p.n_experts = 1;
    p.n_columns = static_cast<int>(n);
    p.y = args.y;
    p.y_stride = args.y_stride;
    p.bias = args.bias;
    p.activation = args.activation;
    p.accumulate = args.accumulate;
    const bool plain_stores = args.wide ? stores_are_wide(args.y, args.y_stride, n, 2, 4)
                                        : stores_are_wide(args.y, args.y_stride, n, 8, 2) && !args.accumulate;
    const bool general = args.activation != LR_ACT_NONE || !plain_stores;
    return args.wide ? launch_gemm<output_kind::F32>(exec, p, operands, general)
                     : launch_gemm<output_kind::BF16>(exec, p, operands, general);
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(gemm)(const struct lr_exec *exec, const struct lr_gemm_args *args)
{
    if (args->n_rows > 0)
        lr_cuda_note(exec, lr::gemm(exec, *args), "gemm");
}
