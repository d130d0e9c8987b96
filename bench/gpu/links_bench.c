/* What the links of GPUs carry. Run under mpirun -n WORKERS, one GPU each for NCCL, any number on one GPU for staged.
 *
 *   links_bench nccl|staged [MOST_BYTES]
 *
 * One line a size: bytes that each worker sends to each other, time of a collective in a row of them (the host runs
 * ahead where it can), and GB/s that leave one GPU (to-one: that come to worker 0). Then the time of one small collective from its call to the end of
 * the device's wait, and how much of a gather hides behind copies on the kernels' stream. Medians; the slowest worker
 * counts. */
#include "base/clock.h"
#include "tests/comm/area.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N_REPEATS = 15, N_IN_ROW = 8 };

static struct lr_comm world, links;
static const struct area *area;
static char *data, *received;
static size_t sends[LR_COMM_MAX_WORKERS], receives[LR_COMM_MAX_WORKERS];

static void must(enum lr_status status, const struct lr_error *err)
{
    if (status == LR_OK)
        return;
    fprintf(stderr, "links_bench: worker %d: %s\n", world.rank, err->message);
    lr_comm_abort(links.backend ? &links : &world, 1);
}

static void wait_for_device(void)
{
    struct lr_error err;
    must(area->links.wait(area->links.context, &err), &err);
}

/* ---- what is timed ---- */

static void all_to_all(size_t size_bytes)
{
    struct lr_error err;
    for (int r = 0; r < links.size; r++)
        sends[r] = receives[r] = r == links.rank ? 0 : size_bytes;
    must(lr_comm_all_to_all_v(&links, "all-to-all", data, sends, received, receives, &err), &err);
}

/* Everything to worker 0: all tokens for one worker's experts. */
static void to_one(size_t size_bytes)
{
    struct lr_error err;
    for (int r = 0; r < links.size; r++) {
        sends[r] = r == 0 && links.rank > 0 ? size_bytes : 0;
        receives[r] = r > 0 && links.rank == 0 ? size_bytes : 0;
    }
    must(lr_comm_all_to_all_v(&links, "to one", data, sends, received, receives, &err), &err);
}

/* To the next worker alone: what a ring does. */
static void shift(size_t size_bytes)
{
    struct lr_error err;
    for (int r = 0; r < links.size; r++) {
        sends[r] = r == (links.rank + 1) % links.size ? size_bytes : 0;
        receives[r] = (r + 1) % links.size == links.rank ? size_bytes : 0;
    }
    must(lr_comm_all_to_all_v(&links, "shift", data, sends, received, receives, &err), &err);
}

static void all_gather(size_t size_bytes)
{
    struct lr_error err;
    must(lr_comm_all_gather(&links, "all-gather", data, size_bytes, received, &err), &err);
}

static void broadcast(size_t size_bytes)
{
    struct lr_error err;
    must(lr_comm_broadcast(&links, "broadcast", 0, data, size_bytes, &err), &err);
}

static void maximum(size_t size_bytes)
{
    struct lr_error err;
    must(lr_comm_max_f32(&links, "maximum", (float *)data, size_bytes / sizeof(float), &err), &err);
}

static void sum(size_t size_bytes)
{
    struct lr_error err;
    must(lr_comm_sum_i64(&links, "sum", (int64_t *)data, size_bytes / sizeof(int64_t), &err), &err);
}

typedef void collective(size_t size_bytes);

/* ---- timing ---- */

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Seconds of one of `n_in_row`. */
static double seconds_of(collective *run, size_t size_bytes, int n_in_row)
{
    struct lr_error err;
    double seconds[N_REPEATS];
    for (int i = -2; i < N_REPEATS; i++) {
        wait_for_device();
        must(lr_comm_barrier(&world, "bench", &err), &err);
        double started = lr_clock_seconds();
        for (int n = 0; n < n_in_row; n++)
            run(size_bytes);
        wait_for_device();
        if (i >= 0)
            seconds[i] = (lr_clock_seconds() - started) / n_in_row;
    }
    qsort(seconds, N_REPEATS, sizeof *seconds, ascending);
    float slowest = (float)seconds[N_REPEATS / 2];
    must(lr_comm_max_f32(&world, "bench", &slowest, 1, &err), &err);
    return (double)slowest;
}

static void show(const char *name, size_t size_bytes, double seconds, double sent_bytes)
{
    if (world.rank == 0)
        printf("%-10s %11zu %10.1f us %8.2f GB/s\n", name, size_bytes, seconds * 1e6, sent_bytes / seconds * 1e-9);
}

