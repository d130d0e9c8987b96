/* Links over NCCL: from device to device. The only file that includes nccl.h, and with it the CUDA runtime.
 *
 *   kernels' stream   ...K1 --ready--.            K2 (beside the transfer)    .--> K3...
 *   own stream                       `--> [copy of what stays] [NCCL] --done--'
 *                                        start                        wait
 *
 * The host launches and goes on; lr_comm_wait makes the kernels' stream wait, not the host. The communicator does not
 * block: a launch is asked for until NCCL says that it is on the stream. What then fails or hangs on the device is
 * noticed by whoever calls next, or calls lr_comm_check while waiting for the device: NCCL's own error, or a step whose
 * data was ready a deadline ago and that is not through. Then the communicator is aborted, which also ends the kernels
 * that wait inside the device.
 *
 * NCCL's messages carry no header. Who is out of step is found by the trail (trail.h). Steps of 0 bytes between two
 * workers launch nothing between them, at both alike.
 *
 * ncclAllGather where all have the same size, ncclBroadcast, ncclAllReduce for maxima and integer sums (both free of
 * order; the maximum on the device puts +0 above -0 as the host's does); the rest is a group of sends and receives. */
#include "comm/trail.h"

#include "base/clock.h"

#include <cuda_runtime_api.h>
#include <nccl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_STARTED = 8, MAX_RUNNING = 256, TESTS_PER_LOOK = 64, ABORT_SECONDS = 3 };

/* A step that may still run on the device, in the order of launching. */
struct running {
    struct lr_comm_step step;
    cudaEvent_t ready, done;
    int64_t ready_ns; /* when its data was first seen to be ready; 0: not yet */
};

/* A started step that was not waited for. `step` comes first: lr_comm_request holds a pointer to it. */
struct started {
    struct lr_comm_step step;
    cudaEvent_t done;
    bool used;
};

struct device_links {
    struct lr_links links;
    ncclComm_t nccl; /* NULL: aborted */
    cudaStream_t kernels, own;
    struct running running[MAX_RUNNING]; /* a ring: n_running from `oldest` on */
    int oldest, n_running;
    struct started started[MAX_STARTED];
    struct lr_trail *trail;
    size_t *sends, *receives; /* [size] scratch */
};

static struct device_links *device_of(const struct lr_comm *comm)
{
    return comm->backend;
}

/* ---- failing ---- */

static void *abort_nccl(void *nccl)
{
    ncclCommAbort(nccl);
    return NULL;
}

/* In a thread, because an abort joins threads of NCCL's that may be stuck in the network. */
static void nccl_give_up(struct lr_comm *comm)
{
    struct device_links *device = device_of(comm);
    pthread_t thread;
    if (!device->nccl || pthread_create(&thread, NULL, abort_nccl, device->nccl) != 0)
        return;
    device->nccl = NULL;
    struct timespec deadline;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += ABORT_SECONDS;
    if (pthread_timedjoin_np(thread, NULL, &deadline) != 0)
        pthread_detach(thread);
}

static enum lr_status cuda_failed(cudaError_t error, const char *what, struct lr_error *err)
{
    if (error == cudaSuccess)
        return LR_OK;
    return lr_fail(err, error == cudaErrorMemoryAllocation ? LR_NO_MEMORY : LR_INTERNAL, "the GPU failed at '%s': %s",
                   what, cudaGetErrorString(error));
}

static enum lr_status nccl_failed(ncclComm_t nccl, ncclResult_t result, const char *what, struct lr_error *err)
{
    return lr_fail(err, LR_PEER_LOST, "NCCL failed at '%s': %s: %s", what, ncclGetErrorString(result),
                   ncclGetLastError(nccl));
}

