/* The gated delta rule: a segment's map and outputs, folding, single steps, and that they agree with each other. */
#include "tests/kernels/common.h"

/* How the tokens forget. */
enum gates { MILD, MIXED, NOTHING_FORGOTTEN, EVERYTHING_FORGOTTEN, CLOSED };

struct segment {
    struct lr_delta_shape shape;
    int64_t n_rows, stride;
    float *q, *k, *v; /* in one row: [q | k | v | gap] */
    float *g, *beta, *s_in;
    float *rows;
};

static void normalise(float *x, int64_t n, float size)
{
    double sum = 1e-12;
    for (int64_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    for (int64_t i = 0; i < n; i++)
        x[i] *= (float)((double)size / sqrt(sum));
}

static void take_gates(struct segment *s, enum gates gates, uint64_t *seed)
{
    int64_t n = s->n_rows * s->shape.n_v_heads;
    s->g = take_floats(n, 0.05f, seed);
    s->beta = take_floats(n, 0.5f, seed);
    for (int64_t i = 0; i < n; i++) {
        s->g[i] = -fabsf(s->g[i]);
        s->beta[i] += 0.5f;
        if (gates == MIXED && next_bits(seed) % 20 == 0)
            s->g[i] = -20.0f;
        if (gates == NOTHING_FORGOTTEN || gates == CLOSED)
            s->g[i] = 0.0f;
        if (gates == EVERYTHING_FORGOTTEN)
            s->g[i] = -150.0f;
        if (gates == CLOSED)
            s->beta[i] = 0.0f;
    }
}

static struct segment take_segment(struct lr_delta_shape shape, int64_t n_rows, enum gates gates, uint64_t seed)
{
    int64_t keys = shape.n_k_heads * shape.dk, values = shape.n_v_heads * shape.dv;
    struct segment s = {.shape = shape, .n_rows = n_rows, .stride = 2 * keys + values + 3};
    /* the last row ends with its values: a read behind them is an error */
    s.rows = take_floats(n_rows > 0 ? n_rows * s.stride - 3 : 0, 1.0f, &seed);
    s.q = s.rows;
    s.k = s.q + keys;
    s.v = s.k + keys;
    for (int64_t t = 0; t < n_rows; t++)
        for (int64_t h = 0; h < shape.n_k_heads; h++) {
            normalise(s.q + t * s.stride + h * shape.dk, shape.dk, 1.0f / sqrtf((float)shape.dk));
            normalise(s.k + t * s.stride + h * shape.dk, shape.dk, 1.0f);
        }
    take_gates(&s, gates, &seed);
    s.s_in = take_floats(shape.n_v_heads * shape.dk * shape.dv, 1.0f, &seed);
    return s;
}

static void free_segment(struct segment *s)
{
    free(s->rows);
    free(s->g);
    free(s->beta);
    free(s->s_in);
}

static struct lr_delta_segment_args segment_args(const struct segment *s)
{
    return (struct lr_delta_segment_args){.shape = s->shape,
                                          .q = s->q,
                                          .k = s->k,
                                          .v = s->v,
                                          .qkv_stride = s->stride,
                                          .g = s->g,
                                          .beta = s->beta,
                                          .n_rows = s->n_rows};
}

/* Where the outputs of a segment lie in one buffer of floats: m, b, s_out (by fold), o. */
struct outputs {
    int64_t m, b, s_out, o, o_stride, end;
};

static struct outputs place_outputs(struct lr_delta_shape s, int64_t n_rows)
{
    struct outputs at = {.o_stride = s.n_v_heads * s.dv + 5};
    at.b = at.m + s.n_v_heads * s.dk * s.dk;
    at.s_out = at.b + s.n_v_heads * s.dk * s.dv;
    at.o = at.s_out + s.n_v_heads * s.dk * s.dv;
    at.end = at.o + n_rows * at.o_stride;
    return at;
}

/* Summary, fold and output, with `work` full of NaN at first. */
static void run_segment(const struct lr_kernel_ops *ops,
                        const struct lr_exec *exec,
                        const void *context,
                        int64_t first,
                        int64_t n,
                        char *out)
{
    (void)first;
    (void)n;
    const struct segment *s = context;
    struct outputs at = place_outputs(s->shape, s->n_rows);
    struct lr_delta_segment_args args = segment_args(s);
    size_t work_bytes = ops->delta_work_floats(s->shape, s->n_rows) * sizeof(float);
    char *work = guarded(work_bytes);
    memset(work, 0xff, work_bytes);
    args.work = (float *)work;
    float *x = (float *)out;
    ops->delta_summary(exec, &args, x + at.m, x + at.b);
    struct lr_delta_fold_args fold = {s->shape, x + at.m, x + at.b, s->s_in, x + at.s_out};
    ops->delta_fold(exec, &fold);
    ops->delta_output(exec, &args, s->s_in, x + at.o, at.o_stride);
    check_guard(work, work_bytes);
    free(work);
}

/* Entries of M are below 1, those of S below 2 or so, and every token adds a few roundings of that size. A running sum
 * of gates that reaches -G costs G half-ulps in the exponent. */
static double segment_tolerance(int64_t n_rows, enum gates gates)
{
    double steps = n_rows < 64 ? (double)n_rows : 64.0;
    return 0x1p-24 * (8.0 + sqrt(steps) + (gates == MIXED ? 100.0 : 0.0));
}

static void check_segment(struct lr_delta_shape shape, int64_t n_rows, enum gates gates, uint64_t seed)
{
    struct segment s = take_segment(shape, n_rows, gates, seed);
    struct outputs at = place_outputs(shape, n_rows);
    float *before = take_floats(at.end, 1.0f, &seed);
    double *truth = take_doubles(at.end), tolerance = segment_tolerance(n_rows, gates);
    struct lr_delta_segment_args args = segment_args(&s);
    lr_ref_delta_segment(&args, s.s_in, truth + at.m, truth + at.b, truth + at.s_out, truth + at.o);
    float *out = (float *)run_everywhere(run_segment, &s, n_rows, WHOLE, before, (size_t)at.end * sizeof *out);
    int64_t width = shape.n_v_heads * shape.dv, rows = shape.n_v_heads * shape.dk;
    check_close(out + at.m, shape.dk, truth + at.m, rows, shape.dk, tolerance, tolerance);
    check_close(out + at.b, shape.dv, truth + at.b, rows, shape.dv, tolerance, tolerance);
    /* the fold adds dk products */
    double fold = tolerance + 0x1p-24 * sqrt((double)shape.dk);
    check_close(out + at.s_out, shape.dv, truth + at.s_out, rows, shape.dv, fold, 2.0 * fold);
    check_close(out + at.o, at.o_stride, truth + at.o, n_rows, width, tolerance, tolerance);
    check_gaps(before + at.o, out + at.o, n_rows, width, at.o_stride);
    free_segment(&s);
    free(before);
    free(truth);
    free(out);
}

static const struct lr_delta_shape shapes[] = {
    {1, 1, 16, 16}, {2, 4, 24, 40}, {1, 3, 40, 24}, {2, 2, 1, 1}, {3, 3, 16, 130}, {1, 2, 72, 8},
};

static void test_segment(void **state)
{
    (void)state;
    static const int64_t lengths[] = {1, 2, 15, 16, 17, 63, 64, 65, 128, 200};
    uint64_t seed = 1;
    for (int64_t i = 0; i < COUNT(shapes); i++)
        for (int64_t j = 0; j < COUNT(lengths); j++)
            check_segment(shapes[i], lengths[j], MILD, seed++);
}

static void test_segment_gates(void **state)
{
    (void)state;
    uint64_t seed = 100;
    for (enum gates gates = MILD; gates <= CLOSED; gates++)
        for (int64_t i = 0; i < 3; i++) {
            check_segment(shapes[i], 65, gates, seed++);
            check_segment(shapes[i], 200, gates, seed++);
        }
}

/* Heads of a real model, and a key dimension at which the columns of M and B fall into many groups. */
static void test_segment_large_heads(void **state)
{
    (void)state;
    check_segment((struct lr_delta_shape){1, 2, 128, 128}, 97, MILD, 200);
    check_segment((struct lr_delta_shape){1, 1, 300, 200}, 65, MIXED, 201);
    check_segment((struct lr_delta_shape){1, 1, LR_MAX_DELTA_DIM, 24}, 3, MILD, 202);
}

/* The map of no tokens is the identity. */
static void test_empty_segment(void **state)
{
    (void)state;
    check_segment((struct lr_delta_shape){1, 2, 24, 40}, 0, MILD, 210);
}

/* Two segments folded one after the other end where one long segment ends. */
static void test_segments_compose(void **state)
{
    (void)state;
    enum { N = 200 };
    struct lr_delta_shape shape = {2, 4, 24, 40};
    int64_t state_floats = shape.n_v_heads * shape.dk * shape.dv;
    static const int64_t cuts[] = {1, 64, 77, 128, 199};
    struct segment whole = take_segment(shape, N, MILD, 300);
    struct outputs at = place_outputs(shape, N);
    double *truth = take_doubles(at.end), tolerance = 2.0 * segment_tolerance(N, MILD);
    struct lr_delta_segment_args args = segment_args(&whole);
    lr_ref_delta_segment(&args, whole.s_in, truth + at.m, truth + at.b, truth + at.s_out, truth + at.o);
    for (int64_t c = 0; c < COUNT(cuts); c++) {
        struct segment front = whole, back = whole;
        front.n_rows = cuts[c];
        back.n_rows = N - cuts[c];
        back.q += cuts[c] * whole.stride;
        back.k += cuts[c] * whole.stride;
        back.v += cuts[c] * whole.stride;
        back.g += cuts[c] * shape.n_v_heads;
        back.beta += cuts[c] * shape.n_v_heads;
        struct outputs front_at = place_outputs(shape, front.n_rows), back_at = place_outputs(shape, back.n_rows);
        float *x = take((size_t)front_at.end * sizeof *x), *y = take((size_t)back_at.end * sizeof *y);
        run_segment(machine.tables[0], &machine.execs[1], &front, 0, 0, (char *)x);
        back.s_in = x + front_at.s_out;
        run_segment(machine.tables[0], &machine.execs[1], &back, 0, 0, (char *)y);
        int64_t width = shape.n_v_heads * shape.dv;
        check_close(y + back_at.s_out, 1, truth + at.s_out, state_floats, 1, tolerance, tolerance);
        check_close(x + front_at.o, front_at.o_stride, truth + at.o, front.n_rows, width, tolerance, tolerance);
        check_close(y + back_at.o, back_at.o_stride, truth + at.o + front.n_rows * width, back.n_rows, width, tolerance,
                    tolerance);
        free(x);
        free(y);
    }
    free(truth);
    free_segment(&whole);
}

/* ---- fold alone ---- */

static void run_fold(const struct lr_kernel_ops *ops,
                     const struct lr_exec *exec,
                     const void *context,
                     int64_t first,
                     int64_t n,
                     char *out)
{
    (void)first;
    (void)n;
    struct lr_delta_fold_args args = *(const struct lr_delta_fold_args *)context;
    args.s_out = (float *)out;
    ops->delta_fold(exec, &args);
}

static void test_fold(void **state)
{
    (void)state;
    uint64_t seed = 400;
    static const struct lr_delta_shape fold_shapes[] = {
        {1, 1, 1, 1}, {1, 1, 16, 16}, {2, 4, 24, 40}, {1, 3, 40, 7}, {1, 2, 128, 130}, {1, 1, 300, 24},
    };
    for (int64_t i = 0; i < COUNT(fold_shapes); i++) {
        struct lr_delta_shape s = fold_shapes[i];
        int64_t n = s.n_v_heads * s.dk * s.dv;
        float *m = take_floats(s.n_v_heads * s.dk * s.dk, 1.0f, &seed), *b = take_floats(n, 1.0f, &seed);
        float *s_in = take_floats(n, 1.0f, &seed), *before = take_floats(n, 1.0f, &seed);
        double *truth = take_doubles(n);
        struct lr_delta_fold_args args = {s, m, b, s_in, NULL};
        lr_ref_delta_fold(&args, truth);
        float *out = (float *)run_everywhere(run_fold, &args, 0, WHOLE, before, (size_t)n * sizeof *out);
        check_close(out, s.dv, truth, s.n_v_heads * s.dk, s.dv, 0x1p-24, 0x1p-24 * (double)s.dk);
        free(m);
        free(b);
        free(s_in);
        free(before);
        free(truth);
        free(out);
    }
}

/* ---- steps ---- */

struct step_context {
    const struct segment *tokens; /* one token of each row's sequence */
    int64_t o_stride;
};

/* out: the rows' states, then o */
static void run_step(const struct lr_kernel_ops *ops,
                     const struct lr_exec *exec,
                     const void *context,
                     int64_t first,
                     int64_t n,
                     char *out)
{
    const struct step_context *c = context;
    const struct segment *s = c->tokens;
    int64_t state_floats = s->shape.n_v_heads * s->shape.dk * s->shape.dv;
    float **states = take((size_t)n * sizeof *states);
    for (int64_t i = 0; i < n; i++)
        states[i] = (float *)out + (first + i) * state_floats;
    struct lr_delta_step_args args = {.shape = s->shape,
                                      .q = s->q + first * s->stride,
                                      .k = s->k + first * s->stride,
                                      .v = s->v + first * s->stride,
                                      .qkv_stride = s->stride,
                                      .g = s->g + first * s->shape.n_v_heads,
                                      .beta = s->beta + first * s->shape.n_v_heads,
                                      .states = states,
                                      .o = (float *)out + s->n_rows * state_floats + first * c->o_stride,
                                      .o_stride = c->o_stride,
                                      .n_rows = n};
    ops->delta_step(exec, &args);
    free(states);
}

static void check_step(struct lr_delta_shape shape, int64_t n_rows, enum gates gates, uint64_t seed)
{
    struct segment s = take_segment(shape, n_rows, gates, seed);
    int64_t width = shape.n_v_heads * shape.dv, state_floats = width * shape.dk, o_stride = width + 3;
    int64_t total = n_rows * state_floats;
    float *before = take_floats(total + n_rows * o_stride, 1.0f, &seed);
    double *states_truth = take_doubles(total), *o_truth = take_doubles(n_rows * width);
    float **states = take((size_t)n_rows * sizeof *states);
    for (int64_t i = 0; i < n_rows; i++)
        states[i] = before + i * state_floats;
    struct lr_delta_step_args args = {.shape = shape,
                                      .q = s.q,
                                      .k = s.k,
                                      .v = s.v,
                                      .qkv_stride = s.stride,
                                      .g = s.g,
                                      .beta = s.beta,
                                      .states = states,
                                      .n_rows = n_rows};
    lr_ref_delta_step(&args, states_truth, o_truth);
    struct step_context context = {&s, o_stride};
    float *out = (float *)run_everywhere(run_step, &context, n_rows, ROWS, before,
                                         (size_t)(total + n_rows * o_stride) * sizeof *out);
    double tolerance = 0x1p-24 * (4.0 + sqrt((double)shape.dk));
    check_close(out, state_floats, states_truth, n_rows, state_floats, tolerance, tolerance);
    check_close(out + total, o_stride, o_truth, n_rows, width, tolerance, tolerance);
    check_gaps(before + total, out + total, n_rows, width, o_stride);
    free_segment(&s);
    free(before);
    free(states);
    free(states_truth);
    free(o_truth);
    free(out);
}

static void test_step(void **state)
{
    (void)state;
    static const int64_t row_counts[] = {1, 13, 97};
    uint64_t seed = 500;
    for (int64_t i = 0; i < COUNT(shapes); i++)
        for (int64_t j = 0; j < COUNT(row_counts); j++)
            check_step(shapes[i], row_counts[j], (enum gates)(seed % 5), seed), seed++;
    check_step((struct lr_delta_shape){2, 4, 128, 128}, 2, MILD, seed++);
    check_step((struct lr_delta_shape){1, 1, LR_MAX_DELTA_DIM, 40}, 1, MILD, seed++);
}

/* Token by token the state goes where the segment goes. */
static void test_steps_follow_segment(void **state)
{
    (void)state;
    enum { N = 200 };
    struct lr_delta_shape shape = {2, 4, 24, 40};
    int64_t width = shape.n_v_heads * shape.dv, state_floats = width * shape.dk;
    struct segment s = take_segment(shape, N, MIXED, 600);
    struct outputs at = place_outputs(shape, N);
    double *truth = take_doubles(at.end);
    struct lr_delta_segment_args args = segment_args(&s);
    lr_ref_delta_segment(&args, s.s_in, truth + at.m, truth + at.b, truth + at.s_out, truth + at.o);
    float *step_state = take((size_t)state_floats * sizeof *step_state), *o = take((size_t)(N * width) * sizeof *o);
    memcpy(step_state, s.s_in, (size_t)state_floats * sizeof *step_state);
    for (int64_t t = 0; t < N; t++) {
        struct lr_delta_step_args step = {.shape = shape,
                                          .q = s.q + t * s.stride,
                                          .k = s.k + t * s.stride,
                                          .v = s.v + t * s.stride,
                                          .qkv_stride = s.stride,
                                          .g = s.g + t * shape.n_v_heads,
                                          .beta = s.beta + t * shape.n_v_heads,
                                          .states = &step_state,
                                          .o = o + t * width,
                                          .o_stride = width,
                                          .n_rows = 1};
        machine.tables[0]->delta_step(&machine.execs[0], &step);
    }
    double tolerance = 0x1p-24 * (8.0 + sqrt((double)N));
    check_close(step_state, 1, truth + at.s_out, state_floats, 1, tolerance, tolerance);
    check_close(o, width, truth + at.o, N, width, tolerance, tolerance);
    free_segment(&s);
    free(truth);
    free(step_state);
    free(o);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_segment),
        cmocka_unit_test(test_segment_gates),
        cmocka_unit_test(test_segment_large_heads),
        cmocka_unit_test(test_empty_segment),
        cmocka_unit_test(test_segments_compose),
        cmocka_unit_test(test_fold),
        cmocka_unit_test(test_step),
        cmocka_unit_test(test_steps_follow_segment),
    };
    return cmocka_run_group_tests(tests, open_machine, close_machine);
}
