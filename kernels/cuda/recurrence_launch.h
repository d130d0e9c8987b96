/* Between recurrence.cu, which owns the C interface, and the files that own one kernel each. C++ only. */
#ifndef LR_KERNELS_CUDA_RECURRENCE_LAUNCH_H
#define LR_KERNELS_CUDA_RECURRENCE_LAUNCH_H

#include <cuda_runtime_api.h>

namespace lr::LR_CUDA_ACT
{

struct recurrence_params;

/* T = (I + L)^-1 diag(beta) of every chunk: p.inverses. */
cudaError_t launch_recurrence_inverse(cudaStream_t stream, const recurrence_params &p);

/* output false: p.m and p.b of every slot;  true: p.o from p.entering. Delta reads p.inverses. For Hopper, and for every
 * device. */
cudaError_t launch_recurrence_pass_hopper(cudaStream_t stream, const recurrence_params &p, bool delta, bool output);
cudaError_t launch_recurrence_pass_portable(cudaStream_t stream, const recurrence_params &p, bool delta, bool output);

/* The same without tensor cores, any dk and dv up to 256; needs no inverses. */
cudaError_t launch_recurrence_plain(cudaStream_t stream, const recurrence_params &p, bool delta, bool output);

/* p.m and p.b of each group's slots folded into the group's own; where p.n_groups is not 0, before the two below. */
cudaError_t launch_recurrence_fold_groups(cudaStream_t stream, const recurrence_params &p);

/* s_in (NULL: zero) through p.m and p.b of each sequence's slots: p.entering and, unless NULL, s_out. */
cudaError_t
launch_recurrence_scan(cudaStream_t stream, const recurrence_params &p, bool delta, const float *s_in, float *s_out);

/* p.m and p.b of each sequence's slots folded into one pair a sequence. */
cudaError_t
launch_recurrence_fold_slots(cudaStream_t stream, const recurrence_params &p, bool delta, float *m, float *b);

} // namespace lr::LR_CUDA_ACT

#endif