/* A deadline has passed at this step. */
static enum lr_status timed_out(struct lr_comm *comm, const struct lr_comm_step *step, struct lr_error *err)
{
    struct lr_error why = {.message = ""};
    char lost[160] = "";
    if (lr_trail_explain(device_of(comm)->trail, &why) == LR_OUT_OF_STEP)
        return lr_fail(err, LR_OUT_OF_STEP, "%s (worker %d waited %.1f s for the GPUs at step %llu, %s '%s')",
                       why.message, comm->rank, (double)comm->timeout_ms / 1000.0, (unsigned long long)step->sequence,
                       lr_comm_kind_text(step->kind), step->label);
    lr_comm_describe_loss(comm, lost, sizeof lost);
    return lr_fail(err, LR_TIMEOUT, "worker %d waited %.1f s for the GPUs at step %llu, %s '%s': %s%s%s", comm->rank,
                   (double)comm->timeout_ms / 1000.0, (unsigned long long)step->sequence, lr_comm_kind_text(step->kind),
                   step->label, why.message, lost[0] ? "; " : "", lost);
}

/* ---- what runs on the device ---- */

/* Forgets what is through; LR_TIMEOUT where the oldest should be. */
static enum lr_status look_at_device(struct lr_comm *comm, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    for (; device->n_running > 0; device->n_running--) {
        struct running *oldest = &device->running[device->oldest];
        cudaError_t error = cudaEventQuery(oldest->done);
        if (error == cudaErrorNotReady) {
            int64_t now_ns = lr_clock_ns();
            if (oldest->ready_ns > 0)
                return now_ns - oldest->ready_ns > comm->timeout_ms * 1000000 ? timed_out(comm, &oldest->step, err)
                                                                              : LR_OK;
            if (cudaEventQuery(oldest->ready) == cudaSuccess)
                oldest->ready_ns = now_ns;
            return LR_OK;
        }
        LR_TRY(cuda_failed(error, oldest->step.label, err));
        device->oldest = (device->oldest + 1) % MAX_RUNNING;
    }
    return LR_OK;
}

static enum lr_status look_at_nccl(struct lr_comm *comm, const char *label, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    ncclResult_t state = ncclSuccess;
    ncclResult_t result = ncclCommGetAsyncError(device->nccl, &state);
    if (result != ncclSuccess || (state != ncclSuccess && state != ncclInProgress))
        return nccl_failed(device->nccl, result != ncclSuccess ? result : state, label, err);
    return LR_OK;
}

/* Whatever fails ends what runs. LR_FULL is a refusal. */
static enum lr_status ended(struct lr_comm *comm, enum lr_status status)
{
    if (status != LR_OK && status != LR_FULL)
        nccl_give_up(comm);
    return status;
}

static enum lr_status nccl_check(struct lr_comm *comm, struct lr_error *err)
{
    enum lr_status status = look_at_nccl(comm, "a transfer", err);
    if (status == LR_OK)
        status = look_at_device(comm, err);
    return ended(comm, status);
}

static void rest_a_little(const struct lr_comm *host, int64_t tests)
{
    if (tests % TESTS_PER_LOOK == 0 && host->idle)
        host->idle(host->idle_context);
    if (tests > 20000)
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    else if (tests > 2000)
        sched_yield();
}

/* Asks until NCCL has done what it was asked for, or the time is up: then ncclInProgress. */
static ncclResult_t poll_nccl(const struct device_links *device, ncclResult_t result, int64_t timeout_ms)
{
    int64_t deadline_ns = lr_clock_ns() + timeout_ms * 1000000;
    for (int64_t tests = 1; result == ncclInProgress; tests++) {
        ncclResult_t asked = ncclCommGetAsyncError(device->nccl, &result);
        if (asked != ncclSuccess)
            result = asked;
        if (tests % TESTS_PER_LOOK == 0 && lr_clock_ns() > deadline_ns)
            break;
        rest_a_little(device->links.host, tests);
    }
    return result;
}

/* Until what was asked of NCCL is on the stream. */
static enum lr_status
wait_for_launch(struct lr_comm *comm, ncclResult_t result, const struct lr_comm_step *step, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    result = poll_nccl(device, result, comm->timeout_ms);
    if (result == ncclInProgress)
        return timed_out(comm, step, err);
    return result == ncclSuccess ? LR_OK : nccl_failed(device->nccl, result, step->label, err);
}

