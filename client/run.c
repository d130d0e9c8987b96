/* longreach run: read a document once, answer questions from forks of its state. */
#include "base/file.h"
#include "base/utf8.h"
#include "client/command.h"
#include "client/questions.h"
#include "client/reading.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_QUESTIONS = 1 << 20 };
static const size_t max_questions_bytes = (size_t)256 << 20;

struct run {
    struct lr_settings settings;
    const char *document, *questions_file, *template;
    struct lr_texts question;
    struct lr_job job;
    struct lr_questions questions;
    char **asked; /* worker 0: [questions.n_questions] without their template; owned */
};

static enum lr_status add_question(struct run *run, char ***prompts, int64_t *n, const char *text, struct lr_error *err)
{
    char **more = realloc(*prompts, (size_t)(*n + 1) * sizeof *more);
    *prompts = more ? more : *prompts;
    char **asked = realloc(run->asked, (size_t)(*n + 1) * sizeof *asked);
    run->asked = asked ? asked : run->asked;
    char *pattern = lr_unescape(run->template);
    char *copy = strdup(text), *prompt = pattern ? lr_fill_template(pattern, text) : NULL;
    free(pattern);
    if (!more || !asked || !copy || !prompt) {
        free(copy);
        free(prompt);
        return lr_fail(err, LR_NO_MEMORY, "no memory for %lld questions", (long long)*n + 1);
    }
    run->asked[*n] = copy;
    (*prompts)[(*n)++] = prompt;
    return LR_OK;
}

/* One question a line; empty lines are none. */
static enum lr_status read_questions_file(struct run *run, char ***prompts, int64_t *n, struct lr_error *err)
{
    char *text;
    size_t n_bytes;
    LR_TRY(lr_file_read(run->questions_file, max_questions_bytes, &text, &n_bytes, err));
    enum lr_status status = LR_OK;
    size_t valid = lr_utf8_valid_prefix(text, n_bytes);
    if (valid < n_bytes)
        status = lr_fail(err, LR_INVALID, "%s is not valid UTF-8 at byte %zu", run->questions_file, valid);
    else if (memchr(text, '\0', n_bytes))
        status = lr_fail(err, LR_INVALID, "%s has a NUL byte", run->questions_file);
    char *save = NULL;
    for (char *line = status == LR_OK ? strtok_r(text, "\r\n", &save) : NULL; line && status == LR_OK;
         line = strtok_r(NULL, "\r\n", &save))
        if (line[strspn(line, " \t")] != '\0')
            status = *n < MAX_QUESTIONS ? add_question(run, prompts, n, line, err)
                                        : lr_fail(err, LR_INVALID, "%s has more than %d questions", run->questions_file,
                                                  MAX_QUESTIONS);
    free(text);
    if (status == LR_OK && *n == 0)
        status = lr_fail(err, LR_INVALID, "%s has no question", run->questions_file);
    return status;
}

static enum lr_status collect_questions(struct run *run, char ***prompts, int64_t *n, struct lr_error *err)
{
    for (int i = 0; i < run->question.n_texts; i++)
        LR_TRY(add_question(run, prompts, n, run->question.texts[i], err));
    return run->questions_file ? read_questions_file(run, prompts, n, err) : LR_OK;
}

static void print_json_line(json_t *object)
{
    char *text = json_dumps(object, JSON_COMPACT | JSON_REAL_PRECISION(9));
    if (text)
        puts(text);
    free(text);
    json_decref(object);
}

/* What the whole run took. */
struct run_totals {
    double density;
    int64_t peak_rss[LR_COMM_MAX_WORKERS];
    struct lr_memory_use memory[LR_COMM_MAX_WORKERS];
};

static void print_json(const struct run *run, int64_t document_tokens, const struct run_totals *totals)
{
    const struct lr_questions *q = &run->questions;
    for (int64_t i = 0; i < q->n_questions; i++)
        print_json_line(json_pack("{s:s, s:s, s:I, s:I, s:I}", "question", run->asked[i], "answer", q->texts[i],
                                  "prompt_tokens", (json_int_t)(document_tokens + q->n_ids[i]), "cached_tokens",
                                  (json_int_t)document_tokens, "generated_tokens",
                                  (json_int_t)q->answers[i].n_generated));
    json_t *memory = json_array();
    for (int r = 0; r < run->job.comm->size; r++)
        json_array_append_new(memory, json_integer(totals->peak_rss[r]));
    print_json_line(json_pack("{s:{s:I, s:i, s:s, s:f, s:f, s:f, s:o, s:o}}", "summary", "document_tokens",
                              (json_int_t)document_tokens, "workers", run->job.comm->size, "attention",
                              lr_attention_text(&run->job), "attention_density", totals->density, "prefill_seconds",
                              run->job.prefill_seconds, "decode_seconds", q->decode_seconds, "peak_rss_bytes", memory,
                              "memory", lr_memory_json(totals->memory, run->job.comm->size)));
}

