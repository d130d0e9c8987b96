/* Float64 truth of the gated delta rule: the recurrence itself, one token at a time. */
#include "kernels/ref.h"

#include <math.h>

/* One token of one head, S [dk, n]:  S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q
 * v NULL: zeros; o NULL: not wanted. Columns of S do not meet; sums over its rows ascend. */
static void token(
    double *s, int64_t dk, int64_t n, const float *q, const float *k, const float *v, double g, double beta, double *o)
{
    double decay = exp(g), change[LR_MAX_DELTA_DIM];
    for (int64_t j = 0; j < n; j++)
        change[j] = 0.0;
    for (int64_t i = 0; i < dk; i++)
        for (int64_t j = 0; j < n; j++) {
            s[i * n + j] *= decay;
            change[j] += (double)k[i] * s[i * n + j];
        }
    for (int64_t j = 0; j < n; j++)
        change[j] = beta * ((v ? (double)v[j] : 0.0) - change[j]);
    for (int64_t i = 0; i < dk; i++)
        for (int64_t j = 0; j < n; j++)
            s[i * n + j] += (double)k[i] * change[j];
    for (int64_t j = 0; o && j < n; j++)
        o[j] = 0.0;
    for (int64_t i = 0; o && i < dk; i++)
        for (int64_t j = 0; j < n; j++)
            o[j] += (double)q[i] * s[i * n + j];
}

static void
segment_head(const struct lr_delta_segment_args *args, int64_t head, double *m, double *b, double *state, double *o)
{
    struct lr_delta_shape s = args->shape;
    int64_t k_head = head / (s.n_v_heads / s.n_k_heads);
    for (int64_t t = 0; t < args->n_rows; t++) {
        const float *q = (const float *)args->q + t * args->qkv_stride + k_head * s.dk;
        const float *k = (const float *)args->k + t * args->qkv_stride + k_head * s.dk;
        const float *v = (const float *)args->v + t * args->qkv_stride + head * s.dv;
        double g = (double)args->g[t * s.n_v_heads + head], beta = (double)args->beta[t * s.n_v_heads + head];
        token(m, s.dk, s.dk, q, k, NULL, g, beta, NULL);
        token(b, s.dk, s.dv, q, k, v, g, beta, NULL);
        token(state, s.dk, s.dv, q, k, v, g, beta, o + (t * s.n_v_heads + head) * s.dv);
    }
}

void lr_ref_delta_segment(
    const struct lr_delta_segment_args *args, const float *s_in, double *m, double *b, double *s_out, double *o)
{
    struct lr_delta_shape s = args->shape;
    int64_t state_size = s.dk * s.dv;
    for (int64_t h = 0; h < s.n_v_heads; h++) {
        double *m_head = m + h * s.dk * s.dk, *b_head = b + h * state_size, *s_head = s_out + h * state_size;
        for (int64_t i = 0; i < s.dk * s.dk; i++)
            m_head[i] = i / s.dk == i % s.dk ? 1.0 : 0.0;
        for (int64_t i = 0; i < state_size; i++) {
            b_head[i] = 0.0;
            s_head[i] = (double)s_in[h * state_size + i];
        }
        segment_head(args, h, m_head, b_head, s_head, o);
    }
}

void lr_ref_delta_fold(const struct lr_delta_fold_args *args, double *s_out)
{
    struct lr_delta_shape s = args->shape;
    for (int64_t h = 0; h < s.n_v_heads; h++)
        for (int64_t i = h * s.dk; i < (h + 1) * s.dk; i++)
            for (int64_t j = 0; j < s.dv; j++) {
                double sum = (double)args->b[i * s.dv + j];
                for (int64_t k = 0; k < s.dk; k++)
                    sum += (double)args->m[i * s.dk + k] * (double)args->s_in[(h * s.dk + k) * s.dv + j];
                s_out[i * s.dv + j] = sum;
            }
}

void lr_ref_delta_step(const struct lr_delta_step_args *args, double *states, double *o)
{
    struct lr_delta_shape s = args->shape;
    int64_t state_size = s.dk * s.dv;
    for (int64_t row = 0; row < args->n_rows; row++)
        for (int64_t h = 0; h < s.n_v_heads; h++) {
            int64_t k_head = h / (s.n_v_heads / s.n_k_heads), at = row * s.n_v_heads + h;
            const float *q = (const float *)args->q + row * args->qkv_stride + k_head * s.dk;
            const float *k = (const float *)args->k + row * args->qkv_stride + k_head * s.dk;
            const float *v = (const float *)args->v + row * args->qkv_stride + h * s.dv;
            for (int64_t i = 0; i < state_size; i++)
                states[at * state_size + i] = (double)args->states[row][h * state_size + i];
            token(states + at * state_size, s.dk, s.dv, q, k, v, (double)args->g[at], (double)args->beta[at],
                  o + at * s.dv);
        }
}
