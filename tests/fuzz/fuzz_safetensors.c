/* Any bytes as a .safetensors file: refused, or every tensor lies inside them. */
#include "tests/fuzz/fuzz.h"
#include "worker/weights/safetensors.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct lr_safetensors *file;
    struct lr_error err;
    if (lr_safetensors_parse(data, size, "input", &file, &err) != LR_OK) {
        if (err.message[0] == '\0')
            abort();
        return 0;
    }
    size_t total = 0;
    for (int64_t i = 0; i < lr_safetensors_count(file); i++) {
        const struct lr_safetensors_entry *entry = lr_safetensors_at(file, i);
        const uint8_t *first = entry->data;
        if (first < data || entry->size_bytes > size || (size_t)(first - data) > size - entry->size_bytes ||
            lr_safetensors_find(file, entry->name) != entry)
            abort();
        total += entry->size_bytes;
    }
    if (total > size)
        abort();
    lr_safetensors_close(file);
    return 0;
}
