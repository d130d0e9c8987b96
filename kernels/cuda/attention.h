/* Softmax attention over KV blocks on CUDA: what its slots share. keys and values of the activation type, float32 running softmax.
 *
 * The block layout is what wgmma reads, so that a block comes into shared memory by bulk copies from any address,
 * without a tensor map. Head dimensions are padded with zeros to 64, 128 or 256 channels. Per KV head:
 *
 *   K: padded / 64 panels of [128 tokens][64 channels]  |  V: the same
 *
 * each panel in the 128-byte swizzle of mma.cuh. A block starts on a multiple of 128 bytes; tokens that do not exist
 * yet are zero.
 *
 * The running softmax is in log2 units: l = sum_j exp2(s_j log2(e) - m), o likewise, with a reference m that trails the
 * largest score seen by at most 8, so that o is hardly ever rescaled. It is a function of the row's list alone. */
#ifndef LR_KERNELS_CUDA_ATTENTION_H
#define LR_KERNELS_CUDA_ATTENTION_H

#include "kernels/cuda/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A list in device memory. */
struct lr_cuda_list {
    uint64_t refs; /* address of its struct lr_kv_ref, or their offset in the packet */
    int32_t n_refs;
    int16_t dense; /* 1: positions grow by 128 and no block is `whole`: the window's start can be computed */
    int16_t relative;
};

/* Rows that read the same lists. One for a whole call, one for each query block, or one for each item of partials. */
struct lr_cuda_rows {
    int64_t slot;       /* of the outputs */
    int64_t first, end; /* rows [first, end) exist */
    int64_t origin;     /* row of the first tile's first token; <= first, so that tiles lie on a grid */
    int64_t first_position, last_position; /* bounds of the rows' positions */
    int32_t list, list_step;               /* KV head h reads list + h * list_step */
};

/* One launch: every group of rows, every KV head. The query heads of a KV head are packed into the tile's rows,
 *
 *   tile row i = token i / group, head i mod group of the KV head's
 *
 * so that a block of K and V is read once for the group. */
struct lr_cuda_fold {
    struct lr_kv_shape shape;
    const lr_act *q; /* every row and head on a multiple of 16 bytes */
    int64_t q_stride, q_head_stride;
    int64_t n_rows;           /* of q and of an output slot */
    const int64_t *positions; /* device memory; NULL: row r is at `position` + r */
    int64_t position;
    float scale;
    int64_t window, sinks;
    int half_blocks;    /* lists may name halves of blocks */
    const void *packet; /* device memory, as all that follow */
    const struct lr_cuda_list *lists;
    const struct lr_cuda_rows *rows;
    int64_t n_groups;   /* of rows */
    int64_t max_tokens; /* the largest `end - origin` */
    int resume;         /* 1: m, l, o are read, 0: they start empty */
    float *m, *l, *o;   /* [slot, n_rows, n_heads (, head_dim)] */
    lr_act *y;          /* o / l; then o is not written. Or NULL */
    int64_t y_stride;
};

/* Channels of a head in a block: 64, 128 or 256; 0 beyond. */
int64_t LR_CUDA(padded_head_dim)(int64_t head_dim);

/* Launches on exec's stream: the kernels for Hopper or the portable ones, as lr_cuda_hopper_kernels says. */
void LR_CUDA(fold_rows)(const struct lr_exec *exec, const struct lr_cuda_fold *fold, const char *slot);
void LR_CUDA(fold_rows_hopper)(const struct lr_exec *exec, const struct lr_cuda_fold *fold, const char *slot);
void LR_CUDA(fold_rows_portable)(const struct lr_exec *exec, const struct lr_cuda_fold *fold, const char *slot);

#ifdef __cplusplus
}
#endif

#endif
