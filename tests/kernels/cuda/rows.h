/* Rows on the device, at any offset and stride, with NaN between them. */
#ifndef LR_TESTS_KERNELS_CUDA_ROWS_H
#define LR_TESTS_KERNELS_CUDA_ROWS_H

#include "kernels/ref.h"
#include "tests/kernels/cuda/check.h"

/* How rows of an array lie: element `offset` of an aligned allocation is the first, rows are width + gap apart. */
struct layout {
    int64_t offset, gap;
};

/* Aligned; whole 16-byte steps apart; odd. The bytes of a result are the same in all of them. */
static const struct layout layouts[] = {{0, 0}, {8, 16}, {3, 5}, {1, 8}};

/* The layouts that a case compares with the first: in a short run those that are read element by element. */
static inline int first_layout(void)
{
    return test_is_short() ? 2 : 0;
}

/* Whether a case is also run row by row. */
static inline int goes_by_rows(int64_t n_rows)
{
    return !is_too_large(4 * n_rows);
}

static inline int64_t stride_of(struct layout l, int64_t width)
{
    return width + l.gap;
}

/* Rows of host floats as activations on the device, or all NaN where x is NULL. Returns the first row. */
static inline uint16_t *place(const float *x, int64_t n_rows, int64_t width, struct layout l)
{
    int64_t stride = stride_of(l, width), n = l.offset + n_rows * stride;
    uint16_t *host = (uint16_t *)check_host((size_t)n * sizeof *host);
    memset(host, 0xff, (size_t)n * sizeof *host);
    for (int64_t i = 0; x && i < n_rows * width; i++)
        host[l.offset + i / width * stride + i % width] = check_to_act(x[i]);
    return (uint16_t *)check_device_copy(host, (size_t)n * sizeof *host) + l.offset;
}

static inline float *place_f32(const float *x, int64_t n_rows, int64_t width, struct layout l)
{
    int64_t stride = stride_of(l, width), n = l.offset + n_rows * stride;
    float *host = (float *)check_host((size_t)n * sizeof *host);
    memset(host, 0xff, (size_t)n * sizeof *host);
    for (int64_t i = 0; x && i < n_rows * width; i++)
        host[l.offset + i / width * stride + i % width] = x[i];
    return (float *)check_device_copy(host, (size_t)n * sizeof *host) + l.offset;
}

/* The rows again, as floats, contiguous; what lies between them must still be NaN. */
static inline float *fetch(const uint16_t *rows, int64_t n_rows, int64_t width, struct layout l)
{
    int64_t stride = stride_of(l, width), n = l.offset + n_rows * stride;
    float *all = check_download_act(rows - l.offset, n);
    float *x = (float *)check_host((size_t)(n_rows * width) * sizeof *x);
    for (int64_t i = 0; i < n; i++) {
        int64_t row = (i - l.offset) / stride, column = (i - l.offset) % stride;
        if (i >= l.offset && column < width)
            x[row * width + column] = all[i];
        else
            check_that(isnan(all[i]), "an element between the rows was written", i);
    }
    return x;
}

static inline void same_floats(const char *what, const float *a, const float *b, int64_t n)
{
    int64_t i = 0;
    while (i < n && memcmp(a + i, b + i, sizeof *a) == 0)
        i++;
    check_that(i == n, what, i);
}

/* Results: half a unit in the last of ACT_DIGITS digits, and a little for the float32 on the way. */
static inline void check_act(const char *what, const float *got, const double *truth, int64_t n, double absolute)
{
    check_each(what, got, n, truth, 1, n, 1.02 / (1 << ACT_DIGITS), absolute + ACT_FLOOR);
    check_norm(what, got, n, truth, 1, n, 1.024 / (1 << ACT_DIGITS));
}

/* Names the running shape. */
static char case_label[160];
#define LABEL(...) (snprintf(case_label, sizeof case_label, __VA_ARGS__), check.name = case_label)

#endif
