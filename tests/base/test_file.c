#include "tests/test.h"

#include "base/file.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char path[] = "/tmp/longreach-file-XXXXXX";

static void write_file(size_t size_bytes)
{
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    for (size_t i = 0; i < size_bytes; i++)
        assert_true(fputc((int)(i % 251), file) != EOF);
    assert_int_equal(fclose(file), 0);
}

static void test_map_and_read_agree(void **state)
{
    (void)state;
    size_t sizes[] = {0, 1, 65535, 65536, 65537, 300000};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        write_file(sizes[i]);
        struct lr_mapped_file file;
        assert_int_equal(lr_file_map(path, &file, NULL), LR_OK);
        char *data;
        size_t size_bytes;
        assert_int_equal(lr_file_read(path, 1 << 20, &data, &size_bytes, NULL), LR_OK);
        assert_int_equal(size_bytes, sizes[i]);
        assert_int_equal(file.size_bytes, sizes[i]);
        if (sizes[i])
            assert_memory_equal(file.data, data, sizes[i]);
        assert_int_equal(data[size_bytes], 0);
        free(data);
        lr_file_unmap(&file);
    }
}

static void test_limit(void **state)
{
    (void)state;
    struct lr_error err;
    char *data;
    size_t size_bytes;
    write_file(1000);
    assert_int_equal(lr_file_read(path, 1000, &data, &size_bytes, &err), LR_OK);
    free(data);
    assert_int_equal(lr_file_read(path, 999, &data, &size_bytes, &err), LR_INVALID);
    assert_non_null(strstr(err.message, "longer than 999 bytes"));
}

static void test_what_is_not_a_file(void **state)
{
    (void)state;
    struct lr_error err;
    struct lr_mapped_file file;
    assert_int_equal(lr_file_map("/no/such/file", &file, &err), LR_NOT_FOUND);
    assert_non_null(strstr(err.message, "/no/such/file"));
    assert_int_equal(lr_file_map("/tmp", &file, &err), LR_INVALID);
    assert_non_null(strstr(err.message, "not a regular file"));
}

int main(void)
{
    int fd = mkstemp(path);
    if (fd < 0)
        return 1;
    close(fd);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_map_and_read_agree),
        cmocka_unit_test(test_limit),
        cmocka_unit_test(test_what_is_not_a_file),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(path);
    return failed;
}
