/* The table of one instruction set. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/simd.h"

#define TEXT_2(x) #x
#define TEXT(x) TEXT_2(x)

const struct lr_kernel_ops LR_ISA(lr_cpu_ops) = {.name = "cpu-" TEXT(LR_ISA_SUFFIX),
#define X(slot) .slot = LR_ISA(lr_##slot),
                                                 LR_CPU_SLOTS(X)
#undef X
};
