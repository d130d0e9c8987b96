/* Norms, rotary, short convolution, gates: one pass over rows each. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/math.h"
#include "kernels/cpu/rows.h"

#include <math.h>

/* Loads and stores 16 values, or the n < 16 that are left. */
LR_INLINE lr_v16 load_n(const float *p, int64_t n)
{
    return n >= 16 ? v_load(p) : v_load_part(p, n, 0.0f);
}

LR_INLINE void store_n(float *p, int64_t n, lr_v16 a)
{
    if (n >= 16)
        v_store(p, a);
    else
        v_store_part(p, n, a);
}

LR_INLINE float sum_of_squares(const float *x, int64_t n)
{
    lr_v16 sum = v_zero();
    for (int64_t i = 0; i < n; i += 16) {
        lr_v16 v = load_n(x + i, n - i);
        sum = v_fma(v, v, sum);
    }
    return v_sum(sum);
}

LR_INLINE float inverse_rms(const float *x, int64_t n, float eps)
{
    return 1.0f / sqrtf(sum_of_squares(x, n) / (float)n + eps);
}

struct embed_args {
    const void *table;
    enum lr_dtype dtype;
    int64_t d;
    const int32_t *ids;
    float *y;
};

static void embed_rows(const void *args, int64_t first, int64_t last)
{
    const struct embed_args *e = args;
    for (int64_t t = first; t < last; t++) {
        int64_t start = e->ids[t] * e->d;
        float *y = e->y + t * e->d;
        if (e->dtype == LR_F32) {
            memcpy(y, (const float *)e->table + start, (size_t)e->d * sizeof *y);
            continue;
        }
        const uint16_t *x = (const uint16_t *)e->table + start;
        for (int64_t i = 0; i < e->d; i += 16) {
            uint16_t part[16] = {0};
            int64_t n = e->d - i < 16 ? e->d - i : 16;
            memcpy(part, x + i, (size_t)n * sizeof *part);
            store_n(y + i, n, e->dtype == LR_BF16 ? v_load_bf16(part) : v_load_f16(part));
        }
    }
}

void LR_ISA(lr_embed)(const struct lr_exec *exec,
                      const void *table,
                      enum lr_dtype dtype,
                      int64_t d,
                      const int32_t *ids,
                      int64_t n_rows,
                      float *y)
{
    struct embed_args args = {table, dtype, d, ids, y};
    lr_run_rows(exec, n_rows, d, embed_rows, &args);
}

static void rmsnorm_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_rmsnorm_args *a = args;
    const lr_v16 offset = v_set1(a->plus_one ? 1.0f : 0.0f);
    for (int64_t t = first; t < last; t++) {
        const float *x = (const float *)a->x + t * a->x_stride;
        float *y = (float *)a->y + t * a->y_stride;
        lr_v16 scale = v_set1(inverse_rms(x, a->n_cols, a->eps));
        for (int64_t i = 0; i < a->n_cols; i += 16) {
            lr_v16 w = v_add(offset, load_n(a->w + i, a->n_cols - i));
            store_n(y + i, a->n_cols - i, v_mul(v_mul(load_n(x + i, a->n_cols - i), scale), w));
        }
    }
}

void LR_ISA(lr_rmsnorm)(const struct lr_exec *exec, const struct lr_rmsnorm_args *args)
{
    lr_run_rows(exec, args->n_rows, args->n_cols, rmsnorm_rows, args);
}

static void gated_rmsnorm_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_gated_rmsnorm_args *a = args;
    int64_t n = a->head_dim;
    for (int64_t t = first; t < last; t++)
        for (int64_t h = 0; h < a->n_heads; h++) {
            const float *x = (const float *)a->x + t * a->x_stride + h * n;
            const float *z = (const float *)a->z + t * a->z_stride + h * n;
            float *y = (float *)a->y + t * a->y_stride + h * n;
            lr_v16 scale = v_set1(inverse_rms(x, n, a->eps));
            for (int64_t i = 0; i < n; i += 16) {
                lr_v16 normed = v_mul(v_mul(load_n(x + i, n - i), scale), load_n(a->w + i, n - i));
                store_n(y + i, n - i, v_mul(normed, v_silu(load_n(z + i, n - i))));
            }
        }
}

