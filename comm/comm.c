/* The front of every communicator: arguments are checked here, and what failed is remembered. */
#include "comm/comm.h"
#include "comm/ops.h"

#include <stdio.h>
#include <string.h>

const char *lr_comm_kind_text(enum lr_comm_kind kind)
{
    static const char *const texts[] = {
#define X(code, text) [code] = text,
        LR_COMM_KIND_MAP(X)
#undef X
    };
    if ((size_t)kind >= sizeof texts / sizeof texts[0])
        return "unknown step";
    return texts[kind];
}

void lr_comm_step_set(struct lr_comm_step *step, enum lr_comm_kind kind, const char *label)
{
    step->kind = kind;
    memset(step->label, 0, sizeof step->label);
    snprintf(step->label, sizeof step->label, "%s", label);
}

const char *lr_comm_transport(const struct lr_comm *comm)
{
    return comm->ops->name;
}

static enum lr_status enter(struct lr_comm *comm, const char *label, struct lr_error *err)
{
    if (comm->failed != LR_OK)
        return lr_fail(err, comm->failed, "'%s' cannot be entered: an earlier step failed", label);
    comm->stats.n_collectives++;
    return LR_OK;
}

/* Whatever a collective gives goes through here. A refusal leaves the world as it was. */
static enum lr_status leave(struct lr_comm *comm, enum lr_status status)
{
    if (status != LR_OK && status != LR_FULL && status != LR_INVALID && comm->failed == LR_OK)
        comm->failed = status;
    return status;
}

static enum lr_status
check_sizes(const struct lr_comm *comm, const char *label, const size_t *sizes, const void *data, struct lr_error *err)
{
    size_t total = 0;
    for (int r = 0; r < comm->size; r++)
        if (__builtin_add_overflow(total, sizes[r], &total))
            return lr_fail(err, LR_INVALID, "the sizes of '%s' are more than memory can hold", label);
    if (total > 0 && !data)
        return lr_fail(err, LR_INVALID, "'%s' has %zu bytes but no buffer", label, total);
    return LR_OK;
}

static enum lr_status check_rank(const struct lr_comm *comm, const char *label, int rank, struct lr_error *err)
{
    if (rank < 0 || rank >= comm->size)
        return lr_fail(err, LR_INVALID, "'%s' names worker %d of a world of %d", label, rank, comm->size);
    return LR_OK;
}

enum lr_status lr_comm_barrier(struct lr_comm *comm, const char *label, struct lr_error *err)
{
    LR_TRY(enter(comm, label, err));
    return leave(comm, comm->ops->barrier(comm, label, err));
}

enum lr_status lr_comm_broadcast(
    struct lr_comm *comm, const char *label, int root, void *data, size_t size_bytes, struct lr_error *err)
{
    LR_TRY(enter(comm, label, err));
    LR_TRY(check_rank(comm, label, root, err));
    return leave(comm, comm->ops->broadcast(comm, label, root, data, size_bytes, err));
}

enum lr_status lr_comm_all_gather(
    struct lr_comm *comm, const char *label, const void *data, size_t size_bytes, void *received, struct lr_error *err)
{
    LR_TRY(enter(comm, label, err));
    if (size_bytes > SIZE_MAX / LR_COMM_MAX_WORKERS)
        return lr_fail(err, LR_INVALID, "the sizes of '%s' are more than memory can hold", label);
    struct lr_comm_request request = {0};
    LR_TRY(leave(comm, comm->ops->all_gather(comm, label, data, NULL, size_bytes, received, &request, err)));
    return lr_comm_wait(comm, &request, err);
}

enum lr_status lr_comm_all_gather_v_start(struct lr_comm *comm,
                                          const char *label,
                                          const void *data,
                                          const size_t *sizes,
                                          void *received,
                                          struct lr_comm_request *request,
                                          struct lr_error *err)
{
    if (request->pending)
        return lr_fail(err, LR_INVALID, "the request of '%s' is still in flight", label);
    LR_TRY(enter(comm, label, err));
    LR_TRY(check_sizes(comm, label, sizes, received, err));
    return leave(comm, comm->ops->all_gather(comm, label, data, sizes, 0, received, request, err));
}

enum lr_status lr_comm_all_gather_v(struct lr_comm *comm,
                                    const char *label,
                                    const void *data,
                                    const size_t *sizes,
                                    void *received,
                                    struct lr_error *err)
{
    struct lr_comm_request request = {0};
    LR_TRY(lr_comm_all_gather_v_start(comm, label, data, sizes, received, &request, err));
    return lr_comm_wait(comm, &request, err);
}

