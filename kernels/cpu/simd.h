/* Sixteen float32 lanes under three names of the same arithmetic.
 *
 * A file of kernels/cpu is compiled three times (see kernels/CMakeLists.txt), once per instruction set; LR_ISA_SUFFIX
 * names its symbols. lr_v16 is one AVX-512 register, two AVX2 registers or a plain array: every operation below is
 * IEEE and lane-wise, so all three give the same bits. */
#ifndef LR_KERNELS_CPU_SIMD_H
#define LR_KERNELS_CPU_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LR_CAT2(a, b) a##_##b
#define LR_CAT(a, b) LR_CAT2(a, b)
/* lr_gemm -> lr_gemm_v4 and so on */
#define LR_ISA(name) LR_CAT(name, LR_ISA_SUFFIX)

#define LR_INLINE static inline __attribute__((always_inline, unused))

#if defined(LR_SIMD_V4)
#include <immintrin.h>

typedef __m512 lr_v16;
typedef __m512i lr_i16;

LR_INLINE lr_v16 v_zero(void)
{
    return _mm512_setzero_ps();
}
LR_INLINE lr_v16 v_set1(float x)
{
    return _mm512_set1_ps(x);
}
LR_INLINE lr_v16 v_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
LR_INLINE void v_store(float *p, lr_v16 a)
{
    _mm512_storeu_ps(p, a);
}
LR_INLINE lr_v16 v_add(lr_v16 a, lr_v16 b)
{
    return _mm512_add_ps(a, b);
}
LR_INLINE lr_v16 v_sub(lr_v16 a, lr_v16 b)
{
    return _mm512_sub_ps(a, b);
}
LR_INLINE lr_v16 v_mul(lr_v16 a, lr_v16 b)
{
    return _mm512_mul_ps(a, b);
}
LR_INLINE lr_v16 v_div(lr_v16 a, lr_v16 b)
{
    return _mm512_div_ps(a, b);
}
LR_INLINE lr_v16 v_sqrt(lr_v16 a)
{
    return _mm512_sqrt_ps(a);
}
LR_INLINE lr_v16 v_fma(lr_v16 a, lr_v16 b, lr_v16 c)
{
    return _mm512_fmadd_ps(a, b, c);
}
/* a > b ? a : b, so a NaN in either gives b */
LR_INLINE lr_v16 v_max(lr_v16 a, lr_v16 b)
{
    return _mm512_max_ps(a, b);
}
LR_INLINE lr_v16 v_min(lr_v16 a, lr_v16 b)
{
    return _mm512_min_ps(a, b);
}
/* a < b ? x : y, lane by lane */
LR_INLINE lr_v16 v_select_lt(lr_v16 a, lr_v16 b, lr_v16 x, lr_v16 y)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
/* nearest integer, ties to even */
LR_INLINE lr_v16 v_round(lr_v16 a)
{
    return _mm512_roundscale_ps(a, 8);
}
LR_INLINE lr_i16 v_to_int(lr_v16 a)
{
    return _mm512_cvtps_epi32(a);
}
LR_INLINE lr_v16 v_from_int(lr_i16 a)
{
    return _mm512_cvtepi32_ps(a);
}
LR_INLINE lr_i16 i_add(lr_i16 a, int32_t b)
{
    return _mm512_add_epi32(a, _mm512_set1_epi32(b));
}
LR_INLINE lr_i16 i_sub(lr_i16 a, lr_i16 b)
{
    return _mm512_sub_epi32(a, b);
}
LR_INLINE lr_i16 i_and(lr_i16 a, int32_t b)
{
    return _mm512_and_si512(a, _mm512_set1_epi32(b));
}
LR_INLINE lr_i16 i_or(lr_i16 a, int32_t b)
{
    return _mm512_or_si512(a, _mm512_set1_epi32(b));
}
LR_INLINE lr_i16 i_shl23(lr_i16 a)
{
    return _mm512_slli_epi32(a, 23);
}
LR_INLINE lr_i16 i_sra23(lr_i16 a)
{
    return _mm512_srai_epi32(a, 23);
}
LR_INLINE lr_i16 v_bits(lr_v16 a)
{
    return _mm512_castps_si512(a);
}
LR_INLINE lr_v16 v_from_bits(lr_i16 a)
{
    return _mm512_castsi512_ps(a);
}
/* 16 bf16 or f16 values, widened */
LR_INLINE lr_v16 v_load_bf16(const uint16_t *p)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
LR_INLINE lr_v16 v_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
}

#elif defined(LR_SIMD_V3)
#include <immintrin.h>

typedef struct {
    __m256 lo, hi;
} lr_v16;
typedef struct {
    __m256i lo, hi;
} lr_i16;

