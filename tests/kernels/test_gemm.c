/* Dense layers and experts: weights in panels, products, bias, activation, residual. */
#include "tests/kernels/common.h"

struct gemm_case {
    int64_t n_rows, n, k;
    enum lr_dtype dtype;
    enum lr_activation activation;
    int bias, accumulate;
    int64_t a_gap, y_gap; /* stride minus width */
};

static void run_gemm(const struct lr_kernel_ops *ops,
                     const struct lr_exec *exec,
                     const void *context,
                     int64_t first,
                     int64_t n,
                     char *out)
{
    struct lr_gemm_args args = *(const struct lr_gemm_args *)context;
    args.a = (const float *)args.a + first * args.a_stride;
    args.y = (float *)out + first * args.y_stride;
    args.n_rows = n;
    ops->gemm(exec, &args);
}

/* A chain of k fused additions of terms below 2 is off by k half-ulps of its partial sums at most; these stay below
 * 2 sqrt(k). The activations' slopes are below 1.2; erf by Abramowitz and Stegun adds 5e-7 |x| / 2. */
static double gemm_tolerance(int64_t k)
{
    double size = 2.0 * sqrt((double)k) + 2.0;
    return 1.2 * 0x1p-24 * sqrt((double)k) * size + 1e-6 * size;
}

static void check_gemm(const struct gemm_case *c, uint64_t seed)
{
    struct lr_weight w = take_weight(c->n, c->k, c->dtype, &seed);
    int64_t a_stride = c->k + c->a_gap, y_stride = c->n + c->y_gap;
    float *a = take_floats((c->n_rows - 1) * a_stride + c->k, 1.0f, &seed);
    float *bias = take_floats(c->n, 1.0f, &seed), *y = take_floats(c->n_rows * y_stride, 1.0f, &seed);
    double *truth = take_doubles(c->n_rows * c->n);
    struct lr_gemm_args args = {.a = a,
                                .a_stride = a_stride,
                                .w = &w,
                                .bias = c->bias ? bias : NULL,
                                .y = y,
                                .y_stride = y_stride,
                                .n_rows = c->n_rows,
                                .activation = c->activation,
                                .accumulate = c->accumulate};
    lr_ref_gemm(&args, truth);
    char *out = run_everywhere(run_gemm, &args, c->n_rows, ROWS, y, (size_t)(c->n_rows * y_stride) * sizeof *y);
    check_gaps(y, out, c->n_rows, c->n, y_stride);
    check_close((float *)out, y_stride, truth, c->n_rows, c->n, 2e-7, gemm_tolerance(c->k));
    free(w.data);
    free(a);
    free(bias);
    free(y);
    free(truth);
    free(out);
}

static void test_gemm_shapes(void **state)
{
    (void)state;
    static const int64_t rows[] = {1, 2, 3, 5, 7, 11, 13, 97, 200}, columns[] = {1, 15, 16, 24, 40, 130},
                         depths[] = {1, 3, 24, 200};
    uint64_t seed = 1;
    for (int64_t r = 0; r < COUNT(rows); r++)
        for (int64_t n = 0; n < COUNT(columns); n++)
            for (int64_t k = 0; k < COUNT(depths); k++)
                for (enum lr_dtype dtype = LR_F32; dtype <= LR_F16; dtype++) {
                    struct gemm_case c = {rows[r], columns[n], depths[k], dtype, LR_ACT_NONE, 0, 0, 0, 0};
                    check_gemm(&c, seed++);
                }
}

static void test_gemm_endings(void **state)
{
    (void)state;
    static const int64_t columns[] = {15, 16, 40, 192};
    uint64_t seed = 1000;
    for (int64_t n = 0; n < COUNT(columns); n++)
        for (enum lr_activation act = LR_ACT_NONE; act <= LR_ACT_RELU; act++)
            for (int mode = 0; mode < 4; mode++) {
                struct gemm_case c = {101, columns[n], 24, LR_BF16, act, mode & 1, mode >> 1, 3, 5};
                check_gemm(&c, seed++);
                c.n_rows = 1;
                check_gemm(&c, seed++);
            }
}

/* Large enough for columns to be divided among threads. */
static void test_gemm_many_tasks(void **state)
{
    (void)state;
    static const struct gemm_case cases[] = {
        {1, 1000, 130, LR_BF16, LR_ACT_NONE, 0, 0, 0, 0},
        {13, 777, 65, LR_F16, LR_ACT_SILU, 1, 0, 1, 1},
        {193, 520, 33, LR_F32, LR_ACT_NONE, 0, 1, 0, 7},
    };
    for (int64_t i = 0; i < COUNT(cases); i++)
        check_gemm(&cases[i], 2000 + (uint64_t)i);
}

