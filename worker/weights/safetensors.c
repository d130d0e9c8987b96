#include "worker/weights/safetensors.h"

#include "base/file.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

/* The reference implementation's cap. */
static const uint64_t max_header_bytes = 100000000;

struct lr_safetensors {
    struct lr_mapped_file file; /* data NULL where the bytes are the caller's */
    json_t *header;             /* owns names and dtypes */
    struct lr_safetensors_entry *entries;
    int64_t n_entries;
};

static const struct {
    const char *name;
    int bits;
} dtypes[] = {{"BOOL", 8}, {"U8", 8},   {"I8", 8},    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"I16", 16},
              {"U16", 16}, {"F16", 16}, {"BF16", 16}, {"I32", 32},    {"U32", 32},    {"F32", 32},    {"F64", 64},
              {"I64", 64}, {"U64", 64}, {"F4", 4},    {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"C64", 64}};

static int dtype_bits(const char *name)
{
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++)
        if (strcmp(dtypes[i].name, name) == 0)
            return dtypes[i].bits;
    return 0;
}

static enum lr_status
read_shape(const char *path, json_t *shape, struct lr_safetensors_entry *entry, struct lr_error *err)
{
    if (!json_is_array(shape) || json_array_size(shape) > LR_TENSOR_MAX_DIMS)
        return lr_fail(err, LR_CORRUPT, "%s: tensor '%.200s' needs a shape of at most %d dimensions", path, entry->name,
                       LR_TENSOR_MAX_DIMS);
    entry->n_dims = (int)json_array_size(shape);
    for (int i = 0; i < entry->n_dims; i++) {
        json_t *size = json_array_get(shape, (size_t)i);
        if (!json_is_integer(size) || json_integer_value(size) < 0)
            return lr_fail(err, LR_CORRUPT, "%s: dimension %d of tensor '%.200s' is not a whole number from 0 on", path,
                           i, entry->name);
        entry->shape[i] = json_integer_value(size);
    }
    return LR_OK;
}

/* Bytes that shape and dtype ask for. */
static enum lr_status
expected_bytes(const char *path, const struct lr_safetensors_entry *entry, uint64_t *bytes, struct lr_error *err)
{
    int bits = dtype_bits(entry->dtype);
    if (bits == 0)
        return lr_fail(err, LR_UNSUPPORTED, "%s: tensor '%.200s' has the unknown dtype '%.40s'", path, entry->name,
                       entry->dtype);
    uint64_t total = (uint64_t)bits;
    for (int i = 0; i < entry->n_dims; i++)
        if (__builtin_mul_overflow(total, (uint64_t)entry->shape[i], &total))
            return lr_fail(err, LR_CORRUPT, "%s: the shape of tensor '%.200s' is more than 64 bits can count", path,
                           entry->name);
    if (total % 8 != 0)
        return lr_fail(err, LR_CORRUPT, "%s: tensor '%.200s' does not end on a byte", path, entry->name);
    *bytes = total / 8;
    return LR_OK;
}

static enum lr_status read_entry(const char *path,
                                 json_t *value,
                                 const unsigned char *data,
                                 uint64_t data_bytes,
                                 struct lr_safetensors_entry *entry,
                                 struct lr_error *err)
{
    entry->dtype = json_string_value(json_object_get(value, "dtype"));
    if (!entry->dtype)
        return lr_fail(err, LR_CORRUPT, "%s: tensor '%.200s' has no dtype", path, entry->name);
    LR_TRY(read_shape(path, json_object_get(value, "shape"), entry, err));
    json_t *offsets = json_object_get(value, "data_offsets");
    json_t *first = json_array_get(offsets, 0), *last = json_array_get(offsets, 1);
    if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(last))
        return lr_fail(err, LR_CORRUPT, "%s: tensor '%.200s' needs two data_offsets", path, entry->name);
    json_int_t begin = json_integer_value(first), end = json_integer_value(last);
    if (begin < 0 || end < begin || (uint64_t)end > data_bytes)
        return lr_fail(err, LR_CORRUPT, "%s: tensor '%.200s' lies at bytes %lld to %lld, the file has %llu of data",
                       path, entry->name, (long long)begin, (long long)end, (unsigned long long)data_bytes);
    uint64_t bytes = 0;
    LR_TRY(expected_bytes(path, entry, &bytes, err));
    if (bytes != (uint64_t)(end - begin))
        return lr_fail(err, LR_CORRUPT, "%s: tensor '%.200s' has %lld bytes, its shape and dtype %s ask for %llu", path,
                       entry->name, (long long)(end - begin), entry->dtype, (unsigned long long)bytes);
    entry->data = data + begin;
    entry->size_bytes = (size_t)bytes;
    return LR_OK;
}

static int by_place(const void *a, const void *b)
{
    const struct lr_safetensors_entry *x = a, *y = b;
    if (x->data != y->data)
        return (const char *)x->data < (const char *)y->data ? -1 : 1;
    return (x->size_bytes > y->size_bytes) - (x->size_bytes < y->size_bytes);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct lr_safetensors_entry *)a)->name, ((const struct lr_safetensors_entry *)b)->name);
}

