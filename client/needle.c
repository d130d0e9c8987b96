/* longreach needle: plant facts in a long document, ask for all of them, draw what was found. */
#include "base/file.h"
#include "base/utf8.h"
#include "client/command.h"
#include "client/needle_plant.h"
#include "client/needle_prompts.h"
#include "client/needle_svg.h"
#include "client/questions.h"
#include "client/reading.h"

#include <ctype.h>
#include <errno.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const size_t max_document_bytes = (size_t)16 << 30;

struct needle {
    struct lr_settings settings;
    const char *document, *svg, *prompts;
    int64_t tokens, n_needles;
    struct lr_job job;
    struct lr_needle *needles; /* [n_needles] worker 0 */
    struct lr_questions questions;
};

/* Worker 0: the text of `tokens` tokens, from the document repeated as often as it takes. */
static enum lr_status take_text(struct needle *n, char **out, size_t *n_out, struct lr_error *err)
{
    char *text, *rest = NULL;
    size_t n_bytes, n_rest = 0;
    struct lr_token_buffer ids = {0};
    LR_TRY(lr_file_read(n->document, max_document_bytes, &text, &n_bytes, err));
    struct lr_error why;
    enum lr_status status = lr_tokenizer_encode(n->job.tokenizer, text, n_bytes, 0, &ids, &why);
    if (status != LR_OK)
        lr_fail(err, status, "the document %s: %s", n->document, why.message);
    else if (ids.n_ids == 0)
        status = lr_fail(err, LR_INVALID, "the document %s is empty", n->document);
    size_t whole = status == LR_OK ? (size_t)(n->tokens / ids.n_ids) : 0;
    if (status == LR_OK)
        status = lr_tokenizer_decode(n->job.tokenizer, ids.ids, n->tokens % ids.n_ids, &rest, &n_rest, err);
    /* a cut inside a character would not be text any more */
    n_rest = rest ? lr_utf8_valid_prefix(rest, n_rest) : 0;
    *out = status == LR_OK ? malloc(whole * n_bytes + n_rest + 1) : NULL;
    if (status == LR_OK && !*out)
        status = lr_fail(err, LR_NO_MEMORY, "no memory for a text of %zu bytes", whole * n_bytes + n_rest);
    for (size_t i = 0; status == LR_OK && i < whole; i++)
        memcpy(*out + i * n_bytes, text, n_bytes);
    if (status == LR_OK && n_rest > 0)
        memcpy(*out + whole * n_bytes, rest, n_rest);
    *n_out = whole * n_bytes + n_rest;
    free(text);
    free(rest);
    free(ids.ids);
    return status;
}

static enum lr_status plant(struct needle *n, char **planted, size_t *n_planted, struct lr_error *err)
{
    char *text;
    size_t n_bytes;
    n->needles = calloc((size_t)n->n_needles, sizeof *n->needles);
    if (!n->needles)
        return lr_fail(err, LR_NO_MEMORY, "no memory for %lld needles", (long long)n->n_needles);
    LR_TRY(take_text(n, &text, &n_bytes, err));
    enum lr_status status = lr_needles_make(text, n_bytes, n->n_needles, (uint64_t)n->settings.seed, n->needles, err);
    if (status == LR_OK)
        status = lr_needles_plant(text, n_bytes, n->needles, n->n_needles, planted, n_planted, err);
    free(text);
    return status;
}

static enum lr_status make_prompts(const struct needle *n, char ***out, struct lr_error *err)
{
    *out = calloc((size_t)n->n_needles, sizeof **out);
    for (int64_t i = 0; *out && i < n->n_needles; i++) {
        char question[128];
        snprintf(question, sizeof question, "What is the %s?", n->needles[i].subject);
        (*out)[i] = lr_fill_template("\nQuestion: {question}\nAnswer: ", question);
        if (!(*out)[i])
            return lr_fail(err, LR_NO_MEMORY, "no memory for %lld questions", (long long)n->n_needles);
    }
    return *out ? LR_OK : lr_fail(err, LR_NO_MEMORY, "no memory for %lld questions", (long long)n->n_needles);
}

