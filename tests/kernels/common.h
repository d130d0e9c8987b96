/* What the kernel tests share: the machine's tables and pools, numbers, and two questions - are the bytes the same
 * everywhere, and how far from the truth are they? */
#ifndef LR_TESTS_KERNELS_COMMON_H
#define LR_TESTS_KERNELS_COMMON_H

#include "tests/test.h"

#include "base/pool.h"
#include "kernels/ops.h"
#include "kernels/ref.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

/* ---- the instruction sets and pools of this machine ---- */

enum { N_POOLS = 2 };
static const int pool_threads[N_POOLS] = {1, 3};

static struct {
    const struct lr_kernel_ops *tables[3];
    int n_tables;
    struct lr_exec execs[N_POOLS];
} machine;

static inline int open_machine(void **state)
{
    (void)state;
    static const enum lr_isa isas[] = {LR_ISA_C, LR_ISA_V3, LR_ISA_V4};
    machine.n_tables = 0;
    for (int i = 0; i < 3; i++)
        if (lr_kernels_cpu(isas[i], &machine.tables[machine.n_tables], NULL) == LR_OK)
            machine.n_tables++;
    for (int i = 0; i < N_POOLS; i++)
        if (lr_pool_create(pool_threads[i], 0, &machine.execs[i].pool, NULL) != LR_OK)
            return -1;
    return machine.n_tables > 0 ? 0 : -1;
}

static inline int close_machine(void **state)
{
    (void)state;
    for (int i = 0; i < N_POOLS; i++)
        lr_pool_destroy(machine.execs[i].pool);
    return 0;
}

/* ---- memory and numbers ---- */

static inline void *take(size_t size)
{
    void *p = malloc(size ? size : 1);
    if (!p)
        abort();
    return p;
}

/* splitmix64 */
static inline uint64_t next_bits(uint64_t *seed)
{
    uint64_t z = *seed += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* in [-1, 1) */
static inline float next_float(uint64_t *seed)
{
    return (float)(int64_t)(next_bits(seed) >> 40) * 0x1p-23f - 1.0f;
}

static inline void fill(float *x, int64_t n, float size, uint64_t *seed)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = size * next_float(seed);
}

/* n floats in [-size, size), in memory of exactly that size, so that the sanitizer sees a read behind them. */
static inline float *take_floats(int64_t n, float size, uint64_t *seed)
{
    float *x = take((size_t)n * sizeof *x);
    fill(x, n, size, seed);
    return x;
}

static inline double *take_doubles(int64_t n)
{
    return take((size_t)n * sizeof(double));
}

/* A row-major matrix of `dtype` with elements in (-2, 2), zeros and subnormal halves among them. */
static inline void *take_matrix(int64_t n, enum lr_dtype dtype, uint64_t *seed)
{
    char *rows = take((size_t)n * lr_dtype_bytes(dtype));
    for (int64_t i = 0; i < n; i++) {
        float x = next_float(seed);
        uint32_t bits;
        memcpy(&bits, &x, 4);
        uint64_t r = next_bits(seed);
        uint16_t half = (uint16_t)((r & 0x83ffu) | (r >> 32 & 15u) << 10), brain = (uint16_t)(bits >> 16);
        if (dtype == LR_F32)
            memcpy(rows + i * 4, &x, 4);
        else
            memcpy(rows + i * 2, dtype == LR_F16 ? &half : &brain, 2);
    }
    return rows;
}

/* `rows` [n, k] packed; released by free(w.data). */
static inline struct lr_weight pack(const void *rows, int64_t n, int64_t k, enum lr_dtype dtype)
{
    const struct lr_kernel_ops *ops = machine.tables[0];
    struct lr_weight w = {.dtype = dtype, .n = n, .k = k, .size_bytes = ops->weight_bytes(n, k, dtype)};
    if (posix_memalign(&w.data, 64, w.size_bytes) != 0)
        abort();
    memset(w.data, 0, w.size_bytes);
    ops->weight_pack(&w, 0, n, rows);
    return w;
}

static inline struct lr_weight take_weight(int64_t n, int64_t k, enum lr_dtype dtype, uint64_t *seed)
{
    void *rows = take_matrix(n * k, dtype, seed);
    struct lr_weight w = pack(rows, n, k, dtype);
    free(rows);
    return w;
}

/* ---- the same bytes everywhere ---- */

