/* exp, log1p, sigmoid and the activations, on sixteen lanes: our own, so that no libm decides our bits.
 *
 * exp:   x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 7 in r (the coefficients of Cephes' expf, Moshier
 *        1984), times 2^n by its exponent field. Largest error 2 ulp. Below -87.3 it gives 0, above 88.37 infinity.
 * log:   mantissa in [sqrt 1/2, sqrt 2), a polynomial of degree 9 (Cephes' logf). Largest error 2 ulp. */
#ifndef LR_KERNELS_CPU_MATH_H
#define LR_KERNELS_CPU_MATH_H

#include "kernels/cpu/simd.h"
#include "kernels/ops.h"

LR_INLINE lr_v16 v_exp(lr_v16 x)
{
    const lr_v16 lowest = v_set1(-87.3f), highest = v_set1(88.37f);
    lr_v16 bounded = v_min(highest, v_max(lowest, x)); /* a NaN stays */
    lr_v16 n = v_round(v_mul(bounded, v_set1(1.44269504088896341f)));
    lr_v16 r = v_fma(n, v_set1(-0.693359375f), bounded);
    r = v_fma(n, v_set1(2.12194440e-4f), r);
    lr_v16 p = v_set1(1.9875691500e-4f);
    p = v_fma(p, r, v_set1(1.3981999507e-3f));
    p = v_fma(p, r, v_set1(8.3334519073e-3f));
    p = v_fma(p, r, v_set1(4.1665795894e-2f));
    p = v_fma(p, r, v_set1(1.6666665459e-1f));
    p = v_fma(p, r, v_set1(5.0000001201e-1f));
    p = v_add(v_fma(p, v_mul(r, r), r), v_set1(1.0f));
    lr_v16 power = v_from_bits(i_shl23(i_add(v_to_int(n), 127)));
    lr_v16 y = v_mul(p, power);
    y = v_select_lt(x, lowest, v_zero(), y);
    return v_select_lt(highest, x, v_set1(INFINITY), y);
}

/* For x >= 1 and finite. */
LR_INLINE lr_v16 v_log(lr_v16 x)
{
    lr_i16 bits = v_bits(x);
    lr_v16 mantissa = v_from_bits(i_or(i_and(bits, 0x007fffff), 0x3f000000)); /* [0.5, 1) */
    lr_v16 e = v_from_int(i_add(i_sra23(bits), -126));
    const lr_v16 half_root = v_set1(0.707106781186547524f), one = v_set1(1.0f);
    e = v_select_lt(mantissa, half_root, v_sub(e, one), e);
    lr_v16 f = v_select_lt(mantissa, half_root, v_sub(v_add(mantissa, mantissa), one), v_sub(mantissa, one));
    lr_v16 z = v_mul(f, f);
    lr_v16 p = v_set1(7.0376836292e-2f);
    p = v_fma(p, f, v_set1(-1.1514610310e-1f));
    p = v_fma(p, f, v_set1(1.1676998740e-1f));
    p = v_fma(p, f, v_set1(-1.2420140846e-1f));
    p = v_fma(p, f, v_set1(1.4249322787e-1f));
    p = v_fma(p, f, v_set1(-1.6668057665e-1f));
    p = v_fma(p, f, v_set1(2.0000714765e-1f));
    p = v_fma(p, f, v_set1(-2.4999993993e-1f));
    p = v_fma(p, f, v_set1(3.3333331174e-1f));
    p = v_mul(v_mul(p, f), z);
    p = v_fma(e, v_set1(-2.12194440e-4f), p);
    p = v_fma(z, v_set1(-0.5f), p);
    return v_fma(e, v_set1(0.693359375f), v_add(f, p));
}

