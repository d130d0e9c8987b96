/* The chunked recurrence: both rules against float64 token by token, over seams, shapes and decays; that bits belong to
 * a sequence alone; and the delta slots, folds and steps. */
#include "kernels/cuda/recurrence.h"
#include "kernels/ref.h"
#include "tests/kernels/cuda/check.h"
#include <float.h>

/* How the tokens forget. */
enum gates { MILD, SLOW, NONE, HARSH, ABRUPT, LOWEST, NO_G };

/* o is rounded once (bf16: 2^-8 at most, less than half of that on average), S wherever it meets k or q. */
static const double TOLERANCE = 6e-3 * (1 << (11 - ACT_DIGITS)) / 8;
static const double PLAIN_TOLERANCE = 4e-3 * (1 << (11 - ACT_DIGITS)) / 8;

struct tokens {
    struct lr_delta_shape shape;
    enum gates gates;
    int64_t n_rows, stride; /* of rows [q | k | v | gap] */
    float *rows, *g, *beta; /* g NULL: no decay */
    void *d_rows, *d_g, *d_beta;
};

static float gate_of(enum gates gates, uint64_t *seed)
{
    uint64_t bits = check_bits(seed);
    float x = (float)(bits >> 40) * 0x1p-24f;
    switch (gates) {
    case MILD:
        return -0.2f * x;
    case SLOW:
        return -1e-6f;
    case HARSH:
        return -100.0f;
    case ABRUPT:
        return bits % 50 == 0 ? -100.0f : bits % 7 == 0 ? 0.0f : -0.05f * x;
    case LOWEST: /* all that float32 holds at its lower end */
        return bits % 40 == 0 ? -INFINITY : bits % 40 == 1 ? -FLT_MAX : bits % 40 == 2 ? -FLT_MIN : -0.05f * x;
    default:
        return 0.0f;
    }
}

