#!/bin/sh
# Usage, and input that is wrong: one clear sentence each, and the exit code.
. "$(dirname "$0")/lib.sh"

run() { "$longreach" run --model $model "$@"; }
head -c 3000 $book > "$work/document"
: > "$work/empty"
printf 'In the beginning \377 God' > "$work/broken"
printf 'abc' > "$work/three"
printf '\0\040\0\0' > "$work/ids8192"
printf '\377\377\377\377' > "$work/negative"

for command in run needle logits tokenize inspect bench; do
    "$longreach" $command --help > "$work/help" 2>&1 || fail "$command --help"
    grep -q '^Examples:' "$work/help" || fail "$command --help has no examples"
done
"$longreach" --help > /dev/null || fail "--help"
"$longreach" --version | grep -q '^longreach [0-9]' || fail "--version"

expect 2 "unknown command" "$longreach" dance
expect 2 "unknown option '--dance'" run --dance
expect 2 "needs a value" run --document
expect 2 "unexpected argument 'x'" run x
expect 2 "a --question or --questions is needed" run --document "$work/document"
expect 2 "--model and --document are needed" "$longreach" run --question x
expect 2 "--workers: 0 is out of range, it must be from 1 to 1024" run --workers 0
expect 2 "--workers: 1025 is out of range" run --workers 1025
expect 2 "--workers: 'two' is not a whole number" run --workers two
expect 2 "not a power of two" run --document "$work/document" --question x --segment-tokens 300
expect 2 "--segment-tokens: 64 is out of range" run --segment-tokens 64
expect 2 "--kv-device-memory: '24Q' is not a size like 800M" run --kv-device-memory 24Q
expect 2 "--kv-device-memory: '3MB' is not a size" run --kv-device-memory 3MB
expect 2 "--kv-host-memory: 0 is out of range" run --kv-host-memory 0
expect 2 "--kv-host-memory: 9000000T is out of range" run --kv-host-memory 9000000T
expect 2 "'loud' is not one of auto, full, sparse" run --attention loud
expect 2 "--temperature: -1 is out of range" run --temperature -1
expect 2 "--stop: the text is empty" run --document "$work/document" --question x --stop ''
expect 2 "--template has no {question}" run --document "$work/document" --question x --template y

expect 1 "nowhere" run --document "$work/nowhere" --question x --quiet
expect 1 "is empty" run --document "$work/empty" --question x --quiet
expect 1 "not valid UTF-8 at byte 17" run --document "$work/broken" --question x --quiet
expect 1 "not valid UTF-8" run --document "$work/document" --questions "$work/broken" --quiet
expect 1 "has no question" run --document "$work/document" --questions "$work/empty" --quiet
expect 1 "config.json" "$longreach" run --model "$work" --document "$work/document" --question x --quiet
expect 1 "multiple of 4" "$longreach" logits --model $model --ids "$work/three" --out "$work/l" --quiet
expect 1 "multiple of 4" "$longreach" logits --model $model --ids "$work/empty" --out "$work/l" --quiet
expect 1 "id 8192 at place 0 is outside the vocabulary of 8192" "$longreach" logits --model $model --ids "$work/ids8192" --out "$work/l" --quiet
expect 1 "id -1 at place 0" "$longreach" logits --model $model --ids "$work/negative" --out "$work/l" --quiet --workers 2
ids 10 "$work/ids"
expect 1 "'10' does not start with a position from 0 to 9" "$longreach" logits --model $model --ids "$work/ids" --out "$work/l" --positions 3,10 --quiet
expect 1 "3 does not come after 3" "$longreach" logits --model $model --ids "$work/ids" --out "$work/l" --positions 3,3 --quiet
expect 1 "cannot be written" "$longreach" logits --model $model --ids "$work/ids" --out "$work/no/l" --quiet
expect 1 "leaves no document" "$longreach" logits --model $model --ids "$work/ids" --out "$work/l" --full-last 10 --quiet
echo "5 8192" > "$work/list"
expect 1 "id 8192 at place 1 is no token" "$longreach" tokenize --model $model --decode "$work/list"
echo "5 six" > "$work/list"
expect 1 "'six" "$longreach" tokenize --model $model --decode "$work/list"
expect 1 "too few lines for 900 needles" "$longreach" needle --model $model --document "$work/document" --tokens 300 --needles 900 --quiet

expect 1 "no/picture.svg cannot be written" "$longreach" needle --model $model --document "$work/document" --tokens 300 --needles 2 \
    --svg "$work/no/picture.svg" --quiet
expect 1 "no/prompts.json cannot be written" "$longreach" needle --model $model --document "$work/document" --tokens 300 --needles 2 \
    --prompts "$work/no/prompts.json" --quiet
for option in --prompts --svg; do
    cp "$work/document" "$work/same"
    expect 1 "same is the document, and would be written over" "$longreach" needle --model $model --document "$work/same" \
        --tokens 300 --needles 2 $option "$work/same" --quiet
    cmp -s "$work/document" "$work/same" || fail "$option wrote over the document"
done
expect 1 "Is a directory" run --document "$work" --question x --quiet
cp -rL $model "$work/cut" && chmod -R u+w "$work/cut" && truncate -s 20000000 "$work/cut/model.safetensors"
expect 1 "the file has 19965168 of data" run --model "$work/cut" --document "$work/document" --question x --quiet --workers 2

# what cannot fit is refused before the first token, with the numbers
expect 1 "GiB" "$longreach" needle --model $model --document "$work/document" --tokens 2000000000 --needles 1 --quiet

# a GPU that is not there, and what only GPUs can do; where there is one, the first is no error
if ! "$longreach" logits --model $model --ids "$work/ids" --out "$work/l" --device cuda --quiet 2> "$work/err"; then
    expect 1 "$(grep -q 'no CUDA backend' "$work/err" && echo 'no CUDA backend' || echo 'no GPU')" \
        "$longreach" logits --model $model --ids "$work/ids" --out "$work/l" --device cuda --quiet --workers 2
fi
expect 1 "--transport nccl needs --device cuda" run --document "$work/document" --question x --device cpu --transport nccl --quiet
expect 2 "--device" run --document "$work/document" --question x --device tpu

# one token, eight workers; standard input; a template of one's own
printf 'a' | "$longreach" run --model $model --document - --question x --workers 8 --json --template 'Q {question}\nA' --max-new-tokens 3 > "$work/out" 2> "$work/err" ||
    fail "eight workers for one token: $(cat "$work/err")"
grep -q '"document_tokens":1,"workers":8' "$work/out" || fail "eight workers for one token: $(cat "$work/out")"

# stop texts, and the number of tokens
run --document "$work/document" --question "Who?" --max-new-tokens 20 --json --quiet > "$work/long"
run --document "$work/document" --question "Who?" --max-new-tokens 20 --json --quiet --stop . > "$work/short"
grep -q '"answer":"[^.]*","prompt' "$work/short" || fail "--stop: $(cat "$work/short")"
grep -q '"generated_tokens":20' "$work/long" || fail "--max-new-tokens: $(cat "$work/long")"
finish
