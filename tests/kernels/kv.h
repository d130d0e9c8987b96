/* KV blocks for the tests of attention and selection. */
#ifndef LR_TESTS_KERNELS_KV_H
#define LR_TESTS_KERNELS_KV_H

#include "tests/kernels/common.h"

enum { BLOCK = LR_KV_BLOCK_TOKENS, MAX_BLOCKS = 32 };

/* The first n_tokens tokens of a sequence, in blocks of exactly their size; `refs` lists all of them. */
struct kv {
    struct lr_kv_shape shape;
    int64_t n_tokens, n_blocks;
    void *blocks[MAX_BLOCKS];
    struct lr_kv_ref refs[MAX_BLOCKS];
};

static inline struct kv take_kv(struct lr_kv_shape shape, int64_t n_tokens, float key_size, uint64_t *seed)
{
    struct kv kv = {.shape = shape, .n_tokens = n_tokens, .n_blocks = (n_tokens + BLOCK - 1) / BLOCK};
    const struct lr_kernel_ops *ops = machine.tables[0];
    int64_t width = shape.n_kv_heads * shape.head_dim;
    float *k = take_floats(n_tokens * width, key_size, seed), *v = take_floats(n_tokens * width, 1.0f, seed);
    for (int64_t i = 0; i < kv.n_blocks; i++) {
        int64_t left = n_tokens - i * BLOCK;
        kv.blocks[i] = take(ops->kv_block_bytes(shape));
        memset(kv.blocks[i], 0, ops->kv_block_bytes(shape));
        kv.refs[i] = (struct lr_kv_ref){kv.blocks[i], i * BLOCK, (int32_t)(left < BLOCK ? left : BLOCK), 0};
    }
    struct lr_kv_store_args store = {
        .shape = shape, .k = k, .k_stride = width, .v = v, .v_stride = width, .n_rows = n_tokens, .blocks = kv.blocks};
    ops->kv_store(&machine.execs[0], &store);
    free(k);
    free(v);
    return kv;
}

static inline void free_kv(struct kv *kv)
{
    for (int64_t i = 0; i < kv->n_blocks; i++)
        free(kv->blocks[i]);
}

#endif
