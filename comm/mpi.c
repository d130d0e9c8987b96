/* The MPI transport, for host memory. The only file that includes mpi.h.
 *
 * A lane is one message where its payload is small, and two where it is not:
 *
 *   TAG_HEAD      header, and the payload where it has at most INLINE_BYTES
 *   payload_tag   the payload, in pieces of at most 1 GiB
 *
 * MPI keeps the order of messages between two workers on one tag, so the n-th header belongs to the
 * n-th exchange even with several in flight, and the receiver knows from its own size where to look.
 * The tag of a payload depends on step and size: that of a worker out of step meets no receive, lands
 * in no other step's buffer and is never cut (Open MPI may crash where it is). Headers are checked
 * before anything else: a worker out of step is named, not believed.
 *
 * Waits test and never block: first spinning (a decode step waits microseconds), then yielding, then
 * sleeping up to a millisecond (a world may have more workers than cores). Open MPI 4.1 ends the whole
 * world when a process dies and cannot repair a communicator, so every error is final. */
#include "comm/ending.h"
#include "comm/ops.h"

#include "base/clock.h"

#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { TAG_HEAD = 1, TAG_PAYLOAD = 2, PIECE_BYTES = 1 << 30, INLINE_BYTES = 440, MAX_IN_FLIGHT = 8 };
enum { SPIN_TESTS = 2000, YIELD_TESTS = 4000, TESTS_PER_LOOK = 64, GRACE_SECONDS = 3 };

struct message {
    uint64_t sequence;
    uint64_t size_bytes;
    uint64_t kind;
    char label[LR_COMM_LABEL_BYTES];
    unsigned char payload[INLINE_BYTES];
};

enum { HEADER_BYTES = offsetof(struct message, payload) };

/* One exchange in flight. `exchange` comes first: comm.c holds a pointer to it. */
struct flight {
    struct lr_comm_exchange exchange;
    int used;
    struct message *sent, *received; /* [size] */
    MPI_Request *heads;              /* [size] headers to come; MPI_REQUEST_NULL once checked */
    int n_heads_left;
    MPI_Request *rest; /* [rest_capacity] headers sent, payloads both ways */
    int *rest_peers;
    int n_rest, rest_capacity;
};

struct mpi_world {
    MPI_Comm comm;
    int crowded;             /* more workers than cores here: spinning would steal from whom we wait for */
    struct lr_place *places; /* [size] */
    struct lr_ending ending;
    struct flight flights[MAX_IN_FLIGHT];
    unsigned char *scratch;
    size_t scratch_bytes;
    int most_tag;
};

static struct mpi_world *world_of(const struct lr_comm *comm)
{
    return comm->backend;
}

static enum lr_status mpi_failed(int code, const char *what, struct lr_error *err)
{
    char text[MPI_MAX_ERROR_STRING];
    int length = 0;
    MPI_Error_string(code, text, &length);
    return lr_fail(err, LR_PEER_LOST, "MPI failed at '%s': %s", what, text);
}

/* ---- exchanges ---- */

static enum lr_status mpi_begin(struct lr_comm *comm,
                                enum lr_comm_kind kind,
                                const char *label,
                                struct lr_comm_exchange **out,
                                struct lr_error *err)
{
    struct mpi_world *world = world_of(comm);
    for (int i = 0; i < MAX_IN_FLIGHT; i++) {
        struct flight *flight = &world->flights[i];
        if (flight->used)
            continue;
        flight->used = 1;
        flight->n_rest = flight->n_heads_left = 0;
        lr_comm_step_set(&flight->exchange.step, kind, label);
        memset(flight->exchange.lanes, 0, (size_t)comm->size * sizeof *flight->exchange.lanes);
        *out = &flight->exchange;
        return LR_OK;
    }
    return lr_fail(err, LR_FULL, "'%s' cannot start: %d exchanges are in flight", label, MAX_IN_FLIGHT);
}

static int pieces_of(size_t size_bytes)
{
    return size_bytes <= INLINE_BYTES ? 0 : (int)((size_bytes + PIECE_BYTES - 1) / PIECE_BYTES);
}

static enum lr_status make_room(struct flight *flight, int n, struct lr_error *err)
{
    if (n <= flight->rest_capacity)
        return LR_OK;
    MPI_Request *rest = realloc(flight->rest, (size_t)n * sizeof *rest);
    if (rest)
        flight->rest = rest;
    int *peers = realloc(flight->rest_peers, (size_t)n * sizeof *peers);
    if (peers)
        flight->rest_peers = peers;
    if (!rest || !peers)
        return lr_fail(err, LR_NO_MEMORY, "no memory for the %d messages of '%s'", n, flight->exchange.step.label);
    flight->rest_capacity = n;
    return LR_OK;
}

