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
    int32_t *tokens;              /* [n] next token of each running question, or one of the two: */
};

enum { ENDED = -1, FAILED = -2 };

static int is_eos(const struct lr_generation *generation, int32_t token)
{
    for (int i = 0; i < generation->n_eos; i++)
        if (generation->eos[i] == token)
            return 1;
    return 0;
}

/* Worker 0: takes the token that was chosen for a running question; ENDED when the answer ends with it. */
static int32_t take_token(struct group *group, int64_t slot, int64_t first_question)
{
    const struct lr_generation *generation = group->generation;
    int64_t index = group->running[slot];
    struct lr_answer *answer = &group->answers[index];
    int32_t token = group->tokens[slot];
    answer->n_generated++;
    if (is_eos(generation, token)) {
        answer->finished = 1;
        return ENDED;
    }
    answer->ids[answer->n_ids++] = token;
    if (generation->stop && generation->stop(generation->stop_context, first_question + index, answer))
        answer->finished = 1;
    return answer->finished || answer->n_generated >= generation->max_new_tokens ? ENDED : token;
}

/* Worker 0 takes all chosen tokens and tells the others, FAILED first where one could not be chosen. */
static enum lr_status share_tokens(struct group *group, int64_t n_running, int64_t first_question, struct lr_error *err)
{
    const struct lr_engine *engine = group->session->engine;
    enum lr_status mine = LR_OK;
    for (int64_t i = 0; engine->comm->rank == 0 && mine == LR_OK && i < n_running; i++) {
        if (group->tokens[i] < 0)
            mine = lr_fail_logits(engine, lr_fork_position(group->forks[group->running[i]]) - 1, err);
        else
            group->tokens[i] = take_token(group, i, first_question);
    }
    if (mine != LR_OK)
        group->tokens[0] = FAILED;
    LR_TRY(lr_comm_broadcast(engine->comm, "next tokens", 0, group->tokens, (size_t)n_running * sizeof *group->tokens,
                             err));
    return group->tokens[0] == FAILED ? lr_agree(engine->comm, mine, err) : LR_OK;
}

static enum lr_status extend(struct group *group, int64_t n_running, struct lr_error *err)
{
    const struct lr_fork_output output = {.next = group->tokens, .sampling = &group->generation->sampling};
    return lr_forks_extend(group->session, group->inputs, n_running,
                           group->generation->max_new_tokens > 0 ? &output : NULL, err);
}

static enum lr_status decode(struct group *group, int64_t first_question, struct lr_error *err)
{
    int64_t n_running = group->n, tokens_done = 0;
    while (n_running > 0) {
        LR_TRY(share_tokens(group, n_running, first_question, err));
        int64_t kept = 0;
        for (int64_t i = 0; i < n_running; i++) {
            if (group->tokens[i] == ENDED)
                continue;
            group->running[kept] = group->running[i];
            group->tokens[kept] = group->tokens[i];
            group->inputs[kept] = (struct lr_fork_input){
                .fork = group->forks[group->running[kept]], .ids = &group->tokens[kept], .n_ids = 1};
            kept++;
        }
        tokens_done += n_running;
        n_running = kept;
        if (group->session->engine->comm->rank == 0 && group->generation->on_step)
            group->generation->on_step(group->generation->step_context, first_question + group->n - n_running,
                                       tokens_done);
        LR_TRY(extend(group, n_running, err));
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
    LR_TRY(extend(group, group->n, err));
    return group->generation->max_new_tokens > 0 ? decode(group, first_question, err) : LR_OK;
}

static enum lr_status ask_group(struct group *group, int64_t first_question, struct lr_error *err)
{
    const struct lr_engine *engine = group->session->engine;
    size_t n = (size_t)group->n;
    enum lr_status status = LR_OK;
    group->forks = calloc(n, sizeof(struct lr_fork *));
    group->inputs = calloc(n, sizeof *group->inputs);
    group->running = calloc(n, sizeof *group->running);
    group->tokens = calloc(n, sizeof *group->tokens);
    if (!group->forks || !group->inputs || !group->running || !group->tokens)
        status = lr_fail(err, LR_NO_MEMORY, "no memory for %lld questions", (long long)group->n);
    status = lr_agree(engine->comm, status, err);
    if (status == LR_OK)
        status = ask(group, first_question, err);
    for (size_t i = 0; group->forks && i < n; i++)
        if (group->forks[i])
            lr_fork_release(group->forks[i]);
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