static enum lr_status make_room(struct lr_comm *comm, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    for (int64_t tests = 1; device->n_running == MAX_RUNNING; tests++) {
        LR_TRY(look_at_device(comm, err));
        if (tests % TESTS_PER_LOOK == 0)
            LR_TRY(look_at_nccl(comm, "a full queue of transfers", err));
        rest_a_little(device->links.host, tests);
    }
    return LR_OK;
}

/* ---- one step ---- */

/* Takes the next place in the ring; the own stream then waits for the kernels so far. */
static enum lr_status open_step(struct lr_comm *comm, struct running **out, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    LR_TRY(make_room(comm, err));
    struct running *running = &device->running[(device->oldest + device->n_running) % MAX_RUNNING];
    LR_TRY(cuda_failed(cudaEventRecord(running->ready, device->kernels), "an event", err));
    LR_TRY(cuda_failed(cudaStreamWaitEvent(device->own, running->ready, 0), "an event", err));
    *out = running;
    return LR_OK;
}

/* What was launched on the own stream since is this step. */
static enum lr_status
close_step(struct lr_comm *comm, struct running *running, const struct lr_comm_step *step, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    running->step = *step;
    running->ready_ns = 0;
    device->n_running++;
    return cuda_failed(cudaEventRecord(running->done, device->own), "an event", err);
}

/* The kernels launched from now on wait for the step. */
static enum lr_status join(struct lr_comm *comm, cudaEvent_t done, struct lr_error *err)
{
    return cuda_failed(cudaStreamWaitEvent(device_of(comm)->kernels, done, 0), "an event", err);
}

/* Numbers and notes a step, and compares trails where it is time. */
static enum lr_status note(struct lr_comm *comm,
                           struct lr_comm_step *step,
                           uint64_t common,
                           const size_t *sends,
                           const size_t *receives,
                           struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    step->sequence = ++comm->sequence;
    for (int r = 0; r < comm->size; r++) {
        comm->stats.sent_bytes += sends && r != comm->rank ? sends[r] : 0;
        comm->stats.received_bytes += receives && r != comm->rank ? receives[r] : 0;
    }
    lr_trail_add(device->trail, step, common, sends, receives);
    return step->sequence % LR_TRAIL_STEPS == 0 ? lr_trail_check(device->trail, err) : LR_OK;
}

static struct lr_comm_step step_of(enum lr_comm_kind kind, const char *label)
{
    struct lr_comm_step step = {0};
    lr_comm_step_set(&step, kind, label);
    return step;
}

static enum lr_status
copy_home(struct device_links *device, void *to, const void *from, size_t size_bytes, struct lr_error *err)
{
    if (size_bytes == 0 || to == from)
        return LR_OK;
    return cuda_failed(cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDeviceToDevice, device->own), "a copy", err);
}

/* One group: sends[r] bytes from `data` to each worker r, packed, or all from its start where `same`; receives[r] bytes
 * from each, packed. The own part of both is passed over. */
static ncclResult_t
exchange(struct lr_comm *comm, const char *data, bool same, const size_t *sends, char *received, const size_t *receives)
{
    struct device_links *device = device_of(comm);
    ncclResult_t result = ncclGroupStart();
    size_t from = 0, to = 0;
    for (int r = 0; r < comm->size && (result == ncclSuccess || result == ncclInProgress); r++) {
        if (r != comm->rank && sends[r] > 0)
            result = ncclSend(data + from, sends[r], ncclUint8, r, device->nccl, device->own);
        if (r != comm->rank && receives[r] > 0 && (result == ncclSuccess || result == ncclInProgress))
            result = ncclRecv(received + to, receives[r], ncclUint8, r, device->nccl, device->own);
        from += same ? 0 : sends[r];
        to += receives[r];
    }
    ncclResult_t end = ncclGroupEnd();
    return result == ncclSuccess || result == ncclInProgress ? end : result;
}

/* ---- collectives ---- */

