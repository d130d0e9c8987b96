/* KV blocks, softmax attention over them, finishing, and merging partials. */
#include "tests/kernels/kv.h"

/* ---- storing ---- */

struct store_context {
    struct lr_kv_store_args args;
    size_t block_bytes;
};

/* out: the blocks that the rows fall into, one after the other */
static void run_store(const struct lr_kernel_ops *ops,
                      const struct lr_exec *exec,
                      const void *context,
                      int64_t first,
                      int64_t n,
                      char *out)
{
    const struct store_context *c = context;
    struct lr_kv_store_args args = c->args;
    void *blocks[MAX_BLOCKS];
    int64_t position = args.position + first, skipped = position / BLOCK - args.position / BLOCK;
    for (int64_t i = 0; i < MAX_BLOCKS; i++)
        blocks[i] = out + (size_t)(skipped + i) * c->block_bytes;
    args.k = (const float *)args.k + first * args.k_stride;
    args.v = (const float *)args.v + first * args.v_stride;
    args.n_rows = n;
    args.position = position;
    args.blocks = blocks;
    ops->kv_store(exec, &args);
}

/* float32 to bf16 by the neighbours' distance: the nearest, of two equally near the even one */
static float nearest_bf16(float x)
{
    uint32_t bits, above;
    memcpy(&bits, &x, 4);
    bits &= 0xffff0000u;
    above = bits + 0x10000u;
    float low, high;
    memcpy(&low, &bits, 4);
    memcpy(&high, &above, 4);
    double to_low = fabs((double)x - (double)low), to_high = fabs((double)high - (double)x);
    return to_low < to_high || (to_low == to_high && !(bits & 0x10000u)) ? low : high;
}

/* Element (kv_head, token, i) of K, then of V, as kernels/ops.h places it. */
static int64_t place_key(struct lr_kv_shape s, int64_t kv_head, int64_t token, int64_t i)
{
    int64_t d16 = (s.head_dim + 15) / 16 * 16;
    return kv_head * BLOCK * (s.head_dim + d16) + ((token / 16) * s.head_dim + i) * 16 + token % 16;
}

static int64_t place_value(struct lr_kv_shape s, int64_t kv_head, int64_t token, int64_t i)
{
    int64_t d16 = (s.head_dim + 15) / 16 * 16;
    return kv_head * BLOCK * (s.head_dim + d16) + BLOCK * s.head_dim + token * d16 + i;
}

static void check_store(struct lr_kv_shape s, int64_t position, int64_t n_rows, uint64_t seed)
{
    int64_t width = s.n_kv_heads * s.head_dim, n_blocks = (position + n_rows - 1) / BLOCK - position / BLOCK + 1;
    struct store_context c = {.block_bytes = machine.tables[0]->kv_block_bytes(s)};
    float *k = take_floats((n_rows - 1) * (width + 2) + width, 1.0f, &seed);
    float *v = take_floats((n_rows - 1) * (width + 5) + width, 1e-3f, &seed);
    c.args = (struct lr_kv_store_args){.shape = s,
                                       .k = k,
                                       .k_stride = width + 2,
                                       .v = v,
                                       .v_stride = width + 5,
                                       .n_rows = n_rows,
                                       .position = position};
    size_t size = (size_t)n_blocks * c.block_bytes;
    char *zero = guarded(size), *out = run_everywhere(run_store, &c, n_rows, ROWS, zero, size), *want = zero;
    for (int64_t t = 0; t < n_rows; t++)
        for (int64_t h = 0; h < s.n_kv_heads; h++)
            for (int64_t i = 0; i < s.head_dim; i++) {
                int64_t p = position + t, token = p % BLOCK;
                char *block = want + (size_t)(p / BLOCK - position / BLOCK) * c.block_bytes;
                float x = k[t * (width + 2) + h * s.head_dim + i], y = v[t * (width + 5) + h * s.head_dim + i];
                int64_t x_at = place_key(s, h, token, i), y_at = place_value(s, h, token, i);
                if (s.dtype == LR_F32) {
                    ((float *)block)[x_at] = x;
                    ((float *)block)[y_at] = y;
                    continue;
                }
                x = nearest_bf16(x);
                y = nearest_bf16(y);
                memcpy(block + 2 * x_at, (char *)&x + 2, 2);
                memcpy(block + 2 * y_at, (char *)&y + 2, 2);
            }
    check_same(want, out, size, "all", "against the layout");
    free(k);
    free(v);
    free(want);
    free(out);
}

static void test_kv_store(void **state)
{
    (void)state;
    uint64_t seed = 1;
    for (enum lr_dtype dtype = LR_F32; dtype <= LR_BF16; dtype++) {
        static const int64_t positions[] = {0, 77, 128, 1000}, counts[] = {1, 13, 51, 200};
        for (int64_t i = 0; i < COUNT(positions); i++)
            for (int64_t j = 0; j < COUNT(counts); j++) {
                check_store((struct lr_kv_shape){4, 2, 24, dtype}, positions[i], counts[j], seed++);
                check_store((struct lr_kv_shape){1, 1, 40, dtype}, positions[i], counts[j], seed++);
            }
        check_store((struct lr_kv_shape){3, 3, 128, dtype}, 5, 97, seed++);
    }
}

