/* Router, row gathering, and the weighted sum of expert outputs. */
#include "tests/kernels/common.h"

/* ---- router ---- */

struct router_context {
    struct lr_router_args args;
};

/* out: ids [n_rows, top_k] of the whole case, then weights */
static void run_router(const struct lr_kernel_ops *ops,
                       const struct lr_exec *exec,
                       const void *context,
                       int64_t first,
                       int64_t n,
                       char *out)
{
    struct lr_router_args args = ((const struct router_context *)context)->args;
    int64_t total = args.n_rows * args.top_k;
    args.logits = (const float *)args.logits + first * args.n_experts;
    args.ids = (int32_t *)out + first * args.top_k;
    args.weights = (float *)out + total + first * args.top_k;
    args.n_rows = n;
    ops->router(exec, &args);
}

/* Runs the case everywhere; returns ids and weights, the caller frees. */
static char *route(const struct router_context *c)
{
    size_t size = (size_t)(c->args.n_rows * c->args.top_k) * 8;
    char *before = take(size);
    memset(before, 0x77, size);
    char *out = run_everywhere(run_router, c, c->args.n_rows, ROWS, before, size);
    free(before);
    return out;
}

static void check_router(int64_t n_rows, int64_t n_experts, int64_t top_k, int renormalize, float step, uint64_t seed)
{
    float *logits = take_floats(n_rows * n_experts, 6.0f, &seed);
    for (int64_t i = 0; step > 0.0f && i < n_rows * n_experts; i++)
        logits[i] = step * rintf(logits[i] / step); /* ties */
    int64_t n = n_rows * top_k;
    double *p = take_doubles(n_rows * n_experts), *weights = take_doubles(n);
    int32_t *ids = take((size_t)n * sizeof *ids);
    struct router_context c = {
        {.logits = logits, .n_rows = n_rows, .n_experts = n_experts, .top_k = top_k, .renormalize = renormalize}};
    lr_ref_router(&c.args, p, ids, weights);
    char *out = route(&c);
    for (int64_t i = 0; i < n; i++)
        assert_int_equal(((int32_t *)out)[i], ids[i]);
    /* exp of a difference that rounds (half an ulp of 12), 2 ulp of exp, the sum, the quotients */
    check_close((float *)out + n, top_k, weights, n_rows, top_k, 1.5e-6, 0.0);
    free(logits);
    free(p);
    free(weights);
    free(ids);
    free(out);
}

static void test_router(void **state)
{
    (void)state;
    static const int64_t rows[] = {1, 13, 97, 200};
    static const struct {
        int64_t n_experts, top_k;
    } sizes[] = {{1, 1}, {2, 1}, {8, 8}, {16, 2}, {24, 4}, {40, 10}, {512, 10}, {LR_MAX_EXPERTS, 3}};
    uint64_t seed = 1;
    for (int64_t i = 0; i < COUNT(rows); i++)
        for (int64_t j = 0; j < COUNT(sizes); j++)
            for (int renormalize = 0; renormalize < 2; renormalize++) {
                if (sizes[j].n_experts <= 512)
                    check_router(rows[i], sizes[j].n_experts, sizes[j].top_k, renormalize, 0.0f, seed++);
                if (sizes[j].n_experts <= 512 || rows[i] <= 13)
                    check_router(rows[i], sizes[j].n_experts, sizes[j].top_k, renormalize, 0.5f, seed++);
            }
}

/* All logits equal: the lowest ids, equal weights. */
static void test_router_all_equal(void **state)
{
    (void)state;
    float logits[3 * 20];
    for (int64_t i = 0; i < COUNT(logits); i++)
        logits[i] = i < 20 ? 0.0f : i < 40 ? 1e30f : -1e30f;
    struct router_context c = {{.logits = logits, .n_rows = 3, .n_experts = 20, .top_k = 5, .renormalize = 1}};
    char *out = route(&c);
    for (int64_t i = 0; i < 15; i++) {
        assert_int_equal(((int32_t *)out)[i], i % 5);
        assert_true(fabs((double)((float *)out)[15 + i] - 0.2) < 1e-7);
    }
    free(out);
}

/* Logits that are no numbers, and all-but-one minus infinity: ids stay distinct, ascending and in range, as whoever
 * counts rows per expert relies on. */
