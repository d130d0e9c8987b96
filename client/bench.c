/* longreach bench: tokens a second of prefill and of decoding, for this model on this machine. */
#include "base/clock.h"
#include "client/command.h"
#include "client/questions.h"
#include "client/reading.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LENGTHS = 16 };

struct bench {
    struct lr_settings settings;
    const char *document, *lengths_text;
    int64_t decode_tokens, side_by_side;
    int64_t lengths[MAX_LENGTHS];
    int n_lengths;
    struct lr_job job;
    struct lr_token_buffer ids;
};

struct measured {
    int64_t tokens;
    double prefill_seconds, decode_seconds;
    struct lr_memory_use memory; /* of the worker that took the most */
};

static enum lr_status parse_lengths(struct bench *b, struct lr_error *err)
{
    for (const char *at = b->lengths_text;;) {
        char *end;
        long long length = strtoll(at, &end, 10);
        if (end == at || length < 1 || length > ((int64_t)1 << 40) || b->n_lengths == MAX_LENGTHS ||
            (*end && *end != ','))
            return lr_fail(err, LR_INVALID, "--tokens: '%.40s' is no list of at most %d lengths", at, MAX_LENGTHS);
        b->lengths[b->n_lengths++] = length;
        if (!*end)
            return LR_OK;
        at = end + 1;
    }
}

/* The document's ids, repeated up to the longest length. */
static enum lr_status prepare_ids(struct bench *b, struct lr_error *err)
{
    int64_t longest = 0;
    for (int i = 0; i < b->n_lengths; i++)
        longest = b->lengths[i] > longest ? b->lengths[i] : longest;
    LR_TRY(lr_read_document(&b->job, b->document, &b->settings, &b->ids, err));
    int64_t n = b->ids.n_ids;
    for (int64_t i = n; i < longest; i++)
        LR_TRY(lr_tokens_push(&b->ids, b->ids.ids[i % n], err));
    return LR_OK;
}

/* `side_by_side` forks, each fed decode_tokens tokens one at a time, and the next ones chosen: what generation does. */
static enum lr_status decode(struct bench *b, double *seconds, struct lr_error *err)
{
    int64_t n = b->side_by_side, vocab = b->job.engine.model.dims.vocab;
    struct lr_fork_input *inputs = calloc((size_t)n, sizeof *inputs);
    int32_t *fed = calloc((size_t)n, sizeof *fed), *next = calloc((size_t)n, sizeof *next);
    struct lr_sampling sampling = lr_settings_sampling(&b->settings);
    struct lr_fork_output output = {.next = next, .sampling = &sampling};
    enum lr_status status =
        inputs && fed && next ? LR_OK : lr_fail(err, LR_NO_MEMORY, "no memory for %lld forks", (long long)n);
    for (int64_t i = 0; status == LR_OK && i < n; i++) {
        inputs[i] = (struct lr_fork_input){.ids = &fed[i], .n_ids = 1};
        fed[i] = (int32_t)(i % vocab);
        status = lr_session_fork(b->job.session, &inputs[i].fork, err);
    }
    if (status == LR_OK)
        status = lr_forks_extend(b->job.session, inputs, n, &output, err); /* a first step warms up */
    double begin = lr_clock_seconds();
    for (int64_t t = 0; status == LR_OK && t < b->decode_tokens; t++) {
        for (int64_t i = 0; i < n; i++)
            fed[i] = (int32_t)((fed[i] * 31 + 7 * t + 1) % vocab);
        status = lr_forks_extend(b->job.session, inputs, n, &output, err);
    }
    *seconds = lr_clock_seconds() - begin;
    enum lr_status mine = LR_OK;
    for (int64_t i = 0; status == LR_OK && mine == LR_OK && b->job.comm->rank == 0 && i < n; i++)
        if (next[i] < 0)
            mine = lr_fail_logits(&b->job.engine, lr_fork_position(inputs[i].fork) - 1, err);
    if (status == LR_OK)
        status = lr_agree(b->job.comm, mine, err);
    free(inputs);
    free(fed);
    free(next);
    return status;
}

static void print_line(const struct bench *b, const struct measured *m)
{
    double prefill = (double)m->tokens / m->prefill_seconds;
    double decoded = m->decode_seconds > 0.0 ? (double)(b->decode_tokens * b->side_by_side) / m->decode_seconds : 0.0;
    if (b->settings.json) {
        printf("{\"tokens\":%lld,\"workers\":%d,\"threads\":%d,\"attention\":\"%s\",\"prefill_seconds\":%.6f,"
               "\"prefill_tokens_per_second\":%.1f,\"decode_side_by_side\":%lld,\"decode_tokens_per_second\":%.1f,"
               "\"planned_bytes\":%zu,\"taken_bytes\":%zu,\"host_bytes\":%zu}\n",
               (long long)m->tokens, b->job.comm->size, b->job.options.n_threads, lr_attention_text(&b->job),
               m->prefill_seconds, prefill, (long long)b->side_by_side, decoded, m->memory.planned_bytes,
               m->memory.taken_bytes, m->memory.host_reserved_bytes);
    } else {
        printf("%12s  %-7s %12.3f s %12s/s %12s/s\n", lr_number_text(m->tokens), lr_attention_text(&b->job),
               m->prefill_seconds, lr_number_text((int64_t)prefill), lr_number_text((int64_t)decoded));
    }
    fflush(stdout);
}

