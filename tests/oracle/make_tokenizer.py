#!/usr/bin/env python3
"""Oracle ids for the tokenizer tests, made by the tokenizers library.

Writes, under tokenizer/ next to this script:

    case_NN.txt            a text, raw UTF-8 bytes (with NUL, CRLF and no newline at the end that is not meant)
    case_NN.ids            its ids under models/longreach-tiny, decimal, separated by spaces; special tokens in the text are text
    case_NN.special.ids    the same, with special tokens in the text parsed
    <name>/tokenizer.json  small tokenizers with other settings, trained here, and their ids of the same texts:
    <name>/case_NN.ids, <name>/case_NN.special.ids

Added tokens that are not special are parsed in both; that is the library's rule. Nothing is put in front or behind (add_special_tokens=False).
"""

import json
import pathlib
import random
import shutil
import sys

import tokenizers
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).resolve().parent
REPO = HERE.parent.parent
OUT = HERE / "tokenizer"
TINY = REPO / "models" / "longreach-tiny"

VOCAB_SIZE = 600
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def random_text(seed, length, alphabet):
    rng = random.Random(seed)
    return "".join(rng.choice(alphabet) for _ in range(length))


def scalar_values(seed, count):
    """Code points from the whole range, surrogates left out, assigned or not."""
    rng = random.Random(seed)
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(count))


SPACES = "".join(map(chr, [9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F]))
SPACES += "\u205f\u3000"
NOT_SPACES = "\u001c\u001d\u001e\u001f\u180e\u200b\u200c\u200d\u2060\ufeff"

CASES = [
    "",
    "a",
    " ",
    "\n",
    "In the beginning God created the heaven and the earth.",
    "The access code of silver window is 945807.\n\nQuestion: What is the access code of silver window?\nAnswer: ",
    "  leading and trailing  ",
    "runs:  two   three    four" + " " * 17 + "x" + " " * 130 + "y" + " " * 5,
    "tabs\t\tand\t spaces \t mixed\t \n\t\n \t\n",
    "\n\n\nnew\n\n\n\n\nlines\n \n  \n\n   text\n\n",
    "CR LF\r\nline two\r\n\r\n\r\nline\rthree\n\r four  \r\n  five\r\n",
    "0 1 12 123 1234 12345 123456789012345678901234567890 3.14159 1,000,000 0x7fff 1e-10 007",
    "digits of others: \u0661\u0662\u0663 \u0967\u0968\u0969 \u0e51\u0e52 \uff11\uff12\uff13 \u2160\u2161 \u00bd\u00b2\u2075 "
    "\U0001d7d8\U0001d7d9 \u4e09\u5341",
    "I'm you're he's we've they'll I'd don't DON'T WE'LL It'S o'clock rock'n'roll 'tis ''s '' ' 'S'T'RE'VE'M'LL'D 'sword 'x",
    "curly I\u2019m don\u2019t \u2018quoted\u2019, fold '\u017f '\u017fx 'K\u212a 'L\u0142 'R\u00c9",
    "caf\u00e9 cafe\u0301 A\u030a \u212b \u00c5 q\u0323\u0307 q\u0307\u0323 \u1e69 s\u0323\u0307 s\u0307\u0323 \ufb01 \u0344 \u0958 \u0915\u093c",
    "Zalgo: h" + "".join(chr(0x300 + i * 7 % 112) for i in range(60)) + "e" + "\u0301" * 40 + " end",
    "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165 \u1100\u1161 \u1161\u11a8 \uac00\u11a8 \uac01\u11a8 \u3131\u3132 \uffa1",
    "\u4e2d\u6587\u5b57\u7b26\uff0c\u6ca1\u6709\u7a7a\u683c\u3002\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002\uff76\uff9e \u304b\u3099 \u304c \U00020000\U0002a6df "
    "\uf900 \U0002f800",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01 \u0e01\u0e33 \u0e19\u0e49\u0e33 \u0ec0\u0e9b\u0ec7\u0e99",
    "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645 \u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f \u06f1\u06f2\u06f3 \u200f\u202babc\u202c\u061f \u0640\u0640",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0915\u094d\u0937 \u0939\u093f\u0928\u094d\u0926\u0940\u0964 \u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u0bca \u0bc6\u0bbe",
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd \ufb2a \ufb1d \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u1f84 \u03a3\u03c2 \u041f\u0440\u0438\u0432\u0435\u0442 \u0438\u0306 \u0419",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1e9\U0001f1ea\U0001f1eb \U0001f44d\U0001f3fd "
    "\u2764\ufe0f 1\ufe0f\u20e3 \u263a",
    "\u222b\u2080^\u221e e^{-x\u00b2}dx = \u221a\u03c0/2 \u2200x\u2208\u211d \u2262 \u2261\u0338 \u2260 =\u0338 \U0001d4d0\U0001d53d \u2102 \u2126 \u03a9",
    "astral \U0001f0a1 \U00010348\U00010330 \U00011f04\U00011f12 \U0001e900\U0001e943 \U0001d15e \U0001d157\U0001d165 \U00031350 \U000e0001 "
    "\U0010ffff \U000110ab \U00011099\U000110ba",
    "".join(map(chr, range(0, 33))) + "\x7f" + "".join(map(chr, range(0x80, 0xA1))),
    "NUL\x00in\x00\x00the middle\x00",
    "".join(f"[{c}]{c}{c}x {c}" for c in SPACES),
    "".join(f"[{c}]{c}{c}x {c}" for c in NOT_SPACES),
    "private \ue000\uf8ff \U000f0000\U0010fffd, replaced \ufffd\ufffd x\ufffdy, non-characters \ufffe\uffff\ufdd0, bom \ufeff",
    "abc" * 500,
    "Donaudampfschifffahrtsgesellschaftskapit\u00e4nsm\u00fctze" + "\u00df" * 300 + "a" * 700,
    "=" * 500 + "\n" + "-" * 77 + " " + "!?" * 50 + "\r\n" + "..." + "\n" * 40 + "end",
    "text <|endoftext|> middle <|im_start|>user\nhi<|im_end|>\n<|endoftext|><|endoftext|>",
    "<|endoftext|>",
    "<|endoftext|> <|endoftext |> <|ENDOFTEXT|> <|endoftext| <|im_start|<|im_end|> <<|im_end|>> |>",
    "a <left>  b  <left>c \n<left> | d<right>  e <right>\n\n f | g  <both>  h <both>i<both> \t j",
    "<word> x<word>y <word>_ <word>. \u00e9<word> <word>\u00e9 1<word> <word><word> -<word>- cafe\u0301 cafe\u0301s \u00c5ngstr\u00f6m A\u030angstro\u0308m",
    "<raw> caf\u00e9 caf\u00e9s A\u030a<raw> <think>hmm</think> <tool_call>{\"a\": 1}</tool_call> hippopotamus hippopotamuses",
    "int main(void) {\n\tfor (int i = 0; i < n; ++i)\n\t\tprintf(\"%d\\n\", a[i]);  // ok\n}\n\n#define X(a,b) a##b",
    "https://example.org/a_b-c?d=e&f=%20#g user@example.org C:\\dir\\file.txt ~/x/*.c $HOME snake_case camelCase 3rd v1.2.3-rc4",
    "MiXeD CaSe \u01c5 \u01f2 \u02b0 \u00aa\u00ba \u2c6f \ua7ae \u00df \u1e9e \u0130i\u0307 \u0149 _a_ a_1 1a a1b2c3",
    "x\u0301\u0302 \u0301start \u20ddcircle \u093eaa a\u0903 \u0300\u0301 \n\u0301 1\u0301 .\u0301",
    random_text(1, 500, "ab'sS \t\n\r019.,-\u00e9\u0301\u4e2d"),
    random_text(2, 500, " \n\r\t" * 3 + "x1." + SPACES),
    random_text(3, 400, "\u1100\u1101\u1161\u1162\u11a8\u11ab\uac00\uac01 a"),
    random_text(4, 400, "aeiouAEIOU" + "\u0300\u0301\u0302\u0303\u0308\u030a\u0323\u0327\u0328\u0345\u05b0\u3099" + " "),
    scalar_values(5, 300),
    scalar_values(6, 300),
]


