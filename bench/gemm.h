/* A racer of bench_gemm: one library (or one way to use it) that computes y = x W^T in float32. */
#ifndef LR_BENCH_GEMM_H
#define LR_BENCH_GEMM_H

#include <stdint.h>

/* One product: x [m, k], w [n, k], y [m, n], row-major float32, 64-byte aligned. */
struct product {
    int64_t m, n, k;
    const float *x, *w;
    float *y;
    int n_threads;
};

struct racer {
    char name[24];
    int which; /* a racer's own: which variant of its library */
    /* Packs w and whatever else is done once. The answer (NULL: it failed) goes to `run` and `close`. */
    void *(*open)(const struct racer *racer, const struct product *product);
    void (*run)(void *state);
    void (*close)(void *state);
};

/* Each appends its racers, at most three, and returns how many; `avx2` holds the library to AVX2. */
int onednn_racers(struct racer *racers, int avx2);
int openblas_racers(struct racer *racers, int avx2);

#endif
