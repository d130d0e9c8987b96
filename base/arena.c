#include "base/arena.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

enum { ARENA_ALIGN = LR_ARENA_ALIGN_BYTES, PAGE_BYTES = 4096 };

size_t lr_arena_rounded(size_t capacity_bytes)
{
    size_t bytes = (capacity_bytes + PAGE_BYTES - 1) & ~(size_t)(PAGE_BYTES - 1);
    return bytes == 0 ? PAGE_BYTES : bytes;
}

enum lr_status lr_arena_reserve(struct lr_arena *arena, size_t capacity_bytes, struct lr_error *err)
{
    size_t bytes = lr_arena_rounded(capacity_bytes);
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED)
        return lr_fail(err, LR_NO_MEMORY, "cannot reserve %zu bytes of memory: %s", bytes, strerror(errno));
    (void)madvise(base, bytes, MADV_HUGEPAGE);
    *arena = (struct lr_arena){.base = base, .capacity_bytes = bytes};
    return LR_OK;
}

void lr_arena_release(struct lr_arena *arena)
{
    if (arena->base)
        munmap(arena->base, arena->capacity_bytes);
    *arena = (struct lr_arena){0};
}

void *lr_arena_alloc(struct lr_arena *arena, size_t count, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes > arena->capacity_bytes)
        return NULL;
    size_t rounded = (bytes + ARENA_ALIGN - 1) & ~(size_t)(ARENA_ALIGN - 1);
    if (rounded > arena->capacity_bytes - arena->used_bytes)
        return NULL;
    void *block = arena->base + arena->used_bytes;
    arena->used_bytes += rounded;
    return block;
}

void lr_arena_rewind(struct lr_arena *arena, size_t mark)
{
    if (mark <= arena->used_bytes)
        arena->used_bytes = mark;
}
