/* Files that break a rule: refused with one sentence that names the file, what is wrong in it, and the numbers. */
#include "tests/worker/fixtures.h"
#include "worker/engine.h"
#include "worker/models/qwen3_next_config.h"
#include "worker/weights/checkpoint_dir.h"
#include "worker/weights/tokenizer.h"

#include <jansson.h>
#include <sys/stat.h>
#include <unistd.h>

static char directory[] = "/tmp/longreach-hostile.XXXXXX";

static void write_file(const char *name, const void *data, size_t n)
{
    char path[300];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, n, file), n);
    fclose(file);
}

static void expect_sentence(
    const char *what, enum lr_status got, const struct lr_error *got_error, enum lr_status wanted, const char *part)
{
    if (got != wanted || !strstr(got_error->message, part))
        fail_msg("%s: status %d instead of %d, '%s' instead of '...%s...'", what, (int)got, (int)wanted,
                 got_error->message, part);
}

/* A text with its first `from` replaced; the caller frees it. */
static char *replaced(const char *text, const char *from, const char *to)
{
    const char *at = strstr(text, from);
    assert_non_null(at);
    char *out = malloc(strlen(text) + strlen(to) + 1);
    sprintf(out, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    return out;
}

/* ---- safetensors ---- */

static size_t build(unsigned char *out, const char *header, uint64_t length, size_t data_bytes)
{
    for (int i = 0; i < 8; i++)
        out[i] = (unsigned char)(length >> (8 * i));
    memcpy(out + 8, header, strlen(header));
    memset(out + 8 + strlen(header), 0, data_bytes);
    return 8 + strlen(header) + data_bytes;
}

static void safetensors_rules(void **state)
{
    (void)state;
#define T(name, shape, first, last)                                                                                    \
    "\"" name "\":{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":[" first "," last "]}"
    static const struct {
        const char *header;
        int64_t length; /* -1: the header's own */
        size_t data_bytes;
        enum lr_status status;
        const char *sentence;
    } cases[] = {
        {"{}", 100000001, 0, LR_CORRUPT, "100000001 bytes is more than the allowed 100000000"},
        {"{}", 3, 0, LR_CORRUPT, "is cut off: its header has 3 bytes, the file 10"},
        {"", 0, 0, LR_CORRUPT, "does not start with '{'"},
        {" {}", -1, 0, LR_CORRUPT, "does not start with '{'"},
        {"{,}", -1, 0, LR_CORRUPT, "not valid JSON"},
        {"{" T("a", "[1]", "0", "4") "," T("a", "[1]", "4", "8") "}", -1, 8, LR_CORRUPT, "duplicate"},
        {"{" T("a", "[2]", "0", "8") "," T("b", "[2]", "4", "12") "}", -1, 12, LR_CORRUPT,
         "'b' begins at byte 4 and overlaps another that ends at byte 8"},
        {"{" T("a", "[1]", "0", "4") "," T("b", "[1]", "8", "12") "}", -1, 12, LR_CORRUPT,
         "'b' begins at byte 8 and leaves a hole after byte 4"},
        {"{" T("a", "[1]", "4", "8") "}", -1, 8, LR_CORRUPT, "'a' begins at byte 4 and leaves a hole after byte 0"},
        {"{" T("a", "[1]", "0", "4") "}", -1, 5, LR_CORRUPT, "the tensors end at byte 4, the data at 5"},
        {"{" T("a", "[4294967296,4294967296]", "0", "4") "}", -1, 4, LR_CORRUPT, "'a' is more than 64 bits can count"},
        {"{" T("a", "[2]", "0", "4") "}", -1, 4, LR_CORRUPT, "'a' has 4 bytes, its shape and dtype F32 ask for 8"},
        {"{" T("a", "[1]", "-4", "0") "}", -1, 4, LR_CORRUPT, "'a' lies at bytes -4 to 0"},
        {"{" T("a", "[1]", "4", "0") "}", -1, 4, LR_CORRUPT, "'a' lies at bytes 4 to 0"},
        {"{" T("a", "[2]", "0", "8") "}", -1, 4, LR_CORRUPT, "'a' lies at bytes 0 to 8, the file has 4 of data"},
        {"{" T("a", "[-1]", "0", "4") "}", -1, 4, LR_CORRUPT, "dimension 0 of tensor 'a'"},
        {"{" T("a", "[1,1,1,1,1,1,1,1,1]", "0", "4") "}", -1, 4, LR_CORRUPT, "at most 8 dimensions"},
        {"{" T("a", "1", "0", "4") "}", -1, 4, LR_CORRUPT, "'a' needs a shape"},
        {"{\"a\":{\"dtype\":\"F99\",\"shape\":[1],\"data_offsets\":[0,4]}}", -1, 4, LR_UNSUPPORTED,
         "unknown dtype 'F99'"},
        {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,4]}}", -1, 4, LR_CORRUPT, "'a' has no dtype"},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0]}}", -1, 4, LR_CORRUPT,
         "'a' needs two data_offsets"},
        {"{\"a\":7}", -1, 0, LR_CORRUPT, "'a' has no dtype"},
    };
    unsigned char bytes[4096];
    struct lr_safetensors *file;
    struct lr_error why;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint64_t length = cases[i].length < 0 ? strlen(cases[i].header) : (uint64_t)cases[i].length;
        size_t n = build(bytes, cases[i].header, length, cases[i].data_bytes);
        expect_sentence(cases[i].header, lr_safetensors_parse(bytes, n, "w.safetensors", &file, &why), &why,
                        cases[i].status, cases[i].sentence);
        assert_non_null(strstr(why.message, "w.safetensors"));
    }
    expect_sentence("short", lr_safetensors_parse(bytes, 7, "w.safetensors", &file, &why), &why, LR_CORRUPT,
                    "has 7 bytes");
    size_t n = build(bytes, "{\"__metadata__\":{\"format\":\"pt\"}," T("a", "[1]", "0", "4") "}", 0, 4);
    bytes[0] = (unsigned char)(n - 12);
    assert_ok(lr_safetensors_parse(bytes, n, "w.safetensors", &file, err));
    assert_int_equal(lr_safetensors_count(file), 1);
    lr_safetensors_close(file);