/* Also compares all trails, so that behind a barrier nobody was out of step. */
static enum lr_status nccl_barrier(struct lr_comm *comm, const char *label, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    struct lr_comm_step step = step_of(LR_COMM_BARRIER, label);
    enum lr_status status = note(comm, &step, 0, NULL, NULL, err);
    if (status == LR_OK)
        status = lr_comm_barrier(device->links.host, label, err);
    if (status == LR_OK)
        status = lr_trail_end(device->trail, err);
    return ended(comm, status);
}

static enum lr_status nccl_exchange_sizes(
    struct lr_comm *comm, const char *label, const size_t *send_sizes, size_t *recv_sizes, struct lr_error *err)
{
    struct lr_comm_step step = step_of(LR_COMM_SIZES, label);
    enum lr_status status = note(comm, &step, 0, NULL, NULL, err);
    if (status == LR_OK)
        status = lr_comm_exchange_sizes(device_of(comm)->links.host, label, send_sizes, recv_sizes, err);
    return ended(comm, status);
}

static enum lr_status launch_broadcast(
    struct lr_comm *comm, struct lr_comm_step *step, int root, void *data, size_t size_bytes, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    struct running *running;
    LR_TRY(note(comm, step, (uint64_t)root << 48 ^ size_bytes, NULL, NULL, err));
    if (size_bytes == 0)
        return LR_OK;
    LR_TRY(open_step(comm, &running, err));
    LR_TRY(wait_for_launch(comm, ncclBroadcast(data, data, size_bytes, ncclUint8, root, device->nccl, device->own),
                           step, err));
    LR_TRY(close_step(comm, running, step, err));
    return join(comm, running->done, err);
}

static enum lr_status
nccl_broadcast(struct lr_comm *comm, const char *label, int root, void *data, size_t size_bytes, struct lr_error *err)
{
    struct lr_comm_step step = step_of(LR_COMM_BROADCAST, label);
    *(comm->rank == root ? &comm->stats.sent_bytes : &comm->stats.received_bytes) += size_bytes;
    return ended(comm, launch_broadcast(comm, &step, root, data, size_bytes, err));
}

static enum lr_status take_started(
    struct lr_comm *comm, enum lr_comm_kind kind, const char *label, struct started **out, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    for (int i = 0; i < MAX_STARTED; i++) {
        struct started *started = &device->started[i];
        if (started->used)
            continue;
        started->used = true;
        started->step = step_of(kind, label);
        *out = started;
        return LR_OK;
    }
    return lr_fail(err, LR_FULL, "'%s' cannot start: %d transfers are in flight", label, MAX_STARTED);
}

/* The step, now launched, is what the request stands for. */
static enum lr_status hand_over(struct lr_comm *comm,
                                struct running *running,
                                struct started *started,
                                struct lr_comm_request *request,
                                struct lr_error *err)
{
    LR_TRY(close_step(comm, running, &started->step, err));
    LR_TRY(cuda_failed(cudaEventRecord(started->done, device_of(comm)->own), "an event", err));
    request->pending = &started->step;
    return LR_OK;
}

static enum lr_status launch_gather(struct lr_comm *comm,
                                    struct started *started,
                                    const void *data,
                                    char *received,
                                    struct lr_comm_request *request,
                                    struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    const size_t *sizes = device->receives;
    size_t mine = sizes[comm->rank], before = 0;
    bool equal = mine > 0;
    for (int r = 0; r < comm->size; r++) {
        device->sends[r] = mine;
        equal &= sizes[r] == mine;
        before += r < comm->rank ? sizes[r] : 0;
    }
    struct running *running;
    LR_TRY(note(comm, &started->step, 0, device->sends, sizes, err));
    LR_TRY(open_step(comm, &running, err));
    ncclResult_t result;
    if (equal) {
        result = ncclAllGather(data, received, mine, ncclUint8, device->nccl, device->own);
    } else {
        LR_TRY(copy_home(device, mine > 0 ? received + before : NULL, data, mine, err));
        result = exchange(comm, data, true, device->sends, received, sizes);
    }
    LR_TRY(wait_for_launch(comm, result, &started->step, err));
    return hand_over(comm, running, started, request, err);
}