void LR_ISA(lr_gated_rmsnorm)(const struct lr_exec *exec, const struct lr_gated_rmsnorm_args *args)
{
    lr_run_rows(exec, args->n_rows, 4 * args->n_heads * args->head_dim, gated_rmsnorm_rows, args);
}

static void norm_rope_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_norm_rope_args *a = args;
    int64_t n = a->head_dim, half = a->rotary_dim / 2;
    const lr_v16 one = v_set1(1.0f);
    for (int64_t t = first; t < last; t++)
        for (int64_t h = 0; h < a->n_heads; h++) {
            float *x = (float *)a->x + t * a->x_stride + h * a->head_stride;
            lr_v16 scale = v_set1(inverse_rms(x, n, a->eps));
            for (int64_t i = 0; i < n; i += 16) {
                lr_v16 w = v_add(one, load_n(a->w + i, n - i));
                store_n(x + i, n - i, v_mul(v_mul(load_n(x + i, n - i), scale), w));
            }
            for (int64_t i = 0; i < half; i += 16) {
                int64_t left = half - i;
                lr_v16 c = load_n(a->cos + t * half + i, left), s = load_n(a->sin + t * half + i, left);
                lr_v16 x1 = load_n(x + i, left), x2 = load_n(x + half + i, left);
                store_n(x + i, left, v_fma(x1, c, v_negative(v_mul(x2, s))));
                store_n(x + half + i, left, v_fma(x2, c, v_mul(x1, s)));
            }
        }
}

void LR_ISA(lr_norm_rope)(const struct lr_exec *exec, const struct lr_norm_rope_args *args)
{
    lr_run_rows(exec, args->n_rows, args->n_heads * args->head_dim, norm_rope_rows, args);
}

static const float *conv_input(const struct lr_conv_args *a, int64_t t)
{
    return t >= 0 ? (const float *)a->x + t * a->x_stride
                  : (const float *)a->tail + (t + a->n_taps - 1) * a->n_channels;
}

/* Sixteen channels of rows [first, last): taps transposed once, then a window slides down the rows. */
static void conv_channels(const struct lr_conv_args *a, int64_t channel, int64_t first, int64_t last)
{
    int64_t n = a->n_channels - channel < 16 ? a->n_channels - channel : 16;
    lr_v16 taps[LR_MAX_CONV_TAPS];
    for (int64_t w = 0; w < a->n_taps; w++) {
        float column[16] = {0};
        for (int64_t i = 0; i < n; i++)
            column[i] = a->w[(channel + i) * a->n_taps + w];
        taps[w] = v_load(column);
    }
    for (int64_t t = first; t < last; t++) {
        lr_v16 sum = v_zero();
        for (int64_t w = 0; w < a->n_taps; w++)
            sum = v_fma(taps[w], load_n(conv_input(a, t - a->n_taps + 1 + w) + channel, n), sum);
        store_n((float *)a->y + t * a->y_stride + channel, n, v_activate(sum, a->activation));
    }
}

static void conv_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_conv_args *a = args;
    for (int64_t channel = 0; channel < a->n_channels; channel += 16)
        conv_channels(a, channel, first, last);
}

void LR_ISA(lr_conv)(const struct lr_exec *exec, const struct lr_conv_args *args)
{
    lr_run_rows(exec, args->n_rows, args->n_channels, conv_rows, args);
}

