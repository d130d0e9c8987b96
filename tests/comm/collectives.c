#include "tests/comm/collectives.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD_BYTES = 64, GUARD = 0xA5 };

static const char long_label[] = "a label that is longer than the forty-eight bytes which a header has room for";

static const size_t edge_sizes[] = {0,     1,     7,     63,    64,    65,    439,    440,           441,    512,
                                    16383, 16384, 16385, 65535, 65536, 65537, 200000, (1 << 20) + 3, 3 << 20};
enum { N_EDGES = sizeof edge_sizes / sizeof edge_sizes[0] };

static struct lr_comm *comm, *host;
static const struct area *area;
static uint64_t step; /* raised by each check, the same everywhere */

/* ---- what is sent ---- */

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static uint64_t seed_of(uint64_t n, int from, int to)
{
    return mix(mix(n * 4096 + (uint64_t)from) + (uint64_t)to);
}

static unsigned char byte_of(uint64_t seed, size_t at)
{
    return (unsigned char)(((seed ^ at) * 0x9E3779B97F4A7C15u) >> 56);
}

/* Small ones are as likely as large ones; some are nothing. The same for the same arguments. */
static size_t random_size(uint64_t n, int from, int to)
{
    uint64_t draw = seed_of(n ^ 0x5151, from, to);
    if (draw % 7 == 0)
        return 0;
    return (size_t)((draw >> 8) % ((uint64_t)1 << (draw % 20)));
}

static const char *label_of(const char *label)
{
    return step % 3 == 0 ? long_label : label;
}

/* ---- failing ---- */

