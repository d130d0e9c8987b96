/* Links: the collectives of comm.h on the backend's memory.
 *
 *   engine->comm   host memory: sizes, counts, agreement, tokens                     mpi.c or self.c
 *   engine->links  the backend's memory: everything that is a tensor
 *                    CPU      the same communicator as engine->comm
 *                    staged   device --> pinned host memory --> engine->comm --> pinned --> device
 *                    nccl     device --> device, on a stream of its own
 *
 * Links are a struct lr_comm, entered with the functions of comm.h in the same order by every worker. Data pointers are
 * in the backend's memory, of any alignment; arrays of sizes, labels and requests are in the host's. lr_comm_barrier
 * and lr_comm_exchange_sizes go over the host communicator (the array of received sizes too is in host memory) and do
 * not wait for the device. Behind a barrier all workers were in step.
 *
 * Order: a collective takes its data after everything launched before on the kernels' stream, and what is launched
 * after it, or after lr_comm_wait for a started one, sees what came. Between start and wait kernels run beside the
 * transfer and must leave both buffers alone. With NCCL the host does not wait for the transfer: LR_OK then says that
 * it was launched, and a failure shows in a later call, or in lr_comm_check, which whoever waits for the device calls
 * while waiting. The staged ones wait on the host.
 *
 * Buffers of one call do not overlap, but for an all-gather whose data lies in its place already. */
#ifndef LR_COMM_LINKS_H
#define LR_COMM_LINKS_H

#include "comm/comm.h"
#include <stdbool.h>

/* The backend's memory as links use it: struct lr_memory_ops of kernels/ops.h with its exec bound as `context`. Filled
 * by the engine; copied by open. Called from the thread that enters the collectives. */
struct lr_link_memory {
    void *context;
    void *stream; /* cudaStream_t of the kernels: for NCCL; NULL where there is none */

    /* Backend memory to backend memory; the ranges do not overlap. May return before it is done. */
    void (*copy)(void *context, void *to, const void *from, size_t size_bytes);

    /* Host memory, from `pin`, to backend memory. May return before it is done: `from` is left alone until the next
     * download or wait has returned. */
    void (*upload)(void *context, void *to, const void *from, size_t size_bytes);

    /* Backend memory to host memory, from `pin`, after everything launched before. Blocks. */
    enum lr_status (*download)(void *context, void *to, const void *from, size_t size_bytes, struct lr_error *err);
    enum lr_status (*wait)(void *context, struct lr_error *err);

    /* Host memory that the device reads and writes at full speed; pin gives NULL where there is none left. Both may be
     * NULL: then it is ordinary memory. */
    void *(*pin)(void *context, size_t size_bytes);
    void (*unpin)(void *context, void *base, size_t size_bytes);
};

/* Links over the lanes of `host`, through pinned memory that grows as needed. Works with any backend, any number of
 * workers on one device, and a world of one (then only `copy` is used). Entered by all. `host` stays the caller's, must
 * live longer than the links, and may be used between any two calls on them. */
LR_MUST_USE enum lr_status lr_links_open_staged(struct lr_comm *host,
                                                const struct lr_link_memory *memory,
                                                struct lr_comm *links,
                                                struct lr_error *err);

/* Links over NCCL, of the device that is current in the calling thread. Entered by all; succeeds or fails at all
 * workers alike, so that all can then open staged ones. LR_UNSUPPORTED, naming why, in a build without NCCL, where two
 * workers share a device, and where NCCL itself refuses. Blocks until all are connected, at most the deadline of
 * `host`. */
LR_MUST_USE enum lr_status lr_links_open_nccl(struct lr_comm *host,
                                              const struct lr_link_memory *memory,
                                              struct lr_comm *links,
                                              struct lr_error *err);

/* Whether steps on these links may lie in a unit of the kernels (unit_begin, unit_end of kernels/ops.h): NCCL's, and
 * those of a world of one. Then the unit of the links is around that of the kernels, at all workers alike:
 *
 *   lr_links_unit_begin | unit_begin  kernels, steps, kernels ...  unit_end | lr_links_unit_end
 *
 * In it steps are noted and launched as everywhere, but as parts of the graph that starts with unit_end. Every started
 * one is waited for in it. lr_comm_check is not called in it. */
bool lr_links_capture(const struct lr_comm *links);
LR_MUST_USE enum lr_status lr_links_unit_begin(struct lr_comm *links, struct lr_error *err);
LR_MUST_USE enum lr_status lr_links_unit_end(struct lr_comm *links, struct lr_error *err);

/* Orderly end, entered by all, before the end of `host`, which stays open. Waits for what is in flight. After a failure
 * it is lr_links_abort. Nothing for links that were never opened (all zero). */
void lr_links_close(struct lr_comm *links);

/* Ends what is in flight on this worker's device, so that waiting for the device ends too, and gives up everything.
 * Bounded time, without the others. Links are then good for nothing but lr_links_close; `host` may still be used, but
 * what was in flight on it stays there, so that the way out is lr_comm_abort. Called before that after a failure of
 * whatever kind. */
void lr_links_abort(struct lr_comm *links);

#endif
