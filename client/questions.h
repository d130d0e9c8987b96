/* Asking a document questions: the prompts' ids on every worker, forks side by side, answers as text on worker 0. */
#ifndef LR_CLIENT_QUESTIONS_H
#define LR_CLIENT_QUESTIONS_H

#include "client/job.h"
#include "client/report.h"
#include "client/settings.h"

enum { LR_MAX_SIDE_BY_SIDE = 32 };

struct lr_questions {
    int64_t n_questions;
    char **prompts; /* [n_questions] in their template, worker 0 only; owned */
    int32_t *ids;   /* all prompts' ids one after the other, every worker */
    int64_t *n_ids; /* [n_questions] */
    struct lr_answer *answers;
    char **texts; /* [n_questions] worker 0: the answers, valid UTF-8, cut at a stop text */
    double decode_seconds;
};

/* Worker 0 brings `prompts` (taken over) and its `mine` so far; the ids reach every worker. Collective. */
LR_MUST_USE enum lr_status lr_questions_share(struct lr_job *job,
                                              struct lr_questions *questions,
                                              int64_t n_questions,
                                              char **prompts,
                                              enum lr_status mine,
                                              struct lr_error *err);

/* Forks alive at once, and the longest question with its answer. */
int64_t lr_questions_side_by_side(const struct lr_questions *questions);
int64_t lr_questions_fork_tokens(const struct lr_questions *questions, const struct lr_settings *settings);

/* Generates all answers. Collective. */
LR_MUST_USE enum lr_status lr_questions_ask(struct lr_job *job,
                                            struct lr_questions *questions,
                                            const struct lr_settings *settings,
                                            struct lr_progress *progress,
                                            struct lr_error *err);
void lr_questions_free(struct lr_questions *questions);

/* `template` with {question} filled in; malloc'd, NULL without memory. */
char *lr_fill_template(const char *template, const char *question);

#endif
