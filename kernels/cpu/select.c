/* Which KV blocks are worth reading: block summaries, top-k by mean keys, Quest's upper bounds. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/math.h"
#include "kernels/cpu/rows.h"

#include <stdlib.h>

enum { BLOCK = LR_KV_BLOCK_TOKENS };

static int64_t round16(int64_t n)
{
    return (n + 15) / 16 * 16;
}

LR_INLINE float fold_max(lr_v16 a)
{
    float x[16];
    v_store(x, a);
    for (int i = 1; i < 16; i++)
        x[0] = x[i] > x[0] ? x[i] : x[0];
    return x[0];
}

LR_INLINE float fold_min(lr_v16 a)
{
    float x[16];
    v_store(x, a);
    for (int i = 1; i < 16; i++)
        x[0] = x[i] < x[0] ? x[i] : x[0];
    return x[0];
}

/* Sixteen keys' channel, of which n exist; the others read `fill`. */
LR_INLINE lr_v16 load_keys(const void *k, int64_t at, int64_t n, float fill, enum lr_dtype dtype)
{
    lr_v16 x = dtype == LR_F32 ? v_load((const float *)k + at) : v_load_bf16((const uint16_t *)k + at);
    if (n >= 16)
        return x;
    float lanes[16];
    v_store(lanes, x);
    return v_load_part(lanes, n, fill);
}

static void summary_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_block_summary_args *a = args;
    struct lr_kv_shape s = a->shape;
    int64_t d = s.head_dim, head_elements = BLOCK * (d + round16(d));
    for (int64_t i = first; i < last; i++) {
        const struct lr_kv_ref *block = &a->blocks[i / s.n_kv_heads];
        int64_t start = i % s.n_kv_heads * head_elements;
        for (int64_t c = 0; c < d; c++) {
            lr_v16 sum = v_zero(), low = v_set1(INFINITY), high = v_set1(-INFINITY);
            for (int64_t p = 0; p * 16 < block->n_keys; p++) {
                int64_t at = start + (p * d + c) * 16, n = block->n_keys - p * 16;
                sum = v_add(sum, load_keys(block->data, at, n, 0.0f, s.dtype));
                low = v_min(load_keys(block->data, at, n, INFINITY, s.dtype), low);
                high = v_max(load_keys(block->data, at, n, -INFINITY, s.dtype), high);
            }
            if (a->mean)
                a->mean[i * d + c] = v_sum(sum) / (float)block->n_keys;
            if (a->min)
                a->min[i * d + c] = fold_min(low);
            if (a->max)
                a->max[i * d + c] = fold_max(high);
        }
    }
}

void LR_ISA(lr_block_summary)(const struct lr_exec *exec, const struct lr_block_summary_args *args)
{
    lr_run_rows(exec, args->n_blocks * args->shape.n_kv_heads, BLOCK * args->shape.head_dim, summary_rows, args);
}

/* The k best so far as a heap whose root is the worst: lower score, or the same and a higher block. */
struct best {
    float score[LR_MAX_TOP_K];
    int32_t block[LR_MAX_TOP_K];
    int64_t n;
};

static int is_worse(const struct best *h, int64_t i, int64_t j)
{
    return h->score[i] < h->score[j] || (h->score[i] == h->score[j] && h->block[i] > h->block[j]);
}

static void swap_best(struct best *h, int64_t i, int64_t j)
{
    float score = h->score[i];
    int32_t block = h->block[i];
    h->score[i] = h->score[j];
    h->block[i] = h->block[j];
    h->score[j] = score;
    h->block[j] = block;
}

static void sift_down(struct best *h, int64_t i)
{
    for (;;) {
        int64_t worst = i;
        for (int64_t child = 2 * i + 1; child <= 2 * i + 2 && child < h->n; child++)
            worst = is_worse(h, child, worst) ? child : worst;
        if (worst == i)
            return;
        swap_best(h, i, worst);
        i = worst;
    }
}

/* Blocks come in ascending order, so a newcomer with the root's score loses to it. */
static void offer(struct best *h, int64_t k, float score, int32_t block)
{
    if (h->n == k) {
        if (!(score > h->score[0]))
            return;
        h->score[0] = score;
        h->block[0] = block;
        sift_down(h, 0);
        return;
    }
    h->score[h->n] = score;
    h->block[h->n] = block;
    for (int64_t i = h->n++; i > 0 && is_worse(h, i, (i - 1) / 2); i = (i - 1) / 2)
        swap_best(h, i, (i - 1) / 2);
}

