/* The chunked recurrence on CUDA: linear attention with a state S [dk, dv] a value head, activations with float32 states.
 *
 *   LR_RECURRENCE_DECAY   S <- exp(g_t) S;  S <- S + k_t v_t^T;                          o_t = scale S^T q_t
 *   LR_RECURRENCE_DELTA   S <- exp(g_t) S;  S <- S + k_t (beta_t (v_t - S^T k_t))^T;     o_t = scale S^T q_t
 *
 * g NULL means no decay: plain linear attention and the plain delta rule. (RetNet, Lightning, Mamba-2 and simple GLA
 * are LR_RECURRENCE_DECAY; Yang et al. 2024, Gated Delta Networks, is LR_RECURRENCE_DELTA.)
 *
 *   chunks of 64 tokens            inside: triangular products on the tensor cores
 *   sub-segments of LR_CUDA(recurrence_sub_tokens), counted from the sequence's first row: each gives (M, B)
 *   S_in -> sub-segment -> sub-segment -> ...    S' = M S + B in float32, in order; delta rule: whole groups of them
 *                                                 before a sub-segment's own as one pair each
 *
 * So a result's bits depend on its sequence and position, not on what else the launch holds. Three steps:
 *   prepare   (M, B) of every sub-segment and group, into work
 *   summary   folds them into the (M, B) of each sequence: what sequence parallelism exchanges
 *   output    folds s_in through them and writes o and the final state
 *
 * Host threads: any, one stream an args->work at a time. Nothing blocks and nothing is allocated. Every launcher
 * returns the CUDA error of its launches as an int, 0 on success; after a failure the outputs are undefined. */
#ifndef LR_KERNELS_CUDA_RECURRENCE_H
#define LR_KERNELS_CUDA_RECURRENCE_H

#include "kernels/cuda/act.h"
#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

enum lr_recurrence_rule { LR_RECURRENCE_DECAY, LR_RECURRENCE_DELTA };

enum { LR_RECURRENCE_CHUNK_TOKENS = 64, LR_RECURRENCE_MAX_DIM = 256 };

struct lr_recurrence_args {
    enum lr_recurrence_rule rule;
    struct lr_delta_shape shape; /* dk and dv up to LR_RECURRENCE_MAX_DIM; fast where both are 64 or both 128 */
    const lr_act *q; /* [n_rows, n_k_heads * dk], row stride q_stride; fast where rows are 16-byte aligned */
    const lr_act *k;
    const lr_act *v; /* [n_rows, n_v_heads * dv] */
    int64_t q_stride, k_stride, v_stride;
    const float *g;    /* [n_rows, n_v_heads] <= 0, or NULL: no decay */
    const float *beta; /* [n_rows, n_v_heads]; LR_RECURRENCE_DELTA only */
    float scale;
    int64_t n_rows;
    const int64_t
        *offsets; /* [n_sequences + 1] ascending from 0 to n_rows, device memory; NULL where n_sequences is 1 */
    int64_t n_sequences;
    int hopper; /* 1: the kernels of sm_90a, 0: those of every device since sm_80; the same for a work's three steps */
    void *work; /* LR_CUDA(recurrence_work_bytes), 256-byte aligned device memory: prepare writes it, the other two read it */
};

/* Tokens of a sub-segment: a function of the head counts and dims alone, so that a result's bits are. */
int LR_CUDA(recurrence_sub_tokens)(struct lr_delta_shape shape);

/* Bytes of args->work. */
size_t LR_CUDA(recurrence_work_bytes)(enum lr_recurrence_rule rule,
                                struct lr_delta_shape shape,
                                int64_t n_rows,
                                int64_t n_sequences);

int LR_CUDA(recurrence_prepare)(void *stream, const struct lr_recurrence_args *args);

/* b [n_sequences, n_v_heads, dk, dv]. m, for the delta rule [n_sequences, n_v_heads, dk, dk], otherwise a factor
 * [n_sequences, n_v_heads]: S_out = M S_in + B. After prepare. */
int LR_CUDA(recurrence_summary)(void *stream, const struct lr_recurrence_args *args, float *m, float *b);

/* o [n_rows, n_v_heads * dv], row stride o_stride. s_in [n_sequences, n_v_heads, dk, dv] or NULL
 * (zero), s_out the same or NULL (not wanted); s_out is not s_in. After prepare. */
int LR_CUDA(recurrence_output)(
    void *stream, const struct lr_recurrence_args *args, const float *s_in, lr_act *o, int64_t o_stride, float *s_out);

/* S_out = M S_in + B for every head, float32: the delta_fold of the operations table. */
int LR_CUDA(recurrence_fold)(void *stream, const struct lr_delta_fold_args *args);

/* One token of each of many sequences: the delta_step of the operations table. states is device memory. */
int LR_CUDA(recurrence_step)(void *stream, const struct lr_delta_step_args *args);

#ifdef __cplusplus
}
#endif

#endif
