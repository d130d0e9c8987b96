#include "client/needle_prompts.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

static json_t *questions_json(const struct lr_needle *needles, char *const *prompts, int64_t n_needles)
{
    json_t *questions = json_array();
    for (int64_t i = 0; questions && i < n_needles; i++) {
        json_t *question = json_pack("{s:s, s:I, s:f}", "prompt", prompts[i], "expected", (json_int_t)needles[i].value,
                                     "depth", needles[i].depth);
        if (json_array_append_new(questions, question) != 0) {
            json_decref(questions);
            return NULL;
        }
    }
    return questions;
}

static enum lr_status write_json(const char *path, const json_t *json, struct lr_error *err)
{
    FILE *out = fopen(path, "we");
    if (!out)
        return lr_fail(err, LR_IO, "%s cannot be written: %s", path, strerror(errno));
    int failed = json_dumpf(json, out, JSON_COMPACT | JSON_REAL_PRECISION(9));
    putc('\n', out);
    failed |= ferror(out);
    if (fclose(out) != 0 || failed)
        return lr_fail(err, LR_IO, "%s: %s", path, strerror(errno));
    return LR_OK;
}

enum lr_status lr_needle_prompts_write(const char *path,
                                       const char *document,
                                       size_t n_bytes,
                                       int64_t n_tokens,
                                       const struct lr_needle *needles,
                                       char *const *prompts,
                                       int64_t n_needles,
                                       struct lr_error *err)
{
    json_t *text = json_stringn(document, n_bytes), *questions = questions_json(needles, prompts, n_needles);
    json_t *json =
        json_pack("{s:o, s:I, s:o}", "document", text, "tokens", (json_int_t)n_tokens, "questions", questions);
    enum lr_status status = json ? write_json(path, json, err)
                                 : lr_fail(err, LR_NO_MEMORY, "no memory for the prompts of %zu bytes", n_bytes);
    json_decref(json);
    return status;
}
