#include "client/questions.h"

#include "base/clock.h"
#include "base/utf8.h"
#include "client/signals.h"

#include <stdlib.h>
#include <string.h>

char *lr_fill_template(const char *template, const char *question)
{
    static const char mark[] = "{question}";
    size_t n = 0, marks = 0;
    for (const char *at = template; (at = strstr(at, mark)); at += sizeof mark - 1)
        marks++;
    char *out = malloc(strlen(template) + marks * strlen(question) + 1);
    if (!out)
        return NULL;
    for (;;) {
        const char *at = strstr(template, mark);
        size_t before = at ? (size_t)(at - template) : strlen(template);
        memcpy(out + n, template, before);
        n += before;
        if (!at)
            break;
        memcpy(out + n, question, strlen(question));
        n += strlen(question);
        template = at + sizeof mark - 1;
    }
    out[n] = '\0';
    return out;
}

/* Worker 0: all prompts to ids. */
static enum lr_status encode_prompts(
    struct lr_job *job, struct lr_questions *q, struct lr_token_buffer *ids, int64_t *n_ids, struct lr_error *err)
{
    for (int64_t i = 0; i < q->n_questions; i++) {
        int64_t before = ids->n_ids;
        LR_TRY(lr_tokenizer_encode(job->tokenizer, q->prompts[i], strlen(q->prompts[i]), 0, ids, err));
        n_ids[i] = ids->n_ids - before;
        if (n_ids[i] == 0)
            return lr_fail(err, LR_INVALID, "question %lld is empty", (long long)i + 1);
    }
    return LR_OK;
}

enum lr_status lr_questions_share(struct lr_job *job,
                                  struct lr_questions *q,
                                  int64_t n_questions,
                                  char **prompts,
                                  enum lr_status mine,
                                  struct lr_error *err)
{
    *q = (struct lr_questions){.n_questions = n_questions, .prompts = prompts};
    struct lr_token_buffer ids = {0};
    int32_t *lengths = NULL, *shared_lengths = NULL;
    int64_t *n_ids = calloc((size_t)n_questions + 1, sizeof *n_ids), total;
    if (mine == LR_OK && job->comm->rank == 0) {
        lengths = calloc((size_t)n_questions + 1, sizeof *lengths);
        mine = n_ids && lengths ? encode_prompts(job, q, &ids, n_ids, err)
                                : lr_fail(err, LR_NO_MEMORY, "no memory for %lld questions", (long long)n_questions);
        for (int64_t i = 0; mine == LR_OK && i < n_questions; i++)
            lengths[i] = (int32_t)n_ids[i];
    }
    free(n_ids);
    enum lr_status status = lr_job_share_ids(job, lengths, n_questions, mine, &shared_lengths, &q->n_questions, err);
    if (status == LR_OK)
        status = lr_job_share_ids(job, ids.ids, ids.n_ids, LR_OK, &q->ids, &total, err);
    if (status == LR_OK) {
        q->n_ids = calloc((size_t)q->n_questions + 1, sizeof *q->n_ids);
        q->answers = calloc((size_t)q->n_questions + 1, sizeof *q->answers);
        q->texts = calloc((size_t)q->n_questions + 1, sizeof *q->texts);
        if (!q->n_ids || !q->answers || !q->texts)
            status = lr_fail(err, LR_NO_MEMORY, "no memory for %lld questions", (long long)q->n_questions);
        status = lr_agree(job->comm, status, err);
    }
    for (int64_t i = 0; status == LR_OK && i < q->n_questions; i++)
        q->n_ids[i] = shared_lengths[i];
    free(lengths);
    free(shared_lengths);
    free(ids.ids);
    return status;
}

int64_t lr_questions_side_by_side(const struct lr_questions *q)
{
    return q->n_questions < LR_MAX_SIDE_BY_SIDE ? q->n_questions : LR_MAX_SIDE_BY_SIDE;
}

int64_t lr_questions_fork_tokens(const struct lr_questions *q, const struct lr_settings *settings)
{
    int64_t longest = 0;
    for (int64_t i = 0; i < q->n_questions; i++)
        longest = q->n_ids[i] > longest ? q->n_ids[i] : longest;
    return longest + settings->max_new_tokens;
}

struct asking {
    struct lr_job *job;
    const struct lr_settings *settings;
    char **stops;
    struct lr_progress *progress;
    int64_t n_questions;
};

/* Where the first stop text begins in `text`, or NULL. */
static char *find_stop(const struct asking *a, char *text)
{
    char *first = NULL;
    for (int i = 0; i < a->settings->stop.n_texts; i++) {
        char *at = strstr(text, a->stops[i]);
        first = at && (!first || at < first) ? at : first;
    }
    return first;
}

