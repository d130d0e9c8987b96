/* Embedding, norms, rotary, short convolution, gates, rotary tables. */
#include "tests/kernels/common.h"

static const int64_t row_counts[] = {1, 13, 97, 200};

/* ---- embed ---- */

struct embed_context {
    const void *table;
    enum lr_dtype dtype;
    int64_t d;
    const int32_t *ids;
};

static void run_embed(const struct lr_kernel_ops *ops,
                      const struct lr_exec *exec,
                      const void *context,
                      int64_t first,
                      int64_t n,
                      char *out)
{
    const struct embed_context *e = context;
    ops->embed(exec, e->table, e->dtype, e->d, e->ids + first, n, (float *)out + first * e->d);
}

static void test_embed(void **state)
{
    (void)state;
    enum { VOCAB = 50, N = 300 };
    static const int64_t widths[] = {1, 16, 24, 100};
    uint64_t seed = 1;
    for (int64_t i = 0; i < COUNT(widths); i++)
        for (enum lr_dtype dtype = LR_F32; dtype <= LR_F16; dtype++) {
            int64_t d = widths[i];
            void *table = take_matrix(VOCAB * d, dtype, &seed);
            int32_t ids[N];
            float *y = take_floats(N * d, 1.0f, &seed);
            double *truth = take_doubles(N * d);
            for (int64_t t = 0; t < N; t++) {
                ids[t] = t == 0 ? VOCAB - 1 : (int32_t)(next_bits(&seed) % VOCAB);
                for (int64_t j = 0; j < d; j++)
                    truth[t * d + j] = lr_ref_load(table, ids[t] * d + j, dtype);
            }
            struct embed_context context = {table, dtype, d, ids};
            char *out = run_everywhere(run_embed, &context, N, ROWS, y, (size_t)(N * d) * sizeof *y);
            check_close((float *)out, d, truth, N, d, 0.0, 0.0);
            free(table);
            free(y);
            free(truth);
            free(out);
        }
}

/* ---- norms ---- */

/* A sum of n squares in 16 lanes is off by about n / 16 + 4 half-ulps; then a few roundings more. */
static double norm_tolerance(int64_t n)
{
    return 0x1p-24 * ((double)n / 32.0 + 8.0);
}

static void run_rmsnorm(const struct lr_kernel_ops *ops,
                        const struct lr_exec *exec,
                        const void *context,
                        int64_t first,
                        int64_t n,
                        char *out)
{
    struct lr_rmsnorm_args args = *(const struct lr_rmsnorm_args *)context;
    args.y = (float *)out + first * args.y_stride;
    args.x = args.x ? (const float *)args.x + first * args.x_stride : args.y; /* none: in place */
    args.n_rows = n;
    ops->rmsnorm(exec, &args);
}

static void check_rmsnorm(int64_t rows, int64_t cols, int plus_one, int in_place, float size, uint64_t seed)
{
    int64_t stride = cols + 3;
    float *x = take_floats(rows * stride, size, &seed), *y = take_floats(rows * stride, 1.0f, &seed);
    float *w = take_floats(cols, 1.0f, &seed);
    double *truth = take_doubles(rows * cols);
    struct lr_rmsnorm_args args = {.x = x,
                                   .x_stride = stride,
                                   .w = w,
                                   .y_stride = stride,
                                   .n_rows = rows,
                                   .n_cols = cols,
                                   .eps = 1e-6f,
                                   .plus_one = plus_one};
    lr_ref_rmsnorm(&args, truth);
    const float *before = in_place ? x : y;
    args.x = in_place ? NULL : x;
    char *out = run_everywhere(run_rmsnorm, &args, rows, ROWS, before, (size_t)(rows * stride) * sizeof *x);
    check_gaps(before, out, rows, cols, stride);
    check_close((float *)out, stride, truth, rows, cols, norm_tolerance(cols), 0x1p-24);
    free(x);
    free(y);
    free(w);
    free(truth);
    free(out);
}

