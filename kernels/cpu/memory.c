/* The CPU backend's memory is the host's: an arena's mapping, and plain copies. So is the memory of reserve_host. */
#include "base/arena.h"
#include "base/memory.h"
#include "kernels/cpu/cpu.h"

#include <string.h>

enum lr_status lr_cpu_reserve(size_t size_bytes, void **out, struct lr_error *err)
{
    struct lr_arena arena;
    LR_TRY(lr_arena_reserve(&arena, size_bytes, err));
    *out = arena.base;
    return LR_OK;
}

void lr_cpu_release(void *base, size_t size_bytes)
{
    struct lr_arena arena = {.base = base, .capacity_bytes = lr_arena_rounded(size_bytes)};
    lr_arena_release(&arena);
}

size_t lr_cpu_available(void)
{
    return lr_memory_available();
}

void lr_cpu_copy(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes)
{
    (void)exec;
    if (size_bytes > 0)
        memcpy(to, from, size_bytes);
}

void lr_cpu_copy_rows(const struct lr_exec *exec,
                      void *to,
                      size_t to_stride,
                      const void *from,
                      size_t from_stride,
                      size_t row_bytes,
                      int64_t n_rows)
{
    (void)exec;
    for (int64_t i = 0; i < n_rows; i++)
        memcpy((char *)to + (size_t)i * to_stride, (const char *)from + (size_t)i * from_stride, row_bytes);
}

void lr_cpu_zero(const struct lr_exec *exec, void *to, size_t size_bytes)
{
    (void)exec;
    if (size_bytes > 0)
        memset(to, 0, size_bytes);
}

enum lr_status
lr_cpu_download(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes, struct lr_error *err)
{
    (void)err;
    lr_cpu_copy(exec, to, from, size_bytes);
    return LR_OK;
}

enum lr_status lr_cpu_wait(const struct lr_exec *exec, struct lr_error *err)
{
    (void)exec;
    (void)err;
    return LR_OK;
}

/* A call is done when it returns, so every lane stands where the caller does. */
void lr_cpu_mark(const struct lr_exec *exec, enum lr_lane lane, int mark)
{
    (void)exec;
    (void)lane;
    (void)mark;
}

void lr_cpu_unit_begin(const struct lr_exec *exec)
{
    (void)exec;
}

enum lr_status lr_cpu_unit_end(const struct lr_exec *exec, struct lr_error *err)
{
    return lr_cpu_wait(exec, err);
}