static enum lr_status nccl_all_gather(struct lr_comm *comm,
                                      const char *label,
                                      const void *data,
                                      const size_t *sizes,
                                      size_t size_bytes,
                                      void *received,
                                      struct lr_comm_request *request,
                                      struct lr_error *err)
{
    struct started *started;
    LR_TRY(take_started(comm, LR_COMM_ALL_GATHER, label, &started, err));
    for (int r = 0; r < comm->size; r++)
        device_of(comm)->receives[r] = sizes ? sizes[r] : size_bytes;
    return ended(comm, launch_gather(comm, started, data, received, request, err));
}

static enum lr_status launch_all_to_all(struct lr_comm *comm,
                                        struct started *started,
                                        const char *data,
                                        const size_t *sends,
                                        char *received,
                                        const size_t *receives,
                                        struct lr_comm_request *request,
                                        struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    size_t from = 0, to = 0, own = sends[comm->rank];
    for (int r = 0; r < comm->rank; r++) {
        from += sends[r];
        to += receives[r];
    }
    struct running *running;
    LR_TRY(note(comm, &started->step, 0, sends, receives, err));
    LR_TRY(open_step(comm, &running, err));
    if (own > 0)
        LR_TRY(copy_home(device, received + to, data + from, own, err));
    LR_TRY(wait_for_launch(comm, exchange(comm, data, false, sends, received, receives), &started->step, err));
    return hand_over(comm, running, started, request, err);
}

static enum lr_status nccl_all_to_all(struct lr_comm *comm,
                                      const char *label,
                                      const void *data,
                                      const size_t *send_sizes,
                                      void *received,
                                      const size_t *recv_sizes,
                                      struct lr_comm_request *request,
                                      struct lr_error *err)
{
    struct started *started;
    LR_TRY(take_started(comm, LR_COMM_ALL_TO_ALL, label, &started, err));
    return ended(comm, launch_all_to_all(comm, started, data, send_sizes, received, recv_sizes, request, err));
}

static enum lr_status nccl_wait(struct lr_comm *comm, struct lr_comm_step *step, struct lr_error *err)
{
    struct started *started = (struct started *)step;
    enum lr_status status = join(comm, started->done, err);
    started->used = status != LR_OK;
    return ended(comm, status);
}

static enum lr_status
launch_reduce(struct lr_comm *comm, struct lr_comm_step *step, void *values, size_t n_values, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    struct running *running;
    LR_TRY(note(comm, step, n_values, NULL, NULL, err));
    if (n_values == 0)
        return LR_OK;
    bool maximum = step->kind == LR_COMM_MAXIMUM;
    LR_TRY(open_step(comm, &running, err));
    LR_TRY(wait_for_launch(comm,
                           ncclAllReduce(values, values, n_values, maximum ? ncclFloat32 : ncclInt64,
                                         maximum ? ncclMax : ncclSum, device->nccl, device->own),
                           step, err));
    LR_TRY(close_step(comm, running, step, err));
    return join(comm, running->done, err);
}

static enum lr_status nccl_reduce(struct lr_comm *comm,
                                  enum lr_comm_kind kind,
                                  const char *label,
                                  void *values,
                                  size_t n_values,
                                  struct lr_error *err)
{
    struct lr_comm_step step = step_of(kind, label);
    return ended(comm, launch_reduce(comm, &step, values, n_values, err));
}

/* Who is not named notes the step and launches nothing. */
static enum lr_status launch_pass(struct lr_comm *comm,
                                  struct lr_comm_step *step,
                                  int from,
                                  const void *data,
                                  int to,
                                  void *received,
                                  size_t size_bytes,
                                  struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    uint64_t common = (uint64_t)from << 52 ^ (uint64_t)to << 40 ^ size_bytes;
    LR_TRY(note(comm, step, common, NULL, NULL, err));
    if (size_bytes == 0 || (comm->rank != from && comm->rank != to))
        return LR_OK;
    struct running *running;
    LR_TRY(open_step(comm, &running, err));
    ncclResult_t result = ncclSuccess;
    if (from == to)
        LR_TRY(copy_home(device, received, data, size_bytes, err));
    else if (comm->rank == from)
        result = ncclSend(data, size_bytes, ncclUint8, to, device->nccl, device->own);
    else
        result = ncclRecv(received, size_bytes, ncclUint8, from, device->nccl, device->own);
    LR_TRY(wait_for_launch(comm, result, step, err));
    LR_TRY(close_step(comm, running, step, err));
    return join(comm, running->done, err);
}