static MPI_Request *next_rest(struct flight *flight, int peer)
{
    flight->rest_peers[flight->n_rest] = peer;
    return &flight->rest[flight->n_rest++];
}

static int payload_tag(const struct mpi_world *world, uint64_t sequence, size_t size_bytes)
{
    uint64_t mixed = (sequence * 0x9E3779B97F4A7C15u ^ size_bytes) * 0xBF58476D1CE4E5B9u;
    return TAG_PAYLOAD + (int)((mixed >> 32) % (uint64_t)(world->most_tag - TAG_PAYLOAD));
}

static int post_receive(struct mpi_world *world, struct flight *flight, int peer)
{
    const struct lr_comm_lane *lane = &flight->exchange.lanes[peer];
    int code = MPI_Irecv(&flight->received[peer], sizeof *flight->received, MPI_BYTE, peer, TAG_HEAD, world->comm,
                         &flight->heads[peer]);
    flight->n_heads_left++;
    int tag = payload_tag(world, flight->exchange.step.sequence, lane->recv_bytes);
    char *data = lane->received;
    for (size_t done = 0; code == MPI_SUCCESS && pieces_of(lane->recv_bytes) > 0 && done < lane->recv_bytes;
         done += PIECE_BYTES) {
        size_t left = lane->recv_bytes - done;
        code = MPI_Irecv(data + done, (int)(left < PIECE_BYTES ? left : PIECE_BYTES), MPI_BYTE, peer, tag, world->comm,
                         next_rest(flight, peer));
    }
    return code;
}

static int post_send(struct mpi_world *world, struct flight *flight, int peer)
{
    const struct lr_comm_lane *lane = &flight->exchange.lanes[peer];
    struct message *head = &flight->sent[peer];
    head->sequence = flight->exchange.step.sequence;
    head->size_bytes = lane->send_bytes;
    head->kind = (uint64_t)flight->exchange.step.kind;
    memcpy(head->label, flight->exchange.step.label, sizeof head->label);
    size_t inlined = lane->send_bytes <= INLINE_BYTES ? lane->send_bytes : 0;
    if (inlined > 0)
        memcpy(head->payload, lane->send, inlined);
    int code =
        MPI_Isend(head, (int)(HEADER_BYTES + inlined), MPI_BYTE, peer, TAG_HEAD, world->comm, next_rest(flight, peer));
    int tag = payload_tag(world, flight->exchange.step.sequence, lane->send_bytes);
    const char *data = lane->send;
    for (size_t done = 0; code == MPI_SUCCESS && pieces_of(lane->send_bytes) > 0 && done < lane->send_bytes;
         done += PIECE_BYTES) {
        size_t left = lane->send_bytes - done;
        code = MPI_Isend(data + done, (int)(left < PIECE_BYTES ? left : PIECE_BYTES), MPI_BYTE, peer, tag, world->comm,
                         next_rest(flight, peer));
    }
    return code;
}

/* Receives first; sends start with the next worker in rank order, so that not all aim at the same one. */
static enum lr_status mpi_launch(struct lr_comm *comm, struct lr_comm_exchange *exchange, struct lr_error *err)
{
    struct flight *flight = (struct flight *)exchange;
    struct mpi_world *world = world_of(comm);
    int n = 0;
    for (int r = 0; r < comm->size; r++) {
        const struct lr_comm_lane *lane = &exchange->lanes[r];
        n += (lane->sends ? 1 + pieces_of(lane->send_bytes) : 0) + (lane->receives ? pieces_of(lane->recv_bytes) : 0);
    }
    LR_TRY(make_room(flight, n, err));
    for (int step = 1; step < comm->size; step++) {
        int peer = (comm->rank + comm->size - step) % comm->size;
        flight->heads[peer] = MPI_REQUEST_NULL;
        int code = exchange->lanes[peer].receives ? post_receive(world, flight, peer) : MPI_SUCCESS;
        if (code != MPI_SUCCESS)
            return mpi_failed(code, exchange->step.label, err);
    }
    for (int step = 1; step < comm->size; step++) {
        int peer = (comm->rank + step) % comm->size;
        int code = exchange->lanes[peer].sends ? post_send(world, flight, peer) : MPI_SUCCESS;
        if (code != MPI_SUCCESS)
            return mpi_failed(code, exchange->step.label, err);
    }
    return LR_OK;
}

