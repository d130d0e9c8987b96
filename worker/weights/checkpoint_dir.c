#include "worker/weights/checkpoint_dir.h"

#include "base/file.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MAX_SHARDS = 10000, PATH_BYTES = 4096 };
static const size_t max_index_bytes = (size_t)256 << 20;

struct lr_checkpoint {
    char *dir;
    int n_shards;
    struct lr_safetensors **shards;
    char **shard_names; /* as the index spells them; NULL for a single file */
    json_t *shard_of;   /* the index's weight_map, or NULL for a single file */
};

static int find_shard(const struct lr_checkpoint *checkpoint, const char *name)
{
    for (int i = 0; i < checkpoint->n_shards; i++)
        if (strcmp(checkpoint->shard_names[i], name) == 0)
            return i;
    return -1;
}

/* A shard lies in the directory itself; an index that points elsewhere is refused. */
static enum lr_status
open_shard(struct lr_checkpoint *checkpoint, const char *tensor, const char *name, struct lr_error *err)
{
    if (!name || name[0] == '\0' || strchr(name, '/'))
        return lr_fail(err, LR_CORRUPT,
                       "%s/model.safetensors.index.json: tensor '%.200s' names no file of that directory",
                       checkpoint->dir, tensor);
    if (find_shard(checkpoint, name) >= 0)
        return LR_OK;
    if (checkpoint->n_shards == MAX_SHARDS)
        return lr_fail(err, LR_UNSUPPORTED, "%s/model.safetensors.index.json names more than %d files", checkpoint->dir,
                       MAX_SHARDS);
    size_t n = (size_t)checkpoint->n_shards + 1;
    void *shards = realloc(checkpoint->shards, n * sizeof *checkpoint->shards);
    checkpoint->shards = shards ? shards : checkpoint->shards;
    void *names = realloc(checkpoint->shard_names, n * sizeof *checkpoint->shard_names);
    checkpoint->shard_names = names ? names : checkpoint->shard_names;
    char *copy = strdup(name);
    if (!shards || !names || !copy) {
        free(copy);
        return lr_fail(err, LR_NO_MEMORY, "%s: no memory for %zu files", checkpoint->dir, n);
    }
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/%s", checkpoint->dir, name);
    enum lr_status status = lr_safetensors_open(path, &checkpoint->shards[n - 1], err);
    if (status != LR_OK) {
        free(copy);
        return status;
    }
    checkpoint->shard_names[n - 1] = copy;
    checkpoint->n_shards++;
    return LR_OK;
}

static enum lr_status open_index(struct lr_checkpoint *checkpoint, const char *path, struct lr_error *err)
{
    char *text;
    size_t size_bytes;
    LR_TRY(lr_file_read(path, max_index_bytes, &text, &size_bytes, err));
    json_error_t why;
    json_t *index = json_loadb(text, size_bytes, JSON_REJECT_DUPLICATES, &why);
    free(text);
    if (!index)
        return lr_fail(err, LR_CORRUPT, "%s is not valid JSON: %s in line %d", path, why.text, why.line);
    checkpoint->shard_of = json_incref(json_object_get(index, "weight_map"));
    json_decref(index);
    if (!json_is_object(checkpoint->shard_of))
        return lr_fail(err, LR_CORRUPT, "%s has no weight_map", path);
    const char *tensor;
    json_t *shard;
    json_object_foreach(checkpoint->shard_of, tensor, shard)
    {
        LR_TRY(open_shard(checkpoint, tensor, json_string_value(shard), err));
        const char *file = json_string_value(shard);
        if (!lr_safetensors_find(checkpoint->shards[find_shard(checkpoint, file)], tensor))
            return lr_fail(err, LR_CORRUPT, "%s puts tensor '%.200s' into %.200s, which does not have it", path, tensor,
                           file);
    }
    return LR_OK;
}

static enum lr_status open_files(struct lr_checkpoint *checkpoint, struct lr_error *err)
{
    char path[PATH_BYTES], index[PATH_BYTES];
    snprintf(path, sizeof path, "%s/model.safetensors", checkpoint->dir);
    snprintf(index, sizeof index, "%s/model.safetensors.index.json", checkpoint->dir);
    if (access(path, F_OK) == 0) {
        checkpoint->shards = calloc(1, sizeof *checkpoint->shards);
        if (!checkpoint->shards)
            return lr_fail(err, LR_NO_MEMORY, "%s: no memory", path);
        LR_TRY(lr_safetensors_open(path, &checkpoint->shards[0], err));
        checkpoint->n_shards = 1;
        return LR_OK;
    }
    if (access(index, F_OK) == 0)
        return open_index(checkpoint, index, err);
    return lr_fail(err, LR_NOT_FOUND, "%s has neither model.safetensors nor model.safetensors.index.json",
                   checkpoint->dir);
}

