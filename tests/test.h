/* cmocka, with the headers it needs before it. */
#ifndef LR_TESTS_TEST_H
#define LR_TESTS_TEST_H

/* clang-format off: cmocka.h wants these four first */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
/* clang-format on */

#endif
