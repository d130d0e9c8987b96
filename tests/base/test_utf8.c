/* What is valid UTF-8, and how the rest of a text becomes U+FFFD (Unicode 3.9, table 3-8 has such texts). */
#include "tests/test.h"

#include "base/utf8.h"
#include <string.h>

#define BAD "\xef\xbf\xbd"

static const struct {
    const char *text;
    size_t n, valid;
    const char *repaired;
} cases[] = {
    {"", 0, 0, ""},
    {"plain", 5, 5, "plain"},
    {"\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", 9, 9, "\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80"},
    {"\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf", 10, 10, "\xed\x9f\xbf\xee\x80\x80\xf4\x8f\xbf\xbf"},
    {"a\xff"
     "b",
     3, 1, "a" BAD "b"},
    {"\xc0\xaf", 2, 0, BAD BAD},                                     /* overlong */
    {"\xe0\x80\xaf", 3, 0, BAD BAD BAD},                             /* overlong */
    {"\xed\xa0\x80", 3, 0, BAD BAD BAD},                             /* a surrogate */
    {"\xf4\x90\x80\x80", 4, 0, BAD BAD BAD BAD},                     /* above U+10FFFF */
    {"\xf0\x9f\x98", 3, 0, BAD},                                     /* cut off: one part */
    {"\xe2\x82z\xf0\x9f\x98\xc3\xa9", 8, 0, BAD "z" BAD "\xc3\xa9"}, /* cut off by another character */
    {"ok\x80\x80", 4, 2, "ok" BAD BAD},
};

static void valid_prefix(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        assert_int_equal(lr_utf8_valid_prefix(cases[i].text, cases[i].n), cases[i].valid);
}

static void repaired(void **state)
{
    (void)state;
    char out[64];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        size_t n = lr_utf8_repair(cases[i].text, cases[i].n, out);
        assert_int_equal(n, strlen(cases[i].repaired));
        assert_string_equal(out, cases[i].repaired);
        assert_int_equal(lr_utf8_valid_prefix(out, n), n);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(valid_prefix), cmocka_unit_test(repaired)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
