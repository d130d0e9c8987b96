#include "client/settings.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const isa_choices[] = {"auto", "v4", "v3", "c", NULL};
static const char *const attention_choices[] = {"auto", "full", "sparse", NULL};
static const char *const experts_choices[] = {"auto", "sharded", "replicated", NULL};
static const char *const kv_choices[] = {"auto", "f32", "bf16", "f16", NULL};
static const char *const act_choices[] = {"auto", "bf16", "f16", NULL};
static const char *const device_choices[] = {"auto", "cpu", "cuda", NULL};
static const char *const transport_choices[] = {"auto", "nccl", "mpi", NULL};

const struct lr_settings lr_settings_default = {
    .top_p = 1.0,
    .max_new_tokens = 64,
    .timeout_seconds = 120,
};

void lr_settings_options(struct lr_settings *s, int generates, struct lr_option *rows, int *n)
{
    const struct lr_option cluster[] = {
        {.kind = LR_OPTION_HEADING, .help = "Cluster"},
        {.kind = LR_OPTION_TEXT,
         .name = "model",
         .argument = "DIR",
         .out = &s->model,
         .help = "a HuggingFace directory of type qwen3_next: config.json, *.safetensors, tokenizer.json"},
        {.kind = LR_OPTION_INTEGER,
         .name = "workers",
         .argument = "N",
         .out = &s->workers,
         .lowest = 1,
         .highest = LR_COMM_MAX_WORKERS,
         .help = "workers that share the document (default 1); under mpirun the world's size is taken"},
        {.kind = LR_OPTION_CHOICE,
         .name = "device",
         .argument = "NAME",
         .out = &s->device,
         .choices = device_choices,
         .help = "auto (cuda where every worker has a GPU), cpu or cuda; workers of a host take its GPUs in turn"},
        {.kind = LR_OPTION_CHOICE,
         .name = "transport",
         .argument = "NAME",
         .out = &s->transport,
         .choices = transport_choices,
         .help = "between GPUs: nccl, mpi (through host memory) or auto: nccl where every worker has a GPU of its own"},
        {.kind = LR_OPTION_CHOICE,
         .name = "act-dtype",
         .argument = "TYPE",
         .out = &s->act,
         .choices = act_choices,
         .help = "activations and weights on GPUs: f16 (default: more digits) or bf16 (for values beyond 65504)"},
        {.kind = LR_OPTION_INTEGER,
         .name = "threads",
         .argument = "N",
         .out = &s->threads,
         .lowest = 1,
         .highest = 1024,
         .help = "threads of each worker (default: the host's cores divided by its workers)"},
        {.kind = LR_OPTION_CHOICE,
         .name = "experts",
         .argument = "WHERE",
         .out = &s->experts,
         .choices = experts_choices,
         .help = "auto, sharded (each worker keeps its share, tokens travel) or replicated; the answers are the same"},
        {.kind = LR_OPTION_CHOICE,
         .name = "isa",
         .argument = "NAME",
         .out = &s->isa,
         .choices = isa_choices,
         .help = "auto, v4 (AVX-512), v3 (AVX2) or c (plain C); the answers are the same"},
        {.kind = LR_OPTION_INTEGER,
         .name = "timeout",
         .argument = "SECONDS",
         .out = &s->timeout_seconds,
         .lowest = 1,
         .highest = 86400,
         .help = "how long a worker waits for another before the run ends (default 120)"},
        {.kind = LR_OPTION_HEADING, .help = "Document"},
        {.kind = LR_OPTION_CHOICE,
         .name = "attention",
         .argument = "MODE",
         .out = &s->attention,
         .choices = attention_choices,
         .help = "full (exact), sparse (128 first tokens and a window of 1024) or auto: full up to 131072 tokens"},
        {.kind = LR_OPTION_INTEGER,
         .name = "top-k-blocks",
         .argument = "N",
         .out = &s->top_k_blocks,
         .lowest = 0,
         .highest = LR_MAX_TOP_K,
         .help = "sparse: N further blocks of 128 tokens for each query block (default 0)"},
        {.kind = LR_OPTION_INTEGER,
         .name = "decode-pages",
         .argument = "N",
         .out = &s->decode_pages,
         .lowest = 0,
         .highest = 1 << 20,
         .help = "questions read the N best blocks of 128 tokens only (default 0: everything)"},
        {.kind = LR_OPTION_CHOICE,
         .name = "kv-dtype",
         .argument = "TYPE",
         .out = &s->kv_dtype,
         .choices = kv_choices,
         .help = "f32, bf16 (half the memory for keys and values) or auto: f32 on the CPU; on GPUs the type of the "
                 "activations"},
        {.kind = LR_OPTION_SIZE,
         .name = "kv-device-memory",
         .argument = "SIZE",
         .out = &s->kv_device_bytes,
         .lowest = 1,
         .highest = INT64_MAX,
         .help = "what the document's keys and values may take of each worker's GPU, as 800M or 24G (default: what is "
                 "free); the rest of them lies in host memory. On the CPU both are the host's"},
        {.kind = LR_OPTION_SIZE,
         .name = "kv-host-memory",
         .argument = "SIZE",
         .out = &s->kv_host_bytes,
         .lowest = 1,
         .highest = INT64_MAX,
         .help = "what that rest may take of the host's memory, a worker (default: what is free)"},
        {.kind = LR_OPTION_INTEGER,
         .name = "segment-tokens",
         .argument = "N",
         .out = &s->segment_tokens,
         .lowest = LR_MIN_SEGMENT_TOKENS,
         .highest = LR_MAX_SEGMENT_TOKENS,
         .help = "tokens of a segment, a power of two (default 4096, on GPUs 65536); another one gives slightly other "
                 "numbers"},
        {.kind = LR_OPTION_FLAG,
         .name = "parse-special",
         .out = &s->parse_special,
         .help = "texts like <|endoftext|> in the document become that token"},
    };
    const struct lr_option sampling[] = {
        {.kind = LR_OPTION_HEADING, .help = "Answers"},
        {.kind = LR_OPTION_INTEGER,
         .name = "max-new-tokens",
         .argument = "N",
         .out = &s->max_new_tokens,
         .lowest = 1,
         .highest = 1 << 20,
         .help = "tokens of an answer at most (default 64)"},
        {.kind = LR_OPTION_REAL,
         .name = "temperature",
         .argument = "T",
         .out = &s->temperature,
         .low = 0.0,
         .high = 100.0,
         .help = "0 (default) takes the likeliest token"},
        {.kind = LR_OPTION_INTEGER,
         .name = "top-k",
         .argument = "N",
         .out = &s->top_k,
         .lowest = 0,
         .highest = 1 << 24,
         .help = "sample among the N likeliest tokens (default 0: all)"},
        {.kind = LR_OPTION_REAL,
         .name = "top-p",
         .argument = "P",
         .out = &s->top_p,
         .low = 0.0,
         .high = 1.0,
         .help = "sample among the likeliest tokens whose probabilities reach P (default 1)"},
        {.kind = LR_OPTION_INTEGER,
         .name = "seed",
         .argument = "N",
         .out = &s->seed,
         .lowest = 0,
         .highest = INT64_MAX,
         .help = "of the random numbers (default 0)"},
        {.kind = LR_OPTION_TEXTS,
         .name = "stop",
         .argument = "TEXT",
         .out = &s->stop,
         .help = "end an answer before this text; may be repeated"},
    };
    const struct lr_option output[] = {
        {.kind = LR_OPTION_HEADING, .help = "Output"},
        {.kind = LR_OPTION_FLAG, .name = "json", .out = &s->json, .help = "one JSON object a line"},
        {.kind = LR_OPTION_FLAG, .name = "quiet", .out = &s->quiet, .help = "no progress on standard error"},
        {.kind = LR_OPTION_FLAG, .name = "help", .out = &s->help, .help = "this text"},
    };
    memcpy(rows + *n, cluster, sizeof cluster);
    *n += (int)(sizeof cluster / sizeof cluster[0]);
    if (generates) {
        memcpy(rows + *n, sampling, sizeof sampling);
        *n += (int)(sizeof sampling / sizeof sampling[0]);
    }
    memcpy(rows + *n, output, sizeof output);
    *n += (int)(sizeof output / sizeof output[0]);
}