/* A file that cannot be written, or that is the document, is no surprise to keep for the end. `path` may be NULL. */
static enum lr_status check_output(const struct needle *n, const char *path, struct lr_error *err)
{
    struct stat out, document;
    if (path && stat(path, &out) == 0 && stat(n->document, &document) == 0 && out.st_dev == document.st_dev &&
        out.st_ino == document.st_ino)
        return lr_fail(err, LR_INVALID, "%s is the document, and would be written over", path);
    FILE *file = path ? fopen(path, "ae") : NULL;
    if (path && !file)
        return lr_fail(err, LR_IO, "%s cannot be written: %s", path, strerror(errno));
    if (file)
        fclose(file);
    return LR_OK;
}

/* Worker 0: the document's ids and the questions; both as text where --prompts asks for it. */
static enum lr_status prepare(struct needle *n, struct lr_token_buffer *document, char ***prompts, struct lr_error *err)
{
    char *text = NULL;
    size_t n_bytes = 0;
    LR_TRY(check_output(n, n->svg, err));
    LR_TRY(check_output(n, n->prompts, err));
    enum lr_status status = plant(n, &text, &n_bytes, err);
    if (status == LR_OK)
        status = lr_tokenizer_encode(n->job.tokenizer, text, n_bytes, 0, document, err);
    if (status == LR_OK)
        status = make_prompts(n, prompts, err);
    if (status == LR_OK && n->prompts)
        status = lr_needle_prompts_write(n->prompts, text, n_bytes, document->n_ids, n->needles, *prompts, n->n_needles,
                                         err);
    free(text);
    return status;
}

/* The answer's first word without its full stop. */
static void first_word(const char *text, char *out, size_t size_bytes)
{
    size_t at = 0;
    text += strspn(text, " \t\n");
    while (at + 1 < size_bytes && isalnum((unsigned char)text[at])) {
        out[at] = text[at];
        at++;
    }
    out[at] = '\0';
}

static int is_found(const struct needle *n, int64_t i)
{
    char got[32], expected[32];
    first_word(n->questions.texts[i], got, sizeof got);
    snprintf(expected, sizeof expected, "%lld", (long long)n->needles[i].value);
    return strcmp(got, expected) == 0;
}

struct needle_result {
    int64_t n_tokens, n_found;
    double density;
    int64_t peak_rss[LR_COMM_MAX_WORKERS], expert_rows[LR_COMM_MAX_WORKERS];
    struct lr_memory_use memory[LR_COMM_MAX_WORKERS];
};

static void print_table(const struct needle *n, const struct needle_result *r)
{
    printf("%8s  %-40s %8s  %s\n", "depth", "fact", "expected", "got");
    for (int64_t i = 0; i < n->n_needles; i++) {
        char got[24];
        first_word(n->questions.texts[i], got, sizeof got);
        printf("%7.2f%%  %-40s %8lld  %-10s %s\n", 100.0 * n->needles[i].depth, n->needles[i].subject,
               (long long)n->needles[i].value, got, is_found(n, i) ? "found" : "MISSED");
    }
    printf("\n%lld of %lld found in %s tokens, %s attention, density %.5f\n", (long long)r->n_found,
           (long long)n->n_needles, lr_number_text(r->n_tokens), lr_attention_text(&n->job), r->density);
    printf("read in %s (%s tokens/s), asked in %s\n", lr_duration_text(n->job.prefill_seconds),
           lr_number_text((int64_t)((double)r->n_tokens / n->job.prefill_seconds)),
           lr_duration_text(n->questions.decode_seconds));
    printf("%s\n", lr_memory_text(&n->job, r->memory));
    int64_t rows = 0;
    for (int w = 0; w < n->job.comm->size; w++)
        rows += r->expert_rows[w];
    for (int w = 0; w < n->job.comm->size; w++) {
        printf("worker %d: %s at most", w, lr_bytes_text(r->peak_rss[w]));
        if (rows > 0)
            printf(", %.1f %% of the experts' rows", 100.0 * (double)r->expert_rows[w] / (double)rows);
        putchar('\n');
    }
}

