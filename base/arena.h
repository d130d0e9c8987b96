/* A bump allocator over one mapped range.
 *
 *   base                     used                         capacity
 *   |<--- handed out ------->|<--- free, not yet touched --->|
 *
 * Memory is reserved at once and becomes resident when it is touched. Blocks are 256-byte aligned
 * and zeroed on their first use. One thread at a time. */
#ifndef LR_BASE_ARENA_H
#define LR_BASE_ARENA_H

#include "base/status.h"
#include <stddef.h>

enum { LR_ARENA_ALIGN_BYTES = 256 };

/* What an array of `count` objects takes of an arena. */
static inline size_t lr_arena_array_bytes(size_t count, size_t size)
{
    return (count * size + LR_ARENA_ALIGN_BYTES - 1) & ~(size_t)(LR_ARENA_ALIGN_BYTES - 1);
}

struct lr_arena {
    char *base;
    size_t used_bytes;
    size_t capacity_bytes;
};

/* Reserves `capacity_bytes` (rounded up to pages). The caller releases it with lr_arena_release. */
LR_MUST_USE enum lr_status lr_arena_reserve(struct lr_arena *arena, size_t capacity_bytes, struct lr_error *err);
void lr_arena_release(struct lr_arena *arena);

/* What a reservation of capacity_bytes takes: whole pages. */
size_t lr_arena_rounded(size_t capacity_bytes);

/* Hands out memory that somebody else owns (base a multiple of 256): lr_arena_release is not for it. */
static inline struct lr_arena lr_arena_over(void *base, size_t capacity_bytes)
{
    return (struct lr_arena){.base = (char *)base, .capacity_bytes = capacity_bytes};
}

/* `count` objects of `size` bytes, 256-byte aligned; NULL when the arena is full or the product
 * overflows: sizes are planned beforehand, so a NULL is a bug of the plan and callers report
 * LR_NO_MEMORY. */
void *lr_arena_alloc(struct lr_arena *arena, size_t count, size_t size);

/* Gives back everything handed out since `mark` (a former value of used_bytes). Contents stay as
 * they are. */
void lr_arena_rewind(struct lr_arena *arena, size_t mark);

#endif
