/* Links over NCCL: from device to device. nccl_open.c starts them, nccl_watch.c ends a call that hangs.
 *
 *   kernels' stream   ...K1 --ready--.            K2 (beside the transfer)    .--> K3...
 *   own stream                       `--> [copy of what stays] [NCCL] --done--'
 *                                        start                        wait
 *
 * The host launches and goes on; lr_comm_wait makes the kernels' stream wait, not the host. NCCL's calls put a launch
 * on the stream before they return; one that does not return, because another worker does not come to the first use of
 * a connection, is ended by the watch. What fails or hangs on the device is noticed by whoever calls next, or calls
 * lr_comm_check while waiting for the device: NCCL's own error, or a step whose data was ready a deadline ago and that
 * is not through. Then the communicator is aborted, which also ends the kernels that wait inside the device.
 *
 * NCCL's messages carry no header. Who is out of step is found by the trail (trail.h). Steps of 0 bytes between two
 * workers launch nothing between them, at both alike.
 *
 * ncclAllGather where all have the same size, ncclBroadcast, ncclAllReduce for maxima and integer sums (both free of
 * order; the maximum on the device puts +0 above -0 as the host's does); the rest is a group of sends and receives.
 *
 * In a unit the kernels' stream is being captured, and the own one with it: events then are edges of the graph and are
 * not asked. The unit as a whole is one running step, which its launch is. */
#include "comm/nccl_links.h"

#include "base/clock.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { TESTS_PER_LOOK = 64, ABORT_SECONDS = 3 };

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
void lr_nccl_give_up(struct lr_comm *comm)
{
    struct device_links *device = device_of(comm);
    pthread_t thread;
    if (device->watch && !lr_nccl_watch_leave(device->watch))
        device->nccl = NULL;
    if (!device->nccl || pthread_create(&thread, NULL, abort_nccl, device->nccl) != 0)
        return;
    device->nccl = NULL;
    struct timespec deadline;
    clock_gettime(CLOCK_REALTIME, &deadline);
    deadline.tv_sec += ABORT_SECONDS;
    if (pthread_timedjoin_np(thread, NULL, &deadline) != 0)
        pthread_detach(thread);
}

enum lr_status lr_nccl_cuda_failed(cudaError_t error, const char *what, struct lr_error *err)
{
    if (error == cudaSuccess)
        return LR_OK;
    return lr_fail(err, error == cudaErrorMemoryAllocation ? LR_NO_MEMORY : LR_INTERNAL, "the GPU failed at '%s': %s",
                   what, cudaGetErrorString(error));
}

enum lr_status lr_nccl_failed(ncclComm_t nccl, ncclResult_t result, const char *what, struct lr_error *err)
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

/* "Not ready" is kept as an error otherwise, and found by whoever launches next. */
static cudaError_t ask(cudaEvent_t event)
{
    cudaError_t state = cudaEventQuery(event);
    if (state == cudaErrorNotReady)
        (void)cudaGetLastError();
    return state;
}

/* Forgets what is through; LR_TIMEOUT where the oldest should be. */
static enum lr_status look_at_device(struct lr_comm *comm, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    for (; device->n_running > 0; device->n_running--) {
        struct running *oldest = &device->running[device->oldest];
        cudaError_t error = ask(oldest->done);
        if (error == cudaErrorNotReady) {
            int64_t now_ns = lr_clock_ns();
            if (oldest->ready_ns > 0)
                return now_ns - oldest->ready_ns > comm->timeout_ms * 1000000 ? timed_out(comm, &oldest->step, err)
                                                                              : LR_OK;
            if (ask(oldest->ready) == cudaSuccess)
                oldest->ready_ns = now_ns;
            return LR_OK;
        }
        LR_TRY(lr_nccl_cuda_failed(error, oldest->step.label, err));
        device->oldest = (device->oldest + 1) % LR_NCCL_RUNNING;
    }
    return LR_OK;
}

static enum lr_status look_at_nccl(struct lr_comm *comm, const char *label, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    ncclResult_t state = ncclSuccess;
    ncclResult_t result = ncclCommGetAsyncError(device->nccl, &state);
    if (result != ncclSuccess || (state != ncclSuccess && state != ncclInProgress))
        return lr_nccl_failed(device->nccl, result != ncclSuccess ? result : state, label, err);
    return LR_OK;
}

/* Whatever fails ends what runs. LR_FULL is a refusal. */
static enum lr_status ended(struct lr_comm *comm, enum lr_status status)
{
    if (status != LR_OK && status != LR_FULL)
        lr_nccl_give_up(comm);
    return status;
}

