/* Asking a sealed document many questions: each from a fork of its state, side by side. */
#ifndef LR_WORKER_GENERATE_H
#define LR_WORKER_GENERATE_H

#include "worker/session.h"

struct lr_question {
    const int32_t *ids; /* tokens of the question in its template, the same on every worker */
    int64_t n_ids;
};

struct lr_answer {
    int32_t *ids; /* [n_ids] generated tokens, without the one that ended it; owned by the caller,
                     max_new_tokens long */
    int64_t n_ids;
    int64_t n_generated; /* with the one that ended it */
    int finished;
};

struct lr_generation {
    struct lr_sampling sampling;
    int64_t max_new_tokens;
    const int32_t *eos;
    int n_eos;
    /* Worker 0: whether the text so far of question `index` ends in a stop text; may cut
     * answer->n_ids. NULL: never. */
    int (*stop)(void *context, int64_t index, struct lr_answer *answer);
    void *stop_context;
    /* Worker 0: told after every step; NULL: nobody. */
    void (*on_step)(void *context, int64_t questions_done, int64_t tokens_done);
    void *step_context;
};

/* Answers all questions, as many side by side as the session has forks. answers[i].ids is filled on
 * worker 0 only; n_ids and n_generated likewise. Collective. */
LR_MUST_USE enum lr_status lr_generate(struct lr_session *session,
                                       const struct lr_generation *generation,
                                       const struct lr_question *questions,
                                       int64_t n_questions,
                                       struct lr_answer *answers,
                                       struct lr_error *err);

#endif
