/* config.json of a qwen3_next directory, checked and with every default filled in.
 *
 * Fields keep the names of the file. (transformers: configuration_qwen3_next.py,
 * modeling_rope_utils.py) */
#ifndef LR_WORKER_MODELS_QWEN3_NEXT_CONFIG_H
#define LR_WORKER_MODELS_QWEN3_NEXT_CONFIG_H

#include "base/status.h"
#include "kernels/ops.h"

enum { LR_MAX_EOS_TOKENS = 8 };

struct lr_qwen3_next_config {
    int64_t hidden_size;
    int64_t vocab_size;
    int64_t num_hidden_layers;
    int64_t num_attention_heads;
    int64_t num_key_value_heads;
    int64_t head_dim;
    int64_t rotary_dim; /* head_dim * partial_rotary_factor */
    int64_t linear_num_key_heads;
    int64_t linear_num_value_heads;
    int64_t linear_key_head_dim;
    int64_t linear_value_head_dim;
    int64_t linear_conv_kernel_dim;
    int64_t num_experts;
    int64_t num_experts_per_tok;
    int64_t moe_intermediate_size;
    int64_t shared_expert_intermediate_size;
    int64_t intermediate_size;
    int64_t max_position_embeddings;
    int norm_topk_prob;
    int attention_bias;
    int tie_word_embeddings;
    enum lr_activation hidden_act;
    float rms_norm_eps;
    double rope_attention_factor; /* on cos and sin */
    double *inv_freq;             /* [rotary_dim / 2] */
    int *layer_is_attention;      /* [num_hidden_layers] 1: full attention, 0: gated DeltaNet */
    int *layer_is_moe;            /* [num_hidden_layers] 1: experts, 0: dense SwiGLU */
    int n_eos_token_ids;
    int32_t eos_token_ids[LR_MAX_EOS_TOKENS]; /* of config.json and generation_config.json */
};

/* Reads config.json (and generation_config.json where there is one). LR_UNSUPPORTED for another
 * model_type, rope type or activation, by name; LR_CORRUPT for a value out of range or two that
 * contradict each other. */
LR_MUST_USE enum lr_status
lr_qwen3_next_config_load(const char *model_dir, struct lr_qwen3_next_config *out, struct lr_error *err);

/* The same over the text of config.json; `path` is for messages. */
LR_MUST_USE enum lr_status lr_qwen3_next_config_parse(
    const char *text, size_t text_bytes, const char *path, struct lr_qwen3_next_config *out, struct lr_error *err);
void lr_qwen3_next_config_free(struct lr_qwen3_next_config *config);

static inline int lr_qwen3_next_layer_is_moe(const struct lr_qwen3_next_config *config, int64_t layer)
{
    return config->layer_is_moe[layer];
}

#endif
