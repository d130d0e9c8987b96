/* What the fuzz targets share: a check that ends the process, and what every refusal owes its reader. */
#ifndef LR_TESTS_FUZZ_FUZZ_H
#define LR_TESTS_FUZZ_FUZZ_H

#include "base/status.h"

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Ends the process, so that the fuzzer keeps the input. */
static inline void require(int holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "broken: %s\n", what);
    abort();
}

/* One sentence that begins with or contains the path, on one line, and the status that was returned. */
static inline void require_sentence(enum lr_status status, const struct lr_error *why, const char *path)
{
    size_t n = strnlen(why->message, sizeof why->message);
    require(status == why->status, "the returned status is not the one of the sentence");
    require(n > 0 && n < sizeof why->message, "a refusal without a sentence");
    require(!strpbrk(why->message, "\n\r\x1b"), "a sentence with a line end or an escape in it");
    require(!path || strstr(why->message, path) != NULL, "a sentence that does not name the file");
}

#endif
