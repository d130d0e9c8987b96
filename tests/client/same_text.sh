#!/bin/sh
# The same answers whatever the number of workers or threads, the instruction set, the company of a question.
. "$(dirname "$0")/lib.sh"
with_device

several="2 3 5 8"
bytes=24000
[ "$short" = 1 ] && several="2 3" bytes=6000
head -c $bytes $book > "$work/document"
i=0
while [ $i -lt 32 ]; do
    echo "What did the man number $i of the city say?"
    i=$((i + 1))
done > "$work/questions"

ask() { "$longreach" run --model $model --document "$work/document" --segment-tokens 512 --max-new-tokens 12 --json "$@" 2> "$work/err" |
    grep -v '"summary"' || fail "run $*: $(cat "$work/err")"; }

for sampling in "" "--temperature 0.9 --top-k 40 --top-p 0.95 --seed 7" "--temperature 1.3 --seed 8 --decode-pages 4"; do
    [ "$short" = 1 ] && [ -z "$sampling" ] && continue
    # shellcheck disable=SC2086
    ask --questions "$work/questions" $sampling > "$work/1"
    [ "$(wc -l < "$work/1")" -eq 32 ] || fail "not 32 answers: $sampling"
    for workers in $several; do
        # shellcheck disable=SC2086
        ask --questions "$work/questions" $sampling --workers $workers --experts sharded > "$work/$workers"
        cmp -s "$work/1" "$work/$workers" || fail "$workers workers answer differently: $sampling"
    done
    # shellcheck disable=SC2086
    ask --question "What did the man number 17 of the city say?" $sampling > "$work/alone"
    grep -qxF -- "$(cat "$work/alone")" "$work/1" || fail "alone the answer differs: $sampling"
done
ask --questions "$work/questions" --temperature 0.9 --seed 7 > "$work/a"
ask --questions "$work/questions" --temperature 0.9 --seed 9 > "$work/b"
cmp -s "$work/a" "$work/b" && fail "two seeds gave the same 32 answers"
[ "$(sort -u "$work/a" | wc -l)" -gt 20 ] || fail "the sampled answers are nearly all the same"

if [ "$device" = cuda ]; then # instruction sets and float32 keys are the CPU's
    finish
    exit 0
fi
ids 700 "$work/ids"
compared=0
for mode in full sparse; do
    for isa in c v3 v4; do
        for kv in f32 bf16; do
            if "$longreach" logits --model $model --ids "$work/ids" --out "$work/$isa-$kv" --isa $isa --kv-dtype $kv \
                --segment-tokens 256 --attention $mode --top-k-blocks 2 --quiet 2> "$work/err"; then
                cmp -s "$work/c-$kv" "$work/$isa-$kv" || fail "--isa $isa differs from c: $mode, $kv"
                compared=$((compared + 1))
            else
                grep -q "this machine has no" "$work/err" || fail "--isa $isa: $(cat "$work/err")"
            fi
        done
    done
done
[ $compared -ge 4 ] || fail "only $compared instruction sets ran"
finish
