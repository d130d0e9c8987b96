/* The table of the CUDA backend for one activation type (kernels/cuda/act.h). */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/device.h"

#include <stddef.h>

/* The name and the memory's functions are filled in when a device is opened (open.c). */
struct lr_kernel_ops LR_CUDA(ops) = {
    .act_dtype = LR_CUDA_DTYPE,
    .host_memory = 0,
    .unit_begin = lr_cuda_unit_begin,
    .unit_end = lr_cuda_unit_end,
    .weight_bytes = LR_CUDA(weight_bytes),
    .weight_pack = LR_CUDA(weight_pack),
    .gemm = LR_CUDA(gemm),
    .experts = LR_CUDA(experts),
    .embed = LR_CUDA(embed),
    .rope_table = LR_CUDA(rope_table),
    .rmsnorm = LR_CUDA(rmsnorm),
    .gated_rmsnorm = LR_CUDA(gated_rmsnorm),
    .norm_rope = LR_CUDA(norm_rope),
    .conv = LR_CUDA(conv),
    .conv_step = LR_CUDA(conv_step),
    .l2norm = LR_CUDA(l2norm),
    .delta_gates = LR_CUDA(delta_gates),
    .sigmoid_gate = LR_CUDA(sigmoid_gate),
    .delta_work_floats = LR_CUDA(delta_work_floats),
    .delta_summary = LR_CUDA(delta_summary),
    .delta_output = LR_CUDA(delta_output),
    .delta_fold = LR_CUDA(delta_fold),
    .delta_step = LR_CUDA(delta_step),
    .kv_block_bytes = LR_CUDA(kv_block_bytes),
    .kv_store = LR_CUDA(kv_store),
    .kv_store_rows = LR_CUDA(kv_store_rows),
    .attention = LR_CUDA(attention),
    .partials = LR_CUDA(partials),
    .merge_bounds = LR_CUDA(merge_bounds),
    .merge_accumulate = LR_CUDA(merge_accumulate),
    .merge_finish = LR_CUDA(merge_finish),
    .block_summary = LR_CUDA(block_summary),
    .block_select = LR_CUDA(block_select),
    .page_bounds = LR_CUDA(page_bounds),
    .router = LR_CUDA(router),
    .expert_sort = LR_CUDA(expert_sort),
    .gather_rows = LR_CUDA(gather_rows),
    .moe_combine = LR_CUDA(moe_combine),
    .sample = lr_cuda_sample,
};
