/* A CUDA runtime and an NCCL for machines without GPUs, as far as comm/nccl.c and area_cuda.c call them: for its order
 * of things, not for speed. Linked in the place of the real ones.
 *
 *   stream   a queue of commands; nothing is done before somebody asks for progress, and then a few commands of a
 *            stream drawn at random: who forgets to wait for an event finds wrong bytes
 *   start    is done after NCCL was asked a few times; the communicator of the steps is split off
 *   launch   the first of a kind waits until all workers have come to it, as NCCL's connections do, or for an abort
 *   NCCL     messages of MPI. One whose size is not what the other side expects is never met, so that the stream hangs
 *
 * Every process has a device of its own. Device memory is the host's. */
#include <cuda_runtime_api.h>
#include <mpi.h>
#include <nccl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MOST_STREAMS = 8, MOST_COMMANDS = 1 << 16, MOST_MESSAGES = 256, MOST_TAG = 30000 };

struct CUevent_st {
    uint64_t asked, done; /* records */
};

/* One message of a group; a reduction is one from every other worker. */
struct message {
    int peer, tag;
    void *data;
    size_t size_bytes;
    bool receives;
};

struct group {
    cudaStream_t stream;
    struct message messages[MOST_MESSAGES];
    MPI_Request requests[MOST_MESSAGES];
    int n;
    bool posted;
    char *values, *scratch; /* of a reduction; NULL: none */
    size_t size_bytes;
    ncclDataType_t type;
};

struct command {
    enum { COPY, RECORD, WAIT, FREE, GROUP } kind;
    void *to;
    const void *from;
    size_t size_bytes;
    struct CUevent_st *event;
    uint64_t record;
    struct group *group;
};

struct CUstream_st {
    struct command commands[MOST_COMMANDS];
    uint64_t first, end;
};

struct ncclComm {
    MPI_Comm world;
    int rank, size;
    atomic_int aborted;
    int asks_left; /* until the start, or the split, is done */
    struct ncclComm **child, *split;
    bool blocking, connected[4]; /* by kind of message */
};

static struct CUstream_st *streams[MOST_STREAMS];
static int n_streams, group_depth;
static struct group *open_group;
static ncclComm_t nccl;
static uint64_t dice = 88172645463325252u;

static uint64_t throw_dice(void)
{
    dice ^= dice << 13;
    dice ^= dice >> 7;
    dice ^= dice << 17;
    return dice;
}

/* ---- commands ---- */

static void reduce(struct group *group)
{
    for (int r = 0; r < nccl->size; r++) {
        if (r == nccl->rank)
            continue;
        const char *other = group->scratch + (size_t)r * group->size_bytes;
        for (size_t i = 0; group->type == ncclInt64 && i < group->size_bytes / 8; i++)
            ((uint64_t *)group->values)[i] += ((const uint64_t *)other)[i];
        for (size_t i = 0; group->type == ncclFloat32 && i < group->size_bytes / 4; i++) {
            float *a = (float *)group->values + i, b = ((const float *)other)[i];
            if (b > *a || (b == *a && !__builtin_signbit(b)))
                *a = b;
        }
    }
}

static void post(struct group *group)
{
    group->posted = true;
    if (group->values) /* the values change while they are sent */
        memcpy(group->scratch + (size_t)nccl->rank * group->size_bytes, group->values, group->size_bytes);
    for (int i = 0; i < group->n; i++) {
        struct message *m = &group->messages[i];
        if (m->receives)
            MPI_Irecv(m->data, (int)m->size_bytes, MPI_BYTE, m->peer, m->tag, nccl->world, &group->requests[i]);
        else
            MPI_Isend(m->data, (int)m->size_bytes, MPI_BYTE, m->peer, m->tag, nccl->world, &group->requests[i]);
    }
}

static bool run_group(struct group *group)
{
    int done = 1;
    if (!atomic_load(&nccl->aborted)) {
        if (!group->posted)
            post(group);
        MPI_Testall(group->n, group->requests, &done, MPI_STATUSES_IGNORE);
        if (done && group->values)
            reduce(group);
    }
    if (done) {
        free(group->scratch);
        free(group);
    }
    return done;
}

static bool run(struct command *command)
{
    switch (command->kind) {
    case COPY:
        memcpy(command->to, command->from, command->size_bytes);
        return true;
    case RECORD:
        command->event->done = command->record;
        return true;
    case WAIT:
        return command->event->done >= command->record;
    case FREE:
        free(command->to);
        return true;
    case GROUP:
        return run_group(command->group);
    }
    return true;
}

static void progress(void)
{
    if (n_streams == 0)
        return;
    struct CUstream_st *stream = streams[throw_dice() % (uint64_t)n_streams];
    for (uint64_t n = throw_dice() % 6; n > 0 && stream->first < stream->end; n--) {
        if (!run(&stream->commands[stream->first % MOST_COMMANDS]))
            return;
        stream->first++;
    }
}

static void append(cudaStream_t stream, struct command command)
{
    if (stream->end - stream->first == MOST_COMMANDS) {
        fprintf(stderr, "pretended GPU: a stream is full\n");
        abort();
    }
    stream->commands[stream->end++ % MOST_COMMANDS] = command;
}

