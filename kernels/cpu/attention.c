/* Softmax attention over KV blocks of 128 tokens, with running maximum and sum (Milakov and Gimelshein 2018; tiled as
 * in FlashAttention, Dao et al. 2022).
 *
 * A task takes some query rows of one KV head - all its query heads, so that a block of K and V is read once for the
 * whole group - and walks its list of blocks:
 *
 *   scores [rows][128] = Q K^T       K lies in panels of 16 keys: the product's B operand as it is
 *   p = exp(scale scores - m')       masked keys get -inf and thereby p = 0
 *   o = o exp(m - m') + p V          V lies in rows of dv16: again a B operand
 *
 * A row's arithmetic does not depend on which rows share its tile: a block in which it sees nothing multiplies its sums
 * by one. */
#include "base/pool.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/math.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/tile.h"

enum { BLOCK = LR_KV_BLOCK_TOKENS, MAX_TILE_ROWS = 96 };
/* A tile is cut to what L2 holds; one token of the largest group must fit all the same. */
enum { TILE_FLOATS = MAX_TILE_ROWS * (2 * 256 + BLOCK), MEMORY_FLOATS = LR_MAX_GROUP * (2 * LR_MAX_HEAD_DIM + BLOCK) };
_Static_assert((int)LR_MAX_GROUP <= (int)MAX_TILE_ROWS && LR_MAX_HEAD_DIM % 16 == 0 && TILE_FLOATS <= MEMORY_FLOATS,
               "a token's query heads fit into a tile");

static int64_t round16(int64_t n)
{
    return (n + 15) / 16 * 16;
}

/* Elements of one KV head in a block; its V starts behind 128 keys. */
static int64_t head_elements(struct lr_kv_shape s)
{
    return BLOCK * (s.head_dim + round16(s.head_dim));
}

size_t LR_ISA(lr_kv_block_bytes)(struct lr_kv_shape shape)
{
    return (size_t)(shape.n_kv_heads * head_elements(shape)) * lr_dtype_bytes(shape.dtype);
}

/* float32 to bf16, nearest even; a NaN keeps its sign and becomes quiet */
static uint16_t to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* Keys and values of one token, all KV heads, to its place in `block`. */
static void store_token(struct lr_kv_shape shape, void *block, int64_t token, const float *k, const float *v)
{
    int64_t d = shape.head_dim, dv16 = round16(d);
    for (int64_t h = 0; h < shape.n_kv_heads; h++, k += d, v += d) {
        int64_t k_at = h * head_elements(shape) + token / 16 * d * 16 + token % 16;
        int64_t v_at = h * head_elements(shape) + BLOCK * d + token * dv16;
        for (int64_t i = 0; i < d; i++)
            if (shape.dtype == LR_F32) {
                ((float *)block)[k_at + i * 16] = k[i];
                ((float *)block)[v_at + i] = v[i];
            } else {
                ((uint16_t *)block)[k_at + i * 16] = to_bf16(k[i]);
                ((uint16_t *)block)[v_at + i] = to_bf16(v[i]);
            }
    }
}

static void kv_store(const void *args, int64_t first, int64_t last)
{
    const struct lr_kv_store_args *a = args;
    for (int64_t row = first; row < last; row++) {
        int64_t position = a->position + row;
        store_token(a->shape, a->blocks[position / BLOCK - a->position / BLOCK], position % BLOCK,
                    (const float *)a->k + row * a->k_stride, (const float *)a->v + row * a->v_stride);
    }
}

/* Rows per task are even shares of a panel's sixteen keys at least, so two tasks seldom write one line. */
void LR_ISA(lr_kv_store)(const struct lr_exec *exec, const struct lr_kv_store_args *args)
{
    lr_run_rows(exec, args->n_rows, 2 * args->shape.n_kv_heads * args->shape.head_dim, kv_store, args);
}

static void kv_store_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_kv_store_rows_args *a = args;
    for (int64_t row = first; row < last; row++)
        if (a->blocks[row])
            store_token(a->shape, a->blocks[row], a->positions[row] % BLOCK, (const float *)a->k + row * a->k_stride,
                        (const float *)a->v + row * a->v_stride);
}

