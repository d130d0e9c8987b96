#!/bin/sh
# The same bytes from any number of workers: logits at lengths around every seam, full and sparse.
. "$(dirname "$0")/lib.sh"
with_device

logits() { "$longreach" logits --model $model --quiet "$@" || fail "logits $*"; }

lengths="1 2 15 16 17 63 64 65 127 128 129 255 256 257 383 385 640 1281"
several="2 3 5 8"
last=13000 positions=0,63,4095,4096,8191,8192,12288,12869,12870,12999
[ "$short" = 1 ] && lengths="1 65 129 385" several="2 3" last=8200 positions=0,63,4095,4096,8069,8070,8199
for n in $lengths; do
    ids $n "$work/ids"
    for mode in full sparse; do
        logits --ids "$work/ids" --out "$work/1" --attention $mode --segment-tokens 128 --top-k-blocks 2 --threads 1
        for workers in $several; do
            logits --ids "$work/ids" --out "$work/$workers" --attention $mode --segment-tokens 128 --top-k-blocks 2 \
                --workers $workers --experts sharded
            cmp -s "$work/1" "$work/$workers" || fail "$n tokens, $mode: $workers workers differ"
        done
    done
done

# more than a wave of the default segments; windows that reach over several workers; a question behind them
ids $last "$work/ids"
for mode in full sparse; do
    for workers in 1 2 3; do
        logits --ids "$work/ids" --out "$work/$workers" --attention $mode --top-k-blocks 3 --full-last 130 \
            --workers $workers --positions $positions
    done
    cmp -s "$work/1" "$work/2" || fail "$last tokens, $mode: 2 workers differ"
    cmp -s "$work/1" "$work/3" || fail "$last tokens, $mode: 3 workers differ"
done
finish
