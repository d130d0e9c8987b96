/* Opens the CUDA backend: the device, and the table of the activation type that was asked for. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/device.h"

extern struct lr_kernel_ops lr_cuda_ops_bf16, lr_cuda_ops_f16; /* table.c, compiled twice */

/* Backends of one name give the same bits. */
static const char *name_of(enum lr_dtype act_dtype, int hopper_kernels)
{
    if (act_dtype == LR_F16)
        return hopper_kernels ? "cuda-f16" : "cuda-f16-mma";
    return hopper_kernels ? "cuda-bf16" : "cuda-bf16-mma";
}

enum lr_status lr_kernels_cuda_open(int device,
                                    enum lr_dtype act_dtype,
                                    const struct lr_kernel_ops **out,
                                    struct lr_exec *exec,
                                    struct lr_error *err)
{
    if (act_dtype != LR_BF16 && act_dtype != LR_F16)
        return lr_fail(err, LR_UNSUPPORTED, "activations on CUDA are bf16 or f16");
    LR_TRY(lr_cuda_device_open(device, exec, err));
    struct lr_kernel_ops *ops = act_dtype == LR_F16 ? &lr_cuda_ops_f16 : &lr_cuda_ops_bf16;
    ops->name = name_of(act_dtype, lr_cuda_hopper_kernels(exec));
    ops->memory = lr_cuda_memory;
    *out = ops;
    return LR_OK;
}

void lr_kernels_cuda_close(struct lr_exec *exec)
{
    lr_cuda_device_close(exec);
}
