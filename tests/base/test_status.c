#include "tests/test.h"

#include "base/status.h"
#include <string.h>

static void test_fail_fills_sentence(void **state)
{
    (void)state;
    struct lr_error err = {0};
    assert_int_equal(lr_fail(&err, LR_INVALID, "%d workers\nfor %s", 3, "x"), LR_INVALID);
    assert_int_equal(err.status, LR_INVALID);
    assert_string_equal(err.message, "3 workers for x");
}

static void test_fail_without_error_keeps_status(void **state)
{
    (void)state;
    assert_int_equal(lr_fail(NULL, LR_TIMEOUT, "nobody reads this"), LR_TIMEOUT);
}

static void test_fail_cuts_long_sentence(void **state)
{
    (void)state;
    char text[3 * LR_ERROR_TEXT_BYTES];
    memset(text, 'a', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    struct lr_error err;
    assert_int_equal(lr_fail(&err, LR_IO, "%s", text), LR_IO);
    assert_int_equal(strlen(err.message), LR_ERROR_TEXT_BYTES - 1);
    assert_string_equal(err.message + LR_ERROR_TEXT_BYTES - 4, "...");
}

static void test_fail_hides_control_characters(void **state)
{
    (void)state;
    struct lr_error err = {0};
    lr_fail(&err, LR_CORRUPT, "%s",
            "a\nb\tc\x1b[31md\x7f\xc2\x9b"
            "e\xc3\xa9");
    assert_string_equal(err.message, "a b c?[31md???e\xc3\xa9");
}

static void test_every_status_has_text(void **state)
{
    (void)state;
    for (int i = LR_OK; i <= LR_INTERNAL; i++)
        assert_true(strlen(lr_status_text((enum lr_status)i)) > 0);
    assert_string_equal(lr_status_text((enum lr_status)99), "unknown status");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fail_fills_sentence),     cmocka_unit_test(test_fail_without_error_keeps_status),
        cmocka_unit_test(test_fail_cuts_long_sentence), cmocka_unit_test(test_fail_hides_control_characters),
        cmocka_unit_test(test_every_status_has_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
