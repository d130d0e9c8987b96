/* One opened device: its stream, the ring through which host arrays go up, scratch memory, the first error.
 *
 *   ring   | part 0 | part 1 | part 2 | part 3 |      pinned and device memory, the same offsets
 *                        ^ filling
 *
 * An array lies in one part. Entering a part records an event; before part p is written again, everything launched
 * before part p - 1 was entered must be done. So a slot may upload up to two parts' worth (32 MiB) before it launches
 * the readers, and the host runs ahead of the device by up to a part. */
#include "kernels/cuda/backend.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/device.h"

#include <cuda_runtime.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

namespace
{

constexpr int N_PARTS = 4;
constexpr size_t PART_BYTES = LR_CUDA_RING_BYTES / N_PARTS;
constexpr size_t ALIGNMENT = 256;
constexpr int64_t SPIN_NS = 2000000; /* a wait polls without pause for so long, then dozes between looks */
constexpr int64_t DOZE_NS = 50000;

struct backend {
    int device, n_multiprocessors, block_shared_bytes;
    int hopper_kernels; /* or the portable ones */
    char name[256];
    cudaStream_t stream, aside;
    cudaEvent_t marks[LR_MARKS];
    char *pinned, *ring, *landing, *scratch;
    uint32_t *counter;
    char *fetched; /* pinned: of one fetch, until it is taken */
    cudaEvent_t fetch_done;
    cudaEvent_t entered[N_PARTS]; /* recorded when the part was last entered */
    size_t filled;                /* bytes of the current part */
    int part;
    bool collecting;              /* between unit_begin and unit_end: the stream is being captured */
    cudaGraphExec_t unit;         /* the last unit, updated and launched again */
    int error; /* the first since the last report, a cudaError_t */
    const char *slot;
    const char *last_slot;
    enum lr_status stopped; /* what `idle` said in a wait that could not say so itself */
    struct lr_error stopped_why;
    lr_cuda_idle *idle;
    void *idle_context;
};

struct backend *of(const struct lr_exec *exec)
{
    return static_cast<struct backend *>(exec->backend);
}

int64_t now_ns()
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<int64_t>(t.tv_sec) * 1000000000 + t.tv_nsec;
}

/* Waits until `query` no longer says "not ready", giving `idle` its turn. Returns the device's error. */
template <class Query>
cudaError_t poll(struct backend *b, Query query, enum lr_status *idle_status, struct lr_error *err)
{
    const int64_t start = now_ns();
    for (;;) {
        const cudaError_t state = query();
        if (state != cudaErrorNotReady)
            return state;
        (void)cudaGetLastError(); /* "not ready" is kept as an error otherwise */
        if (b->idle != nullptr && (*idle_status = b->idle(b->idle_context, err)) != LR_OK)
            return cudaSuccess;
        if (now_ns() - start > SPIN_NS) {
            const struct timespec doze = {0, DOZE_NS};
            nanosleep(&doze, nullptr);
        } else {
            sched_yield();
        }
    }
}

void enter_part(const struct lr_exec *exec, int part)
{
    struct backend *b = of(exec);
    const cudaEvent_t readers = b->entered[b->part];
    enum lr_status status = LR_OK;
    lr_cuda_note(exec,
                 poll(
                     b, [readers] { return cudaEventQuery(readers); }, &status, &b->stopped_why),
                 "upload");
    if (status != LR_OK)
        b->stopped = status;
    b->part = part;
    b->filled = 0;
    lr_cuda_note(exec, cudaEventRecord(b->entered[part], b->stream), "upload");
}

enum lr_status fail(struct lr_error *err, cudaError_t error, int device, const char *what)
{
    (void)cudaGetLastError();
    return lr_fail(err, error == cudaErrorMemoryAllocation ? LR_NO_MEMORY : LR_INTERNAL, "GPU %d: cannot %s: %s",
                   device, what, cudaGetErrorString(error));
}

#define CUDA_TRY(call, what)                                                                                           \
    do {                                                                                                               \
        const cudaError_t cuda_try_error_ = (call);                                                                    \
        if (cuda_try_error_ != cudaSuccess)                                                                            \
            return fail(err, cuda_try_error_, b->device, what);                                                        \
    } while (0)