static void test_rmsnorm(void **state)
{
    (void)state;
    static const int64_t widths[] = {1, 16, 24, 40, 1000, 2048};
    uint64_t seed = 10;
    for (int64_t i = 0; i < COUNT(row_counts); i++)
        for (int64_t j = 0; j < COUNT(widths); j++)
            for (int mode = 0; mode < 4; mode++)
                check_rmsnorm(row_counts[i], widths[j], mode & 1, mode >> 1, 2.0f, seed++);
    check_rmsnorm(5, 40, 1, 0, 0.0f, 1);  /* zeros: eps alone */
    check_rmsnorm(5, 40, 1, 0, 1e-4f, 2); /* eps counts */
    check_rmsnorm(5, 40, 0, 0, 1e15f, 3);
}

static void run_gated_rmsnorm(const struct lr_kernel_ops *ops,
                              const struct lr_exec *exec,
                              const void *context,
                              int64_t first,
                              int64_t n,
                              char *out)
{
    struct lr_gated_rmsnorm_args args = *(const struct lr_gated_rmsnorm_args *)context;
    args.y = (float *)out + first * args.y_stride;
    args.x = args.x ? (const float *)args.x + first * args.x_stride : args.y;
    args.z = (const float *)args.z + first * args.z_stride;
    args.n_rows = n;
    ops->gated_rmsnorm(exec, &args);
}

static void test_gated_rmsnorm(void **state)
{
    (void)state;
    static const int64_t dims[] = {8, 24, 40, 128};
    uint64_t seed = 20;
    for (int64_t i = 0; i < COUNT(row_counts); i++)
        for (int64_t j = 0; j < COUNT(dims); j++)
            for (int in_place = 0; in_place < 2; in_place++) {
                int64_t rows = row_counts[i], heads = 3, width = heads * dims[j], stride = width + 5;
                float *x = take_floats(rows * stride, 2.0f, &seed), *y = take_floats(rows * stride, 1.0f, &seed);
                float *z = take_floats(rows * (width + 1), 30.0f, &seed), *w = take_floats(dims[j], 2.0f, &seed);
                double *truth = take_doubles(rows * width);
                struct lr_gated_rmsnorm_args args = {.x = x,
                                                     .x_stride = stride,
                                                     .z = z,
                                                     .z_stride = width + 1,
                                                     .w = w,
                                                     .y_stride = stride,
                                                     .n_rows = rows,
                                                     .n_heads = heads,
                                                     .head_dim = dims[j],
                                                     .eps = 1e-6f};
                lr_ref_gated_rmsnorm(&args, truth);
                const float *before = in_place ? x : y;
                args.x = in_place ? NULL : x;
                char *out =
                    run_everywhere(run_gated_rmsnorm, &args, rows, ROWS, before, (size_t)(rows * stride) * sizeof *x);
                check_gaps(before, out, rows, width, stride);
                check_close((float *)out, stride, truth, rows, width, norm_tolerance(dims[j]) + 3e-7, 1e-30);
                free(x);
                free(y);
                free(z);
                free(w);
                free(truth);
                free(out);
            }
}

static void run_norm_rope(const struct lr_kernel_ops *ops,
                          const struct lr_exec *exec,
                          const void *context,
                          int64_t first,
                          int64_t n,
                          char *out)
{
    struct lr_norm_rope_args args = *(const struct lr_norm_rope_args *)context;
    args.x = (float *)out + first * args.x_stride;
    args.cos += first * (args.rotary_dim / 2);
    args.sin += first * (args.rotary_dim / 2);
    args.n_rows = n;
    ops->norm_rope(exec, &args);
}