static int reached_stop(void *context, int64_t index, struct lr_answer *answer)
{
    const struct asking *a = context;
    (void)index;
    char *text;
    size_t n;
    if (a->settings->stop.n_texts == 0 ||
        lr_tokenizer_decode(a->job->tokenizer, answer->ids, answer->n_ids, &text, &n, NULL) != LR_OK)
        return 0;
    int found = find_stop(a, text) != NULL;
    free(text);
    return found;
}

static void step_done(void *context, int64_t questions_done, int64_t tokens_done)
{
    const struct asking *a = context;
    char detail[64];
    snprintf(detail, sizeof detail, "%lld tokens", (long long)tokens_done);
    lr_progress_update(a->progress, questions_done, detail);
}

/* Answer ids to valid UTF-8, cut at a stop text. */
static enum lr_status
write_text(const struct asking *a, const struct lr_answer *answer, char **out, struct lr_error *err)
{
    char *bytes;
    size_t n;
    LR_TRY(lr_tokenizer_decode(a->job->tokenizer, answer->ids, answer->n_ids, &bytes, &n, err));
    char *stop = find_stop(a, bytes);
    n = stop ? (size_t)(stop - bytes) : n;
    *out = malloc(3 * n + 1);
    if (*out)
        lr_utf8_repair(bytes, n, *out);
    free(bytes);
    return *out ? LR_OK : lr_fail(err, LR_NO_MEMORY, "no memory for an answer of %zu bytes", n);
}

static enum lr_status generate(struct asking *a, struct lr_questions *q, struct lr_error *err)
{
    struct lr_question *prompts = calloc((size_t)q->n_questions + 1, sizeof *prompts);
    enum lr_status status = LR_OK;
    int64_t first = 0;
    for (int64_t i = 0; prompts && i < q->n_questions; i++) {
        prompts[i] = (struct lr_question){q->ids + first, q->n_ids[i]};
        first += q->n_ids[i];
        q->answers[i].ids = calloc((size_t)a->settings->max_new_tokens, sizeof(int32_t));
        if (!q->answers[i].ids)
            status = LR_NO_MEMORY;
    }
    if (!prompts || status != LR_OK)
        status = lr_fail(err, LR_NO_MEMORY, "no memory for %lld answers of %lld tokens", (long long)q->n_questions,
                         (long long)a->settings->max_new_tokens);
    status = lr_agree(a->job->comm, status, err);
    struct lr_generation generation = {
        .sampling = lr_settings_sampling(a->settings),
        .max_new_tokens = a->settings->max_new_tokens,
        .eos = a->job->engine.model.eos,
        .n_eos = a->job->engine.model.n_eos,
        .stop = reached_stop,
        .stop_context = a,
        .on_step = a->progress ? step_done : NULL,
        .step_context = a,
    };
    if (status == LR_OK)
        status = lr_generate(a->job->session, &generation, prompts, q->n_questions, q->answers, err);
    free(prompts);
    return status;
}

enum lr_status lr_questions_ask(struct lr_job *job,
                                struct lr_questions *q,
                                const struct lr_settings *settings,
                                struct lr_progress *progress,
                                struct lr_error *err)
{
    struct asking a = {.job = job, .settings = settings, .progress = progress, .n_questions = q->n_questions};
    enum lr_status status = LR_OK;
    a.stops = calloc((size_t)settings->stop.n_texts + 1, sizeof *a.stops);
    for (int i = 0; a.stops && i < settings->stop.n_texts; i++)
        a.stops[i] = lr_unescape(settings->stop.texts[i]);
    lr_signals_phase("the questions");
    double begin = lr_clock_seconds();
    status = generate(&a, q, err);
    q->decode_seconds = lr_clock_seconds() - begin;
    enum lr_status mine = LR_OK;
    for (int64_t i = 0; status == LR_OK && mine == LR_OK && job->comm->rank == 0 && i < q->n_questions; i++)
        mine = write_text(&a, &q->answers[i], &q->texts[i], err);
    if (status == LR_OK)
        status = lr_agree(job->comm, mine, err);
    for (int i = 0; a.stops && i < settings->stop.n_texts; i++)
        free(a.stops[i]);
    free(a.stops);
    return status;
}

void lr_questions_free(struct lr_questions *q)
{
    for (int64_t i = 0; i < q->n_questions; i++) {
        if (q->prompts)
            free(q->prompts[i]);
        if (q->answers)
            free(q->answers[i].ids);
        if (q->texts)
            free(q->texts[i]);
    }
    free(q->prompts);
    free(q->ids);
    free(q->n_ids);
    free(q->answers);
    free(q->texts);
    *q = (struct lr_questions){0};
}
