#include "tests/test.h"

#include "base/pool.h"
#include <stdlib.h>
#include <string.h>

struct counts {
    int64_t n_tasks;
    int n_threads;
    unsigned char *runs;
    int bad_thread;
};

static void count_task(void *context, int64_t task, int thread)
{
    struct counts *counts = context;
    counts->runs[task]++;
    if (thread < 0 || thread >= counts->n_threads)
        counts->bad_thread = 1;
}

/* Every task runs exactly once, for many loops of changing length, so that a lost wake-up would
 * hang or miss tasks. */
static void run_loops(int n_threads, int spin_us, int64_t loops)
{
    struct lr_pool *pool;
    assert_int_equal(lr_pool_create(n_threads, spin_us, &pool, NULL), LR_OK);
    assert_int_equal(lr_pool_threads(pool), n_threads);
    unsigned char runs[257];
    for (int64_t loop = 0; loop < loops; loop++) {
        int64_t n = loop % 257;
        memset(runs, 0, sizeof runs);
        struct counts counts = {.n_tasks = n, .n_threads = n_threads, .runs = runs};
        lr_pool_run(pool, n, count_task, &counts);
        for (int64_t i = 0; i < 257; i++)
            assert_int_equal(runs[i], i < n);
        assert_false(counts.bad_thread);
    }
    lr_pool_destroy(pool);
}

static void test_one_thread(void **state)
{
    (void)state;
    run_loops(1, 0, 300);
}

static void test_threads_that_spin(void **state)
{
    (void)state;
    run_loops(2, 50, 5000);
    run_loops(3, 50, 1000);
}

static void test_threads_that_sleep(void **state)
{
    (void)state;
    run_loops(2, 0, 2000);
    run_loops(5, 0, 1000);
}

static void test_pools_come_and_go(void **state)
{
    (void)state;
    for (int i = 0; i < 50; i++)
        run_loops(4, i % 2 ? 0 : 20, 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_thread),
        cmocka_unit_test(test_threads_that_spin),
        cmocka_unit_test(test_threads_that_sleep),
        cmocka_unit_test(test_pools_come_and_go),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
