/* The collectives of host memory, cut into exchanges; what stays at home is copied here. */
#include "comm/ops.h"

#include <math.h>
#include <string.h>

/* Above this a broadcast is scattered and gathered, so that no link carries the data twice. */
static const size_t broadcast_split_bytes = 64 * 1024;

/* Above this a reduction to more than two workers is done in slices, one per worker. */
static const size_t reduce_split_bytes = 16 * 1024;

static enum lr_status begin(struct lr_comm *comm,
                            enum lr_comm_kind kind,
                            const char *label,
                            struct lr_comm_exchange **out,
                            struct lr_error *err)
{
    LR_TRY(comm->lanes->begin(comm, kind, label, out, err));
    (*out)->step.sequence = ++comm->sequence;
    return LR_OK;
}

static enum lr_status launch(struct lr_comm *comm, struct lr_comm_exchange *exchange, struct lr_error *err)
{
    for (int r = 0; r < comm->size; r++) {
        comm->stats.sent_bytes += exchange->lanes[r].send_bytes;
        comm->stats.received_bytes += exchange->lanes[r].recv_bytes;
    }
    return comm->lanes->launch(comm, exchange, err);
}

static enum lr_status launch_and_finish(struct lr_comm *comm, struct lr_comm_exchange *exchange, struct lr_error *err)
{
    LR_TRY(launch(comm, exchange, err));
    return comm->lanes->finish(comm, exchange, err);
}

static void set_send(struct lr_comm_lane *lane, const void *data, size_t size_bytes)
{
    lane->sends = true;
    lane->send = data;
    lane->send_bytes = size_bytes;
}

static void set_receive(struct lr_comm_lane *lane, void *data, size_t size_bytes)
{
    lane->receives = true;
    lane->received = data;
    lane->recv_bytes = size_bytes;
}

/* A pointer may be NULL where nothing lies behind it. */
static void copy_home(void *to, const void *from, size_t size_bytes)
{
    if (size_bytes > 0 && to != from)
        memmove(to, from, size_bytes);
}

static void *offset(void *base, size_t bytes)
{
    return base ? (char *)base + bytes : NULL;
}

static const void *offset_const(const void *base, size_t bytes)
{
    return base ? (const char *)base + bytes : NULL;
}

enum lr_status lr_lanes_barrier(struct lr_comm *comm, const char *label, struct lr_error *err)
{
    if (comm->size == 1)
        return LR_OK;
    struct lr_comm_exchange *exchange;
    LR_TRY(begin(comm, LR_COMM_BARRIER, label, &exchange, err));
    for (int r = 0; r < comm->size; r++)
        if (r != comm->rank)
            exchange->lanes[r] = (struct lr_comm_lane){.sends = true, .receives = true};
    return launch_and_finish(comm, exchange, err);
}

/* Posts an all-gather of `kind`; sizes are given, or all equal to size_bytes where sizes is NULL.
 */
static enum lr_status gather_start(struct lr_comm *comm,
                                   enum lr_comm_kind kind,
                                   const char *label,
                                   const void *data,
                                   const size_t *sizes,
                                   size_t size_bytes,
                                   void *received,
                                   struct lr_comm_exchange **out,
                                   struct lr_error *err)
{
    struct lr_comm_exchange *exchange;
    LR_TRY(begin(comm, kind, label, &exchange, err));
    size_t mine = sizes ? sizes[comm->rank] : size_bytes;
    size_t at = 0;
    for (int r = 0; r < comm->size; r++) {
        size_t bytes = sizes ? sizes[r] : size_bytes;
        if (r == comm->rank) {
            copy_home(offset(received, at), data, bytes);
        } else {
            set_send(&exchange->lanes[r], data, mine);
            set_receive(&exchange->lanes[r], offset(received, at), bytes);
        }
        at += bytes;
    }
    LR_TRY(launch(comm, exchange, err));
    *out = exchange;
    return LR_OK;
}

