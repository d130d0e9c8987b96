/* sample: the token is the CPU's, for every row of many thousand. */
#include "base/pool.h"
#include "kernels/cpu/cpu.h"
#include "tests/kernels/cuda/check.h"

static struct lr_exec cpu_exec;

enum logits { BELL, FLAT, EQUAL, COARSE, STEEP, MASKED, N_LOGITS };

/* What a head may give: bell-shaped, all alike, equal, many ties, one token far ahead, most of them forbidden. */
static void fill_row(float *x, int64_t n, enum logits kind, uint64_t *seed)
{
    for (int64_t i = 0; i < n; i++) {
        float bell = 0.0f;
        for (int j = 0; j < 6; j++)
            bell += (float)(int64_t)(check_bits(seed) >> 40) * 1.1920929e-7f - 1.0f;
        uint64_t dice = check_bits(seed);
        x[i] = kind == BELL     ? 4.0f * bell
               : kind == FLAT   ? 1e-5f * bell
               : kind == EQUAL  ? 2.5f
               : kind == COARSE ? (float)(int)(3.0f * bell)
               : kind == STEEP  ? (i == n / 2 ? 90.0f : 20.0f * bell)
                                : (dice % 50 == 0 || i == n - 1 ? bell : -INFINITY);
    }
}

static struct lr_sampling any_sampling(uint64_t *seed)
{
    static const float temperatures[] = {0.0f, 1e-30f, 0.05f, 0.7f, 1.0f, 1.5f, 100.0f, 1e30f};
    static const float top_ps[] = {0.0f, 0.1f, 0.8f, 0.95f, 0.999999f, 1.0f, 1.0f};
    static const int32_t top_ks[] = {0, 0, 1, 2, 20, 50, 1000, 100000, INT32_MAX};
    return (struct lr_sampling){.temperature = temperatures[check_bits(seed) % CHECK_COUNT(temperatures)],
                                .top_p = top_ps[check_bits(seed) % CHECK_COUNT(top_ps)],
                                .top_k = top_ks[check_bits(seed) % CHECK_COUNT(top_ks)],
                                .seed = check_bits(seed)};
}

/* n_draws calls with fresh choices of how to sample, and fresh random numbers, for the same n_rows of logits. */
static void compare(int64_t n_rows, int64_t vocab, int n_draws, uint64_t seed)
{
    float *logits = check_host((size_t)(n_rows * vocab) * sizeof *logits);
    struct lr_sampling *sampling = check_host((size_t)n_rows * sizeof *sampling);
    int64_t *positions = check_host((size_t)n_rows * sizeof *positions);
    int32_t *want = check_host((size_t)n_rows * sizeof *want), *got = check_host((size_t)n_rows * sizeof *got);
    for (int64_t t = 0; t < n_rows; t++)
        fill_row(logits + t * vocab, vocab, (enum logits)(t % N_LOGITS), &seed);
    float *device_logits = check_device_copy(logits, (size_t)(n_rows * vocab) * sizeof *logits);
    int32_t *device_ids = check_device((size_t)n_rows * sizeof *want);
    struct lr_sample_args args = {.n_rows = n_rows, .vocab = vocab, .sampling = sampling, .positions = positions};
    for (int draw = 0; draw < n_draws; draw++) {
        for (int64_t t = 0; t < n_rows; t++) {
            sampling[t] = any_sampling(&seed);
            positions[t] = (int64_t)(check_bits(&seed) >> 40);
        }
        args.logits = logits;
        args.ids = want;
        lr_sample_c(&cpu_exec, &args);
        args.logits = device_logits;
        args.ids = device_ids;
        check_poison(device_ids, (size_t)n_rows * sizeof *want);
        lr_cuda_sample(&check.exec, &args);
        check_download(got, device_ids, (size_t)n_rows * sizeof *got);
        for (int64_t t = 0; t < n_rows; t++) {
            const struct lr_sampling *s = &sampling[t];
            if (got[t] != want[t] && check.n_wrong < 20)
                printf("  row %lld of %lld x %lld: %d, the CPU %d (temperature %g, top_k %d, top_p %g)\n", (long long)t,
                       (long long)n_rows, (long long)vocab, got[t], want[t], (double)s->temperature, s->top_k,
                       (double)s->top_p);
            check_that(got[t] == want[t], "a token", t);
        }
    }
}

/* `all`, or the few of a short run */
static int count(int all, int few)
{
    return test_is_short() ? few : all;
}

static void small_vocabularies(void)
{
    static const int64_t vocabs[] = {1, 2, 7, 31, 100, 776, 1025, 4099};
    for (int i = 0; i < CHECK_COUNT(vocabs); i++) {
        compare(count(65, N_LOGITS), vocabs[i], count(40, 2), (uint64_t)i + 1);
        check_end();
    }
}