static void test_bf16_rounding(void **state)
{
    (void)state;
    static const float values[] = {0.0f,          -0.0f,      1.0f,       0x1.01p0f, 0x1.03p0f,        0x1.010002p0f,
                                   0x1.00fffep0f, -0x1.01p0f, -0x1.03p0f, 0x1p-130f, 0x1.fffffep-120f, 1e-42f,
                                   3.3e38f,       INFINITY,   -INFINITY};
    struct lr_kv_shape s = {1, 1, COUNT(values), LR_BF16};
    for (int t = 0; t < machine.n_tables; t++) {
        const struct lr_kernel_ops *ops = machine.tables[t];
        uint16_t *block = take(ops->kv_block_bytes(s));
        void *blocks[1] = {block};
        memset(block, 0, ops->kv_block_bytes(s));
        float nan[COUNT(values)];
        uint32_t bits = 0x7f800001u; /* its payload lies in the half that is cut off */
        for (int64_t i = 0; i < COUNT(values); i++)
            memcpy(&nan[i], &bits, 4);
        struct lr_kv_store_args args = {.shape = s,
                                        .k = values,
                                        .k_stride = s.head_dim,
                                        .v = nan,
                                        .v_stride = s.head_dim,
                                        .n_rows = 1,
                                        .blocks = blocks};
        ops->kv_store(&machine.execs[0], &args);
        for (int64_t i = 0; i < s.head_dim; i++) {
            double got = lr_ref_load(block, place_key(s, 0, 0, i), LR_BF16);
            double want = isinf(values[i]) ? (double)values[i] : (double)nearest_bf16(values[i]);
            assert_true(got == want && signbit(got) == signbit(want));
            assert_true(isnan(lr_ref_load(block, place_value(s, 0, 0, i), LR_BF16)));
        }
        free(block);
    }
}

/* ---- attention ---- */

struct attention_case {
    struct lr_kv_shape shape;
    int64_t n_tokens; /* in the cache */
    int64_t n_rows;
    int64_t position; /* of row 0; rows are consecutive unless `scattered` */
    int64_t window, sinks;
    float sharpness; /* times 1 / sqrt(head_dim) */
    int per_block;   /* 1: a list for every query block and KV head, of random blocks, some of them `whole`; 2: of halves */
    int scattered;
};

struct attention_context {
    struct lr_attention_args args;
    int64_t cut; /* 0: one call; else the lists in two calls, cut behind this many blocks */
};

static int64_t count_blocks(const int64_t *positions, int64_t n)
{
    return positions[n - 1] / BLOCK - positions[0] / BLOCK + 1;
}

/* out: m, l [rows, heads], o [rows, heads, dim] of the whole case */
static void run_attention(const struct lr_kernel_ops *ops,
                          const struct lr_exec *exec,
                          const void *context,
                          int64_t first,
                          int64_t n,
                          char *out)
{
    const struct attention_context *c = context;
    struct lr_attention_args args = c->args;
    int64_t heads = args.shape.n_heads, total = args.n_rows * heads, skipped = 0;
    if (n == 0)
        return;
    args.q = (const float *)args.q + first * args.q_stride;
    args.positions += first;
    if (args.n_lists > 1) {
        skipped = args.positions[0] / BLOCK - c->args.positions[0] / BLOCK;
        args.n_lists = count_blocks(args.positions, n) * args.shape.n_kv_heads;
    }
    args.n_rows = n;
    args.m = (float *)out + first * heads;
    args.l = (float *)out + total + first * heads;
    args.o = (float *)out + 2 * total + first * heads * args.shape.head_dim;
    const struct lr_kv_list *lists = c->args.lists + skipped * args.shape.n_kv_heads;
    struct lr_kv_list *part = take((size_t)args.n_lists * sizeof *part);
    for (int half = 0; half < (c->cut ? 2 : 1); half++) {
        for (int64_t i = 0; i < args.n_lists; i++) {
            int64_t cut = c->cut < lists[i].n_refs ? c->cut : lists[i].n_refs;
            part[i] = lists[i];
            if (c->cut && half == 0)
                part[i].n_refs = cut;
            if (half == 1)
                part[i] = (struct lr_kv_list){lists[i].refs + cut, lists[i].n_refs - cut};
        }
        args.lists = part;
        ops->attention(exec, &args);
    }
    free(part);
}

/* Makes a ref one of a half of its block; 0 where that half has no keys yet. */
static int name_half(struct lr_kv_ref *ref, int64_t half)
{
    int32_t keys = ref->n_keys - (int32_t)half * (BLOCK / 2);
    ref->position += half * (BLOCK / 2);
    ref->n_keys = keys < BLOCK / 2 ? keys : BLOCK / 2;
    return keys > 0;
}

/* A list for each query block and KV head: some early blocks, most of them `whole`, and all from the window on; some
 * with fewer keys than are there. */
static struct lr_kv_list *
take_lists(const struct attention_case *c, const struct kv *kv, int64_t n_query_blocks, uint64_t *seed)
{
    int64_t n = n_query_blocks * c->shape.n_kv_heads;
    struct lr_kv_list *lists = take((size_t)n * sizeof *lists);
    for (int64_t i = 0; i < n; i++) {
        struct lr_kv_ref *refs = take((size_t)(2 * kv->n_blocks) * sizeof *refs);
        int64_t n_refs = 0, own = c->position / BLOCK + i / c->shape.n_kv_heads;
        for (int64_t at = 0; at < kv->n_blocks * c->per_block; at++) {
            int64_t b = at / c->per_block;
            int recent = b + 1 >= own;
            if (!recent && next_bits(seed) % 3 == 0)
                continue;
            refs[n_refs] = kv->refs[b];
            if (c->per_block == 2 && !name_half(&refs[n_refs], at % 2))
                continue;
            refs[n_refs].whole = !recent && next_bits(seed) % 4 != 0;
            if (next_bits(seed) % 4 == 0 && refs[n_refs].n_keys > 50)
                refs[n_refs].n_keys = 50;
            n_refs++;
        }
        lists[i] = (struct lr_kv_list){refs, n_refs};
    }
    return lists;
}

