/* The float64 truth of the operations in kernels/ops.h: plain loops, one thread, slow. Tests measure every backend
 * against it; nothing else calls it.
 *
 * Inputs come in the operation's own argument struct, in the CPU backend's layouts (float32 activations, packed
 * weights, KV blocks). The struct's outputs are not written: a truth goes to float64 arrays that the caller owns,
 * contiguous, in the shapes named below. Where an operation works in place the truth must be taken first. */
#ifndef LR_KERNELS_REF_H
#define LR_KERNELS_REF_H

#include "kernels/ops.h"

#include <math.h>
#include <string.h>

/* One element of an array of `dtype`, widened (exactly). */
static inline double lr_ref_load(const void *data, int64_t index, enum lr_dtype dtype)
{
    if (dtype == LR_F32)
        return (double)((const float *)data)[index];
    uint16_t packed = ((const uint16_t *)data)[index];
    if (dtype == LR_BF16) {
        uint32_t bits = (uint32_t)packed << 16;
        float wide;
        memcpy(&wide, &bits, sizeof wide);
        return (double)wide;
    }
    int exponent = packed >> 10 & 31, fraction = packed & 1023;
    double size = exponent == 0    ? ldexp(fraction, -24)
                  : exponent == 31 ? (fraction ? (double)NAN : (double)INFINITY)
                                   : ldexp(1024 + fraction, exponent - 25);
    return packed & 0x8000 ? -size : size;
}

double lr_ref_sigmoid(double x);
double lr_ref_softplus(double x);
double lr_ref_activate(double x, enum lr_activation activation);

/* ---- dense layers, norms, gates (ref_dense.c) ---- */

void lr_ref_gemm(const struct lr_gemm_args *args, double *y); /* [n_rows, n] */
/* hidden: scratch [ffn]; y [n_rows, d] */
void lr_ref_experts(const struct lr_experts_args *args, double *hidden, double *y);
void lr_ref_rmsnorm(const struct lr_rmsnorm_args *args, double *y);             /* [n_rows, n_cols] */
void lr_ref_gated_rmsnorm(const struct lr_gated_rmsnorm_args *args, double *y); /* [n_rows, n_heads, head_dim] */
void lr_ref_norm_rope(const struct lr_norm_rope_args *args, double *x);         /* [n_rows, n_heads, head_dim] */
void lr_ref_conv(const struct lr_conv_args *args, double *y);                   /* [n_rows, n_channels] */
void lr_ref_l2norm(const struct lr_l2norm_args *args, double *x);               /* [n_rows, n_heads, head_dim] */
void lr_ref_delta_gates(const struct lr_delta_gates_args *args, double *beta, double *g); /* [n_rows, n_heads] */
void lr_ref_sigmoid_gate(const struct lr_sigmoid_gate_args *args, double *y); /* [n_rows, n_heads, head_dim] */

/* p [n_rows, n_experts]: the softmax; ids and weights [n_rows, top_k], chosen from p in float64 */
void lr_ref_router(const struct lr_router_args *args, double *p, int32_t *ids, double *weights);
void lr_ref_moe_combine(const struct lr_moe_combine_args *args, double *x); /* [n_rows, d] */

/* As lr_rope_table; angle, sine and cosine in long double. */
void lr_ref_rope_table(const int64_t *positions,
                       int64_t n_rows,
                       const double *inv_freq,
                       int64_t n_freq,
                       double factor,
                       double *cos_out,
                       double *sin_out);

/* ---- gated delta rule, token by token (ref_delta.c) ---- */

/* The recurrence over the segment's tokens, from three starts: m [n_v_heads, dk, dk] from the identity with v = 0,
 * b [n_v_heads, dk, dv] from zero, and s_out [n_v_heads, dk, dv] with o [n_rows, n_v_heads, dv] from s_in.
 * args->work is not used. */
void lr_ref_delta_segment(
    const struct lr_delta_segment_args *args, const float *s_in, double *m, double *b, double *s_out, double *o);
void lr_ref_delta_fold(const struct lr_delta_fold_args *args, double *s_out); /* [n_v_heads, dk, dv] */
/* states: the updated ones, [n_rows, n_v_heads, dk, dv]; o [n_rows, n_v_heads, dv] */
void lr_ref_delta_step(const struct lr_delta_step_args *args, double *states, double *o);

/* ---- attention and selection (ref_attention.c) ---- */

/* Whole softmax over the keys that are listed and visible, from an empty start (args->m, l, o are not read):
 * y [n_rows, n_heads, head_dim] = sum_j p_j v_j, zero where nothing is visible; lse [n_rows, n_heads] = log sum_j
 * exp(s_j), -inf where nothing is visible. */
void lr_ref_attention(const struct lr_attention_args *args, double *y, double *lse);
/* y [n_rows, n_heads, head_dim] = sum_p w_p o_p / sum_p w_p l_p with w_p = exp(m_p - max m), zero where all are empty
 */
void lr_ref_merge(const struct lr_merge_args *args, double *y);
void lr_ref_block_summary(const struct lr_block_summary_args *args, double *mean, double *min, double *max);
/* scores [query blocks, n_kv_heads, n_blocks]: mean_q . mean_k, -inf for blocks that are no candidates; chosen as in
 * the operation */
void lr_ref_block_select(const struct lr_block_select_args *args, double *scores, int32_t *chosen);
void lr_ref_page_bounds(const struct lr_page_bounds_args *args, double *bounds); /* [n_rows, n_kv_heads, n_pages] */

#endif
