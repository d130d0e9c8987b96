#include "worker/models/qwen3_next_config.h"

#include "base/file.h"
#include "worker/models/json_fields.h"
#include "worker/models/rope_scaling.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_LAYERS = 4096, MAX_WIDTH = 1 << 20, MAX_HEADS = 4096, PATH_BYTES = 4096 };
static const size_t max_config_bytes = (size_t)16 << 20;

static enum lr_status read_dimensions(struct lr_json_fields f, struct lr_qwen3_next_config *c, struct lr_error *err)
{
    const struct {
        const char *name;
        int64_t lowest, highest, otherwise;
        int64_t *out;
    } fields[] = {
        {"hidden_size", 1, MAX_WIDTH, 2048, &c->hidden_size},
        {"vocab_size", 1, LR_MAX_VOCAB, 151936, &c->vocab_size},
        {"num_hidden_layers", 1, MAX_LAYERS, 48, &c->num_hidden_layers},
        {"num_attention_heads", 1, MAX_HEADS, 16, &c->num_attention_heads},
        {"num_key_value_heads", 1, MAX_HEADS, 2, &c->num_key_value_heads},
        {"head_dim", 1, LR_MAX_HEAD_DIM, 256, &c->head_dim},
        {"linear_num_key_heads", 1, MAX_HEADS, 16, &c->linear_num_key_heads},
        {"linear_num_value_heads", 1, MAX_HEADS, 32, &c->linear_num_value_heads},
        {"linear_key_head_dim", 1, LR_MAX_DELTA_DIM, 128, &c->linear_key_head_dim},
        {"linear_value_head_dim", 1, LR_MAX_DELTA_DIM, 128, &c->linear_value_head_dim},
        {"linear_conv_kernel_dim", 1, LR_MAX_CONV_TAPS, 4, &c->linear_conv_kernel_dim},
        {"num_experts", 0, LR_MAX_EXPERTS, 512, &c->num_experts},
        {"num_experts_per_tok", 0, LR_MAX_EXPERTS, 10, &c->num_experts_per_tok},
        {"moe_intermediate_size", 1, MAX_WIDTH, 512, &c->moe_intermediate_size},
        {"shared_expert_intermediate_size", 0, MAX_WIDTH, 512, &c->shared_expert_intermediate_size},
        {"intermediate_size", 1, MAX_WIDTH, 5632, &c->intermediate_size},
        {"max_position_embeddings", 1, (int64_t)1 << 40, 32768, &c->max_position_embeddings},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++)
        LR_TRY(lr_json_integer(f, fields[i].name, fields[i].lowest, fields[i].highest, fields[i].otherwise,
                               fields[i].out, err));
    double eps = 0.0;
    LR_TRY(lr_json_real(f, "rms_norm_eps", 0.0, 1.0, 1e-6, &eps, err));
    c->rms_norm_eps = (float)eps;
    LR_TRY(lr_json_bool(f, "norm_topk_prob", 1, &c->norm_topk_prob, err));
    LR_TRY(lr_json_bool(f, "attention_bias", 0, &c->attention_bias, err));
    return lr_json_bool(f, "tie_word_embeddings", 0, &c->tie_word_embeddings, err);
}

static enum lr_status check_ratios(const char *path, const struct lr_qwen3_next_config *c, struct lr_error *err)
{
    if (c->num_attention_heads % c->num_key_value_heads != 0)
        return lr_fail(err, LR_CORRUPT, "%s: num_attention_heads %lld is no multiple of num_key_value_heads %lld", path,
                       (long long)c->num_attention_heads, (long long)c->num_key_value_heads);
    if (c->num_attention_heads / c->num_key_value_heads > LR_MAX_GROUP)
        return lr_fail(err, LR_UNSUPPORTED, "%s: %lld query heads for one key-value head, longreach takes up to %d",
                       path, (long long)(c->num_attention_heads / c->num_key_value_heads), LR_MAX_GROUP);
    if (c->linear_num_value_heads % c->linear_num_key_heads != 0)
        return lr_fail(err, LR_CORRUPT, "%s: linear_num_value_heads %lld is no multiple of linear_num_key_heads %lld",
                       path, (long long)c->linear_num_value_heads, (long long)c->linear_num_key_heads);
    if (c->num_experts > 0 && (c->num_experts_per_tok < 1 || c->num_experts_per_tok > c->num_experts))
        return lr_fail(err, LR_CORRUPT, "%s: num_experts_per_tok is %lld, it must be from 1 to num_experts %lld", path,
                       (long long)c->num_experts_per_tok, (long long)c->num_experts);
    return LR_OK;
}