static void test_router_of_nonsense(void **state)
{
    (void)state;
    enum { EXPERTS = 24, K = 6, CASES = 5 };
    float logits[CASES * EXPERTS];
    for (int64_t i = 0; i < CASES * EXPERTS; i++) {
        int64_t row = i / EXPERTS, e = i % EXPERTS;
        logits[i] = row == 0   ? NAN
                    : row == 1 ? -INFINITY
                    : row == 2 ? (e == 20 ? 1.0f : -INFINITY)
                    : row == 3 ? (e == 7 ? NAN : (float)e)
                               : (e == 9 ? INFINITY : 0.0f);
    }
    struct router_context c = {{.logits = logits, .n_rows = CASES, .n_experts = EXPERTS, .top_k = K}};
    char *want = NULL;
    for (int t = 0; t < machine.n_tables; t++) {
        char *out = guarded(CASES * K * 8);
        run_router(machine.tables[t], &machine.execs[0], &c, 0, CASES, out);
        check_guard(out, CASES * K * 8);
        const int32_t *ids = (const int32_t *)out;
        for (int64_t i = 0; i < CASES * K; i++) {
            assert_true(ids[i] >= 0 && ids[i] < EXPERTS);
            assert_true(i % K == 0 || ids[i] > ids[i - 1]);
        }
        if (want) /* weights may be NaN, whose payload is nobody's promise */
            check_same(want, out, CASES * K * 4, machine.tables[t]->name, "ids");
        free(want);
        want = out;
    }
    const int32_t *ids = (const int32_t *)want + 2 * K;
    assert_int_equal(ids[K - 1], 20);
    for (int64_t k = 0; k < K - 1; k++) /* the others have p = 0: the lower ids */
        assert_int_equal(ids[k], k);
    free(want);
}

/* ---- sorting by expert ---- */

static void check_expert_sort(int64_t n_rows, int64_t top_k, int64_t n_experts, uint64_t seed)
{
    int64_t n = n_rows * top_k;
    int32_t *ids = take((size_t)n * sizeof *ids);
    for (int64_t t = 0; t < n_rows; t++) /* different experts, some of them never */
        for (int64_t k = 0; k < top_k; k++)
            ids[t * top_k + k] = (int32_t)(((int64_t)(next_bits(&seed) % 3) + k * 3) % n_experts);
    int64_t *offsets = take((size_t)(n_experts + 1) * sizeof *offsets);
    int64_t *order = take((size_t)n * sizeof *order), *row_of = take((size_t)n * sizeof *row_of);
    for (int t = 0; t < machine.n_tables; t++) {
        struct lr_expert_sort_args args = {.ids = ids,
                                           .n_rows = n_rows,
                                           .top_k = top_k,
                                           .n_experts = n_experts,
                                           .offsets = offsets,
                                           .order = order,
                                           .row_of = row_of};
        memset(row_of, 0xff, (size_t)n * sizeof *row_of);
        machine.tables[t]->expert_sort(&machine.execs[1], &args);
        assert_int_equal(offsets[0], 0);
        assert_int_equal(offsets[n_experts], n);
        int64_t at = 0;
        for (int64_t e = 0; e < n_experts; e++) { /* the plain way: tokens in order, expert by expert */
            assert_int_equal(offsets[e], at);
            for (int64_t i = 0; i < n; i++)
                if (ids[i] == e) {
                    assert_int_equal(order[at], i / top_k);
                    assert_int_equal(row_of[i], at++);
                }
        }
    }
    free(ids);
    free(offsets);
    free(order);
    free(row_of);
}

static void test_expert_sort(void **state)
{
    (void)state;
    check_expert_sort(1, 1, 1, 1);
    check_expert_sort(1, 3, 9, 2);
    check_expert_sort(130, 2, 8, 3);
    check_expert_sort(300, 10, 512, 4);
}

/* ---- gather ---- */

struct gather_context {
    const float *x;
    int64_t d;
    const int64_t *rows;
};

static void run_gather(const struct lr_kernel_ops *ops,
                       const struct lr_exec *exec,
                       const void *context,
                       int64_t first,
                       int64_t n,
                       char *out)
{
    const struct gather_context *c = context;
    ops->gather_rows(exec, c->x, (size_t)c->d * sizeof *c->x, c->rows + first, n, (float *)out + first * c->d);
}

