/* What a backend does for lr_comm. Private to comm/.
 *
 * Every collective is one or a few exchanges. In an exchange each worker has a lane to every other:
 *
 *   me --- lane[r].send, send_bytes ------> r     if lane[r].sends
 *   me <-- lane[r].received, recv_bytes --- r     if lane[r].receives
 *
 * A lane of 0 bytes still carries a header: that is how a barrier waits and how divergence shows.
 * The own lane is never used: comm.c copies what stays at home. */
#ifndef LR_COMM_OPS_H
#define LR_COMM_OPS_H

#include "comm/comm.h"
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

struct lr_comm_lane {
    const void *send;
    void *received;
    size_t send_bytes;
    size_t recv_bytes;
    bool sends;
    bool receives;
};

/* One exchange, from begin to finish. Owned by the backend, which embeds it in its own record. */
struct lr_comm_exchange {
    enum lr_comm_kind kind;
    uint64_t sequence;
    char label[LR_COMM_LABEL_BYTES];
    struct lr_comm_lane *lanes; /* [size], cleared by begin, filled by the caller before launch */
};

struct lr_comm_ops {
    const char *name;

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

    /* Advances what is in flight. Never blocks. */
    void (*poll)(struct lr_comm *comm);

    /* Scratch memory of the reductions, free between collectives. */
    void *(*scratch)(struct lr_comm *comm, size_t *size_bytes);

    /* See comm.h. */
    size_t (*describe_loss)(const struct lr_comm *comm, char *text, size_t text_bytes);
    int (*speaks)(const struct lr_comm *comm);
    void (*close)(struct lr_comm *comm);
    void (*abort)(struct lr_comm *comm, int exit_code); /* does not return */
};

const char *lr_comm_kind_text(enum lr_comm_kind kind);

#endif
