/* An end that comes in bounded time, whatever MPI does. Private to comm/.
 *
 * MPI_Init, MPI_Finalize and MPI_Abort block inside the library, and Open MPI's daemons wait for
 * each other without a deadline when the network between them is cut. Two means against that:
 *
 *   alarm    SIGALRM in this process, for a call of MPI that does not return
 *   watcher  a process of its own that outlives this one, for a daemon that ended its workers
 *            and then waits for a daemon that it cannot reach
 *
 * Both end in the same way: daemon and workers of this host get SIGTERM, later SIGKILL. */
#ifndef LR_COMM_ENDING_H
#define LR_COMM_ENDING_H

#include "comm/place.h"

/* What there is to end. Filled once, while all is well. */
struct lr_ending {
    int64_t daemon, daemon_started; /* 0: none */
    struct lr_place mine;
    const struct lr_place *places; /* [n_places] of all workers, this one included; may be NULL */
    int n_places;
    int exit_code;
    const char *sentence; /* written to stderr when the alarm strikes; may be NULL */
};

void lr_ending_find(struct lr_ending *ending);

/* After `seconds` this process ends, and all of its world on this host. `ending` must live on. */
void lr_ending_arm(struct lr_ending *ending, unsigned seconds);
void lr_ending_disarm(void);

/* Starts the watcher: it ends the rest in the same way after `seconds`, and itself once there is
 * nothing left to watch. */
void lr_ending_watch(const struct lr_ending *ending, unsigned seconds);

#endif