static enum lr_status read_activation(struct lr_json_fields f, struct lr_qwen3_next_config *c, struct lr_error *err)
{
    static const struct {
        const char *name;
        enum lr_activation activation;
    } known[] = {{"silu", LR_ACT_SILU},          {"swish", LR_ACT_SILU},
                 {"gelu", LR_ACT_GELU},          {"gelu_pytorch_tanh", LR_ACT_GELU_TANH},
                 {"gelu_new", LR_ACT_GELU_TANH}, {"relu", LR_ACT_RELU}};
    json_t *value = lr_json_field(f, "hidden_act");
    const char *name = value ? json_string_value(value) : "silu";
    for (size_t i = 0; name && i < sizeof known / sizeof known[0]; i++)
        if (strcmp(known[i].name, name) == 0) {
            c->hidden_act = known[i].activation;
            return LR_OK;
        }
    return lr_fail(err, LR_UNSUPPORTED, "%s: hidden_act '%.60s' is not one of silu, gelu, gelu_pytorch_tanh, relu",
                   f.path, name ? name : "(not a text)");
}

static enum lr_status read_layer_types(struct lr_json_fields f, struct lr_qwen3_next_config *c, struct lr_error *err)
{
    json_t *list = lr_json_field(f, "layer_types");
    int64_t interval = 1;
    LR_TRY(lr_json_integer(f, "full_attention_interval", 1, MAX_LAYERS, 4, &interval, err));
    if (list && json_array_size(list) != (size_t)c->num_hidden_layers)
        return lr_fail(err, LR_CORRUPT, "%s: layer_types has %zu entries, num_hidden_layers is %lld", f.path,
                       json_array_size(list), (long long)c->num_hidden_layers);
    for (int64_t i = 0; i < c->num_hidden_layers; i++) {
        c->layer_is_attention[i] = (i + 1) % interval == 0;
        if (!list)
            continue;
        const char *type = json_string_value(json_array_get(list, (size_t)i));
        c->layer_is_attention[i] = type && strcmp(type, "full_attention") == 0;
        if (!type || (!c->layer_is_attention[i] && strcmp(type, "linear_attention") != 0))
            return lr_fail(err, LR_UNSUPPORTED,
                           "%s: layer_types[%lld] is '%.60s', not linear_attention or full_attention", f.path,
                           (long long)i, type ? type : "(not a text)");
    }
    return LR_OK;
}

static enum lr_status read_moe_layers(struct lr_json_fields f, struct lr_qwen3_next_config *c, struct lr_error *err)
{
    int64_t step = 1;
    LR_TRY(lr_json_integer(f, "decoder_sparse_step", 1, MAX_LAYERS, 1, &step, err));
    for (int64_t i = 0; i < c->num_hidden_layers; i++)
        c->layer_is_moe[i] = c->num_experts > 0 && (i + 1) % step == 0;
    json_t *dense = lr_json_field(f, "mlp_only_layers"), *entry;
    if (dense && !json_is_array(dense))
        return lr_fail(err, LR_CORRUPT, "%s: mlp_only_layers must be a list of layers", f.path);
    size_t at;
    json_array_foreach(dense, at, entry)
    {
        /* numbers behind the last layer name nothing, as in transformers */
        if (!json_is_integer(entry))
            return lr_fail(err, LR_CORRUPT, "%s: mlp_only_layers[%zu] is not a whole number", f.path, at);
        if (json_integer_value(entry) >= 0 && json_integer_value(entry) < c->num_hidden_layers)
            c->layer_is_moe[json_integer_value(entry)] = 0;
    }
    return LR_OK;
}

static enum lr_status
add_eos(struct lr_json_fields f, json_t *value, struct lr_qwen3_next_config *c, struct lr_error *err)
{
    if (!json_is_integer(value) || json_integer_value(value) < 0 || json_integer_value(value) >= c->vocab_size)
        return lr_fail(err, LR_CORRUPT, "%s: eos_token_id must be from 0 to vocab_size - 1 = %lld", f.path,
                       (long long)c->vocab_size - 1);
    for (int i = 0; i < c->n_eos_token_ids; i++)
        if (c->eos_token_ids[i] == json_integer_value(value))
            return LR_OK;
    if (c->n_eos_token_ids == LR_MAX_EOS_TOKENS)
        return lr_fail(err, LR_UNSUPPORTED, "%s: more than %d eos tokens", f.path, LR_MAX_EOS_TOKENS);
    c->eos_token_ids[c->n_eos_token_ids++] = (int32_t)json_integer_value(value);
    return LR_OK;
}

static enum lr_status read_eos(struct lr_json_fields f, struct lr_qwen3_next_config *c, struct lr_error *err)
{
    json_t *value = lr_json_field(f, "eos_token_id"), *entry;
    size_t at;
    if (!value)
        return LR_OK;
    if (!json_is_array(value))
        return add_eos(f, value, c, err);
    json_array_foreach(value, at, entry)
    {
        LR_TRY(add_eos(f, entry, c, err));
    }
    return LR_OK;
}