#undef T
}

static void index_rules(void **state)
{
    (void)state;
    static const struct {
        const char *index, *sentence;
        enum lr_status status;
    } cases[] = {
        {"{\"weight_map\":{\"a\":\"../w.safetensors\"}}", "'a' names no file of that directory", LR_CORRUPT},
        {"{\"weight_map\":{\"a\":7}}", "'a' names no file", LR_CORRUPT},
        {"{\"weight_map\":{\"a\":\"gone.safetensors\"}}", "gone.safetensors", LR_NOT_FOUND},
        {"{\"weight_map\":{\"b\":\"w.safetensors\"}}", "puts tensor 'b' into w.safetensors, which does not have it",
         LR_CORRUPT},
        {"{}", "has no weight_map", LR_CORRUPT},
        {"{", "not valid JSON", LR_CORRUPT},
    };
    unsigned char bytes[256];
    char path[300];
    struct lr_checkpoint *checkpoint;
    struct lr_error why;
    const char *header = "{\"a\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]}}";
    write_file("w.safetensors", bytes, build(bytes, header, strlen(header), 8));
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_file("model.safetensors.index.json", cases[i].index, strlen(cases[i].index));
        expect_sentence(cases[i].index, lr_checkpoint_open(directory, &checkpoint, &why), &why, cases[i].status,
                        cases[i].sentence);
    }
    const char *good = "{\"weight_map\":{\"a\":\"w.safetensors\"}}";
    int64_t one = 1, two = 2;
    struct lr_tensor tensor;
    write_file("model.safetensors.index.json", good, strlen(good));
    assert_ok(lr_checkpoint_open(directory, &checkpoint, err));
    expect_sentence("dtype", lr_checkpoint_take(checkpoint, "a", 1, &one, &tensor, &why), &why, LR_UNSUPPORTED,
                    "'a' is I64");
    expect_sentence("shape", lr_checkpoint_take(checkpoint, "a", 1, &two, &tensor, &why), &why, LR_CORRUPT,
                    "'a' has shape [1], config.json asks for [2]");
    expect_sentence("name", lr_checkpoint_take(checkpoint, "z", 1, &one, &tensor, &why), &why, LR_NOT_FOUND,
                    "no tensor 'z'");
    lr_checkpoint_close(checkpoint);
    snprintf(path, sizeof path, "%s/model.safetensors.index.json", directory);
    unlink(path);
    expect_sentence("neither", lr_checkpoint_open(directory, &checkpoint, &why), &why, LR_NOT_FOUND, "neither");
}

/* ---- config.json ---- */

