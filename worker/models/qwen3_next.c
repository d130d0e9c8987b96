/* Qwen3-Next: gated DeltaNet and gated attention layers, each with a mixture of experts or a dense
 * SwiGLU.
 *
 * Reads top-down: config.json -> dimensions -> layers -> tensor names. The equations are in the
 * layers; the names and traps were checked against transformers (modeling_qwen3_next.py, 5.23). */
#include "worker/models/qwen3_next.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES = 160 };

/* What the tensor functions share. */
struct builder {
    struct lr_loader *loader;
    const struct lr_qwen3_next_config *config;
    const struct lr_model_dims *dims;
    struct lr_expert_range experts;
    int64_t layer;
};

static void name_tensor(const struct builder *b, char *name, const char *suffix)
{
    snprintf(name, NAME_BYTES, "model.layers.%lld.%s", (long long)b->layer, suffix);
}

/* ---- helpers: one tensor, named after its layer
 * ------------------------------------------------------------------- */

static enum lr_status
weight(const struct builder *b, const char *suffix, int64_t n, int64_t k, struct lr_weight *out, struct lr_error *err)
{
    char name[NAME_BYTES];
    name_tensor(b, name, suffix);
    struct lr_weight_piece piece = {.name = name, .n_rows = n};
    return lr_load_weight(b->loader, &piece, 1, k, out, err);
}

static enum lr_status floats(const struct builder *b, const char *suffix, int64_t n, float **out, struct lr_error *err)
{
    char name[NAME_BYTES];
    name_tensor(b, name, suffix);
    return lr_load_floats(b->loader, name, 1, &n, out, err);
}

static enum lr_status
mlp(const struct builder *b, const char *prefix, int64_t ffn, struct lr_mlp_weights *out, struct lr_error *err)
{
    char suffix[NAME_BYTES / 2];
    int64_t d = b->dims->d;
    snprintf(suffix, sizeof suffix, "%s.gate_proj.weight", prefix);
    LR_TRY(weight(b, suffix, ffn, d, &out->gate, err));
    snprintf(suffix, sizeof suffix, "%s.up_proj.weight", prefix);
    LR_TRY(weight(b, suffix, ffn, d, &out->up, err));
    snprintf(suffix, sizeof suffix, "%s.down_proj.weight", prefix);
    return weight(b, suffix, d, ffn, &out->down, err);
}

/* ---- mixers
 * -------------------------------------------------------------------------------------------------------
 */

/* in_proj_qkvz is grouped by key head: [q dk | k dk | v r*dv | z r*dv] for each; in_proj_ba: [b r |
 * a r] for each. The packed rows are put in the order  all q | all k | all v | all z | all b | all
 * a. */
static enum lr_status delta_in(const struct builder *b, struct lr_weight *out, struct lr_error *err)
{
    const struct lr_delta_shape *s = &b->dims->delta;
    int64_t heads = s->n_k_heads, ratio = s->n_v_heads / heads;
    int64_t group = 2 * s->dk + 2 * ratio * s->dv;
    int64_t starts[4] = {0, s->dk, 2 * s->dk, 2 * s->dk + ratio * s->dv};
    int64_t sizes[4] = {s->dk, s->dk, ratio * s->dv, ratio * s->dv};
    struct lr_row_range *ranges = calloc((size_t)heads * 6, sizeof *ranges);
    if (!ranges)
        return lr_fail(err, LR_NO_MEMORY, "no memory for %lld heads", (long long)heads);
    for (int64_t part = 0; part < 4; part++)
        for (int64_t h = 0; h < heads; h++)
            ranges[part * heads + h] = (struct lr_row_range){h * group + starts[part], sizes[part]};
    for (int64_t part = 0; part < 2; part++)
        for (int64_t h = 0; h < heads; h++)
            ranges[(4 + part) * heads + h] = (struct lr_row_range){h * 2 * ratio + part * ratio, ratio};
    char qkvz[NAME_BYTES], ba[NAME_BYTES];
    name_tensor(b, qkvz, "linear_attn.in_proj_qkvz.weight");
    name_tensor(b, ba, "linear_attn.in_proj_ba.weight");
    struct lr_weight_piece pieces[2] = {
        {.name = qkvz, .n_rows = heads * group, .ranges = ranges, .n_ranges = heads * 4},
        {.name = ba, .n_rows = 2 * s->n_v_heads, .ranges = ranges + heads * 4, .n_ranges = heads * 2}};
    enum lr_status status = lr_load_weight(b->loader, pieces, 2, b->dims->d, out, err);
    free(ranges);
    return status;
}