static void normalise(float *x, int64_t n, float size)
{
    double sum = 1e-12;
    for (int64_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    for (int64_t i = 0; i < n; i++)
        x[i] = check_from_act(check_to_act((float)((double)x[i] * (double)size / sqrt(sum))));
}

static struct tokens take_tokens(struct lr_delta_shape s, int64_t n_rows, int64_t gap, enum gates gates, uint64_t seed)
{
    int64_t keys = s.n_k_heads * s.dk, n_gates = n_rows * s.n_v_heads;
    struct tokens t = {.shape = s, .gates = gates, .n_rows = n_rows, .stride = 2 * keys + s.n_v_heads * s.dv + gap};
    t.rows = check_floats(n_rows * t.stride, 1.0f, 1, &seed);
    for (int64_t row = 0; row < n_rows; row++)
        for (int64_t h = 0; h < s.n_k_heads; h++) {
            normalise(t.rows + row * t.stride + h * s.dk, s.dk, 1.0f / sqrtf((float)s.dk));
            normalise(t.rows + row * t.stride + keys + h * s.dk, s.dk, 1.0f);
        }
    t.g = check_floats(n_gates, 1.0f, 0, &seed);
    t.beta = check_floats(n_gates, 0.5f, 0, &seed);
    for (int64_t i = 0; i < n_gates; i++) {
        t.g[i] = gate_of(gates, &seed);
        t.beta[i] += 0.5f;
    }
    t.d_rows = check_device_act(t.rows, n_rows * t.stride);
    t.d_g = gates == NO_G ? NULL : check_device_copy(t.g, (size_t)n_gates * 4);
    t.d_beta = check_device_copy(t.beta, (size_t)n_gates * 4);
    return t;
}

/* ---- the truth ---- */

/* Rows [first, end) of one sequence from `state` [n_v_heads, dk, dv] on, which becomes the final one. */
static void true_sequence(const struct tokens *t,
                          enum lr_recurrence_rule rule,
                          double scale,
                          int64_t first,
                          int64_t end,
                          double *state,
                          double *o)
{
    const struct lr_delta_shape s = t->shape;
    int64_t keys = s.n_k_heads * s.dk;
    double *read = check_host((size_t)s.dv * sizeof *read), *u = check_host((size_t)s.dv * sizeof *u);
    for (int64_t row = first; row < end; row++)
        for (int64_t h = 0; h < s.n_v_heads; h++) {
            const float *q = t->rows + row * t->stride + h / (s.n_v_heads / s.n_k_heads) * s.dk, *k = q + keys;
            const float *v = t->rows + row * t->stride + 2 * keys + h * s.dv;
            double *m = state + h * s.dk * s.dv, *out = o + (row * s.n_v_heads + h) * s.dv;
            double decay = exp((double)t->g[row * s.n_v_heads + h]), beta = (double)t->beta[row * s.n_v_heads + h];
            for (int64_t j = 0; j < s.dv; j++)
                read[j] = out[j] = 0.0;
            for (int64_t i = 0; i < s.dk; i++)
                for (int64_t j = 0; j < s.dv; j++)
                    read[j] += (double)k[i] * (m[i * s.dv + j] *= decay);
            for (int64_t j = 0; j < s.dv; j++)
                u[j] = rule == LR_RECURRENCE_DELTA ? beta * ((double)v[j] - read[j]) : (double)v[j];
            for (int64_t i = 0; i < s.dk; i++)
                for (int64_t j = 0; j < s.dv; j++) {
                    m[i * s.dv + j] += (double)k[i] * u[j];
                    out[j] += scale * (double)q[i] * m[i * s.dv + j];
                }
        }
}

/* ---- one launch ---- */

struct launch {
    const struct tokens *tokens;
    enum lr_recurrence_rule rule;
    float scale;
    int64_t n_sequences, first_row, n_rows; /* of the tokens: first_row and n_rows cut a piece out */
    const int64_t *offsets;                 /* host, or NULL */
    const float *d_s_in;                    /* device, or NULL */
};

struct result {
    void *o, *s_out, *work;
    int64_t o_stride;
    struct lr_recurrence_args args;
};

static struct result run(const struct launch *l)
{
    const struct tokens *t = l->tokens;
    const struct lr_delta_shape s = t->shape;
    int64_t keys = s.n_k_heads * s.dk, gate = l->first_row * s.n_v_heads;
    uint16_t *rows = (uint16_t *)t->d_rows + l->first_row * t->stride;
    struct result r = {.o_stride = s.n_v_heads * s.dv + (t->stride % 8 ? 3 : 8)};
    size_t work_bytes = LR_CUDA(recurrence_work_bytes)(l->rule, s, l->n_rows, l->n_sequences);
    r.work = check_device(work_bytes);
    r.o = check_device((size_t)(l->n_rows * r.o_stride) * 2);
    r.s_out = check_device((size_t)(l->n_sequences * s.n_v_heads * s.dk * s.dv) * 4);
    r.args = (struct lr_recurrence_args){
        .rule = l->rule,
        .shape = s,
        .q = rows,
        .k = rows + keys,
        .v = rows + 2 * keys,
        .q_stride = t->stride,
        .k_stride = t->stride,
        .v_stride = t->stride,
        .g = t->d_g ? (float *)t->d_g + gate : NULL,
        .beta = l->rule == LR_RECURRENCE_DELTA ? (float *)t->d_beta + gate : NULL,
        .scale = l->scale,
        .n_rows = l->n_rows,
        .offsets = l->offsets ? check_device_copy(l->offsets, (size_t)(l->n_sequences + 1) * sizeof(int64_t)) : NULL,
        .n_sequences = l->n_sequences,
        .hopper = lr_cuda_hopper_kernels(&check.exec),
        .work = r.work};
    lr_cuda_note(&check.exec, LR_CUDA(recurrence_prepare)(check.exec.stream, &r.args), "prepare");
    lr_cuda_note(&check.exec,
                 LR_CUDA(recurrence_output)(check.exec.stream, &r.args, l->d_s_in, r.o, r.o_stride, (float *)r.s_out),
                 "output");
    return r;
}

/* Runs one launch from random states and compares o, the final states and, folded with the same states, the summary. */
static void compare(struct lr_delta_shape s,
                    enum lr_recurrence_rule rule,
                    enum gates gates,
                    int64_t n_rows,
                    const int64_t *offsets,
                    int64_t n_sequences,
                    int64_t gap,
                    uint64_t seed)
{
    struct tokens t = take_tokens(s, n_rows, gap, gates, seed);
    int64_t state = s.n_v_heads * s.dk * s.dv, width = s.n_v_heads * s.dv, one[2] = {0, n_rows};
    const int64_t *cuts = offsets ? offsets : one;
    float *s_in = check_floats(n_sequences * state, 1.0f, 0, &seed);
    struct launch l = {&t, rule, 0.7f, n_sequences, 0, n_rows, offsets, NULL};
    l.d_s_in = check_device_copy(s_in, (size_t)(n_sequences * state) * 4);
    struct result r = run(&l);

    double *truth = check_host((size_t)(n_sequences * state) * sizeof *truth);
    double *o = check_host((size_t)(n_rows * width) * sizeof *o);
    for (int64_t i = 0; i < n_sequences * state; i++)
        truth[i] = (double)s_in[i];
    for (int64_t i = 0; i < n_sequences; i++)
        true_sequence(&t, rule, (double)l.scale, cuts[i], cuts[i + 1], truth + i * state, o);
    int tiles = s.dk == s.dv && s.dk % 64 == 0 && s.dk <= 128 && gap % 8 == 0;
    double tolerance = tiles ? TOLERANCE : PLAIN_TOLERANCE;
    check_norm("o", check_download_act(r.o, n_rows * r.o_stride), r.o_stride, o, n_rows, width, tolerance);
    check_norm("the final states", check_download_f32(r.s_out, n_sequences * state), 1, truth, n_sequences * state, 1,
               tolerance);

    int delta = rule == LR_RECURRENCE_DELTA;
    int64_t m_size = delta ? s.n_v_heads * s.dk * s.dk : s.n_v_heads;
    float *d_m = check_device((size_t)(n_sequences * m_size) * 4);
    float *d_b = check_device((size_t)(n_sequences * state) * 4);
    lr_cuda_note(&check.exec, LR_CUDA(recurrence_summary)(check.exec.stream, &r.args, d_m, d_b), "summary");
    float *m = check_download_f32(d_m, n_sequences * m_size), *b = check_download_f32(d_b, n_sequences * state);
    float *folded = check_host((size_t)(n_sequences * state) * sizeof *folded);
    for (int64_t i = 0; i < n_sequences * state; i++) {
        int64_t head = i / (s.dk * s.dv), row = i / s.dv % s.dk, column = i % s.dv;
        double x = (double)b[i];
        if (delta)
            for (int64_t k = 0; k < s.dk; k++)
                x += (double)m[(head * s.dk + row) * s.dk + k] * (double)s_in[(head * s.dk + k) * s.dv + column];
        else
            x += (double)m[head] * (double)s_in[i];
        folded[i] = (float)x;
    }
    check_norm("the summary, folded", folded, 1, truth, n_sequences * state, 1, tolerance);
}

static const enum lr_recurrence_rule DELTA = LR_RECURRENCE_DELTA, DECAY = LR_RECURRENCE_DECAY;

static const struct lr_delta_shape small = {1, 2, 64, 64}, large = {1, 2, 128, 128};

static void lengths(enum lr_recurrence_rule rule, struct lr_delta_shape shape)
{
    static const int64_t n_rows[] = {1, 65, 1025, 2, 63, 64, 200, 1023, 1024, 2200};
    for (int i = 0; i < CASES_TO_RUN(n_rows, 3); i++)
        compare(shape, rule, MILD, n_rows[i], NULL, 1, 8, 100 + (uint64_t)i);
}

static void delta_lengths_64(void)
{
    lengths(DELTA, small);
}

static void delta_lengths_128(void)
{
    lengths(DELTA, large);
}

static void decay_lengths_64(void)
{
    lengths(DECAY, small);
}

static void decay_lengths_128(void)
{
    lengths(DECAY, large);
}

static void decays(enum lr_recurrence_rule rule)
{
    int64_t n_rows = test_is_short() ? 130 : 1100;
    for (enum gates gates = MILD; gates <= NO_G; gates++) {
        compare(small, rule, gates, n_rows, NULL, 1, 0, 200 + gates);
        compare(large, rule, gates, n_rows, NULL, 1, 0, 300 + gates);
    }
}

static void delta_decays(void)
{
    decays(DELTA);
}

static void decay_decays(void)
{
    decays(DECAY);
}

/* Head counts that choose other sub-segments, with and without shared key heads. */
static void head_counts(void)
{
    compare((struct lr_delta_shape){4, 4, 128, 128}, DELTA, MILD, 130, NULL, 1, 0, 400);
    compare((struct lr_delta_shape){16, 32, 64, 64}, DELTA, MILD, 70, NULL, 1, 0, 403);
    if (test_is_short())
        return;
    compare((struct lr_delta_shape){2, 8, 64, 64}, DELTA, MILD, 2100, NULL, 1, 0, 401);
    compare((struct lr_delta_shape){3, 9, 128, 128}, DECAY, MILD, 2100, NULL, 1, 0, 402);
}

static const int64_t cuts[] = {0, 1, 65, 65, 1089, 1090, 2114, 3140, 3140, 3200};

static void many_sequences(void)
{
    int64_t n = CASES_TO_RUN(cuts, 5) - 1, n_rows = cuts[n];
    compare(small, DELTA, MILD, n_rows, cuts, n, 0, 500);
    compare(small, DECAY, MILD, n_rows, cuts, n, 0, 502);
    if (test_is_short())
        return;
    compare(large, DELTA, MILD, n_rows, cuts, n, 0, 501);
    compare(large, DECAY, MILD, n_rows, cuts, n, 0, 503);
}

/* More sub-segments than a group holds: whole groups, one of a single token, none at all. */
static const int64_t long_cuts[] = {0, 8193, 8193, 8200, 25600, 34000};

static void groups_of_slots(void)
{
    int64_t n = CHECK_COUNT(long_cuts) - 1;
    compare(small, DELTA, MILD, 8193, NULL, 1, 0, 510);
    compare(small, DELTA, MILD, long_cuts[n], long_cuts, n, 0, 511);
    compare(small, DELTA, SLOW, 17500, NULL, 1, 3, 512); /* rows that are not aligned */
    compare(large, DELTA, MILD, 9300, NULL, 1, 0, 513);
    compare((struct lr_delta_shape){2, 8, 64, 64}, DELTA, MILD, 16500, NULL, 1, 0, 514);
}

static void other_shapes(void)
{
    static const struct lr_delta_shape shapes[] = {{1, 2, 32, 32}, {2, 2, 1, 1},    {1, 2, 256, 256},
                                                   {1, 3, 40, 24}, {1, 1, 64, 128}, {1, 1, 128, 64}};
    int64_t n_rows = test_is_short() ? 20 : 300;
    for (int i = 0; i < CHECK_COUNT(shapes); i++) {
        compare(shapes[i], DELTA, MILD, n_rows, NULL, 1, 0, 600 + (uint64_t)i);
        compare(shapes[i], DECAY, MILD, n_rows, NULL, 1, 0, 700 + (uint64_t)i);
    }
    if (test_is_short())
        return;
    compare((struct lr_delta_shape){1, 2, 40, 24}, DELTA, ABRUPT, 3200, cuts, CHECK_COUNT(cuts) - 1, 0, 610);
    compare((struct lr_delta_shape){1, 2, 40, 24}, DECAY, LOWEST, 300, NULL, 1, 0, 612);
    compare(large, DELTA, ABRUPT, 1100, NULL, 1, 3, 611); /* rows that are not aligned */
}

/* A sequence gives the same bytes beside others, alone, and, up to its end, cut short. */
static void
bits_of(enum lr_recurrence_rule rule, struct lr_delta_shape s, const int64_t *ends, int64_t n_sequences, uint64_t seed)
{
    int64_t n_rows = ends[n_sequences];
    struct tokens t = take_tokens(s, n_rows, 0, MILD, seed);
    struct launch together = {&t, rule, 1.0f, n_sequences, 0, n_rows, ends, NULL};
    struct result all = run(&together);
    int64_t state = s.n_v_heads * s.dk * s.dv;
    for (int64_t i = 0; i < n_sequences; i++) {
        struct launch alone = {&t, rule, 1.0f, 1, ends[i], ends[i + 1] - ends[i], NULL, NULL};
        struct result r = run(&alone);
        int64_t width = s.n_v_heads * s.dv;
        char *first = (char *)all.o + ends[i] * all.o_stride * 2;
        for (int64_t row = 0; row < alone.n_rows; row += 511)
            check_same("o alone", first + row * all.o_stride * 2, (char *)r.o + row * r.o_stride * 2,
                       (size_t)width * 2);
        check_same("the final state alone", (char *)all.s_out + i * state * 4, r.s_out, (size_t)state * 4);
        if (alone.n_rows > 100) {
            struct launch cut = alone;
            cut.n_rows = alone.n_rows - 37;
            struct result shorter = run(&cut);
            for (int64_t row = cut.n_rows - 80; row < cut.n_rows; row++)
                check_same("o of fewer rows", (char *)r.o + row * r.o_stride * 2,
                           (char *)shorter.o + row * shorter.o_stride * 2, (size_t)width * 2);
        }
    }
    check_end();
}

static void same_bits(void)
{
    const int64_t n = CHECK_COUNT(cuts) - 1;
    bits_of(DELTA, small, cuts, n, 800);
    bits_of(DELTA, large, cuts, n, 801);
    bits_of(DECAY, small, cuts, n, 802);
    bits_of(DECAY, large, cuts, n, 803);
    bits_of(DELTA, small, long_cuts, CHECK_COUNT(long_cuts) - 1, 804);
}

/* Rows behind element 2^31, behind zeros that leave no state. */
static void far_rows(void)
{
    enum { N = 1 << 20, LAST = 3000 };
    struct lr_delta_shape s = small;
    struct lr_error err;
    struct tokens t = take_tokens(s, LAST, 2304 - 256, MILD, 900);
    size_t row_bytes = (size_t)t.stride * 2, size = (size_t)N * row_bytes;
    int64_t gates = (int64_t)(N - LAST) * s.n_v_heads;
    void *far = NULL;
    check_ok(lr_cuda_memory.reserve(size, &far, &err), &err);
    lr_cuda_memory.copy(&check.exec, (char *)far + (size_t)(N - LAST) * row_bytes, t.d_rows, LAST * row_bytes);
    float *g = check_host((size_t)N * 2 * 4);
    memset(g, 0, (size_t)N * 2 * 4);
    memcpy(g + gates, t.g, (size_t)(LAST * s.n_v_heads) * 4);
    void *d_g = check_device_copy(g, (size_t)N * 2 * 4);
    memcpy(g + gates, t.beta, (size_t)(LAST * s.n_v_heads) * 4);
    struct tokens whole = t;
    whole.n_rows = N;
    whole.d_rows = far;
    whole.d_g = d_g;
    whole.d_beta = check_device_copy(g, (size_t)N * 2 * 4);
    struct launch l = {&whole, DELTA, 1.0f, 1, 0, N, NULL, NULL};
    struct result r = run(&l);
    int64_t width = s.n_v_heads * s.dv;
    double *state = check_host((size_t)(width * s.dk) * sizeof *state),
           *o = check_host((size_t)(LAST * width) * sizeof *o);
    for (int64_t i = 0; i < width * s.dk; i++)
        state[i] = 0.0;
    true_sequence(&t, DELTA, 1.0, 0, LAST, state, o);
    uint16_t *last = (uint16_t *)r.o + (int64_t)(N - LAST) * r.o_stride;
    check_norm("o", check_download_act(last, LAST * r.o_stride), r.o_stride, o, LAST, width, TOLERANCE);
    check_norm("the final state", check_download_f32(r.s_out, width * s.dk), 1, state, width * s.dk, 1, TOLERANCE);
    lr_cuda_memory.release(far, size);
}

/* ---- the slots ---- */

static void segment_slots(void)
{
    struct lr_delta_shape s = {1, 2, 64, 64};
    enum { N = 1100 };
    uint64_t seed = 1000;
    struct tokens t = take_tokens(s, N, 8, SLOW, seed);
    int64_t state = s.n_v_heads * s.dk * s.dv, width = s.n_v_heads * s.dv, keys = s.n_k_heads * s.dk;
    float *s_in = check_floats(state, 1.0f, 0, &seed);
    double *m = check_host((size_t)state * 8), *b = check_host((size_t)state * 8),
           *s_out = check_host((size_t)state * 8);
    double *o = check_host((size_t)(N * width) * 8);
    struct lr_delta_segment_args args = {.shape = s,
                                         .q = t.rows,
                                         .k = t.rows + keys,
                                         .v = t.rows + 2 * keys,
                                         .qkv_stride = t.stride,
                                         .g = t.g,
                                         .beta = t.beta,
                                         .n_rows = N};
    lr_ref_delta_segment(&args, s_in, m, b, s_out, o);
    size_t work_bytes = LR_CUDA(delta_work_floats)(s, N) * 4;
    float *d_m = check_device((size_t)state * 4), *d_b = check_device((size_t)state * 4);
    float *d_out = check_device((size_t)state * 4), *d_in = check_device_copy(s_in, (size_t)state * 4);
    void *d_o = check_device((size_t)(N * width) * 2);
    args.q = t.d_rows;
    args.k = (uint16_t *)t.d_rows + keys;
    args.v = (uint16_t *)t.d_rows + 2 * keys;
    args.g = t.d_g;
    args.beta = t.d_beta;
    args.work = check_device(work_bytes);
    LR_CUDA(delta_summary)(&check.exec, &args, d_m, d_b);
    struct lr_delta_fold_args fold = {s, d_m, d_b, d_in, d_out};
    LR_CUDA(delta_fold)(&check.exec, &fold);
    LR_CUDA(delta_output)(&check.exec, &args, d_in, d_o, width);
    /* of an M that has shrunk chunk after chunk: its relative error grows with the root of their number */
    check_norm("m", check_download_f32(d_m, state), 1, m, state, 1, 4.0 * TOLERANCE);
    check_norm("b", check_download_f32(d_b, state), 1, b, state, 1, TOLERANCE);
    check_norm("s_out", check_download_f32(d_out, state), 1, s_out, state, 1, TOLERANCE);
    check_norm("o", check_download_act(d_o, N * width), width, o, N, width, TOLERANCE);
}

/* No rows: the map is the identity, and there is nothing to write. */
static void empty_segment(void)
{
    static const struct lr_delta_shape shapes[] = {{1, 2, 64, 64}, {1, 2, 128, 128}, {1, 2, 24, 40}};
    for (int i = 0; i < CHECK_COUNT(shapes); i++) {
        struct lr_delta_shape s = shapes[i];
        int64_t m_size = s.n_v_heads * s.dk * s.dk, state = s.n_v_heads * s.dk * s.dv, o_size = s.n_v_heads * s.dv;
        size_t work_bytes = LR_CUDA(delta_work_floats)(s, 0) * sizeof(float);
        struct lr_delta_segment_args args = {.shape = s, .qkv_stride = 1024, .work = check_device(work_bytes)};
        float *d_m = check_device((size_t)m_size * 4), *d_b = check_device((size_t)state * 4);
        float *d_in = check_device((size_t)state * 4);
        uint16_t *o = check_device((size_t)o_size * 2), *untouched = check_device((size_t)o_size * 2);
        LR_CUDA(delta_summary)(&check.exec, &args, d_m, d_b);
        LR_CUDA(delta_output)(&check.exec, &args, d_in, o, o_size);
        float *m = check_download_f32(d_m, m_size), *b = check_download_f32(d_b, state);
        for (int64_t j = 0; j < m_size; j++)
            check_that(m[j] == (j / s.dk % s.dk == j % s.dk ? 1.0f : 0.0f), "m of no rows", j);
        for (int64_t j = 0; j < state; j++)
            check_that(b[j] == 0.0f, "b of no rows", j);
        check_same("o of no rows", o, untouched, (size_t)o_size * 2);
    }
}

static void folds(void)
{
    static const struct lr_delta_shape shapes[] = {{1, 1, 1, 1},     {2, 4, 24, 40}, {1, 3, 40, 7},
                                                   {1, 2, 128, 128}, {4, 4, 64, 64}, {1, 1, 256, 130}};
    uint64_t seed = 1100;
    for (int i = 0; i < CHECK_COUNT(shapes); i++) {
        struct lr_delta_shape s = shapes[i];
        int64_t n = s.n_v_heads * s.dk * s.dv, n_m = s.n_v_heads * s.dk * s.dk;
        struct lr_delta_fold_args args = {s, check_floats(n_m, 1.0f, 0, &seed), check_floats(n, 1.0f, 0, &seed),
                                          check_floats(n, 1.0f, 0, &seed), NULL};
        double *truth = check_host((size_t)n * 8);
        lr_ref_delta_fold(&args, truth);
        args.m = check_device_copy(args.m, (size_t)n_m * 4);
        args.b = check_device_copy(args.b, (size_t)n * 4);
        args.s_in = check_device_copy(args.s_in, (size_t)n * 4);
        args.s_out = check_device((size_t)n * 4);
        LR_CUDA(delta_fold)(&check.exec, &args);
        check_norm("s_out", check_download_f32(args.s_out, n), 1, truth, n, 1, 1e-6);
    }
}

static void steps_of(struct lr_delta_shape s, int64_t n_rows, enum gates gates, uint64_t seed)
{
    struct tokens t = take_tokens(s, n_rows, 3, gates, seed);
    int64_t state = s.n_v_heads * s.dk * s.dv, width = s.n_v_heads * s.dv, keys = s.n_k_heads * s.dk;
    float **states = check_host((size_t)n_rows * sizeof *states),
          **d_states = check_host((size_t)n_rows * sizeof *states);
    for (int64_t i = 0; i < n_rows; i++) {
        states[i] = check_floats(state, 1.0f, 0, &seed);
        d_states[i] = check_device_copy(states[i], (size_t)state * 4);
    }
    struct lr_delta_step_args args = {.shape = s,
                                      .q = t.rows,
                                      .k = t.rows + keys,
                                      .v = t.rows + 2 * keys,
                                      .qkv_stride = t.stride,
                                      .g = t.g,
                                      .beta = t.beta,
                                      .states = states,
                                      .n_rows = n_rows};
    double *truth = check_host((size_t)(n_rows * state) * 8), *o = check_host((size_t)(n_rows * width) * 8);
    lr_ref_delta_step(&args, truth, o);
    args.q = t.d_rows;
    args.k = (uint16_t *)t.d_rows + keys;
    args.v = (uint16_t *)t.d_rows + 2 * keys;
    args.g = t.d_g;
    args.beta = t.d_beta;
    args.states = d_states;
    args.o_stride = width + 3;
    args.o = check_device((size_t)(n_rows * args.o_stride) * 2);
    LR_CUDA(delta_step)(&check.exec, &args);
    for (int64_t i = 0; i < n_rows; i++)
        check_norm("a state", check_download_f32(d_states[i], state), 1, truth + i * state, state, 1, 1e-6);
    check_norm("o", check_download_act(args.o, n_rows * args.o_stride), args.o_stride, o, n_rows, width,
               PLAIN_TOLERANCE);
}

static void steps(void)
{
    steps_of((struct lr_delta_shape){2, 4, 64, 64}, 33, MILD, 1200);
    steps_of((struct lr_delta_shape){2, 4, 128, 128}, 3, ABRUPT, 1201);
    steps_of((struct lr_delta_shape){1, 3, 40, 24}, 5, HARSH, 1202);
    steps_of((struct lr_delta_shape){2, 4, 64, 64}, 33, LOWEST, 1205);
    steps_of((struct lr_delta_shape){1, 2, 256, 256}, 1, NONE, 1203);
    steps_of((struct lr_delta_shape){1, 1, 1, 1}, 2, MILD, 1204);
}

static const struct check_case cases[] = {
    {"steps", steps},
    {"folds", folds},
    {"other shapes, token by token", other_shapes},
    {"scalar decay 64, lengths", decay_lengths_64},
    {"scalar decay 128, lengths", decay_lengths_128},
    {"delta rule 64, lengths", delta_lengths_64},
    {"delta rule 128, lengths", delta_lengths_128},
    {"scalar decay, decays", decay_decays},
    {"delta rule, decays", delta_decays},
    {"head counts", head_counts},
    {"many sequences", many_sequences},
    {"slots of a segment", segment_slots},
    {"slots of no rows", empty_segment},
    {"groups of slots", groups_of_slots},
    {"the same bits", same_bits},
    {"rows behind 2^31 elements", far_rows},
};

int main(void)
{
    return check_main(cases, CASES_TO_RUN(cases, 13));
}