void LR_ISA(lr_kv_store_rows)(const struct lr_exec *exec, const struct lr_kv_store_rows_args *args)
{
    lr_run_rows(exec, args->n_rows, 2 * args->shape.n_kv_heads * args->shape.head_dim, kv_store_rows, args);
}

/* A task's tile: `rows` = tokens x group query heads, token-major. */
struct attention_tile {
    float *q;      /* [rows][head_dim] */
    float *scores; /* [rows][128] */
    float *o;      /* [rows][dv16] */
    float m[MAX_TILE_ROWS], l[MAX_TILE_ROWS];
    int64_t positions[MAX_TILE_ROWS];
    int64_t rows, dv16;
};

static void
load_tile(const struct lr_attention_args *a, int64_t kv_head, int64_t first, int64_t tokens, struct attention_tile *t)
{
    int64_t group = a->shape.n_heads / a->shape.n_kv_heads, d = a->shape.head_dim;
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t g = 0; g < group; g++) {
            int64_t row = i * group + g, head = kv_head * group + g, at = (first + i) * a->shape.n_heads + head;
            memcpy(t->q + row * d, (const float *)a->q + (first + i) * a->q_stride + head * a->q_head_stride,
                   (size_t)d * sizeof *t->q);
            memset(t->o + row * t->dv16, 0, (size_t)t->dv16 * sizeof *t->o);
            t->m[row] = -INFINITY;
            t->l[row] = 0.0f;
            if (!a->first) {
                memcpy(t->o + row * t->dv16, a->o + at * d, (size_t)d * sizeof *t->o);
                t->m[row] = a->m[at];
                t->l[row] = a->l[at];
            }
            t->positions[row] = a->positions[first + i];
        }
}

static void store_tile(
    const struct lr_attention_args *a, int64_t kv_head, int64_t first, int64_t tokens, const struct attention_tile *t)
{
    int64_t group = a->shape.n_heads / a->shape.n_kv_heads, d = a->shape.head_dim;
    for (int64_t i = 0; i < tokens; i++)
        for (int64_t g = 0; g < group; g++) {
            int64_t row = i * group + g, head = kv_head * group + g, at = (first + i) * a->shape.n_heads + head;
            if (a->y) {
                float *y = (float *)a->y + (first + i) * a->y_stride + head * d;
                const float *o = t->o + row * t->dv16;
                for (int64_t j = 0; j < d; j++)
                    y[j] = t->l[row] > 0.0f ? o[j] / t->l[row] : 0.0f;
                continue;
            }
            memcpy(a->o + at * d, t->o + row * t->dv16, (size_t)d * sizeof *t->o);
            a->m[at] = t->m[row];
            a->l[at] = t->l[row];
        }
}

/* Keys of a ref that the query at `position` sees: [from, to) and those below `sinks`, numbered from its first. */
struct visible {
    int64_t from, to, sinks;
};

static int64_t clamp_key(int64_t key)
{
    return key < 0 ? 0 : key > BLOCK ? BLOCK : key;
}

static struct visible visible_keys(const struct lr_attention_args *a, const struct lr_kv_ref *ref, int64_t position)
{
    struct visible v = {0, clamp_key(position + 1 - ref->position), 0};
    if (v.to > ref->n_keys)
        v.to = ref->n_keys;
    if (a->window > 0 && !ref->whole) {
        v.from = clamp_key(position - a->window + 1 - ref->position);
        v.sinks = clamp_key(a->sinks - ref->position);
    }
    return v;
}