/* Runs an operation on rows [first, first + n) of its case. `out` holds the whole case's outputs. */
typedef void run_rows(const struct lr_kernel_ops *ops,
                      const struct lr_exec *exec,
                      const void *context,
                      int64_t first,
                      int64_t n,
                      char *out);

enum { GUARD_BYTES = 256, GUARD = 0xa5 };

/* `size` bytes of zeros with a guard behind them. */
static inline char *guarded(size_t size)
{
    char *out = take(size + GUARD_BYTES);
    memset(out, 0, size);
    memset(out + size, GUARD, GUARD_BYTES);
    return out;
}

static inline char *guarded_copy(const void *initial, size_t size)
{
    char *out = guarded(size);
    memcpy(out, initial, size);
    return out;
}

static inline void check_guard(const char *out, size_t size)
{
    for (int i = 0; i < GUARD_BYTES; i++)
        if ((unsigned char)out[size + i] != GUARD)
            fail_msg("byte %d behind the output was written", i);
}

static inline void check_same(const char *want, const char *got, size_t size, const char *name, const char *how)
{
    for (size_t i = 0; i < size; i++)
        if (want[i] != got[i]) {
            float x, y;
            memcpy(&x, want + i / 4 * 4, 4);
            memcpy(&y, got + i / 4 * 4, 4);
            fail_msg("%s, %s: word %zu is %a, not %a", name, how, i / 4, (double)y, (double)x);
        }
}

/* How far rows may be told apart: WHOLE always runs all of them together, ROWS one by one as well. */
enum apart { WHOLE, ROWS };

/* Runs every table with every pool, each from a copy of `initial` (the outputs before the operation), and with ROWS
 * also one row at a time and in two uneven parts. All must give the same bytes and leave the guard behind them alone.
 * Returns them; the caller frees. */
static inline char *
run_everywhere(run_rows *run, const void *context, int64_t n_rows, enum apart apart, const void *initial, size_t size)
{
    char *want = NULL;
    for (int t = 0; t < machine.n_tables; t++)
        for (int p = 0; p < N_POOLS; p++) {
            char *out = guarded_copy(initial, size);
            run(machine.tables[t], &machine.execs[p], context, 0, n_rows, out);
            check_guard(out, size);
            if (!want) {
                want = out;
                continue;
            }
            check_same(want, out, size, machine.tables[t]->name, p ? "three threads" : "one thread");
            free(out);
        }
    for (int t = 0; t < machine.n_tables && apart == ROWS; t++) {
        char *alone = guarded_copy(initial, size), *parts = guarded_copy(initial, size);
        for (int64_t row = 0; row < n_rows; row++)
            run(machine.tables[t], &machine.execs[row % N_POOLS], context, row, 1, alone);
        check_guard(alone, size);
        check_same(want, alone, size, machine.tables[t]->name, "row by row");
        int64_t cut = n_rows / 3;
        run(machine.tables[t], &machine.execs[1], context, 0, cut, parts);
        run(machine.tables[t], &machine.execs[1], context, cut, n_rows - cut, parts);
        check_guard(parts, size);
        check_same(want, parts, size, machine.tables[t]->name, "in two parts");
        free(alone);
        free(parts);
    }
    return want;
}

/* Between the rows of a strided output nothing was written. */
static inline void check_gaps(const void *initial, const void *out, int64_t rows, int64_t width, int64_t stride)
{
    for (int64_t row = 0; row < rows; row++)
        if (memcmp((const float *)initial + row * stride + width, (const float *)out + row * stride + width,
                   (size_t)(stride - width) * sizeof(float)) != 0)
            fail_msg("the gap behind row %lld was written", (long long)row);
}

/* ---- how far from the truth ---- */

/* |got - truth| <= relative |truth| + absolute, for rows of `width` at `stride` (truth is contiguous). Infinity is
 * right where the truth does not fit into float32; NaN is always wrong. */
static inline void check_close(const float *got,
                               int64_t stride,
                               const double *truth,
                               int64_t rows,
                               int64_t width,
                               double relative,
                               double absolute)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j++) {
            double x = (double)got[i * stride + j], y = truth[i * width + j];
            if (!(x == (double)(float)y) && !(fabs(x - y) <= relative * fabs(y) + absolute))
                fail_msg("[%lld, %lld] is %.9g, the truth %.9g: off by %.3g, allowed %.3g", (long long)i, (long long)j,
                         x, y, fabs(x - y), relative * fabs(y) + absolute);
        }
}

#endif
