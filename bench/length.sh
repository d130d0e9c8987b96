#!/usr/bin/env bash
# Time a token from 32,768 to 1,000,000 tokens, sparse; and a million tokens of prefill against its own GEMMs.
# usage: bench/length.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/lib.sh
need_build
header bench/length.sh
gemm_rate() # GFLOP/s of two threads on the widest layer's shape, weights packed once as the model packs them (bf16)
{
    build/cpu-release/bin/bench_gemm | awk '/^2048 x 512 x 256, 2 threads/ { on = 1 } on && /bf16 weights/ { print $5; exit }'
}
before=$(gemm_rate)
for tokens in 32768 262144 1000000; do
    line=$("$longreach" bench --model $model --document $book --tokens $tokens --decode 0 --attention sparse --threads 2 --json)
    seconds=$(field prefill_seconds <<<"$line")
    [ $tokens = 32768 ] && first=$(awk "BEGIN { print $seconds / $tokens }")
    awk "BEGIN { printf \"%9d tokens  %8.2f s  %6.2f us a token  %.3f of the time at 32,768\n\", $tokens, $seconds,
        1e6 * $seconds / $tokens, $seconds / $tokens / $first }"
done
after=$(gemm_rate)
awk "BEGIN { rate = ($before + $after) / 2; gemms = 13.7e12 / rate / 1e9
    printf \"GEMM of two threads: %.0f GFLOP/s before, %.0f after; 13.7 TFLOP of it: %.1f s\n\", $before, $after, gemms
    printf \"a million tokens: %.2f of the time of its own GEMMs\n\", $seconds / gemms }"