static void print_json(const struct needle *n, const struct needle_result *r)
{
    json_t *memory = json_array(), *load = json_array();
    for (int64_t i = 0; i < n->n_needles; i++) {
        char got[24];
        first_word(n->questions.texts[i], got, sizeof got);
        json_t *line =
            json_pack("{s:f, s:s, s:I, s:s, s:b}", "depth", n->needles[i].depth, "fact", n->needles[i].subject,
                      "expected", (json_int_t)n->needles[i].value, "got", got, "found", is_found(n, i));
        char *text = json_dumps(line, JSON_COMPACT | JSON_REAL_PRECISION(9));
        puts(text ? text : "");
        free(text);
        json_decref(line);
    }
    for (int w = 0; w < n->job.comm->size; w++) {
        json_array_append_new(memory, json_integer(r->peak_rss[w]));
        json_array_append_new(load, json_integer(r->expert_rows[w]));
    }
    json_t *summary = json_pack("{s:{s:I, s:I, s:I, s:i, s:s, s:f, s:f, s:f, s:o, s:o, s:o}}", "summary",
                                "document_tokens", (json_int_t)r->n_tokens, "needles", (json_int_t)n->n_needles,
                                "found", (json_int_t)r->n_found, "workers", n->job.comm->size, "attention",
                                lr_attention_text(&n->job), "attention_density", r->density, "prefill_seconds",
                                n->job.prefill_seconds, "decode_seconds", n->questions.decode_seconds, "peak_rss_bytes",
                                memory, "expert_rows", load, "memory", lr_memory_json(r->memory, n->job.comm->size));
    char *text = json_dumps(summary, JSON_COMPACT | JSON_REAL_PRECISION(9));
    puts(text ? text : "");
    free(text);
    json_decref(summary);
}

static enum lr_status draw(const struct needle *n, const struct needle_result *r, struct lr_error *err)
{
    struct lr_svg_point *points = calloc((size_t)n->n_needles, sizeof *points);
    if (!points)
        return lr_fail(err, LR_NO_MEMORY, "no memory for the picture");
    for (int64_t i = 0; i < n->n_needles; i++)
        points[i] = (struct lr_svg_point){n->needles[i].depth, is_found(n, i), n->needles[i].subject};
    char title[160];
    snprintf(title, sizeof title, "%lld of %lld facts found in %s tokens, %s attention, %d worker%s",
             (long long)r->n_found, (long long)n->n_needles, lr_number_text(r->n_tokens), lr_attention_text(&n->job),
             n->job.comm->size, n->job.comm->size == 1 ? "" : "s");
    enum lr_status status = lr_svg_write(n->svg, title, r->n_tokens, points, n->n_needles, err);
    free(points);
    if (status == LR_OK && !n->settings.json)
        printf("picture: %s\n", n->svg);
    return status;
}

static enum lr_status report(struct needle *n, int64_t n_tokens, struct lr_error *err)
{
    struct needle_result r = {.n_tokens = n_tokens};
    LR_TRY(lr_session_density(n->job.session, &r.density, err));
    LR_TRY(lr_job_peak_rss(&n->job, r.peak_rss, err));
    LR_TRY(lr_job_expert_rows(&n->job, r.expert_rows, err));
    LR_TRY(lr_job_memory(&n->job, r.memory, err));
    enum lr_status mine = LR_OK;
    if (n->job.comm->rank == 0) {
        for (int64_t i = 0; i < n->n_needles; i++)
            r.n_found += is_found(n, i);
        (n->settings.json ? print_json : print_table)(n, &r);
        if (n->svg)
            mine = draw(n, &r, err);
    }
    return lr_agree(n->job.comm, mine, err);
}

