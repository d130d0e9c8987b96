/* Block summaries, block selection, Quest's page bounds. */
#include "tests/kernels/kv.h"

/* ---- summaries ---- */

struct summary_context {
    struct lr_block_summary_args args;
    int parts; /* bit 0: mean, 1: min, 2: max wanted */
};

/* out: mean, min, max [n_blocks, n_kv_heads, head_dim] of the whole case; `rows` are blocks */
static void run_summary(const struct lr_kernel_ops *ops,
                        const struct lr_exec *exec,
                        const void *context,
                        int64_t first,
                        int64_t n,
                        char *out)
{
    const struct summary_context *c = context;
    struct lr_block_summary_args args = c->args;
    int64_t block = args.shape.n_kv_heads * args.shape.head_dim, total = args.n_blocks * block;
    float *at = (float *)out + first * block;
    args.blocks += first;
    args.n_blocks = n;
    args.mean = c->parts & 1 ? at : NULL;
    args.min = c->parts & 2 ? at + total : NULL;
    args.max = c->parts & 4 ? at + 2 * total : NULL;
    ops->block_summary(exec, &args);
}

static void check_summary(struct lr_kv_shape shape, int64_t n_tokens, uint64_t seed)
{
    struct kv kv = take_kv(shape, n_tokens, 1.0f, &seed);
    if (kv.n_blocks > 2) {
        kv.refs[0].n_keys = 50; /* fewer than the block holds */
        kv.refs[1].n_keys = 1;
    }
    int64_t total = kv.n_blocks * shape.n_kv_heads * shape.head_dim;
    float *before = take_floats(3 * total, 1.0f, &seed);
    double *truth = take_doubles(3 * total);
    struct summary_context c = {{.shape = shape, .blocks = kv.refs, .n_blocks = kv.n_blocks}, 7};
    lr_ref_block_summary(&c.args, truth, truth + total, truth + 2 * total);
    for (c.parts = 0; c.parts < 8; c.parts++) {
        float *out =
            (float *)run_everywhere(run_summary, &c, kv.n_blocks, ROWS, before, (size_t)(3 * total) * sizeof *out);
        for (int part = 0; part < 3; part++)
            if (c.parts >> part & 1)
                check_close(out + part * total, total, truth + part * total, 1, total, 0.0, part == 0 ? 3e-7 : 0.0);
            else
                assert_memory_equal(out + part * total, before + part * total, (size_t)total * sizeof *out);
        free(out);
    }
    free_kv(&kv);
    free(before);
    free(truth);
}

static void test_block_summary(void **state)
{
    (void)state;
    uint64_t seed = 1;
    for (enum lr_dtype dtype = LR_F32; dtype <= LR_BF16; dtype++) {
        static const int64_t lengths[] = {1, 15, 16, 17, 128, 200, 500};
        for (int64_t i = 0; i < COUNT(lengths); i++) {
            check_summary((struct lr_kv_shape){2, 2, 24, dtype}, lengths[i], seed++);
            check_summary((struct lr_kv_shape){4, 1, 40, dtype}, lengths[i], seed++);
        }
        check_summary((struct lr_kv_shape){3, 3, 128, dtype}, 700, seed++);
    }
}

/* ---- selection ---- */

/* `rows` are query blocks of 128 queries */
static void run_select(const struct lr_kernel_ops *ops,
                       const struct lr_exec *exec,
                       const void *context,
                       int64_t first,
                       int64_t n,
                       char *out)
{
    struct lr_block_select_args args = *(const struct lr_block_select_args *)context;
    int64_t left = args.n_rows - first * BLOCK;
    args.q = (const float *)args.q + first * BLOCK * args.q_stride;
    args.n_rows = n * BLOCK < left ? n * BLOCK : left;
    args.position += first * BLOCK;
    args.chosen = (int32_t *)out + first * args.shape.n_kv_heads * args.top_k;
    ops->block_select(exec, &args);
}

struct select_case {
    struct lr_kv_shape shape;
    int64_t n_rows, position, window, sinks, n_blocks, top_k;
};

/* Whole numbers make float32 exact: then ties are ties, and the choice is the truth's to the last block. */
static void round_all(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = rintf(x[i]);
}

/* Every block above the worst chosen one by more than float32's error is chosen, and the row is ascending, padded with
 * -1, and holds as many blocks as there are. */
static void check_choice(const double *scores, const int32_t *chosen, int64_t n_blocks, int64_t top_k)
{
    int64_t n = 0, n_candidates = 0;
    double worst = (double)INFINITY;
    for (int64_t c = 0; c < n_blocks; c++)
        n_candidates += !isinf(scores[c]);
    while (n < top_k && chosen[n] >= 0) {
        assert_true(chosen[n] < n_blocks && (n == 0 || chosen[n] > chosen[n - 1]));
        assert_false(isinf(scores[chosen[n]]));
        worst = fmin(worst, scores[chosen[n++]]);
    }
    assert_int_equal(n, top_k < n_candidates ? top_k : n_candidates);
    for (int64_t k = n; k < top_k; k++)
        assert_int_equal(chosen[k], -1);
    for (int64_t c = 0; c < n_blocks; c++) {
        int taken = 0;
        for (int64_t k = 0; k < n; k++)
            taken |= chosen[k] == c;
        assert_true(taken || scores[c] <= worst + 1e-6);
    }
}