enum lr_status lr_comm_all_to_all_v_start(struct lr_comm *comm,
                                          const char *label,
                                          const void *data,
                                          const size_t *send_sizes,
                                          void *received,
                                          const size_t *recv_sizes,
                                          struct lr_comm_request *request,
                                          struct lr_error *err)
{
    if (request->pending)
        return lr_fail(err, LR_INVALID, "the request of '%s' is still in flight", label);
    LR_TRY(enter(comm, label, err));
    LR_TRY(check_sizes(comm, label, send_sizes, data, err));
    LR_TRY(check_sizes(comm, label, recv_sizes, received, err));
    if (send_sizes[comm->rank] != recv_sizes[comm->rank])
        return lr_fail(err, LR_INVALID, "worker %d sends itself %zu bytes and expects %zu at '%s'", comm->rank,
                       send_sizes[comm->rank], recv_sizes[comm->rank], label);
    return leave(comm, comm->ops->all_to_all(comm, label, data, send_sizes, received, recv_sizes, request, err));
}

enum lr_status lr_comm_all_to_all_v(struct lr_comm *comm,
                                    const char *label,
                                    const void *data,
                                    const size_t *send_sizes,
                                    void *received,
                                    const size_t *recv_sizes,
                                    struct lr_error *err)
{
    struct lr_comm_request request = {0};
    LR_TRY(lr_comm_all_to_all_v_start(comm, label, data, send_sizes, received, recv_sizes, &request, err));
    return lr_comm_wait(comm, &request, err);
}

enum lr_status lr_comm_exchange_sizes(
    struct lr_comm *comm, const char *label, const size_t *send_sizes, size_t *recv_sizes, struct lr_error *err)
{
    LR_TRY(enter(comm, label, err));
    return leave(comm, comm->ops->exchange_sizes(comm, label, send_sizes, recv_sizes, err));
}

static enum lr_status reduce(struct lr_comm *comm,
                             enum lr_comm_kind kind,
                             const char *label,
                             void *values,
                             size_t n_values,
                             size_t value_bytes,
                             struct lr_error *err)
{
    LR_TRY(enter(comm, label, err));
    if (n_values > SIZE_MAX / value_bytes)
        return lr_fail(err, LR_INVALID, "'%s' has more values than memory can hold", label);
    return leave(comm, comm->ops->reduce(comm, kind, label, values, n_values, err));
}

enum lr_status
lr_comm_max_f32(struct lr_comm *comm, const char *label, float *values, size_t n_values, struct lr_error *err)
{
    return reduce(comm, LR_COMM_MAXIMUM, label, values, n_values, sizeof *values, err);
}

enum lr_status
lr_comm_sum_i64(struct lr_comm *comm, const char *label, int64_t *values, size_t n_values, struct lr_error *err)
{
    return reduce(comm, LR_COMM_SUM, label, values, n_values, sizeof *values, err);
}

enum lr_status lr_comm_pass_start(struct lr_comm *comm,
                                  const char *label,
                                  int from,
                                  const void *data,
                                  int to,
                                  void *received,
                                  size_t size_bytes,
                                  struct lr_comm_request *request,
                                  struct lr_error *err)
{
    if (request->pending)
        return lr_fail(err, LR_INVALID, "the request of '%s' is still in flight", label);
    LR_TRY(enter(comm, label, err));
    LR_TRY(check_rank(comm, label, from, err));
    LR_TRY(check_rank(comm, label, to, err));
    return leave(comm, comm->ops->pass(comm, label, from, data, to, received, size_bytes, request, err));
}

enum lr_status lr_comm_pass(struct lr_comm *comm,
                            const char *label,
                            int from,
                            const void *data,
                            int to,
                            void *received,
                            size_t size_bytes,
                            struct lr_error *err)
{
    struct lr_comm_request request = {0};
    LR_TRY(lr_comm_pass_start(comm, label, from, data, to, received, size_bytes, &request, err));
    return lr_comm_wait(comm, &request, err);
}

enum lr_status lr_comm_wait(struct lr_comm *comm, struct lr_comm_request *request, struct lr_error *err)
{
    struct lr_comm_step *step = request->pending;
    if (!step)
        return LR_OK;
    if (comm->failed != LR_OK)
        return lr_fail(err, comm->failed, "'%s' cannot end: an earlier step failed", step->label);
    LR_TRY(leave(comm, comm->ops->wait(comm, step, err)));
    request->pending = NULL;
    return LR_OK;
}

void lr_comm_poll(struct lr_comm *comm)
{
    if (comm->failed == LR_OK)
        comm->ops->poll(comm);
}

enum lr_status lr_comm_check(struct lr_comm *comm, struct lr_error *err)
{
    if (comm->failed != LR_OK)
        return lr_fail(err, comm->failed, "an earlier step failed");
    return leave(comm, comm->ops->check(comm, err));
}

size_t lr_comm_describe_loss(const struct lr_comm *comm, char *text, size_t text_bytes)
{
    return comm->ops->describe_loss(comm, text, text_bytes);
}

int lr_comm_speaks(const struct lr_comm *comm)
{
    return comm->ops->speaks(comm);
}

void lr_comm_close(struct lr_comm *comm)
{
    comm->ops->close(comm);
}

_Noreturn void lr_comm_abort(struct lr_comm *comm, int exit_code)
{
    comm->ops->abort(comm, exit_code);
    __builtin_unreachable();
}
