/* One worker of a world that exercises comm/ and checks every byte that it receives.
 *
 *   comm_worker [OPTIONS] all            every collective, edge and random sizes; exit code 0, or 1 and a sentence
 *   comm_worker [OPTIONS] long           collectives for a minute; exit code 6 and a sentence when one fails
 *   comm_worker [OPTIONS] FAILURE DIR    something goes wrong at worker 1; see `failures` below
 *
 *   --links staged|nccl    over links of this kind, in a pretended device's memory
 *   --cuda                 in that of a GPU; exit code 77 where there is none
 *
 * In a failing mode each worker that hears of the failure leaves what it was told in DIR/worker.RANK
 * and waits until all have, so that the end of the world by the first does not silence the others. */
#include "base/clock.h"
#include "tests/comm/collectives.h"

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { LATE_SECONDS = 600, SKIPPED = 77, OPENING_MS = 60000 };

static struct lr_comm world, links;
static struct lr_comm *comm = &world;
static const struct area *area;
static const char *report_folder;

/* ---- failing modes ---- */

static void sleep_ms(int ms)
{
    struct timespec nap = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    nanosleep(&nap, NULL);
}

static void leave_report(const char *text)
{
    char path[512], made[520];
    snprintf(path, sizeof path, "%s/worker.%d", report_folder, comm->rank);
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
    fprintf(stderr, "comm_worker: worker %d: %s\n", comm->rank, text);
    leave_report(text);
    for (int waited_ms = 0; waited_ms < 30000; waited_ms += 20) {
        int n_missing = 0;
        for (int r = 0; r < comm->size; r++)
            n_missing += r != silent && !has_report(r);
        if (n_missing == 0)
            break;
        sleep_ms(20);
    }
    lr_comm_abort(comm, exit_code);
}

/* For what the host has not waited for. */
static enum lr_status wait_for_device(struct lr_error *err)
{
    return area->links.wait ? area->links.wait(area->links.context, err) : LR_OK;
}

static enum lr_status diverge_label(struct lr_error *err)
{
    return lr_comm_barrier(comm, comm->rank == 1 ? "layer 8 experts" : "layer 7 experts", err);
}

static enum lr_status diverge_kind(struct lr_error *err)
{
    if (comm->rank == 1)
        return lr_comm_sum_i64(comm, "layer 7 experts", (int64_t *)take_buffer(8), 1, err);
    return lr_comm_barrier(comm, "layer 7 experts", err);
}

