/* Any bytes as tokenizer.json: refused with a sentence, or a tokenizer whose ids are its own and go back to bytes. */
#include "tests/fuzz/fuzz.h"
#include "worker/weights/tokenizer.h"

static const char path[] = "hostile/tokenizer.json";
static const char probe[] = "Hello,  w\xc3\xb6rld! 123 <s>\n\t it's \xe2\x82\xac 1e\xcc\x81";

static void check_tokenizer(struct lr_tokenizer *tokenizer, int flags)
{
    struct lr_token_buffer ids = {0};
    struct lr_error why = {0};
    char *bytes = NULL;
    size_t n_bytes = 0;
    /* a pattern may give up on a text, and says so */
    enum lr_status status = lr_tokenizer_encode(tokenizer, probe, sizeof probe - 1, flags, &ids, &why);
    if (status != LR_OK)
        require_sentence(status, &why, NULL);
    for (int64_t i = 0; i < ids.n_ids; i++)
        require(ids.ids[i] >= 0 && ids.ids[i] < lr_tokenizer_size(tokenizer), "an id that is no token");
    require(lr_tokenizer_decode(tokenizer, ids.ids, ids.n_ids, &bytes, &n_bytes, &why) == LR_OK, "ids without bytes");
    require(bytes[n_bytes] == '\0', "no NUL behind the bytes");
    free(bytes);
    free(ids.ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct lr_tokenizer *tokenizer = NULL;
    struct lr_error why = {0};
    enum lr_status status = lr_tokenizer_parse((const char *)data, size, path, &tokenizer, &why);
    if (status != LR_OK) {
        require(tokenizer == NULL, "an output was set on failure");
        require_sentence(status, &why, path);
        return 0;
    }
    check_tokenizer(tokenizer, 0);
    check_tokenizer(tokenizer, LR_TOKENIZE_PARSE_SPECIAL);
    lr_tokenizer_free(tokenizer);
    return 0;
}