static void expect_config(const char *fields, enum lr_status status, const char *sentence)
{
    char text[2000];
    struct lr_qwen3_next_config config;
    struct lr_error why;
    int n = snprintf(text, sizeof text, "{%s}", fields);
    expect_sentence(fields, lr_qwen3_next_config_parse(text, (size_t)n, "config.json", &config, &why), &why, status,
                    sentence);
    assert_non_null(strstr(why.message, "config.json"));
}

static void config_rules(void **state)
{
    (void)state;
#define TYPE "\"model_type\":\"qwen3_next\","
    static const char *const integers[] = {"hidden_size",
                                           "vocab_size",
                                           "num_hidden_layers",
                                           "num_attention_heads",
                                           "num_key_value_heads",
                                           "head_dim",
                                           "linear_num_key_heads",
                                           "linear_num_value_heads",
                                           "linear_key_head_dim",
                                           "linear_value_head_dim",
                                           "linear_conv_kernel_dim",
                                           "moe_intermediate_size",
                                           "intermediate_size",
                                           "full_attention_interval",
                                           "decoder_sparse_step",
                                           "max_position_embeddings"};
    static const char *const wrong[] = {"0", "-1", "1.5", "\"8\"", "1e30", "[]"};
    for (size_t i = 0; i < sizeof integers / sizeof integers[0]; i++)
        for (size_t j = 0; j < sizeof wrong / sizeof wrong[0]; j++) {
            char fields[200];
            snprintf(fields, sizeof fields, TYPE "\"%s\":%s", integers[i], wrong[j]);
            expect_config(fields, LR_CORRUPT, integers[i]);
        }
    expect_config("\"model_type\":\"llama\"", LR_UNSUPPORTED, "model_type 'llama' is not supported");
    expect_config("\"a\":1", LR_CORRUPT, "has no model_type");
    expect_config(TYPE "\"a\":1,\"a\":2", LR_CORRUPT, "duplicate");
    expect_config(TYPE "\"quantization_config\":{\"bits\":4}", LR_UNSUPPORTED, "quantised");
    expect_config(TYPE "\"num_attention_heads\":6,\"num_key_value_heads\":4", LR_CORRUPT, "6 is no multiple");
    expect_config(TYPE "\"linear_num_value_heads\":5,\"linear_num_key_heads\":2", LR_CORRUPT, "5 is no multiple");
    expect_config(TYPE "\"num_attention_heads\":130,\"num_key_value_heads\":2", LR_UNSUPPORTED, "65 query heads");
    expect_config(TYPE "\"num_experts\":4,\"num_experts_per_tok\":5", LR_CORRUPT, "num_experts_per_tok is 5");
    expect_config(TYPE "\"num_experts\":5000", LR_CORRUPT, "num_experts is 5000");
    expect_config(TYPE "\"hidden_act\":\"mish\"", LR_UNSUPPORTED, "'mish'");
    expect_config(TYPE "\"hidden_act\":3", LR_UNSUPPORTED, "hidden_act");
    expect_config(TYPE "\"layer_types\":[\"full_attention\"]", LR_CORRUPT,
                  "layer_types has 1 entries, num_hidden_layers is 48");
    expect_config(TYPE "\"num_hidden_layers\":1,\"layer_types\":[\"mamba\"]", LR_UNSUPPORTED, "'mamba'");
    expect_config(TYPE "\"mlp_only_layers\":[\"a\"]", LR_CORRUPT, "mlp_only_layers[0]");
    expect_config(TYPE "\"mlp_only_layers\":3", LR_CORRUPT, "mlp_only_layers");
    expect_config(TYPE "\"eos_token_id\":151936", LR_CORRUPT, "eos_token_id must be from 0 to vocab_size - 1 = 151935");
    expect_config(TYPE "\"eos_token_id\":\"x\"", LR_CORRUPT, "eos_token_id");
    expect_config(TYPE "\"rms_norm_eps\":-1", LR_CORRUPT, "rms_norm_eps");
    expect_config(TYPE "\"attention_bias\":1", LR_CORRUPT, "attention_bias must be true or false");
    expect_config(TYPE "\"partial_rotary_factor\":1.5", LR_CORRUPT, "partial_rotary_factor");
    expect_config(TYPE "\"head_dim\":10,\"partial_rotary_factor\":0.5", LR_CORRUPT, "5 rotary components");
    expect_config(TYPE "\"rope_parameters\":{\"rope_type\":\"dynamic\",\"factor\":2}", LR_UNSUPPORTED, "'dynamic'");
    expect_config(TYPE "\"rope_parameters\":{\"rope_type\":\"linear\"}", LR_CORRUPT, "has no factor");
    expect_config(
        TYPE "\"rope_parameters\":{\"rope_type\":\"llama3\",\"factor\":2,\"low_freq_factor\":4,\"high_freq_factor\":1}",
        LR_CORRUPT, "high_freq_factor 1 must be above low_freq_factor 4");
    expect_config(TYPE "\"rope_parameters\":7", LR_CORRUPT, "must be an object");
    expect_config(TYPE "\"rope_theta\":0.5", LR_CORRUPT, "rope_theta");
#undef TYPE
}

