/* Inside of the worker library: the session's memory, waves and steps. Included by worker/ only. */
#ifndef LR_WORKER_SESSION_IMPL_H
#define LR_WORKER_SESSION_IMPL_H

#include "worker/session.h"

/* One wave: worker r has tokens [first + r * segment, + length(r)). */
struct lr_wave {
    int64_t index;
    int64_t first;   /* absolute position of worker 0's segment */
    int64_t end;     /* absolute end of the wave's tokens */
    int64_t segment; /* tokens of a full segment */
    int n_active;    /* workers that have tokens: 0 .. n_active-1 */
};

static inline int64_t lr_wave_start(const struct lr_wave *wave, int rank)
{
    return wave->first + rank * wave->segment;
}

static inline int64_t lr_wave_length(const struct lr_wave *wave, int rank)
{
    int64_t left = wave->end - lr_wave_start(wave, rank);
    return left < 0 ? 0 : left > wave->segment ? wave->segment : left;
}

/* Rows that go through the layers together: a segment of the document, or tokens of forks. */
struct lr_step {
    struct lr_session *session;
    const struct lr_wave *wave;   /* document; NULL for forks */
    const struct lr_batch *batch; /* forks; NULL for a document */
    int64_t n_rows;
    const int64_t *positions; /* host [n_rows] absolute */
    float *cos, *sin;         /* [n_rows, rotary_dim / 2] */
    float *x;                 /* [n_rows, d] the residual stream */
    lr_act *h;                /* [n_rows, d] the normed input of a mixer or ffn */
};

/* Tokens of several forks, time-major: slice j holds token j of every fork that has one. Forks are
 * sorted by falling number of tokens, so the forks of a slice are the first slice_rows(j) of them.
 *
 *   row:   f0t0 f1t0 f2t0 | f0t1 f1t1 | f0t2 ...            slice_first = {0, 3, 5, ...} */
struct lr_batch {
    struct lr_fork **forks; /* [n_forks] */
    int64_t n_forks;
    int64_t n_slices;
    const int64_t *slice_first; /* [n_slices + 1] */
};

static inline int64_t lr_batch_slice_rows(const struct lr_batch *batch, int64_t slice)
{
    return batch->slice_first[slice + 1] - batch->slice_first[slice];
}

/* How many of the batch's tokens belong to fork f. */
static inline int64_t lr_batch_fork_tokens(const struct lr_batch *batch, int64_t f)
{
    int64_t n = 0;
    while (n < batch->n_slices && lr_batch_slice_rows(batch, n) > f)
        n++;
    return n;
}

struct lr_fork {
    struct lr_session *session;
    int index; /* slot; its KV tail lives on worker index mod size */
    int in_use;
    int64_t position; /* of the next token */
    float *states;    /* [n_delta_layers][n_v_heads, dk, dv] */
    lr_act *tails;    /* [n_delta_layers][taps - 1, conv_channels] */
    char *kv;         /* [n_attention_layers][fork_blocks] blocks; NULL on other workers */
};

enum { LR_KV_SLOTS = 2 };

/* A slab of the host's on its way to a slot, or in it. */
struct lr_kv_visit {
    int64_t layer, slab;
    int slot;
};

/* Where the document's keys and values are; see kv_tier.h. */
struct lr_kv_tier {
    int64_t slab_blocks;      /* of a full slab */
    int64_t resident_slabs;   /* of each layer, at home on the device */
    int64_t resident_blocks;  /* the same in blocks */
    char *device;             /* [layer][resident_blocks] */
    char *host;               /* [layer][local_blocks - resident_blocks]; NULL: all are resident */
    char *stage;              /* [slab_blocks] */
    char *slots[LR_KV_SLOTS]; /* [slot_blocks] each */
    int64_t slot_blocks;
    struct lr_kv_visit visits[LR_KV_SLOTS]; /* [n_visits] in their order; the first is being read, or is next */
    int n_visits, next_slot, gathered, entered;
    int64_t walk_end; /* slabs up to which the present walk goes */
};

struct lr_session {
    struct lr_engine *engine;
    struct lr_session_options options;
    struct lr_session_hooks hooks;
    struct lr_kv_shape kv_shape;
    size_t block_bytes;
    int sealed;

    int64_t n_tokens; /* processed */
    int32_t *held;    /* tokens waiting for a full wave */
    int64_t n_held;
    int64_t next_logit; /* index into hooks.positions */

    struct lr_memory_plan plan;
    size_t available_bytes; /* of the backend's memory before anything was reserved */

