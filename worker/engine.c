#include "worker/engine.h"

#include "comm/links.h"
#include "kernels/cuda/cuda.h"

#include <stdio.h>
#include <string.h>

/* auto: experts that together take less than this are held by every worker. */
#define REPLICATE_BELOW_BYTES ((size_t)1 << 30)

struct verdict {
    int32_t status;
    char message[LR_ERROR_TEXT_BYTES];
};

enum lr_status lr_agree(struct lr_comm *comm, enum lr_status mine, struct lr_error *err)
{
    if (comm->size == 1)
        return mine;
    float failed = mine == LR_OK ? 0.0f : (float)(comm->size - comm->rank);
    LR_TRY(lr_comm_max_f32(comm, "agreement", &failed, 1, err));
    if (failed == 0.0f)
        return LR_OK;
    struct verdict verdict = {.status = (int32_t)mine};
    if (mine != LR_OK && err)
        memcpy(verdict.message, err->message, sizeof verdict.message);
    int speaker = comm->size - (int)failed;
    LR_TRY(lr_comm_broadcast(comm, "agreement", speaker, &verdict, sizeof verdict, err));
    return lr_fail(err, (enum lr_status)verdict.status, "%s", verdict.message);
}

/* ---- the device
 * -------------------------------------------------------------------------------------------------------- */

/* AUTO is CUDA where every worker of the world has a device. Collective. */
static enum lr_status
choose_device(const struct lr_engine_options *options, struct lr_comm *comm, enum lr_device *out, struct lr_error *err)
{
    *out = options->device;
    if (options->device != LR_DEVICE_AUTO)
        return LR_OK;
    float missing = lr_cuda_device_count() == 0;
    LR_TRY(lr_comm_max_f32(comm, "devices", &missing, 1, err));
    *out = missing > 0.0f ? LR_DEVICE_CPU : LR_DEVICE_CUDA;
    return LR_OK;
}

/* What the wait for the device asks now and then: whether a transfer has failed or is late. */
static enum lr_status check_links(void *context, struct lr_error *err)
{
    struct lr_engine *engine = context;
    return engine->links ? lr_comm_check(engine->links, err) : LR_OK;
}

static enum lr_status open_backend(const struct lr_engine_options *options,
                                   enum lr_device device,
                                   struct lr_engine *engine,
                                   struct lr_error *err)
{
    struct lr_comm *comm = engine->comm;
    if (device == LR_DEVICE_CPU) {
        if (options->act != LR_ACT_CHOICE_AUTO)
            return lr_fail(err, LR_INVALID, "--act-dtype needs --device cuda: the CPU computes in float32");
        engine->workers_on_device = comm->host_workers > 0 ? comm->host_workers : 1;
        return lr_kernels_cpu(options->isa, &engine->ops, err);
    }
    int n_devices = lr_cuda_device_count(), index = comm->host_index;
    if (n_devices > 0) {
        engine->workers_on_device = (comm->host_workers - index % n_devices + n_devices - 1) / n_devices;
        index %= n_devices;
    }
    if (engine->workers_on_device < 1)
        engine->workers_on_device = 1;
    enum lr_dtype act = options->act == LR_ACT_CHOICE_BF16 ? LR_BF16 : LR_F16;
    LR_TRY(lr_kernels_cuda_open(index, act, &engine->ops, &engine->exec, err));
    lr_cuda_set_idle(&engine->exec, check_links, engine);
    snprintf(engine->device_name, sizeof engine->device_name, "%s", lr_cuda_device_name(&engine->exec));
    return LR_OK;
}

/* ---- links: the backend's memory as comm/ sees it ---- */

static void link_copy(void *context, void *to, const void *from, size_t size_bytes)
{
    const struct lr_engine *engine = context;
    engine->ops->memory.copy(&engine->exec, to, from, size_bytes);
}

static void link_upload(void *context, void *to, const void *from, size_t size_bytes)
{
    const struct lr_engine *engine = context;
    engine->ops->memory.upload(&engine->exec, to, from, size_bytes);
}

static enum lr_status
link_download(void *context, void *to, const void *from, size_t size_bytes, struct lr_error *err)
{
    const struct lr_engine *engine = context;
    return engine->ops->memory.download(&engine->exec, to, from, size_bytes, err);
}

static enum lr_status link_wait(void *context, struct lr_error *err)
{
    const struct lr_engine *engine = context;
    return engine->ops->memory.wait(&engine->exec, err);
}

/* NCCL where it was asked for or can be had; several workers of one device, and a world of one, go through the host.
 * Collective. */
