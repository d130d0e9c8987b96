/* Collectives between the workers of one world, in host memory; for those in a device's memory see links.h.
 *
 *   lr_comm ---- ops ----> self.c    (one worker, no MPI)
 *                     `--> mpi.c     (the only file that includes mpi.h)
 *                     `--> staged.c  (a device's memory, through one of those)
 *                     `--> nccl.c    (a device's memory, comm/nccl* alone include nccl.h)
 *
 * Every collective is entered by every worker, in the same order, with 0 bytes where a worker has
 * nothing. Each carries a header (sequence number, kind, sizes, label): a worker that is out of
 * step gets LR_OUT_OF_STEP naming both sides instead of a hang or of wrong bytes. Every wait ends
 * at comm->timeout_ms with LR_TIMEOUT, naming the label and the workers that were missing. After a
 * failure the communicator is good for nothing but lr_comm_abort.
 *
 * Called from the worker's main thread only. Buffers belong to the caller and must stay valid until
 * the call returns, or until lr_comm_wait for a started one. No reduction is done in arrival order:
 * maxima and 64-bit integer sums are order-free, everything else moves bytes and leaves arithmetic
 * to the caller. */
#ifndef LR_COMM_COMM_H
#define LR_COMM_COMM_H

#include "base/status.h"
#include <stddef.h>
#include <stdint.h>

enum { LR_COMM_MAX_WORKERS = 1024, LR_COMM_LABEL_BYTES = 48 };

struct lr_comm_ops;
struct lr_lane_ops;

struct lr_comm {
    const struct lr_comm_ops *ops;
    const struct lr_lane_ops *lanes; /* of host memory; NULL elsewhere */
    void *backend;
    int rank;
    int size;
    int host_workers;            /* how many workers share this one's host, this one included */
    int host_index;              /* this one's place among them, in rank order */
    int root_is_here;            /* worker 0 is on this one's host */
    enum lr_status failed;       /* the first failure; everything entered after it fails with it */
    uint64_t sequence;           /* raised by one for each collective; part of every header */
    int64_t timeout_ms;          /* deadline of every wait, counted from its start */
    void (*idle)(void *context); /* called now and then inside waits (progress, signals); may be NULL */
    void *idle_context;
    struct lr_comm_stats {
        uint64_t n_collectives, sent_bytes, received_bytes;
        int64_t waited_ns; /* time inside waits */
    } stats;
};

/* A started collective. Zero-initialised by the caller, one per operation in flight. */
struct lr_comm_request {
    void *pending; /* of the backend; NULL when nothing is in flight */
};

/* The world of one worker. */
void lr_comm_open_self(struct lr_comm *comm);

/* Joins the MPI world this process was started in (MPI_Init_thread, MPI_THREAD_FUNNELED); once per
 * process. MPI's own start cannot be interrupted: where it takes longer than timeout_ms, a sentence
 * goes to stderr and the process ends with exit code 1. SIGALRM is used for that, here and in close
 * and abort, and must not be used elsewhere. */
LR_MUST_USE enum lr_status lr_comm_open_mpi(int64_t timeout_ms, struct lr_comm *comm, struct lr_error *err);

/* Orderly end, entered by all; waits for the others. Where one of them does not come within the
 * deadline, the world is ended as by lr_comm_abort with exit code 1, after a sentence on stderr.
 * Not after a failure: then lr_comm_abort. */
void lr_comm_close(struct lr_comm *comm);

/* Ends every process of the world with `exit_code`, without waiting for the others. Does not
 * return. Bounded also where the network is cut and MPI's own daemons hang: those of this host, and
 * the workers of this host, are gone after at most LR_COMM_ABORT_SECONDS. Each host must have a
 * worker that aborts; the deadline of waits sees to that. */
enum { LR_COMM_ABORT_SECONDS = 6 };
_Noreturn void lr_comm_abort(struct lr_comm *comm, int exit_code);

/* Writes which workers of this host have died, "worker 1 (host H, process 1234) is gone", and
 * returns its length; "" and 0 where none is known to. Workers of other hosts cannot be asked. Safe
 * in a signal handler: when MPI's daemon ends the world because one worker died, SIGTERM is all
 * that the others hear of it. */
size_t lr_comm_describe_loss(const struct lr_comm *comm, char *text, size_t text_bytes);

/* Whether this is the lowest worker of its host that lives: the one that says what happened. Safe in a
 * signal handler. */
int lr_comm_speaks(const struct lr_comm *comm);

/* `label` names the step in messages ("layer 3 experts"); it must be the same everywhere. All sizes
 * are in bytes. */

LR_MUST_USE enum lr_status lr_comm_barrier(struct lr_comm *comm, const char *label, struct lr_error *err);

