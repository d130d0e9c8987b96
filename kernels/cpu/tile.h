/* The micro-kernel under every product of the CPU backend: dense layers, experts, attention tiles, the delta rule.
 *
 *   C[i][j] (=, or += the earlier K block)  sum_k A[i][k] * B[k][j]       i < rows, j < 16 * panels
 *
 *   A: any row and k stride (a broadcast costs the same wherever it is), so transposed operands need no copy
 *   B: rows of 16 consecutive values: element (k, j) of panel p at b[p * b_panel + k * b_k + j]
 *
 * One accumulator per element, ascending k, fused: the bits do not depend on the tile's shape, on blocking over k
 * (accumulators are reloaded from C) or on the instruction set. */
#ifndef LR_KERNELS_CPU_TILE_H
#define LR_KERNELS_CPU_TILE_H

#include "kernels/cpu/simd.h"
#include "kernels/ops.h"

struct lr_tile {
    const float *a;
    int64_t a_row, a_k; /* strides of A in elements */
    const void *b;
    int64_t b_panel, b_k; /* strides of B in elements */
    float *c;
    int64_t c_row, c_panel; /* strides of C in elements; panel p of C at c + p * c_panel */
    int64_t k;
    int load_c; /* 1: start from C, 0: start from zero */
};

/* The register tile where there are rows enough: rows x panels of 16 columns. */
#if defined(LR_SIMD_V4)
enum { LR_TILE_ROWS = 12, LR_TILE_PANELS = 2 };
#elif defined(LR_SIMD_V3)
enum { LR_TILE_ROWS = 6, LR_TILE_PANELS = 1 };
#else
enum { LR_TILE_ROWS = 4, LR_TILE_PANELS = 1 };
#endif
enum { LR_TILE_ACCUMULATORS = 24 };

LR_INLINE lr_v16 tile_load_b(const void *b, int64_t offset, enum lr_dtype dtype)
{
    if (dtype == LR_F32)
        return v_load((const float *)b + offset);
    if (dtype == LR_BF16)
        return v_load_bf16((const uint16_t *)b + offset);
    return v_load_f16((const uint16_t *)b + offset);
}

/* ROWS, PANELS and DTYPE are compile-time constants at every call, so the accumulators live in registers. */
LR_INLINE void tile_multiply(const struct lr_tile *t, const int rows, const int panels, const enum lr_dtype dtype)
{
    lr_v16 acc[LR_TILE_ACCUMULATORS];
    const float *a_rows[12];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        a_rows[i] = t->a + i * t->a_row;
#pragma GCC unroll 8
        for (int p = 0; p < panels; p++)
            acc[i * panels + p] = t->load_c ? v_load(t->c + i * t->c_row + p * t->c_panel) : v_zero();
    }
    if (rows == LR_TILE_ROWS) { /* the lines of C are there when the sums are */
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
            for (int p = 0; p < panels; p++)
                __builtin_prefetch(t->c + i * t->c_row + p * t->c_panel, 1);
    }
    int64_t a_offset = 0, b_offset = 0, k = 0;
    if (rows == LR_TILE_ROWS && t->a_k == 1 && t->a_row % 1024 == 0) {
        /* rows 4096 bytes apart push each other out of L1: 16 columns of them at a time, side by side */
        float near[LR_TILE_ROWS * 16] __attribute__((aligned(64)));
        for (; k + 16 <= t->k; k += 16) {
#pragma GCC unroll 12
            for (int i = 0; i < rows; i++)
                v_store(near + i * 16, v_load(a_rows[i] + k));
            for (int64_t j = 0; j < 16; j++) {
                lr_v16 b[8];
#pragma GCC unroll 8
                for (int p = 0; p < panels; p++)
                    b[p] = tile_load_b(t->b, b_offset + p * t->b_panel, dtype);
#pragma GCC unroll 12
                for (int i = 0; i < rows; i++) {
                    lr_v16 a = v_set1(near[i * 16 + j]);
#pragma GCC unroll 8
                    for (int p = 0; p < panels; p++)
                        acc[i * panels + p] = v_fma(a, b[p], acc[i * panels + p]);
                }
                b_offset += t->b_k;
            }
        }
        a_offset = k;
    }
    for (; k < t->k; k++) {
        lr_v16 b[8];
#pragma GCC unroll 8
        for (int p = 0; p < panels; p++)
            b[p] = tile_load_b(t->b, b_offset + p * t->b_panel, dtype);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            lr_v16 a = v_set1(a_rows[i][a_offset]);
#pragma GCC unroll 8
            for (int p = 0; p < panels; p++)
                acc[i * panels + p] = v_fma(a, b[p], acc[i * panels + p]);
        }
        a_offset += t->a_k;
        b_offset += t->b_k;
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int p = 0; p < panels; p++)
            v_store(t->c + i * t->c_row + p * t->c_panel, acc[i * panels + p]);
}

/* Any number of rows and panels, for B of `dtype`. Out of line, one copy per instruction set (kernels/cpu/gemm.c). */
void LR_ISA(lr_tile_product)(const struct lr_tile *t, int64_t rows, int64_t panels, enum lr_dtype dtype);

#endif
