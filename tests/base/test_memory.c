/* What the host can still give: no more than it has, and no less than what is there to be taken at once. */
#include "tests/test.h"

#include "base/arena.h"
#include "base/memory.h"
#include <string.h>
#include <unistd.h>

static void test_available(void **state)
{
    (void)state;
    size_t all = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE), available = lr_memory_available();
    assert_true(available > 0);
    assert_true(available <= all);
}

/* Memory in use is not available. */
static void test_in_use(void **state)
{
    (void)state;
    enum { MIB = 1 << 20, TAKEN_MIB = 256 };
    size_t before = lr_memory_available();
    struct lr_arena arena;
    assert_int_equal(lr_arena_reserve(&arena, (size_t)TAKEN_MIB * MIB, NULL), LR_OK);
    memset(arena.base, 1, (size_t)TAKEN_MIB * MIB);
    size_t during = lr_memory_available();
    lr_arena_release(&arena);
    /* others come and go meanwhile: a quarter of it is enough of a sign */
    assert_true(before < (size_t)TAKEN_MIB * MIB || during + (size_t)TAKEN_MIB / 4 * MIB < before ||
                lr_memory_available() > during);
}

/* Of a mapping what was touched is resident, give or take a huge page. */
static void test_resident(void **state)
{
    (void)state;
    const size_t mib = 1 << 20, huge = 2 * mib;
    struct lr_arena arena;
    assert_int_equal(lr_arena_reserve(&arena, 64 * mib, NULL), LR_OK);
    assert_int_equal(lr_memory_resident(arena.base, 64 * mib), 0);
    memset(arena.base, 1, 16 * mib);
    size_t half = lr_memory_resident(arena.base, 64 * mib);
    assert_true(half >= 16 * mib && half <= 16 * mib + huge);
    memset(arena.base, 1, 64 * mib);
    assert_int_equal(lr_memory_resident(arena.base, 64 * mib), 64 * mib);
    lr_arena_release(&arena);
}

/* Arrays of an arena: planned bytes are taken bytes. */
static void test_array_bytes(void **state)
{
    (void)state;
    struct lr_arena arena;
    size_t planned = lr_arena_array_bytes(3, 5) + lr_arena_array_bytes(0, 8) + lr_arena_array_bytes(100, 8);
    assert_int_equal(lr_arena_reserve(&arena, planned, NULL), LR_OK);
    struct lr_arena over = lr_arena_over(arena.base, planned);
    assert_non_null(lr_arena_alloc(&over, 3, 5));
    assert_non_null(lr_arena_alloc(&over, 0, 8));
    assert_non_null(lr_arena_alloc(&over, 100, 8));
    assert_int_equal(over.used_bytes, planned);
    assert_null(lr_arena_alloc(&over, 1, 1));
    lr_arena_release(&arena);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_available),
        cmocka_unit_test(test_in_use),
        cmocka_unit_test(test_resident),
        cmocka_unit_test(test_array_bytes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