static void one_row(void)
{
    for (int i = 0; i < N_LOGITS; i++) {
        compare(1, 32001, count(50, 1), (uint64_t)i + 100);
        check_end();
    }
}

static void large_vocabulary(void)
{
    compare(count(32, 2), 151936, count(12, 1), 200);
}

static void largest_vocabulary(void)
{
    compare(count(6, 1), 262144, count(6, 1), 300);
    check_end();
    compare(count(6, 1), LR_MAX_VOCAB, count(3, 1), 301);
}

/* NaN anywhere, or an infinite largest logit: -1, in every way of sampling; the rows beside it are untouched. */
static void no_numbers(void)
{
    enum { ROWS = 8, VOCAB = 1000 };
    uint64_t seed = 400;
    float *logits = check_floats(ROWS * VOCAB, 3.0f, 0, &seed);
    logits[1 * VOCAB + 777] = NAN;
    logits[2 * VOCAB] = INFINITY;
    logits[4 * VOCAB + 5] = -NAN;
    logits[6 * VOCAB + 999] = -INFINITY;
    for (int64_t i = 0; i < VOCAB; i++)
        logits[5 * VOCAB + i] = -INFINITY;
    static const int bad[ROWS] = {0, 1, 1, 0, 1, 1, 0, 0};
    float *device_logits = check_device_copy(logits, sizeof(float) * ROWS * VOCAB);
    int32_t *device_ids = check_device(sizeof(int32_t) * ROWS), want[ROWS], got[ROWS];
    for (int way = 0; way < 4; way++) {
        struct lr_sampling sampling[ROWS];
        int64_t positions[ROWS];
        for (int t = 0; t < ROWS; t++) {
            sampling[t] = (struct lr_sampling){.temperature = way == 0 ? 0.0f : 1.0f,
                                               .top_k = way == 2 ? 5 : 0,
                                               .top_p = way == 3 ? 0.5f : 1.0f,
                                               .seed = seed};
            positions[t] = t;
        }
        struct lr_sample_args args = {logits, ROWS, VOCAB, sampling, positions, want};
        lr_sample_c(&cpu_exec, &args);
        args.logits = device_logits;
        args.ids = device_ids;
        lr_cuda_sample(&check.exec, &args);
        check_download(got, device_ids, sizeof got);
        for (int t = 0; t < ROWS; t++) {
            check_that(got[t] == want[t], "a token beside nonsense", t);
            check_that((got[t] == -1) == bad[t], "nonsense is seen", t);
        }
    }
}

/* Inside a unit, launched again with other numbers. */
static void in_a_unit(void)
{
    enum { ROWS = 32, VOCAB = 5000 };
    uint64_t seed = 500;
    struct lr_error err;
    float *logits = check_floats(ROWS * VOCAB, 6.0f, 0, &seed);
    float *device_logits = check_device_copy(logits, sizeof(float) * ROWS * VOCAB);
    int32_t *device_ids = check_device(sizeof(int32_t) * ROWS), want[ROWS], got[ROWS];
    for (int step = 0; step < count(20, 3); step++) {
        struct lr_sampling sampling[ROWS];
        int64_t positions[ROWS];
        for (int t = 0; t < ROWS; t++) {
            sampling[t] = (struct lr_sampling){.temperature = 1.0f, .top_p = 0.9f, .seed = 7};
            positions[t] = step;
        }
        struct lr_sample_args args = {logits, ROWS, VOCAB, sampling, positions, want};
        lr_sample_c(&cpu_exec, &args);
        args.logits = device_logits;
        args.ids = device_ids;
        lr_cuda_unit_begin(&check.exec);
        lr_cuda_sample(&check.exec, &args);
        check_ok(lr_cuda_unit_end(&check.exec, &err), &err);
        check_download(got, device_ids, sizeof got);
        for (int t = 0; t < ROWS; t++)
            check_that(got[t] == want[t], "a token of a unit", step);
    }
}

static const struct check_case cases[] = {
    {"small vocabularies", small_vocabularies},      {"one row", one_row},       {"32 x 151,936", large_vocabulary},
    {"262,144 and the largest", largest_vocabulary}, {"no numbers", no_numbers}, {"in a unit", in_a_unit},
};

int main(void)
{
    struct lr_error err;
    if (lr_pool_create(4, 0, &cpu_exec.pool, &err) != LR_OK) {
        printf("%s\n", err.message);
        return 1;
    }
    int code = check_main(cases, CHECK_COUNT(cases));
    lr_pool_destroy(cpu_exec.pool);
    return code;
}
