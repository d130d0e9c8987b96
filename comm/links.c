/* What all links share: sizes and barriers go over the host communicator, and so do questions about the world. */
#include "comm/ops.h"

static struct lr_comm *host_of(const struct lr_comm *comm)
{
    return ((const struct lr_links *)comm->backend)->host;
}

void lr_links_set(struct lr_comm *links, const struct lr_comm_ops *ops, struct lr_links *backend)
{
    const struct lr_comm *host = backend->host;
    *links = (struct lr_comm){
        .ops = ops,
        .backend = backend,
        .rank = host->rank,
        .size = host->size,
        .host_workers = host->host_workers,
        .host_index = host->host_index,
        .root_is_here = host->root_is_here,
        .timeout_ms = host->timeout_ms,
    };
}

enum lr_status lr_links_barrier(struct lr_comm *comm, const char *label, struct lr_error *err)
{
    comm->sequence++;
    return lr_comm_barrier(host_of(comm), label, err);
}

enum lr_status lr_links_exchange_sizes(
    struct lr_comm *comm, const char *label, const size_t *send_sizes, size_t *recv_sizes, struct lr_error *err)
{
    comm->sequence++;
    return lr_comm_exchange_sizes(host_of(comm), label, send_sizes, recv_sizes, err);
}

void lr_links_poll(struct lr_comm *comm)
{
    lr_comm_poll(host_of(comm));
}

size_t lr_links_describe_loss(const struct lr_comm *comm, char *text, size_t text_bytes)
{
    return lr_comm_describe_loss(host_of(comm), text, text_bytes);
}

int lr_links_speaks(const struct lr_comm *comm)
{
    return lr_comm_speaks(host_of(comm));
}

void lr_links_abort_world(struct lr_comm *comm, int exit_code)
{
    lr_links_abort(comm);
    lr_comm_abort(host_of(comm), exit_code);
}

bool lr_links_capture(const struct lr_comm *links)
{
    return links->size == 1 || links->ops->captures;
}

enum lr_status lr_links_unit_begin(struct lr_comm *links, struct lr_error *err)
{
    if (links->failed == LR_OK && links->ops->unit_begin)
        links->failed = links->ops->unit_begin(links, err);
    return links->failed;
}

enum lr_status lr_links_unit_end(struct lr_comm *links, struct lr_error *err)
{
    if (links->failed == LR_OK && links->ops->unit_end)
        links->failed = links->ops->unit_end(links, err);
    return links->failed;
}

void lr_links_abort(struct lr_comm *links)
{
    if (!links->backend)
        return;
    if (links->failed == LR_OK)
        links->failed = LR_CANCELLED;
    links->ops->give_up(links);
}

void lr_links_close(struct lr_comm *links)
{
    if (links->backend)
        links->ops->close(links);
}
