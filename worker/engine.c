#include "worker/engine.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

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

/* How many workers share this host, this one included. */
static enum lr_status count_host_workers(struct lr_comm *comm, int *count, struct lr_error *err)
{
    enum { HOST_BYTES = 64 };
    char mine[HOST_BYTES] = {0};
    gethostname(mine, sizeof mine - 1);
    char *all = calloc((size_t)comm->size, HOST_BYTES);
    if (!all)
        return lr_fail(err, LR_NO_MEMORY, "no memory for %d host names", comm->size);
    enum lr_status status = lr_comm_all_gather(comm, "host names", mine, HOST_BYTES, all, err);
    if (status == LR_OK) {
        *count = 0;
        for (int r = 0; r < comm->size; r++)
            *count += memcmp(all + r * HOST_BYTES, mine, HOST_BYTES) == 0;
    }
    free(all);
    return status;
}

static enum lr_status
choose_placement(const struct lr_engine_options *options, struct lr_engine *engine, struct lr_error *err)
{
    struct lr_model_dims dims;
    size_t replicated_bytes;
    LR_TRY(lr_model_peek(options->model_dir, engine->ops, engine->comm->size, 1, &dims, &replicated_bytes, err));
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

static enum lr_status
open_local(const struct lr_engine_options *options, struct lr_engine *engine, struct lr_error *err)
{
    LR_TRY(lr_kernels_cpu(options->isa, &engine->ops, err));
    LR_TRY(choose_placement(options, engine, err));
    LR_TRY(lr_pool_create(options->n_threads, options->spin_us, &engine->pool, err));
    engine->exec.pool = engine->pool;
    engine->expert_rows = calloc((size_t)engine->comm->size, sizeof *engine->expert_rows);
    if (!engine->expert_rows)
        return lr_fail(err, LR_NO_MEMORY, "no memory for an engine");
    return lr_model_load(options->model_dir, engine->ops, engine->comm->rank, engine->comm->size,
                         engine->experts_replicated, &engine->model, err);
}

enum lr_status lr_engine_open(const struct lr_engine_options *options,
                              struct lr_comm *comm,
                              struct lr_engine *engine,
                              struct lr_error *err)
{
    *engine = (struct lr_engine){.comm = comm, .workers_on_host = 1};
    enum lr_status status = open_local(options, engine, err);
    status = lr_agree(comm, status, err);
    if (status == LR_OK)
        status = count_host_workers(comm, &engine->workers_on_host, err);
    if (status != LR_OK)
        lr_engine_close(engine);
    return status;
}

void lr_engine_close(struct lr_engine *engine)
{
    lr_model_unload(&engine->model);
    lr_pool_destroy(engine->pool);
    free(engine->expert_rows);
    *engine = (struct lr_engine){0};
}
