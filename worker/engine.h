/* The engine: one loaded model on one worker of a world, with everything a step needs.
 *
 * An engine outlives its sessions. All functions that take an engine or a session are collective:
 * every worker of the world calls them in the same order with the same arguments. One thread. */
#ifndef LR_WORKER_ENGINE_H
#define LR_WORKER_ENGINE_H

#include "base/pool.h"
#include "comm/comm.h"
#include "worker/model.h"

enum lr_experts_placement { LR_EXPERTS_AUTO, LR_EXPERTS_SHARDED, LR_EXPERTS_REPLICATED };

enum lr_device { LR_DEVICE_AUTO, LR_DEVICE_CPU, LR_DEVICE_CUDA };
/* Of activations, weights, keys and values on a device; AUTO: float16. The CPU computes in float32. */
enum lr_act_choice { LR_ACT_CHOICE_AUTO, LR_ACT_CHOICE_BF16, LR_ACT_CHOICE_F16 };
enum lr_transport { LR_TRANSPORT_AUTO, LR_TRANSPORT_NCCL, LR_TRANSPORT_MPI };

struct lr_engine_options {
    const char *model_dir;
    enum lr_device device; /* AUTO: CUDA where every worker has a device, else the CPU */
    enum lr_transport transport; /* of tensors between devices; AUTO: NCCL where it can be had, else staged MPI */
    enum lr_act_choice act;
    enum lr_isa isa;
    int n_threads; /* of this worker, >= 1 */
    int spin_us;   /* see lr_pool_create */
    enum lr_experts_placement experts;
};

struct lr_engine {
    const struct lr_kernel_ops *ops;
    struct lr_comm *comm;  /* host memory: sizes, counts, agreement, token ids */
    struct lr_comm *links; /* backend memory: every tensor; the same communicator where that is the host's */
    struct lr_comm device_links;
    char device_name[96]; /* "" on the CPU */
    struct lr_pool *pool;
    struct lr_exec exec;
    struct lr_model model;
    int experts_replicated;
    int workers_on_device;     /* that share this one's memory, itself included: a device's, or the host's */
    int64_t local_expert_rows; /* that this worker's experts have computed */
};

/* Loads the model. On failure nothing is left allocated; every worker gets a failure if one has it.
 */
LR_MUST_USE enum lr_status lr_engine_open(const struct lr_engine_options *options,
                                          struct lr_comm *comm,
                                          struct lr_engine *engine,
                                          struct lr_error *err);
void lr_engine_close(struct lr_engine *engine);

/* Collective agreement on an error: if any worker brings a status other than LR_OK, all return the
 * lowest rank's failure with its text. `mine` may have failed before; `err` holds its text. */
LR_MUST_USE enum lr_status lr_agree(struct lr_comm *comm, enum lr_status mine, struct lr_error *err);

#endif
