/* The opened device without the table: what the table is made of, and what tests and benchmarks of single slots link.
 *
 *   table.c   the table of slots             lr_kernels_cuda_open
 *   backend.cu    stream, ring, scratch, memory  lr_cuda_device_open      <- here
 *
 * One host thread an exec. C and CUDA C++. */
#ifndef LR_KERNELS_CUDA_DEVICE_H
#define LR_KERNELS_CUDA_DEVICE_H

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* As lr_kernels_cuda_open and lr_kernels_cuda_close, without the table. */
LR_MUST_USE enum lr_status lr_cuda_device_open(int device, struct lr_exec *exec, struct lr_error *err);
void lr_cuda_device_close(struct lr_exec *exec);

extern const struct lr_memory_ops lr_cuda_memory;

#ifdef __cplusplus
}
#endif

#endif