/* The tensors must fill the data from its first to its last byte. */
static enum lr_status check_layout(
    const char *path, struct lr_safetensors *file, const unsigned char *data, uint64_t data_bytes, struct lr_error *err)
{
    qsort(file->entries, (size_t)file->n_entries, sizeof *file->entries, by_place);
    uint64_t at = 0;
    for (int64_t i = 0; i < file->n_entries; i++) {
        const struct lr_safetensors_entry *entry = &file->entries[i];
        uint64_t begin = (uint64_t)((const unsigned char *)entry->data - data);
        if (begin != at)
            return lr_fail(err, LR_CORRUPT, "%s: tensor '%.200s' begins at byte %llu and %s byte %llu", path,
                           entry->name, (unsigned long long)begin,
                           begin < at ? "overlaps another that ends at" : "leaves a hole after",
                           (unsigned long long)at);
        at = begin + entry->size_bytes;
    }
    if (at != data_bytes)
        return lr_fail(err, LR_CORRUPT, "%s: the tensors end at byte %llu, the data at %llu", path,
                       (unsigned long long)at, (unsigned long long)data_bytes);
    qsort(file->entries, (size_t)file->n_entries, sizeof *file->entries, by_name);
    return LR_OK;
}

static enum lr_status read_header(
    const char *path, struct lr_safetensors *file, const unsigned char *bytes, size_t size_bytes, struct lr_error *err)
{
    uint64_t length = 0;
    if (size_bytes < 8)
        return lr_fail(err, LR_CORRUPT, "%s has %zu bytes: too short for a safetensors file", path, size_bytes);
    for (int i = 7; i >= 0; i--)
        length = length << 8 | bytes[i];
    if (length > max_header_bytes)
        return lr_fail(err, LR_CORRUPT, "%s: a header of %llu bytes is more than the allowed %llu", path,
                       (unsigned long long)length, (unsigned long long)max_header_bytes);
    if (length > size_bytes - 8)
        return lr_fail(err, LR_CORRUPT, "%s is cut off: its header has %llu bytes, the file %zu", path,
                       (unsigned long long)length, size_bytes);
    if (length == 0 || bytes[8] != '{')
        return lr_fail(err, LR_CORRUPT, "%s: the header does not start with '{'", path);
    json_error_t why;
    file->header = json_loadb((const char *)bytes + 8, (size_t)length, JSON_REJECT_DUPLICATES, &why);
    if (!json_is_object(file->header))
        return lr_fail(err, LR_CORRUPT, "%s: the header is not valid JSON: %s at byte %d", path, why.text,
                       why.position);

    const unsigned char *data = bytes + 8 + length;
    uint64_t data_bytes = size_bytes - 8 - length;
    file->entries = calloc(json_object_size(file->header) + 1, sizeof *file->entries);
    if (!file->entries)
        return lr_fail(err, LR_NO_MEMORY, "%s: no memory for %zu tensors", path, json_object_size(file->header));
    const char *name;
    json_t *value;
    json_object_foreach(file->header, name, value)
    {
        if (strcmp(name, "__metadata__") == 0)
            continue;
        struct lr_safetensors_entry *entry = &file->entries[file->n_entries++];
        entry->name = name;
        LR_TRY(read_entry(path, value, data, data_bytes, entry, err));
    }
    return check_layout(path, file, data, data_bytes, err);
}

enum lr_status lr_safetensors_parse(
    const unsigned char *data, size_t size_bytes, const char *path, struct lr_safetensors **out, struct lr_error *err)
{
    struct lr_safetensors *file = calloc(1, sizeof *file);
    if (!file)
        return lr_fail(err, LR_NO_MEMORY, "%s: no memory for its header", path);
    enum lr_status status = read_header(path, file, data, size_bytes, err);
    if (status == LR_OK)
        *out = file;
    else
        lr_safetensors_close(file);
    return status;
}

enum lr_status lr_safetensors_open(const char *path, struct lr_safetensors **out, struct lr_error *err)
{
    struct lr_mapped_file mapped;
    LR_TRY(lr_file_map(path, &mapped, err));
    enum lr_status status = lr_safetensors_parse(mapped.data, mapped.size_bytes, path, out, err);
    if (status == LR_OK)
        (*out)->file = mapped;
    else
        lr_file_unmap(&mapped);
    return status;
}

void lr_safetensors_close(struct lr_safetensors *file)
{
    if (!file)
        return;
    if (file->file.data)
        lr_file_unmap(&file->file);
    json_decref(file->header);
    free(file->entries);
    free(file);
}

const struct lr_safetensors_entry *lr_safetensors_find(const struct lr_safetensors *file, const char *name)
{
    struct lr_safetensors_entry key = {.name = name};
    return bsearch(&key, file->entries, (size_t)file->n_entries, sizeof key, by_name);
}

int64_t lr_safetensors_count(const struct lr_safetensors *file)
{
    return file->n_entries;
}

const struct lr_safetensors_entry *lr_safetensors_at(const struct lr_safetensors *file, int64_t index)
{
    return &file->entries[index];
}
