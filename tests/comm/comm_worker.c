/* One worker of a world that exercises comm/ and checks every byte that it receives.
 *
 *   comm_worker all            every collective, edge and random sizes; exit code 0, or 1 and a sentence
 *   comm_worker long           collectives for a minute; exit code 6 and a sentence when one fails
 *   comm_worker FAILURE DIR    something goes wrong at worker 1; see `failures` below
 *
 * In a failing mode each worker that hears of the failure leaves what it was told in DIR/worker.RANK
 * and waits until all have, so that the end of the world by the first does not silence the others.
 *
 * Byte `offset` of what worker `from` has for worker `to` in step n is byte_of(n, from, to, offset);
 * whoever receives it computes it again. */
#include "base/clock.h"
#include "comm/comm.h"

#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { GUARD_BYTES = 64, GUARD = 0xA5, ANYONE = LR_COMM_MAX_WORKERS, LATE_SECONDS = 600 };

static const char long_label[] = "a label that is longer than the forty-eight bytes which a header has room for";

static const size_t edge_sizes[] = {0,     1,     7,     63,    64,    65,    439,    440,           441,    512,
                                    16383, 16384, 16385, 65535, 65536, 65537, 200000, (1 << 20) + 3, 3 << 20};
enum { N_EDGES = sizeof edge_sizes / sizeof edge_sizes[0] };

static struct lr_comm comm;
static uint64_t step; /* raised by each check, the same everywhere */
static const char *report_folder;

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

_Noreturn static void give_up(const char *format, ...) __attribute__((format(printf, 1, 2)));

