/* The table of one instruction set. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/simd.h"

#define TEXT_2(x) #x
#define TEXT(x) TEXT_2(x)

const struct lr_kernel_ops LR_ISA(lr_cpu_ops) = {
    .name = "cpu-" TEXT(LR_ISA_SUFFIX),
    .act_dtype = LR_F32,
    .host_memory = 1,
    .memory =
        {
            .reserve = lr_cpu_reserve,
            .release = lr_cpu_release,
            .available = lr_cpu_available,
            .reserve_host = lr_cpu_reserve,
            .release_host = lr_cpu_release,
            .available_host = lr_cpu_available,
            .copy = lr_cpu_copy,
            .copy_rows = lr_cpu_copy_rows,
            .zero = lr_cpu_zero,
            .upload = lr_cpu_copy,
            .download = lr_cpu_download,
            .wait = lr_cpu_wait,
            .copy_aside = lr_cpu_copy,
            .mark = lr_cpu_mark,
            .await = lr_cpu_mark,
        },
    .unit_begin = lr_cpu_unit_begin,
    .unit_end = lr_cpu_unit_end,
    .rope_table = lr_cpu_rope_table,
#define X(slot) .slot = LR_ISA(lr_##slot),
    LR_CPU_SLOTS(X)
#undef X
};
