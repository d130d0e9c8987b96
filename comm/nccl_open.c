/* The start of links over NCCL: all agree that they can, NCCL connects them, all agree that it has. */
#include "comm/nccl_links.h"

#include "base/clock.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

static enum lr_status make_events(struct device_links *device, struct lr_error *err)
{
    for (int i = 0; i < LR_NCCL_RUNNING; i++) {
        struct running *running = &device->running[i];
        struct standing *standing = &device->standing[i];
        LR_TRY(lr_nccl_cuda_failed(cudaEventCreateWithFlags(&running->ready, cudaEventDisableTiming), "an event", err));
        LR_TRY(lr_nccl_cuda_failed(cudaEventCreateWithFlags(&running->done, cudaEventDisableTiming), "an event", err));
        LR_TRY(lr_nccl_cuda_failed(cudaEventCreateWithFlags(&standing->reached, cudaEventDefault), "an event", err));
        LR_TRY(lr_nccl_cuda_failed(cudaEventCreateWithFlags(&standing->passed, cudaEventDefault), "an event", err));
    }
    for (int i = 0; i < LR_NCCL_STARTED; i++)
        LR_TRY(lr_nccl_cuda_failed(cudaEventCreateWithFlags(&device->started[i].done, cudaEventDisableTiming),
                                   "an event", err));
    LR_TRY(lr_nccl_cuda_failed(cudaEventCreateWithFlags(&device->edge_in, cudaEventDisableTiming), "an event", err));
    return lr_nccl_cuda_failed(cudaEventCreateWithFlags(&device->edge_out, cudaEventDisableTiming), "an event", err);
}

/* What every step needs. */
static enum lr_status take_resources(struct device_links *device, struct lr_error *err)
{
    int least, greatest;
    LR_TRY(lr_nccl_watch_open(&device->watch, err));
    LR_TRY(lr_nccl_cuda_failed(cudaDeviceGetStreamPriorityRange(&least, &greatest), "a stream", err));
    LR_TRY(lr_nccl_cuda_failed(cudaStreamCreateWithPriority(&device->own, cudaStreamNonBlocking, greatest), "a stream",
                               err));
    return make_events(device, err);
}

/* Asks until NCCL has done what it was asked for: ncclInProgress when the time is up. */
static ncclResult_t wait_for_nccl(const struct lr_comm *host, ncclComm_t nccl, ncclResult_t result, int64_t deadline_ns)
{
    for (int64_t tests = 1; result == ncclInProgress && lr_clock_ns() < deadline_ns; tests++) {
        ncclResult_t asked = ncclCommGetAsyncError(nccl, &result);
        if (asked != ncclSuccess)
            result = asked;
        lr_nccl_rest(host, tests);
    }
    return result;
}

/* The communicator of the steps is split off a starter, which does not block: a start that hangs can be given up. */
static enum lr_status
start_nccl(struct device_links *device, const ncclUniqueId *id, int64_t timeout_ms, struct lr_error *err)
{
    const struct lr_comm *host = device->links.host;
    int64_t deadline_ns = lr_clock_ns() + timeout_ms * 1000000;
    ncclConfig_t asked = NCCL_CONFIG_INITIALIZER, blocking = NCCL_CONFIG_INITIALIZER;
    asked.blocking = 0;
    blocking.blocking = 1;
    ncclComm_t split = NULL;
    ncclResult_t result = ncclCommInitRankConfig(&device->starter, host->size, *id, host->rank, &asked);
    result = wait_for_nccl(host, device->starter, result, deadline_ns);
    if (result == ncclSuccess) {
        result = ncclCommSplit(device->starter, 0, host->rank, &split, &blocking);
        if (result == ncclSuccess) /* it has only begun: NCCL 2.28 does not say so here */
            result = wait_for_nccl(host, device->starter, ncclInProgress, deadline_ns);
    }
    if (result == ncclInProgress)
        return lr_fail(err, LR_TIMEOUT, "NCCL did not come up in %.1f s", (double)timeout_ms / 1000.0);
    if (result != ncclSuccess)
        return lr_nccl_failed(device->starter, result, "the start", err);
    device->nccl = split;
    return LR_OK;
}

/* NCCL connects two workers when they first exchange something: here, so that it fails here. `buffer` has 2 * size
 * values. */
static enum lr_status exchange_first(struct lr_comm *comm, int32_t *buffer, int64_t timeout_ms, struct lr_error *err)
{
    struct device_links *device = comm->backend;
    size_t n = (size_t)comm->size;
    for (size_t r = 0; r < n; r++)
        device->sends[r] = device->receives[r] = sizeof *buffer;
    lr_nccl_watch_enter(device->watch, device->nccl, timeout_ms);
    ncclResult_t result =
        lr_nccl_exchange(comm, (char *)buffer, false, device->sends, (char *)(buffer + n), device->receives);
    if (result == ncclSuccess)
        result = ncclAllReduce(buffer, buffer, n, ncclInt32, ncclMax, device->nccl, device->own);
    if (!lr_nccl_watch_leave(device->watch)) {
        device->nccl = NULL;
        return lr_fail(err, LR_TIMEOUT, "the first exchange took more than %.1f s", (double)timeout_ms / 1000.0);
    }
    if (result != ncclSuccess)
        return lr_nccl_failed(device->nccl, result, "the first exchange", err);
    cudaEvent_t done = device->running[0].done;
    LR_TRY(lr_nccl_cuda_failed(cudaEventRecord(done, device->own), "the first exchange", err));
    int64_t deadline_ns = lr_clock_ns() + timeout_ms * 1000000;
    cudaError_t error;
    for (int64_t tests = 1; (error = cudaEventQuery(done)) == cudaErrorNotReady; tests++) {
        if (lr_clock_ns() > deadline_ns)
            return lr_fail(err, LR_TIMEOUT, "the first exchange took more than %.1f s", (double)timeout_ms / 1000.0);
        lr_nccl_rest(device->links.host, tests);
    }
    return lr_nccl_cuda_failed(error, "the first exchange", err);
}

static enum lr_status
connect_devices(struct lr_comm *comm, const ncclUniqueId *id, int64_t timeout_ms, struct lr_error *err)
{
    size_t size_bytes = 2 * (size_t)comm->size * sizeof(int32_t);
    int32_t *buffer = NULL;
    LR_TRY(take_resources(comm->backend, err));
    LR_TRY(start_nccl(comm->backend, id, timeout_ms, err));
    LR_TRY(lr_nccl_cuda_failed(cudaMalloc((void **)&buffer, size_bytes), "the first exchange", err));
    enum lr_status status = lr_nccl_cuda_failed(cudaMemset(buffer, 0, size_bytes), "the first exchange", err);
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
    lr_links_set(&opened, &lr_nccl_ops, &device->links);

    /* Half of the deadline, so that who fails early does not wait in vain for who fails late. */
    struct lr_error why = {.message = "no memory"};
    enum lr_status status = device->sends && device->receives ? LR_OK : LR_NO_MEMORY;
    if (status == LR_OK)
        status = lr_trail_open(host, &device->trail, &why);
    if (status == LR_OK)
        status = connect_devices(&opened, &invitation.id, host->timeout_ms / 2, &why);
    status = agree_on_start(host, status, &why, err);
    ncclCommAbort(device->starter); /* the others, too, are done with it */
    if (status != LR_OK) {
        lr_nccl_give_up(&opened);
        lr_nccl_free(device);
        return status;
    }
    *links = opened;
    return LR_OK;
}
