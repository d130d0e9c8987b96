/* How a worker ends when it is told to: one sentence naming the wave, and an exit code.
 *
 *   SIGINT    the user's Ctrl-C: exit 130
 *   SIGTERM   MPI's daemon ends the world, because a worker died (then who) or because it was interrupted
 *
 * In a world of several only one worker of worker 0's host speaks. */
#ifndef LR_CLIENT_SIGNALS_H
#define LR_CLIENT_SIGNALS_H

#include "comm/comm.h"

/* Installs the handlers, also where SIGINT was ignored at start. `comm` may be NULL: no world yet. */
void lr_signals_install(struct lr_comm *comm);

/* From now on the default action: the worker is ending anyway. */
void lr_signals_end(void);

/* What the sentence names: "wave 3 of 12", "the questions". Copied; at most 120 bytes. */
void lr_signals_phase(const char *phase);
const char *lr_signals_current_phase(void);

#endif
