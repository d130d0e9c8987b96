/* Links where the devices cannot reach each other: every collective goes through pinned memory of the host.
 *
 *   start   device data --download--> [pinned] ==== host communicator ====> [pinned]     the host waits for the data
 *   wait                                             [pinned] --upload--> device         and for what comes
 *                           what stays at home: device --copy--> device
 *
 * One download and one upload for a collective (two where the own part lies in the middle): data is packed. Who is out
 * of step, late or gone is noticed by the host communicator, whose headers carry the same label.
 *
 * An upload may still read its pinned buffer when the collective is over; the buffer is `uploading` until a download or
 * a wait has returned, which says that all uploads before it are through. Buffers are taken from a small pool, those
 * first that need not be waited for, and grow to the largest step that they served. */
#include "comm/ops.h"

#include "base/clock.h"

#include <stdlib.h>

enum { MAX_IN_FLIGHT = 8, N_BUFFERS = 2 * MAX_IN_FLIGHT + 2, LEAST_BYTES = 64 * 1024 };

struct buffer {
    char *base;
    size_t capacity;
    bool used;
    bool uploading;
};

/* A started gather, all-to-all or pass. `step` comes first: lr_comm_request holds a pointer to it. What came lies in
 * `received`: `before` bytes of the workers before this one, `gap` bytes that are its own, `after` bytes of those after
 * it. */
struct flight {
    struct lr_comm_step step;
    bool used;
    struct lr_comm_request host;
    struct buffer *sent, *received;
    char *to; /* backend memory: before, own, after */
    size_t before, gap, own, after;
};

struct staged {
    struct lr_links links;
    struct flight flights[MAX_IN_FLIGHT];
    struct buffer buffers[N_BUFFERS];
    size_t *send_sizes, *recv_sizes; /* [size] scratch */
};

static struct staged *staged_of(const struct lr_comm *comm)
{
    return comm->backend;
}

/* ---- pinned memory ---- */

static void settle(struct staged *staged)
{
    for (int i = 0; i < N_BUFFERS; i++)
        staged->buffers[i].uploading = false;
}

static void drop(struct staged *staged, struct buffer *buffer)
{
    if (staged->links.memory.unpin)
        staged->links.memory.unpin(staged->links.memory.context, buffer->base, buffer->capacity);
    else
        free(buffer->base);
    *buffer = (struct buffer){0};
}

static enum lr_status grow(struct staged *staged, struct buffer *buffer, size_t size_bytes, struct lr_error *err)
{
    if (buffer->base)
        drop(staged, buffer);
    size_t capacity = LEAST_BYTES;
    while (capacity < size_bytes)
        capacity = capacity > SIZE_MAX / 2 ? size_bytes : capacity * 2;
    buffer->base =
        staged->links.memory.pin ? staged->links.memory.pin(staged->links.memory.context, capacity) : malloc(capacity);
    if (!buffer->base)
        return lr_fail(err, LR_NO_MEMORY, "no %zu bytes of pinned memory for a transfer of %zu", capacity, size_bytes);
    buffer->capacity = capacity;
    return LR_OK;
}

static struct buffer *find_buffer(struct staged *staged, size_t capacity)
{
    for (int i = 0; i < N_BUFFERS; i++) {
        struct buffer *buffer = &staged->buffers[i];
        if (!buffer->used && !buffer->uploading && buffer->capacity >= capacity)
            return buffer;
    }
    return NULL;
}

/* NULL for 0 bytes. There are more buffers than flights can hold. */
static enum lr_status take_buffer(struct staged *staged, size_t size_bytes, struct buffer **out, struct lr_error *err)
{
    *out = NULL;
    if (size_bytes == 0)
        return LR_OK;
    struct buffer *buffer = find_buffer(staged, size_bytes);
    if (!buffer)
        buffer = find_buffer(staged, 0);
    if (!buffer) {
        LR_TRY(staged->links.memory.wait(staged->links.memory.context, err));
        settle(staged);
        buffer = find_buffer(staged, 0);
    }
    if (buffer->capacity < size_bytes)
        LR_TRY(grow(staged, buffer, size_bytes, err));
    buffer->used = true;
    *out = buffer;
    return LR_OK;
}

static void release_buffer(struct buffer *buffer)
{
    if (buffer)
        buffer->used = false;
}

static enum lr_status
download(struct lr_comm *comm, void *to, const void *from, size_t size_bytes, struct lr_error *err)
{
    if (size_bytes == 0)
        return LR_OK;
    struct staged *staged = staged_of(comm);
    int64_t started_ns = lr_clock_ns();
    LR_TRY(staged->links.memory.download(staged->links.memory.context, to, from, size_bytes, err));
    comm->stats.waited_ns += lr_clock_ns() - started_ns;
    settle(staged);
    return LR_OK;
}

