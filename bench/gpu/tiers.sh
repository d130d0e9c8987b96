#!/usr/bin/env bash
# Keys and values in two tiers on one GPU: the same bytes, the time and the memory of a million tokens with all of them on
# the GPU and with a quarter; the memory that was planned against what is gone, within 5 %, at one and ten million tokens.
# usage: bench/gpu/tiers.sh [LONGREACH]     about a minute; exit 1 where something is not as promised
set -uo pipefail
cd "$(dirname "$0")/../.."
longreach=${1:-build/cuda-release/bin/longreach}
[ -x "$longreach" ] || { echo "no $longreach: cmake --preset cuda-release && cmake --build --preset cuda-release" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
tiny=(--model models/longreach-tiny --device cuda)
quarter=(--kv-device-memory 256M)

fail()
{
    echo "FAILED: $*"
    failures=$((failures + 1))
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || exit 77
python3 -c 'import random, array, sys
random.seed(1); array.array("i", [random.randrange(8192) for _ in range(1000000)]).tofile(open(sys.argv[1], "wb"))' "$work/ids"

# same MODE...: logits around seams of segments, and of a question behind the document
same()
{
    local positions=0,65535,65536,300000,655359,655360,999000,999960,999999
    for tier in one two; do
        [ $tier = one ] && limit=() || limit=("${quarter[@]}")
        timeout 120 "$longreach" logits "${tiny[@]}" --quiet --ids "$work/ids" --out "$work/$tier" --full-last 20 \
            --positions $positions --attention "$@" "${limit[@]}" || fail "logits $*"
    done
    cmp -s "$work/one" "$work/two" && echo "same bytes: 1,000,000 tokens, $*" || fail "$*: other bytes with two tiers"
}

# measure TOKENS OPTIONS...: seconds, tokens a second, memory; fails where what is gone is not what was planned
measure()
{
    local tokens=$1
    shift
    timeout 300 "$longreach" bench "${tiny[@]}" --document data/kjv.txt --tokens "$tokens" --decode 16 --json "$@" > "$work/line" ||
        fail "bench $tokens $*"
    python3 - "$work/line" "$tokens $*" <<'PY' || fail "$tokens $*: the memory is not as planned"
import json, sys
r = json.load(open(sys.argv[1]))
off = r["taken_bytes"] / r["planned_bytes"] - 1
print(f"{sys.argv[2]}: {r['prefill_seconds']:.4f} s, decoding {r['decode_tokens_per_second']:.0f} tokens/s; GPU memory "
      f"{r['planned_bytes'] / 2**20:.1f} MiB planned, {r['taken_bytes'] / 2**20:.1f} taken ({100 * off:+.2f} %), "
      f"{r['host_bytes'] / 2**20:.0f} MiB in host memory")
sys.exit(abs(off) > 0.05)
PY
}

same full
same sparse --top-k-blocks 16
for mode in "full" "sparse" "sparse --top-k-blocks 16" "sparse --decode-pages 8"; do
    # shellcheck disable=SC2086
    measure 1000000 --attention $mode
    # shellcheck disable=SC2086
    measure 1000000 --attention $mode "${quarter[@]}"
done
measure 10000000 --attention sparse
exit $((failures > 0))
