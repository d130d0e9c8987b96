/* Dense layers: y = act(a W^T + bias) (+ y). */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/gemm.h"

namespace lr::LR_CUDA_ACT
{

cudaError_t launch_product(const struct lr_exec *exec, const product &p)
{
    return lr_cuda_hopper_kernels(exec) ? launch_product_wgmma(exec, p) : launch_product_mma(exec, p);
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
    const bool wide_stores = args.wide ? stores_are_wide(args.y, args.y_stride, n, 2, 4)
                                       : stores_are_wide(args.y, args.y_stride, n, 8, 2) && !args.accumulate;
    product p = {};
    p.kind = args.wide ? output_kind::F32 : output_kind::ACT;
    p.general = args.activation != LR_ACT_NONE || !wide_stores;
    p.rows = {nullptr, args.n_rows, 1, 0};
    p.a = {args.a, k, args.n_rows, 1, args.a_stride * 2, args.n_rows * args.a_stride * 2};
    p.b[0] = {args.w->data, k, n, 1, row_bytes, n * row_bytes};
    p.output = {args.y, args.y_stride, static_cast<int>(n), args.bias, args.activation, args.accumulate};
    return tensor_map_possible(p.a) ? launch_product(exec, p)
                                    : gemm_plain(static_cast<cudaStream_t>(exec->stream), args);
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(gemm)(const struct lr_exec *exec, const struct lr_gemm_args *args)
{
    if (args->n_rows > 0)
        lr_cuda_note(exec, lr::gemm(exec, *args), "gemm");
}