static void upload(struct staged *staged, void *to, struct buffer *buffer, size_t at, size_t size_bytes)
{
    if (size_bytes == 0)
        return;
    staged->links.memory.upload(staged->links.memory.context, to, buffer->base + at, size_bytes);
    buffer->uploading = true;
}

static void copy_home(struct staged *staged, void *to, const void *from, size_t size_bytes)
{
    if (size_bytes > 0 && to != from)
        staged->links.memory.copy(staged->links.memory.context, to, from, size_bytes);
}

static void *base_of(struct buffer *buffer, size_t at)
{
    return buffer ? buffer->base + at : NULL;
}

/* ---- started collectives ---- */

static struct flight *find_flight(struct staged *staged)
{
    for (int i = 0; i < MAX_IN_FLIGHT; i++)
        if (!staged->flights[i].used)
            return &staged->flights[i];
    return NULL;
}

static enum lr_status
take_flight(struct lr_comm *comm, enum lr_comm_kind kind, const char *label, struct flight **out, struct lr_error *err)
{
    struct flight *flight = find_flight(staged_of(comm));
    if (!flight)
        return lr_fail(err, LR_FULL, "'%s' cannot start: %d transfers are in flight", label, MAX_IN_FLIGHT);
    *flight = (struct flight){.used = true};
    lr_comm_step_set(&flight->step, kind, label);
    *out = flight;
    return LR_OK;
}

static void release_flight(struct flight *flight)
{
    release_buffer(flight->sent);
    release_buffer(flight->received);
    flight->used = false;
}

/* The bytes of the workers before and after this one. */
static void split_sizes(const struct lr_comm *comm, const size_t *sizes, size_t *before, size_t *after)
{
    *before = *after = 0;
    for (int r = 0; r < comm->size; r++)
        if (r != comm->rank)
            *(r < comm->rank ? before : after) += sizes[r];
}

static void started(struct lr_comm *comm, struct flight *flight, struct lr_comm_request *request)
{
    flight->step.sequence = ++comm->sequence;
    request->pending = &flight->step;
}

static enum lr_status launch_gather(struct lr_comm *comm,
                                    struct flight *flight,
                                    const char *label,
                                    const void *data,
                                    const size_t *sizes,
                                    struct lr_error *err)
{
    struct staged *staged = staged_of(comm);
    LR_TRY(take_buffer(staged, flight->before + flight->own + flight->after, &flight->received, err));
    void *mine = base_of(flight->received, flight->before);
    LR_TRY(download(comm, mine, data, flight->own, err));
    return lr_comm_all_gather_v_start(staged->links.host, label, mine, sizes, base_of(flight->received, 0),
                                      &flight->host, err);
}

static enum lr_status staged_all_gather(struct lr_comm *comm,
                                        const char *label,
                                        const void *data,
                                        const size_t *sizes,
                                        size_t size_bytes,
                                        void *received,
                                        struct lr_comm_request *request,
                                        struct lr_error *err)
{
    struct staged *staged = staged_of(comm);
    struct flight *flight;
    LR_TRY(take_flight(comm, LR_COMM_ALL_GATHER, label, &flight, err));
    for (int r = 0; r < comm->size; r++)
        staged->recv_sizes[r] = sizes ? sizes[r] : size_bytes;
    split_sizes(comm, staged->recv_sizes, &flight->before, &flight->after);
    flight->own = flight->gap = staged->recv_sizes[comm->rank];
    flight->to = received;
    enum lr_status status = comm->size == 1 ? LR_OK : launch_gather(comm, flight, label, data, staged->recv_sizes, err);
    if (status != LR_OK) {
        release_flight(flight);
        return status;
    }
    copy_home(staged, flight->own > 0 ? flight->to + flight->before : NULL, data, flight->own);
    comm->stats.sent_bytes += flight->own * (size_t)(comm->size - 1);
    started(comm, flight, request);
    return LR_OK;
}