/* `data` [size_bytes] cut into one piece per worker, none larger than the first: where piece `rank`
 * begins. */
static size_t piece_start(const struct lr_comm *comm, size_t size_bytes, int rank)
{
    size_t n = (size_t)comm->size;
    size_t piece = (size_bytes / n + (size_bytes % n > 0) + 63) & ~(size_t)63;
    size_t start = piece * (size_t)rank;
    return start < size_bytes ? start : size_bytes;
}

static size_t piece_size(const struct lr_comm *comm, size_t size_bytes, int rank)
{
    if (rank == comm->size - 1)
        return size_bytes - piece_start(comm, size_bytes, rank);
    return piece_start(comm, size_bytes, rank + 1) - piece_start(comm, size_bytes, rank);
}

/* Worker r's piece of `data` goes to everyone: the second half of the split collectives. */
static enum lr_status gather_pieces(struct lr_comm *comm,
                                    enum lr_comm_kind kind,
                                    const char *label,
                                    void *data,
                                    size_t size_bytes,
                                    struct lr_error *err)
{
    struct lr_comm_exchange *exchange;
    LR_TRY(begin(comm, kind, label, &exchange, err));
    const void *mine = offset_const(data, piece_start(comm, size_bytes, comm->rank));
    size_t my_bytes = piece_size(comm, size_bytes, comm->rank);
    for (int r = 0; r < comm->size; r++) {
        if (r == comm->rank)
            continue;
        set_send(&exchange->lanes[r], mine, my_bytes);
        set_receive(&exchange->lanes[r], offset(data, piece_start(comm, size_bytes, r)),
                    piece_size(comm, size_bytes, r));
    }
    return launch_and_finish(comm, exchange, err);
}

static enum lr_status
broadcast_split(struct lr_comm *comm, const char *label, int root, void *data, size_t size_bytes, struct lr_error *err)
{
    struct lr_comm_exchange *exchange;
    LR_TRY(begin(comm, LR_COMM_BROADCAST, label, &exchange, err));
    if (comm->rank == root) {
        for (int r = 0; r < comm->size; r++)
            if (r != root)
                set_send(&exchange->lanes[r], offset(data, piece_start(comm, size_bytes, r)),
                         piece_size(comm, size_bytes, r));
    } else {
        set_receive(&exchange->lanes[root], offset(data, piece_start(comm, size_bytes, comm->rank)),
                    piece_size(comm, size_bytes, comm->rank));
    }
    LR_TRY(launch_and_finish(comm, exchange, err));
    return gather_pieces(comm, LR_COMM_BROADCAST, label, data, size_bytes, err);
}

enum lr_status lr_lanes_broadcast(
    struct lr_comm *comm, const char *label, int root, void *data, size_t size_bytes, struct lr_error *err)
{
    if (comm->size == 1)
        return LR_OK;
    if (comm->size > 2 && size_bytes > broadcast_split_bytes)
        return broadcast_split(comm, label, root, data, size_bytes, err);
    struct lr_comm_exchange *exchange;
    LR_TRY(begin(comm, LR_COMM_BROADCAST, label, &exchange, err));
    if (comm->rank == root) {
        for (int r = 0; r < comm->size; r++)
            if (r != root)
                set_send(&exchange->lanes[r], data, size_bytes);
    } else {
        set_receive(&exchange->lanes[root], data, size_bytes);
    }
    return launch_and_finish(comm, exchange, err);
}

enum lr_status lr_lanes_all_gather(struct lr_comm *comm,
                                   const char *label,
                                   const void *data,
                                   const size_t *sizes,
                                   size_t size_bytes,
                                   void *received,
                                   struct lr_comm_request *request,
                                   struct lr_error *err)
{
    if (comm->size == 1) {
        copy_home(received, data, sizes ? sizes[0] : size_bytes);
        return LR_OK;
    }
    struct lr_comm_exchange *exchange;
    LR_TRY(gather_start(comm, LR_COMM_ALL_GATHER, label, data, sizes, size_bytes, received, &exchange, err));
    request->pending = &exchange->step;
    return LR_OK;
}