/* LR_OUT_OF_STEP where the header that came is not the one that belongs here. */
static enum lr_status
take_head(const struct lr_comm *comm, struct flight *flight, int peer, int received_bytes, struct lr_error *err)
{
    const struct lr_comm_step *mine = &flight->exchange.step;
    const struct lr_comm_lane *lane = &flight->exchange.lanes[peer];
    struct message *theirs = &flight->received[peer];
    if (received_bytes < HEADER_BYTES)
        return lr_fail(err, LR_CORRUPT, "worker %d sent %d bytes at '%s', a header has %d", peer, received_bytes,
                       mine->label, HEADER_BYTES);
    size_t inlined = lane->recv_bytes <= INLINE_BYTES ? lane->recv_bytes : 0;
    if (theirs->sequence != mine->sequence || theirs->kind != (uint64_t)mine->kind ||
        theirs->size_bytes != lane->recv_bytes || memcmp(theirs->label, mine->label, sizeof mine->label) != 0 ||
        (size_t)received_bytes != HEADER_BYTES + inlined)
        return lr_fail(err, LR_OUT_OF_STEP,
                       "workers are out of step: worker %d is at step %llu, %s '%s', and expects %zu bytes; worker %d "
                       "is at step %llu, %s '%.47s', and sends %llu",
                       comm->rank, (unsigned long long)mine->sequence, lr_comm_kind_text(mine->kind), mine->label,
                       lane->recv_bytes, peer, (unsigned long long)theirs->sequence,
                       lr_comm_kind_text((enum lr_comm_kind)theirs->kind), theirs->label,
                       (unsigned long long)theirs->size_bytes);
    if (inlined > 0)
        memcpy(lane->received, theirs->payload, inlined);
    return LR_OK;
}

static enum lr_status test_heads(const struct lr_comm *comm, struct flight *flight, struct lr_error *err)
{
    for (int r = 0; r < comm->size; r++) {
        if (r == comm->rank || flight->heads[r] == MPI_REQUEST_NULL)
            continue;
        int done = 0, received = 0;
        MPI_Status status;
        int code = MPI_Test(&flight->heads[r], &done, &status);
        if (code != MPI_SUCCESS)
            return mpi_failed(code, flight->exchange.step.label, err);
        if (!done)
            continue;
        MPI_Get_count(&status, MPI_BYTE, &received);
        flight->n_heads_left--;
        LR_TRY(take_head(comm, flight, r, received, err));
    }
    return LR_OK;
}

static enum lr_status test_flight(const struct lr_comm *comm, struct flight *flight, int *done, struct lr_error *err)
{
    *done = 0;
    if (flight->n_heads_left > 0)
        LR_TRY(test_heads(comm, flight, err));
    if (flight->n_heads_left > 0)
        return LR_OK;
    int code = MPI_Testall(flight->n_rest, flight->rest, done, MPI_STATUSES_IGNORE);
    return code == MPI_SUCCESS ? LR_OK : mpi_failed(code, flight->exchange.step.label, err);
}

