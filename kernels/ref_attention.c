/* Float64 truth of attention over KV blocks, of merging, and of choosing blocks. */
#include "kernels/ref.h"

#include <math.h>

enum { BLOCK = LR_KV_BLOCK_TOKENS };

static int64_t head_elements(struct lr_kv_shape s)
{
    return BLOCK * (s.head_dim + (s.head_dim + 15) / 16 * 16);
}

/* Component i of the key, and of the value, of a block's token. */
static double key_at(struct lr_kv_shape s, const void *block, int64_t kv_head, int64_t token, int64_t i)
{
    int64_t at = kv_head * head_elements(s) + token / 16 * s.head_dim * 16 + i * 16 + token % 16;
    return lr_ref_load(block, at, s.dtype);
}

static double value_at(struct lr_kv_shape s, const void *block, int64_t kv_head, int64_t token, int64_t i)
{
    int64_t at = kv_head * head_elements(s) + BLOCK * s.head_dim + token * ((s.head_dim + 15) / 16 * 16) + i;
    return lr_ref_load(block, at, s.dtype);
}

static int is_visible(const struct lr_attention_args *args, const struct lr_kv_ref *ref, int64_t key, int64_t query)
{
    if (key > query)
        return 0;
    return args->window == 0 || query - key < args->window || key < args->sinks || ref->whole;
}

/* A query head, and the blocks that it reads. */
struct reader {
    const struct lr_attention_args *args;
    const float *q;
    int64_t position, kv_head;
    const struct lr_kv_list *list;
};

/* scale * (q . k) of the j-th key of `ref`, or -inf where it is not visible */
static double score(const struct reader *r, const struct lr_kv_ref *ref, int64_t j)
{
    if (!is_visible(r->args, ref, ref->position + j, r->position))
        return -(double)INFINITY;
    double sum = 0.0;
    for (int64_t i = 0; i < r->args->shape.head_dim; i++)
        sum += (double)r->q[i] * key_at(r->args->shape, ref->data, r->kv_head, ref->position % BLOCK + j, i);
    return (double)r->args->scale * sum;
}

/* y = sum_j p_j v_j; returns log sum_j exp(s_j). One pass: what was summed shrinks where a larger score comes. */
static double read_blocks(const struct reader *r, double *y)
{
    struct lr_kv_shape s = r->args->shape;
    double largest = -(double)INFINITY, sum = 0.0;
    for (int64_t i = 0; i < s.head_dim; i++)
        y[i] = 0.0;
    for (int64_t b = 0; b < r->list->n_refs; b++)
        for (int64_t j = 0; j < r->list->refs[b].n_keys; j++) {
            const struct lr_kv_ref *ref = &r->list->refs[b];
            double x = score(r, ref, j);
            if (x > largest) {
                double shrink = exp(largest - x);
                largest = x;
                sum *= shrink;
                for (int64_t i = 0; i < s.head_dim; i++)
                    y[i] *= shrink;
            }
            double p = isinf(x) ? 0.0 : exp(x - largest);
            sum += p;
            for (int64_t i = 0; p > 0.0 && i < s.head_dim; i++)
                y[i] += p * value_at(s, ref->data, r->kv_head, ref->position % BLOCK + j, i);
        }
    if (sum == 0.0)
        return largest;
    for (int64_t i = 0; i < s.head_dim; i++)
        y[i] /= sum; /* NaN where a score was */
    return largest + log(sum);
}

void lr_ref_attention(const struct lr_attention_args *args, double *y, double *lse)
{
    struct lr_kv_shape s = args->shape;
    for (int64_t t = 0; t < args->n_rows; t++)
        for (int64_t h = 0; h < s.n_heads; h++) {
            struct reader r = {.args = args,
                               .q = (const float *)args->q + t * args->q_stride + h * args->q_head_stride,
                               .position = args->positions[t],
                               .kv_head = h / (s.n_heads / s.n_kv_heads),
                               .list = args->lists};
            if (args->n_lists > 1)
                r.list += (r.position / BLOCK - args->positions[0] / BLOCK) * s.n_kv_heads + r.kv_head;
            lse[t * s.n_heads + h] = read_blocks(&r, y + (t * s.n_heads + h) * s.head_dim);
        }
}

