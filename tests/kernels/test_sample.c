/* Sampling: the plain way with a full sort in float64 chooses the same tokens, every instruction set agrees, and the
 * frequencies are the probabilities. */
#include "kernels/sample.h"
#include "tests/kernels/common.h"

#include <float.h>

/* ---- the plain way ---- */

static const float *sorted_logits;

static int by_falling_logit(const void *a, const void *b)
{
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    if (sorted_logits[x] != sorted_logits[y])
        return sorted_logits[x] > sorted_logits[y] ? -1 : 1;
    return x < y ? -1 : x > y;
}

/* Ids in the order of choice, the weight of each, how many are kept, and their sum. Finite largest logit. */
struct plain {
    int32_t *ids;
    double *weights, kept;
    int64_t n_kept;
};

static struct plain sort_row(const float *logits, int64_t vocab, const struct lr_sampling *s)
{
    struct plain p = {take((size_t)vocab * sizeof *p.ids), take_doubles(vocab), 0.0, 0};
    for (int64_t i = 0; i < vocab; i++)
        p.ids[i] = (int32_t)i;
    sorted_logits = logits;
    qsort(p.ids, (size_t)vocab, sizeof *p.ids, by_falling_logit);
    int64_t n = s->top_k > 0 && s->top_k < vocab ? s->top_k : vocab;
    double total = 0.0, scale = 1.0 / (double)s->temperature;
    for (int64_t i = 0; i < n; i++)
        total += p.weights[i] = exp(((double)logits[p.ids[i]] - (double)logits[p.ids[0]]) * scale);
    while (p.n_kept < n && (p.n_kept == 0 || p.kept < (double)s->top_p * total))
        p.kept += p.weights[p.n_kept++];
    return p;
}

static void free_plain(struct plain *p)
{
    free(p->ids);
    free(p->weights);
}

static int32_t plain_choice(const struct plain *p, double uniform)
{
    double target = uniform * p->kept, sum = 0.0;
    for (int64_t i = 0; i < p->n_kept; i++)
        if (target < (sum += p->weights[i]))
            return p->ids[i];
    return p->ids[p->n_kept - 1];
}

/* ---- running the slot ---- */

struct rows {
    const float *logits;
    int64_t n_rows, vocab;
    const struct lr_sampling *sampling;
    const int64_t *positions;
};

static void run_sample(const struct lr_kernel_ops *ops,
                       const struct lr_exec *exec,
                       const void *context,
                       int64_t first,
                       int64_t n,
                       char *out)
{
    const struct rows *r = context;
    struct lr_sample_args args = {.logits = r->logits + first * r->vocab,
                                  .n_rows = n,
                                  .vocab = r->vocab,
                                  .sampling = r->sampling + first,
                                  .positions = r->positions + first,
                                  .ids = (int32_t *)out + first};
    ops->sample(exec, &args);
}

/* The same from every table, pool and division; the caller frees. */
static int32_t *sample_everywhere(const struct rows *r)
{
    size_t size = (size_t)r->n_rows * sizeof(int32_t);
    char *before = take(size);
    memset(before, 0x77, size);
    char *out = run_everywhere(run_sample, r, r->n_rows, ROWS, before, size);
    free(before);
    return (int32_t *)out;
}

/* One row at many positions, by one table. */
static void
sample_positions(const float *logits, int64_t vocab, const struct lr_sampling *sampling, int64_t n, int32_t *ids)
{
    const struct lr_kernel_ops *ops = machine.tables[machine.n_tables - 1];
    for (int64_t i = 0; i < n; i++) {
        struct lr_sample_args args = {logits, 1, vocab, sampling, &i, ids + i};
        ops->sample(&machine.execs[0], &args);
    }
}

/* ---- against the plain way ---- */

enum logits { BELL, FLAT, EQUAL, COARSE, STEEP, MASKED, N_LOGITS };

