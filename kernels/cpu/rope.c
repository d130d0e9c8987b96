/* Rotary tables. Sine and cosine are our own: no libm decides our bits, and the angle of token ten million keeps its
 * digits because everything up to the last rounding is float64. */
#include "kernels/cpu/cpu.h"

#include <math.h>

/* sin and cos of x in [-pi/4, pi/4]: Taylor series to x^17 and x^16, error below 1e-16 */
static double sin_small(double x)
{
    static const double c[] = {-1.0 / 6,
                               1.0 / 120,
                               -1.0 / 5040,
                               1.0 / 362880,
                               -1.0 / 39916800,
                               1.0 / 6227020800.0,
                               -1.0 / 1307674368000.0,
                               1.0 / 355687428096000.0};
    double z = x * x, p = c[7];
    for (int i = 6; i >= 0; i--)
        p = p * z + c[i];
    return x + x * (z * p);
}

static double cos_small(double x)
{
    static const double c[] = {-0.5,           1.0 / 24,          -1.0 / 720,           1.0 / 40320,
                               -1.0 / 3628800, 1.0 / 479001600.0, -1.0 / 87178291200.0, 1.0 / 20922789888000.0};
    double z = x * x, p = c[7];
    for (int i = 6; i >= 0; i--)
        p = p * z + c[i];
    return 1.0 + z * p;
}

/* x = n pi/2 + r: pi/2 in three parts (Cody and Waite), the first two of 27 bits: their products with n < 2^26 are
 * exact */
static void sine_cosine(double x, double *sine, double *cosine)
{
    double n = rint(x * 0.63661977236758134308);
    double r = x - n * 0x1.921fb54p+0;
    r = r - n * 0x1.10b461p-30;
    r = r - n * 0x1.a62633145c06ep-58;
    double s = sin_small(r), c = cos_small(r);
    switch ((int64_t)n & 3) {
    case 0:
        *sine = s, *cosine = c;
        return;
    case 1:
        *sine = c, *cosine = -s;
        return;
    case 2:
        *sine = -s, *cosine = -c;
        return;
    default:
        *sine = -c, *cosine = s;
    }
}

void lr_rope_table(const int64_t *positions,
                   int64_t n_rows,
                   const double *inv_freq,
                   int64_t n_freq,
                   double factor,
                   float *cos_out,
                   float *sin_out)
{
    for (int64_t t = 0; t < n_rows; t++)
        for (int64_t j = 0; j < n_freq; j++) {
            double sine, cosine;
            sine_cosine((double)positions[t] * inv_freq[j], &sine, &cosine);
            cos_out[t * n_freq + j] = (float)(cosine * factor);
            sin_out[t * n_freq + j] = (float)(sine * factor);
        }
}

void lr_cpu_rope_table(const struct lr_exec *exec,
                       const int64_t *positions,
                       int64_t n_rows,
                       const double *inv_freq,
                       int64_t n_freq,
                       double factor,
                       float *cos_out,
                       float *sin_out)
{
    (void)exec;
    lr_rope_table(positions, n_rows, inv_freq, n_freq, factor, cos_out, sin_out);
}
