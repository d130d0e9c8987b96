/* The world of one worker: there is nobody to exchange with. */
#include "comm/ops.h"

#include <string.h>
#include <unistd.h>

static enum lr_status self_begin(struct lr_comm *comm,
                                 enum lr_comm_kind kind,
                                 const char *label,
                                 struct lr_comm_exchange **out,
                                 struct lr_error *err)
{
    (void)comm;
    (void)out;
    return lr_fail(err, LR_INTERNAL, "a world of one worker has no exchange: %s at '%s'", lr_comm_kind_text(kind),
                   label);
}

static enum lr_status self_launch(struct lr_comm *comm, struct lr_comm_exchange *exchange, struct lr_error *err)
{
    (void)comm;
    return lr_fail(err, LR_INTERNAL, "a world of one worker has no exchange: '%s'", exchange->step.label);
}

static void self_poll(struct lr_comm *comm)
{
    (void)comm;
}

static void *self_scratch(struct lr_comm *comm, size_t *size_bytes)
{
    (void)comm;
    *size_bytes = 0;
    return NULL;
}

static size_t self_describe_loss(const struct lr_comm *comm, char *text, size_t text_bytes)
{
    (void)comm;
    if (text_bytes > 0)
        text[0] = '\0';
    return 0;
}

static int self_speaks(const struct lr_comm *comm)
{
    (void)comm;
    return 1;
}

static void self_abort(struct lr_comm *comm, int exit_code)
{
    (void)comm;
    _exit(exit_code);
}

static const struct lr_lane_ops self_lanes = {
    .begin = self_begin,
    .launch = self_launch,
    .finish = self_launch,
    .scratch = self_scratch,
};

static const struct lr_comm_ops self_ops = {
    .name = "self",
    .barrier = lr_lanes_barrier,
    .broadcast = lr_lanes_broadcast,
    .all_gather = lr_lanes_all_gather,
    .all_to_all = lr_lanes_all_to_all,
    .exchange_sizes = lr_lanes_exchange_sizes,
    .reduce = lr_lanes_reduce,
    .pass = lr_lanes_pass,
    .wait = lr_lanes_wait,
    .poll = self_poll,
    .check = lr_lanes_check,
    .give_up = lr_lanes_give_up,
    .describe_loss = self_describe_loss,
    .speaks = self_speaks,
    .close = self_poll,
    .abort = self_abort,
};

/* Nobody is waited for; links of a world of one wait for the device. */
enum { DEADLINE_MS = 60000 };

void lr_comm_open_self(struct lr_comm *comm)
{
    memset(comm, 0, sizeof *comm);
    comm->ops = &self_ops;
    comm->lanes = &self_lanes;
    comm->size = comm->host_workers = comm->root_is_here = 1;
    comm->timeout_ms = DEADLINE_MS;
}
