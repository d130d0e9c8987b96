#!/usr/bin/env bash
# The same engine on 1 .. N GPUs of this host over NCCL: the same bytes, the time of a million tokens, decoding, experts on
# different GPUs, a worker that is killed. Each part is one call of at most ten minutes; results go to a file.
# usage: bench/gpu/many.sh N [--part bytes|tiny|next|ten-million|kill]... [--longreach PATH] [--out FILE]
#   N          GPUs to use at most: measured with 1, 2, 4 ... N workers
#   --part     may be repeated; default: bytes tiny next kill (ten-million reads 10,000,000 tokens, full attention too)
set -uo pipefail
cd "$(dirname "$0")/../.."

n=${1:-}
case $n in '' | *[!0-9]*) sed -n '4,6p' "$0" >&2; exit 2 ;; esac
shift
parts=() longreach=build/cuda-release/bin/longreach out=
while [ $# -gt 1 ]; do
    case $1 in
    --part) parts+=("$2") ;;
    --longreach) longreach=$2 ;;
    --out) out=$2 ;;
    *) sed -n '4,6p' "$0" >&2; exit 2 ;;
    esac
    shift 2
done
[ ${#parts[@]} -gt 0 ] || parts=(bytes tiny next kill)
[ -x "$longreach" ] || { echo "no $longreach: cmake --preset cuda-release && cmake --build --preset cuda-release" >&2; exit 1; }
gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
[ "$gpus" -ge 1 ] || { echo "no GPU here" >&2; exit 77; }
commit=${LR_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
out=${out:-bench/results/gpu-many-$n-$commit.txt}
mkdir -p "$(dirname "$out")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} # NVLink multicast stays off
failures=0
tiny=(--model models/longreach-tiny --quiet --device cuda)
book=(--document data/kjv.txt)

counts=(1)
for c in 2 4 8; do
    [ "$c" -le "$n" ] && [ "$c" -le "$gpus" ] && counts+=("$c")
done

fail()
{
    echo "FAILED: $*"
    failures=$((failures + 1))
}

# N token ids that look random and are always the same
ids()
{
    printf %b "$(awk -v n="$1" 'BEGIN { x = 12345; for (i = 0; i < n; i++) { x = (x * 1103515245 + 12345) % 2147483648;
        v = int(x / 65536) % 8192; printf "\\0%03o\\0%03o\\0000\\0000", v % 256, int(v / 256) } }')" > "$work/ids"
}

part_bytes()
{
    local length mode w
    for length in 1 127 129 255 257 640 5000; do
        ids $length
        for mode in full sparse; do
            for w in "${counts[@]}"; do
                timeout 120 "$longreach" logits "${tiny[@]}" --ids "$work/ids" --segment-tokens 128 --attention $mode \
                    --top-k-blocks 2 --experts sharded --workers "$w" --out "$work/$w" || fail "logits, $w GPUs"
                cmp -s "$work/1" "$work/$w" || fail "$length tokens, $mode: $w GPUs differ"
            done
        done
    done
    for w in "${counts[@]}"; do
        timeout 120 "$longreach" run "${tiny[@]}" --document README.md --question 'What is this?' --question 'Who wrote it, and when?' \
            --segment-tokens 256 --temperature 1 --seed 7 --experts sharded --workers "$w" --json | grep -v summary > "$work/$w"
        cmp -s "$work/1" "$work/$w" || fail "sampled text: $w GPUs differ"
    done
    echo "logits at 7 lengths, full and sparse, and sampled text, from ${counts[*]} GPUs: $failures differences"
}

measure() # MODEL_ARGUMENTS... : one line of the bench for each number of workers
{
    local w experts
    for w in "${counts[@]}"; do
        for experts in replicated sharded; do
            [ "$w" = 1 ] && [ $experts = sharded ] && continue
            echo "$w GPUs, experts $experts: $(timeout 300 "$longreach" bench "$@" --quiet --device cuda --workers "$w" --experts $experts --json |
                tr '\n' ' ')"
        done
    done
}

part_tiny()
{
    local mode
    for mode in sparse full; do
        measure --model models/longreach-tiny "${book[@]}" --attention $mode --tokens 1000000 --decode 64
    done
    measure --model models/longreach-tiny "${book[@]}" --attention sparse --tokens 1000000 --decode 64 --side-by-side 32
    timeout 200 "$longreach" needle "${tiny[@]}" "${book[@]}" --tokens 1000000 --needles 32 --seed 1 --attention full \
        --workers "${counts[-1]}" | tail -n $((2 + ${counts[-1]}))
}

part_ten_million()
{
    local mode
    for mode in sparse full; do
        timeout 590 "$longreach" needle "${tiny[@]}" "${book[@]}" --tokens 10000000 --needles 32 --seed 1 --attention $mode \
            --workers "${counts[-1]}" | tail -n $((2 + ${counts[-1]}))
    done
}

part_next()
{
    python3 bench/gpu/make_model.py "$work/next" | tail -1
    measure --model "$work/next" "${book[@]}" --attention full --tokens 262144 --decode 32
    measure --model "$work/next" "${book[@]}" --attention sparse --tokens 1000000 --decode 32
    rm -rf "$work/next"
}

part_kill()
{
    local w begin pid victim
    for w in "${counts[@]}"; do
        [ "$w" = 1 ] && continue
        "$longreach" needle "${tiny[@]}" "${book[@]}" --tokens 4000000 --needles 4 --seed 2 --attention full --workers "$w" \
            > "$work/log" 2>&1 &
        pid=$!
        sleep $((6 + w))
        victim=$(pgrep -f "longreach needle" | sort -n | tail -1)
        begin=$(date +%s%N)
        kill -9 "$victim"
        wait $pid
        echo "$w GPUs: exit $? after $((($(date +%s%N) - begin) / 1000000)) ms: $(tail -1 "$work/log")"
        sleep 2
        pgrep -f "longreach needle" > /dev/null && fail "a process is left"
        nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | awk '$1 > 600 { left = 1 } END { exit left }' ||
            fail "GPU memory stays held: $(nvidia-smi --query-gpu=memory.used --format=csv,noheader | tr '\n' ' ')"
    done
}

everything()
{
    echo "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sort | uniq -c | head -1); commit $commit; $(date -u +%Y-%m-%d)"
    for part in "${parts[@]}"; do
        echo "== $part"
        "part_${part//-/_}"
    done
    echo "$failures failed"
}
everything > >(tee "$out") 2>&1
[ "$failures" -eq 0 ]
