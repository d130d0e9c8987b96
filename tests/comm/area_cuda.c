#include "tests/comm/area.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

static cudaStream_t stream;
static struct lr_comm *watched;

static void must(cudaError_t error, const char *what)
{
    if (error == cudaSuccess)
        return;
    fprintf(stderr, "area: %s: %s\n", what, cudaGetErrorString(error));
    exit(1);
}

/* Polls, so that a failed transfer is noticed instead of waited for. */
static enum lr_status wait_for_device(struct lr_error *err)
{
    cudaError_t error;
    while ((error = cudaStreamQuery(stream)) == cudaErrorNotReady)
        if (watched->backend)
            LR_TRY(lr_comm_check(watched, err));
    if (error != cudaSuccess)
        return lr_fail(err, LR_INTERNAL, "the device failed: %s", cudaGetErrorString(error));
    return LR_OK;
}

static void wait_or_end(void)
{
    struct lr_error err;
    if (wait_for_device(&err) == LR_OK)
        return;
    fprintf(stderr, "area: %s\n", err.message);
    exit(1);
}

static void *cuda_take(size_t size_bytes)
{
    void *base;
    must(cudaMallocAsync(&base, size_bytes, stream), "no device memory");
    return base;
}

static void cuda_release(void *base, size_t size_bytes)
{
    (void)size_bytes;
    must(cudaFreeAsync(base, stream), "release");
}

static void cuda_put(void *to, const void *from, size_t size_bytes)
{
    must(cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDefault, stream), "put");
    wait_or_end();
}

static void cuda_get(void *to, const void *from, size_t size_bytes)
{
    wait_or_end();
    must(cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDefault, stream), "get");
    wait_or_end();
}

static void cuda_unit_begin(void)
{
    must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
}

static void cuda_unit_end(void)
{
    cudaGraph_t graph;
    cudaGraphExec_t unit;
    must(cudaStreamEndCapture(stream, &graph), "capture");
    must(cudaGraphInstantiate(&unit, graph, 0), "graph");
    must(cudaGraphLaunch(unit, stream), "graph");
    wait_or_end();
    must(cudaGraphExecDestroy(unit), "graph");
    must(cudaGraphDestroy(graph), "graph");
}

static void cuda_copy(void *context, void *to, const void *from, size_t size_bytes)
{
    (void)context;
    must(cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDefault, stream), "copy");
}

static enum lr_status cuda_download(void *context, void *to, const void *from, size_t size_bytes, struct lr_error *err)
{
    cuda_copy(context, to, from, size_bytes);
    return wait_for_device(err);
}

static enum lr_status cuda_wait(void *context, struct lr_error *err)
{
    (void)context;
    return wait_for_device(err);
}

static void *cuda_pin(void *context, size_t size_bytes)
{
    (void)context;
    void *base;
    return cudaHostAlloc(&base, size_bytes, cudaHostAllocDefault) == cudaSuccess ? base : NULL;
}

static void cuda_unpin(void *context, void *base, size_t size_bytes)
{
    (void)context;
    (void)size_bytes;
    must(cudaFreeHost(base), "unpin");
}

const struct area *area_cuda(int index, struct lr_comm *links)
{
    static struct area area = {
        .name = "cuda",
        .take = cuda_take,
        .release = cuda_release,
        .put = cuda_put,
        .get = cuda_get,
        .unit_begin = cuda_unit_begin,
        .unit_end = cuda_unit_end,
        .links =
            {
                .copy = cuda_copy,
                .upload = cuda_copy,
                .download = cuda_download,
                .wait = cuda_wait,
                .pin = cuda_pin,
                .unpin = cuda_unpin,
            },
    };
    int n_devices = 0;
    if (cudaGetDeviceCount(&n_devices) != cudaSuccess || n_devices == 0)
        return NULL;
    must(cudaSetDevice(index % n_devices), "device");
    must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    watched = links;
    area.links.stream = stream;
    return &area;
}
