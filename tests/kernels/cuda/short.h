/* LR_TEST_SHORT=1: the programs run the first few cases of their tables, and leave out what is large, as though the
 * device had SHORT_MULTIPROCESSORS. Every kernel is still launched, with rings that come round, ragged ends and several
 * tiles a thread block; for the sanitizers, under which a launch takes up to a thousand times as long. C17 and CUDA C++. */
#ifndef LR_TESTS_KERNELS_CUDA_SHORT_H
#define LR_TESTS_KERNELS_CUDA_SHORT_H

#include <stdlib.h>
#include <string.h>

enum { SHORT_MULTIPROCESSORS = 3, SHORT_MAX_ROWS = 40 };

static inline int test_is_short(void)
{
    const char *value = getenv("LR_TEST_SHORT");
    return value != NULL && strcmp(value, "1") == 0;
}

/* How many cases of a table to run: all, or its first `few`. */
#define CASES_TO_RUN(table, few) (test_is_short() ? (few) : (int)(sizeof(table) / sizeof *(table)))

/* Whether a case of so many rows is too large for a short run. */
static inline int is_too_large(long long n_rows)
{
    return test_is_short() && n_rows > SHORT_MAX_ROWS;
}

#endif