static void check_against_truth(const struct lr_attention_args *args, const float *out, float sharpness)
{
    int64_t d = args->shape.head_dim, total = args->n_rows * args->shape.n_heads;
    double *y = take_doubles(total * d), *lse = take_doubles(total);
    float *normalised = take((size_t)(total * d) * sizeof(float)), *lse_got = take((size_t)total * sizeof(float));
    const float *m = out, *l = out + total, *o = out + 2 * total;
    lr_ref_attention(args, y, lse);
    for (int64_t i = 0; i < total; i++) {
        lse_got[i] = l[i] > 0.0f ? (float)((double)m[i] + log((double)l[i])) : -INFINITY;
        if (l[i] == 0.0f)
            assert_true(m[i] == -INFINITY);
        for (int64_t j = 0; j < d; j++) {
            normalised[i * d + j] = l[i] > 0.0f ? o[i * d + j] / l[i] : 0.0f;
            if (l[i] == 0.0f)
                assert_true(o[i * d + j] == 0.0f);
        }
    }
    /* Scores are of size `sharpness` and off by some of their ulps; so are probabilities, whose sum weighs values
     * below 1. */
    double tolerance = 1e-6 + 5e-7 * (double)sharpness;
    check_close(normalised, d, y, total, d, 1e-6, tolerance);
    check_close(lse_got, 1, lse, total, 1, 2e-7, tolerance);
    free(y);
    free(lse);
    free(normalised);
    free(lse_got);
}

static void check_attention(const struct attention_case *c, uint64_t seed)
{
    struct kv kv = take_kv(c->shape, c->n_tokens, 1.0f, &seed);
    int64_t d = c->shape.head_dim, total = c->n_rows * c->shape.n_heads, head_stride = d + 3;
    int64_t q_stride = c->shape.n_heads * head_stride + 1;
    float *q = take_floats(c->n_rows * q_stride - 4, 1.0f, &seed);
    int64_t *positions = take((size_t)c->n_rows * sizeof *positions);
    for (int64_t t = 0; t < c->n_rows; t++)
        positions[t] = c->scattered ? (int64_t)(next_bits(&seed) % (uint64_t)c->n_tokens) : c->position + t;
    int64_t n_query_blocks = c->per_block ? count_blocks(positions, c->n_rows) : 0;
    struct lr_kv_list all = {kv.refs, kv.n_blocks},
                      *lists = c->per_block ? take_lists(c, &kv, n_query_blocks, &seed) : &all;
    struct attention_context context = {{.shape = c->shape,
                                         .q = q,
                                         .q_stride = q_stride,
                                         .q_head_stride = head_stride,
                                         .n_rows = c->n_rows,
                                         .positions = positions,
                                         .scale = c->sharpness / sqrtf((float)d),
                                         .window = c->window,
                                         .sinks = c->sinks,
                                         .lists = lists,
                                         .n_lists = c->per_block ? n_query_blocks * c->shape.n_kv_heads : 1,
                                         .half_blocks = c->per_block == 2},
                                        0};
    size_t size = (size_t)(total * (d + 2)) * sizeof(float);
    float *before = take(size);
    for (int64_t i = 0; i < total * (d + 2); i++)
        before[i] = i < total ? -INFINITY : 0.0f;
    char *out = run_everywhere(run_attention, &context, c->n_rows, ROWS, before, size);
    context.cut = 1 + (int64_t)(next_bits(&seed) % 3);
    char *folded = run_everywhere(run_attention, &context, c->n_rows, WHOLE, before, size);
    check_same(out, folded, size, "all", "in two folds");
    check_against_truth(&context.args, (float *)out, c->sharpness);
    for (int64_t i = 0; c->per_block && i < context.args.n_lists; i++)
        free((void *)(uintptr_t)lists[i].refs);
    if (c->per_block)
        free(lists);
    free_kv(&kv);
    free(q);
    free(positions);
    free(before);
    free(out);
    free(folded);
}

#define SHAPE(heads, kv_heads, dim, dtype)                                                                             \
    {                                                                                                                  \
        heads, kv_heads, dim, dtype                                                                                    \
    }

static void test_causal(void **state)
{
    (void)state;
    static const struct attention_case cases[] = {
        {SHAPE(1, 1, 16, LR_F32), 1, 1, 0, 0, 0, 1.0f, 0, 0},
        {SHAPE(1, 1, 1, LR_F32), 130, 130, 0, 0, 0, 1.0f, 0, 0},
        {SHAPE(4, 2, 24, LR_F32), 200, 200, 0, 0, 0, 1.0f, 0, 0},
        {SHAPE(4, 2, 40, LR_BF16), 277, 200, 77, 0, 0, 1.0f, 0, 0},
        {SHAPE(6, 2, 64, LR_F32), 397, 97, 300, 0, 0, 4.0f, 0, 0},
        {SHAPE(8, 1, 128, LR_BF16), 313, 13, 300, 0, 0, 1.0f, 0, 0},
        {SHAPE(2, 2, 256, LR_BF16), 141, 13, 128, 0, 0, 1.0f, 0, 0},
        {SHAPE(16, 2, 256, LR_F32), 1001, 1, 1000, 0, 0, 1.0f, 0, 0}, /* decoding */
        {SHAPE(3, 3, 24, LR_BF16), 129, 1, 128, 0, 0, 1.0f, 0, 0},
    };
    for (int64_t i = 0; i < COUNT(cases); i++)
        check_attention(&cases[i], 100 + (uint64_t)i);
}