/* Adds up what the kernels' stream has stood still, of the waits that it has passed. */
static void count_standing(struct lr_comm *comm)
{
    struct device_links *device = device_of(comm);
    for (; device->n_standing > 0; device->n_standing--) {
        const struct standing *first = &device->standing[device->first_standing];
        float ms;
        if (ask(first->passed) != cudaSuccess ||
            cudaEventElapsedTime(&ms, first->reached, first->passed) != cudaSuccess)
            return;
        comm->stats.waited_ns += (int64_t)(ms * 1e6f);
        device->first_standing = (device->first_standing + 1) % LR_NCCL_RUNNING;
    }
}

static enum lr_status nccl_check(struct lr_comm *comm, struct lr_error *err)
{
    enum lr_status status = look_at_nccl(comm, "a transfer", err);
    if (status == LR_OK)
        status = look_at_device(comm, err);
    count_standing(comm);
    return ended(comm, status);
}

void lr_nccl_rest(const struct lr_comm *host, int64_t tests)
{
    if (tests % TESTS_PER_LOOK == 0 && host->idle)
        host->idle(host->idle_context);
    if (tests > 20000)
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    else if (tests > 2000)
        sched_yield();
}

static enum lr_status make_room(struct lr_comm *comm, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    for (int64_t tests = 1; device->n_running == LR_NCCL_RUNNING; tests++) {
        LR_TRY(look_at_device(comm, err));
        if (tests % TESTS_PER_LOOK == 0)
            LR_TRY(look_at_nccl(comm, "a full queue of transfers", err));
        lr_nccl_rest(device->links.host, tests);
    }
    return LR_OK;
}

/* ---- one step ---- */

static struct running *next_running(struct device_links *device)
{
    return &device->running[(device->oldest + device->n_running) % LR_NCCL_RUNNING];
}

/* The own stream waits for the kernels so far; from here to `launched` the watch looks after the calls. */
static enum lr_status open_step(struct lr_comm *comm, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    if (!device->unit)
        LR_TRY(make_room(comm, err));
    cudaEvent_t ready = device->unit ? device->edge_in : next_running(device)->ready;
    LR_TRY(lr_nccl_cuda_failed(cudaEventRecord(ready, device->kernels), "an event", err));
    LR_TRY(lr_nccl_cuda_failed(cudaStreamWaitEvent(device->own, ready, 0), "an event", err));
    lr_nccl_watch_enter(device->watch, device->nccl, comm->timeout_ms);
    return LR_OK;
}

/* What NCCL said of the step; it is on the own stream now. */
static enum lr_status
launched(struct lr_comm *comm, ncclResult_t result, const struct lr_comm_step *step, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    if (!lr_nccl_watch_leave(device->watch)) {
        device->nccl = NULL;
        return timed_out(comm, step, err);
    }
    return result == ncclSuccess ? LR_OK : lr_nccl_failed(device->nccl, result, step->label, err);
}

/* What was launched on the own stream since is this step; `done` is an event of its end. */
static enum lr_status
close_step(struct lr_comm *comm, const struct lr_comm_step *step, cudaEvent_t *done, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    if (device->unit) {
        device->unit->step = *step;
        *done = device->edge_out;
    } else {
        struct running *running = next_running(device);
        running->step = *step;
        running->ready_ns = 0;
        device->n_running++;
        *done = running->done;
    }
    return lr_nccl_cuda_failed(cudaEventRecord(*done, device->own), "an event", err);
}

/* The kernels launched from now on wait for the step. */
static enum lr_status join(struct lr_comm *comm, cudaEvent_t done, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    if (device->unit)
        return lr_nccl_cuda_failed(cudaStreamWaitEvent(device->kernels, done, 0), "an event", err);
    if (device->n_standing == LR_NCCL_RUNNING)
        count_standing(comm);
    bool counted = device->n_standing < LR_NCCL_RUNNING;
    struct standing *next = &device->standing[(device->first_standing + device->n_standing) % LR_NCCL_RUNNING];
    if (counted)
        LR_TRY(lr_nccl_cuda_failed(cudaEventRecord(next->reached, device->kernels), "an event", err));
    LR_TRY(lr_nccl_cuda_failed(cudaStreamWaitEvent(device->kernels, done, 0), "an event", err));
    if (counted)
        LR_TRY(lr_nccl_cuda_failed(cudaEventRecord(next->passed, device->kernels), "an event", err));
    device->n_standing += counted;
    return LR_OK;
}

