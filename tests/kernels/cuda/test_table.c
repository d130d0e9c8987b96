/* The table: every slot is filled, and opening and closing can be repeated. */
#include "tests/kernels/cuda/check.h"

#include <stddef.h>

static void every_slot_is_filled(void)
{
    struct lr_exec exec = {0};
    struct lr_error err;
    const struct lr_kernel_ops *ops = NULL;
    check_ok(lr_kernels_cuda_open(0, LR_CUDA_DTYPE, &ops, &exec, &err), &err);
    char name[32];
    snprintf(name, sizeof name, "cuda-%s%s", LR_CUDA_DTYPE == LR_F16 ? "f16" : "bf16",
             lr_cuda_hopper_kernels(&exec) ? "" : "-mma");
    check_that(strcmp(ops->name, name) == 0, "its name", 0);
    check_that(ops->act_dtype == LR_CUDA_DTYPE && !ops->host_memory, "what it is", 0);
    const char *first = (const char *)&ops->memory, *end = (const char *)(ops + 1);
    for (const char *slot = first; slot < end; slot += sizeof(void *)) {
        void *function;
        memcpy(&function, slot, sizeof function);
        check_that(function != NULL, "a slot is filled", (slot - first) / (long long)sizeof(void *));
    }
    check_ok(ops->memory.wait(&exec, &err), &err);
    lr_kernels_cuda_close(&exec);
    check_that(!exec.backend && !exec.stream, "closing leaves nothing", 0);
    lr_kernels_cuda_close(&exec);
}

static void memory_comes_back(void)
{
    struct lr_error err;
    size_t before = lr_cuda_memory.available();
    for (int i = 0; i < 3; i++) {
        struct lr_exec exec = {0};
        const struct lr_kernel_ops *ops = NULL;
        check_ok(lr_kernels_cuda_open(0, LR_CUDA_DTYPE, &ops, &exec, &err), &err);
        lr_kernels_cuda_close(&exec);
    }
    size_t after = lr_cuda_memory.available();
    check_that(after + (64u << 20) >= before, "closing gives the memory back", (long long)(before - after));
}

static const struct check_case cases[] = {
    {"every slot is filled", every_slot_is_filled},
    {"memory comes back", memory_comes_back},
};

int main(void)
{
    return check_main(cases, CASES_TO_RUN(cases, 1)); /* the second looks at the whole device: nobody else may use it */
}
