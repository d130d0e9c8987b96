/* Any bytes as config.json: refused with a sentence, or every field in its range and none contradicts another. */
#include "tests/fuzz/fuzz.h"
#include "worker/models/qwen3_next_config.h"

#include <math.h>

static const char path[] = "hostile/config.json";

static void check_rope(const struct lr_qwen3_next_config *c)
{
    require(c->rotary_dim >= 0 && c->rotary_dim <= c->head_dim && c->rotary_dim % 2 == 0, "rotary components");
    for (int64_t j = 0; j < c->rotary_dim / 2; j++)
        require(isfinite(c->inv_freq[j]) && c->inv_freq[j] > 0.0, "a frequency that is no positive number");
    require(isfinite(c->rope_attention_factor) && c->rope_attention_factor >= 0.0, "the rope's attention factor");
}

static void check_config(const struct lr_qwen3_next_config *c)
{
    require(c->hidden_size >= 1 && c->vocab_size >= 1 && c->num_hidden_layers >= 1, "an empty model");
    require(c->num_attention_heads % c->num_key_value_heads == 0, "query heads that key-value heads do not divide");
    require(c->num_attention_heads / c->num_key_value_heads <= LR_MAX_GROUP, "a group larger than the kernels take");
    require(c->linear_num_value_heads % c->linear_num_key_heads == 0, "value heads that key heads do not divide");
    require(c->head_dim >= 1 && c->head_dim <= LR_MAX_HEAD_DIM, "head_dim");
    require(c->linear_key_head_dim >= 1 && c->linear_key_head_dim <= LR_MAX_DELTA_DIM, "linear_key_head_dim");
    require(c->linear_value_head_dim >= 1 && c->linear_value_head_dim <= LR_MAX_DELTA_DIM, "linear_value_head_dim");
    require(c->linear_conv_kernel_dim >= 1 && c->linear_conv_kernel_dim <= LR_MAX_CONV_TAPS, "linear_conv_kernel_dim");
    require(c->num_experts >= 0 && c->num_experts <= LR_MAX_EXPERTS, "num_experts");
    require(c->num_experts == 0 || (c->num_experts_per_tok >= 1 && c->num_experts_per_tok <= c->num_experts), "top-k");
    require(c->rms_norm_eps >= 0.0f && c->rms_norm_eps <= 1.0f, "rms_norm_eps");
    for (int64_t i = 0; i < c->num_hidden_layers; i++) {
        require(c->layer_is_attention[i] == 0 || c->layer_is_attention[i] == 1, "a layer of no kind");
        require(c->layer_is_moe[i] == 0 || (c->layer_is_moe[i] == 1 && c->num_experts > 0), "experts without experts");
    }
    require(c->n_eos_token_ids >= 0 && c->n_eos_token_ids <= LR_MAX_EOS_TOKENS, "eos tokens");
    for (int i = 0; i < c->n_eos_token_ids; i++)
        require(c->eos_token_ids[i] >= 0 && c->eos_token_ids[i] < c->vocab_size, "an eos token out of range");
    check_rope(c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct lr_qwen3_next_config config;
    struct lr_error why = {0};
    enum lr_status status = lr_qwen3_next_config_parse((const char *)data, size, path, &config, &why);
    if (status != LR_OK) {
        require(status == LR_CORRUPT || status == LR_UNSUPPORTED, "an unexpected status");
        require_sentence(status, &why, path);
        return 0;
    }
    check_config(&config);
    lr_qwen3_next_config_free(&config);
    return 0;
}