static void check_norm_rope(int64_t rows, int64_t heads, int64_t dim, int64_t rotary, int64_t gap, uint64_t seed)
{
    int64_t head_stride = dim + gap, stride = heads * head_stride + 2, half = rotary / 2;
    float *x = take_floats(rows * stride, 2.0f, &seed), *w = take_floats(dim, 0.5f, &seed);
    float *cosine = take_floats(rows * half, 1.0f, &seed), *sine = take_floats(rows * half, 1.0f, &seed);
    double *truth = take_doubles(rows * heads * dim);
    struct lr_norm_rope_args args = {.x = x,
                                     .x_stride = stride,
                                     .n_rows = rows,
                                     .n_heads = heads,
                                     .head_stride = head_stride,
                                     .head_dim = dim,
                                     .rotary_dim = rotary,
                                     .w = w,
                                     .cos = cosine,
                                     .sin = sine,
                                     .eps = 1e-6f};
    lr_ref_norm_rope(&args, truth);
    float *out = (float *)run_everywhere(run_norm_rope, &args, rows, ROWS, x, (size_t)(rows * stride) * sizeof *x);
    check_gaps(x, out, rows, heads * head_stride, stride);
    for (int64_t t = 0; t < rows; t++) {
        check_gaps(x + t * stride, out + t * stride, heads, dim, head_stride);
        /* x1 cos - x2 sin may cancel: the error is of the size of its terms, which are below 6 */
        check_close(out + t * stride, head_stride, truth + t * heads * dim, heads, dim, norm_tolerance(dim),
                    6.0 * norm_tolerance(dim));
    }
    free(x);
    free(w);
    free(cosine);
    free(sine);
    free(truth);
    free(out);
}

static void test_norm_rope(void **state)
{
    (void)state;
    uint64_t seed = 30;
    for (int64_t i = 0; i < COUNT(row_counts); i++) {
        check_norm_rope(row_counts[i], 3, 40, 24, 0, seed++);
        check_norm_rope(row_counts[i], 2, 24, 24, 24, seed++);
        check_norm_rope(row_counts[i], 1, 256, 64, 256, seed++);
        check_norm_rope(row_counts[i], 2, 128, 128, 1, seed++);
        check_norm_rope(row_counts[i], 5, 20, 2, 3, seed++);
        check_norm_rope(row_counts[i], 2, 24, 0, 0, seed++);
    }
}

static void run_l2norm(const struct lr_kernel_ops *ops,
                       const struct lr_exec *exec,
                       const void *context,
                       int64_t first,
                       int64_t n,
                       char *out)
{
    struct lr_l2norm_args args = *(const struct lr_l2norm_args *)context;
    args.x = (float *)out + first * args.x_stride;
    args.n_rows = n;
    ops->l2norm(exec, &args);
}

static void test_l2norm(void **state)
{
    (void)state;
    static const int64_t dims[] = {1, 16, 24, 40, 128};
    uint64_t seed = 40;
    for (int64_t i = 0; i < COUNT(row_counts); i++)
        for (int64_t j = 0; j < COUNT(dims); j++) {
            int64_t rows = row_counts[i], heads = 3, width = heads * dims[j], stride = width + 7;
            float *x = take_floats(rows * stride, j % 2 ? 1.0f : 1e-3f, &seed);
            double *truth = take_doubles(rows * width);
            struct lr_l2norm_args args = {.x = x,
                                          .x_stride = stride,
                                          .n_rows = rows,
                                          .n_heads = heads,
                                          .head_dim = dims[j],
                                          .eps = 1e-6f,
                                          .scale = 0.125f};
            lr_ref_l2norm(&args, truth);
            char *out = run_everywhere(run_l2norm, &args, rows, ROWS, x, (size_t)(rows * stride) * sizeof *x);
            check_gaps(x, out, rows, width, stride);
            check_close((float *)out, stride, truth, rows, width, norm_tolerance(dims[j]), 0.0);
            free(x);
            free(truth);
            free(out);
        }
}

/* ---- convolution ---- */