/* longreach-tiny's weights with another configuration. */
static void config_against_tensors(void **state)
{
    (void)state;
    static const struct {
        const char *from, *to, *sentence;
    } cases[] = {
        {"\"hidden_size\": 256", "\"hidden_size\": 128",
         "'model.embed_tokens.weight' has shape [8192, 256], config.json asks for [8192, 128]"},
        {"\"num_experts\": 8", "\"num_experts\": 9", "'model.layers.0.mlp.gate.weight' has shape [8, 256]"},
        {"\"num_hidden_layers\": 8", "\"num_hidden_layers\": 9", "no tensor 'model.layers.8."},
        {"\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false", "no tensor 'lm_head.weight'"},
        {"\"linear_conv_kernel_dim\": 4", "\"linear_conv_kernel_dim\": 3", "conv1d.weight"},
        {"\"attention_bias\": false", "\"attention_bias\": true", "q_proj.bias"},
    };
    size_t n;
    char *config = read_fixture("models/longreach-tiny/config.json", &n), here[4000], target[4300], path[300];
    assert_non_null(getcwd(here, sizeof here));
    snprintf(path, sizeof path, "%s/model.safetensors", directory);
    snprintf(target, sizeof target, "%s/models/longreach-tiny/model.safetensors", here);
    assert_int_equal(symlink(target, path), 0);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char *changed = replaced(config, cases[i].from, cases[i].to);
        write_file("config.json", changed, strlen(changed));
        free(changed);
        struct lr_comm comm;
        struct lr_engine engine;
        struct lr_error why;
        struct lr_engine_options options = {.model_dir = directory, .n_threads = 1};
        lr_comm_open_self(&comm);
        enum lr_status status = lr_engine_open(&options, &comm, &engine, &why);
        assert_int_not_equal(status, LR_OK);
        expect_sentence(cases[i].to, status, &why, status, cases[i].sentence);
    }
    unlink(path);
    free(config);
}

/* ---- tokenizer.json ---- */

static void expect_tokenizer(const char *what, const char *json, enum lr_status status, const char *sentence)
{
    struct lr_tokenizer *tokenizer;
    struct lr_error why;
    expect_sentence(what, lr_tokenizer_parse(json, strlen(json), "tokenizer.json", &tokenizer, &why), &why, status,
                    sentence);
}