static void fill_row(float *x, int64_t n, enum logits kind, uint64_t *seed)
{
    for (int64_t i = 0; i < n; i++) {
        float bell = next_float(seed) + next_float(seed) + next_float(seed) + next_float(seed);
        uint64_t dice = next_bits(seed);
        x[i] = kind == BELL     ? 6.0f * bell
               : kind == FLAT   ? 1e-5f * bell
               : kind == EQUAL  ? -2.5f
               : kind == COARSE ? rintf(3.0f * bell) /* ties, and both zeros */
               : kind == STEEP  ? (i == n / 2 ? 90.0f : 20.0f * bell)
                                : (dice % 50 == 0 || i == n - 1 ? bell : -INFINITY);
    }
}

static const float temperatures[] = {1e-30f, 0.05f, 0.7f, 1.0f, 1.5f, 100.0f, 1e30f};
static const float top_ps[] = {0.0f, 0.1f, 0.8f, 0.95f, 0.999f, 1.0f};
static const int32_t top_ks[] = {0, 1, 2, 20, 1000, INT32_MAX};

/* One row of logits, sampled in every way. */
static void check_against_sort(int64_t vocab, enum logits kind, uint64_t seed)
{
    enum { WAYS = COUNT(temperatures) * COUNT(top_ps) * COUNT(top_ks) };
    float *row = take((size_t)vocab * sizeof *row), *logits = take((size_t)(WAYS * vocab) * sizeof *logits);
    struct lr_sampling sampling[WAYS];
    int64_t positions[WAYS];
    fill_row(row, vocab, kind, &seed);
    for (int i = 0; i < WAYS; i++) {
        memcpy(logits + i * vocab, row, (size_t)vocab * sizeof *row);
        sampling[i] = (struct lr_sampling){.temperature = temperatures[i % COUNT(temperatures)],
                                           .top_p = top_ps[i / COUNT(temperatures) % COUNT(top_ps)],
                                           .top_k = top_ks[i / COUNT(temperatures) / COUNT(top_ps)],
                                           .seed = next_bits(&seed)};
        positions[i] = (int64_t)(next_bits(&seed) >> 40);
    }
    struct rows r = {logits, WAYS, vocab, sampling, positions};
    int32_t *ids = sample_everywhere(&r);
    for (int i = 0; i < WAYS; i++) {
        struct plain p = sort_row(row, vocab, &sampling[i]);
        int32_t want = plain_choice(&p, lr_sample_uniform(sampling[i].seed, positions[i]));
        if (ids[i] != want)
            fail_msg("vocabulary %lld, logits %d, temperature %g, top_k %d, top_p %g: %d, by sorting %d",
                     (long long)vocab, (int)kind, (double)sampling[i].temperature, sampling[i].top_k,
                     (double)sampling[i].top_p, ids[i], want);
        free_plain(&p);
    }
    free(ids);
    free(row);
    free(logits);
}

static void test_against_sort(void **state)
{
    (void)state;
    static const int64_t vocabs[] = {1, 2, 7, 100, 777, 4099};
    uint64_t seed = 1;
    for (int64_t i = 0; i < COUNT(vocabs); i++)
        for (int kind = 0; kind < N_LOGITS; kind++)
            check_against_sort(vocabs[i], (enum logits)kind, seed++);
}

/* ---- frequencies ---- */

/* Pearson's statistic of n draws at positions 0 .. n-1 against the probabilities; what was not kept is never drawn. */
static double chi_square(const float *logits, int64_t vocab, const struct lr_sampling *s, int64_t n, int64_t *n_kept)
{
    int32_t *ids = take((size_t)n * sizeof *ids);
    int64_t *counts = calloc((size_t)vocab, sizeof *counts), counted = 0;
    struct plain p = sort_row(logits, vocab, s);
    double statistic = 0.0;
    sample_positions(logits, vocab, s, n, ids);
    for (int64_t i = 0; i < n; i++)
        counts[ids[i]]++;
    for (int64_t i = 0; i < p.n_kept; i++) {
        double expected = (double)n * p.weights[i] / p.kept, off = (double)counts[p.ids[i]] - expected;
        assert_true(expected > 20.0); /* or the statistic means nothing */
        statistic += off * off / expected;
        counted += counts[p.ids[i]];
    }
    assert_int_equal(counted, n);
    *n_kept = p.n_kept;
    free_plain(&p);
    free(counts);
    free(ids);
    return statistic;
}