/* Which kernels the device takes: LR_CUDA_KERNELS or, by default, the fastest that it can run. */
enum lr_status choose_kernels(struct backend *b, const struct cudaDeviceProp &properties, struct lr_error *err)
{
    const int sm = 10 * properties.major + properties.minor;
    const char *wanted = getenv("LR_CUDA_KERNELS");
    if (wanted == nullptr || *wanted == '\0')
        wanted = "auto";
    const bool hopper = strcmp(wanted, "hopper") == 0;
    if (!hopper && strcmp(wanted, "auto") != 0 && strcmp(wanted, "mma") != 0)
        return lr_fail(err, LR_INVALID, "LR_CUDA_KERNELS is '%s'; it may be auto, hopper or mma", wanted);
    if (sm < 80)
        return lr_fail(err, LR_UNSUPPORTED, "GPU %d (%s) is sm_%d; the CUDA backend needs sm_80 (A100) or later",
                       b->device, properties.name, sm);
    if (hopper && sm != 90)
        return lr_fail(err, LR_UNSUPPORTED, "GPU %d (%s) is sm_%d; LR_CUDA_KERNELS=hopper needs sm_90 (H100, H200)",
                       b->device, properties.name, sm);
    b->hopper_kernels = sm == 90 && strcmp(wanted, "mma") != 0;
    return LR_OK;
}

enum lr_status choose_device(struct backend *b, struct lr_error *err)
{
    const int n_devices = lr_cuda_device_count();
    if (b->device < 0 || b->device >= n_devices)
        return lr_fail(err, LR_INVALID, "no GPU %d: this machine has %d usable ones", b->device, n_devices);
    struct cudaDeviceProp properties;
    CUDA_TRY(cudaGetDeviceProperties(&properties, b->device), "read its properties");
    LR_TRY(choose_kernels(b, properties, err));
    memcpy(b->name, properties.name, sizeof b->name - 1);
    b->n_multiprocessors = properties.multiProcessorCount;
    b->block_shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin);
    CUDA_TRY(cudaSetDevice(b->device), "start it");
    return LR_OK;
}

enum lr_status open_resources(struct backend *b, struct lr_error *err)
{
    CUDA_TRY(cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking), "make a stream");
    CUDA_TRY(cudaStreamCreateWithFlags(&b->aside, cudaStreamNonBlocking), "make a stream");
    for (int i = 0; i < LR_MARKS; i++)
        CUDA_TRY(cudaEventCreateWithFlags(&b->marks[i], cudaEventDisableTiming), "make an event");
    CUDA_TRY(cudaMallocHost(reinterpret_cast<void **>(&b->pinned), LR_CUDA_RING_BYTES), "pin 64 MiB of host memory");
    CUDA_TRY(cudaMallocHost(reinterpret_cast<void **>(&b->landing), LR_CUDA_LANDING_BYTES), "pin 8 MiB of host memory");
    CUDA_TRY(cudaMallocHost(reinterpret_cast<void **>(&b->fetched), LR_FETCH_BYTES), "pin 64 KiB of host memory");
    CUDA_TRY(cudaEventCreateWithFlags(&b->fetch_done, cudaEventDisableTiming), "make an event");
    CUDA_TRY(cudaMalloc(reinterpret_cast<void **>(&b->ring), LR_CUDA_RING_BYTES), "reserve 64 MiB");
    CUDA_TRY(cudaMalloc(reinterpret_cast<void **>(&b->scratch), LR_CUDA_SCRATCH_BYTES), "reserve 64 MiB");
    CUDA_TRY(cudaMalloc(reinterpret_cast<void **>(&b->counter), sizeof *b->counter), "reserve 4 bytes");
    CUDA_TRY(cudaMemsetAsync(b->counter, 0, sizeof *b->counter, b->stream), "clear 4 bytes");
    for (int i = 0; i < N_PARTS; i++)
        CUDA_TRY(cudaEventCreateWithFlags(&b->entered[i], cudaEventDisableTiming), "make an event");
    CUDA_TRY(cudaEventRecord(b->entered[0], b->stream), "record an event");
    return LR_OK;
}

#undef CUDA_TRY

/* Whatever of it was opened. */
void close_resources(struct backend *b)
{
    if (b->unit != nullptr)
        cudaGraphExecDestroy(b->unit);
    for (int i = 0; i < N_PARTS; i++)
        if (b->entered[i] != nullptr)
            cudaEventDestroy(b->entered[i]);
    for (int i = 0; i < LR_MARKS; i++)
        if (b->marks[i] != nullptr)
            cudaEventDestroy(b->marks[i]);
    cudaFree(b->scratch);
    cudaFree(b->counter);
    cudaFree(b->ring);
    cudaFreeHost(b->landing);
    cudaFreeHost(b->fetched);
    if (b->fetch_done != nullptr)
        cudaEventDestroy(b->fetch_done);
    cudaFreeHost(b->pinned);
    if (b->aside != nullptr)
        cudaStreamDestroy(b->aside);
    if (b->stream != nullptr)
        cudaStreamDestroy(b->stream);
    (void)cudaGetLastError();
    free(b);
}

} // namespace