def trained(normalizer, pre_tokenizer, ignore_merges, texts):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def split_then_bytes(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def edited(tokenizer, edit):
    """The tokenizer after a change to its JSON, which is also what the C side reads."""
    value = json.loads(tokenizer.to_str())
    edit(value)
    return value


def gpt2_like(texts):
    """ByteLevel's own regex, merges as "a b" strings, no normalizer; added tokens that take the spaces beside them."""
    tokenizer = trained(None, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True), False, texts)
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<left>", lstrip=True, special=True, normalized=False)])
    tokenizer.add_tokens(
        [
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("<both>", lstrip=True, rstrip=True, normalized=True),
            AddedToken("<word>", single_word=True, normalized=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)

    def merges_as_strings(value):
        value["model"]["merges"] = [" ".join(pair) for pair in value["model"]["merges"]]

    return edited(tokenizer, merges_as_strings)


def llama3_like(texts):
    """Split by up to three digits, ignore_merges with words that no merge reaches, a post-processor that is not used."""
    tokenizer = trained(None, split_then_bytes(LLAMA3_SPLIT), True, texts)
    begin = AddedToken("<|begin_of_text|>", special=True, normalized=False)
    tokenizer.add_special_tokens([begin, AddedToken("<|endoftext|>", special=True, normalized=False)])
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])

    def words_without_merges(value):
        vocab = value["model"]["vocab"]
        for token in value["added_tokens"]:
            token["id"] += 3
        for word in ("\u0120hippopotamus", "earth", "\u0120window"):
            if word in vocab:
                raise ValueError(f"{word} is in the trained vocabulary")
            vocab[word] = len(vocab)
        begin_id = value["added_tokens"][0]["id"]
        value["post_processor"]["processors"][1]["special_tokens"]["<|begin_of_text|>"]["ids"] = [begin_id]

    return edited(tokenizer, words_without_merges)