/* Depths over a block of widened weights, and rows 4096 bytes apart. */
static void test_gemm_deep(void **state)
{
    (void)state;
    static const int64_t rows[] = {12, 50, 100}, depths[] = {256, 257, 1024, 2050};
    uint64_t seed = 3000;
    for (int64_t r = 0; r < COUNT(rows); r++)
        for (int64_t k = 0; k < COUNT(depths); k++)
            for (enum lr_dtype dtype = LR_F32; dtype <= LR_F16; dtype++) {
                struct gemm_case c = {rows[r], 72, depths[k], dtype, LR_ACT_SILU, 1, k & 1, 0, 0};
                check_gemm(&c, seed++);
            }
}

static void test_gemm_no_rows(void **state)
{
    (void)state;
    uint64_t seed = 3;
    struct lr_weight w = take_weight(24, 8, LR_F32, &seed);
    float a = 1.0f, y[24] = {0};
    struct lr_gemm_args args = {.a = &a, .a_stride = 8, .w = &w, .y = y, .y_stride = 24};
    float *out = (float *)run_everywhere(run_gemm, &args, 0, WHOLE, y, sizeof y);
    assert_memory_equal(out, y, sizeof y);
    free(out);
    free(w.data);
}

/* Every table packs alike, in one go and in parts; the last panel's padding stays zero. */
static void test_weight_pack(void **state)
{
    (void)state;
    enum { N = 41, K = 7 };
    for (enum lr_dtype dtype = LR_F32; dtype <= LR_F16; dtype++) {
        uint64_t seed = 7;
        size_t element = lr_dtype_bytes(dtype);
        char *rows = take_matrix(N * K, dtype, &seed);
        for (int t = 0; t < machine.n_tables; t++) {
            const struct lr_kernel_ops *ops = machine.tables[t];
            assert_int_equal(ops->weight_bytes(N, K, dtype), 48 * K * element);
            char *data = guarded(48 * K * element);
            struct lr_weight w = {.dtype = dtype, .n = N, .k = K, .data = data};
            ops->weight_pack(&w, 17, N - 17, rows + 17 * K * element);
            ops->weight_pack(&w, 0, 17, rows);
            check_guard(data, 48 * K * element);
            static const char zero[4];
            for (int64_t n = 0; n < 48; n++)
                for (int64_t k = 0; k < K; k++)
                    assert_memory_equal(data + ((n / 16 * K + k) * 16 + n % 16) * (int64_t)element,
                                        n < N ? rows + (n * K + k) * (int64_t)element : zero, element);
            free(data);
        }
        free(rows);
    }
}

/* All 65,536 halves, widened by a product with one, against the format's definition. */
static void test_every_half(void **state)
{
    (void)state;
    enum { N = 65536 };
    for (enum lr_dtype dtype = LR_BF16; dtype <= LR_F16; dtype++) {
        uint16_t *rows = take(N * sizeof *rows);
        for (int64_t i = 0; i < N; i++)
            rows[i] = (uint16_t)i;
        struct lr_weight w = pack(rows, N, 1, dtype);
        float one = 1.0f, *y = take(N * sizeof *y);
        for (int t = 0; t < machine.n_tables; t++) {
            struct lr_gemm_args args = {.a = &one, .a_stride = 1, .w = &w, .y = y, .y_stride = N, .n_rows = 1};
            machine.tables[t]->gemm(&machine.execs[0], &args);
            for (int64_t i = 0; i < N; i++) {
                double want = lr_ref_load(rows, i, dtype);
                if (!((double)y[i] == want || (isnan(y[i]) && isnan(want))))
                    fail_msg("%s: half %04llx is %a, not %a", machine.tables[t]->name, (unsigned long long)i,
                             (double)y[i], want);
            }
        }
        free(rows);
        free(w.data);
        free(y);
    }
}

/* ---- experts ---- */

struct experts_case {
    int64_t n_experts, d, ffn;
    enum lr_dtype dtype;
    enum lr_activation activation;
    int64_t counts[8]; /* rows of each expert */
};

struct experts_context {
    const struct experts_case *c;
    const float *x;
    const int64_t *offsets;
    const struct lr_weight *gate, *up, *down;
};

