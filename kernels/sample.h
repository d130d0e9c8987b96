/* The arithmetic of the slot `sample`, one source for C and CUDA: what is rounded here is rounded the same everywhere,
 * and what is summed is integers, so every backend chooses the same token from the same logits, in whatever order and
 * in however many parts it adds.
 *
 *   key      32 bits, ascending in the order of choice: NaN first, then falling logits (-0 is 0)
 *   place    key << 19 | id: a token's place in that order, ties to the lower id
 *   weight   exp((logit - largest) / temperature) in units of 2^-44, to nearest; 0 from 2^-45 down
 *   bin      a linear division of the exponent, coarse and monotone, to begin a search with: not part of the result
 *
 * Every multiplication and addition below is exact, stands alone or is a written fma: a compiler that contracts changes
 * nothing. */
#ifndef LR_KERNELS_SAMPLE_H
#define LR_KERNELS_SAMPLE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define LR_BOTH static inline __host__ __device__
#else
#define LR_BOTH static inline
#endif

enum { LR_SAMPLE_ID_BITS = 19 };

#define LR_SAMPLE_LOWEST (-31.2) /* exp of it is below 2^-45 */

LR_BOTH uint64_t lr_sample_mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* 53 random bits at the top of 64: a counter-based generator (splitmix64's finaliser, Steele et al. 2014) of seed and
 * position. */
LR_BOTH uint64_t lr_sample_bits(uint64_t seed, int64_t position)
{
    const uint64_t step = 0x9e3779b97f4a7c15u;
    return lr_sample_mix(lr_sample_mix(seed + step) + (uint64_t)position * step) & ~(uint64_t)0x7ff;
}

/* The same, uniform in [0, 1). */
LR_BOTH double lr_sample_uniform(uint64_t seed, int64_t position)
{
    return (double)(lr_sample_bits(seed, position) >> 11) * 0x1p-53;
}

LR_BOTH uint32_t lr_sample_key(float logit)
{
    uint32_t bits;
    memcpy(&bits, &logit, sizeof bits);
    if (logit != logit)
        return 0;
    if (logit == 0.0f)
        return 0x7fffffffu;
    return bits >> 31 ? bits : bits ^ 0x7fffffffu;
}

/* The logit of a key; a NaN for key 0. */
LR_BOTH float lr_sample_logit(uint32_t key)
{
    uint32_t bits = key >> 31 ? key : key ^ 0x7fffffffu;
    float logit;
    memcpy(&logit, &bits, sizeof logit);
    return logit;
}

LR_BOTH uint64_t lr_sample_place(uint32_t key, int64_t id)
{
    return (uint64_t)key << LR_SAMPLE_ID_BITS | (uint64_t)id;
}

/* (logit - largest) / temperature, at most 0; scale is 1 / temperature. */
LR_BOTH double lr_sample_exponent(float logit, float largest, double scale)
{
    return ((double)logit - (double)largest) * scale;
}

/* exp(x) 2^44 to nearest, for x <= 0: 2^n times the Taylor polynomial of degree 11 at |r| <= ln 2 / 2, relative error
 * 2^-47. */
LR_BOTH uint64_t lr_sample_weight(double x)
{
    const double shifter = 0x1.8p52, one = 0x1p52; /* adding them rounds to an integer, in the low bits */
    double shifted = fma(x, 1.44269504088896340736, shifter), n = shifted - shifter;
    double r = fma(n, -0.693147180559945309417, x);
    double p = 1.0 / 39916800;
    p = fma(p, r, 1.0 / 3628800);
    p = fma(p, r, 1.0 / 362880);
    p = fma(p, r, 1.0 / 40320);
    p = fma(p, r, 1.0 / 5040);
    p = fma(p, r, 1.0 / 720);
    p = fma(p, r, 1.0 / 120);
    p = fma(p, r, 1.0 / 24);
    p = fma(p, r, 1.0 / 6);
    p = fma(p, r, 0.5);
    p = fma(p, r, 1.0);
    p = fma(p, r, 1.0);
    uint64_t power_bits, bits;
    memcpy(&power_bits, &shifted, sizeof power_bits);
    power_bits = (power_bits + 1023 + 44) << 52; /* the shifter's own low bits are zero */
    double power;
    memcpy(&power, &power_bits, sizeof power);
    double weight = p * power + one; /* the product is exact */
    memcpy(&bits, &weight, sizeof bits);
    return x > LR_SAMPLE_LOWEST ? bits & 0xfffffffffffffu : 0;
}

/* Which of n_bins equal parts of (LOWEST, 0] x lies in; n_bins where it lies below or is NaN. */
LR_BOTH int lr_sample_bin(double x, int n_bins)
{
    const double shifter = 0x1.8p52;
    double shifted = fma(x, (n_bins - 1) / LR_SAMPLE_LOWEST, shifter);
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return x > LR_SAMPLE_LOWEST ? (int)(bits & 0xffff) : n_bins;
}

/* floor(a b / 2^64) */
LR_BOTH uint64_t lr_sample_high_product(uint64_t a, uint64_t b)
{
#ifdef __CUDA_ARCH__
    return __umul64hi(a, b);
#else
    uint64_t a0 = a & 0xffffffffu, a1 = a >> 32, b0 = b & 0xffffffffu, b1 = b >> 32;
    uint64_t middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (middle & 0xffffffffu);
    return a1 * b1 + (middle >> 32) + (other >> 32);
#endif
}

/* What the sum of the kept weights must reach for top_p of `total`: at least 1. */
LR_BOTH uint64_t lr_sample_nucleus(float top_p, uint64_t total)
{
    double goal = ceil((double)top_p * (double)total);
    return goal < 1.0 ? 1 : goal >= (double)total ? total : (uint64_t)goal;
}

#endif