struct conv_context {
    struct lr_conv_args args;
    const float *history; /* tail and x in one: [n_taps - 1 + n_rows, n_channels] */
};

/* A row's tail is the rows before it, wherever the batch begins. */
static void run_conv(const struct lr_kernel_ops *ops,
                     const struct lr_exec *exec,
                     const void *context,
                     int64_t first,
                     int64_t n,
                     char *out)
{
    const struct conv_context *c = context;
    struct lr_conv_args args = c->args;
    args.tail = c->history + first * args.n_channels;
    args.x = (const float *)args.x + first * args.x_stride;
    args.y = (float *)out + first * args.y_stride;
    args.n_rows = n;
    ops->conv(exec, &args);
}

static void check_conv(int64_t rows, int64_t channels, int64_t taps, enum lr_activation activation, uint64_t seed)
{
    int64_t x_stride = channels + 4, y_stride = channels + 1;
    float *history = take_floats((taps - 1 + rows) * channels, 1.0f, &seed);
    float *x = take_floats((rows - 1) * x_stride + channels, 1.0f, &seed);
    float *w = take_floats(channels * taps, 1.0f, &seed), *y = take_floats(rows * y_stride, 1.0f, &seed);
    for (int64_t t = 0; t < rows; t++)
        memcpy(x + t * x_stride, history + (taps - 1 + t) * channels, (size_t)channels * sizeof *x);
    double *truth = take_doubles(rows * channels);
    struct conv_context context = {{.x = x,
                                    .x_stride = x_stride,
                                    .w = w,
                                    .tail = history,
                                    .y_stride = y_stride,
                                    .n_rows = rows,
                                    .n_channels = channels,
                                    .n_taps = taps,
                                    .activation = activation},
                                   history};
    lr_ref_conv(&context.args, truth);
    char *out = run_everywhere(run_conv, &context, rows, ROWS, y, (size_t)(rows * y_stride) * sizeof *y);
    check_gaps(y, out, rows, channels, y_stride);
    check_close((float *)out, y_stride, truth, rows, channels, 4e-7, 1e-7 * (double)taps);
    free(history);
    free(x);
    free(w);
    free(y);
    free(truth);
    free(out);
}

/* Token by token, several sequences side by side: the bytes of the convolution over each of them. */
static void check_conv_step(int64_t channels, int64_t taps, uint64_t seed)
{
    enum { SEQUENCES = 3, TOKENS = 6 };
    int64_t tail = (taps - 1) * channels, n = TOKENS * channels;
    float *w = take_floats(channels * taps, 1.0f, &seed), *x = take_floats(SEQUENCES * n, 1.0f, &seed);
    float *start = take_floats(SEQUENCES * tail, 1.0f, &seed), *want = take_floats(SEQUENCES * n, 1.0f, &seed);
    float *got = take_floats(n, 1.0f, &seed), *moving = take((size_t)(SEQUENCES * tail + 1) * sizeof *moving);
    for (int t = 0; t < machine.n_tables; t++) {
        struct lr_conv_args all = {.x_stride = channels,
                                   .w = w,
                                   .y_stride = channels,
                                   .n_rows = TOKENS,
                                   .n_channels = channels,
                                   .n_taps = taps,
                                   .activation = LR_ACT_SILU};
        lr_act *tails[SEQUENCES];
        memcpy(moving, start, (size_t)(SEQUENCES * tail) * sizeof *moving);
        for (int64_t i = 0; i < SEQUENCES; i++) {
            all.x = x + i * n;
            all.tail = start + i * tail;
            all.y = want + i * n;
            machine.tables[t]->conv(&machine.execs[0], &all);
            tails[i] = moving + i * tail;
        }
        for (int64_t token = 0; token < TOKENS; token++) {
            struct lr_conv_step_args step = {.x = x + token * channels,
                                             .x_stride = n,
                                             .w = w,
                                             .tails = tails,
                                             .y = got,
                                             .y_stride = channels,
                                             .n_rows = SEQUENCES,
                                             .n_channels = channels,
                                             .n_taps = taps,
                                             .activation = LR_ACT_SILU};
            machine.tables[t]->conv_step(&machine.execs[1], &step);
            for (int64_t i = 0; i < SEQUENCES; i++)
                assert_memory_equal(got + i * channels, want + i * n + token * channels, (size_t)channels * sizeof *got);
        }
        for (int64_t i = 0; i < SEQUENCES && taps > 1; i++) /* the tail holds the last inputs */
            assert_memory_equal(moving + (i + 1) * tail - channels, x + (i + 1) * n - channels,
                                (size_t)channels * sizeof *x);
    }
    free(w);
    free(x);
    free(start);
    free(want);
    free(got);
    free(moving);
}

