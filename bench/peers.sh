#!/usr/bin/env bash
# longreach, llama.cpp and HuggingFace transformers on longreach-tiny in one run, taking turns, two threads each.
# usage: bench/peers.sh PEERS_DIR [ROUNDS]
#        PEERS_DIR has bin/llama-bench, tiny-{f32,bf16}.gguf made from the model, hf/ with the model's files,
#        and venv/ with torch and transformers
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/lib.sh
need_build
peers=${1:?usage: bench/peers.sh PEERS_DIR [ROUNDS]}
rounds=${2:-3}
python=$peers/venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# the same weights in float32, for the race of float32 against float32
mkdir "$work/f32"
cp $model/config.json $model/tokenizer.json "$work/f32"
"$python" - "$work/f32" <<'PY'
import sys
from safetensors.torch import load_file, save_file
save_file({k: v.float() for k, v in load_file("models/longreach-tiny/model.safetensors").items()}, sys.argv[1] + "/model.safetensors")
PY

# prints: WHO WORK TOKENS_PER_SECOND
ours() # WEIGHT_TYPE MODEL
{
    "$longreach" bench --model "$2" --document $book --attention full --threads 2 --json --tokens 2048,8192,32768 --decode 0 |
        while read -r line; do
            echo "longreach_$1 pp$(field tokens <<<"$line") $(field prefill_tokens_per_second <<<"$line")"
        done
    "$longreach" bench --model "$2" --document $book --attention full --threads 2 --json --tokens 2048 --decode 512 |
        field decode_tokens_per_second | sed "s/^/longreach_$1 tg@2048 /"
}
llama() # WEIGHT_TYPE
{
    local bench=("$peers/bin/llama-bench" -m "$peers/tiny-$1.gguf" -t 2 -b 2048 -ub 512 -fa 1 -r 1 -o jsonl)
    "${bench[@]}" -p 2048,8192,32768 -n 0 2>/dev/null | while read -r line; do
        echo "llama.cpp_$1 pp$(sed -nE 's/.*"n_prompt": ([0-9]+).*/\1/p' <<<"$line") $(sed -nE 's/.*"avg_ts": ([0-9.]+).*/\1/p' <<<"$line")"
    done
    "${bench[@]}" -p 0 -n 128 -d 2048 2>/dev/null | sed -nE "s/.*\"avg_ts\": ([0-9.]+).*/llama.cpp_$1 tg@2048 \1/p"
}
transformers()
{
    "$python" - "$peers/hf" 2>/dev/null <<'PY'
import sys, time, torch
from transformers import Qwen3NextForCausalLM
torch.set_num_threads(2)
model = Qwen3NextForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    for n in (2048, 8192, 32768):
        ids = torch.randint(3, 8192, (1, n))
        begin = time.time()
        out = model(ids, logits_to_keep=1, use_cache=n == 2048)
        print(f"transformers_f32 pp{n} {n / (time.time() - begin):.1f}", flush=True)
        if n == 2048:
            cache, token, begin = out.past_key_values, ids[:, -1:], time.time()
            for _ in range(32):
                out = model(token, past_key_values=cache, use_cache=True)
            print(f"transformers_f32 tg@2048 {32 / (time.time() - begin):.1f}", flush=True)
PY
}

header bench/peers.sh PEERS_DIR "$rounds"
"$python" -c 'import torch, transformers; print("transformers", transformers.__version__, "torch", torch.__version__)'
for round in $(seq "$rounds"); do
    { ours bf16 $model; ours f32 "$work/f32"; llama f32; llama bf16; [ "$round" -gt 1 ] || transformers; } >>"$work/all"
done
"$python" - "$work/all" <<'PY'
import statistics, sys
rates = {}
for line in open(sys.argv[1]):
    who, work, rate = line.split()
    rates.setdefault(who, {}).setdefault(work, []).append(float(rate))
works = ["pp2048", "pp8192", "pp32768", "tg@2048"]
print("tokens a second, median (all rounds); pp N: prefill of N tokens, full attention; tg@N: decoding behind N tokens")
for who, by_work in rates.items():
    print(f"{who.replace('_', ' '):18}" + "".join(
        f"  {w} {statistics.median(by_work[w]):.0f} ({' '.join(f'{r:.0f}' for r in by_work[w])})" for w in works if w in by_work))
def ratio(a, b, w):
    return statistics.median(rates[a][w]) / statistics.median(rates[b][w])
for a, b in (("longreach_f32", "llama.cpp_f32"), ("longreach_bf16", "llama.cpp_f32"), ("longreach_bf16", "llama.cpp_bf16"),
             ("longreach_f32", "transformers_f32")):
    print(f"{a.replace('_', ' ')} / {b.replace('_', ' ')}: " + ", ".join(f"{w} {ratio(a, b, w):.2f}" for w in works))
PY
