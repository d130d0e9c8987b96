/* Reading a document: from a file to ids on worker 0, and through the model with progress. */
#ifndef LR_CLIENT_READING_H
#define LR_CLIENT_READING_H

#include "client/job.h"
#include "client/report.h"
#include "client/settings.h"

#include <jansson.h>

/* Worker 0: the file's text as ids. LR_INVALID where it is empty or no UTF-8. */
LR_MUST_USE enum lr_status lr_read_document(struct lr_job *job,
                                            const char *path,
                                            const struct lr_settings *settings,
                                            struct lr_token_buffer *ids,
                                            struct lr_error *err);

struct lr_reading {
    const struct lr_settings *settings;
    lr_logits_sink *on_logits; /* see struct lr_session_hooks */
    void *logits_context;
    const int64_t *positions;
    int64_t n_positions;
    int64_t n_tokens; /* out: of the document, on every worker */
    struct lr_progress progress;
    int root;
};

/* Opens the session and feeds it worker 0's document. Says which attention was chosen. Collective. */
LR_MUST_USE enum lr_status lr_reading_run(struct lr_reading *reading,
                                          struct lr_job *job,
                                          const struct lr_token_buffer *document,
                                          int64_t max_forks,
                                          int64_t max_fork_tokens,
                                          struct lr_error *err);

/* Of the worker with the most: "2.10 GiB of GPU memory planned, 2.11 taken; 0.80 GiB of host memory for keys and
 * values". In a static buffer. */
const char *lr_memory_text(const struct lr_job *job, const struct lr_memory_use *uses);
/* The same of every worker, an object each. */
json_t *lr_memory_json(const struct lr_memory_use *uses, int n_workers);

/* "full", "sparse" */
const char *lr_attention_text(const struct lr_job *job);

#endif