/* ---- CUDA ---- */

cudaError_t cudaGetDeviceCount(int *n)
{
    *n = 1;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    (void)device;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device)
{
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device)
{
    (void)device;
    memset(properties, 0, sizeof *properties);
    snprintf(properties->uuid.bytes, sizeof properties->uuid.bytes, "%d", (int)getpid());
    return cudaSuccess;
}

const char *cudaGetErrorString(cudaError_t error)
{
    return error == cudaSuccess ? "no error" : "a pretended error";
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0;
    *greatest = -1;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags)
{
    (void)flags;
    *stream = calloc(1, sizeof **stream);
    if (!*stream || n_streams == MOST_STREAMS)
        return cudaErrorMemoryAllocation;
    streams[n_streams++] = *stream;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority)
{
    (void)priority;
    return cudaStreamCreateWithFlags(stream, flags);
}

/* What is on the stream is done first, as far as the others let it. */
cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    while (stream->first < stream->end)
        progress();
    for (int i = 0; i < n_streams; i++)
        if (streams[i] == stream)
            streams[i--] = streams[--n_streams];
    free(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    progress();
    return stream->first < stream->end ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    (void)flags;
    append(stream, (struct command){.kind = WAIT, .event = event, .record = event->asked});
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    (void)flags;
    *event = calloc(1, sizeof **event);
    return *event ? cudaSuccess : cudaErrorMemoryAllocation;
}

/* Streams may still wait for it: it stays. */
cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    (void)event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    append(stream, (struct command){.kind = RECORD, .event = event, .record = ++event->asked});
    return cudaSuccess;
}