static void bench_sizes(size_t most_bytes)
{
    double others = links.size - 1;
    for (size_t bytes = 4096; bytes <= most_bytes; bytes *= 16) {
        show("all-to-all", bytes, seconds_of(all_to_all, bytes, N_IN_ROW), others * (double)bytes);
        show("to-one", bytes, seconds_of(to_one, bytes, N_IN_ROW), others * (double)bytes);
        show("shift", bytes, seconds_of(shift, bytes, N_IN_ROW), (double)bytes);
        show("all-gather", bytes, seconds_of(all_gather, bytes, N_IN_ROW), others * (double)bytes);
        show("broadcast", bytes, seconds_of(broadcast, bytes, N_IN_ROW), (double)bytes);
    }
}

static void bench_latency(void)
{
    static const struct {
        const char *name;
        collective *run;
    } small[] = {{"all-to-all", all_to_all},
                 {"all-gather", all_gather},
                 {"broadcast", broadcast},
                 {"maximum", maximum},
                 {"sum", sum}};
    for (size_t i = 0; i < sizeof small / sizeof small[0]; i++) {
        double alone = seconds_of(small[i].run, 64, 1), in_row = seconds_of(small[i].run, 64, 32);
        if (world.rank == 0)
            printf("%-10s 64 bytes: alone %.1f us, in a row %.1f us\n", small[i].name, alone * 1e6, in_row * 1e6);
    }
}

/* ---- overlap: a gather beside copies ---- */

static size_t n_copies = 1, copied_bytes;
static char *copied;

static void copies(size_t size_bytes)
{
    (void)size_bytes;
    for (size_t i = 0; i < n_copies; i++)
        area->links.copy(area->links.context, copied, copied + copied_bytes, copied_bytes);
}

static void gather_beside_copies(size_t size_bytes)
{
    struct lr_error err;
    struct lr_comm_request request = {0};
    for (int r = 0; r < links.size; r++)
        receives[r] = size_bytes;
    must(lr_comm_all_gather_v_start(&links, "all-gather", data, receives, received, &request, &err), &err);
    copies(size_bytes);
    must(lr_comm_wait(&links, &request, &err), &err);
}

static void bench_overlap(size_t size_bytes)
{
    copied_bytes = (size_t)64 << 20;
    copied = area->take(2 * copied_bytes);
    double gather = seconds_of(all_gather, size_bytes, 1), one = seconds_of(copies, 0, 1);
    n_copies = (size_t)(gather / one) + 1;
    double alone = seconds_of(copies, 0, 1), both = seconds_of(gather_beside_copies, size_bytes, 1);
    if (world.rank == 0)
        printf("overlap    %zu bytes: gather %.1f us, copies %.1f us, both %.1f us\n", size_bytes, gather * 1e6,
               alone * 1e6, both * 1e6);
    area->release(copied, 2 * copied_bytes);
}

static void open_world(const char *transport)
{
    struct lr_error err;
    if (!getenv("OMPI_COMM_WORLD_RANK"))
        lr_comm_open_self(&world);
    else
        must(lr_comm_open_mpi(60000, &world, &err), &err);
    world.timeout_ms = 20000;
    area = area_cuda(world.host_index, &links);
    if (!area) {
        fprintf(stderr, "links_bench: no GPU\n");
        lr_comm_abort(&world, 77);
    }
    double started = lr_clock_seconds();
    must(strcmp(transport, "nccl") == 0 ? lr_links_open_nccl(&world, &area->links, &links, &err)
                                        : lr_links_open_staged(&world, &area->links, &links, &err),
         &err);
    if (world.rank == 0)
        printf("%s, %d workers, open in %.2f s\n", lr_comm_transport(&links), links.size, lr_clock_seconds() - started);
}

int main(int n_arguments, char **arguments)
{
    if (n_arguments < 2 || (strcmp(arguments[1], "nccl") != 0 && strcmp(arguments[1], "staged") != 0)) {
        fprintf(stderr, "usage: links_bench nccl|staged [MOST_BYTES]\n");
        return 2;
    }
    size_t most_bytes = n_arguments > 2 ? strtoull(arguments[2], NULL, 10) : (size_t)256 << 20;
    open_world(arguments[1]);
    size_t all_bytes = most_bytes * (size_t)links.size;
    data = area->take(all_bytes);
    received = area->take(all_bytes);
    bench_sizes(most_bytes);
    bench_latency();
    bench_overlap(most_bytes / 4);
    area->release(data, all_bytes);
    area->release(received, all_bytes);
    lr_links_close(&links);
    lr_comm_close(&world);
    return 0;
}