static enum lr_status nccl_pass(struct lr_comm *comm,
                                const char *label,
                                int from,
                                const void *data,
                                int to,
                                void *received,
                                size_t size_bytes,
                                struct lr_error *err)
{
    struct lr_comm_step step = step_of(LR_COMM_PASS, label);
    comm->stats.sent_bytes += comm->rank == from && from != to ? size_bytes : 0;
    comm->stats.received_bytes += comm->rank == to && from != to ? size_bytes : 0;
    return ended(comm, launch_pass(comm, &step, from, data, to, received, size_bytes, err));
}

/* ---- opening and closing ---- */

static void free_device(struct device_links *device)
{
    for (int i = 0; i < MAX_RUNNING; i++) {
        if (device->running[i].ready)
            cudaEventDestroy(device->running[i].ready);
        if (device->running[i].done)
            cudaEventDestroy(device->running[i].done);
    }
    for (int i = 0; i < MAX_STARTED; i++)
        if (device->started[i].done)
            cudaEventDestroy(device->started[i].done);
    if (device->own)
        cudaStreamDestroy(device->own);
    lr_trail_close(device->trail);
    free(device->sends);
    free(device->receives);
    free(device);
}

/* Everything through, then NCCL's own goodbye, each within the deadline. */
static enum lr_status finalize(struct lr_comm *comm, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    struct lr_comm_step step = step_of(LR_COMM_BARRIER, "the end of the links");
    LR_TRY(note(comm, &step, 0, NULL, NULL, err));
    for (int64_t tests = 1; device->n_running > 0; tests++) {
        LR_TRY(look_at_device(comm, err));
        rest_a_little(device->links.host, tests);
    }
    LR_TRY(lr_trail_end(device->trail, err));
    LR_TRY(wait_for_launch(comm, ncclCommFinalize(device->nccl), &step, err));
    ncclCommDestroy(device->nccl);
    device->nccl = NULL;
    return LR_OK;
}

static void nccl_close(struct lr_comm *comm)
{
    struct lr_error err;
    if (comm->failed == LR_OK)
        comm->failed = finalize(comm, &err);
    nccl_give_up(comm);
    free_device(device_of(comm));
    comm->backend = NULL;
}

static const struct lr_comm_ops nccl_ops = {
    .name = "nccl",
    .barrier = nccl_barrier,
    .broadcast = nccl_broadcast,
    .all_gather = nccl_all_gather,
    .all_to_all = nccl_all_to_all,
    .exchange_sizes = nccl_exchange_sizes,
    .reduce = nccl_reduce,
    .pass = nccl_pass,
    .wait = nccl_wait,
    .poll = lr_links_poll,
    .check = nccl_check,
    .give_up = nccl_give_up,
    .describe_loss = lr_links_describe_loss,
    .speaks = lr_links_speaks,
    .close = nccl_close,
    .abort = lr_links_abort_world,
};

/* What a worker has. All see the same, and so come to the same verdict. */
struct identity {
    int32_t usable;
    int32_t nccl_version;
    char device[16];
};

static void identify(struct identity *identity)
{
    struct cudaDeviceProp properties;
    int device, version;
    memset(identity, 0, sizeof *identity);
    if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess ||
        ncclGetVersion(&version) != ncclSuccess)
        return;
    identity->usable = 1;
    identity->nccl_version = version;
    memcpy(identity->device, properties.uuid.bytes, sizeof identity->device);
}

