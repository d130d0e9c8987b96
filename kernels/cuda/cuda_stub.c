/* The CUDA backend of a build without CUDA. */
#include "kernels/cuda/cuda.h"

int lr_cuda_device_count(void)
{
    return 0;
}

enum lr_status lr_kernels_cuda_open(int device,
                                    enum lr_dtype act_dtype,
                                    const struct lr_kernel_ops **out,
                                    struct lr_exec *exec,
                                    struct lr_error *err)
{
    (void)device;
    (void)act_dtype;
    (void)out;
    (void)exec;
    return lr_fail(err, LR_UNSUPPORTED, "this build has no CUDA backend (configure with -DLR_CUDA=ON)");
}

void lr_kernels_cuda_close(struct lr_exec *exec)
{
    (void)exec;
}

void lr_cuda_set_idle(struct lr_exec *exec, lr_cuda_idle *idle, void *context)
{
    (void)exec;
    (void)idle;
    (void)context;
}

const char *lr_cuda_device_name(const struct lr_exec *exec)
{
    (void)exec;
    return "";
}
