/* Ids against HuggingFace tokenizers (tests/oracle/make_tokenizer.py) on texts chosen to be nasty, and back to bytes.
 */
#include "tests/worker/fixtures.h"
#include "worker/weights/tokenizer.h"

#include <sys/stat.h>
#include <unistd.h>

static void check_ids(struct lr_tokenizer *tokenizer, const char *ids_path, const char *text, size_t n_bytes, int flags)
{
    int64_t n;
    int64_t *expected = read_numbers(ids_path, &n);
    struct lr_token_buffer ids = {0};
    assert_ok(lr_tokenizer_encode(tokenizer, text, n_bytes, flags, &ids, err));
    for (int64_t i = 0; i < n && i < ids.n_ids; i++)
        if (ids.ids[i] != expected[i])
            fail_msg("%s: id %lld is %d, HuggingFace has %lld", ids_path, (long long)i, ids.ids[i],
                     (long long)expected[i]);
    if (ids.n_ids != n)
        fail_msg("%s: %lld ids, HuggingFace has %lld", ids_path, (long long)ids.n_ids, (long long)n);
    free(ids.ids);
    free(expected);
}

static void check_bytes(struct lr_tokenizer *tokenizer, const char *path, const char *text, size_t n_bytes)
{
    struct lr_token_buffer ids = {0};
    char *bytes;
    size_t n;
    assert_ok(lr_tokenizer_encode(tokenizer, text, n_bytes, 0, &ids, err));
    assert_ok(lr_tokenizer_decode(tokenizer, ids.ids, ids.n_ids, &bytes, &n, err));
    if (n != n_bytes || memcmp(bytes, text, n) != 0)
        fail_msg("%s: %zu bytes came back as %zu others", path, n_bytes, n);
    free(bytes);
    free(ids.ids);
}

/* Cases of tests/oracle/tokenizer; their ids for this tokenizer lie in `ids_dir`. */
static void check_cases(const char *model_dir, const char *ids_dir, int gives_bytes_back)
{
    struct lr_tokenizer *tokenizer;
    int n = 0;
    assert_ok(lr_tokenizer_load(model_dir, &tokenizer, err));
    for (int i = 0; i < 100; i++) {
        char path[300];
        size_t n_bytes;
        snprintf(path, sizeof path, "tests/oracle/tokenizer/case_%02d.txt", i);
        if (access(path, F_OK) != 0)
            continue;
        char *text = read_fixture(path, &n_bytes);
        if (gives_bytes_back)
            check_bytes(tokenizer, path, text, n_bytes);
        snprintf(path, sizeof path, "%s/case_%02d.ids", ids_dir, i);
        check_ids(tokenizer, path, text, n_bytes, 0);
        snprintf(path, sizeof path, "%s/case_%02d.special.ids", ids_dir, i);
        if (access(path, F_OK) == 0)
            check_ids(tokenizer, path, text, n_bytes, LR_TOKENIZE_PARSE_SPECIAL);
        free(text);
        n++;
    }
    assert_true(n >= 30);
    lr_tokenizer_free(tokenizer);
}

static void tiny_equals_huggingface(void **state)
{
    (void)state;
    check_cases("models/longreach-tiny", "tests/oracle/tokenizer", 1);
}

static void other_settings_equal_huggingface(void **state)
{
    (void)state;
    static const char *const names[] = {"gpt2", "llama3", "qwen"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char dir[300];
        snprintf(dir, sizeof dir, "tests/oracle/tokenizer/%s", names[i]);
        check_cases(dir, dir, 0);
    }
}

static void refused(const char *text, size_t n_bytes, const char *sentence)
{
    struct lr_tokenizer *tokenizer;
    struct lr_token_buffer ids = {0};
    struct lr_error why;
    assert_ok(lr_tokenizer_load("models/longreach-tiny", &tokenizer, err));
    assert_int_equal(lr_tokenizer_encode(tokenizer, text, n_bytes, 0, &ids, &why), LR_INVALID);
    assert_non_null(strstr(why.message, sentence));
    free(ids.ids);
    lr_tokenizer_free(tokenizer);
}

static void names_the_byte_that_is_no_text(void **state)
{
    (void)state;
    refused("abc\xff", 4, "byte 3 of 4 (0xff)");
    refused("\xed\xa0\x80", 3, "byte 0 of 3");    /* a surrogate */
    refused("a\xc0\x80", 3, "byte 1 of 3");       /* overlong */
    refused("ab\xf4\x90\x80\x80", 6, "byte 2");   /* above U+10FFFF */
    refused("\xe2\x82", 2, "byte 0 of 2 (0xe2)"); /* cut off */
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(tiny_equals_huggingface),
                                       cmocka_unit_test(other_settings_equal_huggingface),
                                       cmocka_unit_test(names_the_byte_that_is_no_text)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
