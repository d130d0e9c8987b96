/* Mixture of experts over sorted rows: hidden = act(gate x) * (up x), then y = down hidden. Two launches of the
 * product; the first computes a tile of gate and the same tile of up side by side, so that SwiGLU needs no memory and
 * hidden is written once, as activations:
 *
 *   x [rows x k] | gate [C/2 x k]     sums: gate columns | up columns   ->  hidden [rows x C/2]
 *                | up   [C/2 x k]
 *
 * The number of rows of an expert is known to the device alone: the launch is sized by the bound n_rows. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/gemm.h"

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

static cudaError_t gate_and_up(const struct lr_exec *exec, const struct lr_experts_args &args)
{
    const int64_t ffn = args.gate->n;
    product p = {};
    p.kind = output_kind::SWIGLU;
    p.general = args.activation != LR_ACT_SILU || !stores_are_wide(args.hidden, ffn, ffn, 8, 2); /* rare */
    p.rows = {args.offsets, args.n_rows, static_cast<int>(args.n_experts), 0};
    p.a = rows_view(args.x, args.n_rows, args.gate->k);
    p.b[0] = weights_view(args.gate, args.n_experts);
    p.b[1] = weights_view(args.up, args.n_experts);
    p.output = {args.hidden, ffn, static_cast<int>(ffn), nullptr, args.activation, 0};
    return launch_product(exec, p);
}

static cudaError_t down(const struct lr_exec *exec, const struct lr_experts_args &args)
{
    const int64_t d = args.down->n;
    product p = {};
    p.kind = output_kind::ACT;
    p.general = !stores_are_wide(args.y, d, d, 8, 2);
    p.rows = {args.offsets, args.n_rows, static_cast<int>(args.n_experts), 0};
    p.a = rows_view(args.hidden, args.n_rows, args.down->k);
    p.b[0] = weights_view(args.down, args.n_experts);
    p.output = {args.y, d, static_cast<int>(d), nullptr, LR_ACT_NONE, 0};
    return launch_product(exec, p);
}

static cudaError_t experts(const struct lr_exec *exec, const struct lr_experts_args &args)
{
    if (!tensor_map_possible(rows_view(args.x, args.n_rows, args.gate->k)) ||
        !tensor_map_possible(rows_view(args.hidden, args.n_rows, args.gate->n)) ||
        !tensor_map_possible(weights_view(args.gate, args.n_experts)) ||
        !tensor_map_possible(weights_view(args.up, args.n_experts)) ||
        !tensor_map_possible(weights_view(args.down, args.n_experts)))
        return experts_plain(static_cast<cudaStream_t>(exec->stream), args);
    const cudaError_t error = gate_and_up(exec, args);
    return error == cudaSuccess ? down(exec, args) : error;
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(experts)(const struct lr_exec *exec, const struct lr_experts_args *args)
{
    if (args->n_rows > 0)
        lr_cuda_note(exec, lr::experts(exec, *args), "experts");
}
