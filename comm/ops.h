/* What carries lr_comm. Private to comm/.
 *
 *   comm.c ----- lr_comm_ops ----> lanes.c ----- lr_lane_ops ----> self.c, mpi.c     host memory
 *   (arguments,              `---> staged.c, through the above                       a device's memory
 *    what failed)            `---> nccl.c                                            a device's memory
 *
 * In host memory every collective is one or a few exchanges. In an exchange each worker has a lane to every other:
 *
 *   me --- lane[r].send, send_bytes ------> r     if lane[r].sends
 *   me <-- lane[r].received, recv_bytes --- r     if lane[r].receives
 *
 * A lane of 0 bytes still carries a header: that is how a barrier waits and how divergence shows.
 * The own lane is never used: lanes.c copies what stays at home. */
#ifndef LR_COMM_OPS_H
#define LR_COMM_OPS_H

#include "comm/links.h"
#include <stdbool.h>

#define LR_COMM_KIND_MAP(X)                                                                                            \
    X(LR_COMM_BARRIER, "barrier")                                                                                      \
    X(LR_COMM_BROADCAST, "broadcast")                                                                                  \
    X(LR_COMM_ALL_GATHER, "all-gather")                                                                                \
    X(LR_COMM_ALL_TO_ALL, "all-to-all")                                                                                \
    X(LR_COMM_SIZES, "exchange of sizes")                                                                              \
    X(LR_COMM_MAXIMUM, "maximum")                                                                                      \
    X(LR_COMM_SUM, "sum")                                                                                              \
    X(LR_COMM_PASS, "pass")

enum lr_comm_kind {
#define X(code, text) code,
    LR_COMM_KIND_MAP(X)
#undef X
};

/* What a started collective is known by. What lr_comm_request holds begins with one. */
struct lr_comm_step {
    enum lr_comm_kind kind;
    uint64_t sequence;
    char label[LR_COMM_LABEL_BYTES];
};

/* The collectives. Arguments were checked, the label is of any length. A status other than LR_OK is final, but for
 * LR_FULL and LR_INVALID, given before anything was sent. Each collective that is entered raises comm->sequence. */
struct lr_comm_ops {
    const char *name;
    bool captures; /* its steps may be entered while the kernels' stream is captured, between unit_begin and unit_end */
    enum lr_status (*barrier)(struct lr_comm *comm, const char *label, struct lr_error *err);
    enum lr_status (*broadcast)(
        struct lr_comm *comm, const char *label, int root, void *data, size_t size_bytes, struct lr_error *err);

    /* Worker r has sizes[r] bytes, or size_bytes where sizes is NULL. `request` is set where there is something to wait
     * for. */
    enum lr_status (*all_gather)(struct lr_comm *comm,
                                 const char *label,
                                 const void *data,
                                 const size_t *sizes,
                                 size_t size_bytes,
                                 void *received,
                                 struct lr_comm_request *request,
                                 struct lr_error *err);
    enum lr_status (*all_to_all)(struct lr_comm *comm,
                                 const char *label,
                                 const void *data,
                                 const size_t *send_sizes,
                                 void *received,
                                 const size_t *recv_sizes,
                                 struct lr_comm_request *request,
                                 struct lr_error *err);
    enum lr_status (*exchange_sizes)(
        struct lr_comm *comm, const char *label, const size_t *send_sizes, size_t *recv_sizes, struct lr_error *err);

    /* LR_COMM_MAXIMUM of float, or LR_COMM_SUM of int64_t. */
    enum lr_status (*reduce)(struct lr_comm *comm,
                             enum lr_comm_kind kind,
                             const char *label,
                             void *values,
                             size_t n_values,
                             struct lr_error *err);
    enum lr_status (*pass)(struct lr_comm *comm,
                           const char *label,
                           int from,
                           const void *data,
                           int to,
                           void *received,
                           size_t size_bytes,
                           struct lr_comm_request *request,
                           struct lr_error *err);
    enum lr_status (*wait)(struct lr_comm *comm, struct lr_comm_step *step, struct lr_error *err);
    void (*poll)(struct lr_comm *comm);
    enum lr_status (*check)(struct lr_comm *comm, struct lr_error *err);

    /* See lr_links_unit_begin; NULL where nothing is captured, or nothing needs to be done. */
    enum lr_status (*unit_begin)(struct lr_comm *comm, struct lr_error *err);
    enum lr_status (*unit_end)(struct lr_comm *comm, struct lr_error *err);

    void (*give_up)(struct lr_comm *comm); /* see lr_links_abort; may be called again */