_Noreturn static void give_up(const char *format, ...)
{
    char text[LR_ERROR_TEXT_BYTES + 256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fprintf(stderr, "comm_worker: worker %d of %d, step %" PRIu64 ": %s\n", comm.rank, comm.size, step, text);
    lr_comm_abort(&comm, 1);
}

static void must(enum lr_status status, const char *what, const struct lr_error *err)
{
    if (status != LR_OK)
        give_up("%s failed, %s: %s", what, lr_status_text(status), err->message);
}

static void must_fail(enum lr_status status, enum lr_status wanted, const char *what)
{
    if (status != wanted)
        give_up("%s gave '%s' instead of '%s'", what, lr_status_text(status), lr_status_text(wanted));
}

/* ---- buffers: guarded on both sides, never NULL ---- */

static unsigned char *take_buffer(size_t size_bytes)
{
    unsigned char *start = malloc(size_bytes + 2 * GUARD_BYTES);
    if (!start)
        give_up("no memory for %zu bytes", size_bytes);
    memset(start, GUARD, size_bytes + 2 * GUARD_BYTES);
    return start + GUARD_BYTES;
}

static void release_buffer(unsigned char *buffer, size_t size_bytes, const char *what)
{
    for (size_t i = 0; i < GUARD_BYTES; i++)
        if (buffer[size_bytes + i] != GUARD || buffer[-1 - (ptrdiff_t)i] != GUARD)
            give_up("%s wrote outside of its %zu bytes", what, size_bytes);
    free(buffer - GUARD_BYTES);
}

static void fill(unsigned char *data, size_t size_bytes, uint64_t n, int from, int to)
{
    uint64_t seed = seed_of(n, from, to);
    for (size_t i = 0; i < size_bytes; i++)
        data[i] = byte_of(seed, i);
}

static void check(const unsigned char *data, size_t size_bytes, uint64_t n, int from, int to, const char *what)
{
    uint64_t seed = seed_of(n, from, to);
    for (size_t i = 0; i < size_bytes; i++)
        if (data[i] != byte_of(seed, i))
            give_up("%s: byte %zu of %zu from worker %d is %d, not %d", what, i, size_bytes, from, data[i],
                    byte_of(seed, i));
}

static size_t total_of(const size_t *sizes)
{
    size_t total = 0;
    for (int r = 0; r < comm.size; r++)
        total += sizes[r];
    return total;
}

/* ---- one collective each ---- */

static void check_broadcast(int root, size_t size_bytes)
{
    struct lr_error err;
    step++;
    unsigned char *data = take_buffer(size_bytes);
    if (comm.rank == root)
        fill(data, size_bytes, step, root, ANYONE);
    must(lr_comm_broadcast(&comm, label_of("broadcast"), root, data, size_bytes, &err), "broadcast", &err);
    check(data, size_bytes, step, root, ANYONE, "broadcast");
    release_buffer(data, size_bytes, "broadcast");
}

static void check_all_gather(size_t size_bytes, int in_place)
{
    struct lr_error err;
    step++;
    size_t all_bytes = size_bytes * (size_t)comm.size;
    unsigned char *received = take_buffer(all_bytes), *own = take_buffer(size_bytes);
    unsigned char *data = in_place ? received + size_bytes * (size_t)comm.rank : own;
    fill(data, size_bytes, step, comm.rank, ANYONE);
    must(lr_comm_all_gather(&comm, label_of("all-gather"), data, size_bytes, received, &err), "all_gather", &err);
    for (int r = 0; r < comm.size; r++)
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
    for (int r = 0; r < comm.size; r++)
        one->recv_sizes[r] = size_between(step, r, ANYONE, idle_worker, edges);
    size_t mine = one->recv_sizes[comm.rank];
    one->send_sizes[0] = mine;
    one->data = take_buffer(mine);
    fill(one->data, mine, step, comm.rank, ANYONE);
    one->received = take_buffer(total_of(one->recv_sizes));
}

static void prepare_all_to_all(struct started *one, int idle_worker, int edges)
{
    memset(one, 0, sizeof *one);
    one->step = ++step;
    for (int r = 0; r < comm.size; r++) {
        one->send_sizes[r] = size_between(step, comm.rank, r, idle_worker, edges);
        one->recv_sizes[r] = size_between(step, r, comm.rank, idle_worker, edges);
    }
    one->data = take_buffer(total_of(one->send_sizes));
    unsigned char *at = one->data;
    for (int r = 0; r < comm.size; at += one->send_sizes[r], r++)
        fill(at, one->send_sizes[r], step, comm.rank, r);
    one->received = take_buffer(total_of(one->recv_sizes));
}

static enum lr_status start(struct started *one, struct lr_error *err)
{
    if (one->is_gather)
        return lr_comm_all_gather_v_start(&comm, label_of("started gather"), one->data, one->recv_sizes, one->received,
                                          &one->request, err);
    return lr_comm_all_to_all_v_start(&comm, label_of("started all-to-all"), one->data, one->send_sizes, one->received,
                                      one->recv_sizes, &one->request, err);
}

static void check_received(struct started *one)
{
    const char *what = one->is_gather ? "all_gather_v" : "all_to_all_v";
    const unsigned char *at = one->received;
    for (int r = 0; r < comm.size; at += one->recv_sizes[r], r++)
        check(at, one->recv_sizes[r], one->step, r, one->is_gather ? ANYONE : comm.rank, what);
    release_buffer(one->data, one->is_gather ? one->send_sizes[0] : total_of(one->send_sizes), what);
    release_buffer(one->received, total_of(one->recv_sizes), what);
}

static void wait_and_check(struct started *one)
{
    struct lr_error err;
    must(lr_comm_wait(&comm, &one->request, &err), "wait", &err);
    if (one->request.pending)
        give_up("a request that was waited for is still pending");
    must(lr_comm_wait(&comm, &one->request, &err), "a second wait", &err);
    check_received(one);
}

static void check_all_gather_v(int idle_worker, int edges)
{
    struct lr_error err;
    struct started one;
    prepare_gather(&one, idle_worker, edges);
    const void *data = one.recv_sizes[comm.rank] > 0 ? one.data : NULL;
    must(lr_comm_all_gather_v(&comm, label_of("all-gather-v"), data, one.recv_sizes, one.received, &err),
         "all_gather_v", &err);
    check_received(&one);
}

static void check_all_to_all_v(int idle_worker, int edges)
{
    struct lr_error err;
    struct started one;
    size_t learned[LR_COMM_MAX_WORKERS];
    prepare_all_to_all(&one, idle_worker, edges);
    memset(learned, 0xFF, sizeof learned);
    must(lr_comm_exchange_sizes(&comm, label_of("sizes"), one.send_sizes, learned, &err), "exchange_sizes", &err);
    for (int r = 0; r < comm.size; r++)
        if (learned[r] != one.recv_sizes[r])
            give_up("exchange_sizes: worker %d sends %zu bytes, %zu were told", r, one.recv_sizes[r], learned[r]);
    must(lr_comm_all_to_all_v(&comm, label_of("all-to-all-v"), one.data, one.send_sizes, one.received, learned, &err),
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
    unsigned char *buffer = take_buffer(n_values * sizeof(float));
    float *values = (float *)buffer;
    for (size_t i = 0; i < n_values; i++)
        values[i] = float_of(step, comm.rank, i);
    must(lr_comm_max_f32(&comm, label_of("maximum"), values, n_values, &err), "max_f32", &err);
    for (size_t i = 0; i < n_values; i++) {
        float most = float_of(step, 0, i);
        for (int r = 1; r < comm.size; r++) {
            float other = float_of(step, r, i);
            if (other > most || (other == most && !__builtin_signbit(other)))
                most = other;
        }
        if (memcmp(&most, &values[i], sizeof most) != 0)
            give_up("max_f32: value %zu of %zu is %a, not %a", i, n_values, (double)values[i], (double)most);
    }
    release_buffer(buffer, n_values * sizeof(float), "max_f32");
}

static void check_sum(size_t n_values)
{
    struct lr_error err;
    step++;
    unsigned char *buffer = take_buffer(n_values * sizeof(int64_t));
    int64_t *values = (int64_t *)buffer;
    for (size_t i = 0; i < n_values; i++)
        values[i] = (int64_t)integer_of(step, comm.rank, i);
    must(lr_comm_sum_i64(&comm, label_of("sum"), values, n_values, &err), "sum_i64", &err);
    for (size_t i = 0; i < n_values; i++) {
        uint64_t sum = 0;
        for (int r = 0; r < comm.size; r++)
            sum += integer_of(step, r, i);
        if ((uint64_t)values[i] != sum)
            give_up("sum_i64: value %zu of %zu is %" PRId64 ", not %" PRId64, i, n_values, values[i], (int64_t)sum);
    }
    release_buffer(buffer, n_values * sizeof(int64_t), "sum_i64");
}

static void check_pass(int from, int to, size_t size_bytes)
{
    struct lr_error err;
    step++;
    unsigned char *data = take_buffer(size_bytes), *received = take_buffer(size_bytes);
    if (comm.rank == from)
        fill(data, size_bytes, step, from, to);
    must(lr_comm_pass(&comm, label_of("pass"), from, data, to, received, size_bytes, &err), "pass", &err);
    if (comm.rank == to)
        check(received, size_bytes, step, from, to, "pass");
    else
        for (size_t i = 0; i < size_bytes; i++)
            if (received[i] != GUARD)
                give_up("pass wrote to worker %d, which it does not name", comm.rank);
    release_buffer(data, size_bytes, "pass");
    release_buffer(received, size_bytes, "pass");
}

static void check_barrier(void)
{
    struct lr_error err;
    step++;
    must(lr_comm_barrier(&comm, label_of("barrier"), &err), "barrier", &err);
}

/* ---- several at once ---- */

enum { N_STARTED = 5 };

/* Other steps between start and wait; the order of the waits changes with `turn`. */
static void check_in_flight(int turn, int edges)
{
    static struct started flights[N_STARTED];
    struct lr_error err;
    for (int i = 0; i < N_STARTED; i++) {
        int idle_worker = i == 2 ? turn % comm.size : -1;
        (i % 2 ? prepare_all_to_all : prepare_gather)(&flights[i], idle_worker, edges);
        must(start(&flights[i], &err), "start", &err);
        if (comm.size > 1)
            must_fail(start(&flights[i], &err), LR_INVALID, "a start on a request in flight");
        lr_comm_poll(&comm);
        if (i == 1)
            check_barrier();
        if (i == 2)
            check_broadcast(turn % comm.size, 70001);
        if (i == 3)
            check_sum(5000);
    }
    check_all_to_all_v(-1, edges);
    check_pass(0, comm.size - 1, 441);
    for (int i = 0; i < N_STARTED; i++)
        wait_and_check(&flights[(i * 2 + turn) % N_STARTED]);
}

/* The bound on exchanges in flight is a status, the same everywhere, and no failure. */
static void check_full(void)
{
    enum { MOST = 64 };
    static struct started flights[MOST];
    struct lr_error err;
    enum lr_status status = LR_OK;
    int n = 0;
    if (comm.size == 1)
        return;
    while (n < MOST && status == LR_OK) {
        prepare_gather(&flights[n], -1, 0);
        status = start(&flights[n], &err);
        n++;
    }
    must_fail(status, LR_FULL, "one more than can be in flight");
    if (n < 3)
        give_up("only %d exchanges can be in flight", n - 1);
    must_fail(lr_comm_barrier(&comm, "one too many", &err), LR_FULL, "a barrier when all are in flight");
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
    must_fail(lr_comm_broadcast(&comm, "root", comm.size, &byte, 1, &err), LR_INVALID, "a root that is none");
    must_fail(lr_comm_broadcast(&comm, "root", -1, &byte, 1, &err), LR_INVALID, "a negative root");
    must_fail(lr_comm_pass(&comm, "pass", 0, &byte, comm.size, &byte, 1, &err), LR_INVALID, "a pass to nobody");
    must_fail(lr_comm_all_gather(&comm, "huge", &byte, SIZE_MAX / 2, &byte, &err), LR_INVALID, "a huge all_gather");
    sizes[0] = 1;
    must_fail(lr_comm_all_gather_v(&comm, "no buffer", &byte, sizes, NULL, &err), LR_INVALID, "no buffer");
    sizes[0] = SIZE_MAX;
    sizes[comm.size - 1] += comm.size > 1;
    if (comm.size > 1)
        must_fail(lr_comm_all_gather_v(&comm, "huge", &byte, sizes, &byte, &err), LR_INVALID, "a huge all_gather_v");
    check_barrier();
}

static void check_every_size(void)
{
    for (int i = 0; i < N_EDGES; i++) {
        size_t size_bytes = edge_sizes[i];
        check_broadcast(i % comm.size, size_bytes);
        check_all_gather(size_bytes, i % 2);
        check_max(size_bytes / 4);
        check_sum(size_bytes / 8);
        check_pass(i % comm.size, (i + 1) % comm.size, size_bytes);
        check_pass((i + 2) % comm.size, (i + 2) % comm.size, size_bytes);
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
        int idle_worker = i % 3 == 0 ? i % comm.size : -1;
        check_all_gather_v(idle_worker, 1);
        check_all_to_all_v(idle_worker, 1);
    }
    for (int i = 0; i < 60; i++) {
        size_t size_bytes = random_size(step, i, 0);
        check_broadcast(i % comm.size, size_bytes);
        check_all_gather_v(-1, 0);
        check_all_to_all_v(i % (2 * comm.size), 0);
        check_max(size_bytes / 3);
        check_sum(size_bytes / 7);
        check_pass((i * 3) % comm.size, i % comm.size, size_bytes);
    }
    for (int turn = 0; turn < 12; turn++)
        check_in_flight(turn, turn % 4 == 3);
}

static void check_world(void)
{
    if (comm.rank < 0 || comm.rank >= comm.size || comm.host_index < 0 || comm.host_index >= comm.host_workers ||
        comm.host_workers > comm.size || (comm.rank == 0 && !comm.root_is_here))
        give_up("place %d of %d on a host with %d, root here: %d", comm.host_index, comm.host_workers, comm.size,
                comm.root_is_here);
    char text[64] = "?";
    if (lr_comm_describe_loss(&comm, text, sizeof text) != 0 || text[0] != '\0')
        give_up("all workers live, yet: %s", text);
    if (lr_comm_speaks(&comm) != (comm.host_index == 0))
        give_up("the wrong worker of this host speaks");
}

static int run_all(void)
{
    check_world();
    check_refusals();
    check_every_size();
    check_every_seam();
    check_full();
    check_world();
    uint64_t n_collectives = comm.stats.n_collectives;
    int rank = comm.rank, size = comm.size;
    lr_comm_close(&comm);
    if (rank == 0)
        printf("comm_worker: %d workers agree on %" PRIu64 " collectives\n", size, n_collectives);
    return 0;
}

/* ---- failing modes ---- */

static void sleep_ms(int ms)
{
    struct timespec nap = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    nanosleep(&nap, NULL);
}

static void leave_report(const char *text)
{
    char path[512], made[520];
    snprintf(path, sizeof path, "%s/worker.%d", report_folder, comm.rank);
    snprintf(made, sizeof made, "%s.new", path);
    FILE *file = fopen(made, "w");
    if (!file || fprintf(file, "%s\n", text) < 0 || fclose(file) != 0 || rename(made, path) != 0)
        give_up("cannot write %s", path);
}

static int has_report(int rank)
{
    char path[512];
    struct stat facts;
    snprintf(path, sizeof path, "%s/worker.%d", report_folder, rank);
    return stat(path, &facts) == 0;
}

/* Reports, waits for the reports of the others (`silent` has none) and ends the world. */
_Noreturn static void report_and_abort(enum lr_status status, const struct lr_error *err, int silent, int exit_code)
{
    char text[LR_ERROR_TEXT_BYTES + 64];
    snprintf(text, sizeof text, "[%s] %s", lr_status_text(status), status == LR_OK ? "" : err->message);
    fprintf(stderr, "comm_worker: worker %d: %s\n", comm.rank, text);
    leave_report(text);
    for (int waited_ms = 0; waited_ms < 30000; waited_ms += 20) {
        int n_missing = 0;
        for (int r = 0; r < comm.size; r++)
            n_missing += r != silent && !has_report(r);
        if (n_missing == 0)
            break;
        sleep_ms(20);
    }
    lr_comm_abort(&comm, exit_code);
}

static enum lr_status diverge_label(struct lr_error *err)
{
    return lr_comm_barrier(&comm, comm.rank == 1 ? "layer 8 experts" : "layer 7 experts", err);
}

static enum lr_status diverge_kind(struct lr_error *err)
{
    int64_t value = 1;
    if (comm.rank == 1)
        return lr_comm_sum_i64(&comm, "layer 7 experts", &value, 1, err);
    return lr_comm_barrier(&comm, "layer 7 experts", err);
}

/* Worker 1 has `theirs` bytes where the others have `mine`. */
static enum lr_status gather_of_two_sizes(size_t mine, size_t theirs, struct lr_error *err)
{
    size_t size_bytes = comm.rank == 1 ? theirs : mine;
    unsigned char *data = take_buffer(size_bytes), *received = take_buffer(size_bytes * (size_t)comm.size);
    /* Not released: after a failure the transport may still write there. */
    return lr_comm_all_gather(&comm, "layer 7 experts", data, size_bytes, received, err);
}

static enum lr_status diverge_small(struct lr_error *err)
{
    return gather_of_two_sizes(100, 101, err);
}

static enum lr_status diverge_seam(struct lr_error *err)
{
    return gather_of_two_sizes(440, 441, err);
}

static enum lr_status diverge_large(struct lr_error *err)
{
    return gather_of_two_sizes(1 << 20, 3 << 20, err);
}

/* Worker 1 left out one step, and comes with the next. */
static enum lr_status diverge_skip(struct lr_error *err)
{
    if (comm.rank != 1)
        LR_TRY(lr_comm_barrier(&comm, "layer 7 experts", err));
    return lr_comm_barrier(&comm, "layer 8 experts", err);
}

/* The wrong size lies in a started step; the step entered after it must get its own bytes, or fail. */
static enum lr_status diverge_started(struct lr_error *err)
{
    size_t sizes[LR_COMM_MAX_WORKERS];
    size_t size_bytes = comm.rank == 1 ? 100000 : 100;
    for (int r = 0; r < comm.size; r++)
        sizes[r] = comm.rank == 1 ? 100000 : 100;
    unsigned char *data = take_buffer(size_bytes), *received = take_buffer(total_of(sizes));
    struct lr_comm_request request = {0};
    LR_TRY(lr_comm_all_gather_v_start(&comm, "layer 7 experts", data, sizes, received, &request, err));
    size_t next_bytes = 200000;
    unsigned char *next = take_buffer(next_bytes), *all = take_buffer(next_bytes * (size_t)comm.size);
    fill(next, next_bytes, 1, comm.rank, ANYONE);
    LR_TRY(lr_comm_all_gather(&comm, "layer 8 experts", next, next_bytes, all, err));
    for (int r = 0; r < comm.size; r++)
        check(all + next_bytes * (size_t)r, next_bytes, 1, r, ANYONE, "the step after a started one");
    return lr_comm_wait(&comm, &request, err);
}

static enum lr_status late_barrier(struct lr_error *err)
{
    if (comm.rank == 1)
        sleep_ms(LATE_SECONDS * 1000);
    return lr_comm_barrier(&comm, "layer 7 experts", err);
}

static enum lr_status stopped_barrier(struct lr_error *err)
{
    if (comm.rank == 1)
        raise(SIGSTOP);
    return lr_comm_barrier(&comm, "layer 7 experts", err);
}

/* Worker 1 has entered the step, so that its header is there, and then moves no bytes. */
static enum lr_status late_payload(struct lr_error *err)
{
    size_t sizes[LR_COMM_MAX_WORKERS], size_bytes = (size_t)16 << 20;
    for (int r = 0; r < comm.size; r++)
        sizes[r] = size_bytes;
    unsigned char *data = take_buffer(size_bytes), *received = take_buffer(total_of(sizes));
    struct lr_comm_request request = {0};
    LR_TRY(lr_comm_all_gather_v_start(&comm, "layer 7 experts", data, sizes, received, &request, err));
    if (comm.rank == 1)
        sleep_ms(LATE_SECONDS * 1000);
    return lr_comm_wait(&comm, &request, err);
}

static enum lr_status die_barrier(struct lr_error *err)
{
    if (comm.rank == 1)
        raise(SIGKILL);
    return lr_comm_barrier(&comm, "layer 7 experts", err);
}

static enum lr_status close_alone(struct lr_error *err)
{
    (void)err;
    if (comm.rank == 1)
        sleep_ms(LATE_SECONDS * 1000);
    lr_comm_close(&comm);
    return LR_OK;
}

struct failure {
    const char *name;
    enum lr_status (*run)(struct lr_error *err);
    int64_t timeout_ms;
    int silent; /* the worker that cannot report, -1: none */
    int exit_code;
};

static const struct failure failures[] = {
    {"diverge-label", diverge_label, 20000, -1, 3},
    {"diverge-kind", diverge_kind, 20000, -1, 3},
    {"diverge-small", diverge_small, 20000, -1, 3},
    {"diverge-seam", diverge_seam, 20000, -1, 3},
    {"diverge-large", diverge_large, 20000, -1, 3},
    {"diverge-skip", diverge_skip, 20000, -1, 3},
    {"diverge-started", diverge_started, 20000, -1, 3},
    {"late", late_barrier, 1500, 1, 4},
    {"late-payload", late_payload, 1500, 1, 4},
    {"stopped", stopped_barrier, 1500, 1, 4},
    {"die", die_barrier, 60000, 1, 5},
    {"unclosed", close_alone, 1500, 1, 0},
    {"absent", close_alone, 1500, 1, 0},
};

static const struct failure *find_failure(const char *name)
{
    for (size_t i = 0; i < sizeof failures / sizeof failures[0]; i++)
        if (strcmp(failures[i].name, name) == 0)
            return &failures[i];
    return NULL;
}

/* MPI's daemon ends the world: all that is known is who of this host is gone. */
static void on_terminate(int signal_number)
{
    (void)signal_number;
    char text[512];
    size_t length = lr_comm_describe_loss(&comm, text, sizeof text - 1);
    text[length++] = '\n';
    if (length > 1 && lr_comm_speaks(&comm) && write(STDERR_FILENO, text, length) < 0)
        _exit(7);
    _exit(5);
}

static int run_failure(const struct failure *failure)
{
    struct lr_error err;
    enum lr_status status = failure->run(&err);
    if (status == LR_OK && failure->exit_code == 0)
        return 0;
    report_and_abort(status, &err, failure->silent, failure->exit_code);
}

/* Worker 0 decides when it is enough, so that all end with the same step. */
static int run_long(void)
{
    int64_t started_ns = lr_clock_ns();
    struct lr_error err;
    enum lr_status status = LR_OK;
    char enough = 0;
    while (status == LR_OK && !enough) {
        size_t size_bytes = (size_t)300000;
        static unsigned char data[300000], received[300000 * 16];
        step++;
        enough = lr_clock_ns() - started_ns > (int64_t)60 * 1000000000;
        fill(data, size_bytes, step, comm.rank, ANYONE);
        if (comm.size > 16)
            give_up("at most 16 workers, not %d", comm.size);
        status = lr_comm_all_gather(&comm, "a long run", data, size_bytes, received, &err);
        for (int r = 0; status == LR_OK && r < comm.size; r++)
            check(received + size_bytes * (size_t)r, size_bytes, step, r, ANYONE, "all_gather");
        if (status == LR_OK)
            status = lr_comm_broadcast(&comm, "enough", 0, &enough, 1, &err);
    }
    if (status != LR_OK) {
        fprintf(stderr, "comm_worker: worker %d: %s: %s\n", comm.rank, lr_status_text(status), err.message);
        lr_comm_abort(&comm, 6);
    }
    lr_comm_close(&comm);
    return 0;
}

static void open_world(const char *mode, int64_t timeout_ms)
{
    struct lr_error err;
    const char *rank = getenv("OMPI_COMM_WORLD_RANK");
    if (!rank) {
        lr_comm_open_self(&comm);
        comm.timeout_ms = timeout_ms;
        return;
    }
    if (strcmp(mode, "absent") == 0 && strcmp(rank, "1") == 0)
        sleep_ms(LATE_SECONDS * 1000);
    if (lr_comm_open_mpi(timeout_ms, &comm, &err) != LR_OK) {
        fprintf(stderr, "comm_worker: %s\n", err.message);
        exit(1);
    }
    struct sigaction action = {.sa_handler = on_terminate};
    sigaction(SIGTERM, &action, NULL);
}

int main(int n_arguments, char **arguments)
{
    const char *mode = n_arguments > 1 ? arguments[1] : "";
    const struct failure *failure = find_failure(mode);
    int is_long = strcmp(mode, "long") == 0;
    if (!(failure && n_arguments == 3) && !(n_arguments == 2 && (is_long || strcmp(mode, "all") == 0))) {
        fprintf(stderr, "usage: comm_worker all | long | FAILURE DIR\n");
        return 2;
    }
    report_folder = failure ? arguments[2] : NULL;
    open_world(mode, failure ? failure->timeout_ms : is_long ? 3000 : 120000);
    if (failure && comm.size < 2) {
        fprintf(stderr, "comm_worker: '%s' takes two workers\n", mode);
        return 2;
    }
    return failure ? run_failure(failure) : is_long ? run_long() : run_all();
}