static enum lr_status gated_delta(const struct builder *b, struct lr_gated_delta_weights *out, struct lr_error *err)
{
    const struct lr_model_dims *dims = b->dims;
    const struct lr_delta_shape *s = &dims->delta;
    char conv[NAME_BYTES];
    name_tensor(b, conv, "linear_attn.conv1d.weight");
    int64_t conv_shape[3] = {dims->conv_channels, 1, dims->conv_taps};
    LR_TRY(delta_in(b, &out->in, err));
    LR_TRY(lr_load_floats(b->loader, conv, 3, conv_shape, &out->conv, err));
    LR_TRY(floats(b, "linear_attn.norm.weight", s->dv, &out->norm, err));
    LR_TRY(floats(b, "linear_attn.A_log", s->n_v_heads, &out->a_log, err));
    LR_TRY(floats(b, "linear_attn.dt_bias", s->n_v_heads, &out->dt_bias, err));
    return weight(b, "linear_attn.out_proj.weight", dims->d, s->n_v_heads * s->dv, &out->out, err);
}

/* The three biases in the order of the packed rows. */
static enum lr_status attention_biases(const struct builder *b, struct lr_attention_weights *out, struct lr_error *err)
{
    const struct lr_model_dims *dims = b->dims;
    int64_t q = 2 * dims->n_heads * dims->head_dim, kv = dims->n_kv_heads * dims->head_dim;
    char names[3][NAME_BYTES];
    name_tensor(b, names[0], "self_attn.q_proj.bias");
    name_tensor(b, names[1], "self_attn.k_proj.bias");
    name_tensor(b, names[2], "self_attn.v_proj.bias");
    const char *const pointers[3] = {names[0], names[1], names[2]};
    LR_TRY(lr_load_floats_joined(b->loader, pointers, (int64_t[3]){q, kv, kv}, 3, &out->in_bias, err));
    return floats(b, "self_attn.o_proj.bias", dims->d, &out->out_bias, err);
}

static enum lr_status attention(const struct builder *b, struct lr_attention_weights *out, struct lr_error *err)
{
    const struct lr_model_dims *dims = b->dims;
    char q[NAME_BYTES], k[NAME_BYTES], v[NAME_BYTES];
    name_tensor(b, q, "self_attn.q_proj.weight");
    name_tensor(b, k, "self_attn.k_proj.weight");
    name_tensor(b, v, "self_attn.v_proj.weight");
    struct lr_weight_piece pieces[3] = {
        {.name = q, .n_rows = 2 * dims->n_heads * dims->head_dim},
        {.name = k, .n_rows = dims->n_kv_heads * dims->head_dim},
        {.name = v, .n_rows = dims->n_kv_heads * dims->head_dim},
    };
    LR_TRY(lr_load_weight(b->loader, pieces, 3, dims->d, &out->in, err));
    LR_TRY(weight(b, "self_attn.o_proj.weight", dims->d, dims->n_heads * dims->head_dim, &out->out, err));
    if (b->config->attention_bias)
        LR_TRY(attention_biases(b, out, err));
    LR_TRY(floats(b, "self_attn.q_norm.weight", dims->head_dim, &out->q_norm, err));
    return floats(b, "self_attn.k_norm.weight", dims->head_dim, &out->k_norm, err);
}

/* ---- feed-forward
 * -------------------------------------------------------------------------------------------------
 */

static enum lr_status experts(const struct builder *b, struct lr_ffn_weights *out, struct lr_error *err)
{
    const struct lr_model_dims *dims = b->dims;
    struct lr_expert_range range = b->experts;
    struct lr_mlp_weights one;
    out->expert_gate = lr_load_array(b->loader, range.count, sizeof(struct lr_weight));
    out->expert_up = lr_load_array(b->loader, range.count, sizeof(struct lr_weight));
    out->expert_down = lr_load_array(b->loader, range.count, sizeof(struct lr_weight));
    for (int64_t e = 0; e < range.count; e++) {
        char prefix[NAME_BYTES / 4];
        snprintf(prefix, sizeof prefix, "mlp.experts.%lld", (long long)(range.first + e));
        LR_TRY(mlp(b, prefix, dims->expert_ffn, &one, err));
        if (out->expert_gate) {
            out->expert_gate[e] = one.gate;
            out->expert_up[e] = one.up;
            out->expert_down[e] = one.down;
        }
    }
    return LR_OK;
}

static enum lr_status feed_forward(const struct builder *b, struct lr_ffn_weights *out, struct lr_error *err)
{
    const struct lr_model_dims *dims = b->dims;
    if (!lr_qwen3_next_layer_is_moe(b->config, b->layer))
        return mlp(b, "mlp", dims->dense_ffn, &out->dense, err);
    out->n_experts = dims->n_experts;
    LR_TRY(weight(b, "mlp.gate.weight", dims->n_experts, dims->d, &out->router, err));
    LR_TRY(experts(b, out, err));
    LR_TRY(mlp(b, "mlp.shared_expert", dims->shared_ffn, &out->shared, err));
    return weight(b, "mlp.shared_expert_gate.weight", 1, dims->d, &out->shared_gate, err);
}

