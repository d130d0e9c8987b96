/* The fixtures of tests/oracle: small files read whole. */
#ifndef LR_TESTS_WORKER_FIXTURES_H
#define LR_TESTS_WORKER_FIXTURES_H

#include "base/file.h"
#include "tests/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* For the calls inside assert_ok, whose last argument is `err`. */
static struct lr_error test_error;
static struct lr_error *const err = &test_error;

#define assert_ok(expression)                                                                                          \
    do {                                                                                                               \
        if ((expression) != LR_OK)                                                                                     \
            fail_msg("%s: %s", #expression, err->message);                                                             \
    } while (0)

static inline char *read_fixture(const char *path, size_t *n_bytes)
{
    char *data;
    assert_ok(lr_file_read(path, (size_t)1 << 30, &data, n_bytes, err));
    return data;
}

/* "0,63,64" or "1 2 3" */
static inline int64_t *read_numbers(const char *path, int64_t *n)
{
    size_t n_bytes;
    char *text = read_fixture(path, &n_bytes);
    int64_t *numbers = calloc(n_bytes + 1, sizeof *numbers);
    *n = 0;
    for (char *at = strtok(text, ", \n"); at; at = strtok(NULL, ", \n"))
        numbers[(*n)++] = strtoll(at, NULL, 10);
    free(text);
    return numbers;
}

#endif
