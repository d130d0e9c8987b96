/* The CUDA backend as the engine sees it. Also there in builds without CUDA: open then says so. */
#ifndef LR_KERNELS_CUDA_CUDA_H
#define LR_KERNELS_CUDA_CUDA_H

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Number of usable devices; 0 without a driver or in a build without CUDA. */
int lr_cuda_device_count(void);

/* Makes `device` the process's device, opens a stream, the ring and the scratch memory, fills exec->stream and
 * exec->backend, and gives the table for activations of act_dtype: LR_BF16 or LR_F16. Blocks (a second or two for the
 * driver). LR_UNSUPPORTED in a build without CUDA or on a device older than sm_80, naming it; LR_NO_MEMORY with the
 * numbers.
 *
 * The environment's LR_CUDA_KERNELS says which of two sets of kernels the device takes: "auto" (the default), "hopper"
 * (sm_90 alone; LR_UNSUPPORTED elsewhere) or "mma" (every device; slower on sm_90). LR_INVALID for another word. The
 * bits of the two differ, so all the workers of a world should have the same. */
LR_MUST_USE enum lr_status lr_kernels_cuda_open(int device,
                                                enum lr_dtype act_dtype,
                                                const struct lr_kernel_ops **out,
                                                struct lr_exec *exec,
                                                struct lr_error *err);
void lr_kernels_cuda_close(struct lr_exec *exec);

/* Called again and again while memory.download and memory.wait wait for the device (and where an upload waits for the
 * ring); a status other than LR_OK ends the wait with it: how a deadline or a lost worker gets in. NULL: none. `idle`
 * fills err on failure. The device may still be at work then, and only closing is safe. */
typedef enum lr_status lr_cuda_idle(void *context, struct lr_error *err);
void lr_cuda_set_idle(struct lr_exec *exec, lr_cuda_idle *idle, void *context);

/* "NVIDIA H100 80GB HBM3", of the opened device. */
const char *lr_cuda_device_name(const struct lr_exec *exec);

#ifdef __cplusplus
}
#endif

#endif