void give_up(const char *format, ...)
{
    char text[LR_ERROR_TEXT_BYTES + 256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fprintf(stderr, "comm_worker: worker %d of %d, step %" PRIu64 ": %s\n", comm->rank, comm->size, step, text);
    lr_comm_abort(comm->backend ? comm : host, 1);
}

void must(enum lr_status status, const char *what, const struct lr_error *err)
{
    if (status != LR_OK)
        give_up("%s failed, %s: %s", what, lr_status_text(status), err->message);
}

void must_fail(enum lr_status status, enum lr_status wanted, const char *what)
{
    if (status != wanted)
        give_up("%s gave '%s' instead of '%s'", what, lr_status_text(status), lr_status_text(wanted));
}

/* ---- buffers ---- */

static unsigned char *host_memory(size_t size_bytes)
{
    unsigned char *start = malloc(size_bytes + 1);
    if (!start)
        give_up("no memory for %zu bytes", size_bytes);
    return start;
}

unsigned char *take_buffer(size_t size_bytes)
{
    size_t all_bytes = size_bytes + 2 * GUARD_BYTES;
    unsigned char *base = area->take(all_bytes), *guards = host_memory(all_bytes);
    memset(guards, GUARD, all_bytes);
    area->put(base, guards, all_bytes);
    free(guards);
    return base + GUARD_BYTES;
}

void release_buffer(unsigned char *buffer, size_t size_bytes, const char *what)
{
    unsigned char guards[2 * GUARD_BYTES];
    area->get(guards, buffer - GUARD_BYTES, GUARD_BYTES);
    area->get(guards + GUARD_BYTES, buffer + size_bytes, GUARD_BYTES);
    for (size_t i = 0; i < sizeof guards; i++)
        if (guards[i] != GUARD)
            give_up("%s wrote outside of its %zu bytes", what, size_bytes);
    area->release(buffer - GUARD_BYTES, size_bytes + 2 * GUARD_BYTES);
}

void fill(unsigned char *data, size_t size_bytes, uint64_t n, int from, int to)
{
    uint64_t seed = seed_of(n, from, to);
    unsigned char *made = host_memory(size_bytes);
    for (size_t i = 0; i < size_bytes; i++)
        made[i] = byte_of(seed, i);
    area->put(data, made, size_bytes);
    free(made);
}

void check(const unsigned char *data, size_t size_bytes, uint64_t n, int from, int to, const char *what)
{
    uint64_t seed = seed_of(n, from, to);
    unsigned char *came = host_memory(size_bytes);
    area->get(came, data, size_bytes);
    for (size_t i = 0; i < size_bytes; i++)
        if (came[i] != byte_of(seed, i))
            give_up("%s: byte %zu of %zu from worker %d is %d, not %d", what, i, size_bytes, from, came[i],
                    byte_of(seed, i));
    free(came);
}

static size_t total_of(const size_t *sizes)
{
    size_t total = 0;
    for (int r = 0; r < comm->size; r++)
        total += sizes[r];
    return total;
}

/* ---- one collective each ---- */

static void check_broadcast(int root, size_t size_bytes)
{
    struct lr_error err;
    step++;
    unsigned char *data = take_buffer(size_bytes);
    if (comm->rank == root)
        fill(data, size_bytes, step, root, ANYONE);
    must(lr_comm_broadcast(comm, label_of("broadcast"), root, data, size_bytes, &err), "broadcast", &err);
    check(data, size_bytes, step, root, ANYONE, "broadcast");
    release_buffer(data, size_bytes, "broadcast");
}

static void check_all_gather(size_t size_bytes, int in_place)
{
    struct lr_error err;
    step++;
    size_t all_bytes = size_bytes * (size_t)comm->size;
    unsigned char *received = take_buffer(all_bytes), *own = take_buffer(size_bytes);
    unsigned char *data = in_place ? received + size_bytes * (size_t)comm->rank : own;
    fill(data, size_bytes, step, comm->rank, ANYONE);
    must(lr_comm_all_gather(comm, label_of("all-gather"), data, size_bytes, received, &err), "all_gather", &err);
    for (int r = 0; r < comm->size; r++)
        check(received + size_bytes * (size_t)r, size_bytes, step, r, ANYONE, "all_gather");
    release_buffer(received, all_bytes, "all_gather");
    release_buffer(own, size_bytes, "all_gather");
}

/* A gather or an all-to-all, from its start to its wait. `idle_worker` has nothing, -1: none. */
struct started {
    uint64_t step;
    int is_gather;
    size_t send_sizes[LR_COMM_MAX_WORKERS], recv_sizes[LR_COMM_MAX_WORKERS];
    unsigned char *data, *received;
    struct lr_comm_request request;
};

static size_t size_between(uint64_t n, int from, int to, int idle_worker, int edges)
{
    if (from == idle_worker)
        return 0;
    if (!edges)
        return random_size(n, from, to);
    return edge_sizes[(n + (uint64_t)from * 5 + (uint64_t)(to == ANYONE ? 0 : to) * 3) % N_EDGES];
}

static void prepare_gather(struct started *one, int idle_worker, int edges)
{
    memset(one, 0, sizeof *one);
    one->step = ++step;
    one->is_gather = 1;
    for (int r = 0; r < comm->size; r++)
        one->recv_sizes[r] = size_between(step, r, ANYONE, idle_worker, edges);
    size_t mine = one->recv_sizes[comm->rank];
    one->send_sizes[0] = mine;
    one->data = take_buffer(mine);
    fill(one->data, mine, step, comm->rank, ANYONE);
    one->received = take_buffer(total_of(one->recv_sizes));
}

static void prepare_all_to_all(struct started *one, int idle_worker, int edges)
{
    memset(one, 0, sizeof *one);
    one->step = ++step;
    for (int r = 0; r < comm->size; r++) {
        one->send_sizes[r] = size_between(step, comm->rank, r, idle_worker, edges);
        one->recv_sizes[r] = size_between(step, r, comm->rank, idle_worker, edges);
    }
    one->data = take_buffer(total_of(one->send_sizes));
    unsigned char *at = one->data;
    for (int r = 0; r < comm->size; at += one->send_sizes[r], r++)
        fill(at, one->send_sizes[r], step, comm->rank, r);
    one->received = take_buffer(total_of(one->recv_sizes));
}

static enum lr_status start(struct started *one, struct lr_error *err)
{
    if (one->is_gather)
        return lr_comm_all_gather_v_start(comm, label_of("started gather"), one->data, one->recv_sizes, one->received,
                                          &one->request, err);
    return lr_comm_all_to_all_v_start(comm, label_of("started all-to-all"), one->data, one->send_sizes, one->received,
                                      one->recv_sizes, &one->request, err);
}

static void check_received(struct started *one)
{
    const char *what = one->is_gather ? "all_gather_v" : "all_to_all_v";
    const unsigned char *at = one->received;
    for (int r = 0; r < comm->size; at += one->recv_sizes[r], r++)
        check(at, one->recv_sizes[r], one->step, r, one->is_gather ? ANYONE : comm->rank, what);
    release_buffer(one->data, one->is_gather ? one->send_sizes[0] : total_of(one->send_sizes), what);
    release_buffer(one->received, total_of(one->recv_sizes), what);
}

static void wait_and_check(struct started *one)
{
    struct lr_error err;
    must(lr_comm_wait(comm, &one->request, &err), "wait", &err);
    if (one->request.pending)
        give_up("a request that was waited for is still pending");
    must(lr_comm_wait(comm, &one->request, &err), "a second wait", &err);
    check_received(one);
}

static void check_all_gather_v(int idle_worker, int edges)
{
    struct lr_error err;
    struct started one;
    prepare_gather(&one, idle_worker, edges);
    const void *data = one.recv_sizes[comm->rank] > 0 ? one.data : NULL;
    must(lr_comm_all_gather_v(comm, label_of("all-gather-v"), data, one.recv_sizes, one.received, &err), "all_gather_v",
         &err);
    check_received(&one);
}

static void check_all_to_all_v(int idle_worker, int edges)
{
    struct lr_error err;
    struct started one;
    size_t learned[LR_COMM_MAX_WORKERS];
    prepare_all_to_all(&one, idle_worker, edges);
    memset(learned, 0xFF, sizeof learned);
    must(lr_comm_exchange_sizes(comm, label_of("sizes"), one.send_sizes, learned, &err), "exchange_sizes", &err);
    for (int r = 0; r < comm->size; r++)
        if (learned[r] != one.recv_sizes[r])
            give_up("exchange_sizes: worker %d sends %zu bytes, %zu were told", r, one.recv_sizes[r], learned[r]);
    must(lr_comm_all_to_all_v(comm, label_of("all-to-all-v"), one.data, one.send_sizes, one.received, learned, &err),
         "all_to_all_v", &err);
    check_received(&one);
}

/* Multiples of 1/8, negative ones too; a few are zeros of either sign. */
static float float_of(uint64_t n, int from, size_t i)
{
    uint64_t draw = mix(seed_of(n, from, ANYONE) + i);
    if (i % 11 == 0)
        return draw % 2 ? 0.0f : -0.0f;
    return (float)((int64_t)(draw % 20001) - (i % 5 == 0 ? 20001 : 10000)) / 8.0f;
}

/* All 64 bits are in use: sums wrap. */
static uint64_t integer_of(uint64_t n, int from, size_t i)
{
    return mix(seed_of(n, from, ANYONE) - i);
}

static void check_max(size_t n_values)
{
    struct lr_error err;
    step++;
    size_t size_bytes = n_values * sizeof(float);
    unsigned char *buffer = take_buffer(size_bytes);
    float *values = (float *)host_memory(size_bytes);
    for (size_t i = 0; i < n_values; i++)
        values[i] = float_of(step, comm->rank, i);
    area->put(buffer, values, size_bytes);
    must(lr_comm_max_f32(comm, label_of("maximum"), (float *)buffer, n_values, &err), "max_f32", &err);
    area->get(values, buffer, size_bytes);
    for (size_t i = 0; i < n_values; i++) {
        float most = float_of(step, 0, i);
        for (int r = 1; r < comm->size; r++) {
            float other = float_of(step, r, i);
            if (other > most || (other == most && !__builtin_signbit(other)))
                most = other;
        }
        if (memcmp(&most, &values[i], sizeof most) != 0)
            give_up("max_f32: value %zu of %zu is %a, not %a", i, n_values, (double)values[i], (double)most);
    }
    free(values);
    release_buffer(buffer, size_bytes, "max_f32");
}

static void check_sum(size_t n_values)
{
    struct lr_error err;
    step++;
    size_t size_bytes = n_values * sizeof(int64_t);
    unsigned char *buffer = take_buffer(size_bytes);
    int64_t *values = (int64_t *)host_memory(size_bytes);
    for (size_t i = 0; i < n_values; i++)
        values[i] = (int64_t)integer_of(step, comm->rank, i);
    area->put(buffer, values, size_bytes);
    must(lr_comm_sum_i64(comm, label_of("sum"), (int64_t *)buffer, n_values, &err), "sum_i64", &err);
    area->get(values, buffer, size_bytes);
    for (size_t i = 0; i < n_values; i++) {
        uint64_t sum = 0;
        for (int r = 0; r < comm->size; r++)
            sum += integer_of(step, r, i);
        if ((uint64_t)values[i] != sum)
            give_up("sum_i64: value %zu of %zu is %" PRId64 ", not %" PRId64, i, n_values, values[i], (int64_t)sum);
    }
    free(values);
    release_buffer(buffer, size_bytes, "sum_i64");
}

/* Steps that are parts of a unit: a gather and an all-to-all side by side, and what was gathered passed on. */
static void check_unit(void)
{
    struct lr_error err;
    struct started gather, exchange;
    unsigned char *passed;
    if (!area->unit_begin || !lr_links_capture(comm))
        return;
    prepare_gather(&gather, -1, 0);
    prepare_all_to_all(&exchange, -1, 0);
    size_t all_bytes = total_of(gather.recv_sizes);
    passed = take_buffer(all_bytes);
    must(lr_links_unit_begin(comm, &err), "unit_begin", &err);
    area->unit_begin();
    must(start(&gather, &err), "a gather in a unit", &err);
    must(start(&exchange, &err), "an all-to-all in a unit", &err);
    must(lr_comm_wait(comm, &gather.request, &err), "wait in a unit", &err);
    must(lr_comm_pass(comm, label_of("pass in a unit"), 0, gather.received, comm->size - 1, passed, all_bytes, &err),
         "pass in a unit", &err);
    must(lr_comm_wait(comm, &exchange.request, &err), "wait in a unit", &err);
    area->unit_end();
    must(lr_links_unit_end(comm, &err), "unit_end", &err);
    const unsigned char *at = passed;
    for (int r = 0; comm->rank == comm->size - 1 && r < comm->size; at += gather.recv_sizes[r], r++)
        check(at, gather.recv_sizes[r], gather.step, r, ANYONE, "pass in a unit");
    check_received(&gather);
    check_received(&exchange);
    release_buffer(passed, all_bytes, "pass in a unit");
}

static void check_untouched(const unsigned char *data, size_t size_bytes)
{
    unsigned char *found = host_memory(size_bytes);
    area->get(found, data, size_bytes);
    for (size_t i = 0; i < size_bytes; i++)
        if (found[i] != GUARD)
            give_up("pass wrote to worker %d, which it does not name", comm->rank);
    free(found);
}

static void check_pass(int from, int to, size_t size_bytes)
{
    struct lr_error err;
    step++;
    unsigned char *data = take_buffer(size_bytes), *received = take_buffer(size_bytes);
    if (comm->rank == from)
        fill(data, size_bytes, step, from, to);
    must(lr_comm_pass(comm, label_of("pass"), from, data, to, received, size_bytes, &err), "pass", &err);
    if (comm->rank == to)
        check(received, size_bytes, step, from, to, "pass");
    else
        check_untouched(received, size_bytes);
    release_buffer(data, size_bytes, "pass");
    release_buffer(received, size_bytes, "pass");
}

/* Two passes under way at once, each the other's way, with a collective in between. */
static void check_started_passes(int first, int second, size_t size_bytes)
{
    struct lr_error err;
    struct lr_comm_request there = {0}, back = {0};
    unsigned char *data[2], *received[2];
    int from[2] = {first, second}, to[2] = {second, first};
    uint64_t steps[2];
    for (int i = 0; i < 2; i++) {
        steps[i] = ++step;
        data[i] = take_buffer(size_bytes);
        received[i] = take_buffer(size_bytes);
        if (comm->rank == from[i])
            fill(data[i], size_bytes, step, from[i], to[i]);
        must(lr_comm_pass_start(comm, label_of("pass_start"), from[i], data[i], to[i], received[i], size_bytes,
                                i == 0 ? &there : &back, &err),
             "pass_start", &err);
    }
    check_broadcast(comm->size - 1, 1000);
    must(lr_comm_wait(comm, &back, &err), "wait for the second pass", &err);
    must(lr_comm_wait(comm, &there, &err), "wait for the first pass", &err);
    for (int i = 0; i < 2; i++) {
        if (comm->rank == to[i])
            check(received[i], size_bytes, steps[i], from[i], to[i], "pass_start");
        else
            check_untouched(received[i], size_bytes);
        release_buffer(data[i], size_bytes, "pass_start");
        release_buffer(received[i], size_bytes, "pass_start");
    }
}

static void check_barrier(void)
{
    struct lr_error err;
    step++;
    must(lr_comm_barrier(comm, label_of("barrier"), &err), "barrier", &err);
}

/* ---- several at once ---- */

enum { N_STARTED = 5 };

/* Other steps between start and wait; the order of the waits changes with `turn`. */
static void check_in_flight(int turn, int edges)
{
    static struct started flights[N_STARTED];
    struct lr_error err;
    for (int i = 0; i < N_STARTED; i++) {
        int idle_worker = i == 2 ? turn % comm->size : -1;
        (i % 2 ? prepare_all_to_all : prepare_gather)(&flights[i], idle_worker, edges);
        must(start(&flights[i], &err), "start", &err);
        if (comm->size > 1)
            must_fail(start(&flights[i], &err), LR_INVALID, "a start on a request in flight");
        lr_comm_poll(comm);
        if (i == 1)
            check_barrier();
        if (i == 2)
            check_broadcast(turn % comm->size, 70001);
        if (i == 3)
            check_sum(5000);
    }
    check_all_to_all_v(-1, edges);
    check_pass(0, comm->size - 1, 441);
    check_started_passes(0, comm->size - 1, 70000);
    check_started_passes(comm->size / 2, 0, 0);
    for (int i = 0; i < N_STARTED; i++)
        wait_and_check(&flights[(i * 2 + turn) % N_STARTED]);
}

/* Nobody looks at what came, or waits for the device, between one and the next. */
static void check_back_to_back(void)
{
    enum { N_IN_ROW = 24 };
    static struct started row[N_IN_ROW];
    static unsigned char *broadcasts[N_IN_ROW];
    struct lr_error err;
    for (int i = 0; i < N_IN_ROW; i++) {
        (i % 2 ? prepare_all_to_all : prepare_gather)(&row[i], -1, i < N_IN_ROW / 2);
        broadcasts[i] = take_buffer(5000);
        if (comm->rank == i % comm->size)
            fill(broadcasts[i], 5000, row[i].step, i, ANYONE);
    }
    for (int i = 0; i < N_IN_ROW; i++) {
        must(start(&row[i], &err), "start", &err);
        must(lr_comm_broadcast(comm, "in a row", i % comm->size, broadcasts[i], 5000, &err), "broadcast", &err);
        must(lr_comm_wait(comm, &row[i].request, &err), "wait", &err);
    }
    must(lr_comm_check(comm, &err), "check", &err);
    for (int i = 0; i < N_IN_ROW; i++) {
        check_received(&row[i]);
        check(broadcasts[i], 5000, row[i].step, i, ANYONE, "broadcast in a row");
        release_buffer(broadcasts[i], 5000, "broadcast in a row");
    }
}

/* On a device: data that an earlier command makes, results that a later one takes, buffers that a later one overwrites,
 * and other commands while the transfer runs; the host looks at the end. */
static void check_order(int with_broadcast)
{
    enum { SIZE_BYTES = 70000, N_TURNS = 6 };
    static struct started turns[N_TURNS];
    unsigned char *kept[N_TURNS];
    struct lr_error err;
    if (!area->links.copy)
        return;
    void *context = area->links.context;
    size_t all_bytes = (size_t)SIZE_BYTES * (size_t)comm->size;
    unsigned char *data = take_buffer(SIZE_BYTES), *received = take_buffer(all_bytes), *junk = take_buffer(all_bytes);
    unsigned char *beside = take_buffer(all_bytes);
    for (int i = 0; i < N_TURNS; i++) {
        kept[i] = take_buffer(all_bytes);
        turns[i].step = ++step;
        turns[i].data = take_buffer(SIZE_BYTES);
        fill(turns[i].data, SIZE_BYTES, step, comm->rank, ANYONE);
        for (int r = 0; r < comm->size; r++)
            turns[i].recv_sizes[r] = (size_t)(SIZE_BYTES - (i % 2) * r * 100);
    }
    for (int i = 0; i < N_TURNS; i++) {
        const size_t *sizes = turns[i].recv_sizes;
        area->links.copy(context, data, turns[i].data, SIZE_BYTES);
        must(lr_comm_all_gather_v_start(comm, "in order", data, sizes, received, &turns[i].request, &err), "start",
             &err);
        area->links.copy(context, beside, junk, all_bytes);
        if (with_broadcast)
            must(lr_comm_broadcast(comm, "in between", 0, beside, SIZE_BYTES, &err), "broadcast", &err);
        must(lr_comm_wait(comm, &turns[i].request, &err), "wait", &err);
        area->links.copy(context, kept[i], received, total_of(sizes));
        area->links.copy(context, received, junk, all_bytes);
        area->links.copy(context, data, junk, SIZE_BYTES);
    }
    for (int i = 0; i < N_TURNS; i++) {
        const unsigned char *at = kept[i];
        for (int r = 0; r < comm->size; at += turns[i].recv_sizes[r], r++)
            check(at, turns[i].recv_sizes[r], turns[i].step, r, ANYONE, "all_gather in order");
        release_buffer(kept[i], all_bytes, "all_gather in order");
        release_buffer(turns[i].data, SIZE_BYTES, "all_gather in order");
    }
    release_buffer(data, SIZE_BYTES, "all_gather in order");
    release_buffer(received, all_bytes, "all_gather in order");
    release_buffer(junk, all_bytes, "all_gather in order");
    release_buffer(beside, all_bytes, "all_gather in order");
}

/* The bound on exchanges in flight is a status, the same everywhere, and no failure. */
static void check_full(void)
{
    enum { MOST = 64 };
    static struct started flights[MOST];
    struct lr_error err;
    enum lr_status status = LR_OK;
    int n = 0;
    if (comm->size == 1)
        return;
    while (n < MOST && status == LR_OK) {
        prepare_gather(&flights[n], -1, 0);
        status = start(&flights[n], &err);
        n++;
    }
    must_fail(status, LR_FULL, "one more than can be in flight");
    if (n < 3)
        give_up("only %d exchanges can be in flight", n - 1);
    if (strcmp(lr_comm_transport(comm), "nccl") != 0) /* its barriers have the host's lanes */
        must_fail(lr_comm_barrier(comm, "one too many", &err), LR_FULL, "a barrier when all are in flight");
    release_buffer(flights[n - 1].data, flights[n - 1].send_sizes[0], "a refused start");
    release_buffer(flights[n - 1].received, total_of(flights[n - 1].recv_sizes), "a refused start");
    for (int i = n - 2; i >= 0; i--)
        wait_and_check(&flights[i]);
    check_barrier();
}

/* What is refused on this side must leave the world in step. */
static void check_refusals(void)
{
    struct lr_error err;
    size_t sizes[LR_COMM_MAX_WORKERS] = {0};
    char byte = 0;
    must_fail(lr_comm_broadcast(comm, "root", comm->size, &byte, 1, &err), LR_INVALID, "a root that is none");
    must_fail(lr_comm_broadcast(comm, "root", -1, &byte, 1, &err), LR_INVALID, "a negative root");
    must_fail(lr_comm_pass(comm, "pass", 0, &byte, comm->size, &byte, 1, &err), LR_INVALID, "a pass to nobody");
    must_fail(lr_comm_all_gather(comm, "huge", &byte, SIZE_MAX / 2, &byte, &err), LR_INVALID, "a huge all_gather");
    sizes[0] = 1;
    must_fail(lr_comm_all_gather_v(comm, "no buffer", &byte, sizes, NULL, &err), LR_INVALID, "no buffer");
    sizes[0] = SIZE_MAX;
    sizes[comm->size - 1] += comm->size > 1;
    if (comm->size > 1)
        must_fail(lr_comm_all_gather_v(comm, "huge", &byte, sizes, &byte, &err), LR_INVALID, "a huge all_gather_v");
    check_barrier();
}

static void check_every_size(void)
{
    for (int i = 0; i < N_EDGES; i++) {
        size_t size_bytes = edge_sizes[i];
        check_broadcast(i % comm->size, size_bytes);
        check_all_gather(size_bytes, i % 2);
        check_max(size_bytes / 4);
        check_sum(size_bytes / 8);
        check_pass(i % comm->size, (i + 1) % comm->size, size_bytes);
        check_pass((i + 2) % comm->size, (i + 2) % comm->size, size_bytes);
        check_barrier();
    }
    for (int n = 1; n < 9; n++) {
        check_max((size_t)n);
        check_sum((size_t)n * 512 + 1);
    }
}

static void check_every_seam(void)
{
    for (int i = 0; i < N_EDGES; i++) {
        int idle_worker = i % 3 == 0 ? i % comm->size : -1;
        check_all_gather_v(idle_worker, 1);
        check_all_to_all_v(idle_worker, 1);
    }
    for (int i = 0; i < 60; i++) {
        size_t size_bytes = random_size(step, i, 0);
        check_broadcast(i % comm->size, size_bytes);
        check_all_gather_v(-1, 0);
        check_all_to_all_v(i % (2 * comm->size), 0);
        check_max(size_bytes / 3);
        check_sum(size_bytes / 7);
        check_pass((i * 3) % comm->size, i % comm->size, size_bytes);
    }
    for (int turn = 0; turn < 12; turn++)
        check_in_flight(turn, turn % 4 == 3);
}

static void check_world(void)
{
    if (comm->rank < 0 || comm->rank >= comm->size || comm->host_index < 0 || comm->host_index >= comm->host_workers ||
        comm->host_workers > comm->size || (comm->rank == 0 && !comm->root_is_here))
        give_up("place %d of %d on a host with %d, root here: %d", comm->host_index, comm->host_workers, comm->size,
                comm->root_is_here);
    char text[64] = "?";
    if (lr_comm_describe_loss(comm, text, sizeof text) != 0 || text[0] != '\0')
        give_up("all workers live, yet: %s", text);
    if (lr_comm_speaks(comm) != (comm->host_index == 0))
        give_up("the wrong worker of this host speaks");
}

void collectives_use(struct lr_comm *checked, struct lr_comm *world, const struct area *memory)
{
    comm = checked;
    host = world;
    area = memory;
}

void collectives_check(void)
{
    check_world();
    check_refusals();
    check_every_size();
    check_every_seam();
    check_back_to_back();
    check_order(0);
    check_order(1);
    check_full();
    for (int turn = 0; turn < 20; turn++)
        check_unit();
    check_world();
}
