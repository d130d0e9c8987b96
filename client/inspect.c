/* longreach inspect: what a model is, and what a document would need. No workers. */
#include "client/command.h"
#include "worker/models/qwen3_next_config.h"
#include "worker/plan.h"
#include "worker/session_impl.h"
#include "worker/weights/checkpoint_dir.h"

#include <stdlib.h>
#include <string.h>

struct inspect {
    const char *model;
    int64_t tokens, workers, questions, segment_tokens, kv_device_bytes;
    int kv_dtype, replicated, help;
};

static void print_layers(const struct lr_qwen3_next_config *c)
{
    printf("layers        %lld:", (long long)c->num_hidden_layers);
    for (int64_t i = 0; i < c->num_hidden_layers; i++)
        printf(" %s%s", c->layer_is_attention[i] ? "attention" : "delta", c->layer_is_moe[i] ? "+experts" : "+dense");
    printf("\n");
}

static void print_model(const char *dir, const struct lr_qwen3_next_config *c, int64_t n_elements, int64_t size_bytes)
{
    printf("model         %s (qwen3_next), vocabulary %s, width %lld\n", dir, lr_number_text(c->vocab_size),
           (long long)c->hidden_size);
    print_layers(c);
    printf("attention     %lld query heads, %lld key-value heads of %lld, %lld rotary components\n",
           (long long)c->num_attention_heads, (long long)c->num_key_value_heads, (long long)c->head_dim,
           (long long)c->rotary_dim);
    printf("delta rule    %lld key heads of %lld, %lld value heads of %lld, convolution of %lld taps\n",
           (long long)c->linear_num_key_heads, (long long)c->linear_key_head_dim, (long long)c->linear_num_value_heads,
           (long long)c->linear_value_head_dim, (long long)c->linear_conv_kernel_dim);
    if (c->num_experts > 0)
        printf("experts       %lld of width %lld, %lld a token; shared expert of width %lld\n",
               (long long)c->num_experts, (long long)c->moe_intermediate_size, (long long)c->num_experts_per_tok,
               (long long)c->shared_expert_intermediate_size);
    printf("parameters    %s in %s of files%s\n", lr_number_text(n_elements), lr_bytes_text(size_bytes),
           c->tie_word_embeddings ? ", head tied to the embedding" : "");
}

static enum lr_status print_plan(const struct inspect *in, const struct lr_qwen3_next_config *c, struct lr_error *err)
{
    const struct lr_kernel_ops *ops;
    struct lr_model_dims dims;
    size_t weight_bytes;
    LR_TRY(lr_kernels_cpu(LR_ISA_AUTO, &ops, err));
    LR_TRY(lr_model_peek(in->model, ops, (int)in->workers, in->replicated, &dims, &weight_bytes, err));
    enum lr_dtype dtype = in->kv_dtype == 1 ? LR_BF16 : LR_F32;
    int64_t kv_token =
        2 * c->num_key_value_heads * c->head_dim * (int64_t)lr_dtype_bytes(dtype) * dims.n_attention_layers;
    printf("state         %s of recurrent state and %s of convolution tails a sequence\n",
           lr_bytes_text((int64_t)(lr_state_floats(&dims) * sizeof(float)) * dims.n_delta_layers),
           lr_bytes_text((int64_t)(lr_tail_elements(&dims) * lr_act_bytes(ops)) * dims.n_delta_layers));
    printf("keys, values  %s a token (%s)\n", lr_bytes_text(kv_token), dtype == LR_BF16 ? "bf16" : "float32");
    struct lr_session_options options = {.segment_tokens = in->segment_tokens,
                                         .attention = LR_ATTENTION_SPARSE,
                                         .window = LR_SPARSE_WINDOW,
                                         .sinks = LR_SPARSE_SINKS,
                                         .kv_dtype = dtype,
                                         .max_tokens = in->tokens,
                                         .max_forks = in->questions,
                                         .max_fork_tokens = 128,
                                         .kv_device_bytes = (size_t)in->kv_device_bytes};
    LR_TRY(lr_session_divide(&dims, ops, (int)in->workers, in->replicated, SIZE_MAX, 0, &options, err));
    struct lr_memory_plan plan;
    lr_session_plan(&dims, ops, weight_bytes, (int)in->workers, in->replicated, &options, &plan);
    printf("\n%s tokens on %lld worker%s, %lld question%s side by side, each worker at most:\n",
           lr_number_text(in->tokens), (long long)in->workers, in->workers == 1 ? "" : "s", (long long)in->questions,
           in->questions == 1 ? "" : "s");
    printf("  weights     %s (experts %s)\n  keys, values %s\n  states      %s\n  questions   %s\n  workspace   %s\n  "
           "together    %s\n",
           lr_bytes_text((int64_t)plan.weights_bytes), in->replicated ? "replicated" : "sharded",
           lr_bytes_text((int64_t)plan.kv_bytes), lr_bytes_text((int64_t)plan.state_bytes),
           lr_bytes_text((int64_t)plan.fork_bytes), lr_bytes_text((int64_t)plan.workspace_bytes),
           lr_bytes_text((int64_t)plan.total_bytes));
    if (plan.host_slabs > 0)
        printf("of them       %s of keys and values in host memory (%lld of %lld segments of each layer), read through "
               "buffers\n              that are part of the %s above\n",
               lr_bytes_text((int64_t)plan.kv_host_bytes), (long long)plan.host_slabs, (long long)plan.slabs,
               lr_bytes_text((int64_t)plan.kv_bytes));
    return LR_OK;
}