static void tokenizer_rules(void **state)
{
    (void)state;
    static const struct {
        const char *from, *to, *sentence;
        enum lr_status status;
    } cases[] = {
        {"\"merges\"", "\"mergers\"", "needs a vocab and merges", LR_CORRUPT},
        {"\"type\": \"BPE\"", "\"type\": \"Unigram\"", "a model of type 'Unigram'", LR_UNSUPPORTED},
        {"\"byte_fallback\": false", "\"byte_fallback\": true", "byte_fallback", LR_UNSUPPORTED},
        {"\"normalizer\": null", "\"normalizer\": {\"type\": \"Lowercase\"}", "normalizer 'Lowercase'", LR_UNSUPPORTED},
        {"\"type\": \"Split\"", "\"type\": \"Metaspace\"", "pre-tokenizer 'Metaspace'", LR_UNSUPPORTED},
        {"\"type\": \"ByteLevel\"", "\"type\": \"Digits\"", "no ByteLevel pre-tokenizer", LR_UNSUPPORTED},
        {"\"behavior\": \"Isolated\"", "\"behavior\": \"MergedWithNext\"", "'MergedWithNext'", LR_UNSUPPORTED},
        {"(?i:", "(?i", "does not compile", LR_CORRUPT},
        {"\"<|im_start|>\"", "\"\"", "no content", LR_CORRUPT},
    };
    size_t n;
    char *text = read_fixture("models/longreach-tiny/tokenizer.json", &n);
    json_t *root = json_loads(text, 0, NULL);
    free(text);
    assert_non_null(root);
    text = json_dumps(root, 0); /* one spelling of white space */
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char *changed = replaced(text, cases[i].from, cases[i].to);
        expect_tokenizer(cases[i].to, changed, cases[i].status, cases[i].sentence);
        free(changed);
    }
    free(text);

    json_t *model = json_object_get(root, "model"), *vocab = json_object_get(model, "vocab"),
           *merges = json_object_get(model, "merges");
    json_array_append_new(merges, json_pack("[s,s]", "zq", "xj"));
    text = json_dumps(root, 0);
    expect_tokenizer("dangling", text, LR_CORRUPT, "'zq' and 'xj', has a side that is not in the vocabulary");
    free(text);
    json_array_set_new(merges, json_array_size(merges) - 1, json_pack("[s,s]", "\"", "}"));
    text = json_dumps(root, 0);
    expect_tokenizer("result", text, LR_CORRUPT, "has a result that is not in the vocabulary");
    free(text);
    json_array_set_new(merges, json_array_size(merges) - 1, json_integer(3));
    text = json_dumps(root, 0);
    expect_tokenizer("no pair", text, LR_CORRUPT, "does not name two tokens");
    free(text);
    json_array_remove(merges, json_array_size(merges) - 1);
    json_object_set_new(vocab, "zqxj", json_integer(100));
    text = json_dumps(root, 0);
    expect_tokenizer("twice", text, LR_CORRUPT, "token id 100 is given twice");
    free(text);
    json_object_set_new(vocab, "zqxj", json_integer(-1));
    text = json_dumps(root, 0);
    expect_tokenizer("negative", text, LR_CORRUPT, "'zqxj' is not from 0");
    free(text);
    json_object_set_new(vocab, "zqxj", json_integer(1 << 30));
    text = json_dumps(root, 0);
    expect_tokenizer("huge", text, LR_CORRUPT, "'zqxj' is not from 0");
    free(text);
    json_decref(root);
    expect_tokenizer("not JSON", "{", LR_CORRUPT, "not valid JSON");
    expect_tokenizer("no model", "{}", LR_CORRUPT, "has no model");
    expect_tokenizer("no bytes", "{\"model\":{\"vocab\":{\"a\":0},\"merges\":[]}}", LR_UNSUPPORTED,
                     "no token for the byte 0x00");
}

/* A pattern that backtracks without end gives up with a sentence. */
static void endless_pattern(void **state)
{
    (void)state;
    size_t n;
    char *text = read_fixture("models/longreach-tiny/tokenizer.json", &n);
    json_t *root = json_loads(text, 0, NULL), *words = json_object_get(root, "pre_tokenizer");
    json_t *split = json_array_get(json_object_get(words, "pretokenizers"), 0);
    free(text);
    json_object_set_new(split, "pattern", json_pack("{s:s}", "Regex", "(a|aa)+!$"));
    text = json_dumps(root, 0);
    json_decref(root);
    struct lr_tokenizer *tokenizer;
    struct lr_token_buffer ids = {0};
    struct lr_error why;
    char word[65];
    memset(word, 'a', 62);
    memcpy(word + 62, "!b", 2);
    assert_ok(lr_tokenizer_parse(text, strlen(text), "tokenizer.json", &tokenizer, err));
    enum lr_status status = lr_tokenizer_encode(tokenizer, word, 64, 0, &ids, &why);
    expect_sentence("endless", status, &why, LR_CORRUPT, "a pattern gave up on a text of 64 bytes");
    free(ids.ids);
    lr_tokenizer_free(tokenizer);
    free(text);
}

static int make_directory(void **state)
{
    (void)state;
    return mkdtemp(directory) ? 0 : -1;
}

static int remove_directory(void **state)
{
    (void)state;
    char command[100];
    snprintf(command, sizeof command, "rm -rf %s", directory);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(safetensors_rules),      cmocka_unit_test(index_rules),     cmocka_unit_test(config_rules),
        cmocka_unit_test(config_against_tensors), cmocka_unit_test(tokenizer_rules), cmocka_unit_test(endless_pattern),
    };
    return cmocka_run_group_tests(tests, make_directory, remove_directory);
}
