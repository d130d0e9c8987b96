/* Any bytes as a config.json: refused with a sentence, or a configuration whose numbers hold together. */
#include "tests/fuzz/fuzz.h"
#include "worker/models/qwen3_next_config.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct lr_qwen3_next_config config;
    struct lr_error err;
    if (lr_qwen3_next_config_parse((const char *)data, size, "input", &config, &err) != LR_OK) {
        if (err.message[0] == '\0')
            abort();
        return 0;
    }
    if (config.num_attention_heads % config.num_key_value_heads != 0 || config.rotary_dim % 2 != 0 ||
        config.rotary_dim > config.head_dim || (config.num_experts > 0 && config.num_experts_per_tok > config.num_experts))
        abort();
    int64_t layers = 0;
    for (int64_t i = 0; i < config.num_hidden_layers; i++)
        layers += config.layer_is_attention[i] <= 1 && config.layer_is_moe[i] <= 1;
    if (layers != config.num_hidden_layers)
        abort();
    lr_qwen3_next_config_free(&config);
    return 0;
}