/* One sequence a row: the convolution of its new input, then the tail moves on. */
static void conv_step_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_conv_step_args *a = args;
    size_t row_bytes = (size_t)a->n_channels * sizeof(float);
    for (int64_t t = first; t < last; t++) {
        float *tail = a->tails[t];
        const float *x = (const float *)a->x + t * a->x_stride;
        struct lr_conv_args one = {.x = x,
                                   .x_stride = a->x_stride,
                                   .w = a->w,
                                   .tail = tail,
                                   .y = (float *)a->y + t * a->y_stride,
                                   .y_stride = a->y_stride,
                                   .n_rows = 1,
                                   .n_channels = a->n_channels,
                                   .n_taps = a->n_taps,
                                   .activation = a->activation};
        conv_rows(&one, 0, 1);
        if (a->n_taps < 2)
            continue;
        memmove(tail, tail + a->n_channels, (size_t)(a->n_taps - 2) * row_bytes);
        memcpy(tail + (a->n_taps - 2) * a->n_channels, x, row_bytes);
    }
}

void LR_ISA(lr_conv_step)(const struct lr_exec *exec, const struct lr_conv_step_args *args)
{
    lr_run_rows(exec, args->n_rows, args->n_channels * args->n_taps, conv_step_rows, args);
}

static void l2norm_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_l2norm_args *a = args;
    int64_t n = a->head_dim;
    for (int64_t t = first; t < last; t++)
        for (int64_t h = 0; h < a->n_heads; h++) {
            float *x = (float *)a->x + t * a->x_stride + h * n;
            lr_v16 scale = v_set1(a->scale / sqrtf(sum_of_squares(x, n) + a->eps));
            for (int64_t i = 0; i < n; i += 16)
                store_n(x + i, n - i, v_mul(load_n(x + i, n - i), scale));
        }
}

void LR_ISA(lr_l2norm)(const struct lr_exec *exec, const struct lr_l2norm_args *args)
{
    lr_run_rows(exec, args->n_rows, args->n_heads * args->head_dim, l2norm_rows, args);
}

static void delta_gates_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_delta_gates_args *p = args;
    for (int64_t t = first; t < last; t++)
        for (int64_t h = 0; h < p->n_heads; h += 16) {
            int64_t n = p->n_heads - h < 16 ? p->n_heads - h : 16;
            float a[16] = {0}, b[16] = {0};
            for (int64_t i = 0; i < n; i++) {
                int64_t b_column = p->b_index ? p->b_index[h + i] : h + i;
                int64_t a_column = p->a_index ? p->a_index[h + i] : h + i;
                b[i] = ((const float *)p->b)[t * p->ba_stride + b_column];
                a[i] = ((const float *)p->a)[t * p->ba_stride + a_column] + p->dt_bias[h + i];
            }
            lr_v16 rate = v_negative(v_exp(load_n(p->a_log + h, n)));
            store_n(p->beta + t * p->n_heads + h, n, v_sigmoid(v_load(b)));
            store_n(p->g + t * p->n_heads + h, n, v_mul(rate, v_softplus(v_load(a))));
        }
}

void LR_ISA(lr_delta_gates)(const struct lr_exec *exec, const struct lr_delta_gates_args *args)
{
    lr_run_rows(exec, args->n_rows, 8 * args->n_heads, delta_gates_rows, args);
}

static void sigmoid_gate_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_sigmoid_gate_args *a = args;
    int64_t n = a->head_dim;
    for (int64_t t = first; t < last; t++)
        for (int64_t h = 0; h < a->n_heads; h++) {
            const float *x = (const float *)a->x + t * a->x_stride + h * n;
            const float *gate = (const float *)a->gate + t * a->gate_stride + h * a->gate_head_stride;
            float *y = (float *)a->y + t * a->y_stride + h * n;
            for (int64_t i = 0; i < n; i += 16)
                store_n(y + i, n - i, v_mul(load_n(x + i, n - i), v_sigmoid(load_n(gate + i, n - i))));
        }
}

void LR_ISA(lr_sigmoid_gate)(const struct lr_exec *exec, const struct lr_sigmoid_gate_args *args)
{
    lr_run_rows(exec, args->n_rows, 4 * args->n_heads * args->head_dim, sigmoid_gate_rows, args);
}