static int ascending(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* The sum over a query block's rows and the group's heads; a common factor does not change the choice. */
static void sum_queries(const struct lr_block_select_args *a, int64_t query_block, int64_t kv_head, float *sum)
{
    struct lr_kv_shape s = a->shape;
    int64_t group = s.n_heads / s.n_kv_heads, first = query_block * BLOCK;
    int64_t last = first + BLOCK < a->n_rows ? first + BLOCK : a->n_rows;
    memset(sum, 0, (size_t)s.head_dim * sizeof *sum);
    for (int64_t row = first; row < last; row++)
        for (int64_t g = 0; g < group; g++) {
            const float *q = (const float *)a->q + row * a->q_stride + (kv_head * group + g) * a->q_head_stride;
            for (int64_t i = 0; i < s.head_dim; i++)
                sum[i] += q[i];
        }
}

static float dot(const float *a, const float *b, int64_t n)
{
    lr_v16 sum = v_zero();
    for (int64_t i = 0; i < n; i += 16)
        sum = n - i >= 16 ? v_fma(v_load(a + i), v_load(b + i), sum)
                          : v_fma(v_load_part(a + i, n - i, 0.0f), v_load_part(b + i, n - i, 0.0f), sum);
    return v_sum(sum);
}

static void select_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_block_select_args *a = args;
    struct lr_kv_shape s = a->shape;
    float query[LR_MAX_HEAD_DIM];
    struct best best;
    for (int64_t i = first; i < last; i++) {
        int64_t query_block = i / s.n_kv_heads, kv_head = i % s.n_kv_heads;
        int64_t reach = (a->position / BLOCK + query_block) * BLOCK - a->window;
        sum_queries(a, query_block, kv_head, query);
        best.n = 0;
        for (int64_t c = (a->sinks + BLOCK - 1) / BLOCK; c < a->n_blocks && (c + 1) * BLOCK <= reach; c++)
            offer(&best, a->top_k, dot(query, a->block_means + (c * s.n_kv_heads + kv_head) * s.head_dim, s.head_dim),
                  (int32_t)c);
        qsort(best.block, (size_t)best.n, sizeof *best.block, ascending);
        int32_t *chosen = a->chosen + i * a->top_k;
        for (int64_t k = 0; k < a->top_k; k++)
            chosen[k] = k < best.n ? best.block[k] : -1;
    }
}

void LR_ISA(lr_block_select)(const struct lr_exec *exec, const struct lr_block_select_args *args)
{
    int64_t n_query_blocks = (args->n_rows + BLOCK - 1) / BLOCK;
    if (args->top_k > 0)
        lr_run_rows(exec, n_query_blocks * args->shape.n_kv_heads, 16384, select_rows, args);
}

static void page_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_page_bounds_args *a = args;
    struct lr_kv_shape s = a->shape;
    int64_t group = s.n_heads / s.n_kv_heads, d = s.head_dim;
    for (int64_t i = first; i < last; i++) {
        int64_t page = i % a->n_pages, kv_head = i / a->n_pages % s.n_kv_heads, row = i / a->n_pages / s.n_kv_heads;
        const float *low = a->min + (page * s.n_kv_heads + kv_head) * d;
        const float *high = a->max + (page * s.n_kv_heads + kv_head) * d;
        float bound = -INFINITY;
        for (int64_t g = 0; g < group; g++) {
            const float *q = (const float *)a->q + row * a->q_stride + (kv_head * group + g) * a->q_head_stride;
            lr_v16 sum = v_zero();
            for (int64_t j = 0; j < d; j += 16) {
                int64_t n = d - j;
                lr_v16 x = n >= 16 ? v_load(q + j) : v_load_part(q + j, n, 0.0f);
                lr_v16 lo = n >= 16 ? v_load(low + j) : v_load_part(low + j, n, 0.0f);
                lr_v16 hi = n >= 16 ? v_load(high + j) : v_load_part(high + j, n, 0.0f);
                sum = v_add(sum, v_max(v_mul(x, lo), v_mul(x, hi)));
            }
            float value = v_sum(sum);
            bound = value > bound ? value : bound;
        }
        a->bounds[i] = bound;
    }
}

void LR_ISA(lr_page_bounds)(const struct lr_exec *exec, const struct lr_page_bounds_args *args)
{
    int64_t group = args->shape.n_heads / args->shape.n_kv_heads;
    lr_run_rows(exec, args->n_rows * args->shape.n_kv_heads * args->n_pages, group * args->shape.head_dim, page_rows,
                args);
}
