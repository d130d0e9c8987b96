/* Rotary tables: kernels/cpu/rope.c, operation for operation, so that the bits are the CPU's. Every product and sum is
 * rounded by itself (__dmul_rn, __dadd_rn): nothing may become a fused multiply-add. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/rows.cuh"

namespace lr::LR_CUDA_ACT
{

/* c[0] + z (c[1] + z (... c[7])) */
static __device__ __forceinline__ double polynomial(const double (&c)[8], double z)
{
    double p = c[7];
#pragma unroll
    for (int i = 6; i >= 0; i--)
        p = __dadd_rn(__dmul_rn(p, z), c[i]);
    return p;
}

/* sin and cos of x in [-pi/4, pi/4]: Taylor series to x^17 and x^16 */
static __device__ __forceinline__ double sin_small(double x)
{
    const double c[8] = {-1.0 / 6,
                         1.0 / 120,
                         -1.0 / 5040,
                         1.0 / 362880,
                         -1.0 / 39916800,
                         1.0 / 6227020800.0,
                         -1.0 / 1307674368000.0,
                         1.0 / 355687428096000.0};
    const double z = __dmul_rn(x, x);
    return __dadd_rn(x, __dmul_rn(x, __dmul_rn(z, polynomial(c, z))));
}

static __device__ __forceinline__ double cos_small(double x)
{
    const double c[8] = {-0.5,           1.0 / 24,          -1.0 / 720,           1.0 / 40320,
                         -1.0 / 3628800, 1.0 / 479001600.0, -1.0 / 87178291200.0, 1.0 / 20922789888000.0};
    const double z = __dmul_rn(x, x);
    return __dadd_rn(1.0, __dmul_rn(z, polynomial(c, z)));
}

/* x = n pi/2 + r, pi/2 in three parts */
static __device__ __forceinline__ void sine_cosine(double x, double *sine, double *cosine)
{
    const double n = rint(__dmul_rn(x, 0.63661977236758134308));
    double r = __dadd_rn(x, -__dmul_rn(n, 0x1.921fb54p+0));
    r = __dadd_rn(r, -__dmul_rn(n, 0x1.10b461p-30));
    r = __dadd_rn(r, -__dmul_rn(n, 0x1.a62633145c06ep-58));
    const double s = sin_small(r), c = cos_small(r);
    const int quarter = static_cast<int>(static_cast<int64_t>(n) & 3);
    *sine = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
    *cosine = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
}

static __global__ void __launch_bounds__(ROW_THREADS) rope_table_kernel(const int64_t *positions,
                                                                        const double *inv_freq,
                                                                        struct divider n_freq,
                                                                        double factor,
                                                                        uint32_t n_units,
                                                                        float *cos_out,
                                                                        float *sin_out)
{
    const uint32_t unit = blockIdx.x * ROW_THREADS + threadIdx.x;
    if (unit >= n_units)
        return;
    const uint32_t row = n_freq.of(unit);
    double sine, cosine;
    sine_cosine(__dmul_rn(static_cast<double>(positions[row]), inv_freq[unit - row * n_freq.d]), &sine, &cosine);
    cos_out[unit] = static_cast<float>(__dmul_rn(cosine, factor));
    sin_out[unit] = static_cast<float>(__dmul_rn(sine, factor));
}

} // namespace lr::LR_CUDA_ACT

void LR_CUDA(rope_table)(const struct lr_exec *exec,
                        const int64_t *positions,
                        int64_t n_rows,
                        const double *inv_freq,
                        int64_t n_freq,
                        double factor,
                        float *cos_out,
                        float *sin_out)
{
    if (n_rows <= 0 || n_freq <= 0)
        return;
    const int64_t most = LR_CUDA_MAX_UPLOAD_BYTES / static_cast<int64_t>(sizeof *positions);
    for (int64_t first = 0; first < n_rows; first += most) {
        const int64_t n = n_rows - first < most ? n_rows - first : most;
        const double *frequencies =
            static_cast<const double *>(lr_cuda_upload(exec, inv_freq, static_cast<size_t>(n_freq) * sizeof *inv_freq));
        const int64_t *copy = static_cast<const int64_t *>(
            lr_cuda_upload(exec, positions + first, static_cast<size_t>(n) * sizeof *positions));
        const uint32_t n_units = static_cast<uint32_t>(n * n_freq);
        lr::rope_table_kernel<<<lr::blocks_for(n_units, lr::ROW_THREADS), lr::ROW_THREADS, 0, lr::stream_of(exec)>>>(
            copy, frequencies, lr::divider_by(n_freq), factor, n_units, cos_out + first * n_freq,
            sin_out + first * n_freq);
    }
    lr_cuda_note(exec, cudaGetLastError(), "rope_table");
}
