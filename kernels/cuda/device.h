/* The opened device without the table: what the table is made of, and what tests and benchmarks of single slots link.
 *
 *   open.c       a table of slots             lr_kernels_cuda_open
 *   backend.cu   stream, ring, scratch        lr_cuda_device_open     <- here
 *   memory.cu    reserve, copies, waits       lr_cuda_memory          <- here
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

/* As if the device had n multiprocessors: kernels that stay on them then go through more tiles each. For tests: the bits
 * must not depend on it. */
void lr_cuda_pretend_multiprocessors(struct lr_exec *exec, int n);

/* ---- between backend.cu and memory.cu ---- */

/* Space in the ring: `pinned` for the host to write, `device` beside it. It is free again when the ring has come round
 * and what was launched meanwhile is done; waits for that where it must. At most LR_CUDA_MAX_UPLOAD_BYTES. */
struct lr_cuda_space {
    void *pinned, *device;
};
struct lr_cuda_space lr_cuda_ring_take(const struct lr_exec *exec, size_t size_bytes);

/* Polls until the stream has run dry, calling `idle`. Reports what failed since the last call. */
LR_MUST_USE enum lr_status lr_cuda_drain(const struct lr_exec *exec, struct lr_error *err);

/* The stream of a lane, a cudaStream_t; and the table's marks: an event each. */
void *lr_cuda_lane(const struct lr_exec *exec, enum lr_lane lane);
void lr_cuda_mark(const struct lr_exec *exec, enum lr_lane lane, int mark);
void lr_cuda_await(const struct lr_exec *exec, enum lr_lane lane, int mark);

/* Two halves of pinned memory for downloads. */
enum { LR_CUDA_LANDING_BYTES = 8 << 20 };
void *lr_cuda_landing(const struct lr_exec *exec);

/* memory.fetch and memory.fetched. */
void lr_cuda_fetch(const struct lr_exec *exec, const void *from, size_t size_bytes);
LR_MUST_USE enum lr_status
lr_cuda_fetched(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes, struct lr_error *err);

#ifdef __cplusplus
}
#endif

#endif