static void check_select(const struct select_case *c, int whole_numbers, uint64_t seed)
{
    struct lr_kv_shape s = c->shape;
    int64_t head_stride = s.head_dim + 2, q_stride = s.n_heads * head_stride + 1;
    int64_t n_means = c->n_blocks * s.n_kv_heads * s.head_dim, n_query_blocks = (c->n_rows + BLOCK - 1) / BLOCK;
    int64_t n_lists = n_query_blocks * s.n_kv_heads, n_chosen = n_lists * c->top_k;
    float *q = take_floats(c->n_rows * q_stride - 3, whole_numbers ? 1.2f : 1.0f, &seed);
    float *means = take_floats(n_means, whole_numbers ? 1.2f : 1.0f, &seed);
    if (whole_numbers) {
        round_all(q, c->n_rows * q_stride - 3);
        round_all(means, n_means);
    }
    int32_t *before = take((size_t)n_chosen * sizeof *before), *want = take((size_t)n_chosen * sizeof *want);
    memset(before, 0x77, (size_t)n_chosen * sizeof *before);
    double *scores = take_doubles(n_lists * c->n_blocks);
    struct lr_block_select_args args = {.shape = s,
                                        .q = q,
                                        .q_stride = q_stride,
                                        .q_head_stride = head_stride,
                                        .n_rows = c->n_rows,
                                        .position = c->position,
                                        .window = c->window,
                                        .sinks = c->sinks,
                                        .block_means = means,
                                        .n_blocks = c->n_blocks,
                                        .top_k = c->top_k};
    lr_ref_block_select(&args, scores, want);
    int32_t *out =
        (int32_t *)run_everywhere(run_select, &args, n_query_blocks, ROWS, before, (size_t)n_chosen * sizeof *out);
    for (int64_t i = 0; i < n_lists; i++)
        check_choice(scores + i * c->n_blocks, out + i * c->top_k, c->n_blocks, c->top_k);
    for (int64_t i = 0; whole_numbers && i < n_chosen; i++)
        assert_int_equal(out[i], want[i]);
    free(q);
    free(means);
    free(before);
    free(want);
    free(scores);
    free(out);
}

static void test_block_select(void **state)
{
    (void)state;
    static const struct select_case cases[] = {
        {{4, 2, 24, LR_F32}, 200, 128 * 20, 0, 0, 25, 4},
        {{4, 2, 40, LR_F32}, 1, 128 * 20, 100, 4, 21, 8},
        {{2, 1, 16, LR_F32}, 128, 128 * 50, 128, 128, 50, 1},
        {{8, 2, 7, LR_F32}, 500, 128 * 40, 1000, 129, 40, 16},
        {{3, 3, 24, LR_F32}, 300, 0, 0, 0, 3, 4},        /* the first block has no candidates, the next ones few */
        {{2, 2, 24, LR_F32}, 129, 256, 4096, 0, 4, 3},   /* the window covers everything */
        {{2, 2, 24, LR_F32}, 130, 128 * 9, 1, 0, 5, 64}, /* fewer summaries than blocks; more wanted than there are */
        {{1, 1, 1, LR_F32}, 13, 128 * 300, 0, 5000, 300, 200},
        {{16, 2, 8, LR_F32}, 97, 128 * 12, 127, 127, 12, 5},
    };
    uint64_t seed = 100;
    for (int64_t i = 0; i < COUNT(cases); i++)
        for (int whole_numbers = 0; whole_numbers < 2; whole_numbers++)
            check_select(&cases[i], whole_numbers, seed++);
}

static void test_select_all_equal(void **state)
{
    (void)state;
    enum { BLOCKS = 40, K = 7 };
    float q[8] = {0}, means[BLOCKS * 8];
    int32_t chosen[K];
    for (int64_t i = 0; i < COUNT(means); i++)
        means[i] = (float)i;
    struct lr_block_select_args args = {.shape = {1, 1, 8, LR_F32},
                                        .q = q,
                                        .q_stride = 8,
                                        .q_head_stride = 8,
                                        .n_rows = 1,
                                        .position = 128 * BLOCKS,
                                        .sinks = 300,
                                        .block_means = means,
                                        .n_blocks = BLOCKS,
                                        .top_k = K,
                                        .chosen = chosen};
    for (int t = 0; t < machine.n_tables; t++) {
        machine.tables[t]->block_select(&machine.execs[0], &args);
        for (int32_t k = 0; k < K; k++)
            assert_int_equal(chosen[k], 3 + k); /* the lowest blocks wholly behind 300 sinks */
    }
}

/* ---- page bounds ---- */