static void test_gather_rows(void **state)
{
    (void)state;
    enum { FROM = 50, N = 300 };
    static const int64_t widths[] = {1, 16, 24, 1000};
    uint64_t seed = 500;
    for (int64_t i = 0; i < COUNT(widths); i++) {
        int64_t d = widths[i], rows[N];
        float *x = take_floats(FROM * d, 1.0f, &seed), *before = take_floats(N * d, 1.0f, &seed);
        for (int64_t t = 0; t < N; t++)
            rows[t] = t == 0 ? FROM - 1 : (int64_t)(next_bits(&seed) % FROM);
        struct gather_context c = {x, d, rows};
        float *out = (float *)run_everywhere(run_gather, &c, N, ROWS, before, (size_t)(N * d) * sizeof *out);
        for (int64_t t = 0; t < N; t++)
            assert_memory_equal(out + t * d, x + rows[t] * d, (size_t)d * sizeof *out);
        free(x);
        free(before);
        free(out);
    }
}

/* ---- combine ---- */

static void run_combine(const struct lr_kernel_ops *ops,
                        const struct lr_exec *exec,
                        const void *context,
                        int64_t first,
                        int64_t n,
                        char *out)
{
    struct lr_moe_combine_args args = *(const struct lr_moe_combine_args *)context;
    args.x = (float *)out + first * args.d;
    args.weights += first * args.top_k;
    args.row_of += first * args.top_k;
    args.shared = args.shared ? (const float *)args.shared + first * args.d : NULL;
    args.shared_gate = args.shared_gate ? args.shared_gate + first : NULL;
    args.n_rows = n;
    ops->moe_combine(exec, &args);
}

/* shared: 0 none, 1 with factor one, 2 with a gate */
static void check_combine(int64_t n_rows, int64_t d, int64_t top_k, int shared, uint64_t seed)
{
    int64_t n_routed = n_rows * top_k;
    float *x = take_floats(n_rows * d, 1.0f, &seed), *weights = take_floats(n_routed, 1.0f, &seed);
    float *y = take_floats(n_routed * d, 1.0f, &seed), *common = take_floats(n_rows * d, 1.0f, &seed);
    float *gate = take_floats(n_rows, 30.0f, &seed);
    int64_t *row_of = take((size_t)n_routed * sizeof *row_of);
    for (int64_t i = 0; i < n_routed; i++) /* backwards */
        row_of[i] = n_routed - 1 - i;
    double *truth = take_doubles(n_rows * d);
    gate[0] = -200.0f;
    struct lr_moe_combine_args args = {.x = x,
                                       .n_rows = n_rows,
                                       .d = d,
                                       .top_k = top_k,
                                       .weights = weights,
                                       .row_of = row_of,
                                       .y = y,
                                       .shared = shared ? common : NULL,
                                       .shared_gate = shared == 2 ? gate : NULL};
    lr_ref_moe_combine(&args, truth);
    float *out = (float *)run_everywhere(run_combine, &args, n_rows, ROWS, x, (size_t)(n_rows * d) * sizeof *out);
    check_close(out, d, truth, n_rows, d, 2e-7, 3e-7 + 1e-7 * (double)top_k);
    free(x);
    free(weights);
    free(y);
    free(common);
    free(gate);
    free(row_of);
    free(truth);
    free(out);
}

static void test_combine(void **state)
{
    (void)state;
    static const int64_t rows[] = {1, 13, 97, 200}, widths[] = {1, 16, 24, 40, 200}, top_ks[] = {0, 1, 10};
    uint64_t seed = 600;
    for (int64_t i = 0; i < COUNT(rows); i++)
        for (int64_t j = 0; j < COUNT(widths); j++)
            for (int64_t k = 0; k < COUNT(top_ks); k++)
                for (int shared = 0; shared < 3; shared++)
                    check_combine(rows[i], widths[j], top_ks[k], shared, seed++);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_router),
        cmocka_unit_test(test_router_all_equal),
        cmocka_unit_test(test_router_of_nonsense),
        cmocka_unit_test(test_expert_sort),
        cmocka_unit_test(test_gather_rows),
        cmocka_unit_test(test_combine),
    };
    return cmocka_run_group_tests(tests, open_machine, close_machine);
}
