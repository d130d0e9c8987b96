/* How much memory this host can still give. */
#ifndef LR_BASE_MEMORY_H
#define LR_BASE_MEMORY_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes that the host has available (MemAvailable), or that the process's control group still allows, whichever is
 * less; a huge number where neither can be read. */
size_t lr_memory_available(void);

#ifdef __cplusplus
}
#endif

#endif
