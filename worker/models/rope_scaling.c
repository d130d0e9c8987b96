#include "worker/models/rope_scaling.h"

#include "worker/models/json_fields.h"

#include <stdlib.h>
#include <string.h>

static const double pi = 3.14159265358979323846;

struct rope_reader {
    struct lr_json_fields fields; /* the block of rope parameters */
    double theta;
    int64_t original_positions, max_positions;
    struct lr_rope *out;
};

static enum lr_status scale_linear(struct rope_reader *r, struct lr_error *err)
{
    double factor = 1.0;
    LR_TRY(lr_json_real(r->fields, "factor", 1e-6, 1e6, NAN, &factor, err));
    for (int64_t j = 0; j < r->out->rotary_dim / 2; j++)
        r->out->inv_freq[j] /= factor;
    return LR_OK;
}

static double mscale(double factor, double weight)
{
    return factor <= 1.0 ? 1.0 : 0.1 * weight * log(factor) + 1.0;
}

/* The component whose wave turns `rotations` times over the original context. */
static double correction_dim(const struct rope_reader *r, double rotations)
{
    double dim = (double)r->out->rotary_dim;
    return dim * log((double)r->original_positions / (rotations * 2.0 * pi)) / (2.0 * log(r->theta));
}

/* NTK by parts: fast components stay, slow ones are interpolated, a ramp in between. */
static enum lr_status scale_yarn(struct rope_reader *r, struct lr_error *err)
{
    double factor = 1.0, attention_factor = 1.0, weight = 0.0, weight_all = 0.0, fast = 32.0, slow = 1.0;
    double implied = (double)r->max_positions / (double)r->original_positions;
    int truncate = 1;
    LR_TRY(lr_json_real(r->fields, "factor", 1e-6, 1e6, implied, &factor, err));
    LR_TRY(lr_json_real(r->fields, "attention_factor", 0.0, 1e6, -1.0, &attention_factor, err));
    LR_TRY(lr_json_real(r->fields, "mscale", 0.0, 1e6, 0.0, &weight, err));
    LR_TRY(lr_json_real(r->fields, "mscale_all_dim", 0.0, 1e6, 0.0, &weight_all, err));
    LR_TRY(lr_json_real(r->fields, "beta_fast", 0.0, 1e6, 32.0, &fast, err));
    LR_TRY(lr_json_real(r->fields, "beta_slow", 0.0, 1e6, 1.0, &slow, err));
    LR_TRY(lr_json_bool(r->fields, "truncate", 1, &truncate, err));
    fast = fast > 0.0 ? fast : 32.0;
    slow = slow > 0.0 ? slow : 1.0;
    if (attention_factor < 0.0)
        attention_factor = weight > 0.0 && weight_all > 0.0 ? mscale(factor, weight) / mscale(factor, weight_all)
                                                            : mscale(factor, 1.0);
    double low = correction_dim(r, fast), high = correction_dim(r, slow);
    if (truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = low > 0.0 ? low : 0.0;
    high = high < (double)(r->out->rotary_dim - 1) ? high : (double)(r->out->rotary_dim - 1);
    high += low == high ? 0.001 : 0.0;
    for (int64_t j = 0; j < r->out->rotary_dim / 2; j++) {
        double ramp = ((double)j - low) / (high - low);
        ramp = ramp < 0.0 ? 0.0 : ramp > 1.0 ? 1.0 : ramp;
        r->out->inv_freq[j] = r->out->inv_freq[j] / factor * ramp + r->out->inv_freq[j] * (1.0 - ramp);
    }
    r->out->attention_factor = attention_factor;
    return LR_OK;
}

static enum lr_status scale_llama3(struct rope_reader *r, struct lr_error *err)
{
    double factor = 1.0, low = 1.0, high = 1.0, original = (double)r->original_positions;
    LR_TRY(lr_json_real(r->fields, "factor", 1e-6, 1e6, NAN, &factor, err));
    LR_TRY(lr_json_real(r->fields, "low_freq_factor", 1e-6, 1e6, NAN, &low, err));
    LR_TRY(lr_json_real(r->fields, "high_freq_factor", 1e-6, 1e6, NAN, &high, err));
    if (high <= low)
        return lr_fail(err, LR_CORRUPT, "%s: high_freq_factor %g must be above low_freq_factor %g", r->fields.path,
                       high, low);
    for (int64_t j = 0; j < r->out->rotary_dim / 2; j++) {
        double freq = r->out->inv_freq[j], wavelength = 2.0 * pi / freq;
        if (wavelength > original / low) {
            r->out->inv_freq[j] = freq / factor;
        } else if (wavelength >= original / high) {
            double smooth = (original / wavelength - low) / (high - low);
            r->out->inv_freq[j] = (1.0 - smooth) * freq / factor + smooth * freq;
        }
    }
    return LR_OK;
}

static enum lr_status scale(struct rope_reader *r, const char *type, struct lr_error *err)
{
    if (strcmp(type, "default") == 0)
        return LR_OK;
    if (strcmp(type, "linear") == 0)
        return scale_linear(r, err);
    if (strcmp(type, "yarn") == 0)
        return scale_yarn(r, err);
    if (strcmp(type, "llama3") == 0)
        return scale_llama3(r, err);
    return lr_fail(err, LR_UNSUPPORTED, "%s: rope type '%.60s' is not one of default, linear, yarn, llama3",
                   r->fields.path, type);
}

enum lr_status lr_rope_read(const char *path,
                            json_t *config,
                            int64_t head_dim,
                            double default_partial_factor,
                            int64_t max_position_embeddings,
                            struct lr_rope *out,
                            struct lr_error *err)
{
    struct lr_json_fields top = {path, config};
    json_t *block = lr_json_field(top, "rope_scaling");
    if (json_object_size(block) == 0)
        block = lr_json_field(top, "rope_parameters");
    if (block && !json_is_object(block))
        return lr_fail(err, LR_CORRUPT, "%s: the rope parameters must be an object", path);
    struct lr_rope rope = {.attention_factor = 1.0};
    struct rope_reader r = {.fields = {path, block}, .max_positions = max_position_embeddings, .out = &rope};
    double theta = 0.0, partial = 0.0;
    LR_TRY(lr_json_real(top, "rope_theta", 1.0, 1e15, 10000.0, &theta, err));
    LR_TRY(lr_json_real(r.fields, "rope_theta", 1.0, 1e15, theta, &r.theta, err));
    LR_TRY(lr_json_real(top, "partial_rotary_factor", 0.0, 1.0, default_partial_factor, &partial, err));
    LR_TRY(lr_json_real(r.fields, "partial_rotary_factor", 0.0, 1.0, partial, &partial, err));
    LR_TRY(lr_json_integer(r.fields, "original_max_position_embeddings", 1, (int64_t)1 << 40, r.max_positions,
                           &r.original_positions, err));
    LR_TRY(lr_json_integer(top, "original_max_position_embeddings", 1, (int64_t)1 << 40, r.original_positions,
                           &r.original_positions, err));
    json_t *type = lr_json_field(r.fields, "rope_type");
    type = type ? type : lr_json_field(r.fields, "type");
    if (type && !json_is_string(type))
        return lr_fail(err, LR_CORRUPT, "%s: rope_type must be a text", path);
    rope.rotary_dim = (int64_t)((double)head_dim * partial);
    if (rope.rotary_dim % 2 != 0)
        return lr_fail(err, LR_CORRUPT, "%s: %lld rotary components (head_dim %lld times %g) do not pair up", path,
                       (long long)rope.rotary_dim, (long long)head_dim, partial);
    rope.inv_freq = calloc((size_t)rope.rotary_dim / 2 + 1, sizeof *rope.inv_freq);
    if (!rope.inv_freq)
        return lr_fail(err, LR_NO_MEMORY, "%s: no memory for %lld frequencies", path, (long long)rope.rotary_dim / 2);
    for (int64_t j = 0; j < rope.rotary_dim / 2; j++)
        rope.inv_freq[j] = pow(r.theta, -2.0 * (double)j / (double)rope.rotary_dim);
    enum lr_status status = scale(&r, type ? json_string_value(type) : "default", err);
    if (status == LR_OK)
        *out = rope;
    else
        free(rope.inv_freq);
    return status;
}
