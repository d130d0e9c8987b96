/* Any bytes as a tokenizer.json; where it is one, a text goes through it. */
#include "tests/fuzz/fuzz.h"
#include "worker/weights/tokenizer.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char text[] = "Hello  world, it's 2026!\r\n\xe3\x81\x82\xf0\x9f\x98\x80<|endoftext|>";
    struct lr_tokenizer *tokenizer;
    struct lr_error err;
    if (lr_tokenizer_parse((const char *)data, size, "input", &tokenizer, &err) != LR_OK) {
        if (err.message[0] == '\0')
            abort();
        return 0;
    }
    for (int flags = 0; flags < 2; flags++) {
        struct lr_token_buffer ids = {0};
        if (lr_tokenizer_encode(tokenizer, text, sizeof text - 1, flags, &ids, &err) == LR_OK)
            for (int64_t i = 0; i < ids.n_ids; i++)
                if (ids.ids[i] < 0 || ids.ids[i] >= lr_tokenizer_size(tokenizer))
                    abort();
        free(ids.ids);
    }
    lr_tokenizer_free(tokenizer);
    return 0;
}
