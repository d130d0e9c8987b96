/* A thread that ends calls of NCCL's which do not return. Private to comm/.
 *
 *   main thread   enter --- [ NCCL's call ] --- leave
 *   watch               looks now and then; overdue: ncclCommAbort, upon which the call returns
 *
 * NCCL's calls return once the launch is on the stream. Only the first use of a connection waits for another worker, or
 * a call whose queue on the device is full: those are what may hang. */
#ifndef LR_COMM_NCCL_WATCH_H
#define LR_COMM_NCCL_WATCH_H

#include "base/status.h"
#include <nccl.h>
#include <stdbool.h>
#include <stdint.h>

struct lr_nccl_watch;

/* Starts the thread. LR_NO_MEMORY. */
enum lr_status lr_nccl_watch_open(struct lr_nccl_watch **out, struct lr_error *err);

/* Ends it; NULL is ignored. */
void lr_nccl_watch_close(struct lr_nccl_watch *watch);

/* The calling thread is about to call NCCL, and will have left before `timeout_ms`. */
void lr_nccl_watch_enter(struct lr_nccl_watch *watch, ncclComm_t nccl, int64_t timeout_ms);

/* It has returned, or never called. False: it took too long, and the communicator is aborted, for good. */
bool lr_nccl_watch_leave(struct lr_nccl_watch *watch);

#endif
