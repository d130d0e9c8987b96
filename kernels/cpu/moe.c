/* Router, row gathering and the weighted sum that brings expert outputs home. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/math.h"
#include "kernels/cpu/rows.h"

/* p = softmax(logits), in lanes; E <= LR_MAX_EXPERTS */
static void softmax(const float *logits, int64_t n, float *p)
{
    lr_v16 largest = v_set1(-INFINITY);
    for (int64_t i = 0; i < n; i += 16)
        largest = v_max(n - i >= 16 ? v_load(logits + i) : v_load_part(logits + i, n - i, -INFINITY), largest);
    float lanes[16], m;
    v_store(lanes, largest);
    m = lanes[0];
    for (int i = 1; i < 16; i++)
        m = lanes[i] > m ? lanes[i] : m;
    lr_v16 sum = v_zero();
    for (int64_t i = 0; i < n; i += 16) {
        lr_v16 x = n - i >= 16 ? v_load(logits + i) : v_load_part(logits + i, n - i, -INFINITY);
        lr_v16 e = v_exp(v_sub(x, v_set1(m)));
        sum = v_add(sum, e);
        v_store(p + i, e);
    }
    lr_v16 total = v_set1(v_sum(sum));
    for (int64_t i = 0; i < n; i += 16)
        v_store(p + i, v_div(v_load(p + i), total));
}

static void router_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_router_args *r = args;
    float p[LR_MAX_EXPERTS + 16];
    for (int64_t t = first; t < last; t++) {
        int32_t *ids = r->ids + t * r->top_k;
        float *weights = r->weights + t * r->top_k, sum = 0.0f;
        softmax(r->logits + t * r->n_experts, r->n_experts, p);
        for (int64_t k = 0; k < r->top_k; k++) {
            int32_t best = -1;
            float best_p = -1.0f; /* a taken expert has -1 as well; a NaN is never better */
            for (int64_t e = 0; e < r->n_experts; e++)
                if (p[e] > best_p) {
                    best = (int32_t)e;
                    best_p = p[e];
                }
            if (best < 0) { /* NaN logits: any distinct experts will do, the output is NaN anyway */
                best = 0;
                for (int64_t i = 0; i < k; i++)
                    best += ids[i] == best;
                best_p = p[best];
            }
            p[best] = -1.0f;
            sum += best_p;
            int64_t i = k;
            for (; i > 0 && ids[i - 1] > best; i--) {
                ids[i] = ids[i - 1];
                weights[i] = weights[i - 1];
            }
            ids[i] = best;
            weights[i] = best_p;
        }
        for (int64_t k = 0; r->renormalize && k < r->top_k; k++)
            weights[k] /= sum;
    }
}

void LR_ISA(lr_router)(const struct lr_exec *exec, const struct lr_router_args *args)
{
    lr_run_rows(exec, args->n_rows, args->n_experts * (args->top_k + 4), router_rows, args);
}

void LR_ISA(lr_expert_sort)(const struct lr_exec *exec, const struct lr_expert_sort_args *args)
{
    (void)exec;
    int64_t next[LR_MAX_EXPERTS], n = args->n_rows * args->top_k;
    memset(args->offsets, 0, (size_t)(args->n_experts + 1) * sizeof *args->offsets);
    for (int64_t i = 0; i < n; i++)
        args->offsets[args->ids[i] + 1]++;
    for (int64_t e = 0; e < args->n_experts; e++) {
        next[e] = args->offsets[e];
        args->offsets[e + 1] += args->offsets[e];
    }
    for (int64_t i = 0; i < n; i++) {
        int64_t row = next[args->ids[i]]++;
        args->order[row] = i / args->top_k;
        args->row_of[i] = row;
    }
}

struct gather_args {
    const char *x;
    size_t row_bytes;
    const int64_t *rows;
    char *y;
};

static void gather_rows(const void *args, int64_t first, int64_t last)
{
    const struct gather_args *g = args;
    for (int64_t i = first; i < last; i++)
        memcpy(g->y + (size_t)i * g->row_bytes, g->x + (size_t)g->rows[i] * g->row_bytes, g->row_bytes);
}

void LR_ISA(lr_gather_rows)(
    const struct lr_exec *exec, const void *x, size_t row_bytes, const int64_t *rows, int64_t n_rows, void *y)
{
    struct gather_args args = {x, row_bytes, rows, y};
    lr_run_rows(exec, n_rows, (int64_t)(row_bytes / sizeof(float)), gather_rows, &args);
}

static void combine_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_moe_combine_args *c = args;
    for (int64_t t = first; t < last; t++) {
        float *x = c->x + t * c->d;
        const float *shared = c->shared ? (const float *)c->shared + t * c->d : NULL;
        float factor = shared && c->shared_gate ? sigmoid_1(c->shared_gate[t]) : 1.0f;
        for (int64_t j = 0; j < c->d; j += 16) {
            int64_t n = c->d - j < 16 ? c->d - j : 16;
            lr_v16 sum = v_zero();
            for (int64_t k = 0; k < c->top_k; k++) {
                const float *y = (const float *)c->y + c->row_of[t * c->top_k + k] * c->d + j;
                sum = v_fma(v_set1(c->weights[t * c->top_k + k]), n == 16 ? v_load(y) : v_load_part(y, n, 0.0f), sum);
            }
            if (shared)
                sum = v_fma(v_set1(factor), n == 16 ? v_load(shared + j) : v_load_part(shared + j, n, 0.0f), sum);
            if (n == 16)
                v_store(x + j, v_add(v_load(x + j), sum));
            else
                v_store_part(x + j, n, v_add(v_load_part(x + j, n, 0.0f), sum));
        }
    }
}

void LR_ISA(lr_moe_combine)(const struct lr_exec *exec, const struct lr_moe_combine_args *args)
{
    lr_run_rows(exec, args->n_rows, args->d * (args->top_k + 2), combine_rows, args);
}