/* The end of a step that is not started: it was launched, and the kernels wait for it. */
static enum lr_status
end_step(struct lr_comm *comm, ncclResult_t result, const struct lr_comm_step *step, struct lr_error *err)
{
    cudaEvent_t done;
    LR_TRY(launched(comm, result, step, err));
    LR_TRY(close_step(comm, step, &done, err));
    return join(comm, done, err);
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

/* Behind the exchange: kernels that start meanwhile would hold up a copy, and so the others. */
static enum lr_status
copy_home(struct device_links *device, void *to, const void *from, size_t size_bytes, struct lr_error *err)
{
    if (size_bytes == 0 || to == from)
        return LR_OK;
    return lr_nccl_cuda_failed(cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDeviceToDevice, device->own), "a copy",
                               err);
}

ncclResult_t lr_nccl_exchange(
    struct lr_comm *comm, const char *data, bool same, const size_t *sends, char *received, const size_t *receives)
{
    struct device_links *device = device_of(comm);
    ncclResult_t result = ncclGroupStart();
    size_t from = 0, to = 0;
    for (int r = 0; r < comm->size && result == ncclSuccess; r++) {
        if (r != comm->rank && sends[r] > 0)
            result = ncclSend(data + from, sends[r], ncclUint8, r, device->nccl, device->own);
        if (r != comm->rank && receives[r] > 0 && result == ncclSuccess)
            result = ncclRecv(received + to, receives[r], ncclUint8, r, device->nccl, device->own);
        from += same ? 0 : sends[r];
        to += receives[r];
    }
    ncclResult_t end = ncclGroupEnd();
    return result == ncclSuccess ? end : result;
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
    LR_TRY(note(comm, step, (uint64_t)root << 48 ^ size_bytes, NULL, NULL, err));
    if (size_bytes == 0)
        return LR_OK;
    LR_TRY(open_step(comm, err));
    return end_step(comm, ncclBroadcast(data, data, size_bytes, ncclUint8, root, device->nccl, device->own), step, err);
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
    for (int i = 0; i < LR_NCCL_STARTED; i++) {
        struct started *started = &device->started[i];
        if (started->used)
            continue;
        started->used = true;
        started->step = step_of(kind, label);
        *out = started;
        return LR_OK;
    }
    return lr_fail(err, LR_FULL, "'%s' cannot start: %d transfers are in flight", label, LR_NCCL_STARTED);
}

/* The step, as NCCL said it was launched, is what the request stands for. */
static enum lr_status hand_over(struct lr_comm *comm,
                                ncclResult_t result,
                                struct started *started,
                                struct lr_comm_request *request,
                                struct lr_error *err)
{
    cudaEvent_t done;
    LR_TRY(launched(comm, result, &started->step, err));
    LR_TRY(close_step(comm, &started->step, &done, err));
    LR_TRY(lr_nccl_cuda_failed(cudaEventRecord(started->done, device_of(comm)->own), "an event", err));
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
    LR_TRY(note(comm, &started->step, 0, device->sends, sizes, err));
    LR_TRY(open_step(comm, err));
    ncclResult_t result;
    if (equal) {
        result = ncclAllGather(data, received, mine, ncclUint8, device->nccl, device->own);
    } else {
        result = lr_nccl_exchange(comm, data, true, device->sends, received, sizes);
        if (result == ncclSuccess)
            LR_TRY(copy_home(device, mine > 0 ? received + before : NULL, data, mine, err));
    }
    return hand_over(comm, result, started, request, err);
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
    LR_TRY(note(comm, &started->step, 0, sends, receives, err));
    LR_TRY(open_step(comm, err));
    ncclResult_t result = lr_nccl_exchange(comm, data, false, sends, received, receives);
    if (result == ncclSuccess && own > 0)
        LR_TRY(copy_home(device, received + to, data + from, own, err));
    return hand_over(comm, result, started, request, err);
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
    LR_TRY(note(comm, step, n_values, NULL, NULL, err));
    if (n_values == 0)
        return LR_OK;
    bool maximum = step->kind == LR_COMM_MAXIMUM;
    LR_TRY(open_step(comm, err));
    return end_step(comm,
                    ncclAllReduce(values, values, n_values, maximum ? ncclFloat32 : ncclInt64,
                                  maximum ? ncclMax : ncclSum, device->nccl, device->own),
                    step, err);
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
                                  struct started *started,
                                  int from,
                                  const void *data,
                                  int to,
                                  void *received,
                                  size_t size_bytes,
                                  struct lr_comm_request *request,
                                  struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    uint64_t common = (uint64_t)from << 52 ^ (uint64_t)to << 40 ^ size_bytes;
    LR_TRY(note(comm, &started->step, common, NULL, NULL, err));
    started->used = size_bytes > 0 && (comm->rank == from || comm->rank == to);
    if (!started->used)
        return LR_OK;
    LR_TRY(open_step(comm, err));
    ncclResult_t result = ncclSuccess;
    if (from == to)
        LR_TRY(copy_home(device, received, data, size_bytes, err));
    else if (comm->rank == from)
        result = ncclSend(data, size_bytes, ncclUint8, to, device->nccl, device->own);
    else
        result = ncclRecv(received, size_bytes, ncclUint8, from, device->nccl, device->own);
    return hand_over(comm, result, started, request, err);
}

