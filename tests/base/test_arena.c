#include "tests/test.h"

#include "base/arena.h"
#include <string.h>

static void test_blocks_are_aligned_and_disjoint(void **state)
{
    (void)state;
    struct lr_arena arena;
    assert_int_equal(lr_arena_reserve(&arena, 10000, NULL), LR_OK);
    char *a = lr_arena_alloc(&arena, 3, 1), *b = lr_arena_alloc(&arena, 65, 1);
    char *c = lr_arena_alloc(&arena, 1, 8);
    assert_true((uintptr_t)a % LR_ARENA_ALIGN_BYTES == 0 && (uintptr_t)b % LR_ARENA_ALIGN_BYTES == 0 &&
                (uintptr_t)c % LR_ARENA_ALIGN_BYTES == 0);
    assert_true(b >= a + 3 && c >= b + 65);
    for (int i = 0; i < 65; i++)
        assert_int_equal(b[i], 0);
    lr_arena_release(&arena);
}

static void test_full_and_overflow_give_null(void **state)
{
    (void)state;
    struct lr_arena arena;
    assert_int_equal(lr_arena_reserve(&arena, 4096, NULL), LR_OK);
    assert_null(lr_arena_alloc(&arena, SIZE_MAX / 2, 4));
    assert_null(lr_arena_alloc(&arena, 4097, 1));
    assert_non_null(lr_arena_alloc(&arena, 4096, 1));
    assert_null(lr_arena_alloc(&arena, 1, 1));
    lr_arena_release(&arena);
}

static void test_rewind_gives_memory_back(void **state)
{
    (void)state;
    struct lr_arena arena;
    assert_int_equal(lr_arena_reserve(&arena, 4096, NULL), LR_OK);
    size_t mark = arena.used_bytes;
    char *a = lr_arena_alloc(&arena, 4096, 1);
    memset(a, 7, 4096);
    lr_arena_rewind(&arena, mark);
    assert_ptr_equal(lr_arena_alloc(&arena, 4096, 1), a);
    lr_arena_release(&arena);
}

static void test_impossible_reservation_says_so(void **state)
{
    (void)state;
    struct lr_arena arena;
    struct lr_error err;
    assert_int_equal(lr_arena_reserve(&arena, SIZE_MAX / 4, &err), LR_NO_MEMORY);
    assert_non_null(strstr(err.message, "cannot reserve"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_blocks_are_aligned_and_disjoint),
        cmocka_unit_test(test_full_and_overflow_give_null),
        cmocka_unit_test(test_rewind_gives_memory_back),
        cmocka_unit_test(test_impossible_reservation_says_so),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