static void test_frequencies(void **state)
{
    (void)state;
    enum { VOCAB = 40, DRAWS = 60000 };
    static const struct lr_sampling ways[] = {
        {.temperature = 1.0f, .top_p = 1.0f, .seed = 1},
        {.temperature = 2.5f, .top_p = 1.0f, .seed = 2},
        {.temperature = 1.0f, .top_k = 7, .top_p = 1.0f, .seed = 3},
        {.temperature = 1.0f, .top_p = 0.8f, .seed = 4},
        {.temperature = 1.3f, .top_k = 20, .top_p = 0.9f, .seed = 5},
    };
    uint64_t seed = 99;
    float *logits = take_floats(VOCAB, 2.0f, &seed);
    for (int i = 0; i < 6; i++)
        logits[3 * i + 5] = 0.5f; /* ties */
    for (int64_t i = 0; i < COUNT(ways); i++) {
        int64_t n_kept;
        double statistic = chi_square(logits, VOCAB, &ways[i], DRAWS, &n_kept), freedom = (double)n_kept - 1.0;
        /* mean `freedom`, variance twice that: five deviations, on both sides where there is another side */
        if (fabs(statistic - freedom) > 5.0 * sqrt(2.0 * freedom))
            fail_msg("way %lld: chi-square %.1f with %.0f degrees of freedom", (long long)i, statistic, freedom);
    }
    free(logits);
}

/* ---- edges ---- */

/* The largest first, ties to the lower id, whatever the zeros' signs: greedy, top_k 1, top_p 0, hardly any heat. */
static void test_the_largest(void **state)
{
    (void)state;
    static const struct lr_sampling ways[] = {{.temperature = 0.0f, .top_p = 1.0f, .seed = 1},
                                              {.temperature = -1.0f, .top_p = 1.0f, .seed = 1},
                                              {.temperature = 5.0f, .top_k = 1, .top_p = 1.0f, .seed = 2},
                                              {.temperature = 5.0f, .top_p = 0.0f, .seed = 3},
                                              {.temperature = 1e-45f, .top_k = 1, .top_p = 1.0f, .seed = 4}};
    enum { VOCAB = 1001, ROWS_HERE = 64 };
    float *logits = take(sizeof(float) * ROWS_HERE * VOCAB);
    int32_t want[ROWS_HERE];
    for (int64_t t = 0; t < ROWS_HERE; t++) {
        for (int64_t i = 0; i < VOCAB; i++)
            logits[t * VOCAB + i] = t % 3 == 0 ? -1.0f : t % 3 == 1 ? -INFINITY : -FLT_MAX;
        want[t] = (int32_t)(t * 15);
        logits[t * VOCAB + want[t]] = t % 2 == 0 ? -0.0f : 0.0f;
        logits[t * VOCAB + want[t] + 3] = t % 2 == 0 ? 0.0f : -0.0f;
    }
    for (int64_t w = 0; w < COUNT(ways); w++) {
        struct lr_sampling sampling[ROWS_HERE];
        int64_t positions[ROWS_HERE];
        for (int64_t t = 0; t < ROWS_HERE; t++) {
            sampling[t] = ways[w];
            positions[t] = t;
        }
        struct rows r = {logits, ROWS_HERE, VOCAB, sampling, positions};
        int32_t *ids = sample_everywhere(&r);
        for (int64_t t = 0; t < ROWS_HERE; t++)
            assert_int_equal(ids[t], want[t]);
        free(ids);
    }
    free(logits);
}

/* The widest row: equal logits are drawn evenly from end to end, whichever token the goal falls on. */
static void test_widest_row(void **state)
{
    (void)state;
    enum { DRAWS = 12 };
    float *logits = calloc(LR_MAX_VOCAB, sizeof *logits);
    const struct lr_sampling sampling = {.temperature = 1.0f, .top_p = 1.0f, .seed = 6};
    int32_t ids[DRAWS];
    sample_positions(logits, LR_MAX_VOCAB, &sampling, DRAWS, ids);
    for (int64_t i = 0; i < DRAWS; i++)
        assert_int_equal(ids[i], (int64_t)(lr_sample_uniform(6, i) * (double)LR_MAX_VOCAB));
    free(logits);
}

