/* Shared by the files of full attention: attention_ring.c (rows of KV go round), attention_loan.c (a full wave's last
 * row is shared by pairs), attention_spread.c (the queries of a wave that is not full are divided anew).
 *
 * Who folds a query's keys is a matter of time alone: the order of the keys does not change, so the bits do not. */
#ifndef LR_WORKER_LAYERS_ATTENTION_RING_H
#define LR_WORKER_LAYERS_ATTENTION_RING_H

#include "worker/layers/attention_impl.h"

#include <stdbool.h>

/* A gathered row: keys [first, end), and room for the list of some of them. */
struct lr_kv_row {
    const char *buffer;
    int64_t first, end;
    bool is_first, is_last; /* of the wave's */
    struct lr_kv_ref *refs;
};

/* Folds keys [from, to) of the row into what `args` says. `from` is the start of a block. */
void lr_row_fold(
    const struct lr_step *step, const struct lr_kv_row *row, int64_t from, int64_t to, struct lr_attention_args *args);

/* The arguments of rows [first, first + n) of the segment. */
struct lr_attention_args
lr_some_rows(const struct lr_step *step, const struct lr_attention_args *args, int64_t first, int64_t n);

/* Bytes of n queries as they stand in the projection, gates and all, and of n attended rows. */
size_t lr_query_bytes(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int64_t n);
size_t lr_attended_bytes(const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int64_t n);

/* Copies queries [first, first + n) of the segment to `to`, one after another. */
void lr_queries_pack(
    const struct lr_step *step, const struct lr_attention_args *args, int64_t first, int64_t n, void *to);

/* ---- a full wave: see attention_loan.c ---- */

struct lr_loan {
    int lender, folder;
    int64_t first, n, segments; /* rows [first, first + n) of the lender's; the folder folds `segments` of the row */
    char *queries, *state;
    size_t queries_bytes, state_bytes;
    struct lr_softmax softmax; /* in `state` */
    bool has_part;             /* false for the worker in the middle */
    size_t *sizes;             /* [2 * n_workers] */
    struct lr_comm_request lent;
};

void lr_loan_take(const struct lr_step *step, struct lr_loan *loan);
/* When all rows but the last are folded. Collective, as is what follows. */
LR_MUST_USE enum lr_status lr_loan_lend(const struct lr_step *step,
                                        struct lr_loan *loan,
                                        const struct lr_attention_args *args,
                                        struct lr_error *err);
/* The last row, of all queries. */
LR_MUST_USE enum lr_status lr_loan_fold(struct lr_step *step,
                                        struct lr_loan *loan,
                                        const struct lr_kv_row *row,
                                        struct lr_attention_args *args,
                                        struct lr_error *err);
struct lr_step_bytes lr_loan_bytes(const struct lr_model_dims *dims,
                                   const struct lr_kernel_ops *ops,
                                   int n_workers,
                                   const struct lr_session_options *options);

/* ---- a wave that is not full: see attention_spread.c ---- */

struct lr_spread {
    int64_t kept; /* of the own rows; those behind them are folded by others */
    int64_t n_borrowed;
    int64_t *lent, *borrowed, *first; /* [n_workers] rows to and from each, and where theirs begin */
    size_t *sizes;                    /* [2 * n_workers] */
    int64_t *positions;               /* [n_borrowed] */
    char *outgoing, *queries;         /* of the lent and of the borrowed rows */
    lr_act *y;                        /* [n_borrowed] */
    struct lr_softmax softmax;        /* [n_borrowed] */
    struct lr_comm_request request;
};

/* Fills kept, n_borrowed, lent, borrowed and first, whose memory is there; the same plan at all. spare, amounts
 * [n_workers]: scratch. */
void lr_spread_plan(
    const struct lr_wave *wave, int n_workers, int rank, double *spare, int64_t *amounts, struct lr_spread *spread);

/* Who folds what, and the queries on their way. Collective, as is `end`. */
LR_MUST_USE enum lr_status lr_spread_begin(struct lr_step *step,
                                           struct lr_spread *spread,
                                           const struct lr_attention_args *args,
                                           struct lr_error *err);
/* One row, of the kept queries and of the borrowed ones. */
LR_MUST_USE enum lr_status lr_spread_fold(struct lr_step *step,
                                          struct lr_spread *spread,
                                          const struct lr_kv_row *row,
                                          const struct lr_attention_args *args,
                                          struct lr_error *err);
/* The borrowed rows go home, and the lent ones come back into args->y. */
LR_MUST_USE enum lr_status lr_spread_end(struct lr_step *step,
                                         struct lr_spread *spread,
                                         const struct lr_attention_args *args,
                                         struct lr_error *err);
struct lr_step_bytes lr_spread_bytes(const struct lr_model_dims *dims,
                                     const struct lr_kernel_ops *ops,
                                     int n_workers,
                                     const struct lr_session_options *options);

#endif