/* Scores of one row to probabilities, given what it sees; updates m, l and scales o. */
LR_INLINE void row_softmax(struct attention_tile *t, int64_t row, struct visible v, float scale, int64_t n_keys)
{
    static const float lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    float *s = t->scores + row * BLOCK;
    const lr_v16 unseen = v_set1(-INFINITY), factor = v_set1(scale);
    int all = v.from <= 0 && v.to >= round16(n_keys);
    int64_t panels = (n_keys + 15) / 16;
    lr_v16 largest = unseen;
    for (int64_t p = 0; p < panels; p++) {
        lr_v16 x = v_mul(v_load(s + p * 16), factor);
        if (!all) {
            lr_v16 key = v_add(v_load(lane), v_set1((float)(p * 16)));
            lr_v16 seen = v_select_lt(key, v_set1((float)v.from), unseen, x);
            seen = v_select_lt(key, v_set1((float)v.sinks), x, seen);
            x = v_select_lt(key, v_set1((float)v.to), seen, unseen);
        }
        v_store(s + p * 16, x);
        largest = v_max(x, largest);
    }
    float lanes[16], m = t->m[row];
    v_store(lanes, largest);
    for (int i = 0; i < 16; i++)
        m = lanes[i] > m ? lanes[i] : m;
    float base = m == -INFINITY ? 0.0f : m, alpha = t->m[row] == m ? 1.0f : exp_1(t->m[row] - base);
    lr_v16 sum = v_zero();
    for (int64_t p = 0; p < panels; p++) {
        lr_v16 e = v_exp(v_sub(v_load(s + p * 16), v_set1(base)));
        v_store(s + p * 16, e);
        sum = v_add(sum, e);
    }
    t->m[row] = m;
    t->l[row] = t->l[row] * alpha + v_sum(sum);
    if (alpha != 1.0f)
        for (int64_t i = 0; i < t->dv16; i += 16)
            v_store(t->o + row * t->dv16 + i, v_mul(v_load(t->o + row * t->dv16 + i), v_set1(alpha)));
}

static void
fold_block(const struct lr_attention_args *a, int64_t kv_head, const struct lr_kv_ref *ref, struct attention_tile *t)
{
    int64_t d = a->shape.head_dim, bytes = (int64_t)lr_dtype_bytes(a->shape.dtype);
    const char *k = (const char *)ref->data + kv_head * head_elements(a->shape) * bytes, *v = k + BLOCK * d * bytes;
    k += ref->position % BLOCK * d * bytes; /* half a block is four panels of keys */
    v += ref->position % BLOCK * t->dv16 * bytes;
    struct visible seen[MAX_TILE_ROWS];
    int any = 0;
    for (int64_t row = 0; row < t->rows; row++) {
        seen[row] = visible_keys(a, ref, t->positions[row]);
        any |= seen[row].to > 0 && (seen[row].from < seen[row].to || seen[row].sinks > 0);
    }
    if (!any)
        return;
    struct lr_tile scores = {.a = t->q,
                             .a_row = d,
                             .a_k = 1,
                             .b = k,
                             .b_panel = d * 16,
                             .b_k = 16,
                             .c = t->scores,
                             .c_row = BLOCK,
                             .c_panel = 16,
                             .k = d};
    LR_ISA(lr_tile_product)(&scores, t->rows, (ref->n_keys + 15) / 16, a->shape.dtype);
    for (int64_t row = 0; row < t->rows; row++)
        row_softmax(t, row, seen[row], a->scale, ref->n_keys);
    struct lr_tile out = {.a = t->scores,
                          .a_row = BLOCK,
                          .a_k = 1,
                          .b = v,
                          .b_panel = 16,
                          .b_k = t->dv16,
                          .c = t->o,
                          .c_row = t->dv16,
                          .c_panel = 16,
                          .k = ref->n_keys,
                          .load_c = 1};
    LR_ISA(lr_tile_product)(&out, t->rows, t->dv16 / 16, a->shape.dtype);
}

/* Query tokens are cut at the absolute grid of 128 and again every `tile_tokens`. */
struct attention_job {
    const struct lr_attention_args *args;
    int64_t tile_tokens, tiles_per_block, n_tiles;
};

