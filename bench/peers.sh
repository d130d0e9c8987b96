#!/usr/bin/env bash
# longreach and llama.cpp on longreach-tiny in one run, taking turns, two threads.
# usage: bench/peers.sh LLAMA_DIR [ROUNDS]     LLAMA_DIR has bin/llama-bench and tiny-{f32,bf16}.gguf
set -euo pipefail
cd "$(dirname "$0")/.."
llama=$1
rounds=${2:-3}
longreach=build/cpu-release/bin/longreach
common=(--model models/longreach-tiny --document data/kjv.txt --attention full --threads 2 --json)
echo "commit $(git rev-parse --short HEAD), $(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2), $(nproc) cores, load $(cut -d' ' -f1 /proc/loadavg)"
for round in $(seq "$rounds"); do
    echo "round $round"
    "$longreach" bench "${common[@]}" --tokens 2048,8192,32768 --decode 256 |
        python3 -c 'import json, sys
for line in sys.stdin:
    r = json.loads(line)
    print("longreach bf16 weights  pp%d %.0f  tg %.0f" % (r["tokens"], r["prefill_tokens_per_second"], r["decode_tokens_per_second"]))'
    for type in f32 bf16; do
        "$llama/bin/llama-bench" -m "$llama/tiny-$type.gguf" -t 2 -p 2048,8192,32768 -n 64 -b 2048 -ub 512 -fa 1 -r 1 2>/dev/null |
            awk -v type=$type -F'|' '/pp|tg/ { print "llama.cpp " type $8 $9 }'
    done
done