static void test_windows(void **state)
{
    (void)state;
    static const int64_t windows[] = {1, 5, 100, 128, 129, 300}, sinks[] = {0, 1, 4, 128, 130};
    uint64_t seed = 200;
    for (int64_t i = 0; i < COUNT(windows); i++)
        for (int64_t j = 0; j < COUNT(sinks); j++) {
            struct attention_case c = {
                SHAPE(4, 2, 24, i % 2 ? LR_BF16 : LR_F32), 460, 60, 400, windows[i], sinks[j], 1.0f, 0, 0};
            check_attention(&c, seed++);
            c = (struct attention_case){SHAPE(2, 1, 40, LR_F32), 140, 140, 0, windows[i], sinks[j], 1.0f, 0, 0};
            check_attention(&c, seed++);
        }
}

/* Rows of forks and of other sequences' ends: any positions, in any order, over one list. */
static void test_scattered_positions(void **state)
{
    (void)state;
    static const struct attention_case cases[] = {
        {SHAPE(4, 2, 24, LR_F32), 500, 97, 0, 0, 0, 1.0f, 0, 1},
        {SHAPE(4, 2, 40, LR_BF16), 390, 13, 0, 60, 3, 1.0f, 0, 1},
        {SHAPE(8, 1, 64, LR_BF16), 260, 200, 0, 17, 0, 1.0f, 0, 1},
    };
    for (int64_t i = 0; i < COUNT(cases); i++)
        check_attention(&cases[i], 300 + (uint64_t)i);
}

static void test_lists_of_chosen_blocks(void **state)
{
    (void)state;
    static const struct attention_case cases[] = {
        {SHAPE(4, 2, 24, LR_F32), 977, 200, 777, 100, 4, 1.0f, 1, 0},
        {SHAPE(4, 2, 40, LR_BF16), 1024, 256, 768, 128, 0, 1.0f, 1, 0},
        {SHAPE(6, 3, 16, LR_F32), 717, 200, 517, 1, 1, 1.0f, 1, 0},
        {SHAPE(8, 1, 128, LR_BF16), 640, 97, 511, 200, 130, 1.0f, 1, 0},
        {SHAPE(2, 2, 256, LR_BF16), 900, 200, 700, 64, 0, 1.0f, 1, 0},
        {SHAPE(16, 2, 64, LR_F32), 500, 1, 499, 30, 4, 1.0f, 1, 0},
        {SHAPE(5, 1, 24, LR_F32), 400, 13, 380, 30, 4, 1.0f, 1, 0},
        {SHAPE(4, 4, 24, LR_F32), 600, 600, 0, 0, 0, 1.0f, 1, 0},
        {SHAPE(4, 2, 40, LR_F32), 977, 200, 777, 100, 4, 1.0f, 2, 0},
        {SHAPE(2, 1, 64, LR_BF16), 1000, 150, 850, 0, 0, 1.0f, 2, 0},
        {SHAPE(4, 2, 24, LR_BF16), 500, 500, 0, 70, 65, 1.0f, 2, 0},
    };
    for (int64_t i = 0; i < COUNT(cases); i++)
        check_attention(&cases[i], 400 + (uint64_t)i);
}

/* Scores of a hundred and more: a few keys take all the weight, the others underflow. */
static void test_sharp_scores(void **state)
{
    (void)state;
    static const struct attention_case cases[] = {
        {SHAPE(4, 2, 24, LR_F32), 500, 97, 403, 0, 0, 100.0f, 0, 0},
        {SHAPE(2, 1, 128, LR_BF16), 300, 13, 287, 0, 0, 300.0f, 0, 0},
        {SHAPE(2, 1, 40, LR_F32), 300, 13, 287, 0, 0, 0.0f, 0, 0}, /* all alike */
    };
    for (int64_t i = 0; i < COUNT(cases); i++)
        check_attention(&cases[i], 500 + (uint64_t)i);
}

/* The largest groups and heads that ops.h allows. */
static void test_largest_heads(void **state)
{
    (void)state;
    static const struct attention_case cases[] = {
        {SHAPE(LR_MAX_GROUP, 1, LR_MAX_HEAD_DIM, LR_BF16), 131, 3, 128, 0, 0, 1.0f, 0, 0},
        {SHAPE(LR_MAX_GROUP, 1, 264, LR_F32), 131, 3, 128, 0, 0, 1.0f, 0, 0},
        {SHAPE(LR_MAX_GROUP, 1, 512, LR_BF16), 260, 4, 254, 20, 2, 1.0f, 1, 0},
        {SHAPE(2 * LR_MAX_GROUP, 2, 16, LR_F32), 200, 13, 187, 0, 0, 1.0f, 0, 0},
        {SHAPE(3, 1, LR_MAX_HEAD_DIM, LR_F32), 200, 13, 187, 0, 0, 1.0f, 0, 0},
        {SHAPE(17, 1, 72, LR_F32), 200, 13, 187, 0, 0, 1.0f, 0, 0},
    };
    for (int64_t i = 0; i < COUNT(cases); i++)
        check_attention(&cases[i], 600 + (uint64_t)i);
}

