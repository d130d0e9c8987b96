/* What the CUDA tests share. A program is a table of cases and a main:
 *
 *   static const struct check_case cases[] = {{"rmsnorm 5 x 77", run_rmsnorm_odd}, ...};
 *   int main(void) { return check_main(cases, CHECK_COUNT(cases)); }
 *
 * It exits 0, 1 where something was wrong, 77 where there is no device. Inside a case, memory of both kinds is taken
 * and never given back: it goes at the end of the case, when the bytes behind every device array are looked at too.
 * Device arrays start out as NaN (all bits set), so an element that was not written shows.
 *
 * C17 and CUDA C++; needs kernels/cuda/backend.cu and the slots under test, no test library. */
#ifndef LR_TESTS_KERNELS_CUDA_CHECK_H
#define LR_TESTS_KERNELS_CUDA_CHECK_H

#include "kernels/cuda/backend.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/device.h"
#include "tests/kernels/cuda/short.h"
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK_COUNT(array) ((int)(sizeof(array) / sizeof *(array)))

struct check_case {
    const char *name;
    void (*run)(void);
};

enum { CHECK_MAX_ARRAYS = 4096, CHECK_GUARD_BYTES = 256, CHECK_SKIPPED = 77 };

static struct {
    struct lr_exec exec;
    const char *name; /* of the running case */
    int n_wrong, n_arrays, n_device;
    double worst; /* the largest relative error of the case */
    void *host[CHECK_MAX_ARRAYS];
    struct {
        char *base;
        size_t size;
    } device[CHECK_MAX_ARRAYS];
} check;

static inline void check_that(int truth, const char *what, long long at)
{
    if (!truth && check.n_wrong++ < 20)
        printf("  WRONG  %s: %s (%lld)\n", check.name, what, at);
}

static inline void check_ok(enum lr_status status, const struct lr_error *err)
{
    if (status == LR_OK)
        return;
    printf("  FAILED %s: %s\n", check.name, err->message);
    exit(1); /* after an error of the device nothing can be believed */
}

/* ---- memory ---- */

static inline void *check_host(size_t size_bytes)
{
    void *p = malloc(size_bytes ? size_bytes : 1);
    if (!p || check.n_arrays == CHECK_MAX_ARRAYS)
        abort();
    return check.host[check.n_arrays++] = p;
}

static inline void check_upload(void *device, const void *host, size_t size_bytes)
{
    lr_cuda_memory.upload(&check.exec, device, host, size_bytes);
}

static inline void check_download(void *host, const void *device, size_t size_bytes)
{
    struct lr_error err;
    check_ok(lr_cuda_memory.download(&check.exec, host, device, size_bytes, &err), &err);
}

static inline void check_poison(void *device, size_t size_bytes)
{
    void *ones = malloc(size_bytes ? size_bytes : 1);
    if (!ones)
        abort();
    memset(ones, 0xff, size_bytes);
    check_upload(device, ones, size_bytes);
    free(ones);
}

/* A device array of NaN, 256-byte aligned, with a guard behind it. */
static inline void *check_device(size_t size_bytes)
{
    struct lr_error err;
    void *base = NULL;
    check_ok(lr_cuda_memory.reserve(size_bytes + CHECK_GUARD_BYTES, &base, &err), &err);
    check_poison(base, size_bytes + CHECK_GUARD_BYTES);
    if (check.n_device == CHECK_MAX_ARRAYS)
        abort();
    check.device[check.n_device].base = (char *)base;
    check.device[check.n_device++].size = size_bytes;
    return base;
}

static inline void *check_device_copy(const void *host, size_t size_bytes)
{
    void *device = check_device(size_bytes);
    check_upload(device, host, size_bytes);
    return device;
}

/* ---- numbers ---- */

