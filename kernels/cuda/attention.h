/* Softmax attention over KV blocks on CUDA: bf16 keys and values, float32 running softmax.
 *
 * The block layout is what wgmma reads, so that a block comes into shared memory by one bulk copy a half, from any
 * address, without a tensor map. Per KV head:
 *
 *   K: head_dim / 64 panels of [128 tokens][64 channels]  |  V: the same
 *
 * each panel in the 128-byte swizzle of hopper.cuh. A block starts on a multiple of 128 bytes; tokens that do not exist
 * yet are zero.
 *
 * The running softmax lives in log2 units: m2 = m * log2(e), l, o (not divided), so that folding a list in several calls
 * gives the bits of one call. Launchers block on nothing and allocate nothing; they return the CUDA error of the launch
 * as an int, 0 on success. */
#ifndef LR_KERNELS_CUDA_ATTENTION_H
#define LR_KERNELS_CUDA_ATTENTION_H

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of one block: 2 * n_kv_heads * 128 * head_dim * 2. head_dim: 64 or 128. */
size_t lr_cuda_kv_block_bytes(struct lr_kv_shape shape);

/* As the table's kv_store; args->blocks is device memory. */
int lr_cuda_kv_store(void *stream, const struct lr_kv_store_args *args);

struct lr_cuda_attention_args {
    struct lr_kv_shape shape;
    const lr_act *q; /* [n_rows, n_heads, head_dim] bf16, strides in elements, rows 16-byte aligned */
    int64_t q_stride;
    int64_t q_head_stride;
    int64_t n_rows;
    int64_t position; /* of row 0; row r is at position + r */
    float scale;
    int64_t window; /* 0: none */
    int64_t sinks;
    const struct lr_kv_ref *refs; /* device memory; list i is refs[list_first[i] .. list_first[i + 1]) */
    const int64_t *list_first;    /* device memory, [n_lists + 1] */
    int64_t n_lists;              /* 1, or query blocks of 128 rows times KV heads (then position is a multiple of 128) */
    float *m2, *l, *o;            /* running softmax [n_rows, n_heads (, head_dim)]; NULL m2: not kept */
    int resume;                   /* 1: m2, l, o hold an earlier call's result, 0: start empty */
    lr_act *y;                    /* o / l as bf16 [n_rows, n_heads * head_dim], or NULL */
    int64_t y_stride;
    float *lse; /* natural log-sum-exp [n_rows, n_heads] (-inf where nothing was seen), or NULL */
};

int lr_cuda_attention(void *stream, const struct lr_cuda_attention_args *args);

#ifdef __cplusplus
}
#endif

#endif
