/* Every slot of the table as a function of each instruction set. Private to kernels/cpu. */
#ifndef LR_KERNELS_CPU_CPU_H
#define LR_KERNELS_CPU_CPU_H

#include "kernels/ops.h"

/* memory.c and rope.c: the same for every instruction set */
enum lr_status lr_cpu_reserve(size_t size_bytes, void **out, struct lr_error *err);
void lr_cpu_release(void *base, size_t size_bytes);
size_t lr_cpu_available(void);
void lr_cpu_mark(const struct lr_exec *exec, enum lr_lane lane, int mark);
void lr_cpu_copy(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes);
void lr_cpu_copy_rows(const struct lr_exec *exec, void *to, size_t to_stride, const void *from, size_t from_stride,
                      size_t row_bytes, int64_t n_rows);
void lr_cpu_zero(const struct lr_exec *exec, void *to, size_t size_bytes);
enum lr_status lr_cpu_download(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes,
                               struct lr_error *err);
enum lr_status lr_cpu_wait(const struct lr_exec *exec, struct lr_error *err);
void lr_cpu_unit_begin(const struct lr_exec *exec);
enum lr_status lr_cpu_unit_end(const struct lr_exec *exec, struct lr_error *err);
void lr_cpu_rope_table(const struct lr_exec *exec, const int64_t *positions, int64_t n_rows, const double *inv_freq,
                       int64_t n_freq, double factor, float *cos_out, float *sin_out);

#define LR_CPU_SLOTS(X)                                                                                                \
    X(weight_bytes)                                                                                                    \
    X(weight_pack)                                                                                                     \
    X(gemm)                                                                                                            \
    X(experts)                                                                                                         \
    X(embed)                                                                                                           \
    X(rmsnorm)                                                                                                         \
    X(gated_rmsnorm)                                                                                                   \
    X(norm_rope)                                                                                                       \
    X(conv)                                                                                                            \
    X(conv_step)                                                                                                       \
    X(l2norm)                                                                                                          \
    X(delta_gates)                                                                                                     \
    X(sigmoid_gate)                                                                                                    \
    X(delta_work_floats)                                                                                               \
    X(delta_summary)                                                                                                   \
    X(delta_output)                                                                                                    \
    X(delta_fold)                                                                                                      \
    X(delta_step)                                                                                                      \
    X(kv_block_bytes)                                                                                                  \
    X(kv_store)                                                                                                        \
    X(kv_store_rows)                                                                                                   \
    X(attention)                                                                                                       \
    X(partials)                                                                                                        \
    X(merge_bounds)                                                                                                    \
    X(merge_accumulate)                                                                                                \
    X(merge_finish)                                                                                                    \
    X(block_summary)                                                                                                   \
    X(block_select)                                                                                                    \
    X(page_bounds)                                                                                                     \
    X(router)                                                                                                          \
    X(expert_sort)                                                                                                     \
    X(gather_rows)                                                                                                     \
    X(moe_combine)                                                                                                     \
    X(sample)

/* The prototypes of one instruction set: the types are those of the table's own slots. */
#define LR_CPU_DECLARE(suffix)                                                                                         \
    extern const struct lr_kernel_ops lr_cpu_ops_##suffix;                                                             \
    size_t lr_weight_bytes_##suffix(int64_t n, int64_t k, enum lr_dtype dtype);                                        \
    void lr_weight_pack_##suffix(struct lr_weight *w, int64_t row, int64_t n_rows, const void *rows);                  \
    void lr_gemm_##suffix(const struct lr_exec *exec, const struct lr_gemm_args *args);                                \
    void lr_experts_##suffix(const struct lr_exec *exec, const struct lr_experts_args *args);                          \
    void lr_embed_##suffix(const struct lr_exec *exec, const void *table, enum lr_dtype dtype, int64_t d,              \
                           const int32_t *ids, int64_t n_rows, float *y);                                              \
    void lr_rmsnorm_##suffix(const struct lr_exec *exec, const struct lr_rmsnorm_args *args);                          \
    void lr_gated_rmsnorm_##suffix(const struct lr_exec *exec, const struct lr_gated_rmsnorm_args *args);              \
    void lr_norm_rope_##suffix(const struct lr_exec *exec, const struct lr_norm_rope_args *args);                      \
    void lr_conv_##suffix(const struct lr_exec *exec, const struct lr_conv_args *args);                                \
    void lr_conv_step_##suffix(const struct lr_exec *exec, const struct lr_conv_step_args *args);                      \
    void lr_l2norm_##suffix(const struct lr_exec *exec, const struct lr_l2norm_args *args);                            \
    void lr_delta_gates_##suffix(const struct lr_exec *exec, const struct lr_delta_gates_args *args);                  \
    void lr_sigmoid_gate_##suffix(const struct lr_exec *exec, const struct lr_sigmoid_gate_args *args);                \
    size_t lr_delta_work_floats_##suffix(struct lr_delta_shape shape, int64_t n_rows);                                 \
    void lr_delta_summary_##suffix(const struct lr_exec *exec, const struct lr_delta_segment_args *args, float *m,     \
                                   float *b);                                                                          \
    void lr_delta_output_##suffix(const struct lr_exec *exec, const struct lr_delta_segment_args *args,                \
                                  const float *s_in, lr_act *o, int64_t o_stride);                                     \
    void lr_delta_fold_##suffix(const struct lr_exec *exec, const struct lr_delta_fold_args *args);                    \
    void lr_delta_step_##suffix(const struct lr_exec *exec, const struct lr_delta_step_args *args);                    \
    size_t lr_kv_block_bytes_##suffix(struct lr_kv_shape shape);                                                       \
    void lr_kv_store_##suffix(const struct lr_exec *exec, const struct lr_kv_store_args *args);                        \
    void lr_attention_##suffix(const struct lr_exec *exec, const struct lr_attention_args *args);                      \
    void lr_kv_store_rows_##suffix(const struct lr_exec *exec, const struct lr_kv_store_rows_args *args);              \
    void lr_partials_##suffix(const struct lr_exec *exec, const struct lr_partials_args *args);                        \
    void lr_merge_bounds_##suffix(const struct lr_exec *exec, const struct lr_merge_args *args);                       \
    void lr_merge_accumulate_##suffix(const struct lr_exec *exec, const struct lr_merge_args *args);                   \
    void lr_merge_finish_##suffix(const struct lr_exec *exec, const struct lr_merge_args *args);                       \
    void lr_block_summary_##suffix(const struct lr_exec *exec, const struct lr_block_summary_args *args);              \
    void lr_block_select_##suffix(const struct lr_exec *exec, const struct lr_block_select_args *args);                \
    void lr_page_bounds_##suffix(const struct lr_exec *exec, const struct lr_page_bounds_args *args);                  \
    void lr_router_##suffix(const struct lr_exec *exec, const struct lr_router_args *args);                            \
    void lr_expert_sort_##suffix(const struct lr_exec *exec, const struct lr_expert_sort_args *args);                  \
    void lr_gather_rows_##suffix(const struct lr_exec *exec, const void *x, size_t row_bytes, const int64_t *rows,     \
                                 int64_t n_rows, void *y);                                                             \
    void lr_moe_combine_##suffix(const struct lr_exec *exec, const struct lr_moe_combine_args *args);                  \
    void lr_sample_##suffix(const struct lr_exec *exec, const struct lr_sample_args *args)

LR_CPU_DECLARE(v4);
LR_CPU_DECLARE(v3);
LR_CPU_DECLARE(c);

#endif
