/* Races our product with packed weights against oneDNN and OpenBLAS (where built in), round by round in one process.
 *
 * usage: bench_gemm [--rounds N] [--isa auto|v4|v3]     (v3 holds oneDNN and OpenBLAS to AVX2 as well) */
#include "bench/gemm.h"

#include "base/clock.h"
#include "base/pool.h"
#include "kernels/ops.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_RACERS = 8, MIN_ROUNDS = 7, MAX_ROUNDS = 101 };

static const int64_t shapes[][3] = {{2048, 512, 256}, {64, 512, 256}, {2048, 2048, 2048}, {1024, 64, 64}};
static const struct lr_kernel_ops *ops;

/* ---- ours ---- */

struct ours {
    struct lr_exec exec;
    struct lr_weight weight;
    struct lr_gemm_args args;
};

static void close_ours(void *state)
{
    struct ours *s = state;
    lr_pool_destroy(s->exec.pool);
    free(s->weight.data);
    free(s);
}

static void *zeroed(size_t bytes)
{
    bytes = (bytes + 63) & ~(size_t)63;
    void *p = aligned_alloc(64, bytes);
    return p ? memset(p, 0, bytes) : NULL;
}

static uint16_t bf16_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static int pack(struct ours *s, const struct product *p)
{
    if (s->weight.dtype == LR_F32) {
        ops->weight_pack(&s->weight, 0, p->n, p->w);
        return 1;
    }
    uint16_t *rows = malloc((size_t)(p->n * p->k) * sizeof *rows);
    if (!rows)
        return 0;
    for (int64_t i = 0; i < p->n * p->k; i++)
        rows[i] = bf16_of(p->w[i]);
    ops->weight_pack(&s->weight, 0, p->n, rows);
    free(rows);
    return 1;
}

static void *open_ours(const struct racer *racer, const struct product *p)
{
    struct ours *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    enum lr_dtype dtype = (enum lr_dtype)racer->which;
    size_t bytes = ops->weight_bytes(p->n, p->k, dtype);
    s->weight = (struct lr_weight){.dtype = dtype, .n = p->n, .k = p->k, .data = zeroed(bytes), .size_bytes = bytes};
    s->args = (struct lr_gemm_args){
        .a = p->x, .a_stride = p->k, .w = &s->weight, .y = p->y, .y_stride = p->n, .n_rows = p->m};
    if (s->weight.data && pack(s, p) && lr_pool_create(p->n_threads, 50, &s->exec.pool, NULL) == LR_OK)
        return s;
    close_ours(s);
    return NULL;
}

static void run_ours(void *state)
{
    struct ours *s = state;
    ops->gemm(&s->exec, &s->args);
}

static int our_racers(struct racer *racers)
{
    static const enum lr_dtype dtypes[] = {LR_F32, LR_BF16};
    static const char *const names[] = {"ours", "ours, bf16 weights"};
    for (int i = 0; i < 2; i++) {
        racers[i] = (struct racer){.which = (int)dtypes[i], .open = open_ours, .run = run_ours, .close = close_ours};
        snprintf(racers[i].name, sizeof racers[i].name, "%s", names[i]);
    }
    return 2;
}

/* ---- the race ---- */

struct lane {
    void *state;
    double rates[MAX_ROUNDS]; /* GFLOP/s of each round */
    double worst;             /* largest distance from the float64 product, relative to the row's sum of magnitudes */
};

/* A few elements of y against float64: a racer that computes something else has not run this race. */
static double worst_error(const struct product *p)
{
    double worst = 0;
    for (int64_t sample = 0; sample < 512; sample++) {
        int64_t i = sample * 131 % p->m, j = sample * 257 % p->n;
        double sum = 0, size = 0;
        for (int64_t k = 0; k < p->k; k++) {
            double term = (double)p->x[i * p->k + k] * (double)p->w[j * p->k + k];
            sum += term;
            size += fabs(term);
        }
        worst = fmax(worst, fabs((double)p->y[i * p->n + j] - sum) / size);
    }
    return worst;
}

/* Threads of the racer before go to sleep, the caches become this one's, then at least 30 ms of products. */
static double round_rate(const struct racer *racer, void *state, double flops)
{
    nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    double start = lr_clock_seconds(), end = start;
    do
        racer->run(state);
    while (lr_clock_seconds() - start < 0.003);
    int64_t n = 0;
    start = lr_clock_seconds();
    do {
        racer->run(state);
        n++;
        end = lr_clock_seconds();
    } while (end - start < 0.03);
    return flops * (double)n / (end - start) * 1e-9;
}