static enum lr_status measure(struct bench *b, int64_t length, struct lr_error *err)
{
    struct measured m = {.tokens = length};
    struct lr_token_buffer document = {.ids = b->ids.ids, .n_ids = length};
    struct lr_settings quiet = b->settings;
    quiet.quiet = 1;
    struct lr_reading reading = {.settings = &quiet};
    LR_TRY(lr_reading_run(&reading, &b->job, &document, b->side_by_side, b->decode_tokens + 2, err));
    m.prefill_seconds = b->job.prefill_seconds;
    if (b->decode_tokens > 0)
        LR_TRY(decode(b, &m.decode_seconds, err));
    struct lr_memory_use memory[LR_COMM_MAX_WORKERS];
    LR_TRY(lr_job_memory(&b->job, memory, err));
    for (int r = 0; r < b->job.comm->size; r++)
        if (memory[r].taken_bytes >= m.memory.taken_bytes)
            m.memory = memory[r];
    if (b->job.comm->rank == 0)
        print_line(b, &m);
    lr_session_close(b->job.session);
    b->job.session = NULL;
    return LR_OK;
}

static enum lr_status work_on(struct bench *b, struct lr_error *err)
{
    enum lr_status mine = b->job.comm->rank == 0 ? prepare_ids(b, err) : LR_OK;
    LR_TRY(lr_agree(b->job.comm, mine, err));
    if (b->job.comm->rank == 0 && !b->settings.json)
        printf("%s, %s, %d worker%s of %d thread%s, %lld decoded side by side\n%12s  %-7s %14s %14s %14s\n",
               b->settings.model, b->job.engine.ops->name, b->job.comm->size, b->job.comm->size == 1 ? "" : "s",
               b->job.options.n_threads, b->job.options.n_threads == 1 ? "" : "s", (long long)b->side_by_side, "tokens",
               "mode", "prefill", "prefill", "decode");
    for (int i = 0; i < b->n_lengths; i++)
        LR_TRY(measure(b, b->lengths[i], err));
    return LR_OK;
}

static enum lr_status work(void *context, struct lr_comm *comm, struct lr_error *err)
{
    struct bench *b = context;
    struct lr_job_options options = lr_settings_job(&b->settings, comm);
    lr_signals_phase("loading the model");
    LR_TRY(parse_lengths(b, err));
    LR_TRY(lr_job_open(&b->job, &options, comm, 1, err));
    enum lr_status status = work_on(b, err);
    free(b->ids.ids);
    lr_job_close(&b->job);
    return status;
}

int lr_command_bench(int argc, char **argv)
{
    static const struct lr_command_text text = {
        .usage = "bench --model DIR --document FILE [OPTIONS]",
        .summary = "Measures prefill of the document's first tokens (repeated where it is shorter) and decoding behind "
                   "them.",
        .examples = "  longreach bench --model models/longreach-tiny --document data/kjv.txt --tokens 2048,8192,32768\n"
                    "  longreach bench --model models/longreach-tiny --document data/kjv.txt --tokens 1000000 \\\n"
                    "      --workers 2 --side-by-side 32 --json\n"};
    struct bench b = {
        .settings = lr_settings_default, .lengths_text = "2048,8192,32768", .decode_tokens = 128, .side_by_side = 1};
    struct lr_option options[LR_MAX_OPTIONS] = {{.kind = LR_OPTION_TEXT,
                                                 .name = "document",
                                                 .argument = "FILE",
                                                 .out = &b.document,
                                                 .help = "the text to read"},
                                                {.kind = LR_OPTION_TEXT,
                                                 .name = "tokens",
                                                 .argument = "LIST",
                                                 .out = &b.lengths_text,
                                                 .help = "lengths, with commas (default 2048,8192,32768)"},
                                                {.kind = LR_OPTION_INTEGER,
                                                 .name = "decode",
                                                 .argument = "N",
                                                 .out = &b.decode_tokens,
                                                 .lowest = 0,
                                                 .highest = 100000,
                                                 .help = "tokens decoded behind each (default 128)"},
                                                {.kind = LR_OPTION_INTEGER,
                                                 .name = "side-by-side",
                                                 .argument = "N",
                                                 .out = &b.side_by_side,
                                                 .lowest = 1,
                                                 .highest = 1024,
                                                 .help = "sequences decoded at once (default 1)"}};
    int n_options = 4, n_operands;
    lr_settings_options(&b.settings, 0, options, &n_options);
    int code = lr_command_parse(&text, options, n_options, &b.settings.help, argc, argv, NULL, 0, &n_operands);
    if (code >= 0)
        return code;
    if (!b.settings.model || !b.document)
        return lr_command_usage("bench", "--model and --document are needed");
    return lr_command_execute(&b.settings, 0, argc, argv, work, &b);
}
