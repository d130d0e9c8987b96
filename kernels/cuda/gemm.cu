/* Dense layers: y = act(a W^T + bias) (+ y). See gemm_product.cuh for the kernel.
 *
 * The tile's width follows from the shape of the call: 256 columns where that fills the device, fewer where not (a step
 * of decoding has one row: only the columns are left to spread). The sum of an element is the same chain in every
 * width, so this choice does not show in the bits. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/gemm_product.cuh"

namespace lr
{

static int choose_columns(const struct lr_gemm_args &args, int n_multiprocessors)
{
    if (args.activation != LR_ACT_NONE)
        return 128; /* the only width with activations: no layer of today's models has one here */
    const int64_t n_row_tiles = divide_up(args.n_rows, TILE_ROWS), n = args.w->n;
    for (int columns = 256; columns > 64; columns /= 2)
        if (n > columns / 2 && n_row_tiles * divide_up(n, columns) >= n_multiprocessors)
            return columns;
    return 64;
}

template <output_kind OUTPUT>
static cudaError_t launch_width(cudaStream_t stream, int n_multiprocessors, const product_params &p,
                                int64_t n_row_tiles, int columns)
{
    if (p.activation != LR_ACT_NONE)
        return launch_product<128, OUTPUT, true>(stream, n_multiprocessors, p, n_row_tiles);
    if (columns == 256)
        return launch_product<256, OUTPUT, false>(stream, n_multiprocessors, p, n_row_tiles);
    if (columns == 128)
        return launch_product<128, OUTPUT, false>(stream, n_multiprocessors, p, n_row_tiles);
    return launch_product<64, OUTPUT, false>(stream, n_multiprocessors, p, n_row_tiles);
}

static cudaError_t gemm_plain(cudaStream_t stream, const struct lr_gemm_args &args)
{
    plain_params p = {};
    p.a = static_cast<const __nv_bfloat16 *>(args.a);
    p.a_stride = args.a_stride;
    p.w = static_cast<const __nv_bfloat16 *>(args.w->data);
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
    const cudaStream_t stream = static_cast<cudaStream_t>(exec->stream);
    const int64_t n = args.w->n, k = args.w->k, row_bytes = weight_stride(k) * 2;
    const matrix_view a = {args.a, k, args.n_rows, 1, args.a_stride * 2, args.n_rows * args.a_stride * 2};
    const matrix_view w = {args.w->data, k, n, 1, row_bytes, n * row_bytes};
    if (!tensor_map_possible(a))
        return gemm_plain(stream, args);

    const int columns = choose_columns(args, lr_cuda_multiprocessors(exec));
    product_params p = {};
    cudaError_t error = tensor_map_encode(&p.a, a, WARPGROUP_ROWS);
    if (error == cudaSuccess)
        error = tensor_map_encode(&p.b[0], w, columns);
    if (error != cudaSuccess)
        return error;
    p.n_rows = args.n_rows;
    p.n_experts = 1;
    p.n_column_tiles = static_cast<int>(divide_up(n, columns));
    p.n_columns = static_cast<int>(n);
    p.n_steps = static_cast<int>(divide_up(k, TILE_K));
    p.y = args.y;
    p.y_stride = args.y_stride;
    p.bias = args.bias;
    p.activation = args.activation;
    p.accumulate = args.accumulate;
    p.wide_stores = stores_are_wide(args.y, args.y_stride, n, args.wide ? 2 : 8, args.wide ? 4 : 2);
    const int64_t n_row_tiles = divide_up(args.n_rows, TILE_ROWS);
    const int n_multiprocessors = lr_cuda_multiprocessors(exec);
    return args.wide ? launch_width<output_kind::F32>(stream, n_multiprocessors, p, n_row_tiles, columns)
                     : launch_width<output_kind::BF16>(stream, n_multiprocessors, p, n_row_tiles, columns);
}

} // namespace lr

void lr_cuda_gemm(const struct lr_exec *exec, const struct lr_gemm_args *args)
{
    if (args->n_rows > 0)
        lr_cuda_note(exec, lr::gemm(exec, *args), "gemm");
}