static enum lr_status open_links(const struct lr_engine_options *options, struct lr_engine *engine, struct lr_error *err)
{
    struct lr_comm *comm = engine->comm;
    if (engine->ops->host_memory) {
        if (options->transport == LR_TRANSPORT_NCCL)
            return lr_fail(err, LR_INVALID, "--transport nccl needs --device cuda");
        engine->links = comm;
        return LR_OK;
    }
    struct lr_link_memory memory = {.context = engine,
                                    .stream = engine->exec.stream,
                                    .copy = link_copy,
                                    .upload = link_upload,
                                    .download = link_download,
                                    .wait = link_wait};
    enum lr_status status = LR_UNSUPPORTED;
    if (options->transport == LR_TRANSPORT_NCCL || (options->transport == LR_TRANSPORT_AUTO && comm->size > 1))
        status = lr_links_open_nccl(comm, &memory, &engine->device_links, err);
    if (status == LR_UNSUPPORTED && options->transport != LR_TRANSPORT_NCCL)
        status = lr_links_open_staged(comm, &memory, &engine->device_links, err);
    if (status == LR_OK)
        engine->links = &engine->device_links;
    return status;
}

/* ---- the model
 * --------------------------------------------------------------------------------------------------------- */

/* What the kernels of a device can take; on the CPU everything that a configuration may say. */
static enum lr_status
check_shapes(const struct lr_kernel_ops *ops, const struct lr_model_dims *dims, struct lr_error *err)
{
    enum { MAX_DIM = 256 };
    if (ops->host_memory)
        return LR_OK;
    if (dims->n_attention_layers > 0 && (dims->head_dim > MAX_DIM || dims->head_dim % 8 != 0))
        return lr_fail(err, LR_UNSUPPORTED,
                       "attention heads of %lld: --device cuda takes multiples of 8 up to %d; use --device cpu",
                       (long long)dims->head_dim, MAX_DIM);
    if (dims->n_delta_layers > 0 && (dims->delta.dk > MAX_DIM || dims->delta.dv > MAX_DIM))
        return lr_fail(err, LR_UNSUPPORTED,
                       "delta heads of %lld and %lld: --device cuda takes up to %d; use --device cpu",
                       (long long)dims->delta.dk, (long long)dims->delta.dv, MAX_DIM);
    return LR_OK;
}

static enum lr_status
choose_placement(const struct lr_engine_options *options, struct lr_engine *engine, struct lr_error *err)
{
    struct lr_model_dims dims;
    size_t replicated_bytes;
    LR_TRY(lr_model_peek(options->model_dir, engine->ops, engine->comm->size, 1, &dims, &replicated_bytes, err));
    LR_TRY(check_shapes(engine->ops, &dims, err));
    switch (options->experts) {
    case LR_EXPERTS_SHARDED:
        engine->experts_replicated = 0;
        break;
    case LR_EXPERTS_REPLICATED:
        engine->experts_replicated = 1;
        break;
    case LR_EXPERTS_AUTO:
        engine->experts_replicated = replicated_bytes < REPLICATE_BELOW_BYTES;
        break;
    }
    if (dims.n_experts == 0 || engine->comm->size == 1)
        engine->experts_replicated = 1;
    return LR_OK;
}

static enum lr_status open_local(const struct lr_engine_options *options,
                                 enum lr_device device,
                                 struct lr_engine *engine,
                                 struct lr_error *err)
{
    LR_TRY(open_backend(options, device, engine, err));
    LR_TRY(choose_placement(options, engine, err));
    LR_TRY(lr_pool_create(options->n_threads, options->spin_us, &engine->pool, err));
    engine->exec.pool = engine->pool;
    return lr_model_load(options->model_dir, engine->ops, &engine->exec, engine->comm->rank, engine->comm->size,
                         engine->experts_replicated, &engine->model, err);
}

/* GPUs round as their kernels do: all of a world must have worker 0's. Collective. */
static enum lr_status compare_kernels(struct lr_engine *engine, struct lr_error *err)
{
    char name[32] = "";
    enum lr_status status = LR_OK;
    snprintf(name, sizeof name, "%s", engine->ops->name);
    LR_TRY(lr_comm_broadcast(engine->comm, "kernels", 0, name, sizeof name, err));
    if (!engine->ops->host_memory && strcmp(name, engine->ops->name) != 0)
        status = lr_fail(err, LR_UNSUPPORTED,
                         "worker %d (%s) would compute with the kernels %s, worker 0 with %s, which round differently; "
                         "LR_CUDA_KERNELS=mma gives every GPU the same",
                         engine->comm->rank, engine->device_name, engine->ops->name, name);
    return lr_agree(engine->comm, status, err);
}

enum lr_status lr_engine_open(const struct lr_engine_options *options,
                              struct lr_comm *comm,
                              struct lr_engine *engine,
                              struct lr_error *err)
{
    *engine = (struct lr_engine){.comm = comm, .workers_on_device = 1};
    enum lr_device device;
    enum lr_status status = choose_device(options, comm, &device, err);
    if (status == LR_OK)
        status = open_local(options, device, engine, err);
    status = lr_agree(comm, status, err);
    if (status == LR_OK)
        status = compare_kernels(engine, err);
    if (status == LR_OK)
        status = open_links(options, engine, err);
    if (status != LR_OK)
        lr_engine_close(engine);
    return status;
}

void lr_engine_close(struct lr_engine *engine)
{
    lr_links_close(&engine->device_links);
    lr_model_unload(&engine->model);
    if (engine->exec.backend)
        lr_kernels_cuda_close(&engine->exec);
    lr_pool_destroy(engine->pool);
    *engine = (struct lr_engine){0};
}