enum lr_status lr_lanes_all_to_all(struct lr_comm *comm,
                                   const char *label,
                                   const void *data,
                                   const size_t *send_sizes,
                                   void *received,
                                   const size_t *recv_sizes,
                                   struct lr_comm_request *request,
                                   struct lr_error *err)
{
    struct lr_comm_exchange *exchange = NULL;
    if (comm->size > 1)
        LR_TRY(begin(comm, LR_COMM_ALL_TO_ALL, label, &exchange, err));
    size_t from = 0, to = 0;
    for (int r = 0; r < comm->size; r++) {
        if (r == comm->rank) {
            copy_home(offset(received, to), offset_const(data, from), recv_sizes[r]);
        } else {
            set_send(&exchange->lanes[r], offset_const(data, from), send_sizes[r]);
            set_receive(&exchange->lanes[r], offset(received, to), recv_sizes[r]);
        }
        from += send_sizes[r];
        to += recv_sizes[r];
    }
    if (exchange)
        LR_TRY(launch(comm, exchange, err));
    request->pending = exchange ? &exchange->step : NULL;
    return LR_OK;
}

enum lr_status lr_lanes_exchange_sizes(
    struct lr_comm *comm, const char *label, const size_t *send_sizes, size_t *recv_sizes, struct lr_error *err)
{
    recv_sizes[comm->rank] = send_sizes[comm->rank];
    if (comm->size == 1)
        return LR_OK;
    struct lr_comm_exchange *exchange;
    LR_TRY(begin(comm, LR_COMM_SIZES, label, &exchange, err));
    for (int r = 0; r < comm->size; r++) {
        if (r == comm->rank)
            continue;
        set_send(&exchange->lanes[r], &send_sizes[r], sizeof *send_sizes);
        set_receive(&exchange->lanes[r], &recv_sizes[r], sizeof *recv_sizes);
    }
    return launch_and_finish(comm, exchange, err);
}

/* into[i] = reduction of into[i] and other[i]; sizes in bytes. */
typedef void reducer(void *into, const void *other, size_t size_bytes);

static void reduce_max_f32(void *into, const void *other, size_t size_bytes)
{
    float *a = into;
    const float *b = other;
    for (size_t i = 0; i < size_bytes / sizeof *a; i++)
        if (b[i] > a[i] || (b[i] == a[i] && !signbit(b[i])))
            a[i] = b[i];
}

static void reduce_sum_i64(void *into, const void *other, size_t size_bytes)
{
    uint64_t *a = into; /* unsigned: wraps instead of being undefined */
    const uint64_t *b = other;
    for (size_t i = 0; i < size_bytes / sizeof *a; i++)
        a[i] += b[i];
}

/* Everyone gathers everything and reduces it: one round, for small or few. */
static enum lr_status reduce_whole(struct lr_comm *comm,
                                   enum lr_comm_kind kind,
                                   const char *label,
                                   reducer *reduce,
                                   char *values,
                                   size_t size_bytes,
                                   char *scratch,
                                   struct lr_error *err)
{
    struct lr_comm_exchange *exchange;
    LR_TRY(gather_start(comm, kind, label, values, NULL, size_bytes, scratch, &exchange, err));
    LR_TRY(comm->lanes->finish(comm, exchange, err));
    for (int r = 0; r < comm->size; r++)
        if (r != comm->rank)
            reduce(values, scratch + (size_t)r * size_bytes, size_bytes);
    return LR_OK;
}

/* Each worker reduces one slice for all: two rounds, each value travels twice whatever the number
 * of workers. */
