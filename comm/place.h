/* Where a worker lives: which host, which process. Private to comm/.
 *
 * Two workers share a host when host name and boot are the same (a name alone is not enough:
 * "localhost"; network namespaces with names of their own count as hosts of their own). They can
 * look after each other when they also share a process namespace. Everything here but
 * lr_place_find is safe in a signal handler. */
#ifndef LR_COMM_PLACE_H
#define LR_COMM_PLACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { LR_PLACE_HOST_BYTES = 64, LR_PLACE_BOOT_BYTES = 40 };

struct lr_place {
    int64_t process;
    int64_t started; /* clock ticks after boot: tells a process from a later one of the same number */
    uint64_t process_namespace;
    char boot[LR_PLACE_BOOT_BYTES];
    char host[LR_PLACE_HOST_BYTES];
};

/* The place of the calling process. */
void lr_place_find(struct lr_place *place);

bool lr_place_same_host(const struct lr_place *a, const struct lr_place *b);

/* Whether `other` is known to have ended, as `mine` sees it; false where that cannot be seen. */
bool lr_place_is_gone(const struct lr_place *mine, const struct lr_place *other);

/* The same for one process of this host; `started` as in struct lr_place. */
bool lr_process_is_gone(int64_t process, int64_t started);

/* The Open MPI daemon (mpirun or orted) above this process, or 0 where another starter was used
 * (Slurm) or none. */
int64_t lr_process_find_daemon(int64_t *started);

/* Text appended without stdio; cut where it does not fit, always NUL-terminated. */
struct lr_text {
    char *start;
    size_t used, size_bytes;
};
void lr_text_add(struct lr_text *text, const char *more);
void lr_text_add_number(struct lr_text *text, int64_t number);

/* Adds "worker 1 (host H, process 1234)". */
void lr_place_describe(struct lr_text *text, int rank, const struct lr_place *place);

#endif
