#include "kernels/cpu/cpu.h"

#include <cpuid.h>

/* Names what x86-64-v4 asks for and this machine lacks. */
static const char *missing_for_v4(void)
{
    if (!__builtin_cpu_supports("avx512f"))
        return "AVX-512F";
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512cd"))
        return "AVX-512 BW, DQ, VL or CD";
    return NULL;
}

/* clang 14 knows no __builtin_cpu_supports("f16c") */
static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

static const char *missing_for_v3(void)
{
    if (!__builtin_cpu_supports("avx2"))
        return "AVX2";
    if (!__builtin_cpu_supports("fma"))
        return "FMA";
    if (!has_f16c())
        return "F16C";
    return NULL;
}

enum lr_status lr_kernels_cpu(enum lr_isa isa, const struct lr_kernel_ops **out, struct lr_error *err)
{
    __builtin_cpu_init();
    const char *lacks_v4 = missing_for_v4(), *lacks_v3 = missing_for_v3();
    switch (isa) {
    case LR_ISA_V4:
        if (lacks_v4)
            return lr_fail(err, LR_UNSUPPORTED, "--isa v4: this machine has no %s", lacks_v4);
        *out = &lr_cpu_ops_v4;
        return LR_OK;
    case LR_ISA_V3:
        if (lacks_v3)
            return lr_fail(err, LR_UNSUPPORTED, "--isa v3: this machine has no %s", lacks_v3);
        *out = &lr_cpu_ops_v3;
        return LR_OK;
    case LR_ISA_C:
        *out = &lr_cpu_ops_c;
        return LR_OK;
    case LR_ISA_AUTO:
        break;
    }
    *out = !lacks_v4 ? &lr_cpu_ops_v4 : !lacks_v3 ? &lr_cpu_ops_v3 : &lr_cpu_ops_c;
    return LR_OK;
}