static void test_conv_step(void **state)
{
    (void)state;
    static const int64_t channels[] = {1, 16, 24, 200}, taps[] = {1, 2, 4, 7};
    uint64_t seed = 350;
    for (int64_t i = 0; i < COUNT(channels); i++)
        for (int64_t j = 0; j < COUNT(taps); j++)
            check_conv_step(channels[i], taps[j], seed++);
}

static void test_conv(void **state)
{
    (void)state;
    static const int64_t channels[] = {1, 16, 40, 130}, taps[] = {1, 2, 4, 7, LR_MAX_CONV_TAPS};
    uint64_t seed = 50;
    for (int64_t i = 0; i < COUNT(row_counts); i++)
        for (int64_t j = 0; j < COUNT(channels); j++)
            for (int64_t k = 0; k < COUNT(taps); k++)
                check_conv(row_counts[i], channels[j], taps[k], k % 2 ? LR_ACT_SILU : LR_ACT_NONE, seed++);
}

/* ---- gates ---- */

/* What exp, sigmoid and softplus meet at the edges; index 0 .. COUNT. */
static const float extremes[] = {0.0f,    -0.0f,   1.0f,    -1.0f,      1e-7f,  -1e-7f,  1e-30f,   -1e-30f, 19.99f,
                                 20.0f,   20.001f, 21.0f,   -15.0f,     -20.0f, 50.0f,   -50.0f,   -87.0f,  -87.29f,
                                 -87.31f, 87.31f,  88.36f,  88.38f,     100.0f, -100.0f, 1e4f,     -1e4f,   3e38f,
                                 -3e38f,  1e-40f,  -1e-40f, 0.6931472f, 16.7f,  -16.7f,  -103.97f, 104.0f,  2.5f};

struct gates_context {
    struct lr_delta_gates_args args;
    int64_t n_rows;
};

/* out: beta [n_rows, n_heads], then g */
static void run_delta_gates(const struct lr_kernel_ops *ops,
                            const struct lr_exec *exec,
                            const void *context,
                            int64_t first,
                            int64_t n,
                            char *out)
{
    const struct gates_context *c = context;
    struct lr_delta_gates_args args = c->args;
    args.b = (const float *)args.b + first * args.ba_stride;
    args.a = (const float *)args.a + first * args.ba_stride;
    args.beta = (float *)out + first * args.n_heads;
    args.g = (float *)out + (c->n_rows + first) * args.n_heads;
    args.n_rows = n;
    ops->delta_gates(exec, &args);
}