/* A NaN anywhere, or an infinite largest logit, gives -1; its neighbours notice nothing. */
static void test_no_numbers(void **state)
{
    (void)state;
    enum { N = 8, VOCAB = 300 };
    static const int bad[N] = {0, 1, 1, 0, 1, 1, 1, 0};
    uint64_t seed = 8;
    float *logits = take_floats(N * VOCAB, 3.0f, &seed);
    logits[1 * VOCAB + 299] = NAN;
    logits[2 * VOCAB] = INFINITY;
    logits[3 * VOCAB + 7] = -INFINITY;
    logits[4 * VOCAB + 150] = -NAN;
    for (int64_t i = 0; i < VOCAB; i++) {
        logits[5 * VOCAB + i] = -INFINITY;
        logits[6 * VOCAB + i] = NAN;
    }
    for (int way = 0; way < 4; way++) {
        struct lr_sampling sampling[N];
        int64_t positions[N];
        for (int64_t t = 0; t < N; t++) {
            sampling[t] = (struct lr_sampling){.temperature = way == 0 ? 0.0f : 1.0f,
                                               .top_k = way == 2 ? 5 : 0,
                                               .top_p = way == 3 ? 0.5f : 1.0f,
                                               .seed = 1};
            positions[t] = t;
        }
        struct rows r = {logits, N, VOCAB, sampling, positions};
        int32_t *ids = sample_everywhere(&r);
        for (int64_t t = 0; t < N; t++)
            assert_int_equal(ids[t] == -1, bad[t]);
        free(ids);
    }
    free(logits);
}

/* ---- the arithmetic ---- */

static void test_weights(void **state)
{
    (void)state;
    for (int64_t i = 0; i <= 400000; i++) {
        double x = -40.0 * (double)i / 400000.0;
        double off = (double)((long double)lr_sample_weight(x) - expl((long double)x) * 0x1p44L);
        assert_true(fabs(off) < 0.7);
    }
    assert_true(lr_sample_weight(0.0) == (uint64_t)1 << 44);
    assert_true(lr_sample_weight(-INFINITY) == 0 && lr_sample_weight((double)NAN) == 0);
}

/* Keys ascend where logits fall, and give the logit back. */
static void test_keys(void **state)
{
    (void)state;
    static const float falling[] = {NAN,   INFINITY, FLT_MAX, 2.0f,     1.0f,     1e-45f,
                                    -0.0f, -1e-45f,  -1.0f,   -FLT_MAX, -INFINITY};
    assert_int_equal(lr_sample_key(0.0f), lr_sample_key(-0.0f));
    assert_int_equal(lr_sample_key(-NAN), 0);
    for (int64_t i = 1; i < COUNT(falling); i++) {
        assert_true(lr_sample_key(falling[i - 1]) < lr_sample_key(falling[i]));
        assert_true(lr_sample_logit(lr_sample_key(falling[i])) == falling[i]);
    }
}

/* Texts and planted needles depend on these numbers: they must not change. */
static void test_random_numbers(void **state)
{
    (void)state;
    assert_true(lr_sample_uniform(0, 0) == 0x1.2086089bfcf34p-2);
    assert_true(lr_sample_uniform(1, 1000000) == 0x1.4158df8c341f4p-3);
    assert_true(lr_sample_uniform(0xffffffffffffffffu, 123456789012) == 0x1.d4215e97ddf5ep-2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_sort), cmocka_unit_test(test_frequencies),    cmocka_unit_test(test_the_largest),
        cmocka_unit_test(test_widest_row),   cmocka_unit_test(test_no_numbers),     cmocka_unit_test(test_weights),
        cmocka_unit_test(test_keys),         cmocka_unit_test(test_random_numbers),
    };
    return cmocka_run_group_tests(tests, open_machine, close_machine);
}
