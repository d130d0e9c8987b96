#!/bin/sh
# How often the most likely token is the one of transformers in float32, at every position of the fixture's 6,000 tokens,
# for each type of activations. Float32 must agree everywhere but at ties of rounding. Where rounded activations differ, the
# two best tokens were close, or an expert was chosen otherwise because two of them were.
. "$(dirname "$0")/lib.sh"
with_device

# compare LEAST_SHARE MOST_MARGIN OPTION...
compare()
{
    share=$1 margin=$2
    shift 2
    "$longreach" logits --model $model --quiet --ids tests/oracle/tiny/ids_6000.bin --out "$work/logits" "$@" ||
        { fail "logits $*"; return; }
    if python3 tests/oracle/compare_argmax.py "$work/logits" $share $margin > "$work/said" 2>&1; then
        echo "$device $*: $(cat "$work/said")"
    else
        fail "$device $*: $(cat "$work/said")"
    fi
}

if [ "$device" = cpu ]; then
    compare 1 1e-4
else
    compare 0.98 1.2 --act-dtype bf16
    compare 0.995 1.2 --act-dtype f16
fi
finish