/* ---- the model
 * ----------------------------------------------------------------------------------------------------
 */

static enum lr_status layers(struct builder *b, struct lr_layer *all, struct lr_error *err)
{
    int64_t index[2] = {0, 0};
    for (b->layer = 0; b->layer < b->dims->n_layers; b->layer++) {
        struct lr_layer layer = {.mixer = b->config->layer_is_attention[b->layer] ? LR_MIXER_ATTENTION
                                                                                  : LR_MIXER_GATED_DELTA};
        layer.mixer_index = index[layer.mixer]++;
        LR_TRY(floats(b, "input_layernorm.weight", b->dims->d, &layer.norm1, err));
        LR_TRY(floats(b, "post_attention_layernorm.weight", b->dims->d, &layer.norm2, err));
        if (layer.mixer == LR_MIXER_ATTENTION)
            LR_TRY(attention(b, &layer.attention, err));
        else
            LR_TRY(gated_delta(b, &layer.delta, err));
        LR_TRY(feed_forward(b, &layer.ffn, err));
        if (all)
            all[b->layer] = layer;
    }
    return LR_OK;
}

static enum lr_status embedding(const struct builder *b, struct lr_model *model, struct lr_error *err)
{
    LR_TRY(lr_load_rows(b->loader, "model.embed_tokens.weight", b->dims->vocab, b->dims->d, &model->embed,
                        &model->embed_dtype, err));
    struct lr_weight_piece head = {.name =
                                       b->config->tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight",
                                   .n_rows = b->dims->vocab};
    LR_TRY(lr_load_weight(b->loader, &head, 1, b->dims->d, &model->head, err));
    if (!b->config->tie_word_embeddings)
        b->loader->n_parameters += b->dims->vocab * b->dims->d;
    return lr_load_floats(b->loader, "model.norm.weight", 1, &b->dims->d, &model->final_norm, err);
}

enum lr_status lr_qwen3_next_visit(const struct lr_qwen3_next_config *config,
                                   const struct lr_model_dims *dims,
                                   struct lr_expert_range experts_here,
                                   struct lr_loader *loader,
                                   struct lr_model *model,
                                   struct lr_error *err)
{
    struct builder b = {.loader = loader, .config = config, .dims = dims, .experts = experts_here};
    model->layers = lr_load_array(loader, dims->n_layers, sizeof *model->layers);
    LR_TRY(embedding(&b, model, err));
    LR_TRY(layers(&b, model->layers, err));
    int64_t n_freq = dims->rotary_dim / 2;
    model->inv_freq = lr_load_array(loader, n_freq, sizeof *model->inv_freq);
    if (model->inv_freq)
        memcpy(model->inv_freq, config->inv_freq, (size_t)n_freq * sizeof *model->inv_freq);
    return LR_OK;
}

void lr_qwen3_next_dims(const struct lr_qwen3_next_config *config, struct lr_model_dims *out)
{
    *out = (struct lr_model_dims){
        .d = config->hidden_size,
        .vocab = config->vocab_size,
        .n_layers = config->num_hidden_layers,
        .n_heads = config->num_attention_heads,
        .n_kv_heads = config->num_key_value_heads,
        .head_dim = config->head_dim,
        .rotary_dim = config->rotary_dim,
        .delta = {.n_k_heads = config->linear_num_key_heads,
                  .n_v_heads = config->linear_num_value_heads,
                  .dk = config->linear_key_head_dim,
                  .dv = config->linear_value_head_dim},
        .conv_taps = config->linear_conv_kernel_dim,
        .top_k = config->num_experts_per_tok,
        .expert_ffn = config->moe_intermediate_size,
        .shared_ffn = config->shared_expert_intermediate_size,
        .dense_ffn = config->intermediate_size,
        .renormalize = config->norm_topk_prob,
        .activation = config->hidden_act,
        .norm_eps = config->rms_norm_eps,
        .rope_factor = config->rope_attention_factor,
    };
    out->conv_channels = 2 * out->delta.n_k_heads * out->delta.dk + out->delta.n_v_heads * out->delta.dv;
    for (int64_t i = 0; i < out->n_layers; i++) {
        out->n_attention_layers += config->layer_is_attention[i] != 0;
        out->n_delta_layers += config->layer_is_attention[i] == 0;
        if (lr_qwen3_next_layer_is_moe(config, i))
            out->n_experts = config->num_experts;
    }
}