/* data [size_bytes] of worker `root` goes to all. */
LR_MUST_USE enum lr_status lr_comm_broadcast(
    struct lr_comm *comm, const char *label, int root, void *data, size_t size_bytes, struct lr_error *err);

/* Worker r's `size_bytes` bytes land at received + r * size_bytes everywhere. `data` may lie there
 * already. */
LR_MUST_USE enum lr_status lr_comm_all_gather(
    struct lr_comm *comm, const char *label, const void *data, size_t size_bytes, void *received, struct lr_error *err);

/* The same with sizes[r] bytes from worker r (known everywhere), packed in rank order; sizes may be
 * 0. */
LR_MUST_USE enum lr_status lr_comm_all_gather_v(struct lr_comm *comm,
                                                const char *label,
                                                const void *data,
                                                const size_t *sizes,
                                                void *received,
                                                struct lr_error *err);

/* all_gather_v that returns at once; lr_comm_wait ends it. Others may be entered in between.
 * `sizes` is copied. */
LR_MUST_USE enum lr_status lr_comm_all_gather_v_start(struct lr_comm *comm,
                                                      const char *label,
                                                      const void *data,
                                                      const size_t *sizes,
                                                      void *received,
                                                      struct lr_comm_request *request,
                                                      struct lr_error *err);

/* send_sizes[r] bytes to each worker r, packed in rank order in `data`; recv_sizes[r] from each,
 * packed likewise. recv_sizes must be known: lr_comm_exchange_sizes. */
LR_MUST_USE enum lr_status lr_comm_all_to_all_v(struct lr_comm *comm,
                                                const char *label,
                                                const void *data,
                                                const size_t *send_sizes,
                                                void *received,
                                                const size_t *recv_sizes,
                                                struct lr_error *err);
LR_MUST_USE enum lr_status lr_comm_all_to_all_v_start(struct lr_comm *comm,
                                                      const char *label,
                                                      const void *data,
                                                      const size_t *send_sizes,
                                                      void *received,
                                                      const size_t *recv_sizes,
                                                      struct lr_comm_request *request,
                                                      struct lr_error *err);

/* recv_sizes[r] = what worker r put into its send_sizes[me]. */
LR_MUST_USE enum lr_status lr_comm_exchange_sizes(
    struct lr_comm *comm, const char *label, const size_t *send_sizes, size_t *recv_sizes, struct lr_error *err);

/* Element-wise maximum (no NaN) and sum over all workers, in place. Both are exact and order-free.
 */
LR_MUST_USE enum lr_status
lr_comm_max_f32(struct lr_comm *comm, const char *label, float *values, size_t n_values, struct lr_error *err);
LR_MUST_USE enum lr_status
lr_comm_sum_i64(struct lr_comm *comm, const char *label, int64_t *values, size_t n_values, struct lr_error *err);

/* One message between two workers. Not a collective: only `from` and `to` enter (others skip it but
 * must raise their sequence by calling it too: every worker calls it and the ones not named return
 * at once). */
LR_MUST_USE enum lr_status lr_comm_pass(struct lr_comm *comm,
                                        const char *label,
                                        int from,
                                        const void *data,
                                        int to,
                                        void *received,
                                        size_t size_bytes,
                                        struct lr_error *err);
/* pass that returns at once; lr_comm_wait ends it. `data` of the sender and `received` of the receiver are in use until
 * then. The request may stay empty where there is nothing to wait for. */
LR_MUST_USE enum lr_status lr_comm_pass_start(struct lr_comm *comm,
                                              const char *label,
                                              int from,
                                              const void *data,
                                              int to,
                                              void *received,
                                              size_t size_bytes,
                                              struct lr_comm_request *request,
                                              struct lr_error *err);

/* Waits for a started operation; does nothing for one that is not in flight. */
LR_MUST_USE enum lr_status lr_comm_wait(struct lr_comm *comm, struct lr_comm_request *request, struct lr_error *err);

/* Lets a transfer in flight make progress; cheap, for use between tiles of compute. */
void lr_comm_poll(struct lr_comm *comm);

/* For whoever waits for the device: what has failed of the transfers that run there, also by their deadline. Cheap,
 * never blocks unless it is to name a failure; then the transfers have been ended, and so will the wait for the device.
 * LR_OK where all is well or nothing is in flight. In host memory nothing runs by itself: the earlier failure, or
 * LR_OK. */
LR_MUST_USE enum lr_status lr_comm_check(struct lr_comm *comm, struct lr_error *err);

/* What carries the bytes: "self", "mpi", "staged", "nccl". */
const char *lr_comm_transport(const struct lr_comm *comm);

#endif