/* exp gives zero below -87.3, where the truth is smaller than 1.3e-38: the absolute part, times exp(a_log). */
static void check_delta_gates(int64_t rows, int64_t heads, int indexed, int extreme, uint64_t seed)
{
    int64_t stride = 2 * heads + 3;
    float *ba = take_floats(rows * stride, 5.0f, &seed), *a_log = take_floats(heads, 3.0f, &seed);
    float *dt_bias = take_floats(heads, 2.0f, &seed), *zero = take_floats(2 * rows * heads, 0.0f, &seed);
    int32_t *index = take((size_t)(2 * heads) * sizeof *index);
    for (int64_t h = 0; h < heads; h++) { /* b and a of a head side by side */
        index[h] = (int32_t)(2 * h);
        index[heads + h] = (int32_t)(2 * h + 1);
    }
    for (int64_t i = 0; extreme && i < rows * stride; i++)
        ba[i] = extremes[i % COUNT(extremes)];
    for (int64_t h = 0; extreme && h < heads; h++)
        dt_bias[h] = 0.0f;
    double *beta = take_doubles(rows * heads), *g = take_doubles(rows * heads);
    struct gates_context context = {{.b = ba,
                                     .a = indexed ? ba : ba + heads,
                                     .ba_stride = stride,
                                     .b_index = indexed ? index : NULL,
                                     .a_index = indexed ? index + heads : NULL,
                                     .a_log = a_log,
                                     .dt_bias = dt_bias,
                                     .n_rows = rows,
                                     .n_heads = heads},
                                    rows};
    lr_ref_delta_gates(&context.args, beta, g);
    float *out =
        (float *)run_everywhere(run_delta_gates, &context, rows, ROWS, zero, (size_t)(2 * rows * heads) * sizeof *out);
    check_close(out, heads, beta, rows, heads, 4e-7, 1.3e-38);
    /* a + dt_bias rounds: half an ulp of up to 7 before softplus, whose slope is below its value's at -7 */
    check_close(out + rows * heads, heads, g, rows, heads, extreme ? 8e-7 : 1.5e-6, 30.0 * 1.3e-38);
    for (int64_t i = 0; i < rows * heads; i++)
        assert_true(out[rows * heads + i] <= 0.0f);
    free(ba);
    free(a_log);
    free(dt_bias);
    free(zero);
    free(index);
    free(beta);
    free(g);
    free(out);
}

static void test_delta_gates(void **state)
{
    (void)state;
    static const int64_t heads[] = {1, 16, 24, 40};
    uint64_t seed = 60;
    for (int64_t i = 0; i < COUNT(row_counts); i++)
        for (int64_t j = 0; j < COUNT(heads); j++)
            for (int mode = 0; mode < 4; mode++)
                check_delta_gates(row_counts[i], heads[j], mode & 1, mode >> 1, seed++);
}

static void run_sigmoid_gate(const struct lr_kernel_ops *ops,
                             const struct lr_exec *exec,
                             const void *context,
                             int64_t first,
                             int64_t n,
                             char *out)
{
    struct lr_sigmoid_gate_args args = *(const struct lr_sigmoid_gate_args *)context;
    args.y = (float *)out + first * args.y_stride;
    args.x = args.x ? (const float *)args.x + first * args.x_stride : args.y;
    args.gate = (const float *)args.gate + first * args.gate_stride;
    args.n_rows = n;
    ops->sigmoid_gate(exec, &args);
}

static void check_sigmoid_gate(int64_t rows, int64_t dim, int in_place, int extreme, uint64_t seed)
{
    int64_t heads = 3, width = heads * dim, stride = width + 2, head_stride = 2 * dim,
            gate_stride = heads * head_stride + 1;
    float *x = take_floats(rows * stride, 2.0f, &seed), *y = take_floats(rows * stride, 1.0f, &seed);
    float *gate = take_floats(rows * gate_stride, 10.0f, &seed);
    for (int64_t i = 0; extreme && i < rows * gate_stride; i++)
        gate[i] = extremes[i % COUNT(extremes)];
    double *truth = take_doubles(rows * width);
    struct lr_sigmoid_gate_args args = {.x = x,
                                        .x_stride = stride,
                                        .gate = gate,
                                        .gate_stride = gate_stride,
                                        .gate_head_stride = head_stride,
                                        .y_stride = stride,
                                        .n_rows = rows,
                                        .n_heads = heads,
                                        .head_dim = dim};
    lr_ref_sigmoid_gate(&args, truth);
    const float *before = in_place ? x : y;
    args.x = in_place ? NULL : x;
    char *out = run_everywhere(run_sigmoid_gate, &args, rows, ROWS, before, (size_t)(rows * stride) * sizeof *x);
    check_gaps(before, out, rows, width, stride);
    /* 1 / infinity is zero where the truth is below 1 / exp(88.37) = 4.2e-39 */
    check_close((float *)out, stride, truth, rows, width, 4e-7, 2.0 * 4.3e-39);
    free(x);
    free(y);
    free(gate);
    free(truth);
    free(out);
}