int lr_usable_cores(void)
{
    cpu_set_t set;
    int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "r");
    long long quota, period;
    if (file && fscanf(file, "%lld %lld", &quota, &period) == 2 && quota > 0 && period > 0) {
        long long whole = (quota + period - 1) / period;
        cores = whole < cores ? (int)whole : cores;
    }
    if (file)
        fclose(file);
    return cores > 0 ? cores : 1;
}

/* Where ranks are bound to cores of their own, those are theirs; where all may run anywhere, they divide them. */
static int default_threads(const struct lr_comm *comm)
{
    int cores = lr_usable_cores(), workers = comm->host_workers > 0 ? comm->host_workers : 1;
    cpu_set_t set;
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    int bound = sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) < online && workers > 1;
    int threads = bound ? cores : cores / workers;
    return threads > 0 ? threads : 1;
}

struct lr_job_options lr_settings_job(const struct lr_settings *s, const struct lr_comm *comm)
{
    static const enum lr_isa isas[] = {LR_ISA_AUTO, LR_ISA_V4, LR_ISA_V3, LR_ISA_C};
    static const enum lr_attention_choice attentions[] = {LR_CHOOSE_AUTO, LR_CHOOSE_FULL, LR_CHOOSE_SPARSE};
    static const enum lr_experts_placement placements[] = {LR_EXPERTS_AUTO, LR_EXPERTS_SHARDED, LR_EXPERTS_REPLICATED};
    int threads = s->threads > 0 ? (int)s->threads : default_threads(comm);
    int crowded = threads * (comm->host_workers > 0 ? comm->host_workers : 1) > lr_usable_cores();
    return (struct lr_job_options){
        .model_dir = s->model,
        .n_threads = threads,
        .spin_us = crowded ? 0 : 50,
        .device = (enum lr_device)s->device,
        .transport = (enum lr_transport)s->transport,
        .act = (enum lr_act_choice)s->act,
        .isa = isas[s->isa],
        .experts = placements[s->experts],
        .attention = attentions[s->attention],
        .kv_dtype = (enum lr_kv_choice)s->kv_dtype,
        .segment_tokens = s->segment_tokens,
        .top_k_blocks = s->top_k_blocks,
        .decode_pages = s->decode_pages,
        .kv_device_bytes = s->kv_device_bytes,
        .kv_host_bytes = s->kv_host_bytes,
    };
}

struct lr_sampling lr_settings_sampling(const struct lr_settings *s)
{
    return (struct lr_sampling){.temperature = (float)s->temperature,
                                .top_k = (int32_t)s->top_k,
                                .top_p = (float)s->top_p,
                                .seed = (uint64_t)s->seed};
}

char *lr_unescape(const char *text)
{
    char *out = malloc(strlen(text) + 1), *at = out;
    for (; out && *text; text++) {
        int escaped = text[0] == '\\' && (text[1] == 'n' || text[1] == 't' || text[1] == '\\');
        if (escaped)
            text++;
        *at++ = (char)(!escaped ? *text : *text == 'n' ? '\n' : *text == 't' ? '\t' : '\\');
    }
    if (out)
        *at = '\0';
    return out;
}