void lr_ref_merge(const struct lr_merge_args *args, double *y)
{
    int64_t n = args->n_rows * args->n_heads, d = args->head_dim;
    for (int64_t i = 0; i < n; i++) {
        double largest = -(double)INFINITY, sum = 0.0;
        for (int64_t p = 0; p < args->n_partials; p++)
            largest = fmax(largest, (double)args->m[p * n + i]);
        for (int64_t j = 0; j < d; j++)
            y[i * d + j] = 0.0;
        for (int64_t p = 0; p < args->n_partials && !isinf(largest); p++) {
            double w = exp((double)args->m[p * n + i] - largest);
            sum += w * (double)args->l[p * n + i];
            for (int64_t j = 0; j < d; j++)
                y[i * d + j] += w * (double)args->o[(p * n + i) * d + j];
        }
        for (int64_t j = 0; j < d && sum > 0.0; j++)
            y[i * d + j] /= sum;
    }
}

void lr_ref_block_summary(const struct lr_block_summary_args *args, double *mean, double *min, double *max)
{
    struct lr_kv_shape s = args->shape;
    for (int64_t at = 0; at < args->n_blocks * s.n_kv_heads * s.head_dim; at++) {
        const struct lr_kv_ref *block = &args->blocks[at / s.head_dim / s.n_kv_heads];
        mean[at] = 0.0;
        min[at] = (double)INFINITY;
        max[at] = -(double)INFINITY;
        for (int64_t j = 0; j < block->n_keys; j++) {
            double x = key_at(s, block->data, at / s.head_dim % s.n_kv_heads, j, at % s.head_dim);
            mean[at] += x / (double)block->n_keys;
            min[at] = fmin(min[at], x);
            max[at] = fmax(max[at], x);
        }
    }
}

/* mean_q . mean_k of a query block, KV head and key block */
static double block_score(const struct lr_block_select_args *args, int64_t query_block, int64_t kv_head, int64_t block)
{
    struct lr_kv_shape s = args->shape;
    int64_t group = s.n_heads / s.n_kv_heads, first = query_block * BLOCK, n = args->n_rows - first;
    n = n < BLOCK ? n : BLOCK;
    double sum = 0.0;
    for (int64_t row = first; row < first + n; row++)
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
            for (int64_t i = 0; i < s.head_dim; i++)
                sum += (double)((const float *)args->q)[row * args->q_stride + h * args->q_head_stride + i] *
                       (double)args->block_means[(block * s.n_kv_heads + kv_head) * s.head_dim + i];
    return sum / (double)(n * group);
}

static int is_candidate(const struct lr_block_select_args *args, int64_t query_block, int64_t block)
{
    int64_t first_row = args->position + query_block * BLOCK;
    return block * BLOCK >= args->sinks && (block + 1) * BLOCK <= first_row - args->window;
}

/* Ascending blocks whose rank among the scores is below k; the rest of `chosen` is -1. */
static void choose(const double *scores, int64_t n, int64_t k, int32_t *chosen)
{
    int64_t taken = 0;
    for (int64_t c = 0; c < n; c++) {
        int64_t rank = 0;
        for (int64_t i = 0; i < n; i++)
            rank += scores[i] > scores[c] || (scores[i] == scores[c] && i < c);
        if (rank < k && !isinf(scores[c]))
            chosen[taken++] = (int32_t)c;
    }
    while (taken < k)
        chosen[taken++] = -1;
}

void lr_ref_block_select(const struct lr_block_select_args *args, double *scores, int32_t *chosen)
{
    int64_t n_heads = args->shape.n_kv_heads, n = (args->n_rows + BLOCK - 1) / BLOCK * n_heads;
    for (int64_t i = 0; i < n; i++) {
        double *row = scores + i * args->n_blocks;
        for (int64_t c = 0; c < args->n_blocks; c++)
            row[c] =
                is_candidate(args, i / n_heads, c) ? block_score(args, i / n_heads, i % n_heads, c) : -(double)INFINITY;
        choose(row, args->n_blocks, args->top_k, chosen + i * args->top_k);
    }
}

void lr_ref_page_bounds(const struct lr_page_bounds_args *args, double *bounds)
{
    struct lr_kv_shape s = args->shape;
    int64_t group = s.n_heads / s.n_kv_heads;
    for (int64_t at = 0; at < args->n_rows * s.n_kv_heads * args->n_pages; at++) {
        int64_t page = at % args->n_pages, kv_head = at / args->n_pages % s.n_kv_heads;
        int64_t row = at / args->n_pages / s.n_kv_heads, summary = (page * s.n_kv_heads + kv_head) * s.head_dim;
        bounds[at] = -(double)INFINITY;
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++) {
            const float *q = (const float *)args->q + row * args->q_stride + h * args->q_head_stride;
            double sum = 0.0;
            for (int64_t i = 0; i < s.head_dim; i++)
                sum +=
                    fmax((double)q[i] * (double)args->min[summary + i], (double)q[i] * (double)args->max[summary + i]);
            bounds[at] = fmax(bounds[at], sum);
        }
    }
}