    /* See comm.h. */
    size_t (*describe_loss)(const struct lr_comm *comm, char *text, size_t text_bytes);
    int (*speaks)(const struct lr_comm *comm);
    void (*close)(struct lr_comm *comm);
    void (*abort)(struct lr_comm *comm, int exit_code); /* does not return */
};

struct lr_comm_lane {
    const void *send;
    void *received;
    size_t send_bytes;
    size_t recv_bytes;
    bool sends;
    bool receives;
};

/* One exchange, from begin to finish. Owned by the transport, which embeds it in its own record. */
struct lr_comm_exchange {
    struct lr_comm_step step;
    struct lr_comm_lane *lanes; /* [size], cleared by begin, filled by the caller before launch */
};

/* What lanes.c makes its collectives of: the host transports. */
struct lr_lane_ops {
    /* Takes a free exchange and clears its lanes; LR_FULL when all are in flight. Never blocks. */
    enum lr_status (*begin)(struct lr_comm *comm,
                            enum lr_comm_kind kind,
                            const char *label,
                            struct lr_comm_exchange **out,
                            struct lr_error *err);

    /* Posts what the lanes say. Never blocks. Buffers stay the caller's and in use until finish. */
    enum lr_status (*launch)(struct lr_comm *comm, struct lr_comm_exchange *exchange, struct lr_error *err);

    /* Blocks until the exchange is done or has failed, and takes it back on success. On failure
     * its buffers may still be written to. Lets the other exchanges in flight advance too. */
    enum lr_status (*finish)(struct lr_comm *comm, struct lr_comm_exchange *exchange, struct lr_error *err);

    /* Scratch memory of the reductions, free between collectives. */
    void *(*scratch)(struct lr_comm *comm, size_t *size_bytes);
};

/* The collectives of a host transport: the slots of its lr_comm_ops. They need comm->lanes. */
enum lr_status lr_lanes_barrier(struct lr_comm *comm, const char *label, struct lr_error *err);
enum lr_status lr_lanes_broadcast(
    struct lr_comm *comm, const char *label, int root, void *data, size_t size_bytes, struct lr_error *err);
enum lr_status lr_lanes_all_gather(struct lr_comm *comm,
                                   const char *label,
                                   const void *data,
                                   const size_t *sizes,
                                   size_t size_bytes,
                                   void *received,
                                   struct lr_comm_request *request,
                                   struct lr_error *err);
enum lr_status lr_lanes_all_to_all(struct lr_comm *comm,
                                   const char *label,
                                   const void *data,
                                   const size_t *send_sizes,
                                   void *received,
                                   const size_t *recv_sizes,
                                   struct lr_comm_request *request,
                                   struct lr_error *err);
enum lr_status lr_lanes_exchange_sizes(
    struct lr_comm *comm, const char *label, const size_t *send_sizes, size_t *recv_sizes, struct lr_error *err);
enum lr_status lr_lanes_reduce(struct lr_comm *comm,
                               enum lr_comm_kind kind,
                               const char *label,
                               void *values,
                               size_t n_values,
                               struct lr_error *err);
enum lr_status lr_lanes_pass(struct lr_comm *comm,
                             const char *label,
                             int from,
                             const void *data,
                             int to,
                             void *received,
                             size_t size_bytes,
                             struct lr_comm_request *request,
                             struct lr_error *err);
enum lr_status lr_lanes_wait(struct lr_comm *comm, struct lr_comm_step *step, struct lr_error *err);
enum lr_status lr_lanes_check(struct lr_comm *comm, struct lr_error *err);

void lr_lanes_give_up(struct lr_comm *comm);

/* What the backends of links begin with, and the slots that they share: over the host communicator. */
struct lr_links {
    struct lr_comm *host;
    struct lr_link_memory memory;
};

/* `links` becomes a communicator of the workers of `host`. */
void lr_links_set(struct lr_comm *links, const struct lr_comm_ops *ops, struct lr_links *backend);

enum lr_status lr_links_barrier(struct lr_comm *comm, const char *label, struct lr_error *err);
enum lr_status lr_links_exchange_sizes(
    struct lr_comm *comm, const char *label, const size_t *send_sizes, size_t *recv_sizes, struct lr_error *err);
void lr_links_poll(struct lr_comm *comm);
size_t lr_links_describe_loss(const struct lr_comm *comm, char *text, size_t text_bytes);
int lr_links_speaks(const struct lr_comm *comm);
void lr_links_abort_world(struct lr_comm *comm, int exit_code);

const char *lr_comm_kind_text(enum lr_comm_kind kind);

/* Names a step; a label that is too long is cut. */
void lr_comm_step_set(struct lr_comm_step *step, enum lr_comm_kind kind, const char *label);

#endif