static enum lr_status judge(const struct identity *all, int n, struct lr_error *err)
{
    for (int r = 0; r < n; r++) {
        if (!all[r].usable)
            return lr_fail(err, LR_UNSUPPORTED, "worker %d has no GPU for NCCL", r);
        if (all[r].nccl_version != all[0].nccl_version)
            return lr_fail(err, LR_UNSUPPORTED, "worker 0 has NCCL %d and worker %d NCCL %d", all[0].nccl_version, r,
                           all[r].nccl_version);
        for (int other = 0; other < r; other++)
            if (memcmp(all[r].device, all[other].device, sizeof all[r].device) == 0)
                return lr_fail(err, LR_UNSUPPORTED, "workers %d and %d share a GPU, which NCCL refuses", other, r);
    }
    return LR_OK;
}

static enum lr_status agree_on_devices(struct lr_comm *host, struct lr_error *err)
{
    struct identity mine, *all = calloc((size_t)host->size, sizeof *all);
    if (!all)
        return lr_fail(err, LR_NO_MEMORY, "no memory for the GPUs of %d workers", host->size);
    identify(&mine);
    enum lr_status status = lr_comm_all_gather(host, "GPUs of the workers", &mine, sizeof mine, all, err);
    if (status == LR_OK)
        status = judge(all, host->size, err);
    free(all);
    return status;
}

/* What every step needs; then NCCL itself, for at most `timeout_ms`. */
static enum lr_status
start_nccl(struct device_links *device, const ncclUniqueId *id, int64_t timeout_ms, struct lr_error *err)
{
    const struct lr_comm *host = device->links.host;
    int least, greatest;
    LR_TRY(cuda_failed(cudaDeviceGetStreamPriorityRange(&least, &greatest), "a stream", err));
    LR_TRY(cuda_failed(cudaStreamCreateWithPriority(&device->own, cudaStreamNonBlocking, greatest), "a stream", err));
    for (int i = 0; i < MAX_RUNNING; i++) {
        struct running *running = &device->running[i];
        LR_TRY(cuda_failed(cudaEventCreateWithFlags(&running->ready, cudaEventDisableTiming), "an event", err));
        LR_TRY(cuda_failed(cudaEventCreateWithFlags(&running->done, cudaEventDisableTiming), "an event", err));
    }
    for (int i = 0; i < MAX_STARTED; i++)
        LR_TRY(
            cuda_failed(cudaEventCreateWithFlags(&device->started[i].done, cudaEventDisableTiming), "an event", err));
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    ncclResult_t result =
        poll_nccl(device, ncclCommInitRankConfig(&device->nccl, host->size, *id, host->rank, &config), timeout_ms);
    if (result == ncclInProgress)
        return lr_fail(err, LR_TIMEOUT, "NCCL did not come up in %.1f s", (double)timeout_ms / 1000.0);
    return result == ncclSuccess ? LR_OK : nccl_failed(device->nccl, result, "the start", err);
}

/* NCCL connects two workers when they first exchange something: here, so that it fails here. `buffer` has 2 * size
 * values. */
static enum lr_status exchange_first(struct lr_comm *comm, int32_t *buffer, int64_t timeout_ms, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    size_t n = (size_t)comm->size;
    for (size_t r = 0; r < n; r++)
        device->sends[r] = device->receives[r] = sizeof *buffer;
    ncclResult_t result =
        poll_nccl(device, exchange(comm, (char *)buffer, false, device->sends, (char *)(buffer + n), device->receives),
                  timeout_ms);
    if (result == ncclSuccess)
        result = poll_nccl(device, ncclAllReduce(buffer, buffer, n, ncclInt32, ncclMax, device->nccl, device->own),
                           timeout_ms);
    if (result != ncclSuccess)
        return nccl_failed(device->nccl, result, "the first exchange", err);
    cudaEvent_t done = device->running[0].done;
    LR_TRY(cuda_failed(cudaEventRecord(done, device->own), "the first exchange", err));
    int64_t deadline_ns = lr_clock_ns() + timeout_ms * 1000000;
    cudaError_t error;
    for (int64_t tests = 1; (error = cudaEventQuery(done)) == cudaErrorNotReady; tests++) {
        if (lr_clock_ns() > deadline_ns)
            return lr_fail(err, LR_TIMEOUT, "the first exchange took more than %.1f s", (double)timeout_ms / 1000.0);
        rest_a_little(device->links.host, tests);
    }
    return cuda_failed(error, "the first exchange", err);
}

