/* A loaded model, whatever its family: dimensions, one entry per layer, packed weights.
 *
 *   lr_model
 *     embed (row-major, mapped) | layers[0 .. n_layers) | final norm | head (packed)
 *   lr_layer
 *     norm1 -> mixer (gated delta rule or attention) -> norm2 -> ffn (dense or mixture of experts)
 *
 * Everything is read-only after loading. Weights and norms live in the backend's memory; the embedding table stays in
 * the mapped file where that memory is the host's. A family (worker/models/<family>.c) reads config.json and
 * fills this struct. */
#ifndef LR_WORKER_MODEL_H
#define LR_WORKER_MODEL_H

#include "base/arena.h"
#include "kernels/ops.h"
#include "worker/weights/checkpoint_dir.h"

enum lr_mixer { LR_MIXER_GATED_DELTA, LR_MIXER_ATTENTION };

/* in [conv_channels + n_v_heads*dv + 2*n_v_heads, d]: rows reordered to  all q | all k | all v |
 * all z | all b | all a */
struct lr_gated_delta_weights {
    struct lr_weight in;
    struct lr_weight out; /* [d, n_v_heads * dv] */
    float *conv;          /* [conv_channels, n_taps] */
    float *norm;          /* [dv] */
    float *a_log;         /* [n_v_heads] */
    float *dt_bias;       /* [n_v_heads] */
};

/* in [n_heads*2*head_dim + 2*n_kv_heads*head_dim, d]: per head q | gate, then all k, then all v */
struct lr_attention_weights {
    struct lr_weight in;
    struct lr_weight out; /* [d, n_heads * head_dim] */
    float *in_bias;       /* [in.n] or NULL */
    float *out_bias;      /* [d] or NULL */
    float *q_norm;        /* [head_dim] */
    float *k_norm;
};

struct lr_mlp_weights {
    struct lr_weight gate, up, down;
};

/* Dense where n_experts = 0 (then `dense` is used), else experts [first_expert, first_expert +
 * n_local) live here. */
struct lr_ffn_weights {
    int64_t n_experts;
    struct lr_mlp_weights dense;
    struct lr_weight router;      /* [n_experts, d] */
    struct lr_weight shared_gate; /* [1, d] */
    struct lr_mlp_weights shared;
    struct lr_weight *expert_gate; /* [n_local] each */
    struct lr_weight *expert_up;
    struct lr_weight *expert_down;
};

struct lr_layer {
    enum lr_mixer mixer;
    int64_t mixer_index;  /* how many layers of the same mixer come before: the index of its state or
                             KV */
    float *norm1, *norm2; /* [d] */
    union {
        struct lr_gated_delta_weights delta;
        struct lr_attention_weights attention;
    };
    struct lr_ffn_weights ffn;
};

struct lr_model_dims {
    int64_t d, vocab, n_layers;
    int64_t n_delta_layers, n_attention_layers;
    int64_t n_heads, n_kv_heads, head_dim, rotary_dim;
    struct lr_delta_shape delta;
    int64_t conv_channels, conv_taps;
    int64_t n_experts, top_k, expert_ffn, shared_ffn, dense_ffn; /* n_experts: 0 where no layer has experts */
    int renormalize;
    enum lr_activation activation;
    float norm_eps;
    double rope_factor; /* multiplies cos and sin */
};

enum { LR_MAX_EOS = 8 };

struct lr_model {
    char family[32];
    struct lr_model_dims dims;
    double *inv_freq;  /* host [rotary_dim / 2] */
    const void *embed; /* backend memory or the mapped file */
    enum lr_dtype embed_dtype;
    struct lr_layer *layers;
    float *final_norm;
    struct lr_weight head; /* [vocab, d] */
    int32_t eos[LR_MAX_EOS];
    int n_eos;
    int64_t n_parameters;
    struct lr_checkpoint *checkpoint;
    const struct lr_kernel_ops *ops;
    struct lr_arena arena;  /* backend memory */
    struct lr_arena tables; /* host memory: layers, arrays of weights */
};

/* Which experts a worker holds: [first, first + count) of n_experts. Contiguous, as even as
 * possible; with `replicated` all of them. */
struct lr_expert_range {
    int64_t first, count;
};
struct lr_expert_range lr_expert_range_of(int64_t n_experts, int rank, int size, int replicated);
int lr_expert_owner(int64_t n_experts, int64_t expert, int size);

/* Loads the checkpoint in `dir` with the experts of `rank`. The weights are packed once for `ops`.
 * Errors name the file, tensor or config field. Blocks. */
LR_MUST_USE enum lr_status lr_model_load(const char *dir,
                                         const struct lr_kernel_ops *ops,
                                         const struct lr_exec *exec,
                                         int rank,
                                         int size,
                                         int replicated,
                                         struct lr_model *out,
                                         struct lr_error *err);

/* Reads config.json only: dims, family, and the bytes that the packed weights of worker 0 of `size`
 * would take. */
LR_MUST_USE enum lr_status lr_model_peek(const char *dir,
                                         const struct lr_kernel_ops *ops,
                                         int size,
                                         int replicated,
                                         struct lr_model_dims *dims,
                                         size_t *weight_bytes,
                                         struct lr_error *err);
void lr_model_unload(struct lr_model *model);

#endif