/* A captured stream goes on as it is: what a graph would start at its launch has begun before. */
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    (void)stream;
    return mode == cudaStreamCaptureModeThreadLocal ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    (void)stream;
    *graph = NULL;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *unit, cudaGraph_t graph, unsigned long long flags)
{
    (void)graph;
    (void)flags;
    *unit = NULL;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t unit, cudaStream_t stream)
{
    (void)unit;
    (void)stream;
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t unit)
{
    (void)unit;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    (void)graph;
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void)
{
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    (void)from;
    (void)to;
    *ms = 0.0f;
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    progress();
    return event->done >= event->asked ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaMalloc(void **base, size_t size_bytes)
{
    *base = malloc(size_bytes + 1);
    return *base ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaMallocAsync(void **base, size_t size_bytes, cudaStream_t stream)
{
    (void)stream;
    return cudaMalloc(base, size_bytes);
}

cudaError_t cudaFree(void *base)
{
    free(base);
    return cudaSuccess;
}

cudaError_t cudaFreeAsync(void *base, cudaStream_t stream)
{
    append(stream, (struct command){.kind = FREE, .to = base});
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **base, size_t size_bytes, unsigned flags)
{
    (void)flags;
    return cudaMalloc(base, size_bytes);
}

cudaError_t cudaFreeHost(void *base)
{
    return cudaFree(base);
}

cudaError_t cudaMemset(void *to, int value, size_t size_bytes)
{
    memset(to, value, size_bytes);
    return cudaSuccess;
}

cudaError_t
cudaMemcpyAsync(void *to, const void *from, size_t size_bytes, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    (void)kind;
    append(stream, (struct command){.kind = COPY, .to = to, .from = from, .size_bytes = size_bytes});
    return cudaSuccess;
}

/* ---- NCCL ---- */

ncclResult_t ncclGetVersion(int *version)
{
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    memset(id, 7, sizeof *id);
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result)
{
    return result == ncclSuccess ? "no error" : "a pretended error";
}

const char *ncclGetLastError(ncclComm_t comm)
{
    (void)comm;
    return "";
}

static struct ncclComm *make_comm(int size, int rank, bool blocking)
{
    struct ncclComm *made = calloc(1, sizeof *made);
    if (!made)
        abort();
    made->rank = rank;
    made->size = size;
    made->blocking = blocking;
    made->asks_left = 3;
    int started;
    MPI_Initialized(&started);
    if (started)
        MPI_Comm_dup(MPI_COMM_WORLD, &made->world);
    return made;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank, ncclConfig_t *config)
{
    if (id.internal[0] != 7 || config->blocking != 0)
        return ncclInvalidArgument;
    *comm = make_comm(size, rank, false);
    dice += (uint64_t)rank * 7919;
    return ncclInProgress;
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t *child, ncclConfig_t *config)
{
    if (color != 0 || key != comm->rank || config->blocking != 1 || comm->asks_left > 0)
        return ncclInvalidArgument;
    *child = NULL;
    comm->child = child;
    comm->split = make_comm(comm->size, comm->rank, true);
    comm->split->asks_left = 0;
    comm->asks_left = 3;
    return ncclSuccess; /* as NCCL 2.28 says it, though it has only begun */
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *state)
{
    progress();
    *state = ncclInProgress;
    if (comm->asks_left > 0 && --comm->asks_left > 0)
        return ncclSuccess;
    if (comm->split)
        nccl = *comm->child = comm->split;
    comm->split = NULL;
    *state = ncclSuccess;
    return ncclSuccess;
}

/* What runs ends; the memory stays, because the other thread may still look at it. */
ncclResult_t ncclCommAbort(ncclComm_t comm)
{
    if (comm)
        atomic_store(&comm->aborted, 1);
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t comm)
{
    return comm->blocking ? ncclSuccess : ncclInvalidUsage;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm)
{
    if (comm->world)
        MPI_Comm_free(&comm->world);
    free(comm);
    return ncclSuccess;
}

static int tag_of(int kind, size_t size_bytes)
{
    return kind * MOST_TAG + (int)(size_bytes * 2654435761u % MOST_TAG);
}

static struct group *group_on(cudaStream_t stream)
{
    if (!open_group && !(open_group = calloc(1, sizeof *open_group)))
        abort();
    open_group->stream = stream;
    return open_group;
}

static void add(struct group *group, bool receives, int peer, int kind, void *data, size_t size_bytes)
{
    if (group->n == MOST_MESSAGES || group->values)
        abort();
    group->messages[group->n++] = (struct message){
        .peer = peer, .tag = tag_of(kind, size_bytes), .data = data, .size_bytes = size_bytes, .receives = receives};
}

ncclResult_t ncclGroupStart(void)
{
    group_depth++;
    return ncclSuccess;
}

/* The first collective of a kind; sends and receives were connected by the first exchange. */
static bool connect_all(struct group *group)
{
    int kind = group->n > 0 ? group->messages[0].tag / MOST_TAG : 0, done = 0;
    if (kind == 0 || nccl->connected[kind])
        return true;
    MPI_Request all;
    MPI_Ibarrier(nccl->world, &all);
    while (!done && !atomic_load(&nccl->aborted)) {
        progress();
        MPI_Test(&all, &done, MPI_STATUS_IGNORE);
    }
    nccl->connected[kind] = true;
    return done;
}

ncclResult_t ncclGroupEnd(void)
{
    if (--group_depth > 0 || !open_group)
        return ncclSuccess;
    struct group *group = open_group;
    open_group = NULL;
    if (!connect_all(group)) {
        free(group);
        return ncclSystemError;
    }
    append(group->stream, (struct command){.kind = GROUP, .group = group});
    return ncclSuccess;
}

ncclResult_t ncclSend(const void *data, size_t n, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream)
{
    (void)comm;
    (void)type;
    ncclGroupStart();
    add(group_on(stream), false, peer, 0, (void *)data, n);
    return ncclGroupEnd();
}

ncclResult_t ncclRecv(void *data, size_t n, ncclDataType_t type, int peer, ncclComm_t comm, cudaStream_t stream)
{
    (void)comm;
    (void)type;
    ncclGroupStart();
    add(group_on(stream), true, peer, 0, data, n);
    return ncclGroupEnd();
}

ncclResult_t
ncclAllGather(const void *data, void *received, size_t n, ncclDataType_t type, ncclComm_t comm, cudaStream_t stream)
{
    (void)type;
    char *mine = (char *)received + (size_t)comm->rank * n;
    ncclGroupStart();
    if (mine != data)
        append(stream, (struct command){.kind = COPY, .to = mine, .from = data, .size_bytes = n});
    struct group *group = group_on(stream);
    for (int r = 0; r < comm->size; r++) {
        if (r == comm->rank)
            continue;
        add(group, false, r, 1, (void *)data, n);
        add(group, true, r, 1, (char *)received + (size_t)r * n, n);
    }
    return ncclGroupEnd();
}

ncclResult_t ncclBroadcast(
    const void *data, void *received, size_t n, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream)
{
    (void)type;
    ncclGroupStart();
    struct group *group = group_on(stream);
    for (int r = 0; comm->rank == root && r < comm->size; r++)
        if (r != root)
            add(group, false, r, 2, (void *)data, n);
    if (comm->rank != root)
        add(group, true, root, 2, received, n);
    return ncclGroupEnd();
}

ncclResult_t ncclAllReduce(const void *data,
                           void *received,
                           size_t n,
                           ncclDataType_t type,
                           ncclRedOp_t operation,
                           ncclComm_t comm,
                           cudaStream_t stream)
{
    size_t size_bytes = n * (type == ncclInt64 ? 8 : 4);
    if (data != received || (operation == ncclSum) != (type == ncclInt64))
        return ncclInvalidArgument;
    ncclGroupStart();
    struct group *group = group_on(stream);
    char *scratch = malloc(size_bytes * (size_t)comm->size);
    for (int r = 0; r < comm->size; r++) {
        if (r == comm->rank)
            continue;
        add(group, false, r, 3, scratch + (size_t)comm->rank * size_bytes, size_bytes);
        add(group, true, r, 3, scratch + (size_t)r * size_bytes, size_bytes);
    }
    group->values = received;
    group->scratch = scratch;
    group->size_bytes = size_bytes;
    group->type = type;
    return ncclGroupEnd();
}