static void test_sigmoid_gate(void **state)
{
    (void)state;
    static const int64_t dims[] = {8, 24, 40, 256};
    uint64_t seed = 70;
    for (int64_t i = 0; i < COUNT(row_counts); i++)
        for (int64_t j = 0; j < COUNT(dims); j++)
            for (int mode = 0; mode < 4; mode++)
                check_sigmoid_gate(row_counts[i], dims[j], mode & 1, mode >> 1, seed++);
}

/* exp, softplus, sigmoid and silu on dense grids: the first as g = -exp(a_log) * softplus(64), whose factor is a power
 * of two, the last through a convolution with one tap. */
enum { GRID = 200000 };

static void spread(float *x, float low, float high)
{
    for (int64_t i = 0; i < GRID; i++)
        x[i] = low + (high - low) * (float)i / GRID;
}

/* g of a_log and dt_bias into `g`, sigmoid(b) into `beta` */
static void grid_gates(const struct lr_kernel_ops *ops,
                       const float *b,
                       const float *a_log,
                       const float *dt_bias,
                       const float *zero,
                       float *beta,
                       float *g)
{
    struct lr_delta_gates_args args = {.b = b,
                                       .a = zero,
                                       .ba_stride = GRID,
                                       .a_log = a_log,
                                       .dt_bias = dt_bias,
                                       .beta = beta,
                                       .g = g,
                                       .n_rows = 1,
                                       .n_heads = GRID};
    ops->delta_gates(&machine.execs[0], &args);
}

static void check_grid(
    const struct lr_kernel_ops *ops, float *x, float *level, const float *zero, float *beta, float *g, double *truth)
{
    spread(x, -87.0f, 84.0f);
    spread(level, 64.0f, 64.0f);
    grid_gates(ops, zero, x, level, zero, beta, g);
    for (int64_t i = 0; i < GRID; i++)
        truth[i] = -64.0 * exp((double)x[i]);
    check_close(g, GRID, truth, 1, GRID, 0x1p-23, 0.0);

    spread(x, -80.0f, 25.0f);
    grid_gates(ops, x, zero, x, zero, beta, g);
    for (int64_t i = 0; i < GRID; i++)
        truth[i] = -lr_ref_softplus((double)x[i]);
    check_close(g, GRID, truth, 1, GRID, 2.2e-7, 0.0);
    for (int64_t i = 0; i < GRID; i++)
        truth[i] = lr_ref_sigmoid((double)x[i]);
    check_close(beta, GRID, truth, 1, GRID, 0x1.8p-23, 0.0);

    spread(level, 1.0f, 1.0f);
    struct lr_conv_args conv = {.x = x,
                                .x_stride = GRID,
                                .w = level,
                                .tail = zero,
                                .y = g,
                                .y_stride = GRID,
                                .n_rows = 1,
                                .n_channels = GRID,
                                .n_taps = 1,
                                .activation = LR_ACT_SILU};
    ops->conv(&machine.execs[0], &conv);
    for (int64_t i = 0; i < GRID; i++)
        truth[i] *= (double)x[i];
    check_close(g, GRID, truth, 1, GRID, 0x1.8p-23, 0.0);
}

