/* How much memory this host can still give, and how much of a mapping it has given. */
#ifndef LR_BASE_MEMORY_H
#define LR_BASE_MEMORY_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes that the host has available (MemAvailable), or that the process's control group still allows, whichever is
 * less; a huge number where neither can be read. */
size_t lr_memory_available(void);

/* Bytes of a mapping (`base` on a page's boundary) that are in memory: of an anonymous one those that were touched. */
size_t lr_memory_resident(const void *base, size_t size_bytes);

#ifdef __cplusplus
}
#endif

#endif