/* Blocks that lie in the future, an empty list, keys out of the window's reach: nothing is seen. */
static void test_nothing_visible(void **state)
{
    (void)state;
    enum { HEADS = 4, DIM = 24, ROWS_HERE = 13 };
    uint64_t seed = 700;
    struct lr_kv_shape shape = {HEADS, 2, DIM, LR_F32};
    struct kv kv = take_kv(shape, 400, 1.0f, &seed);
    float *q = take_floats(ROWS_HERE * HEADS * DIM, 1.0f, &seed), before[ROWS_HERE * HEADS * (DIM + 2)];
    int64_t positions[ROWS_HERE];
    for (int64_t i = 0; i < COUNT(before); i++)
        before[i] = i < ROWS_HERE * HEADS ? -INFINITY : 0.0f;
    struct lr_kv_list lists[] = {{kv.refs + 1, 3}, {kv.refs, 0}, {kv.refs, 1}};
    static const int64_t first[] = {100, 0, 200}, windows[] = {0, 0, 10};
    for (int64_t i = 0; i < COUNT(lists); i++) {
        for (int64_t t = 0; t < ROWS_HERE; t++)
            positions[t] = first[i] + t;
        struct attention_context context = {{.shape = shape,
                                             .q = q,
                                             .q_stride = HEADS * DIM,
                                             .q_head_stride = DIM,
                                             .n_rows = ROWS_HERE,
                                             .positions = positions,
                                             .scale = 0.2f,
                                             .window = windows[i],
                                             .lists = &lists[i],
                                             .n_lists = 1},
                                            0};
        char *out = run_everywhere(run_attention, &context, ROWS_HERE, ROWS, before, sizeof before);
        check_same((char *)before, out, sizeof before, "all", "nothing visible");
        free(out);
    }
    free(q);
    free_kv(&kv);
}

/* ---- from the first fold to the finished rows ---- */

/* out: y [rows, stride], then m, l, o, whose contents before are not read. */
static void run_finished(const struct lr_kernel_ops *ops,
                         const struct lr_exec *exec,
                         const void *context,
                         int64_t first,
                         int64_t n,
                         char *out)
{
    struct lr_attention_args args = *(const struct lr_attention_args *)context;
    int64_t heads = args.shape.n_heads;
    args.q = (const float *)args.q + first * args.q_stride;
    args.positions += first;
    args.y = (float *)out + first * args.y_stride;
    float *state = take((size_t)(n * heads * (args.shape.head_dim + 2) + 1) * sizeof *state);
    memset(state, 0xff, (size_t)(n * heads * (args.shape.head_dim + 2)) * sizeof *state);
    args.m = state;
    args.l = state + n * heads;
    args.o = state + 2 * n * heads;
    args.n_rows = n;
    if (n > 0)
        ops->attention(exec, &args);
    free(state);
}

static void test_first_and_finish(void **state)
{
    (void)state;
    static const int64_t rows[] = {1, 13, 97, 200}, dims[] = {1, 16, 24, 40};
    uint64_t seed = 800;
    for (int64_t i = 0; i < COUNT(rows); i++)
        for (int64_t j = 0; j < COUNT(dims); j++) {
            int64_t d = dims[j], heads = 4, width = heads * d, stride = width + 3, n = rows[i];
            struct lr_kv_shape shape = {heads, 2, d, LR_F32};
            struct kv kv = take_kv(shape, 300, 1.0f, &seed);
            float *q = take_floats(n * width, 1.0f, &seed), *before = take_floats(n * stride, 1.0f, &seed);
            int64_t *positions = take((size_t)n * sizeof *positions);
            for (int64_t t = 0; t < n; t++)
                positions[t] = 100 + t;
            /* the first block is not listed: rows before token 128 see nothing */
            struct lr_kv_list list = {kv.refs + 1, kv.n_blocks - 1};
            struct lr_attention_args args = {.shape = shape,
                                             .q = q,
                                             .q_stride = width,
                                             .q_head_stride = d,
                                             .n_rows = n,
                                             .positions = positions,
                                             .scale = 0.5f,
                                             .lists = &list,
                                             .n_lists = 1,
                                             .first = 1,
                                             .y_stride = stride};
            double *truth = take_doubles(n * width), *lse = take_doubles(n * heads);
            lr_ref_attention(&args, truth, lse);
            char *out = run_everywhere(run_finished, &args, n, ROWS, before, (size_t)(n * stride) * sizeof *before);
            check_gaps(before, out, n, width, stride);
            check_close((float *)out, stride, truth, n, width, 1e-6, 3e-6);
            free(q);
            free(before);
            free(positions);
            free(truth);
            free(lse);
            free(out);
            free_kv(&kv);
        }
}

/* ---- partials of forks ---- */

enum { PARTIAL_ROWS = 5, PARTIAL_SLOTS = 4 };

static void run_partials(const struct lr_kernel_ops *ops,
                         const struct lr_exec *exec,
                         const void *context,
                         int64_t first,
                         int64_t n,
                         char *out)
{
    (void)first, (void)n;
    struct lr_partials_args args = *(const struct lr_partials_args *)context;
    args.m = (float *)out;
    args.l = args.m + args.n_slots * args.n_rows * args.shape.n_heads;
    args.o = args.l + args.n_slots * args.n_rows * args.shape.n_heads;
    ops->partials(exec, &args);
}