int lr_cuda_device_count(void)
{
    int n = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess)
        n = 0;
    (void)cudaGetLastError();
    return n;
}

enum lr_status lr_cuda_device_open(int device, struct lr_exec *exec, struct lr_error *err)
{
    struct backend *b = static_cast<struct backend *>(calloc(1, sizeof *b));
    if (b == nullptr)
        return lr_fail(err, LR_NO_MEMORY, "no host memory for the CUDA backend");
    b->device = device;
    b->last_slot = "open";
    enum lr_status status = choose_device(b, err);
    if (status == LR_OK)
        status = open_resources(b, err);
    if (status != LR_OK) {
        close_resources(b);
        return status;
    }
    exec->backend = b;
    exec->stream = b->stream;
    return LR_OK;
}

void lr_cuda_device_close(struct lr_exec *exec)
{
    if (exec->backend == nullptr)
        return;
    (void)cudaStreamSynchronize(of(exec)->stream);
    (void)cudaStreamSynchronize(of(exec)->aside);
    close_resources(of(exec));
    exec->backend = nullptr;
    exec->stream = nullptr;
}

const char *lr_cuda_device_name(const struct lr_exec *exec)
{
    return of(exec)->name;
}

void lr_cuda_set_idle(struct lr_exec *exec, lr_cuda_idle *idle, void *context)
{
    of(exec)->idle = idle;
    of(exec)->idle_context = context;
}

struct lr_cuda_space lr_cuda_ring_take(const struct lr_exec *exec, size_t size_bytes)
{
    struct backend *b = of(exec);
    const size_t taken = (size_bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (b->filled + taken > PART_BYTES) {
        if (b->collecting) { /* a promise was broken; what follows goes nowhere */
            lr_cuda_note(exec, cudaErrorStreamCaptureUnsupported, "unit");
            b->filled = 0;
        } else {
            enter_part(exec, (b->part + 1) % N_PARTS);
        }
    }
    const size_t at = static_cast<size_t>(b->part) * PART_BYTES + b->filled;
    b->filled += taken;
    return {b->pinned + at, b->ring + at};
}

/* Events of the ring cannot be asked while the stream is captured: the unit gets a part with room enough. */
void lr_cuda_unit_begin(const struct lr_exec *exec)
{
    struct backend *b = of(exec);
    if (PART_BYTES - b->filled < LR_UNIT_UPLOAD_BYTES)
        enter_part(exec, (b->part + 1) % N_PARTS);
    const cudaError_t error = cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal);
    lr_cuda_note(exec, error, "unit_begin");
    b->collecting = error == cudaSuccess;
}

/* Makes b->unit the graph's executable: by update where the shapes agree, anew where not. */
static cudaError_t renew_unit(struct backend *b, cudaGraph_t graph)
{
    cudaGraphExecUpdateResultInfo result;
    if (b->unit != nullptr && cudaGraphExecUpdate(b->unit, graph, &result) == cudaSuccess)
        return cudaSuccess;
    (void)cudaGetLastError();
    if (b->unit != nullptr)
        cudaGraphExecDestroy(b->unit);
    b->unit = nullptr;
    return cudaGraphInstantiate(&b->unit, graph, 0);
}

enum lr_status lr_cuda_unit_end(const struct lr_exec *exec, struct lr_error *err)
{
    struct backend *b = of(exec);
    if (b->collecting) {
        cudaGraph_t graph = nullptr;
        cudaError_t error = cudaStreamEndCapture(b->stream, &graph);
        b->collecting = false;
        if (error == cudaSuccess)
            error = renew_unit(b, graph);
        if (error == cudaSuccess)
            error = cudaGraphLaunch(b->unit, b->stream);
        if (graph != nullptr)
            cudaGraphDestroy(graph);
        lr_cuda_note(exec, error, "unit_end");
    }
    return b->error == cudaSuccess ? LR_OK : lr_cuda_drain(exec, err);
}

const void *lr_cuda_upload(const struct lr_exec *exec, const void *host, size_t size_bytes)
{
    if (size_bytes > LR_CUDA_MAX_UPLOAD_BYTES) {
        lr_cuda_note(exec, cudaErrorInvalidValue, "upload");
        return of(exec)->ring;
    }
    const struct lr_cuda_space space = lr_cuda_ring_take(exec, size_bytes);
    if (size_bytes > 0) {
        memcpy(space.pinned, host, size_bytes);
        lr_cuda_note(exec,
                     cudaMemcpyAsync(space.device, space.pinned, size_bytes, cudaMemcpyHostToDevice, of(exec)->stream),
                     "upload");
    }
    return space.device;
}