static enum lr_status check_type(struct lr_json_fields f, struct lr_error *err)
{
    const char *type = json_string_value(json_object_get(f.object, "model_type"));
    if (!type)
        return lr_fail(err, LR_CORRUPT, "%s has no model_type", f.path);
    if (strcmp(type, "qwen3_next") != 0)
        return lr_fail(err, LR_UNSUPPORTED, "%s: model_type '%.60s' is not supported; longreach reads qwen3_next",
                       f.path, type);
    if (lr_json_field(f, "quantization_config"))
        return lr_fail(err, LR_UNSUPPORTED, "%s: quantised checkpoints are not supported", f.path);
    return LR_OK;
}

static enum lr_status read_config(struct lr_json_fields f, struct lr_qwen3_next_config *c, struct lr_error *err)
{
    LR_TRY(check_type(f, err));
    LR_TRY(read_dimensions(f, c, err));
    LR_TRY(check_ratios(f.path, c, err));
    LR_TRY(read_activation(f, c, err));
    c->layer_is_attention = calloc((size_t)c->num_hidden_layers, sizeof *c->layer_is_attention);
    c->layer_is_moe = calloc((size_t)c->num_hidden_layers, sizeof *c->layer_is_moe);
    if (!c->layer_is_attention || !c->layer_is_moe)
        return lr_fail(err, LR_NO_MEMORY, "%s: no memory for %lld layers", f.path, (long long)c->num_hidden_layers);
    LR_TRY(read_layer_types(f, c, err));
    LR_TRY(read_moe_layers(f, c, err));
    struct lr_rope rope;
    LR_TRY(lr_rope_read(f.path, f.object, c->head_dim, 0.25, c->max_position_embeddings, &rope, err));
    c->rotary_dim = rope.rotary_dim;
    c->inv_freq = rope.inv_freq;
    c->rope_attention_factor = rope.attention_factor;
    return read_eos(f, c, err);
}

static enum lr_status
load_object(const char *text, size_t text_bytes, const char *path, json_t **out, struct lr_error *err)
{
    json_error_t why;
    json_t *object = json_loadb(text, text_bytes, JSON_REJECT_DUPLICATES, &why);
    if (!object)
        return lr_fail(err, LR_CORRUPT, "%s is not valid JSON: %s in line %d", path, why.text, why.line);
    if (!json_is_object(object)) {
        json_decref(object);
        return lr_fail(err, LR_CORRUPT, "%s must be a JSON object", path);
    }
    *out = object;
    return LR_OK;
}

enum lr_status lr_qwen3_next_config_parse(
    const char *text, size_t text_bytes, const char *path, struct lr_qwen3_next_config *out, struct lr_error *err)
{
    struct lr_qwen3_next_config config = {0};
    json_t *object;
    LR_TRY(load_object(text, text_bytes, path, &object, err));
    enum lr_status status = read_config((struct lr_json_fields){path, object}, &config, err);
    json_decref(object);
    if (status == LR_OK)
        *out = config;
    else
        lr_qwen3_next_config_free(&config);
    return status;
}

static enum lr_status add_generation_eos(const char *path, struct lr_qwen3_next_config *config, struct lr_error *err)
{
    char *text;
    size_t text_bytes;
    json_t *object;
    if (access(path, F_OK) != 0)
        return LR_OK;
    LR_TRY(lr_file_read(path, max_config_bytes, &text, &text_bytes, err));
    enum lr_status status = load_object(text, text_bytes, path, &object, err);
    free(text);
    LR_TRY(status);
    status = read_eos((struct lr_json_fields){path, object}, config, err);
    json_decref(object);
    return status;
}

enum lr_status lr_qwen3_next_config_load(const char *model_dir, struct lr_qwen3_next_config *out, struct lr_error *err)
{
    char path[PATH_BYTES], *text;
    size_t text_bytes;
    if (snprintf(path, sizeof path, "%s/config.json", model_dir) >= (int)sizeof path)
        return lr_fail(err, LR_INVALID, "the model directory's name is longer than %d bytes", PATH_BYTES);
    LR_TRY(lr_file_read(path, max_config_bytes, &text, &text_bytes, err));
    struct lr_qwen3_next_config config;
    enum lr_status status = lr_qwen3_next_config_parse(text, text_bytes, path, &config, err);
    free(text);
    LR_TRY(status);
    if (snprintf(path, sizeof path, "%s/generation_config.json", model_dir) < (int)sizeof path)
        status = add_generation_eos(path, &config, err);
    if (status == LR_OK)
        *out = config;
    else
        lr_qwen3_next_config_free(&config);
    return status;
}

void lr_qwen3_next_config_free(struct lr_qwen3_next_config *config)
{
    free(config->inv_freq);
    free(config->layer_is_attention);
    free(config->layer_is_moe);
    memset(config, 0, sizeof *config);
}
