/* The table of the CUDA backend. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/device.h"

#include <stddef.h>

/* The memory's functions are filled in when a device is opened: a constant of another file cannot be copied here. */
static struct lr_kernel_ops lr_cuda_ops = {
    .name = "cuda",
    .act_dtype = LR_BF16,
    .host_memory = 0,
    .unit_begin = lr_cuda_unit_begin,
    .unit_end = lr_cuda_unit_end,
    .weight_bytes = lr_cuda_weight_bytes,
    .weight_pack = lr_cuda_weight_pack,
    .gemm = lr_cuda_gemm,
    .experts = lr_cuda_experts,
    .embed = lr_cuda_embed,
    .rope_table = lr_cuda_rope_table,
    .rmsnorm = lr_cuda_rmsnorm,
    .gated_rmsnorm = lr_cuda_gated_rmsnorm,
    .norm_rope = lr_cuda_norm_rope,
    .conv = lr_cuda_conv,
    .conv_step = lr_cuda_conv_step,
    .l2norm = lr_cuda_l2norm,
    .delta_gates = lr_cuda_delta_gates,
    .sigmoid_gate = lr_cuda_sigmoid_gate,
    .delta_work_floats = lr_cuda_delta_work_floats,
    .delta_summary = lr_cuda_delta_summary,
    .delta_output = lr_cuda_delta_output,
    .delta_fold = lr_cuda_delta_fold,
    .delta_step = lr_cuda_delta_step,
    .kv_block_bytes = lr_cuda_kv_block_bytes,
    .kv_store = lr_cuda_kv_store,
    .kv_store_rows = lr_cuda_kv_store_rows,
    .attention = lr_cuda_attention,
    .partials = lr_cuda_partials,
    .merge_bounds = lr_cuda_merge_bounds,
    .merge_accumulate = lr_cuda_merge_accumulate,
    .merge_finish = lr_cuda_merge_finish,
    .block_summary = lr_cuda_block_summary,
    .block_select = lr_cuda_block_select,
    .page_bounds = lr_cuda_page_bounds,
    .router = lr_cuda_router,
    .expert_sort = lr_cuda_expert_sort,
    .gather_rows = lr_cuda_gather_rows,
    .moe_combine = lr_cuda_moe_combine,
    .sample = lr_cuda_sample,
};

enum lr_status
lr_kernels_cuda_open(int device, const struct lr_kernel_ops **out, struct lr_exec *exec, struct lr_error *err)
{
    LR_TRY(lr_cuda_device_open(device, exec, err));
    lr_cuda_ops.memory = lr_cuda_memory;
    *out = &lr_cuda_ops;
    return LR_OK;
}

void lr_kernels_cuda_close(struct lr_exec *exec)
{
    lr_cuda_device_close(exec);
}