/* log(1 + x), x >= 0 and finite: log u corrected by what 1 + x lost in rounding (Kahan). */
LR_INLINE lr_v16 v_log1p(lr_v16 x)
{
    const lr_v16 one = v_set1(1.0f);
    lr_v16 u = v_add(one, x);
    lr_v16 lost = v_sub(x, v_sub(u, one));
    return v_add(v_log(u), v_div(lost, u));
}

LR_INLINE lr_v16 v_negative(lr_v16 x)
{
    return v_sub(v_zero(), x);
}

LR_INLINE lr_v16 v_absolute(lr_v16 x)
{
    return v_from_bits(i_and(v_bits(x), 0x7fffffff));
}

LR_INLINE lr_v16 v_sigmoid(lr_v16 x)
{
    const lr_v16 one = v_set1(1.0f);
    return v_div(one, v_add(one, v_exp(v_negative(x))));
}

LR_INLINE lr_v16 v_silu(lr_v16 x)
{
    return v_div(x, v_add(v_set1(1.0f), v_exp(v_negative(x))));
}

/* tanh x = 1 - 2 / (exp(2x) + 1): absolute error below 2e-7 */
LR_INLINE lr_v16 v_tanh(lr_v16 x)
{
    const lr_v16 one = v_set1(1.0f);
    return v_sub(one, v_div(v_set1(2.0f), v_add(v_exp(v_add(x, x)), one)));
}

/* Abramowitz and Stegun 7.1.26: absolute error below 5e-7 in float32 */
LR_INLINE lr_v16 v_erf(lr_v16 x)
{
    const lr_v16 one = v_set1(1.0f);
    lr_v16 a = v_absolute(x);
    lr_v16 t = v_div(one, v_fma(v_set1(0.3275911f), a, one));
    lr_v16 p = v_set1(1.061405429f);
    p = v_fma(p, t, v_set1(-1.453152027f));
    p = v_fma(p, t, v_set1(1.421413741f));
    p = v_fma(p, t, v_set1(-0.284496736f));
    p = v_fma(p, t, v_set1(0.254829592f));
    lr_v16 y = v_sub(one, v_mul(v_mul(p, t), v_exp(v_negative(v_mul(a, a)))));
    return v_select_lt(x, v_zero(), v_negative(y), y);
}

LR_INLINE lr_v16 v_gelu(lr_v16 x)
{
    lr_v16 half = v_mul(v_set1(0.5f), x);
    return v_fma(half, v_erf(v_mul(x, v_set1(0.707106781186547524f))), half);
}

LR_INLINE lr_v16 v_gelu_tanh(lr_v16 x)
{
    lr_v16 half = v_mul(v_set1(0.5f), x);
    lr_v16 inner = v_mul(v_fma(v_mul(v_set1(0.044715f), v_mul(x, x)), x, x), v_set1(0.797884560802865356f));
    return v_fma(half, v_tanh(inner), half);
}

LR_INLINE lr_v16 v_activate(lr_v16 x, enum lr_activation activation)
{
    switch (activation) {
    case LR_ACT_SILU:
        return v_silu(x);
    case LR_ACT_GELU:
        return v_gelu(x);
    case LR_ACT_GELU_TANH:
        return v_gelu_tanh(x);
    case LR_ACT_RELU:
        return v_max(x, v_zero());
    case LR_ACT_NONE:
        break;
    }
    return x;
}

/* One value: lane 0 of the same arithmetic. */
LR_INLINE float exp_1(float x)
{
    float y[16];
    v_store(y, v_exp(v_set1(x)));
    return y[0];
}

LR_INLINE float sigmoid_1(float x)
{
    float y[16];
    v_store(y, v_sigmoid(v_set1(x)));
    return y[0];
}

/* softplus as PyTorch has it: x above 20, else log1p(exp(x)) */
LR_INLINE lr_v16 v_softplus(lr_v16 x)
{
    lr_v16 y = v_log1p(v_exp(v_min(v_set1(20.0f), x)));
    return v_select_lt(v_set1(20.0f), x, x, y);
}

#endif