/* Every item is one attention call of its rows over its list; what no item names is empty, whatever was there. */
static void test_partials(void **state)
{
    (void)state;
    enum { HEADS = 4, DIM = 24, N = PARTIAL_SLOTS * PARTIAL_ROWS * HEADS };
    uint64_t seed = 970;
    struct lr_kv_shape shape = {HEADS, 2, DIM, LR_BF16};
    struct kv kv = take_kv(shape, 460, 1.0f, &seed);
    float *q = take_floats(PARTIAL_ROWS * HEADS * DIM, 1.0f, &seed);
    float *before = take_floats(N * (DIM + 2), 1.0f, &seed);
    static const int64_t positions[PARTIAL_ROWS] = {459, 200, 301, 302, 130};
    struct lr_kv_list first = {kv.refs, 2}, second = {kv.refs + 2, 2}, by_head[2] = {{kv.refs + 1, 1}, {kv.refs, 0}};
    const struct lr_partial_item items[] = {{0, 0, PARTIAL_ROWS, &first, 1},
                                            {2, 0, PARTIAL_ROWS, &second, 1},
                                            {3, 2, 2, &first, 1},
                                            {3, 4, 1, by_head, 2}};
    struct lr_partials_args args = {.shape = shape,
                                    .q = q,
                                    .q_stride = HEADS * DIM,
                                    .q_head_stride = DIM,
                                    .n_rows = PARTIAL_ROWS,
                                    .positions = positions,
                                    .scale = 0.2f,
                                    .items = items,
                                    .n_items = COUNT(items),
                                    .n_slots = PARTIAL_SLOTS};
    size_t bytes = N * (DIM + 2) * sizeof *before;
    char *out = run_everywhere(run_partials, &args, PARTIAL_ROWS, WHOLE, before, bytes);
    float *m = (float *)out, *l = m + N, *o = l + N;
    for (int64_t slot = 0; slot < PARTIAL_SLOTS; slot++)
        for (int64_t row = 0; row < PARTIAL_ROWS; row++) {
            const struct lr_partial_item *item = NULL;
            for (int64_t i = 0; i < COUNT(items); i++)
                if (items[i].slot == slot && row >= items[i].first_row && row < items[i].first_row + items[i].n_rows)
                    item = &items[i];
            int64_t at = (slot * PARTIAL_ROWS + row) * HEADS;
            float want[HEADS * (DIM + 2)];
            for (int64_t i = 0; i < HEADS * (DIM + 2); i++)
                want[i] = i < HEADS ? -INFINITY : 0.0f;
            struct lr_attention_args one = {.shape = shape,
                                            .q = q + row * HEADS * DIM,
                                            .q_stride = HEADS * DIM,
                                            .q_head_stride = DIM,
                                            .n_rows = 1,
                                            .positions = &positions[row],
                                            .scale = 0.2f,
                                            .lists = item ? item->lists : NULL,
                                            .n_lists = item ? item->n_lists : 0,
                                            .m = want,
                                            .l = want + HEADS,
                                            .o = want + 2 * HEADS};
            if (item)
                machine.tables[0]->attention(&machine.execs[0], &one);
            assert_memory_equal(m + at, want, HEADS * sizeof *want);
            assert_memory_equal(l + at, want + HEADS, HEADS * sizeof *want);
            assert_memory_equal(o + at * DIM, want + 2 * HEADS, HEADS * DIM * sizeof *want);
        }
    free(q);
    free(before);
    free(out);
    free_kv(&kv);
}

/* Rows stored one by one, out of order and with gaps, are the rows stored together. */
static void test_kv_store_rows(void **state)
{
    (void)state;
    enum { N = 200, SKIPPED = 77 };
    static const enum lr_dtype dtypes[] = {LR_F32, LR_BF16};
    uint64_t seed = 990;
    for (int64_t type = 0; type < COUNT(dtypes); type++) {
        struct lr_kv_shape shape = {4, 2, 24, dtypes[type]};
        int64_t width = shape.n_kv_heads * shape.head_dim;
        size_t block_bytes = machine.tables[0]->kv_block_bytes(shape);
        float *k = take_floats(N * width, 1.0f, &seed), *v = take_floats(N * width, 1.0f, &seed);
        char *want = take(2 * block_bytes), *got = take(2 * block_bytes);
        for (int t = 0; t < machine.n_tables; t++) {
            memset(want, 0, 2 * block_bytes);
            memset(got, 0, 2 * block_bytes);
            void *blocks[2] = {want, want + block_bytes}, *of_row[N];
            int64_t positions[N];
            struct lr_kv_store_args all = {.shape = shape, .k_stride = width, .v_stride = width, .blocks = blocks};
            for (int64_t part = 0; part < 2; part++) { /* all rows but SKIPPED */
                all.position = part ? SKIPPED + 1 : 0;
                all.n_rows = part ? N - SKIPPED - 1 : SKIPPED;
                all.k = k + all.position * width;
                all.v = v + all.position * width;
                machine.tables[t]->kv_store(&machine.execs[0], &all);
            }
            float *back_k = take(N * (size_t)width * sizeof *k), *back_v = take(N * (size_t)width * sizeof *v);
            for (int64_t i = 0; i < N; i++) { /* backwards */
                positions[i] = N - 1 - i;
                of_row[i] = positions[i] == SKIPPED ? NULL : got + (size_t)(positions[i] / BLOCK) * block_bytes;
                memcpy(back_k + i * width, k + positions[i] * width, (size_t)width * sizeof *k);
                memcpy(back_v + i * width, v + positions[i] * width, (size_t)width * sizeof *v);
            }
            struct lr_kv_store_rows_args rows = {.shape = shape,
                                                 .k = back_k,
                                                 .k_stride = width,
                                                 .v = back_v,
                                                 .v_stride = width,
                                                 .n_rows = N,
                                                 .positions = positions,
                                                 .blocks = of_row};
            machine.tables[t]->kv_store_rows(&machine.execs[1], &rows);
            assert_memory_equal(want, got, 2 * block_bytes);
            free(back_k);
            free(back_v);
        }
        free(k);
        free(v);
        free(want);
        free(got);
    }
}