static void test_functions_on_a_grid(void **state)
{
    (void)state;
    float *memory = take(5 * GRID * sizeof *memory);
    double *truth = take_doubles(GRID);
    float *zero = memory + 2 * GRID;
    spread(zero, 0.0f, 0.0f);
    for (int t = 0; t < machine.n_tables; t++)
        check_grid(machine.tables[t], memory, memory + GRID, zero, memory + 3 * GRID, memory + 4 * GRID, truth);
    free(memory);
    free(truth);
}

/* ---- rotary tables ---- */

static void check_rope_table(
    const int64_t *positions, int64_t n_rows, const double *inv_freq, int64_t n_freq, double factor, double absolute)
{
    float *cosine = (float *)guarded((size_t)(n_rows * n_freq) * sizeof *cosine);
    float *sine = (float *)guarded((size_t)(n_rows * n_freq) * sizeof *sine);
    double *cos_truth = take_doubles(n_rows * n_freq), *sin_truth = take_doubles(n_rows * n_freq);
    lr_rope_table(positions, n_rows, inv_freq, n_freq, factor, cosine, sine);
    lr_ref_rope_table(positions, n_rows, inv_freq, n_freq, factor, cos_truth, sin_truth);
    check_guard((char *)cosine, (size_t)(n_rows * n_freq) * sizeof *cosine);
    check_guard((char *)sine, (size_t)(n_rows * n_freq) * sizeof *sine);
    /* half an ulp of float32, relative; and what the angle lost in float64 */
    check_close(cosine, n_freq, cos_truth, n_rows, n_freq, 0x1.00001p-24, absolute);
    check_close(sine, n_freq, sin_truth, n_rows, n_freq, 0x1.00001p-24, absolute);
    free(cosine);
    free(sine);
    free(cos_truth);
    free(sin_truth);
}

static void test_rope_table(void **state)
{
    (void)state;
    enum { N = 4000 };
    static const double bases[] = {1e4, 1e6, 1e7};
    int64_t positions[N];
    uint64_t seed = 80;
    for (int64_t i = 0; i < N; i++)
        positions[i] = i < 300 ? i : i < 600 ? 10000000 - i : (int64_t)(next_bits(&seed) % 10000001);
    for (int64_t b = 0; b < COUNT(bases); b++) {
        double inv_freq[33];
        for (int j = 0; j < 33; j++)
            inv_freq[j] = pow(bases[b], -2.0 * j / 66.0);
        /* position * inv_freq in float64 is off by half an ulp of 1e7 at most: 9.4e-10 */
        check_rope_table(positions, N, inv_freq, 33, 1.0, 1e-9);
        check_rope_table(positions, 1, inv_freq, 1, 1.0, 1e-9);
        check_rope_table(positions, N, inv_freq, 33, 1.3465735902799727, 1.4e-9);
    }
}

/* Where the product is exact in float64 only the reduction and the series can err, and neither may be seen in float32
 * even at ten million radians. */
static void test_rope_table_reduction(void **state)
{
    (void)state;
    enum { N = 200000 };
    static const double inv_freq[] = {1.0, 0.5, 0.75, -1.0};
    int64_t *positions = take(N * sizeof *positions);
    uint64_t seed = 81;
    for (int64_t i = 0; i < N; i++)
        positions[i] = (int64_t)(next_bits(&seed) % 10000001);
    check_rope_table(positions, N, inv_freq, COUNT(inv_freq), 1.0, 1e-15);
    free(positions);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_embed),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_gated_rmsnorm),
        cmocka_unit_test(test_norm_rope),
        cmocka_unit_test(test_l2norm),
        cmocka_unit_test(test_conv),
        cmocka_unit_test(test_conv_step),
        cmocka_unit_test(test_delta_gates),
        cmocka_unit_test(test_sigmoid_gate),
        cmocka_unit_test(test_functions_on_a_grid),
        cmocka_unit_test(test_rope_table),
        cmocka_unit_test(test_rope_table_reduction),
    };
    return cmocka_run_group_tests(tests, open_machine, close_machine);
}