    struct lr_arena host;      /* host memory that lives as long as the session: held, forks */
    struct lr_arena memory;    /* backend memory that does: states, tails, forks' keys and values */
    struct lr_arena kv_memory; /* KV blocks of the document, stage and slots; backend memory */
    struct lr_arena kv_host;   /* those blocks of the document that the backend's memory does not hold; host memory */
    struct lr_arena workspace; /* one step's tensors; backend memory */
    struct lr_arena tables;    /* one step's lists and counts; host memory */

    struct lr_kv_tier tier;     /* the document's blocks in kv_memory and kv_host */
    float *states;              /* [n_delta_layers] states: before sealing valid on worker 0, then everywhere */
    lr_act *tails;              /* [n_delta_layers] convolution tails, everywhere */
    float *last_rows;           /* [max_rows, d] residual rows of the forks' last tokens */
    int64_t local_blocks;       /* per attention layer, on this worker */
    char *edge_blocks;          /* [n_attention_layers] copies of the document's last, unfinished block;
                                   after sealing */
    float *block_means;         /* [n_attention_layers][n_blocks, n_kv_heads, head_dim]; NULL without
                                   top_k_blocks */
    float *page_min, *page_max; /* [n_attention_layers][local_blocks, n_kv_heads, head_dim]; NULL
                                   without decode_pages */

    struct lr_fork *forks; /* [max_forks] */
    int64_t fork_blocks;   /* KV blocks of one fork's tail, per layer */
    int64_t max_rows;      /* rows of one fork step */

    int64_t pairs_seen, pairs_causal; /* of this worker's queries, for the density */
};

/* ---- memory
 * -------------------------------------------------------------------------------------------------------
 */

static inline size_t lr_state_floats(const struct lr_model_dims *dims)
{
    return (size_t)(dims->delta.n_v_heads * dims->delta.dk * dims->delta.dv);
}

/* Activations of one convolution tail. */
static inline size_t lr_tail_elements(const struct lr_model_dims *dims)
{
    return (size_t)((dims->conv_taps - 1) * dims->conv_channels);
}

static inline size_t lr_act_bytes(const struct lr_kernel_ops *ops)
{
    return lr_dtype_bytes(ops->act_dtype);
}

/* The element `index` of an array of activations. */
static inline lr_act *lr_act_at(const struct lr_kernel_ops *ops, const lr_act *base, int64_t index)
{
    return (char *)base + index * (int64_t)lr_act_bytes(ops);
}

/* Number among this worker's blocks of the document's block `block` (absolute number), which must be its own. */
static inline int64_t lr_session_local(const struct lr_session *session, int64_t block)
{
    int64_t per_segment = session->options.segment_tokens / LR_KV_BLOCK_TOKENS;
    int64_t segment = block / per_segment;
    return segment / session->engine->comm->size * per_segment + block % per_segment;
}

/* The home of a block: on the device, or in host memory behind it. */
static inline char *lr_session_local_block(const struct lr_session *session, int64_t layer, int64_t local)
{
    const struct lr_kv_tier *tier = &session->tier;
    if (local < tier->resident_blocks)
        return tier->device + (size_t)(layer * tier->resident_blocks + local) * session->block_bytes;
    int64_t in_host = session->local_blocks - tier->resident_blocks;
    return tier->host + (size_t)(layer * in_host + local - tier->resident_blocks) * session->block_bytes;
}

static inline char *lr_session_block(const struct lr_session *session, int64_t layer, int64_t block)
{
    return lr_session_local_block(session, layer, lr_session_local(session, block));
}

/* 1: its home is in host memory, where kernels do not read it. */
static inline int lr_session_block_is_away(const struct lr_session *session, int64_t block)
{
    return lr_session_local(session, block) >= session->tier.resident_blocks;
}

/* Worker that owns a block of the document. */
static inline int lr_session_block_owner(const struct lr_session *session, int64_t block)
{
    int64_t per_segment = session->options.segment_tokens / LR_KV_BLOCK_TOKENS;
    return (int)(block / per_segment % session->engine->comm->size);
}

static inline int64_t lr_ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static inline int64_t lr_min_i64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t lr_max_i64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Arrays of one step; the plan guarantees that they are there. Tensors lie in the backend's memory and are touched by
 * kernels only, tables in the host's. */
#define LR_STEP_TENSOR(session, type, count)                                                                           \
    ((type *)lr_arena_alloc(&(session)->workspace, (size_t)(count), sizeof(type)))
#define LR_STEP_TABLE(session, type, count)                                                                            \
    ((type *)lr_arena_alloc(&(session)->tables, (size_t)(count), sizeof(type)))