static enum lr_status nccl_pass(struct lr_comm *comm,
                                const char *label,
                                int from,
                                const void *data,
                                int to,
                                void *received,
                                size_t size_bytes,
                                struct lr_comm_request *request,
                                struct lr_error *err)
{
    struct started *started;
    LR_TRY(take_started(comm, LR_COMM_PASS, label, &started, err));
    comm->stats.sent_bytes += comm->rank == from && from != to ? size_bytes : 0;
    comm->stats.received_bytes += comm->rank == to && from != to ? size_bytes : 0;
    return ended(comm, launch_pass(comm, started, from, data, to, received, size_bytes, request, err));
}

/* ---- units ---- */

/* The unit takes its place in the ring before the capture begins: events cannot be asked in it. */
static enum lr_status nccl_unit_begin(struct lr_comm *comm, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    enum lr_status status = make_room(comm, err);
    struct running *unit = next_running(device);
    if (status == LR_OK)
        status = lr_nccl_cuda_failed(cudaEventRecord(unit->ready, device->kernels), "a unit", err);
    unit->step = step_of(LR_COMM_BARRIER, "a unit");
    unit->ready_ns = 0;
    device->unit = status == LR_OK ? unit : NULL;
    return ended(comm, status);
}

static enum lr_status nccl_unit_end(struct lr_comm *comm, struct lr_error *err)
{
    struct device_links *device = device_of(comm);
    struct running *unit = device->unit;
    device->unit = NULL;
    device->n_running++;
    return ended(comm, lr_nccl_cuda_failed(cudaEventRecord(unit->done, device->kernels), "a unit", err));
}

/* ---- closing ---- */

static void destroy_events(struct device_links *device)
{
    for (int i = 0; i < LR_NCCL_RUNNING; i++) {
        cudaEvent_t all[] = {device->running[i].ready, device->running[i].done, device->standing[i].reached,
                             device->standing[i].passed};
        for (size_t e = 0; e < sizeof all / sizeof all[0]; e++)
            if (all[e])
                cudaEventDestroy(all[e]);
    }
    for (int i = 0; i < LR_NCCL_STARTED; i++)
        if (device->started[i].done)
            cudaEventDestroy(device->started[i].done);
    if (device->edge_in)
        cudaEventDestroy(device->edge_in);
    if (device->edge_out)
        cudaEventDestroy(device->edge_out);
}

void lr_nccl_free(struct device_links *device)
{
    lr_nccl_watch_close(device->watch);
    destroy_events(device);
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
        lr_nccl_rest(device->links.host, tests);
    }
    LR_TRY(lr_trail_end(device->trail, err));
    lr_nccl_watch_enter(device->watch, device->nccl, comm->timeout_ms);
    ncclResult_t result = ncclCommFinalize(device->nccl);
    if (result == ncclSuccess)
        result = ncclCommDestroy(device->nccl);
    LR_TRY(launched(comm, result, &step, err));
    device->nccl = NULL;
    return LR_OK;
}

static void nccl_close(struct lr_comm *comm)
{
    struct lr_error err;
    if (comm->failed == LR_OK)
        comm->failed = finalize(comm, &err);
    lr_nccl_give_up(comm);
    lr_nccl_free(device_of(comm));
    comm->backend = NULL;
}

const struct lr_comm_ops lr_nccl_ops = {
    .name = "nccl",
    .captures = true,
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
    .unit_begin = nccl_unit_begin,
    .unit_end = nccl_unit_end,
    .give_up = lr_nccl_give_up,
    .describe_loss = lr_links_describe_loss,
    .speaks = lr_links_speaks,
    .close = nccl_close,
    .abort = lr_links_abort_world,
};