static void run_bounds(const struct lr_kernel_ops *ops,
                       const struct lr_exec *exec,
                       const void *context,
                       int64_t first,
                       int64_t n,
                       char *out)
{
    struct lr_page_bounds_args args = *(const struct lr_page_bounds_args *)context;
    args.q = (const float *)args.q + first * args.q_stride;
    args.bounds = (float *)out + first * args.shape.n_kv_heads * args.n_pages;
    args.n_rows = n;
    ops->page_bounds(exec, &args);
}

static void check_bounds(struct lr_kv_shape s, int64_t n_rows, int64_t n_pages, uint64_t seed)
{
    int64_t head_stride = s.head_dim + 3, q_stride = s.n_heads * head_stride + 2;
    int64_t n_summary = n_pages * s.n_kv_heads * s.head_dim, n_bounds = n_rows * s.n_kv_heads * n_pages;
    float *q = take_floats(n_rows * q_stride - 5, 1.0f, &seed), *before = take_floats(n_bounds, 1.0f, &seed);
    float *min = take_floats(n_summary, 1.0f, &seed), *max = take_floats(n_summary, 1.0f, &seed);
    for (int64_t i = 0; i < n_summary; i++)
        max[i] = min[i] + fabsf(max[i]);
    double *truth = take_doubles(n_bounds);
    struct lr_page_bounds_args args = {.shape = s,
                                       .q = q,
                                       .q_stride = q_stride,
                                       .q_head_stride = head_stride,
                                       .n_rows = n_rows,
                                       .min = min,
                                       .max = max,
                                       .n_pages = n_pages};
    lr_ref_page_bounds(&args, truth);
    float *out = (float *)run_everywhere(run_bounds, &args, n_rows, ROWS, before, (size_t)n_bounds * sizeof *out);
    check_close(out, n_pages, truth, n_rows * s.n_kv_heads, n_pages, 2e-7, 0x1p-24 * (4.0 + (double)s.head_dim / 8.0));
    free(q);
    free(before);
    free(min);
    free(max);
    free(truth);
    free(out);
}

static void test_page_bounds(void **state)
{
    (void)state;
    static const int64_t rows[] = {1, 13, 97}, pages[] = {1, 5, 40};
    uint64_t seed = 300;
    for (int64_t i = 0; i < COUNT(rows); i++)
        for (int64_t j = 0; j < COUNT(pages); j++) {
            check_bounds((struct lr_kv_shape){4, 2, 24, LR_F32}, rows[i], pages[j], seed++);
            check_bounds((struct lr_kv_shape){3, 3, 40, LR_BF16}, rows[i], pages[j], seed++);
            check_bounds((struct lr_kv_shape){8, 1, 128, LR_F32}, rows[i], pages[j], seed++);
        }
    check_bounds((struct lr_kv_shape){1, 1, 1, LR_F32}, 2, 3, seed++);
}

/* What the bound is for: no key of a page scores above it. */
static void test_bounds_hold(void **state)
{
    (void)state;
    enum { PAGES = 4, DIM = 24, HEADS = 4, KV_HEADS = 2 };
    uint64_t seed = 400;
    struct lr_kv_shape s = {HEADS, KV_HEADS, DIM, LR_BF16};
    struct kv kv = take_kv(s, PAGES * BLOCK - 20, 1.0f, &seed);
    float min[PAGES * KV_HEADS * DIM], max[PAGES * KV_HEADS * DIM], bounds[KV_HEADS * PAGES];
    float *q = take_floats(HEADS * DIM, 1.0f, &seed);
    struct lr_block_summary_args summary = {.shape = s, .blocks = kv.refs, .n_blocks = PAGES, .min = min, .max = max};
    struct lr_page_bounds_args args = {.shape = s,
                                       .q = q,
                                       .q_stride = HEADS * DIM,
                                       .q_head_stride = DIM,
                                       .n_rows = 1,
                                       .min = min,
                                       .max = max,
                                       .n_pages = PAGES,
                                       .bounds = bounds};
    machine.tables[0]->block_summary(&machine.execs[0], &summary);
    machine.tables[0]->page_bounds(&machine.execs[0], &args);
    for (int64_t h = 0; h < HEADS; h++)
        for (int64_t page = 0; page < PAGES; page++)
            for (int64_t key = 0; key < kv.refs[page].n_keys; key++) {
                double score = 0.0;
                int64_t kv_head = h / (HEADS / KV_HEADS), at = kv_head * BLOCK * (DIM + 32) + key / 16 * DIM * 16;
                for (int64_t i = 0; i < DIM; i++)
                    score += (double)q[h * DIM + i] * lr_ref_load(kv.blocks[page], at + i * 16 + key % 16, s.dtype);
                assert_true(score <= (double)bounds[kv_head * PAGES + page] + 1e-6);
            }
    free(q);
    free_kv(&kv);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_block_summary),    cmocka_unit_test(test_block_select),
        cmocka_unit_test(test_select_all_equal), cmocka_unit_test(test_page_bounds),
        cmocka_unit_test(test_bounds_hold),
    };
    return cmocka_run_group_tests(tests, open_machine, close_machine);
}