static void attention_task(void *context, int64_t task, int thread)
{
    (void)thread;
    const struct attention_job *job = context;
    const struct lr_attention_args *a = job->args;
    struct lr_kv_shape s = a->shape;
    int64_t kv_head = task % s.n_kv_heads, tile = task / s.n_kv_heads, first, last;
    const struct lr_kv_list *list = a->lists;
    if (a->n_lists > 1) {
        int64_t block = tile / job->tiles_per_block, lead = a->positions[0] % BLOCK;
        int64_t start = block * BLOCK - lead, end = start + BLOCK;
        list += block * s.n_kv_heads + kv_head;
        first = start + tile % job->tiles_per_block * job->tile_tokens;
        last = first + job->tile_tokens < end ? first + job->tile_tokens : end;
        first = first > 0 ? first : 0;
    } else {
        first = tile * job->tile_tokens;
        last = first + job->tile_tokens;
    }
    last = last < a->n_rows ? last : a->n_rows;
    if (last <= first)
        return;
    float memory[MEMORY_FLOATS];
    struct attention_tile t = {.rows = (last - first) * (s.n_heads / s.n_kv_heads), .dv16 = round16(s.head_dim)};
    t.q = memory;
    t.scores = t.q + t.rows * s.head_dim;
    t.o = t.scores + t.rows * BLOCK;
    load_tile(a, kv_head, first, last - first, &t);
    for (int64_t i = 0; i < list->n_refs; i++)
        fold_block(a, kv_head, &list->refs[i], &t);
    store_tile(a, kv_head, first, last - first, &t);
}

void LR_ISA(lr_attention)(const struct lr_exec *exec, const struct lr_attention_args *args)
{
    struct lr_kv_shape s = args->shape;
    if (args->n_rows == 0)
        return;
    int64_t group = s.n_heads / s.n_kv_heads, max_rows = TILE_FLOATS / (s.head_dim + round16(s.head_dim) + BLOCK);
    max_rows = max_rows < MAX_TILE_ROWS ? max_rows : MAX_TILE_ROWS;
    struct attention_job job = {.args = args, .tile_tokens = max_rows > group ? max_rows / group : 1};
    if (args->n_lists > 1) {
        /* even tiles inside a query block: 128 = 3 x 48 would leave a thin one */
        job.tiles_per_block = (BLOCK + job.tile_tokens - 1) / job.tile_tokens;
        job.tile_tokens = (BLOCK + job.tiles_per_block - 1) / job.tiles_per_block;
        int64_t blocks = (args->positions[0] % BLOCK + args->n_rows + BLOCK - 1) / BLOCK;
        job.n_tiles = blocks * job.tiles_per_block;
    } else {
        int64_t tasks = 2 * lr_pool_threads(exec->pool) / s.n_kv_heads, share = (args->n_rows + tasks) / (tasks + 1);
        if (lr_pool_threads(exec->pool) > s.n_kv_heads && share < job.tile_tokens)
            job.tile_tokens = share > 0 ? share : 1;
        job.n_tiles = (args->n_rows + job.tile_tokens - 1) / job.tile_tokens;
    }
    lr_pool_run(exec->pool, job.n_tiles * s.n_kv_heads, attention_task, &job);
}

/* ---- partials of forks ---- */

static void empty_partials(const struct lr_partials_args *a)
{
    int64_t n = a->n_slots * a->n_rows * a->shape.n_heads;
    for (int64_t i = 0; i < n; i++)
        a->m[i] = -INFINITY;
    memset(a->l, 0, (size_t)n * sizeof *a->l);
    memset(a->o, 0, (size_t)(n * a->shape.head_dim) * sizeof *a->o);
}