static inline lr_act *lr_step_act(struct lr_session *session, int64_t count)
{
    return lr_arena_alloc(&session->workspace, (size_t)count, lr_act_bytes(session->engine->ops));
}

/* Bytes of one step's arrays, or of a part of them. */
struct lr_step_bytes {
    size_t tensors, tables;
};

static inline size_t lr_tensor_bytes(int64_t count, size_t size)
{
    return lr_arena_array_bytes((size_t)count, size);
}

/* How far a step has filled its memory, and going back to there. */
struct lr_step_mark {
    size_t tensors, tables;
};

static inline struct lr_step_mark lr_step_mark(const struct lr_session *session)
{
    return (struct lr_step_mark){session->workspace.used_bytes, session->tables.used_bytes};
}

static inline void lr_step_rewind(struct lr_session *session, struct lr_step_mark mark)
{
    lr_arena_rewind(&session->workspace, mark.tensors);
    lr_arena_rewind(&session->tables, mark.tables);
}

/* A tensor's bytes as the host sees them: the tensor itself, or a copy in a table. Waits for the device. */
LR_MUST_USE enum lr_status lr_step_view(
    struct lr_session *session, const void *tensor, size_t size_bytes, const void **view, struct lr_error *err);

/* ---- layers
 * -------------------------------------------------------------------------------------------------------
 */

/* What a kind of mixer brings. One file per kind in worker/layers, one line in
 * worker/layers/registry.c. A call reads step->h (normed), adds its output to step->x, and updates
 * the session (prefill) or the forks (extend). Collective. */
struct lr_layer_ops {
    const char *name;
    /* What prefill takes for a segment, and extend for n_rows of forks. */
    struct lr_step_bytes (*prefill_bytes)(const struct lr_model_dims *dims,
                                          const struct lr_kernel_ops *ops,
                                          int n_workers,
                                          const struct lr_session_options *options);
    struct lr_step_bytes (*extend_bytes)(const struct lr_model_dims *dims,
                                         const struct lr_kernel_ops *ops,
                                         int n_workers,
                                         const struct lr_session_options *options,
                                         int64_t n_rows);
    enum lr_status (*prefill)(struct lr_step *step, const struct lr_layer *layer, struct lr_error *err);
    enum lr_status (*extend)(struct lr_step *step, const struct lr_layer *layer, struct lr_error *err);
};

extern const struct lr_layer_ops lr_gated_delta_layer, lr_attention_layer;
const struct lr_layer_ops *lr_layer_ops_of(enum lr_mixer mixer);

/* The feed-forward half of a block: dense or mixture of experts. */
struct lr_step_bytes lr_ffn_bytes(
    const struct lr_model_dims *dims, const struct lr_kernel_ops *ops, int n_workers, int replicated, int64_t n_rows);
LR_MUST_USE enum lr_status lr_ffn_prefill(struct lr_step *step, const struct lr_layer *layer, struct lr_error *err);
LR_MUST_USE enum lr_status lr_ffn_extend(struct lr_step *step, const struct lr_layer *layer, struct lr_error *err);

/* Partials of one fork step's attention: the document's segments on the fullest worker, and one
 * tail. */
int64_t lr_fork_partials(const struct lr_session_options *options, int n_workers);
/* Rows that one fork step may have, so that its partials stay within bounds. */
int64_t lr_fork_step_rows(const struct lr_model_dims *dims, const struct lr_session_options *options, int n_workers);

/* ---- steps
 * --------------------------------------------------------------------------------------------------------
 */

/* Processes the wave whose tokens are ids [wave tokens] (all workers have all of them). */
LR_MUST_USE enum lr_status
lr_prefill_wave(struct lr_session *session, const struct lr_wave *wave, const int32_t *ids, struct lr_error *err);

/* Runs step->x through all layers. */
LR_MUST_USE enum lr_status lr_step_layers(struct lr_step *step, struct lr_error *err);

/* positions, rotary tables, x = embed(ids), h. From the workspace. */
LR_MUST_USE enum lr_status lr_step_begin(struct lr_step *step, const int32_t *ids, struct lr_error *err);

/* logits [n_rows, vocab] = head(norm(x)). `normed` is scratch [n_rows, d]. Local. */
void lr_step_logits(struct lr_engine *engine, const float *x, int64_t n_rows, lr_act *normed, float *logits);

/* Passes one position's logits (host) to a sink, if they are numbers. */
LR_MUST_USE enum lr_status lr_sink_logits(const struct lr_engine *engine,
                                          lr_logits_sink *sink,
                                          void *context,
                                          int64_t position,
                                          const float *logits,
                                          struct lr_error *err);

#endif