static void print_table(const struct run *run, int64_t document_tokens, const struct run_totals *totals)
{
    const struct lr_questions *q = &run->questions;
    int64_t generated = 0, most = 0;
    for (int64_t i = 0; i < q->n_questions; i++) {
        printf("%s\n    %s\n", run->asked[i], q->texts[i]);
        generated += q->answers[i].n_generated;
    }
    for (int r = 0; r < run->job.comm->size; r++)
        most = totals->peak_rss[r] > most ? totals->peak_rss[r] : most;
    printf("\n%s tokens read in %s (%s tokens/s), %s attention, density %.4f\n", lr_number_text(document_tokens),
           lr_duration_text(run->job.prefill_seconds),
           lr_number_text((int64_t)((double)document_tokens / run->job.prefill_seconds)), lr_attention_text(&run->job),
           totals->density);
    printf("%s question%s answered with %s token%s in %s; %d worker%s, at most %s each\n",
           lr_number_text(q->n_questions), q->n_questions == 1 ? "" : "s", lr_number_text(generated),
           generated == 1 ? "" : "s", lr_duration_text(q->decode_seconds), run->job.comm->size,
           run->job.comm->size == 1 ? "" : "s", lr_bytes_text(most));
    printf("%s\n", lr_memory_text(&run->job, totals->memory));
}

static enum lr_status report(struct run *run, int64_t document_tokens, struct lr_error *err)
{
    struct run_totals totals;
    LR_TRY(lr_session_density(run->job.session, &totals.density, err));
    LR_TRY(lr_job_peak_rss(&run->job, totals.peak_rss, err));
    LR_TRY(lr_job_memory(&run->job, totals.memory, err));
    if (run->job.comm->rank == 0)
        (run->settings.json ? print_json : print_table)(run, document_tokens, &totals);
    return LR_OK;
}

static enum lr_status work_on(struct run *run, struct lr_token_buffer *document, struct lr_error *err)
{
    struct lr_job *job = &run->job;
    struct lr_reading reading = {.settings = &run->settings};
    char **prompts = NULL;
    int64_t n = 0;
    enum lr_status mine = LR_OK;
    if (job->comm->rank == 0) {
        mine = lr_read_document(job, run->document, &run->settings, document, err);
        if (mine == LR_OK)
            mine = collect_questions(run, &prompts, &n, err);
    }
    LR_TRY(lr_questions_share(job, &run->questions, n, prompts, mine, err));
    LR_TRY(lr_reading_run(&reading, job, document, lr_questions_side_by_side(&run->questions),
                          lr_questions_fork_tokens(&run->questions, &run->settings), err));
    struct lr_progress progress;
    lr_progress_begin(&progress, job->comm->rank == 0 && !run->settings.quiet && !run->settings.json,
                      lr_world_terminal_columns(), "answering", "questions", run->questions.n_questions);
    enum lr_status status = lr_questions_ask(job, &run->questions, &run->settings, &progress, err);
    lr_progress_end(&progress);
    LR_TRY(status);
    return report(run, reading.n_tokens, err);
}

static enum lr_status work(void *context, struct lr_comm *comm, struct lr_error *err)
{
    struct run *run = context;
    struct lr_token_buffer document = {0};
    struct lr_job_options options = lr_settings_job(&run->settings, comm);
    lr_signals_phase("loading the model");
    LR_TRY(lr_job_open(&run->job, &options, comm, 1, err));
    enum lr_status status = work_on(run, &document, err);
    if (run->asked)
        for (int64_t i = 0; i < run->questions.n_questions; i++)
            free(run->asked[i]);
    free(run->asked);
    lr_questions_free(&run->questions);
    free(document.ids);
    lr_job_close(&run->job);
    return status;
}

int lr_command_run(int argc, char **argv)
{
    static const struct lr_command_text text = {
        .usage = "run --model DIR --document FILE|- (--questions FILE | --question TEXT ...) [OPTIONS]",
        .summary = "Reads a document once and answers every question from a fork of the state behind it.",
        .examples =
            "  longreach run --model models/longreach-tiny --document book.txt \\\n"
            "      --question 'What is the access code of silver window?' --workers 2\n"
            "  pdftotext report.pdf - | longreach run --model DIR --document - --questions q.txt --json\n"
            "  mpirun --hostfile hosts -np 16 longreach run --model DIR --document book.txt --questions q.txt\n"};
    struct run run = {.settings = lr_settings_default, .template = "\\nQuestion: {question}\\nAnswer: "};
    struct lr_option options[LR_MAX_OPTIONS] = {
        {.kind = LR_OPTION_TEXT,
         .name = "document",
         .argument = "FILE",
         .out = &run.document,
         .help = "the document, UTF-8 text; - is standard input"},
        {.kind = LR_OPTION_TEXTS,
         .name = "question",
         .argument = "TEXT",
         .out = &run.question,
         .help = "a question; may be repeated"},
        {.kind = LR_OPTION_TEXT,
         .name = "questions",
         .argument = "FILE",
         .out = &run.questions_file,
         .help = "questions, one a line"},
        {.kind = LR_OPTION_TEXT,
         .name = "template",
         .argument = "TEXT",
         .out = &run.template,
         .help = "what a question becomes, default '\\nQuestion: {question}\\nAnswer: '"}};
    int n_options = 4, n_operands;
    lr_settings_options(&run.settings, 1, options, &n_options);
    int code = lr_command_parse(&text, options, n_options, &run.settings.help, argc, argv, NULL, 0, &n_operands);
    if (code >= 0)
        return code;
    if (!run.settings.model || !run.document)
        return lr_command_usage("run", "--model and --document are needed");
    if (!run.questions_file && run.question.n_texts == 0)
        return lr_command_usage("run", "a --question or --questions is needed");
    if (!strstr(run.template, "{question}"))
        return lr_command_usage("run", "--template has no {question}");
    code = lr_command_execute(&run.settings, strcmp(run.document, "-") == 0, argc, argv, work, &run);
    free(run.question.texts);
    free(run.settings.stop.texts);
    return code;
}