#define LR_V3_2(op, a, b) ((lr_v16){op((a).lo, (b).lo), op((a).hi, (b).hi)})
LR_INLINE lr_v16 v_zero(void)
{
    return (lr_v16){_mm256_setzero_ps(), _mm256_setzero_ps()};
}
LR_INLINE lr_v16 v_set1(float x)
{
    __m256 v = _mm256_set1_ps(x);
    return (lr_v16){v, v};
}
LR_INLINE lr_v16 v_load(const float *p)
{
    return (lr_v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
LR_INLINE void v_store(float *p, lr_v16 a)
{
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
LR_INLINE lr_v16 v_add(lr_v16 a, lr_v16 b)
{
    return LR_V3_2(_mm256_add_ps, a, b);
}
LR_INLINE lr_v16 v_sub(lr_v16 a, lr_v16 b)
{
    return LR_V3_2(_mm256_sub_ps, a, b);
}
LR_INLINE lr_v16 v_mul(lr_v16 a, lr_v16 b)
{
    return LR_V3_2(_mm256_mul_ps, a, b);
}
LR_INLINE lr_v16 v_div(lr_v16 a, lr_v16 b)
{
    return LR_V3_2(_mm256_div_ps, a, b);
}
LR_INLINE lr_v16 v_sqrt(lr_v16 a)
{
    return (lr_v16){_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)};
}
LR_INLINE lr_v16 v_fma(lr_v16 a, lr_v16 b, lr_v16 c)
{
    return (lr_v16){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
LR_INLINE lr_v16 v_max(lr_v16 a, lr_v16 b)
{
    return LR_V3_2(_mm256_max_ps, a, b);
}
LR_INLINE lr_v16 v_min(lr_v16 a, lr_v16 b)
{
    return LR_V3_2(_mm256_min_ps, a, b);
}
LR_INLINE lr_v16 v_select_lt(lr_v16 a, lr_v16 b, lr_v16 x, lr_v16 y)
{
    return (lr_v16){_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
                    _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
LR_INLINE lr_v16 v_round(lr_v16 a)
{
    return (lr_v16){_mm256_round_ps(a.lo, 8), _mm256_round_ps(a.hi, 8)};
}
LR_INLINE lr_i16 v_to_int(lr_v16 a)
{
    return (lr_i16){_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}
LR_INLINE lr_v16 v_from_int(lr_i16 a)
{
    return (lr_v16){_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}
#define LR_V3_I(op, a, b) ((lr_i16){op((a).lo, _mm256_set1_epi32(b)), op((a).hi, _mm256_set1_epi32(b))})
LR_INLINE lr_i16 i_add(lr_i16 a, int32_t b)
{
    return LR_V3_I(_mm256_add_epi32, a, b);
}
LR_INLINE lr_i16 i_sub(lr_i16 a, lr_i16 b)
{
    return (lr_i16){_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
LR_INLINE lr_i16 i_and(lr_i16 a, int32_t b)
{
    return LR_V3_I(_mm256_and_si256, a, b);
}
LR_INLINE lr_i16 i_or(lr_i16 a, int32_t b)
{
    return LR_V3_I(_mm256_or_si256, a, b);
}
LR_INLINE lr_i16 i_shl23(lr_i16 a)
{
    return (lr_i16){_mm256_slli_epi32(a.lo, 23), _mm256_slli_epi32(a.hi, 23)};
}
LR_INLINE lr_i16 i_sra23(lr_i16 a)
{
    return (lr_i16){_mm256_srai_epi32(a.lo, 23), _mm256_srai_epi32(a.hi, 23)};
}
LR_INLINE lr_i16 v_bits(lr_v16 a)
{
    return (lr_i16){_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)};
}
LR_INLINE lr_v16 v_from_bits(lr_i16 a)
{
    return (lr_v16){_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}
LR_INLINE lr_v16 v_load_bf16(const uint16_t *p)
{
    __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p));
    __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(p + 8)));
    return (lr_v16){_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
LR_INLINE lr_v16 v_load_f16(const uint16_t *p)
{
    return (lr_v16){_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)),
                    _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p + 8)))};
}

#else /* plain C: for proof, not for speed */

typedef struct {
    float x[16];
} lr_v16;
typedef struct {
    int32_t x[16];
} lr_i16;

#define LR_LANES(expression)                                                                                           \
    lr_v16 r;                                                                                                          \
    for (int i = 0; i < 16; i++)                                                                                       \
        r.x[i] = (expression);                                                                                         \
    return r
#define LR_INT_LANES(expression)                                                                                       \
    lr_i16 r;                                                                                                          \
    for (int i = 0; i < 16; i++)                                                                                       \
        r.x[i] = (expression);                                                                                         \
    return r
LR_INLINE float lr_half_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 1023u;
    if (exponent == 0) {
        float f = (float)fraction * 0x1p-24f;
        return sign ? -f : f;
    }
    uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
LR_INLINE lr_v16 v_zero(void)
{
    LR_LANES(0.0f);
}
LR_INLINE lr_v16 v_set1(float x)
{
    LR_LANES(x);
}
LR_INLINE lr_v16 v_load(const float *p)
{
    LR_LANES(p[i]);
}
LR_INLINE void v_store(float *p, lr_v16 a)
{
    memcpy(p, a.x, sizeof a.x);
}
LR_INLINE lr_v16 v_add(lr_v16 a, lr_v16 b)
{
    LR_LANES(a.x[i] + b.x[i]);
}
LR_INLINE lr_v16 v_sub(lr_v16 a, lr_v16 b)
{
    LR_LANES(a.x[i] - b.x[i]);
}
LR_INLINE lr_v16 v_mul(lr_v16 a, lr_v16 b)
{
    LR_LANES(a.x[i] * b.x[i]);
}
LR_INLINE lr_v16 v_div(lr_v16 a, lr_v16 b)
{
    LR_LANES(a.x[i] / b.x[i]);
}
LR_INLINE lr_v16 v_sqrt(lr_v16 a)
{
    LR_LANES(sqrtf(a.x[i]));
}
LR_INLINE lr_v16 v_fma(lr_v16 a, lr_v16 b, lr_v16 c)
{
    LR_LANES(fmaf(a.x[i], b.x[i], c.x[i]));
}
LR_INLINE lr_v16 v_max(lr_v16 a, lr_v16 b)
{
    LR_LANES(a.x[i] > b.x[i] ? a.x[i] : b.x[i]);
}
LR_INLINE lr_v16 v_min(lr_v16 a, lr_v16 b)
{
    LR_LANES(a.x[i] < b.x[i] ? a.x[i] : b.x[i]);
}
LR_INLINE lr_v16 v_select_lt(lr_v16 a, lr_v16 b, lr_v16 x, lr_v16 y)
{
    LR_LANES(a.x[i] < b.x[i] ? x.x[i] : y.x[i]);
}
LR_INLINE lr_v16 v_round(lr_v16 a)
{
    LR_LANES(rintf(a.x[i]));
}
LR_INLINE lr_i16 v_to_int(lr_v16 a)
{
    LR_INT_LANES((int32_t)rintf(a.x[i]));
}
LR_INLINE lr_v16 v_from_int(lr_i16 a)
{
    LR_LANES((float)a.x[i]);
}
LR_INLINE lr_i16 i_add(lr_i16 a, int32_t b)
{
    LR_INT_LANES((int32_t)((uint32_t)a.x[i] + (uint32_t)b));
}
LR_INLINE lr_i16 i_sub(lr_i16 a, lr_i16 b)
{
    LR_INT_LANES((int32_t)((uint32_t)a.x[i] - (uint32_t)b.x[i]));
}
LR_INLINE lr_i16 i_and(lr_i16 a, int32_t b)
{
    LR_INT_LANES(a.x[i] & b);
}
LR_INLINE lr_i16 i_or(lr_i16 a, int32_t b)
{
    LR_INT_LANES(a.x[i] | b);
}
LR_INLINE lr_i16 i_shl23(lr_i16 a)
{
    LR_INT_LANES((int32_t)((uint32_t)a.x[i] << 23));
}
LR_INLINE lr_i16 i_sra23(lr_i16 a)
{
    LR_INT_LANES(a.x[i] >> 23);
}
LR_INLINE lr_i16 v_bits(lr_v16 a)
{
    lr_i16 r;
    memcpy(&r, &a, sizeof r);
    return r;
}
LR_INLINE lr_v16 v_from_bits(lr_i16 a)
{
    lr_v16 r;
    memcpy(&r, &a, sizeof r);
    return r;
}
LR_INLINE lr_v16 v_load_bf16(const uint16_t *p)
{
    lr_i16 wide;
    for (int i = 0; i < 16; i++)
        wide.x[i] = (int32_t)((uint32_t)p[i] << 16);
    return v_from_bits(wide);
}
LR_INLINE lr_v16 v_load_f16(const uint16_t *p)
{
    LR_LANES(lr_half_to_float(p[i]));
}

#endif

/* The one tree by which sixteen lanes become a sum: lane j + lane j+8, then +4, +2, +1. */
LR_INLINE float v_sum(lr_v16 a)
{
    float x[16];
    v_store(x, a);
    for (int width = 8; width >= 1; width /= 2)
        for (int j = 0; j < width; j++)
            x[j] = x[j] + x[j + width];
    return x[0];
}

/* The first n (1..16) lanes from memory, the others `fill`; nothing behind p[n-1] is read. */
LR_INLINE lr_v16 v_load_part(const float *p, int64_t n, float fill)
{
    float x[16];
    for (int i = 0; i < 16; i++)
        x[i] = i < n ? p[i] : fill;
    return v_load(x);
}

/* Stores the first n (1..16) lanes. */
LR_INLINE void v_store_part(float *p, int64_t n, lr_v16 a)
{
    float x[16];
    v_store(x, a);
    memcpy(p, x, (size_t)n * sizeof *p);
}

#endif