/* ---- merge ---- */

enum { PARTIALS = 4 };

struct merge_context {
    struct lr_merge_args args;
    /* The partials of each of n_workers workers, in the order in which it has them. */
    int n_workers, count[PARTIALS], order[PARTIALS][PARTIALS];
};

/* The partials `order` of a case, side by side. */
static struct lr_merge_args take_partials(const struct lr_merge_args *all, const int *order, int count)
{
    size_t n = (size_t)(all->n_rows * all->n_heads), d = (size_t)all->head_dim;
    float *m = take((size_t)count * n * sizeof *m), *l = take((size_t)count * n * sizeof *l);
    float *o = take((size_t)count * n * d * sizeof *o);
    for (size_t p = 0; p < (size_t)count; p++) {
        memcpy(m + p * n, all->m + (size_t)order[p] * n, n * sizeof *m);
        memcpy(l + p * n, all->l + (size_t)order[p] * n, n * sizeof *l);
        memcpy(o + p * n * d, all->o + (size_t)order[p] * n * d, n * d * sizeof *o);
    }
    struct lr_merge_args part = *all;
    part.n_partials = count;
    part.m = m;
    part.l = l;
    part.o = o;
    return part;
}

/* All three steps, with the exchange between workers; out: y */
static void run_merge(const struct lr_kernel_ops *ops,
                      const struct lr_exec *exec,
                      const void *context,
                      int64_t first,
                      int64_t n,
                      char *out)
{
    (void)first;
    (void)n;
    const struct merge_context *c = context;
    size_t rows = (size_t)(c->args.n_rows * c->args.n_heads), n_sums = rows * (size_t)(c->args.head_dim + 1);
    float *bound = take(2 * rows * sizeof *bound), *mine = (float *)guarded(2 * rows * sizeof *mine);
    int64_t *sums = take(n_sums * sizeof *sums), *my_sums = (int64_t *)guarded(n_sums * sizeof *my_sums);
    struct lr_merge_args workers[PARTIALS];
    for (int w = 0; w < c->n_workers; w++) {
        workers[w] = take_partials(&c->args, c->order[w], c->count[w]);
        workers[w].bound = mine;
        ops->merge_bounds(exec, &workers[w]);
        for (size_t i = 0; i < 2 * rows; i++)
            bound[i] = w == 0 || mine[i] > bound[i] ? mine[i] : bound[i];
    }
    for (int w = 0; w < c->n_workers; w++) {
        workers[w].bound = bound;
        workers[w].sums = my_sums;
        memset(my_sums, 0x5a, n_sums * sizeof *my_sums); /* overwritten, not added to */
        ops->merge_accumulate(exec, &workers[w]);
        for (size_t i = 0; i < n_sums; i++)
            sums[i] = w == 0 ? my_sums[i] : sums[i] + my_sums[i];
    }
    check_guard((char *)mine, 2 * rows * sizeof *mine);
    check_guard((char *)my_sums, n_sums * sizeof *my_sums);
    struct lr_merge_args last = c->args;
    last.sums = sums;
    last.bound = bound;
    last.y = out;
    ops->merge_finish(exec, &last);
    for (int w = 0; w < c->n_workers; w++) {
        free((void *)(uintptr_t)workers[w].m);
        free((void *)(uintptr_t)workers[w].l);
        free((void *)(uintptr_t)workers[w].o);
    }
    free(bound);
    free(mine);
    free(sums);
    free(my_sums);
}

