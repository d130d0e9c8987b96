/* What nccl.c and nccl_open.c share: the only files, with nccl_watch.c, that see NCCL and the CUDA runtime. Private to
 * comm/. */
#ifndef LR_COMM_NCCL_LINKS_H
#define LR_COMM_NCCL_LINKS_H

#include "comm/nccl_watch.h"
#include "comm/trail.h"

#include <cuda_runtime_api.h>
#include <nccl.h>

enum { LR_NCCL_STARTED = 8, LR_NCCL_RUNNING = 256 };

/* A step that may still run on the device, in the order of launching. */
struct running {
    struct lr_comm_step step;
    cudaEvent_t ready, done;
    int64_t ready_ns; /* when its data was first seen to be ready; 0: not yet */
};

/* Where the kernels' stream waits for a step: the time between the two events is time in which nothing was computed. */
struct standing {
    cudaEvent_t reached, passed;
};

/* A started step that was not waited for. `step` comes first: lr_comm_request holds a pointer to it. */
struct started {
    struct lr_comm_step step;
    cudaEvent_t done;
    bool used;
};

struct device_links {
    struct lr_links links;
    ncclComm_t starter; /* what `nccl` was split off; until all have started */
    ncclComm_t nccl;    /* launches before its calls return; NULL: aborted */
    struct lr_nccl_watch *watch;
    cudaStream_t kernels, own;
    struct running running[LR_NCCL_RUNNING]; /* a ring: n_running from `oldest` on */
    int oldest, n_running;
    struct standing standing[LR_NCCL_RUNNING]; /* another: n_standing from `first_standing` on */
    int first_standing, n_standing;
    struct started started[LR_NCCL_STARTED];
    struct running *unit;          /* the entry of the ring for the unit that is being captured; NULL: none */
    cudaEvent_t edge_in, edge_out; /* of captured steps, from the kernels' stream to the own one and back */
    struct lr_trail *trail;
    size_t *sends, *receives; /* [size] scratch */
};

extern const struct lr_comm_ops lr_nccl_ops;

enum lr_status lr_nccl_cuda_failed(cudaError_t error, const char *what, struct lr_error *err);
enum lr_status lr_nccl_failed(ncclComm_t nccl, ncclResult_t result, const char *what, struct lr_error *err);

/* A short rest of a loop that asks; more of a rest the longer it has asked. */
void lr_nccl_rest(const struct lr_comm *host, int64_t tests);

/* One group: sends[r] bytes from `data` to each worker r, packed, or all from its start where `same`; receives[r] bytes
 * from each, packed. The own part of both is passed over. */
ncclResult_t lr_nccl_exchange(
    struct lr_comm *comm, const char *data, bool same, const size_t *sends, char *received, const size_t *receives);

/* Aborts the communicator, if it is not yet. */
void lr_nccl_give_up(struct lr_comm *comm);

void lr_nccl_free(struct device_links *device);

#endif
