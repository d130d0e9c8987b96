/* A fuzz target is one function, run by libFuzzer (clang) or by replay.c (any compiler). */
#ifndef LR_TESTS_FUZZ_FUZZ_H
#define LR_TESTS_FUZZ_FUZZ_H

#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
