/* Float64 truth of the dense layers, norms, gates, router and rotary tables. */
#include "kernels/ref.h"

#include <math.h>

double lr_ref_sigmoid(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

double lr_ref_softplus(double x)
{
    return x > 20.0 ? x : log1p(exp(x));
}

double lr_ref_activate(double x, enum lr_activation activation)
{
    switch (activation) {
    case LR_ACT_SILU:
        return x * lr_ref_sigmoid(x);
    case LR_ACT_GELU:
        return 0.5 * x * (1.0 + erf(x / sqrt(2.0)));
    case LR_ACT_GELU_TANH:
        return 0.5 * x * (1.0 + tanh(sqrt(2.0 / acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case LR_ACT_RELU:
        return x > 0.0 ? x : 0.0;
    case LR_ACT_NONE:
        break;
    }
    return x;
}

/* sum_k x[k] W[row, k] */
static double weight_dot(const struct lr_weight *w, int64_t row, const float *x)
{
    double sum = 0.0;
    for (int64_t k = 0; k < w->k; k++)
        sum += (double)x[k] * lr_ref_load(w->data, (row / 16 * w->k + k) * 16 + row % 16, w->dtype);
    return sum;
}

void lr_ref_gemm(const struct lr_gemm_args *args, double *y)
{
    int64_t n = args->w->n;
    for (int64_t t = 0; t < args->n_rows; t++)
        for (int64_t j = 0; j < n; j++) {
            double x = weight_dot(args->w, j, (const float *)args->a + t * args->a_stride);
            x = lr_ref_activate(x + (args->bias ? (double)args->bias[j] : 0.0), args->activation);
            y[t * n + j] = args->accumulate ? x + (double)((const float *)args->y)[t * args->y_stride + j] : x;
        }
}

void lr_ref_experts(const struct lr_experts_args *args, double *hidden, double *y)
{
    for (int64_t e = 0; e < args->n_experts; e++) {
        const struct lr_weight *gate = &args->gate[e], *up = &args->up[e], *down = &args->down[e];
        for (int64_t t = args->offsets[e]; t < args->offsets[e + 1]; t++) {
            const float *x = (const float *)args->x + t * gate->k;
            for (int64_t f = 0; f < gate->n; f++)
                hidden[f] = lr_ref_activate(weight_dot(gate, f, x), args->activation) * weight_dot(up, f, x);
            for (int64_t j = 0; j < down->n; j++) {
                double sum = 0.0;
                for (int64_t f = 0; f < down->k; f++)
                    sum += hidden[f] * lr_ref_load(down->data, (j / 16 * down->k + f) * 16 + j % 16, down->dtype);
                y[t * down->n + j] = sum;
            }
        }
    }
}

static double sum_of_squares(const float *x, int64_t n)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    return sum;
}

static double inverse_rms(const float *x, int64_t n, float eps)
{
    return 1.0 / sqrt(sum_of_squares(x, n) / (double)n + (double)eps);
}

void lr_ref_rmsnorm(const struct lr_rmsnorm_args *args, double *y)
{
    for (int64_t t = 0; t < args->n_rows; t++) {
        const float *x = (const float *)args->x + t * args->x_stride;
        double scale = inverse_rms(x, args->n_cols, args->eps);
        for (int64_t i = 0; i < args->n_cols; i++)
            y[t * args->n_cols + i] = (double)x[i] * scale * ((args->plus_one ? 1.0 : 0.0) + (double)args->w[i]);
    }
}

void lr_ref_gated_rmsnorm(const struct lr_gated_rmsnorm_args *args, double *y)
{
    int64_t n = args->head_dim;
    for (int64_t t = 0; t < args->n_rows; t++)
        for (int64_t h = 0; h < args->n_heads; h++) {
            const float *x = (const float *)args->x + t * args->x_stride + h * n;
            const float *z = (const float *)args->z + t * args->z_stride + h * n;
            double scale = inverse_rms(x, n, args->eps);
            for (int64_t i = 0; i < n; i++)
                y[(t * args->n_heads + h) * n + i] =
                    (double)x[i] * scale * (double)args->w[i] * lr_ref_activate((double)z[i], LR_ACT_SILU);
        }
}

void lr_ref_norm_rope(const struct lr_norm_rope_args *args, double *x)
{
    int64_t n = args->head_dim, half = args->rotary_dim / 2;
    for (int64_t t = 0; t < args->n_rows; t++)
        for (int64_t h = 0; h < args->n_heads; h++) {
            const float *in = (const float *)args->x + t * args->x_stride + h * args->head_stride;
            double *out = x + (t * args->n_heads + h) * n, scale = inverse_rms(in, n, args->eps);
            for (int64_t i = 0; i < n; i++)
                out[i] = (double)in[i] * scale * (1.0 + (double)args->w[i]);
            for (int64_t i = 0; i < half; i++) {
                double c = (double)args->cos[t * half + i], s = (double)args->sin[t * half + i];
                double x1 = out[i], x2 = out[half + i];
                out[i] = x1 * c - x2 * s;
                out[half + i] = x2 * c + x1 * s;
            }
        }
}

void lr_ref_conv(const struct lr_conv_args *args, double *y)
{
    int64_t taps = args->n_taps, channels = args->n_channels;
    for (int64_t t = 0; t < args->n_rows; t++)
        for (int64_t c = 0; c < channels; c++) {
            double sum = 0.0;
            for (int64_t w = 0; w < taps; w++) {
                int64_t from = t - taps + 1 + w;
                const float *row = from >= 0 ? (const float *)args->x + from * args->x_stride
                                             : (const float *)args->tail + (from + taps - 1) * channels;
                sum += (double)args->w[c * taps + w] * (double)row[c];
            }
            y[t * channels + c] = lr_ref_activate(sum, args->activation);
        }
}

void lr_ref_l2norm(const struct lr_l2norm_args *args, double *x)
{
    int64_t n = args->head_dim;
    for (int64_t t = 0; t < args->n_rows; t++)
        for (int64_t h = 0; h < args->n_heads; h++) {
            const float *in = (const float *)args->x + t * args->x_stride + h * n;
            double scale = (double)args->scale / sqrt(sum_of_squares(in, n) + (double)args->eps);
            for (int64_t i = 0; i < n; i++)
                x[(t * args->n_heads + h) * n + i] = (double)in[i] * scale;
        }
}

void lr_ref_delta_gates(const struct lr_delta_gates_args *args, double *beta, double *g)
{
    for (int64_t t = 0; t < args->n_rows; t++)
        for (int64_t h = 0; h < args->n_heads; h++) {
            int64_t b_column = args->b_index ? args->b_index[h] : h, a_column = args->a_index ? args->a_index[h] : h;
            double b = (double)((const float *)args->b)[t * args->ba_stride + b_column];
            double a = (double)((const float *)args->a)[t * args->ba_stride + a_column] + (double)args->dt_bias[h];
            beta[t * args->n_heads + h] = lr_ref_sigmoid(b);
            g[t * args->n_heads + h] = -exp((double)args->a_log[h]) * lr_ref_softplus(a);
        }
}

void lr_ref_sigmoid_gate(const struct lr_sigmoid_gate_args *args, double *y)
{
    int64_t n = args->head_dim;
    for (int64_t t = 0; t < args->n_rows; t++)
        for (int64_t h = 0; h < args->n_heads; h++) {
            const float *x = (const float *)args->x + t * args->x_stride + h * n;
            const float *gate = (const float *)args->gate + t * args->gate_stride + h * args->gate_head_stride;
            for (int64_t i = 0; i < n; i++)
                y[(t * args->n_heads + h) * n + i] = (double)x[i] * lr_ref_sigmoid((double)gate[i]);
        }
}

static void softmax(const float *logits, int64_t n, double *p)
{
    double largest = -(double)INFINITY, sum = 0.0;
    for (int64_t i = 0; i < n; i++)
        largest = fmax(largest, (double)logits[i]);
    for (int64_t i = 0; i < n; i++)
        sum += p[i] = exp((double)logits[i] - largest);
    for (int64_t i = 0; i < n; i++)
        p[i] /= sum;
}

/* How many experts come before e: a larger p, or the same and a lower id. */
static int64_t rank_of(const double *p, int64_t n, int64_t e)
{
    int64_t rank = 0;
    for (int64_t i = 0; i < n; i++)
        rank += p[i] > p[e] || (p[i] == p[e] && i < e);
    return rank;
}

void lr_ref_router(const struct lr_router_args *args, double *p, int32_t *ids, double *weights)
{
    for (int64_t t = 0; t < args->n_rows; t++) {
        double *row = p + t * args->n_experts, *out = weights + t * args->top_k, sum = 0.0;
        int64_t k = 0;
        softmax((const float *)args->logits + t * args->n_experts, args->n_experts, row);
        for (int64_t e = 0; e < args->n_experts; e++)
            if (rank_of(row, args->n_experts, e) < args->top_k) {
                ids[t * args->top_k + k] = (int32_t)e;
                sum += out[k++] = row[e];
            }
        for (k = 0; args->renormalize && k < args->top_k; k++)
            out[k] /= sum;
    }
}

void lr_ref_moe_combine(const struct lr_moe_combine_args *args, double *x)
{
    for (int64_t t = 0; t < args->n_rows; t++)
        for (int64_t j = 0; j < args->d; j++) {
            double sum = (double)((const float *)args->x)[t * args->d + j];
            for (int64_t k = t * args->top_k; k < (t + 1) * args->top_k; k++)
                sum += (double)args->weights[k] * (double)((const float *)args->y)[args->row_of[k] * args->d + j];
            if (args->shared) {
                double factor = args->shared_gate ? lr_ref_sigmoid((double)((const float *)args->shared_gate)[t]) : 1.0;
                sum += factor * (double)((const float *)args->shared)[t * args->d + j];
            }
            x[t * args->d + j] = sum;
        }
}

void lr_ref_rope_table(const int64_t *positions,
                       int64_t n_rows,
                       const double *inv_freq,
                       int64_t n_freq,
                       double factor,
                       double *cos_out,
                       double *sin_out)
{
    for (int64_t t = 0; t < n_rows; t++)
        for (int64_t j = 0; j < n_freq; j++) {
            long double angle = (long double)positions[t] * (long double)inv_freq[j];
            cos_out[t * n_freq + j] = (double)(cosl(angle) * (long double)factor);
            sin_out[t * n_freq + j] = (double)(sinl(angle) * (long double)factor);
        }
}
