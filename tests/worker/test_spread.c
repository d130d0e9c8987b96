/* How the queries of a wave that is not full are divided: every query once, and as much to fold for everyone. */
#include "tests/test.h"
#include "worker/layers/attention_ring.h"

enum { MOST_WORKERS = 8 };

struct plan {
    struct lr_spread spread;
    int64_t lent[MOST_WORKERS], borrowed[MOST_WORKERS], first[MOST_WORKERS];
};

static void make_plans(const struct lr_wave *wave, int n_workers, struct plan *plans)
{
    double spare[MOST_WORKERS];
    int64_t amounts[MOST_WORKERS];
    for (int r = 0; r < n_workers; r++) {
        plans[r] = (struct plan){0};
        plans[r].spread =
            (struct lr_spread){.lent = plans[r].lent, .borrowed = plans[r].borrowed, .first = plans[r].first};
        lr_spread_plan(wave, n_workers, r, spare, amounts, &plans[r].spread);
    }
}

/* Keys that the queries of worker r in [first, first + n) of its segment see. */
static double keys_of(const struct lr_wave *wave, int r, int64_t first, int64_t n)
{
    double keys = 0.0;
    for (int64_t i = first; i < first + n; i++)
        keys += (double)(lr_wave_start(wave, r) + i + 1);
    return keys;
}

/* What is lent is what is borrowed; the lent rows follow the kept ones, in the order of who folds them. */
static void check_rows(const struct lr_wave *wave, int n_workers, const struct plan *plans)
{
    for (int r = 0; r < n_workers; r++) {
        int64_t row = plans[r].spread.kept;
        for (int to = 0; to < n_workers; to++) {
            assert_int_equal(plans[r].lent[to], plans[to].borrowed[r]);
            if (plans[r].lent[to] > 0)
                assert_int_equal(plans[to].first[r], row);
            row += plans[r].lent[to];
        }
        assert_int_equal(row, lr_wave_length(wave, r));
        assert_true(plans[r].spread.n_borrowed <= wave->segment);
    }
}

/* Nobody has more than the mean, but for what would have been loans too small to make. */
static void check_loads(const struct lr_wave *wave, int n_workers, const struct plan *plans)
{
    double mean = 0.0, full = keys_of(wave, n_workers - 1, 0, wave->segment);
    for (int r = 0; r < n_workers; r++)
        mean += keys_of(wave, r, 0, lr_wave_length(wave, r)) / n_workers;
    for (int r = 0; r < n_workers; r++) {
        double load = keys_of(wave, r, 0, plans[r].spread.kept);
        for (int from = 0; from < n_workers; from++)
            load += keys_of(wave, from, plans[r].first[from], plans[r].borrowed[from]);
        assert_true(load < mean + (double)n_workers * full / 32.0);
    }
}

static void test_divided(void **state)
{
    (void)state;
    static const int64_t segments[] = {128, 1024, 4096};
    for (int n_workers = 1; n_workers <= MOST_WORKERS; n_workers++)
        for (int s = 0; s < 3; s++)
            for (int64_t index = 0; index < 4; index++)
                for (int64_t part = 1; part < 16; part++) {
                    int64_t segment = segments[s], whole = n_workers * segment;
                    struct lr_wave wave = {.index = index, .first = index * whole, .segment = segment};
                    struct plan plans[MOST_WORKERS];
                    wave.end = wave.first + whole * part / 16;
                    wave.n_active = (int)lr_ceil_div(wave.end - wave.first, segment);
                    make_plans(&wave, n_workers, plans);
                    check_rows(&wave, n_workers, plans);
                    check_loads(&wave, n_workers, plans);
                }
}

/* The last wave of a million tokens on two workers: 65,536 queries and 16,960. */
static void test_two_workers(void **state)
{
    (void)state;
    struct lr_wave wave = {.index = 7, .first = 917504, .end = 1000000, .segment = 65536, .n_active = 2};
    struct plan plans[MOST_WORKERS];
    make_plans(&wave, 2, plans);
    assert_int_equal(plans[0].lent[1], 23296);
    assert_int_equal(plans[0].spread.kept + plans[0].lent[1], 65536);
    assert_int_equal(plans[1].spread.kept, 16960);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_divided), cmocka_unit_test(test_two_workers)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