/* Rows [first, first + n) of the case, each still with its own expert. */
static void run_experts(const struct lr_kernel_ops *ops,
                        const struct lr_exec *exec,
                        const void *context,
                        int64_t first,
                        int64_t n,
                        char *out)
{
    const struct experts_context *e = context;
    int64_t offsets[9];
    for (int64_t i = 0; i <= e->c->n_experts; i++) {
        int64_t at = e->offsets[i] - first;
        offsets[i] = at < 0 ? 0 : at > n ? n : at;
    }
    size_t hidden_bytes = (size_t)(n * e->c->ffn) * sizeof(float);
    char *hidden = guarded(hidden_bytes);
    struct lr_experts_args args = {.x = e->x + first * e->c->d,
                                   .y = (float *)out + first * e->c->d,
                                   .hidden = hidden,
                                   .offsets = offsets,
                                   .n_experts = e->c->n_experts,
                                   .gate = e->gate,
                                   .up = e->up,
                                   .down = e->down,
                                   .activation = e->c->activation};
    ops->experts(exec, &args);
    check_guard(hidden, hidden_bytes);
    free(hidden);
}

static void check_experts(const struct experts_case *c, uint64_t seed)
{
    struct lr_weight gate[8], up[8], down[8];
    int64_t offsets[9] = {0};
    for (int64_t i = 0; i < c->n_experts; i++) {
        gate[i] = take_weight(c->ffn, c->d, c->dtype, &seed);
        up[i] = take_weight(c->ffn, c->d, c->dtype, &seed);
        down[i] = take_weight(c->d, c->ffn, c->dtype, &seed);
        offsets[i + 1] = offsets[i] + c->counts[i];
    }
    int64_t n_rows = offsets[c->n_experts];
    float *x = take_floats(n_rows * c->d, 0.3f, &seed), *y = take_floats(n_rows * c->d, 1.0f, &seed);
    double *truth = take_doubles(n_rows * c->d), *hidden = take_doubles(c->ffn);
    struct experts_context context = {c, x, offsets, gate, up, down};
    struct lr_experts_args args = {.x = x,
                                   .offsets = offsets,
                                   .n_experts = c->n_experts,
                                   .gate = gate,
                                   .up = up,
                                   .down = down,
                                   .activation = c->activation};
    lr_ref_experts(&args, hidden, truth);
    float *out = (float *)run_everywhere(run_experts, &context, n_rows, ROWS, y, (size_t)(n_rows * c->d) * sizeof *y);
    /* hidden values are of size d / 30, each with a relative error of about sqrt(d) half-ulps */
    double size = (double)c->d / 30.0 + 1.0;
    check_close(out, c->d, truth, n_rows, c->d, 1e-6, 1e-6 * size * sqrt((double)c->ffn));
    for (int64_t i = 0; i < c->n_experts; i++) {
        free(gate[i].data);
        free(up[i].data);
        free(down[i].data);
    }
    free(x);
    free(y);
    free(truth);
    free(hidden);
    free(out);
}

static void test_experts(void **state)
{
    (void)state;
    static const struct experts_case cases[] = {
        {1, 24, 40, LR_F32, LR_ACT_SILU, {1}},
        {1, 40, 24, LR_BF16, LR_ACT_SILU, {13}},
        {1, 64, 200, LR_F16, LR_ACT_GELU_TANH, {200}},
        {1, 130, 72, LR_BF16, LR_ACT_GELU, {97}},
        {4, 24, 40, LR_BF16, LR_ACT_SILU, {0, 97, 1, 13}},
        {5, 16, 16, LR_F32, LR_ACT_RELU, {3, 0, 0, 5, 0}},
        {8, 40, 130, LR_BF16, LR_ACT_SILU, {1, 1, 0, 2, 100, 7, 1, 1}},
        /* enough blocks for the fused way on three threads */
        {8, 24, 70, LR_F16, LR_ACT_SILU, {97, 100, 193, 98, 1, 2, 97, 5}},
        {2, 1, 1, LR_F32, LR_ACT_SILU, {2, 3}},
    };
    for (int64_t i = 0; i < COUNT(cases); i++)
        check_experts(&cases[i], 50 + (uint64_t)i);
}

static void test_experts_without_rows(void **state)
{
    (void)state;
    static const struct experts_case c = {3, 16, 16, LR_F32, LR_ACT_SILU, {0, 0, 0}};
    check_experts(&c, 77);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_weight_pack),          cmocka_unit_test(test_every_half),
        cmocka_unit_test(test_gemm_shapes),          cmocka_unit_test(test_gemm_deep),
        cmocka_unit_test(test_gemm_endings),         cmocka_unit_test(test_gemm_many_tasks),
        cmocka_unit_test(test_gemm_no_rows),         cmocka_unit_test(test_experts),
        cmocka_unit_test(test_experts_without_rows),
    };
    return cmocka_run_group_tests(tests, open_machine, close_machine);
}