void LR_ISA(lr_partials)(const struct lr_exec *exec, const struct lr_partials_args *args)
{
    empty_partials(args);
    for (int64_t i = 0; i < args->n_items; i++) {
        const struct lr_partial_item *item = &args->items[i];
        int64_t at = (item->slot * args->n_rows + item->first_row) * args->shape.n_heads;
        struct lr_attention_args fold = {.shape = args->shape,
                                         .q = (const float *)args->q + item->first_row * args->q_stride,
                                         .q_stride = args->q_stride,
                                         .q_head_stride = args->q_head_stride,
                                         .n_rows = 1,
                                         .positions = args->positions + item->first_row,
                                         .scale = args->scale,
                                         .lists = item->lists,
                                         .n_lists = item->n_lists,
                                         .first = 1,
                                         .m = args->m + at,
                                         .l = args->l + at,
                                         .o = args->o + at * args->shape.head_dim};
        if (item->n_lists == 1) {
            fold.n_rows = item->n_rows;
            LR_ISA(lr_attention)(exec, &fold);
            continue;
        }
        /* lists that differ by KV head go with a query block: one row at a time */
        for (int64_t row = 0; row < item->n_rows; row++) {
            LR_ISA(lr_attention)(exec, &fold);
            fold.q = (const float *)fold.q + args->q_stride;
            fold.positions++;
            fold.m += args->shape.n_heads;
            fold.l += args->shape.n_heads;
            fold.o += args->shape.n_heads * args->shape.head_dim;
        }
    }
}

/* ---- merging partials in an order-free way ---- */

static void bounds_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_merge_args *a = args;
    int64_t n = a->n_rows * a->n_heads, d = a->head_dim;
    for (int64_t i = first; i < last; i++) {
        float m = -INFINITY, bound = 0.0f;
        for (int64_t p = 0; p < a->n_partials; p++) {
            const float *o = a->o + (p * n + i) * d;
            m = a->m[p * n + i] > m ? a->m[p * n + i] : m;
            bound = a->l[p * n + i] > bound ? a->l[p * n + i] : bound;
            for (int64_t j = 0; j < d; j++) {
                float size = fabsf(o[j]);
                bound = size > bound ? size : bound;
            }
        }
        a->bound[2 * i] = m;
        a->bound[2 * i + 1] = bound;
    }
}

void LR_ISA(lr_merge_bounds)(const struct lr_exec *exec, const struct lr_merge_args *args)
{
    lr_run_rows(exec, args->n_rows * args->n_heads, args->head_dim * (args->n_partials + 1), bounds_rows, args);
}

static void accumulate_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_merge_args *a = args;
    int64_t n = a->n_rows * a->n_heads, d = a->head_dim;
    for (int64_t i = first; i < last; i++) {
        int64_t *sums = a->sums + i * (d + 1);
        memset(sums, 0, (size_t)(d + 1) * sizeof *sums);
        int exponent;
        frexp((double)a->bound[2 * i + 1] * (double)a->n_partials_total, &exponent);
        double scale = ldexp(1.0, 61 - exponent);
        for (int64_t p = 0; p < a->n_partials; p++) {
            float m = a->m[p * n + i];
            if (m == -INFINITY)
                continue;
            double factor = (double)exp_1(m - a->bound[2 * i]) * scale;
            const float *o = a->o + (p * n + i) * d;
            for (int64_t j = 0; j < d; j++)
                sums[j] += (int64_t)rint((double)o[j] * factor);
            sums[d] += (int64_t)rint((double)a->l[p * n + i] * factor);
        }
    }
}

void LR_ISA(lr_merge_accumulate)(const struct lr_exec *exec, const struct lr_merge_args *args)
{
    lr_run_rows(exec, args->n_rows * args->n_heads, args->head_dim * (args->n_partials + 1), accumulate_rows, args);
}

static void merge_finish_rows(const void *args, int64_t first, int64_t last)
{
    const struct lr_merge_args *a = args;
    int64_t d = a->head_dim;
    for (int64_t i = first; i < last; i++) {
        const int64_t *sums = a->sums + i * (d + 1);
        float *y = (float *)a->y + i / a->n_heads * a->y_stride + i % a->n_heads * d;
        for (int64_t j = 0; j < d; j++)
            y[j] = sums[d] != 0 ? (float)sums[j] / (float)sums[d] : 0.0f;
    }
}

void LR_ISA(lr_merge_finish)(const struct lr_exec *exec, const struct lr_merge_args *args)
{
    lr_run_rows(exec, args->n_rows * args->n_heads, args->head_dim, merge_finish_rows, args);
}
