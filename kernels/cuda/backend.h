/* What every slot of the CUDA backend may lean on: the device copy of a host array, scratch memory, and where errors go.
 *
 *   host array --> pinned ring --> device ring      lr_cuda_upload: ordered with exec->stream, the caller's array is free
 *                                                   at once; the copy lives until the ring comes round again
 *   scratch                                         one buffer that every slot may use from its first to its last kernel:
 *                                                   the stream orders the users
 *
 * Nothing here waits for the device, but for an upload into a part of the ring whose readers are not through yet.
 * One host thread an exec. C and CUDA C++. */
#ifndef LR_KERNELS_CUDA_BACKEND_H
#define LR_KERNELS_CUDA_BACKEND_H

#include "kernels/cuda/act.h"
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { LR_CUDA_SCRATCH_BYTES = 64 << 20, LR_CUDA_RING_BYTES = 64 << 20 };

/* The largest array of one upload. */
enum { LR_CUDA_MAX_UPLOAD_BYTES = LR_CUDA_RING_BYTES / 4 };

/* A device copy of size_bytes bytes, 256-byte aligned. More than LR_CUDA_MAX_UPLOAD_BYTES is an error that the next
 * download or wait reports; nothing is copied then. */
const void *lr_cuda_upload(const struct lr_exec *exec, const void *host, size_t size_bytes);

/* LR_CUDA_SCRATCH_BYTES of device memory, 256-byte aligned, contents undefined. */
void *lr_cuda_scratch(const struct lr_exec *exec);

/* A number on the device that is 0 whenever a slot begins: who counts with it sets it back. */
uint32_t *lr_cuda_counter(const struct lr_exec *exec);

/* Remembers the first error (a cudaError_t; 0 is none) with the slot it came from; the next memory.download or
 * memory.wait reports it. */
void lr_cuda_note(const struct lr_exec *exec, int error, const char *slot);

/* The number of multiprocessors of the device. */
int lr_cuda_multiprocessors(const struct lr_exec *exec);

/* The most shared memory that a block of threads may have: 99 KiB on sm_86, 163 on sm_80, 227 on sm_90. */
int lr_cuda_block_shared_bytes(const struct lr_exec *exec);

/* Whether a slot that has two sets of kernels launches those of sm_90a (wgmma, the copy engine) or the portable ones
 * (mma.sync). Of the device: 1 on compute capability 9.0, 0 on every other; LR_CUDA_KERNELS=mma makes it 0. */
int lr_cuda_hopper_kernels(const struct lr_exec *exec);

void lr_cuda_unit_begin(const struct lr_exec *exec);
enum lr_status lr_cuda_unit_end(const struct lr_exec *exec, struct lr_error *err);
void lr_cuda_sample(const struct lr_exec *exec, const struct lr_sample_args *args);

/* The slots of the table that see activations, each in the file named after what it computes. */
size_t LR_CUDA(weight_bytes)(int64_t n, int64_t k, enum lr_dtype dtype);
void LR_CUDA(weight_pack)(struct lr_weight *w, int64_t row, int64_t n_rows, const void *rows);
void LR_CUDA(gemm)(const struct lr_exec *exec, const struct lr_gemm_args *args);
void LR_CUDA(experts)(const struct lr_exec *exec, const struct lr_experts_args *args);
void LR_CUDA(embed)(const struct lr_exec *exec, const void *table, enum lr_dtype dtype, int64_t d, const int32_t *ids,
                   int64_t n_rows, float *y);
void LR_CUDA(rope_table)(const struct lr_exec *exec, const int64_t *positions, int64_t n_rows, const double *inv_freq,
                        int64_t n_freq, double factor, float *cos_out, float *sin_out);
void LR_CUDA(rmsnorm)(const struct lr_exec *exec, const struct lr_rmsnorm_args *args);
void LR_CUDA(gated_rmsnorm)(const struct lr_exec *exec, const struct lr_gated_rmsnorm_args *args);
void LR_CUDA(norm_rope)(const struct lr_exec *exec, const struct lr_norm_rope_args *args);
void LR_CUDA(conv)(const struct lr_exec *exec, const struct lr_conv_args *args);
void LR_CUDA(conv_step)(const struct lr_exec *exec, const struct lr_conv_step_args *args);
void LR_CUDA(l2norm)(const struct lr_exec *exec, const struct lr_l2norm_args *args);
void LR_CUDA(delta_gates)(const struct lr_exec *exec, const struct lr_delta_gates_args *args);
void LR_CUDA(sigmoid_gate)(const struct lr_exec *exec, const struct lr_sigmoid_gate_args *args);
size_t LR_CUDA(delta_work_floats)(struct lr_delta_shape shape, int64_t n_rows);
void LR_CUDA(delta_summary)(const struct lr_exec *exec, const struct lr_delta_segment_args *args, float *m, float *b);
void LR_CUDA(delta_output)(const struct lr_exec *exec, const struct lr_delta_segment_args *args, const float *s_in,
                          lr_act *o, int64_t o_stride);
void LR_CUDA(delta_fold)(const struct lr_exec *exec, const struct lr_delta_fold_args *args);
void LR_CUDA(delta_step)(const struct lr_exec *exec, const struct lr_delta_step_args *args);
size_t LR_CUDA(kv_block_bytes)(struct lr_kv_shape shape);
void LR_CUDA(kv_store)(const struct lr_exec *exec, const struct lr_kv_store_args *args);
void LR_CUDA(kv_store_rows)(const struct lr_exec *exec, const struct lr_kv_store_rows_args *args);
void LR_CUDA(attention)(const struct lr_exec *exec, const struct lr_attention_args *args);
void LR_CUDA(partials)(const struct lr_exec *exec, const struct lr_partials_args *args);
void LR_CUDA(merge_bounds)(const struct lr_exec *exec, const struct lr_merge_args *args);
void LR_CUDA(merge_accumulate)(const struct lr_exec *exec, const struct lr_merge_args *args);
void LR_CUDA(merge_finish)(const struct lr_exec *exec, const struct lr_merge_args *args);
void LR_CUDA(block_summary)(const struct lr_exec *exec, const struct lr_block_summary_args *args);
void LR_CUDA(block_select)(const struct lr_exec *exec, const struct lr_block_select_args *args);
void LR_CUDA(page_bounds)(const struct lr_exec *exec, const struct lr_page_bounds_args *args);
void LR_CUDA(router)(const struct lr_exec *exec, const struct lr_router_args *args);
void LR_CUDA(expert_sort)(const struct lr_exec *exec, const struct lr_expert_sort_args *args);
void LR_CUDA(gather_rows)(const struct lr_exec *exec, const void *x, size_t row_bytes, const int64_t *rows,
                         int64_t n_rows, void *y);
void LR_CUDA(moe_combine)(const struct lr_exec *exec, const struct lr_moe_combine_args *args);

#ifdef __cplusplus
}
#endif

#endif