static enum lr_status timed_out(const struct lr_comm *comm, const struct flight *flight, struct lr_error *err)
{
    int first = -1, others = 0;
    for (int r = 0; r < comm->size; r++) {
        if (r == comm->rank || flight->heads[r] == MPI_REQUEST_NULL)
            continue;
        others += first >= 0;
        first = first < 0 ? r : first;
    }
    /* MPI_Testall leaves even those that are done as they were. */
    for (int i = 0; i < flight->n_rest && first < 0; i++) {
        int done = 0;
        if (MPI_Request_get_status(flight->rest[i], &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || !done)
            first = flight->rest_peers[i];
    }
    if (first < 0)
        first = flight->rest_peers[0]; /* the last one came just now */
    char who[160] = "", more[32] = "", lost[160] = "";
    struct lr_text text = {.start = who, .size_bytes = sizeof who};
    lr_place_describe(&text, first, &world_of(comm)->places[first]);
    if (others > 0)
        snprintf(more, sizeof more, " and %d more", others);
    lr_comm_describe_loss(comm, lost, sizeof lost);
    return lr_fail(err, LR_TIMEOUT, "worker %d waited %.1f s at '%s' without a word from %s%s%s%s", comm->rank,
                   (double)comm->timeout_ms / 1000.0, flight->exchange.step.label, who, more, lost[0] ? "; " : "",
                   lost);
}

static void rest_a_little(const struct mpi_world *world, int64_t tests)
{
    if (tests < SPIN_TESTS && !world->crowded)
        return;
    if (tests < YIELD_TESTS) {
        sched_yield();
        return;
    }
    int64_t nap_ns = (tests - YIELD_TESTS + 1) * 1000;
    struct timespec nap = {.tv_nsec = nap_ns < 1000000 ? nap_ns : 1000000};
    nanosleep(&nap, NULL);
}

static enum lr_status mpi_finish(struct lr_comm *comm, struct lr_comm_exchange *exchange, struct lr_error *err)
{
    struct flight *flight = (struct flight *)exchange;
    int64_t started_ns = lr_clock_ns(), deadline_ns = started_ns + comm->timeout_ms * 1000000;
    enum lr_status status = LR_OK;
    int done = 0;
    for (int64_t tests = 1;; tests++) {
        status = test_flight(comm, flight, &done, err);
        if (status != LR_OK || done)
            break;
        if (tests % TESTS_PER_LOOK == 0) {
            if (comm->idle)
                comm->idle(comm->idle_context);
            if (lr_clock_ns() > deadline_ns) {
                status = timed_out(comm, flight, err);
                break;
            }
        }
        rest_a_little(world_of(comm), tests);
    }
    comm->stats.waited_ns += lr_clock_ns() - started_ns;
    flight->used = status != LR_OK; /* after a failure MPI may still write into the flight's memory */
    return status;
}

static void mpi_poll(struct lr_comm *comm)
{
    int flag;
    MPI_Iprobe(MPI_ANY_SOURCE, TAG_HEAD, world_of(comm)->comm, &flag, MPI_STATUS_IGNORE);
}

static void *mpi_scratch(struct lr_comm *comm, size_t *size_bytes)
{
    *size_bytes = world_of(comm)->scratch_bytes;
    return world_of(comm)->scratch;
}

/* ---- ending ---- */

static size_t mpi_describe_loss(const struct lr_comm *comm, char *text, size_t text_bytes)
{
    const struct mpi_world *world = world_of(comm);
    struct lr_text out = {.start = text, .size_bytes = text_bytes};
    int n = 0;
    if (text_bytes > 0)
        text[0] = '\0';
    for (int r = 0; world && world->places && r < comm->size; r++) {
        if (r == comm->rank || !lr_place_is_gone(&world->places[comm->rank], &world->places[r]))
            continue;
        if (n++ > 0)
            lr_text_add(&out, ", ");
        lr_place_describe(&out, r, &world->places[r]);
    }
    if (n > 0)
        lr_text_add(&out, n == 1 ? " is gone" : " are gone");
    return out.used;
}

static int mpi_speaks(const struct lr_comm *comm)
{
    const struct mpi_world *world = world_of(comm);
    for (int r = 0; world && world->places && r < comm->rank; r++)
        if (lr_place_same_host(&world->places[r], &world->places[comm->rank]) &&
            !lr_place_is_gone(&world->places[comm->rank], &world->places[r]))
            return 0;
    return 1;
}

static void free_world(struct mpi_world *world)
{
    for (int i = 0; i < MAX_IN_FLIGHT; i++) {
        struct flight *flight = &world->flights[i];
        free(flight->exchange.lanes);
        free(flight->sent);
        free(flight->received);
        free(flight->heads);
        free(flight->rest);
        free(flight->rest_peers);
    }
    free(world->places);
    free(world->scratch);
    free(world);
}

static void mpi_abort(struct lr_comm *comm, int exit_code)
{
    struct mpi_world *world = world_of(comm);
    world->ending.exit_code = exit_code;
    world->ending.sentence = NULL;
    lr_ending_watch(&world->ending, GRACE_SECONDS);
    lr_ending_arm(&world->ending, GRACE_SECONDS);
    MPI_Abort(world->comm, exit_code);
    _exit(exit_code);
}

static void mpi_close(struct lr_comm *comm)
{
    struct mpi_world *world = world_of(comm);
    world->ending.exit_code = 1;
    world->ending.sentence = "longreach: the workers did not all come to an end within the deadline\n";
    lr_ending_arm(&world->ending, (unsigned)((comm->timeout_ms + 999) / 1000));
    MPI_Comm_free(&world->comm);
    MPI_Finalize();
    lr_ending_disarm();
    comm->backend = NULL;
    free_world(world);
}

/* ---- opening ---- */

static const struct lr_lane_ops mpi_lanes = {
    .begin = mpi_begin,
    .launch = mpi_launch,
    .finish = mpi_finish,
    .scratch = mpi_scratch,
};

static const struct lr_comm_ops mpi_ops = {
    .name = "mpi",
    .barrier = lr_lanes_barrier,
    .broadcast = lr_lanes_broadcast,
    .all_gather = lr_lanes_all_gather,
    .all_to_all = lr_lanes_all_to_all,
    .exchange_sizes = lr_lanes_exchange_sizes,
    .reduce = lr_lanes_reduce,
    .pass = lr_lanes_pass,
    .wait = lr_lanes_wait,
    .poll = mpi_poll,
    .check = lr_lanes_check,
    .give_up = lr_lanes_give_up,
    .describe_loss = mpi_describe_loss,
    .speaks = mpi_speaks,
    .close = mpi_close,
    .abort = mpi_abort,
};

static enum lr_status allocate_world(struct mpi_world *world, int n_workers, struct lr_error *err)
{
    size_t n = (size_t)n_workers;
    world->scratch_bytes = (size_t)256 * 1024 + n * sizeof(uint64_t);
    world->scratch = malloc(world->scratch_bytes);
    world->places = calloc(n, sizeof *world->places);
    int missing = !world->scratch || !world->places;
    for (int i = 0; i < MAX_IN_FLIGHT; i++) {
        struct flight *flight = &world->flights[i];
        flight->exchange.lanes = calloc(n, sizeof *flight->exchange.lanes);
        flight->sent = calloc(n, sizeof *flight->sent);
        flight->received = calloc(n, sizeof *flight->received);
        flight->heads = calloc(n, sizeof(MPI_Request));
        missing |= !flight->exchange.lanes || !flight->sent || !flight->received || !flight->heads;
    }
    if (missing)
        return lr_fail(err, LR_NO_MEMORY, "no memory for the messages between %d workers", n_workers);
    return LR_OK;
}

static enum lr_status learn_places(struct lr_comm *comm, struct lr_error *err)
{
    struct mpi_world *world = world_of(comm);
    lr_place_find(&world->places[comm->rank]);
    LR_TRY(lr_comm_all_gather(comm, "places", &world->places[comm->rank], sizeof *world->places, world->places, err));
    for (int r = 0; r < comm->size; r++) {
        int here = lr_place_same_host(&world->places[r], &world->places[comm->rank]);
        comm->host_workers += here;
        comm->host_index += here && r < comm->rank;
        comm->root_is_here |= here && r == 0;
    }
    world->crowded = comm->host_workers > sysconf(_SC_NPROCESSORS_ONLN);
    world->ending.places = world->places;
    world->ending.n_places = comm->size;
    return LR_OK;
}

enum lr_status lr_comm_open_mpi(int64_t timeout_ms, struct lr_comm *comm, struct lr_error *err)
{
    struct mpi_world *world = calloc(1, sizeof *world);
    if (!world)
        return lr_fail(err, LR_NO_MEMORY, "no memory for a world");
    lr_ending_find(&world->ending);
    world->ending.exit_code = 1;
    world->ending.sentence = "longreach: MPI did not start within the deadline\n";
    lr_ending_arm(&world->ending, (unsigned)((timeout_ms + 999) / 1000));
    int provided;
    int code = MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided);
    if (code == MPI_SUCCESS)
        code = MPI_Comm_dup(MPI_COMM_WORLD, &world->comm);
    lr_ending_disarm();
    if (code != MPI_SUCCESS) {
        free(world);
        return mpi_failed(code, "the start", err);
    }
    MPI_Comm_set_errhandler(world->comm, MPI_ERRORS_RETURN);
    *comm = (struct lr_comm){.ops = &mpi_ops, .lanes = &mpi_lanes, .backend = world, .timeout_ms = timeout_ms};
    MPI_Comm_rank(world->comm, &comm->rank);
    MPI_Comm_size(world->comm, &comm->size);
    int has_most_tag = 0, *most_tag = NULL;
    MPI_Comm_get_attr(world->comm, MPI_TAG_UB, &most_tag, &has_most_tag);
    world->most_tag = has_most_tag ? *most_tag : 32767; /* the least that MPI allows */
    LR_TRY(allocate_world(world, comm->size, err));
    return learn_places(comm, err);
}
