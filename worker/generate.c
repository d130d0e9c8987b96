#include "worker/generate.h"

#include "worker/session_impl.h"

#include <stdlib.h>

/* Forks that are asked together. */
struct group {
    struct lr_session *session;
    const struct lr_generation *generation;
    const struct lr_question *questions;
    struct lr_answer *answers;
    int64_t n;
    struct lr_fork **forks;
    struct lr_fork_input *inputs; /* [n] of the questions still running */
    int64_t *running;             /* [n] their indices */
    int32_t *tokens;              /* [n] next token of each running question; -1: it ended */
    float *logits;                /* [n, vocab], worker 0 */
    int32_t *scratch;
};

static int is_eos(const struct lr_generation *generation, int32_t token)
{
    for (int i = 0; i < generation->n_eos; i++)
        if (generation->eos[i] == token)
            return 1;
    return 0;
}

/* Worker 0: takes the next token of a running question; returns it, or -1 when the answer ends with
 * it. */
static int32_t take_token(struct group *group, int64_t slot, int64_t first_question)
{
    const struct lr_generation *generation = group->generation;
    int64_t index = group->running[slot];
    struct lr_answer *answer = &group->answers[index];
    int64_t vocab = group->session->engine->model.dims.vocab;
    int32_t token = lr_sample(&generation->sampling, group->logits + slot * vocab, vocab,
                              lr_fork_position(group->forks[index]), group->scratch);
    answer->n_generated++;
    if (is_eos(generation, token)) {
        answer->finished = 1;
        return -1;
    }
    answer->ids[answer->n_ids++] = token;
    if (generation->stop && generation->stop(generation->stop_context, first_question + index, answer))
        answer->finished = 1;
    return answer->finished || answer->n_generated >= generation->max_new_tokens ? -1 : token;
}

static enum lr_status decode(struct group *group, int64_t first_question, struct lr_error *err)
{
    struct lr_comm *comm = group->session->engine->comm;
    int64_t n_running = group->n, tokens_done = 0;
    while (n_running > 0) {
        for (int64_t i = 0; comm->rank == 0 && i < n_running; i++)
            group->tokens[i] = take_token(group, i, first_question);
        LR_TRY(
            lr_comm_broadcast(comm, "next tokens", 0, group->tokens, (size_t)n_running * sizeof *group->tokens, err));
        int64_t kept = 0;
        for (int64_t i = 0; i < n_running; i++) {
            if (group->tokens[i] < 0)
                continue;
            group->running[kept] = group->running[i];
            group->tokens[kept] = group->tokens[i];
            group->inputs[kept] = (struct lr_fork_input){
                .fork = group->forks[group->running[kept]], .ids = &group->tokens[kept], .n_ids = 1};
            kept++;
        }
        tokens_done += n_running;
        n_running = kept;
        if (comm->rank == 0 && group->generation->on_step)
            group->generation->on_step(group->generation->step_context, first_question + group->n - n_running,
                                       tokens_done);
        LR_TRY(lr_forks_extend(group->session, group->inputs, n_running, group->logits, NULL, NULL, err));
    }
    return LR_OK;
}

static enum lr_status ask(struct group *group, int64_t first_question, struct lr_error *err)
{
    for (int64_t i = 0; i < group->n; i++) {
        LR_TRY(lr_session_fork(group->session, &group->forks[i], err));
        group->running[i] = i;
        group->inputs[i] = (struct lr_fork_input){
            .fork = group->forks[i], .ids = group->questions[i].ids, .n_ids = group->questions[i].n_ids};
        group->answers[i].n_ids = group->answers[i].n_generated = 0;
        group->answers[i].finished = 0;
    }
    LR_TRY(lr_forks_extend(group->session, group->inputs, group->n, group->logits, NULL, NULL, err));
    return group->generation->max_new_tokens > 0 ? decode(group, first_question, err) : LR_OK;
}

static enum lr_status ask_group(struct group *group, int64_t first_question, struct lr_error *err)
{
    const struct lr_engine *engine = group->session->engine;
    size_t n = (size_t)group->n, vocab = (size_t)engine->model.dims.vocab;
    enum lr_status status = LR_OK;
    group->forks = calloc(n, sizeof(struct lr_fork *));
    group->inputs = calloc(n, sizeof *group->inputs);
    group->running = calloc(n, sizeof *group->running);
    group->tokens = calloc(n, sizeof *group->tokens);
    group->scratch = calloc(vocab, sizeof *group->scratch);
    group->logits = engine->comm->rank == 0 ? calloc(n * vocab, sizeof *group->logits) : NULL;
    if (!group->forks || !group->inputs || !group->running || !group->tokens || !group->scratch ||
        (engine->comm->rank == 0 && !group->logits))
        status = lr_fail(err, LR_NO_MEMORY, "no memory for %lld questions", (long long)group->n);
    status = lr_agree(engine->comm, status, err);
    if (status == LR_OK)
        status = ask(group, first_question, err);
    for (size_t i = 0; group->forks && i < n; i++)
        if (group->forks[i])
            lr_fork_release(group->forks[i]);
    free(group->logits);
    free(group->scratch);
    free(group->tokens);
    free(group->running);
    free(group->inputs);
    free((void *)group->forks);
    return status;
}

enum lr_status lr_generate(struct lr_session *session,
                           const struct lr_generation *generation,
                           const struct lr_question *questions,
                           int64_t n_questions,
                           struct lr_answer *answers,
                           struct lr_error *err)
{
    int64_t at_once = session->options.max_forks;
    if (at_once < 1)
        return lr_fail(err, LR_INVALID, "the session was opened without forks");
    for (int64_t first = 0; first < n_questions; first += at_once) {
        struct group group = {.session = session,
                              .generation = generation,
                              .questions = questions + first,
                              .answers = answers + first,
                              .n = lr_min_i64(at_once, n_questions - first)};
        LR_TRY(ask_group(&group, first, err));
    }
    return LR_OK;
}