static enum lr_status inspect(const struct inspect *in, struct lr_error *err)
{
    struct lr_qwen3_next_config config;
    struct lr_checkpoint *checkpoint = NULL;
    LR_TRY(lr_qwen3_next_config_load(in->model, &config, err));
    enum lr_status status = lr_checkpoint_open(in->model, &checkpoint, err);
    if (status == LR_OK) {
        int64_t n_elements, size_bytes;
        lr_checkpoint_totals(checkpoint, &n_elements, &size_bytes);
        print_model(in->model, &config, n_elements, size_bytes);
        status = print_plan(in, &config, err);
    }
    lr_checkpoint_close(checkpoint);
    lr_qwen3_next_config_free(&config);
    return status;
}

int lr_command_inspect(int argc, char **argv)
{
    static const struct lr_command_text text = {
        .usage = "inspect DIR [--tokens N] [--workers P] [OPTIONS]",
        .summary = "Shows a model's layers, parameters and state, and the memory that a document would need.",
        .examples = "  longreach inspect models/longreach-tiny --tokens 10000000 --workers 2 --kv-dtype bf16\n"
                    "  longreach inspect models/longreach-tiny --segment-tokens 65536 --kv-dtype bf16 "
                    "--kv-device-memory 256M\n"};
    static const char *const kv_choices[] = {"f32", "bf16", NULL};
    struct inspect in = {.tokens = 1000000, .workers = 1, .questions = 1, .segment_tokens = LR_DEFAULT_SEGMENT_TOKENS};
    int n_operands;
    const struct lr_option options[] = {
        {.kind = LR_OPTION_INTEGER,
         .name = "tokens",
         .argument = "N",
         .out = &in.tokens,
         .lowest = 1,
         .highest = (int64_t)1 << 40,
         .help = "tokens of the document (default 1000000)"},
        {.kind = LR_OPTION_INTEGER,
         .name = "workers",
         .argument = "P",
         .out = &in.workers,
         .lowest = 1,
         .highest = LR_COMM_MAX_WORKERS,
         .help = "workers that share it (default 1)"},
        {.kind = LR_OPTION_INTEGER,
         .name = "questions",
         .argument = "N",
         .out = &in.questions,
         .lowest = 0,
         .highest = 1024,
         .help = "questions side by side (default 1)"},
        {.kind = LR_OPTION_CHOICE,
         .name = "kv-dtype",
         .argument = "TYPE",
         .out = &in.kv_dtype,
         .choices = kv_choices,
         .help = "f32 (default) or bf16"},
        {.kind = LR_OPTION_INTEGER,
         .name = "segment-tokens",
         .argument = "N",
         .out = &in.segment_tokens,
         .lowest = LR_MIN_SEGMENT_TOKENS,
         .highest = LR_MAX_SEGMENT_TOKENS,
         .help = "tokens of a segment (default 4096; on GPUs longreach run takes 65536)"},
        {.kind = LR_OPTION_SIZE,
         .name = "kv-device-memory",
         .argument = "SIZE",
         .out = &in.kv_device_bytes,
         .lowest = 1,
         .highest = INT64_MAX,
         .help = "what keys and values may take of a worker's GPU, as 800M or 24G; the rest lies in host memory"},
        {.kind = LR_OPTION_FLAG, .name = "replicated", .out = &in.replicated, .help = "every worker holds all experts"},
        {.kind = LR_OPTION_FLAG, .name = "help", .out = &in.help, .help = "this text"},
    };
    int code = lr_command_parse(&text, options, sizeof options / sizeof options[0], &in.help, argc, argv, &in.model, 1,
                                &n_operands);
    if (code >= 0)
        return code;
    if (n_operands != 1)
        return lr_command_usage("inspect", "a model directory is needed");
    struct lr_error err;
    return lr_command_report(inspect(&in, &err), &err);
}
