/* Fields of a JSON object with range checks and one clear sentence for what is wrong. A field that is absent or null
 * takes its default. */
#ifndef LR_WORKER_MODELS_JSON_FIELDS_H
#define LR_WORKER_MODELS_JSON_FIELDS_H

#include "base/status.h"
#include <jansson.h>
#include <math.h>
#include <stdint.h>

struct lr_json_fields {
    const char *path; /* for messages */
    json_t *object;
};

/* Has no default: must be there. */
#define LR_JSON_REQUIRED INT64_MIN

static inline json_t *lr_json_field(struct lr_json_fields f, const char *name)
{
    json_t *value = json_object_get(f.object, name);
    return json_is_null(value) ? NULL : value;
}

LR_MUST_USE static inline enum lr_status lr_json_integer(struct lr_json_fields f,
                                                         const char *name,
                                                         int64_t lowest,
                                                         int64_t highest,
                                                         int64_t otherwise,
                                                         int64_t *out,
                                                         struct lr_error *err)
{
    json_t *value = lr_json_field(f, name);
    if (!value && otherwise != LR_JSON_REQUIRED) {
        *out = otherwise;
        return LR_OK;
    }
    if (!value)
        return lr_fail(err, LR_CORRUPT, "%s has no %s", f.path, name);
    double real = json_number_value(value);
    if (!json_is_number(value) || real != floor(real))
        return lr_fail(err, LR_CORRUPT, "%s: %s must be a whole number", f.path, name);
    if (real < (double)lowest || real > (double)highest)
        return lr_fail(err, LR_CORRUPT, "%s: %s is %.17g, it must be from %lld to %lld", f.path, name, real,
                       (long long)lowest, (long long)highest);
    *out = (int64_t)real;
    return LR_OK;
}

LR_MUST_USE static inline enum lr_status lr_json_real(struct lr_json_fields f,
                                                      const char *name,
                                                      double lowest,
                                                      double highest,
                                                      double otherwise,
                                                      double *out,
                                                      struct lr_error *err)
{
    json_t *value = lr_json_field(f, name);
    if (!value && !isnan(otherwise)) {
        *out = otherwise;
        return LR_OK;
    }
    if (!value)
        return lr_fail(err, LR_CORRUPT, "%s has no %s", f.path, name);
    if (!json_is_number(value))
        return lr_fail(err, LR_CORRUPT, "%s: %s must be a number", f.path, name);
    double real = json_number_value(value);
    if (!(real >= lowest && real <= highest))
        return lr_fail(err, LR_CORRUPT, "%s: %s is %g, it must be from %g to %g", f.path, name, real, lowest, highest);
    *out = real;
    return LR_OK;
}

LR_MUST_USE static inline enum lr_status
lr_json_bool(struct lr_json_fields f, const char *name, int otherwise, int *out, struct lr_error *err)
{
    json_t *value = lr_json_field(f, name);
    if (value && !json_is_boolean(value))
        return lr_fail(err, LR_CORRUPT, "%s: %s must be true or false", f.path, name);
    *out = value ? json_is_true(value) : otherwise;
    return LR_OK;
}

#endif