static int by_rate(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_lanes(const struct racer *racers, struct lane *lanes, int n, int n_rounds, int n_ours)
{
    double best_peer = 0, median_peer = 0;
    for (int i = 0; i < n; i++) {
        qsort(lanes[i].rates, (size_t)n_rounds, sizeof(double), by_rate);
        if (i >= n_ours && lanes[i].state) {
            best_peer = fmax(best_peer, lanes[i].rates[n_rounds - 1]);
            median_peer = fmax(median_peer, lanes[i].rates[n_rounds / 2]);
        }
    }
    for (int i = 0; i < n; i++) {
        if (!lanes[i].state) {
            printf("  %-24s failed\n", racers[i].name);
            continue;
        }
        double best = lanes[i].rates[n_rounds - 1], median = lanes[i].rates[n_rounds / 2];
        printf("  %-24s %8.1f %8.1f   %.0e", racers[i].name, best, median, lanes[i].worst);
        if (i < n_ours && best_peer > 0)
            printf("   %5.2f  %5.2f", best / best_peer, median / median_peer);
        printf("\n");
    }
}

static int race(const struct racer *racers, int n, int n_ours, struct product *p, int n_rounds)
{
    static struct lane lanes[MAX_RACERS];
    float *x = zeroed((size_t)(p->m * p->k) * 4), *w = zeroed((size_t)(p->n * p->k) * 4);
    p->y = zeroed((size_t)(p->m * p->n) * 4);
    if (!x || !w || !p->y)
        return 0;
    uint32_t seed = 1;
    for (int64_t i = 0; i < p->m * p->k; i++)
        x[i] = (float)(int32_t)(seed = seed * 1664525u + 1013904223u) * 0x1p-31f;
    for (int64_t i = 0; i < p->n * p->k; i++)
        w[i] = (float)(int32_t)(seed = seed * 1664525u + 1013904223u) * 0x1p-31f;
    p->x = x;
    p->w = w;
    for (int i = 0; i < n; i++) {
        lanes[i].state = racers[i].open(&racers[i], p);
        if (!lanes[i].state)
            continue;
        memset(p->y, 0, (size_t)(p->m * p->n) * 4);
        racers[i].run(lanes[i].state);
        lanes[i].worst = worst_error(p);
    }
    double flops = 2.0 * (double)p->m * (double)p->n * (double)p->k;
    for (int round = 0; round < n_rounds; round++)
        for (int i = 0; i < n; i++)
            lanes[i].rates[round] = lanes[i].state ? round_rate(&racers[i], lanes[i].state, flops) : 0;
    printf("%lld x %lld x %lld, %d thread%s\n", (long long)p->m, (long long)p->n, (long long)p->k, p->n_threads,
           p->n_threads > 1 ? "s" : "");
    print_lanes(racers, lanes, n, n_rounds, n_ours);
    fflush(stdout);
    for (int i = 0; i < n; i++)
        if (lanes[i].state)
            racers[i].close(lanes[i].state);
    free(x);
    free(w);
    free(p->y);
    return 1;
}

static void print_cpu(void)
{
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (strncmp(line, "model name", 10) == 0 && strchr(line, ':')) {
            printf("%s", strchr(line, ':') + 2);
            break;
        }
    if (file)
        fclose(file);
}

int main(int argc, char **argv)
{
    int n_rounds = 9;
    enum lr_isa isa = LR_ISA_AUTO;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--rounds") == 0)
            n_rounds = atoi(argv[i + 1]);
        else if (strcmp(argv[i], "--isa") == 0)
            isa = strcmp(argv[i + 1], "v3") == 0 ? LR_ISA_V3 : strcmp(argv[i + 1], "v4") == 0 ? LR_ISA_V4 : LR_ISA_AUTO;
    }
    n_rounds = n_rounds < MIN_ROUNDS ? MIN_ROUNDS : n_rounds > MAX_ROUNDS ? MAX_ROUNDS : n_rounds;
    struct lr_error err;
    if (lr_kernels_cpu(isa, &ops, &err) != LR_OK) {
        fprintf(stderr, "bench_gemm: %s\n", err.message);
        return 1;
    }
    struct racer racers[MAX_RACERS];
    int n_ours = our_racers(racers), n = n_ours;
#ifdef LR_BENCH_ONEDNN
    n += onednn_racers(racers + n, isa == LR_ISA_V3);
#endif
#ifdef LR_BENCH_OPENBLAS
    n += openblas_racers(racers + n, isa == LR_ISA_V3);
#endif
    for (int i = 0; i < argc; i++)
        printf("%s%s", argv[i], i + 1 < argc ? " " : "\n");
    print_cpu();
    printf("%s, %d interleaved rounds; GFLOP/s; error against float64; ours / fastest library. * as it comes\n",
           ops->name, n_rounds);
    printf("  %-24s %8s %8s   %s   %s\n", "", "best", "median", "error", " best median");
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int threads = 1; threads <= 2; threads++) {
            struct product p = {.m = shapes[s][0], .n = shapes[s][1], .k = shapes[s][2], .n_threads = threads};
            if (!race(racers, n, n_ours, &p, n_rounds)) {
                fprintf(stderr, "bench_gemm: no memory for the operands\n");
                return 1;
            }
        }
    return 0;
}