/* Any order of the partials, and any distribution over workers, gives the same bytes. */
static void check_merge(int64_t rows, int64_t heads, int64_t d, float size, float spread, uint64_t seed)
{
    int64_t n = rows * heads, stride = heads * d + 3;
    float *m = take_floats(PARTIALS * n, spread, &seed), *l = take_floats(PARTIALS * n, 50.0f, &seed);
    float *o = take_floats(PARTIALS * n * d, size, &seed), *before = take_floats(rows * stride, 1.0f, &seed);
    double *truth = take_doubles(n * d);
    for (int64_t i = 0; i < PARTIALS * n; i++) {
        l[i] = fabsf(l[i]) + 1.0f;
        if (i % n == 0 || next_bits(&seed) % 5 == 0) { /* empty; the first row's head is empty everywhere */
            m[i] = -INFINITY;
            l[i] = 0.0f;
            memset(o + i * d, 0, (size_t)d * sizeof *o);
        }
    }
    struct lr_merge_args args = {.n_rows = rows,
                                 .n_heads = heads,
                                 .head_dim = d,
                                 .n_partials = PARTIALS,
                                 .n_partials_total = PARTIALS,
                                 .m = m,
                                 .l = l,
                                 .o = o,
                                 .y_stride = stride};
    const struct merge_context ways[] = {
        {args, 1, {4}, {{0, 1, 2, 3}}},
        {args, 1, {4}, {{2, 0, 3, 1}}},
        {args, 2, {1, 3}, {{3}, {1, 0, 2}}},
        {args, 4, {1, 1, 1, 1}, {{1}, {3}, {0}, {2}}},
        {args, 3, {2, 0, 2}, {{3, 0}, {0}, {2, 1}}}, /* a worker without keys */
    };
    char *want = NULL;
    size_t bytes = (size_t)(rows * stride) * sizeof *before;
    lr_ref_merge(&args, truth);
    for (int64_t i = 0; i < COUNT(ways); i++) {
        char *out = run_everywhere(run_merge, &ways[i], rows, WHOLE, before, bytes);
        if (want)
            check_same(want, out, bytes, "all", "another order of partials");
        free(want);
        want = out;
    }
    check_gaps(before, want, rows, heads * d, stride);
    /* weights are off by 2 ulp, each; sums of both signs may cancel, the size of o / l stays */
    check_close((float *)want, stride, truth, rows, heads * d, 3e-7, 4e-7 * (double)size);
    free(m);
    free(l);
    free(o);
    free(before);
    free(truth);
    free(want);
}

static void test_merge(void **state)
{
    (void)state;
    uint64_t seed = 900;
    static const int64_t rows[] = {1, 13, 97};
    for (int64_t i = 0; i < COUNT(rows); i++) {
        check_merge(rows[i], 2, 24, 50.0f, 5.0f, seed++);
        check_merge(rows[i], 3, 40, 50.0f, 200.0f, seed++); /* weights underflow */
        check_merge(rows[i], 1, 16, 1e-3f, 1.0f, seed++);
        check_merge(rows[i], 1, 256, 1e6f, 3.0f, seed++);
    }
}

/* Attention over parts of the cache, merged, is attention over all of it. */
static void test_merge_of_attention(void **state)
{
    (void)state;
    enum { N = 60, HEADS = 4, DIM = 24, TOTAL = N * HEADS };
    uint64_t seed = 950;
    struct lr_kv_shape shape = {HEADS, 2, DIM, LR_BF16};
    struct kv kv = take_kv(shape, 460, 1.0f, &seed);
    float *q = take_floats(TOTAL * DIM, 1.0f, &seed), *parts = take(PARTIALS * TOTAL * (DIM + 2) * sizeof *parts);
    float *m = parts, *l = m + PARTIALS * TOTAL, *o = l + PARTIALS * TOTAL, before[TOTAL * DIM] = {0};
    int64_t positions[N];
    for (int64_t t = 0; t < N; t++)
        positions[t] = 370 + t; /* the last block lies in the first rows' future */
    for (int64_t i = 0; i < PARTIALS * TOTAL * (DIM + 2); i++)
        parts[i] = i < PARTIALS * TOTAL ? -INFINITY : 0.0f;
    struct lr_kv_list all = {kv.refs, kv.n_blocks};
    struct lr_attention_args args = {.shape = shape,
                                     .q = q,
                                     .q_stride = HEADS * DIM,
                                     .q_head_stride = DIM,
                                     .n_rows = N,
                                     .positions = positions,
                                     .scale = 0.2f,
                                     .n_lists = 1};
    assert_int_equal(kv.n_blocks, PARTIALS);
    for (int64_t p = 0; p < PARTIALS; p++) {
        struct lr_kv_list one = {kv.refs + p, 1};
        args.lists = &one;
        args.m = m + p * TOTAL;
        args.l = l + p * TOTAL;
        args.o = o + p * TOTAL * DIM;
        machine.tables[0]->attention(&machine.execs[1], &args);
    }
    struct merge_context merge = {{.n_rows = N,
                                   .n_heads = HEADS,
                                   .head_dim = DIM,
                                   .n_partials = PARTIALS,
                                   .n_partials_total = PARTIALS,
                                   .m = m,
                                   .l = l,
                                   .o = o,
                                   .y_stride = HEADS * DIM},
                                  2,
                                  {1, 3},
                                  {{2}, {0, 3, 1}}};
    char *out = run_everywhere(run_merge, &merge, N, WHOLE, before, sizeof before);
    double *y = take_doubles(TOTAL * DIM), *lse = take_doubles(TOTAL);
    args.lists = &all;
    lr_ref_attention(&args, y, lse);
    check_close((float *)out, DIM, y, TOTAL, DIM, 1e-6, 1e-6);
    free(q);
    free(parts);
    free(out);
    free(y);
    free(lse);
    free_kv(&kv);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kv_store),
        cmocka_unit_test(test_bf16_rounding),
        cmocka_unit_test(test_causal),
        cmocka_unit_test(test_windows),
        cmocka_unit_test(test_scattered_positions),
        cmocka_unit_test(test_lists_of_chosen_blocks),
        cmocka_unit_test(test_sharp_scores),
        cmocka_unit_test(test_largest_heads),
        cmocka_unit_test(test_nothing_visible),
        cmocka_unit_test(test_first_and_finish),
        cmocka_unit_test(test_partials),
        cmocka_unit_test(test_kv_store_rows),
        cmocka_unit_test(test_merge),
        cmocka_unit_test(test_merge_of_attention),
    };
    return cmocka_run_group_tests(tests, open_machine, close_machine);
}