static enum lr_status reduce_sliced(struct lr_comm *comm,
                                    enum lr_comm_kind kind,
                                    const char *label,
                                    reducer *reduce,
                                    char *values,
                                    size_t size_bytes,
                                    char *scratch,
                                    struct lr_error *err)
{
    struct lr_comm_exchange *exchange;
    LR_TRY(begin(comm, kind, label, &exchange, err));
    size_t my_bytes = piece_size(comm, size_bytes, comm->rank);
    for (int r = 0; r < comm->size; r++) {
        if (r == comm->rank)
            continue;
        set_send(&exchange->lanes[r], values + piece_start(comm, size_bytes, r), piece_size(comm, size_bytes, r));
        set_receive(&exchange->lanes[r], scratch + (size_t)r * my_bytes, my_bytes);
    }
    LR_TRY(launch_and_finish(comm, exchange, err));
    char *mine = values + piece_start(comm, size_bytes, comm->rank);
    for (int r = 0; r < comm->size; r++)
        if (r != comm->rank)
            reduce(mine, scratch + (size_t)r * my_bytes, my_bytes);
    return gather_pieces(comm, kind, label, values, size_bytes, err);
}

enum lr_status lr_lanes_reduce(struct lr_comm *comm,
                               enum lr_comm_kind kind,
                               const char *label,
                               void *values,
                               size_t n_values,
                               struct lr_error *err)
{
    if (comm->size == 1)
        return LR_OK;
    reducer *apply = kind == LR_COMM_MAXIMUM ? reduce_max_f32 : reduce_sum_i64;
    size_t value_bytes = kind == LR_COMM_MAXIMUM ? sizeof(float) : sizeof(int64_t);
    size_t scratch_bytes;
    char *scratch = comm->lanes->scratch(comm, &scratch_bytes);
    /* A slice is rounded up to 64 bytes, so that the slices of all take up to 64 bytes each more
     * than the values. */
    size_t most_sliced = (scratch_bytes - 64 * (size_t)comm->size) & ~(size_t)63;
    size_t most_whole = scratch_bytes / (size_t)comm->size & ~(size_t)63;
    size_t left = n_values * value_bytes;
    char *at = values;
    do {
        bool sliced = comm->size > 2 && left > reduce_split_bytes;
        size_t most = sliced ? most_sliced : most_whole;
        size_t now = left < most ? left : most;
        LR_TRY((sliced ? reduce_sliced : reduce_whole)(comm, kind, label, apply, at, now, scratch, err));
        left -= now;
        at = offset(at, now);
    } while (left > 0);
    return LR_OK;
}

enum lr_status lr_lanes_pass(struct lr_comm *comm,
                             const char *label,
                             int from,
                             const void *data,
                             int to,
                             void *received,
                             size_t size_bytes,
                             struct lr_comm_request *request,
                             struct lr_error *err)
{
    if (from == to && comm->rank == to)
        copy_home(received, data, size_bytes);
    if (from == to || (comm->rank != from && comm->rank != to)) {
        comm->sequence++;
        return LR_OK;
    }
    struct lr_comm_exchange *exchange;
    LR_TRY(begin(comm, LR_COMM_PASS, label, &exchange, err));
    if (comm->rank == from)
        set_send(&exchange->lanes[to], data, size_bytes);
    else
        set_receive(&exchange->lanes[from], received, size_bytes);
    LR_TRY(launch(comm, exchange, err));
    request->pending = &exchange->step;
    return LR_OK;
}

enum lr_status lr_lanes_wait(struct lr_comm *comm, struct lr_comm_step *step, struct lr_error *err)
{
    return comm->lanes->finish(comm, (struct lr_comm_exchange *)step, err);
}

/* Nothing runs by itself in host memory. */
enum lr_status lr_lanes_check(struct lr_comm *comm, struct lr_error *err)
{
    (void)comm;
    (void)err;
    return LR_OK;
}

void lr_lanes_give_up(struct lr_comm *comm)
{
    (void)comm;
}
