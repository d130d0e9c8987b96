/* Any bytes as a .safetensors file: refused with a sentence, or every tensor lies inside the bytes and all of them
 * together fill the data. */
#include "tests/fuzz/fuzz.h"
#include "worker/weights/safetensors.h"

static const char path[] = "hostile.safetensors";

static void check_entry(const struct lr_safetensors *file, int64_t index, const uint8_t *data, size_t size)
{
    const struct lr_safetensors_entry *entry = lr_safetensors_at(file, index);
    const uint8_t *begin = entry->data;
    require(begin >= data + 8 && begin <= data + size, "a tensor begins outside the file");
    require(entry->size_bytes <= (size_t)(data + size - begin), "a tensor ends outside the file");
    require(entry->n_dims >= 0 && entry->n_dims <= LR_TENSOR_MAX_DIMS, "too many dimensions");
    for (int i = 0; i < entry->n_dims; i++)
        require(entry->shape[i] >= 0, "a negative dimension");
    require(lr_safetensors_find(file, entry->name) == entry, "a tensor is not found by its name");
    require(index == 0 || strcmp(lr_safetensors_at(file, index - 1)->name, entry->name) < 0, "names are out of order");
    volatile uint8_t sum = 0;
    for (size_t i = 0; i < entry->size_bytes; i++)
        sum = (uint8_t)(sum + begin[i]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct lr_safetensors *file = NULL;
    struct lr_error why = {0};
    enum lr_status status = lr_safetensors_parse(data, size, path, &file, &why);
    if (status != LR_OK) {
        require(file == NULL, "an output was set on failure");
        require(status == LR_CORRUPT || status == LR_UNSUPPORTED, "an unexpected status");
        require_sentence(status, &why, path);
        return 0;
    }
    uint64_t header = 0, total = 0;
    for (int i = 7; i >= 0; i--)
        header = header << 8 | data[i];
    for (int64_t i = 0; i < lr_safetensors_count(file); i++) {
        check_entry(file, i, data, size);
        total += lr_safetensors_at(file, i)->size_bytes;
    }
    require(8 + header + total == size, "the tensors do not fill the data");
    require(lr_safetensors_find(file, "no such tensor") == NULL || lr_safetensors_count(file) > 0,
            "a tensor of nothing");
    lr_safetensors_close(file);
    return 0;
}