def qwen_like(texts):
    """NFC, single digits, merges as pairs; special and plain added tokens, matched before or after the normalizer."""
    # Trained on three digits, so that it has merges which only the split by single digits keeps from happening.
    tokenizer = trained(normalizers.NFC(), split_then_bytes(LLAMA3_SPLIT), False, texts)
    tokenizer.pre_tokenizer = split_then_bytes(QWEN_SPLIT)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.add_tokens(
        [
            *(AddedToken(t, normalized=False) for t in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<raw>")),
            AddedToken("caf\u00e9", normalized=True, single_word=True),
            AddedToken("\u00c5ngstr\u00f6m", normalized=True),
        ]
    )
    return json.loads(tokenizer.to_str())


def set_added(content, **flags):
    def edit(value):
        token = next(t for t in value["added_tokens"] if t["content"] == content)
        token.update(flags)

    return edit


def set_at(*path, value):
    def edit(node):
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value

    return edit


# Changes that must alter the ids of some case: a setting that none of them feels would not be tested.
SPLIT = ("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex")
CONTRAST = {
    "gpt2": {
        "prefix space": set_at("pre_tokenizer", "add_prefix_space", value=True),
        "regex": set_at("pre_tokenizer", "use_regex", value=False),
        "lstrip": set_added("<left>", lstrip=False),
        "rstrip": set_added("<right>", rstrip=False),
        "lstrip with rstrip": set_added("<both>", lstrip=False),
        "rstrip with lstrip": set_added("<both>", rstrip=False),
        "single_word": set_added("<word>", single_word=False),
        "special": set_added("<left>", special=False),
    },
    "llama3": {
        "ignore_merges": set_at("model", "ignore_merges", value=False),
        "three digits": set_at(*SPLIT, value=QWEN_SPLIT),
    },
    "qwen": {
        "normalizer": set_at("normalizer", value=None),
        "one digit": set_at(*SPLIT, value=LLAMA3_SPLIT),
        "normalized": set_added("\u00c5ngstr\u00f6m", normalized=False),
        "normalized single_word": set_added("caf\u00e9", single_word=False),
        "plain added token": set_added("<think>", special=True),
    },
}


def check_contrast(name, value):
    tokenizer = Tokenizer.from_str(json.dumps(value))
    expected = [ids_of(tokenizer, text, special) for text in CASES for special in (False, True)]
    for label, edit in CONTRAST[name].items():
        changed = json.loads(json.dumps(value))
        edit(changed)
        other = Tokenizer.from_str(json.dumps(changed))
        if [ids_of(other, text, special) for text in CASES for special in (False, True)] == expected:
            sys.exit(f"make_tokenizer: {name}: no case feels {label}")


def ids_of(tokenizer, text, special):
    tokenizer.encode_special_tokens = not special
    return tokenizer.encode(text, add_special_tokens=False).ids


def write_ids(out, index, plain, special):
    (out / f"case_{index:02d}.ids").write_text(" ".join(map(str, plain)) + "\n")
    (out / f"case_{index:02d}.special.ids").write_text(" ".join(map(str, special)) + "\n")


def transformers_peer(file):
    """transformers on tokenizer.json itself: AutoTokenizer may put the model type's own normalizer in its place."""
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))

    def encode(text, special):
        return fast.encode(text, add_special_tokens=False, split_special_tokens=not special)

    return encode


def encode_file(file, out):
    """Ids of every case; transformers has to give the same. Returns on how many the two ways differ."""
    tokenizer, peer = Tokenizer.from_file(str(file)), transformers_peer(file)
    differ = 0
    for index, text in enumerate(CASES):
        plain, special = ids_of(tokenizer, text, False), ids_of(tokenizer, text, True)
        for ids, parsed in ((plain, False), (special, True)):
            if peer(text, parsed) != ids:
                sys.exit(f"make_tokenizer: {out.name}: transformers differs on case {index}, special {parsed}")
        if out == OUT and tokenizer.decode(plain, skip_special_tokens=False) != text:
            sys.exit(f"make_tokenizer: {out.name}: case {index} does not come back from its ids")
        differ += plain != special
        write_ids(out, index, plain, special)
    return differ


def main():
    print("tokenizers", tokenizers.__version__, "transformers", transformers.__version__)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    for index, text in enumerate(CASES):
        (OUT / f"case_{index:02d}.txt").write_bytes(text.encode("utf-8"))
    differ = encode_file(TINY / "tokenizer.json", OUT)
    print(f"longreach-tiny: {len(CASES)} cases, special tokens matter in {differ}")
    book = (REPO / "data" / "kjv.txt").read_text(encoding="utf-8")[:20_000]
    for name, make in (("gpt2", gpt2_like), ("llama3", llama3_like), ("qwen", qwen_like)):
        out = OUT / name
        out.mkdir()
        value = make([book, *CASES])
        file = out / "tokenizer.json"
        file.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
        differ = encode_file(file, out)
        check_contrast(name, value)
        print(f"{name}: {len(value['model']['vocab'])} tokens, special tokens matter in {differ}")


if __name__ == "__main__":
    main()
