#!/bin/sh
# Keys and values in two tiers: the same bytes as with all of them in one, from any number of workers.
. "$(dirname "$0")/lib.sh"
with_device

several="1 2 3 5"
n=6010 positions=0,127,128,129,1300,2559,2560,4000,5119,5120,5975,5976,5977,6009
[ "$short" = 1 ] && several="1 3" n=3010 positions=0,127,128,1300,2559,2560,2975,2976,2977,3009
kv=bf16
[ "$device" = cuda ] && kv=auto
logits() { "$longreach" logits --model $model --kv-dtype $kv --segment-tokens 128 --quiet "$@" || fail "logits $*"; }

# A block, which is a slab here, has 64 KiB in each of two layers. The first size holds a stage and two slots and nothing
# else; a slot has room for one page for each KV head where questions read pages.
ids $n "$work/ids"
compare()
{
    mode=$1
    shift
    # shellcheck disable=SC2086
    logits --ids "$work/ids" --out "$work/one" --attention $mode --full-last 33 --positions $positions
    for size in "$@"; do
        for workers in $several; do
            # shellcheck disable=SC2086
            logits --ids "$work/ids" --out "$work/two" --attention $mode --full-last 33 --positions $positions \
                --workers $workers --kv-device-memory $size
            cmp -s "$work/one" "$work/two" || fail "$mode, $size on $workers workers: other bytes than without"
        done
    done
}
compare full 192K 1M
compare sparse 192K 1536K
compare "sparse --top-k-blocks 2" 192K 2304K
compare "sparse --decode-pages 3" 320K 2M

head -c 9000 $book > "$work/document"
i=0
while [ $i -lt 6 ]; do
    echo "What did the man number $i of the city say?"
    i=$((i + 1))
done > "$work/questions"
ask() { "$longreach" run --model $model --document "$work/document" --questions "$work/questions" --kv-dtype $kv --segment-tokens 128 \
    --max-new-tokens 8 --temperature 0.9 --seed 3 --attention full --json "$@" 2> "$work/err" | grep -v '"summary"' ||
    fail "run $*: $(cat "$work/err")"; }
for pages in 0 4; do
    ask --decode-pages $pages > "$work/one"
    [ "$(wc -l < "$work/one")" -eq 6 ] || fail "not 6 answers"
    for workers in $several; do
        ask --decode-pages $pages --workers $workers --kv-device-memory 1700K > "$work/two"
        cmp -s "$work/one" "$work/two" || fail "pages $pages, $workers workers: other answers than without a second tier"
    done
done

# What cannot be is said with its numbers.
refused() { expect 1 "$1" "$longreach" logits --model $model --kv-dtype $kv --segment-tokens 128 --quiet --ids "$work/ids" --out "$work/no" \
    --attention full "$2" "$3" "$4" "$5"; }
refused "MiB may take 0.125 MiB of" --kv-device-memory 128K --workers 1
refused "takes at least 0.188 MiB" --kv-device-memory 128K --workers 1
refused "and 0.00 GiB of host memory may be used for them" --kv-device-memory 192K --kv-host-memory 1M
finish