static enum lr_status launch_all_to_all(struct lr_comm *comm,
                                        struct flight *flight,
                                        const char *label,
                                        const char *data,
                                        size_t before,
                                        size_t after,
                                        struct lr_error *err)
{
    struct staged *staged = staged_of(comm);
    LR_TRY(take_buffer(staged, before + after, &flight->sent, err));
    LR_TRY(take_buffer(staged, flight->before + flight->after, &flight->received, err));
    if (before > 0)
        LR_TRY(download(comm, base_of(flight->sent, 0), data, before, err));
    if (after > 0)
        LR_TRY(download(comm, base_of(flight->sent, before), data + before + flight->own, after, err));
    return lr_comm_all_to_all_v_start(staged->links.host, label, base_of(flight->sent, 0), staged->send_sizes,
                                      base_of(flight->received, 0), staged->recv_sizes, &flight->host, err);
}

static enum lr_status staged_all_to_all(struct lr_comm *comm,
                                        const char *label,
                                        const void *data,
                                        const size_t *send_sizes,
                                        void *received,
                                        const size_t *recv_sizes,
                                        struct lr_comm_request *request,
                                        struct lr_error *err)
{
    struct staged *staged = staged_of(comm);
    struct flight *flight;
    size_t before, after;
    LR_TRY(take_flight(comm, LR_COMM_ALL_TO_ALL, label, &flight, err));
    for (int r = 0; r < comm->size; r++) {
        staged->send_sizes[r] = r == comm->rank ? 0 : send_sizes[r];
        staged->recv_sizes[r] = r == comm->rank ? 0 : recv_sizes[r];
    }
    split_sizes(comm, send_sizes, &before, &after);
    split_sizes(comm, recv_sizes, &flight->before, &flight->after);
    flight->own = recv_sizes[comm->rank];
    flight->to = received;
    enum lr_status status = comm->size == 1 ? LR_OK : launch_all_to_all(comm, flight, label, data, before, after, err);
    if (status != LR_OK) {
        release_flight(flight);
        return status;
    }
    if (flight->own > 0)
        copy_home(staged, flight->to + flight->before, (const char *)data + before, flight->own);
    comm->stats.sent_bytes += before + after;
    started(comm, flight, request);
    return LR_OK;
}

/* The host's pass names the same two workers; what stays at home is not the host's to copy. */
static enum lr_status launch_pass(struct lr_comm *comm,
                                  struct flight *flight,
                                  const char *label,
                                  int from,
                                  const void *data,
                                  int to,
                                  size_t size_bytes,
                                  struct lr_error *err)
{
    struct staged *staged = staged_of(comm);
    size_t sent = comm->rank == from && from != to ? size_bytes : 0;
    LR_TRY(take_buffer(staged, sent, &flight->sent, err));
    LR_TRY(take_buffer(staged, flight->before, &flight->received, err));
    LR_TRY(download(comm, base_of(flight->sent, 0), data, sent, err));
    comm->stats.sent_bytes += sent;
    return lr_comm_pass_start(staged->links.host, label, from, base_of(flight->sent, 0), to,
                              base_of(flight->received, 0), from == to ? 0 : size_bytes, &flight->host, err);
}

static enum lr_status staged_pass(struct lr_comm *comm,
                                  const char *label,
                                  int from,
                                  const void *data,
                                  int to,
                                  void *received,
                                  size_t size_bytes,
                                  struct lr_comm_request *request,
                                  struct lr_error *err)
{
    struct flight *flight;
    LR_TRY(take_flight(comm, LR_COMM_PASS, label, &flight, err));
    flight->before = comm->rank == to && from != to ? size_bytes : 0;
    flight->to = received;
    enum lr_status status = launch_pass(comm, flight, label, from, data, to, size_bytes, err);
    if (status != LR_OK) {
        release_flight(flight);
        return status;
    }
    if (comm->rank == from && from == to)
        copy_home(staged_of(comm), received, data, size_bytes);
    started(comm, flight, request);
    return LR_OK;
}

static enum lr_status staged_wait(struct lr_comm *comm, struct lr_comm_step *step, struct lr_error *err)
{
    struct staged *staged = staged_of(comm);
    struct flight *flight = (struct flight *)step;
    int64_t started_ns = lr_clock_ns();
    LR_TRY(lr_comm_wait(staged->links.host, &flight->host, err));
    comm->stats.waited_ns += lr_clock_ns() - started_ns;
    comm->stats.received_bytes += flight->before + flight->after;
    upload(staged, flight->to, flight->received, 0, flight->before);
    if (flight->after > 0)
        upload(staged, flight->to + flight->before + flight->own, flight->received, flight->before + flight->gap,
               flight->after);
    release_flight(flight);
    return LR_OK;
}

/* ---- the others: done when they return ---- */