/* Worker 1 has `theirs` bytes where the others have `mine`. */
static enum lr_status gather_of_two_sizes(size_t mine, size_t theirs, struct lr_error *err)
{
    size_t size_bytes = comm->rank == 1 ? theirs : mine;
    unsigned char *data = take_buffer(size_bytes), *received = take_buffer(size_bytes * (size_t)comm->size);
    /* Not released: after a failure the transport may still write there. */
    return lr_comm_all_gather(comm, "layer 7 experts", data, size_bytes, received, err);
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

/* Only the labels differ, so that the bytes come all the same: noticed at once by headers, some steps later by trails.
 */
static enum lr_status diverge_trail(struct lr_error *err)
{
    unsigned char *data = take_buffer(100), *received = take_buffer(100 * (size_t)comm->size);
    for (int i = 0; i < 200; i++)
        LR_TRY(lr_comm_all_gather(comm, comm->rank == 1 && i == 5 ? "layer 8 experts" : "layer 7 experts", data, 100,
                                  received, err));
    return LR_OK;
}

/* Worker 1 left out one step, and comes with the next. */
static enum lr_status diverge_skip(struct lr_error *err)
{
    if (comm->rank != 1)
        LR_TRY(lr_comm_barrier(comm, "layer 7 experts", err));
    return lr_comm_barrier(comm, "layer 8 experts", err);
}

/* The wrong size lies in a started step; the step entered after it must get its own bytes, or fail. */
static enum lr_status diverge_started(struct lr_error *err)
{
    size_t sizes[LR_COMM_MAX_WORKERS];
    size_t size_bytes = comm->rank == 1 ? 100000 : 100;
    for (int r = 0; r < comm->size; r++)
        sizes[r] = comm->rank == 1 ? 100000 : 100;
    unsigned char *data = take_buffer(size_bytes), *received = take_buffer(size_bytes * (size_t)comm->size);
    struct lr_comm_request request = {0};
    LR_TRY(lr_comm_all_gather_v_start(comm, "layer 7 experts", data, sizes, received, &request, err));
    size_t next_bytes = 200000;
    unsigned char *next = take_buffer(next_bytes), *all = take_buffer(next_bytes * (size_t)comm->size);
    fill(next, next_bytes, 1, comm->rank, ANYONE);
    LR_TRY(lr_comm_all_gather(comm, "layer 8 experts", next, next_bytes, all, err));
    LR_TRY(wait_for_device(err));
    for (int r = 0; r < comm->size; r++)
        check(all + next_bytes * (size_t)r, next_bytes, 1, r, ANYONE, "the step after a started one");
    return lr_comm_wait(comm, &request, err);
}

static enum lr_status late_barrier(struct lr_error *err)
{
    if (comm->rank == 1)
        sleep_ms(LATE_SECONDS * 1000);
    return lr_comm_barrier(comm, "layer 7 experts", err);
}

static enum lr_status late_gather(struct lr_error *err)
{
    if (comm->rank == 1)
        sleep_ms(LATE_SECONDS * 1000);
    unsigned char *data = take_buffer(100), *received = take_buffer(100 * (size_t)comm->size);
    return lr_comm_all_gather(comm, "layer 7 experts", data, 100, received, err);
}

static enum lr_status stopped_barrier(struct lr_error *err)
{
    if (comm->rank == 1)
        raise(SIGSTOP);
    return lr_comm_barrier(comm, "layer 7 experts", err);
}

/* Worker 1 has entered the step, so that its header is there, and then moves no bytes. */
static enum lr_status late_payload(struct lr_error *err)
{
    size_t sizes[LR_COMM_MAX_WORKERS], size_bytes = (size_t)16 << 20;
    for (int r = 0; r < comm->size; r++)
        sizes[r] = size_bytes;
    unsigned char *data = take_buffer(size_bytes), *received = take_buffer(size_bytes * (size_t)comm->size);
    struct lr_comm_request request = {0};
    LR_TRY(lr_comm_all_gather_v_start(comm, "layer 7 experts", data, sizes, received, &request, err));
    if (comm->rank == 1)
        sleep_ms(LATE_SECONDS * 1000);
    return lr_comm_wait(comm, &request, err);
}

/* Everyone listens to its end before one of them dies. */
static enum lr_status die_barrier(struct lr_error *err)
{
    LR_TRY(lr_comm_barrier(comm, "layer 6 experts", err));
    if (comm->rank == 1)
        raise(SIGKILL);
    return lr_comm_barrier(comm, "layer 7 experts", err);
}

/* Links are given up in the middle of a transfer: the device ends all the same, and the world goes on until it is
 * ended. */
static enum lr_status give_links_up(struct lr_error *err)
{
    enum { SIZE_BYTES = 1 << 20 };
    size_t sizes[LR_COMM_MAX_WORKERS];
    struct lr_comm_request request = {0};
    for (int r = 0; r < comm->size; r++)
        sizes[r] = SIZE_BYTES;
    unsigned char *data = take_buffer(SIZE_BYTES), *received = take_buffer((size_t)SIZE_BYTES * (size_t)comm->size);
    LR_TRY(lr_comm_all_gather_v_start(comm, "given up", data, sizes, received, &request, err));
    lr_links_abort(&links);
    lr_links_abort(&links);
    enum lr_status status = lr_comm_wait(&links, &request, err);
    must_fail(lr_comm_check(&links, err), LR_CANCELLED, "a check after an abort");
    lr_links_close(&links);
    comm = &world;
    must(wait_for_device(err), "the device after an abort", err);
    must(lr_comm_barrier(&world, "after an abort", err), "barrier", err);
    return status != LR_CANCELLED ? status : lr_fail(err, status, "the links were given up");
}

static enum lr_status close_alone(struct lr_error *err)
{
    (void)err;
    if (comm->rank == 1)
        sleep_ms(LATE_SECONDS * 1000);
    lr_comm_close(&world);
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
    {"diverge-trail", diverge_trail, 20000, -1, 3},
    {"diverge-skip", diverge_skip, 20000, -1, 3},
    {"diverge-started", diverge_started, 20000, -1, 3},
    {"late", late_barrier, 1500, 1, 4},
    {"late-gather", late_gather, 1500, 1, 4},
    {"late-payload", late_payload, 1500, 1, 4},
    {"stopped", stopped_barrier, 1500, 1, 4},
    {"die", die_barrier, 60000, 1, 5},
    {"given-up", give_links_up, 20000, -1, 6},
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
    size_t length = lr_comm_describe_loss(comm, text, sizeof text - 1);
    text[length++] = '\n';
    if (length > 1 && lr_comm_speaks(comm) && write(STDERR_FILENO, text, length) < 0)
        _exit(7);
    /* The daemon hurries when the first is gone: whoever is to speak must have had its turn by then. */
    struct timespec pause = {.tv_nsec = 500 * 1000 * 1000};
    nanosleep(&pause, NULL);
    _exit(5);
}

static int run_failure(const struct failure *failure)
{
    struct lr_error err;
    enum lr_status status = failure->run(&err);
    if (status == LR_OK)
        status = wait_for_device(&err);
    if (status == LR_OK && failure->exit_code == 0)
        return 0;
    report_and_abort(status, &err, failure->silent, failure->exit_code);
}

/* Worker 0 decides when it is enough, so that all end with the same step. */
static int run_long(void)
{
    enum { SIZE_BYTES = 300000 };
    int64_t started_ns = lr_clock_ns();
    struct lr_error err;
    enum lr_status status = LR_OK;
    char enough = 0;
    unsigned char *data = take_buffer(SIZE_BYTES), *received = take_buffer((size_t)SIZE_BYTES * (size_t)comm->size);
    for (uint64_t step = 1; status == LR_OK && !enough; step++) {
        enough = lr_clock_ns() - started_ns > (int64_t)60 * 1000000000;
        fill(data, SIZE_BYTES, step, comm->rank, ANYONE);
        status = lr_comm_all_gather(comm, "a long run", data, SIZE_BYTES, received, &err);
        for (int r = 0; status == LR_OK && r < comm->size; r++)
            check(received + (size_t)SIZE_BYTES * (size_t)r, SIZE_BYTES, step, r, ANYONE, "all_gather");
        if (status == LR_OK)
            status = lr_comm_broadcast(&world, "enough", 0, &enough, 1, &err);
    }
    if (status != LR_OK) {
        fprintf(stderr, "comm_worker: worker %d: %s: %s\n", comm->rank, lr_status_text(status), err.message);
        lr_comm_abort(comm, 6);
    }
    lr_links_close(&links);
    lr_comm_close(&world);
    return 0;
}

/* ---- opening ---- */

struct options {
    const char *links; /* NULL: none */
    int cuda;
    const char *mode, *folder;
};

static int read_options(int n, char **arguments, struct options *options)
{
    int at = 1;
    for (; at < n && strncmp(arguments[at], "--", 2) == 0; at++) {
        if (strcmp(arguments[at], "--cuda") == 0)
            options->cuda = 1;
        else if (strcmp(arguments[at], "--links") == 0 && at + 1 < n)
            options->links = arguments[++at];
        else
            return -1;
    }
    options->mode = at < n ? arguments[at++] : "";
    options->folder = at < n ? arguments[at++] : NULL;
    return at < n ? -1 : 0;
}

static void open_world(const char *mode, int64_t timeout_ms)
{
    struct lr_error err;
    const char *rank = getenv("OMPI_COMM_WORLD_RANK");
    if (!rank) {
        lr_comm_open_self(&world);
        world.timeout_ms = timeout_ms;
        return;
    }
    if (strcmp(mode, "absent") == 0 && strcmp(rank, "1") == 0)
        sleep_ms(LATE_SECONDS * 1000);
    if (lr_comm_open_mpi(timeout_ms, &world, &err) != LR_OK) {
        fprintf(stderr, "comm_worker: %s\n", err.message);
        exit(1);
    }
    struct sigaction action = {.sa_handler = on_terminate};
    sigaction(SIGTERM, &action, NULL);
}

/* Nothing to run on is no failure. */
_Noreturn static void skip(const char *reason)
{
    if (world.rank == 0)
        fprintf(stderr, "comm_worker: skipped: %s\n", reason);
    lr_comm_close(&world);
    exit(SKIPPED);
}

static void open_links(const struct options *options)
{
    struct lr_error err;
    area = options->cuda ? area_cuda(world.host_index, &links) : options->links ? area_fake() : area_host();
    if (!area)
        skip("no GPU");
    if (!options->links)
        return;
    enum lr_status status = strcmp(options->links, "nccl") == 0
                                ? lr_links_open_nccl(&world, &area->links, &links, &err)
                                : lr_links_open_staged(&world, &area->links, &links, &err);
    if (status == LR_UNSUPPORTED)
        skip(err.message);
    if (status != LR_OK) {
        fprintf(stderr, "comm_worker: %s: %s\n", lr_status_text(status), err.message);
        lr_comm_abort(&world, 1);
    }
    comm = &links;
}

/* Over NCCL it is often a deadline that brings out who is out of step. */
static void set_deadline(const struct options *options, int64_t timeout_ms)
{
    int is_nccl = options->links && strcmp(options->links, "nccl") == 0;
    world.timeout_ms = links.timeout_ms = is_nccl && timeout_ms == 20000 ? 3000 : timeout_ms;
}

static int run_all(void)
{
    collectives_check();
    uint64_t n_collectives = comm->stats.n_collectives;
    int rank = comm->rank, size = comm->size;
    const char *transport = lr_comm_transport(comm);
    lr_links_close(&links);
    lr_comm_close(&world);
    if (rank == 0)
        printf("comm_worker: %d workers agree on %" PRIu64 " collectives over %s\n", size, n_collectives, transport);
    return 0;
}

int main(int n_arguments, char **arguments)
{
    struct options options = {0};
    int understood = read_options(n_arguments, arguments, &options) == 0;
    const struct failure *failure = find_failure(options.mode);
    int is_long = understood && strcmp(options.mode, "long") == 0;
    int is_all = understood && strcmp(options.mode, "all") == 0;
    if (!understood || !(failure ? options.folder != NULL : (is_long || is_all) && !options.folder)) {
        fprintf(stderr, "usage: comm_worker [--links staged|nccl] [--cuda] all | long | FAILURE DIR\n");
        return 2;
    }
    report_folder = options.folder;
    int64_t timeout_ms = failure ? failure->timeout_ms : is_long ? 3000 : 120000;
    open_world(options.mode, strcmp(options.mode, "absent") == 0 ? timeout_ms : OPENING_MS);
    open_links(&options);
    set_deadline(&options, timeout_ms);
    collectives_use(comm, &world, area);
    if (failure && comm->size < 2) {
        fprintf(stderr, "comm_worker: '%s' takes two workers\n", options.mode);
        return 2;
    }
    return failure ? run_failure(failure) : is_long ? run_long() : run_all();
}