static enum lr_status
connect_devices(struct lr_comm *comm, const ncclUniqueId *id, int64_t timeout_ms, struct lr_error *err)
{
    size_t size_bytes = 2 * (size_t)comm->size * sizeof(int32_t);
    int32_t *buffer = NULL;
    LR_TRY(start_nccl(device_of(comm), id, timeout_ms, err));
    LR_TRY(cuda_failed(cudaMalloc((void **)&buffer, size_bytes), "the first exchange", err));
    enum lr_status status = cuda_failed(cudaMemset(buffer, 0, size_bytes), "the first exchange", err);
    if (status == LR_OK)
        status = exchange_first(comm, buffer, timeout_ms, err);
    if (status == LR_OK) /* after a failure NCCL may still write there */
        cudaFree(buffer);
    return status;
}

/* The first failure of all, the same sentence at all. */
static enum lr_status
agree_on_start(struct lr_comm *host, enum lr_status mine, const struct lr_error *why, struct lr_error *err)
{
    struct verdict {
        int32_t failed;
        char message[400];
    } own = {.failed = mine != LR_OK}, *all = calloc((size_t)host->size, sizeof *all);
    if (!all)
        return lr_fail(err, LR_NO_MEMORY, "no memory for the verdicts of %d workers", host->size);
    if (own.failed)
        snprintf(own.message, sizeof own.message, "%.399s", why->message);
    enum lr_status status = lr_comm_all_gather(host, "start of NCCL", &own, sizeof own, all, err);
    for (int r = 0; r < host->size && status == LR_OK; r++)
        if (all[r].failed)
            status = lr_fail(err, LR_UNSUPPORTED, "NCCL did not start at worker %d: %.399s", r, all[r].message);
    free(all);
    return status;
}

enum lr_status lr_links_open_nccl(struct lr_comm *host,
                                  const struct lr_link_memory *memory,
                                  struct lr_comm *links,
                                  struct lr_error *err)
{
    struct invitation {
        int32_t usable;
        ncclUniqueId id;
    } invitation = {0};
    LR_TRY(agree_on_devices(host, err));
    if (host->rank == 0)
        invitation.usable = ncclGetUniqueId(&invitation.id) == ncclSuccess;
    LR_TRY(lr_comm_broadcast(host, "NCCL's id", 0, &invitation, sizeof invitation, err));
    if (!invitation.usable)
        return lr_fail(err, LR_UNSUPPORTED, "NCCL finds no network: %s", ncclGetLastError(NULL));

    struct device_links *device = calloc(1, sizeof *device);
    if (!device)
        return lr_fail(err, LR_NO_MEMORY, "no memory for the links between %d workers", host->size);
    device->links = (struct lr_links){.host = host, .memory = *memory};
    device->kernels = memory->stream;
    device->sends = calloc((size_t)host->size, sizeof *device->sends);
    device->receives = calloc((size_t)host->size, sizeof *device->receives);
    struct lr_comm opened;
    lr_links_set(&opened, &nccl_ops, &device->links);

    /* Half of the deadline, so that who fails early does not wait in vain for who fails late. */
    struct lr_error why = {.message = "no memory"};
    enum lr_status status = device->sends && device->receives ? LR_OK : LR_NO_MEMORY;
    if (status == LR_OK)
        status = lr_trail_open(host, &device->trail, &why);
    if (status == LR_OK)
        status = connect_devices(&opened, &invitation.id, host->timeout_ms / 2, &why);
    status = agree_on_start(host, status, &why, err);
    if (status != LR_OK) {
        nccl_give_up(&opened);
        free_device(device);
        return status;
    }
    *links = opened;
    return LR_OK;
}