static enum lr_status
staged_broadcast(struct lr_comm *comm, const char *label, int root, void *data, size_t size_bytes, struct lr_error *err)
{
    struct staged *staged = staged_of(comm);
    comm->sequence++;
    if (comm->size == 1)
        return LR_OK;
    struct buffer *buffer;
    bool mine = comm->rank == root;
    LR_TRY(take_buffer(staged, size_bytes, &buffer, err));
    enum lr_status status = download(comm, base_of(buffer, 0), data, mine ? size_bytes : 0, err);
    if (status == LR_OK)
        status = lr_comm_broadcast(staged->links.host, label, root, base_of(buffer, 0), size_bytes, err);
    if (status == LR_OK)
        upload(staged, data, buffer, 0, mine ? 0 : size_bytes);
    release_buffer(buffer);
    if (status != LR_OK)
        return status;
    *(mine ? &comm->stats.sent_bytes : &comm->stats.received_bytes) += size_bytes;
    return LR_OK;
}

static enum lr_status staged_reduce(struct lr_comm *comm,
                                    enum lr_comm_kind kind,
                                    const char *label,
                                    void *values,
                                    size_t n_values,
                                    struct lr_error *err)
{
    struct staged *staged = staged_of(comm);
    comm->sequence++;
    if (comm->size == 1)
        return LR_OK;
    size_t size_bytes = n_values * (kind == LR_COMM_MAXIMUM ? sizeof(float) : sizeof(int64_t));
    struct buffer *buffer;
    LR_TRY(take_buffer(staged, size_bytes, &buffer, err));
    void *staging = base_of(buffer, 0);
    enum lr_status status = download(comm, staging, values, size_bytes, err);
    if (status == LR_OK)
        status = kind == LR_COMM_MAXIMUM ? lr_comm_max_f32(staged->links.host, label, staging, n_values, err)
                                         : lr_comm_sum_i64(staged->links.host, label, staging, n_values, err);
    if (status == LR_OK)
        upload(staged, values, buffer, 0, size_bytes);
    release_buffer(buffer);
    if (status != LR_OK)
        return status;
    comm->stats.sent_bytes += size_bytes;
    comm->stats.received_bytes += size_bytes;
    return LR_OK;
}

/* What is in flight is the host communicator's: it advances, and fails, there. */
static enum lr_status staged_check(struct lr_comm *comm, struct lr_error *err)
{
    struct lr_comm *host = staged_of(comm)->links.host;
    lr_comm_poll(host);
    return lr_comm_check(host, err);
}

static void staged_give_up(struct lr_comm *comm)
{
    (void)comm;
}

/* After a failure the host communicator may still write into the buffers: then they are left to the end of the process.
 */
static void staged_close(struct lr_comm *comm)
{
    struct staged *staged = staged_of(comm);
    struct lr_error err;
    if (comm->failed == LR_OK && staged->links.memory.wait(staged->links.memory.context, &err) == LR_OK) {
        for (int i = 0; i < N_BUFFERS; i++)
            if (staged->buffers[i].base)
                drop(staged, &staged->buffers[i]);
        free(staged->send_sizes);
        free(staged->recv_sizes);
        free(staged);
    }
    comm->backend = NULL;
}

static const struct lr_comm_ops staged_ops = {
    .name = "staged",
    .barrier = lr_links_barrier,
    .broadcast = staged_broadcast,
    .all_gather = staged_all_gather,
    .all_to_all = staged_all_to_all,
    .exchange_sizes = lr_links_exchange_sizes,
    .reduce = staged_reduce,
    .pass = staged_pass,
    .wait = staged_wait,
    .poll = lr_links_poll,
    .check = staged_check,
    .give_up = staged_give_up,
    .describe_loss = lr_links_describe_loss,
    .speaks = lr_links_speaks,
    .close = staged_close,
    .abort = lr_links_abort_world,
};

enum lr_status lr_links_open_staged(struct lr_comm *host,
                                    const struct lr_link_memory *memory,
                                    struct lr_comm *links,
                                    struct lr_error *err)
{
    struct staged *staged = calloc(1, sizeof *staged);
    size_t *send_sizes = calloc((size_t)host->size, sizeof *send_sizes);
    size_t *recv_sizes = calloc((size_t)host->size, sizeof *recv_sizes);
    if (!staged || !send_sizes || !recv_sizes) {
        free(staged);
        free(send_sizes);
        free(recv_sizes);
        return lr_fail(err, LR_NO_MEMORY, "no memory for the links between %d workers", host->size);
    }
    staged->links = (struct lr_links){.host = host, .memory = *memory};
    staged->send_sizes = send_sizes;
    staged->recv_sizes = recv_sizes;
    lr_links_set(links, &staged_ops, &staged->links);
    return LR_OK;
}