static inline uint64_t check_bits(uint64_t *seed) /* splitmix64 */
{
    uint64_t z = *seed += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

#ifdef LR_CUDA_F16
enum { ACT_DIGITS = 11 };
#define ACT_LARGE 0x1p12f    /* with room above for sums */
#define ACT_FLOOR 0x1p-25    /* half of the smallest number: what rounding costs there */

static inline uint16_t check_to_act(float x) /* to nearest, ties to even */
{
    _Float16 half = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}

static inline float check_from_act(uint16_t bits)
{
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}
#else
enum { ACT_DIGITS = 8 };
#define ACT_LARGE 0x1p50f
#define ACT_FLOOR 0x1p-134

static inline uint16_t check_to_act(float x) /* to nearest, ties to even */
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return 0x7fffu;
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float check_from_act(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
#endif

/* n floats in [-size, size); rounded to the activation type (and still floats) where `rounded`: what a reference gets. */
static inline float *check_floats(int64_t n, float size, int rounded, uint64_t *seed)
{
    float *x = (float *)check_host((size_t)n * sizeof *x);
    for (int64_t i = 0; i < n; i++) {
        x[i] = size * ((float)(int64_t)(check_bits(seed) >> 40) * 1.1920929e-7f - 1.0f);
        x[i] = rounded ? check_from_act(check_to_act(x[i])) : x[i];
    }
    return x;
}

/* A copy of host floats as activations on the device. */
static inline uint16_t *check_device_act(const float *x, int64_t n)
{
    uint16_t *half = (uint16_t *)malloc((size_t)(n ? n : 1) * sizeof *half);
    if (!half)
        abort();
    for (int64_t i = 0; i < n; i++)
        half[i] = check_to_act(x[i]);
    void *device = check_device_copy(half, (size_t)n * sizeof *half);
    free(half);
    return (uint16_t *)device;
}

/* Host floats of a device array of activations. */
static inline float *check_download_act(const void *device, int64_t n)
{
    uint16_t *half = (uint16_t *)check_host((size_t)n * sizeof *half);
    float *x = (float *)check_host((size_t)n * sizeof *x);
    check_download(half, device, (size_t)n * sizeof *half);
    for (int64_t i = 0; i < n; i++)
        x[i] = check_from_act(half[i]);
    return x;
}

static inline float *check_download_f32(const void *device, int64_t n)
{
    float *x = (float *)check_host((size_t)n * sizeof *x);
    check_download(x, device, (size_t)n * sizeof *x);
    return x;
}

/* ---- comparisons ---- */

/* ||got - truth|| <= tolerance ||truth||, and nothing is NaN. got: rows of `width` at `stride`; truth contiguous. */
static inline void check_norm(const char *what,
                              const float *got,
                              int64_t stride,
                              const double *truth,
                              int64_t n_rows,
                              int64_t width,
                              double tolerance)
{
    double error = 0.0, size = 0.0;
    for (int64_t i = 0; i < n_rows * width; i++) {
        double x = (double)got[i / width * stride + i % width], y = truth[i];
        error += (x - y) * (x - y);
        size += y * y;
    }
    error = size > 0.0 ? sqrt(error / size) : sqrt(error);
    check.worst = error > check.worst || isnan(error) ? error : check.worst;
    if (!(error <= tolerance))
        printf("  %s: relative error %.3g, allowed %.3g\n", what, error, tolerance);
    check_that(error <= tolerance, what, 0);
}

/* |got - truth| <= relative |truth| + absolute for every element. */
static inline void check_each(const char *what,
                              const float *got,
                              int64_t stride,
                              const double *truth,
                              int64_t n_rows,
                              int64_t width,
                              double relative,
                              double absolute)
{
    for (int64_t i = 0; i < n_rows * width; i++) {
        double x = (double)got[i / width * stride + i % width], y = truth[i];
        int close = x == y || fabs(x - y) <= relative * fabs(y) + absolute;
        if (!close && check.n_wrong < 20)
            printf("  %s [%lld, %lld]: %.9g, the truth %.9g\n", what, (long long)(i / width), (long long)(i % width), x,
                   y);
        check_that(close, what, (long long)i);
    }
}

/* The bytes of two device arrays are the same. */
static inline void check_same(const char *what, const void *a, const void *b, size_t size_bytes)
{
    unsigned char *x = (unsigned char *)check_host(size_bytes), *y = (unsigned char *)check_host(size_bytes);
    check_download(x, a, size_bytes);
    check_download(y, b, size_bytes);
    size_t i = 0;
    while (i < size_bytes && x[i] == y[i])
        i++;
    check_that(i == size_bytes, what, (long long)i);
}

/* ---- running ---- */

/* Looks behind the device arrays and gives all memory back; a case that walks through many shapes calls it after each.
 */
static inline void check_end(void)
{
    for (int i = 0; i < check.n_device; i++) {
        unsigned char guard[CHECK_GUARD_BYTES];
        check_download(guard, check.device[i].base + check.device[i].size, sizeof guard);
        int j = 0;
        while (j < CHECK_GUARD_BYTES && guard[j] == 0xff)
            j++;
        check_that(j == CHECK_GUARD_BYTES, "a byte behind an array was written; array", i);
        lr_cuda_memory.release(check.device[i].base, check.device[i].size + CHECK_GUARD_BYTES);
    }
    for (int i = 0; i < check.n_arrays; i++)
        free(check.host[i]);
    check.n_device = check.n_arrays = 0;
}

static inline int check_main(const struct check_case *cases, int n_cases)
{
    struct lr_error err;
    int n_failed = 0;
    if (lr_cuda_device_count() == 0) {
        printf("skipped: no CUDA device\n");
        return CHECK_SKIPPED;
    }
    check.name = "open";
    check_ok(lr_cuda_device_open(0, &check.exec, &err), &err);
    if (test_is_short())
        lr_cuda_pretend_multiprocessors(&check.exec, SHORT_MULTIPROCESSORS);
    for (int i = 0; i < n_cases; i++) {
        check.name = cases[i].name;
        check.n_wrong = 0;
        check.worst = 0.0;
        cases[i].run();
        check_ok(lr_cuda_memory.wait(&check.exec, &err), &err);
        check_end();
        printf("%s  %-44s error %.2e\n", check.n_wrong ? "FAIL" : "ok  ", cases[i].name, check.worst);
        fflush(stdout);
        n_failed += check.n_wrong > 0;
    }
    lr_cuda_device_close(&check.exec);
    printf("%d of %d cases failed\n", n_failed, n_cases);
    return n_failed > 0;
}

#endif