void *lr_cuda_lane(const struct lr_exec *exec, enum lr_lane lane)
{
    return lane == LR_LANE_ASIDE ? of(exec)->aside : of(exec)->stream;
}

void lr_cuda_mark(const struct lr_exec *exec, enum lr_lane lane, int mark)
{
    const cudaStream_t stream = static_cast<cudaStream_t>(lr_cuda_lane(exec, lane));
    lr_cuda_note(exec, cudaEventRecord(of(exec)->marks[mark], stream), "mark");
}

void lr_cuda_await(const struct lr_exec *exec, enum lr_lane lane, int mark)
{
    const cudaStream_t stream = static_cast<cudaStream_t>(lr_cuda_lane(exec, lane));
    lr_cuda_note(exec, cudaStreamWaitEvent(stream, of(exec)->marks[mark], 0), "await");
}

void *lr_cuda_landing(const struct lr_exec *exec)
{
    return of(exec)->landing;
}

void *lr_cuda_scratch(const struct lr_exec *exec)
{
    return of(exec)->scratch;
}

uint32_t *lr_cuda_counter(const struct lr_exec *exec)
{
    return of(exec)->counter;
}

int lr_cuda_multiprocessors(const struct lr_exec *exec)
{
    return of(exec)->n_multiprocessors;
}

void lr_cuda_pretend_multiprocessors(struct lr_exec *exec, int n)
{
    of(exec)->n_multiprocessors = n;
}

int lr_cuda_block_shared_bytes(const struct lr_exec *exec)
{
    return of(exec)->block_shared_bytes;
}

int lr_cuda_hopper_kernels(const struct lr_exec *exec)
{
    return of(exec)->hopper_kernels;
}

void lr_cuda_note(const struct lr_exec *exec, int error, const char *slot)
{
    struct backend *b = of(exec);
    b->last_slot = slot;
    if (error != cudaSuccess && b->error == cudaSuccess) {
        b->error = error;
        b->slot = slot;
    }
}

/* What failed since the last report: `status` and err where the wait itself did, else the device's error. */
static enum lr_status report(struct backend *b, enum lr_status status, struct lr_error *err)
{
    const int error = b->error;
    b->error = cudaSuccess;
    b->stopped = LR_OK;
    if (status != LR_OK)
        return status;
    if (error != cudaSuccess)
        return lr_fail(err, LR_INTERNAL, "GPU %d (%s): %s, at or before %s", b->device, b->name,
                       cudaGetErrorString(static_cast<cudaError_t>(error)), b->slot);
    return LR_OK;
}

/* Waits until `query` is no longer "not ready", and reports. */
template <class Query> static enum lr_status wait_and_report(const struct lr_exec *exec, Query query, struct lr_error *err)
{
    struct backend *b = of(exec);
    enum lr_status status = LR_OK;
    if (b->stopped == LR_OK)
        lr_cuda_note(exec, poll(b, query, &status, err), b->last_slot);
    else
        status = lr_fail(err, b->stopped, "%s", b->stopped_why.message);
    return report(b, status, err);
}

enum lr_status lr_cuda_drain(const struct lr_exec *exec, struct lr_error *err)
{
    const cudaStream_t stream = of(exec)->stream;
    return wait_and_report(
        exec, [stream] { return cudaStreamQuery(stream); }, err);
}

void lr_cuda_fetch(const struct lr_exec *exec, const void *from, size_t size_bytes)
{
    struct backend *b = of(exec);
    lr_cuda_note(exec, cudaMemcpyAsync(b->fetched, from, size_bytes, cudaMemcpyDeviceToHost, b->stream), "fetch");
    lr_cuda_note(exec, cudaEventRecord(b->fetch_done, b->stream), "fetch");
}

enum lr_status
lr_cuda_fetched(const struct lr_exec *exec, void *to, const void *from, size_t size_bytes, struct lr_error *err)
{
    (void)from;
    const cudaEvent_t done = of(exec)->fetch_done;
    LR_TRY(wait_and_report(
        exec, [done] { return cudaEventQuery(done); }, err));
    memcpy(to, of(exec)->fetched, size_bytes);
    return LR_OK;
}

void lr_cuda_forget_unit(const struct lr_exec *exec)
{
    struct backend *b = of(exec);
    if (b->unit != nullptr)
        lr_cuda_note(exec, cudaGraphExecDestroy(b->unit), "forget_unit");
    b->unit = nullptr;
}
