#!/bin/sh
# A model whose logits are no numbers: every command that needs them ends with one sentence that names the position.
. "$(dirname "$0")/lib.sh"
with_device

head -c 2000 $book > "$work/document"
ids 100 "$work/ids"
hint=""
[ "$device" = cuda ] && hint=": activations exceeded float16's range: use --act-dtype bf16"

# poison WORD: the model with one bf16 word of its last norm replaced
poison()
{
    rm -rf "$work/model"
    mkdir "$work/model"
    cp $model/config.json $model/tokenizer.json $model/model.safetensors "$work/model"
    python3 - "$work/model/model.safetensors" "$1" <<'PY' || fail "poison"
import json, sys
with open(sys.argv[1], "r+b") as f:
    n = int.from_bytes(f.read(8), "little")
    at = json.loads(f.read(n))["model.norm.weight"]["data_offsets"][0]
    f.seek(8 + n + at + 2 * 7)
    f.write(int(sys.argv[2], 16).to_bytes(2, "little"))
PY
}

for word in 7fc0 7f80; do # NaN, infinity
    poison $word
    for workers in 1 3; do
        set -- --model "$work/model" --workers $workers --quiet
        expect 1 " hold NaN or infinity$hint" "$longreach" run --document "$work/document" --question Who? "$@"
        grep -qE 'the logits of position [0-9]+ hold' "$work/err" || fail "run names no position"
        expect 1 " hold NaN or infinity$hint" "$longreach" run --document "$work/document" --question Who? --temperature 1 "$@"
        expect 1 "the logits of position 0 hold NaN or infinity$hint" "$longreach" logits --ids "$work/ids" --out "$work/x" "$@"
        expect 1 "the logits of position 57 hold NaN or infinity$hint" \
            "$longreach" logits --ids "$work/ids" --out "$work/x" --positions 57,58 "$@"
        expect 1 "the logits of position 98 hold NaN or infinity$hint" \
            "$longreach" logits --ids "$work/ids" --out "$work/x" --positions 99 --full-last 2 "$@"
    done
    expect 1 " hold NaN or infinity$hint" "$longreach" needle --model "$work/model" --document $book --tokens 3000 --needles 2 --quiet
    expect 1 " hold NaN or infinity$hint" "$longreach" bench --model "$work/model" --document "$work/document" --tokens 500 --decode 2
done
finish
