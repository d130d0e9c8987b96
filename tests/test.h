/* cmocka, with the headers it needs before it. */
#ifndef LR_TESTS_TEST_H
#define LR_TESTS_TEST_H

/* cmocka.h wants these before it */
/* clang-format off */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
/* clang-format on */

#endif