static enum lr_status work_on(struct needle *n, struct lr_token_buffer *document, struct lr_error *err)
{
    struct lr_reading reading = {.settings = &n->settings};
    char **prompts = NULL;
    enum lr_status mine = LR_OK;
    struct lr_job_document planned = {
        .n_ids = n->tokens, .max_forks = 1, .max_fork_tokens = n->settings.max_new_tokens};
    LR_TRY(lr_job_check_memory(&n->job, &planned, err));
    lr_signals_phase("planting the facts");
    if (n->job.comm->rank == 0)
        mine = prepare(n, document, &prompts, err);
    LR_TRY(lr_questions_share(&n->job, &n->questions, n->n_needles, prompts, mine, err));
    LR_TRY(lr_reading_run(&reading, &n->job, document, lr_questions_side_by_side(&n->questions),
                          lr_questions_fork_tokens(&n->questions, &n->settings), err));
    struct lr_progress progress;
    lr_progress_begin(&progress, n->job.comm->rank == 0 && !n->settings.quiet, lr_world_terminal_columns(), "asking",
                      "questions", n->n_needles);
    enum lr_status status = lr_questions_ask(&n->job, &n->questions, &n->settings, &progress, err);
    lr_progress_end(&progress);
    LR_TRY(status);
    return report(n, reading.n_tokens, err);
}

static enum lr_status work(void *context, struct lr_comm *comm, struct lr_error *err)
{
    struct needle *n = context;
    struct lr_token_buffer document = {0};
    struct lr_job_options options = lr_settings_job(&n->settings, comm);
    lr_signals_phase("loading the model");
    LR_TRY(lr_job_open(&n->job, &options, comm, 1, err));
    enum lr_status status = work_on(n, &document, err);
    lr_questions_free(&n->questions);
    free(n->needles);
    free(document.ids);
    lr_job_close(&n->job);
    return status;
}

int lr_command_needle(int argc, char **argv)
{
    static const struct lr_command_text text = {
        .usage = "needle --model DIR --document FILE --tokens N --needles K [OPTIONS]",
        .summary =
            "Plants K facts at random depths of N tokens of the document (repeated where it is shorter), asks for "
            "each from a fork of the state behind it, and shows which came back.",
        .examples = "  longreach needle --model models/longreach-tiny --document data/kjv.txt --tokens 1000000 \\\n"
                    "      --needles 32 --seed 1 --workers 2 --svg needle.svg\n"};
    struct needle n = {.settings = lr_settings_default, .tokens = 131072, .n_needles = 32};
    n.settings.max_new_tokens = 16;
    struct lr_option options[LR_MAX_OPTIONS] = {
        {.kind = LR_OPTION_TEXT,
         .name = "document",
         .argument = "FILE",
         .out = &n.document,
         .help = "the text that the facts are planted in"},
        {.kind = LR_OPTION_INTEGER,
         .name = "tokens",
         .argument = "N",
         .out = &n.tokens,
         .lowest = 1,
         .highest = (int64_t)1 << 40,
         .help = "how much of it is read (default 131072)"},
        {.kind = LR_OPTION_INTEGER,
         .name = "needles",
         .argument = "K",
         .out = &n.n_needles,
         .lowest = 1,
         .highest = 1000,
         .help = "facts (default 32)"},
        {.kind = LR_OPTION_TEXT, .name = "svg", .argument = "FILE", .out = &n.svg, .help = "draws depth against found"},
        {.kind = LR_OPTION_TEXT,
         .name = "prompts",
         .argument = "FILE",
         .out = &n.prompts,
         .help = "writes document and questions as JSON, for other engines"}};
    int n_options = 5, n_operands;
    lr_settings_options(&n.settings, 1, options, &n_options);
    int code = lr_command_parse(&text, options, n_options, &n.settings.help, argc, argv, NULL, 0, &n_operands);
    if (code >= 0)
        return code;
    if (!n.settings.model || !n.document)
        return lr_command_usage("needle", "--model and --document are needed");
    static const char *default_stops[] = {".", "\\n"};
    struct lr_texts given = n.settings.stop;
    if (given.n_texts == 0)
        n.settings.stop = (struct lr_texts){default_stops, 2};
    code = lr_command_execute(&n.settings, strcmp(n.document, "-") == 0, argc, argv, work, &n);
    free(given.texts);
    return code;
}