enum lr_status lr_checkpoint_open(const char *model_dir, struct lr_checkpoint **out, struct lr_error *err)
{
    if (strlen(model_dir) > PATH_BYTES - 300)
        return lr_fail(err, LR_INVALID, "the model directory's name is longer than %d bytes", PATH_BYTES - 300);
    struct lr_checkpoint *checkpoint = calloc(1, sizeof *checkpoint);
    if (!checkpoint || !(checkpoint->dir = strdup(model_dir))) {
        free(checkpoint);
        return lr_fail(err, LR_NO_MEMORY, "%s: no memory", model_dir);
    }
    enum lr_status status = open_files(checkpoint, err);
    if (status == LR_OK)
        *out = checkpoint;
    else
        lr_checkpoint_close(checkpoint);
    return status;
}

void lr_checkpoint_close(struct lr_checkpoint *checkpoint)
{
    if (!checkpoint)
        return;
    for (int i = 0; i < checkpoint->n_shards; i++) {
        lr_safetensors_close(checkpoint->shards[i]);
        if (checkpoint->shard_names)
            free(checkpoint->shard_names[i]);
    }
    free(checkpoint->shards);
    free(checkpoint->shard_names);
    json_decref(checkpoint->shard_of);
    free(checkpoint->dir);
    free(checkpoint);
}

static void print_shape(char *text, size_t text_bytes, int n_dims, const int64_t *shape)
{
    size_t at = (size_t)snprintf(text, text_bytes, "[");
    for (int i = 0; i < n_dims && at < text_bytes; i++)
        at += (size_t)snprintf(text + at, text_bytes - at, "%s%lld", i ? ", " : "", (long long)shape[i]);
    if (at < text_bytes)
        snprintf(text + at, text_bytes - at, "]");
}

enum lr_status lr_checkpoint_take(struct lr_checkpoint *checkpoint,
                                  const char *name,
                                  int n_dims,
                                  const int64_t *shape,
                                  struct lr_tensor *out,
                                  struct lr_error *err)
{
    const char *shard = checkpoint->shard_of ? json_string_value(json_object_get(checkpoint->shard_of, name)) : NULL;
    const struct lr_safetensors_entry *entry = NULL;
    if (!checkpoint->shard_of)
        entry = lr_safetensors_find(checkpoint->shards[0], name);
    else if (shard)
        entry = lr_safetensors_find(checkpoint->shards[find_shard(checkpoint, shard)], name);
    if (!entry)
        return lr_fail(err, LR_NOT_FOUND, "%s has no tensor '%s'", checkpoint->dir, name);
    if (entry->n_dims != n_dims || memcmp(entry->shape, shape, (size_t)n_dims * sizeof *shape) != 0) {
        char has[160], wants[160];
        print_shape(has, sizeof has, entry->n_dims, entry->shape);
        print_shape(wants, sizeof wants, n_dims, shape);
        return lr_fail(err, LR_CORRUPT, "%s: tensor '%s' has shape %s, config.json asks for %s", checkpoint->dir, name,
                       has, wants);
    }
    struct lr_tensor tensor = {
        .name = entry->name, .n_dims = n_dims, .data = entry->data, .size_bytes = entry->size_bytes};
    memcpy(tensor.shape, shape, (size_t)n_dims * sizeof *shape);
    if (strcmp(entry->dtype, "F32") == 0)
        tensor.dtype = LR_F32;
    else if (strcmp(entry->dtype, "BF16") == 0)
        tensor.dtype = LR_BF16;
    else if (strcmp(entry->dtype, "F16") == 0)
        tensor.dtype = LR_F16;
    else
        return lr_fail(err, LR_UNSUPPORTED, "%s: tensor '%s' is %s; longreach reads F32, BF16 and F16", checkpoint->dir,
                       name, entry->dtype);
    *out = tensor;
    return LR_OK;
}

void lr_checkpoint_totals(const struct lr_checkpoint *checkpoint, int64_t *n_elements, int64_t *size_bytes)
{
    *n_elements = *size_bytes = 0;
    for (int s = 0; s < checkpoint->n_shards; s++)
        for (int64_t i = 0; i < lr_safetensors_count(checkpoint->shards[s]); i++) {
            const struct lr_safetensors_entry *entry = lr_safetensors_at(checkpoint->shards[s], i);
            int64_t n = 1;
            for (int d = 0; d < entry->n_dims; d++)
                n *= entry->shape[d];
            *n_elements += n;
            *size_bytes += (int64_t)entry->size_bytes;
        }
}

void lr_checkpoint_discard(const struct lr_tensor *tensor)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = ((uintptr_t)tensor->data + page - 1) / page * page;
    uintptr_t last = ((uintptr_t)tensor->data + tensor->size_bytes) / page * page;
    if (last > first)
        madvise((void *)first, last - first, MADV_DONTNEED);
}

static float widen_f16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 1023u;
    if (exponent == 0) {
        float value = (float)fraction * 0x1p-24f;
        return sign ? -value : value;
    }
    uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

void lr_tensor_widen(const struct lr_tensor *tensor, int64_t first, int64_t n, float *out)
{
    if (tensor->dtype == LR_F32) {
        memcpy(out, (const char *)tensor->data + first * 4, (size_t)n * 4);
        return;
    }
    const char *from = (const char *)tensor->data + first * 2;
    for (int64_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, from + i * 2, sizeof half);
        uint32_t bits = (uint32_t)half << 16;
        if (tensor->dtype == LR_F16)
            out[i] = widen_f16(half);
        else
            memcpy(&out[i], &bits, sizeof bits);
    }
}
