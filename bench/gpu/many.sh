#!/usr/bin/env bash
# The same engine on 1, 2, 4 .. N GPUs of this host over NCCL: the same bytes, the speed and what it loses, decoding, experts
# on different GPUs, a worker that is killed, and peers in the same run. Results go to a file, a part after another.
# usage: bench/gpu/many.sh N [--part NAME]... [--bin DIR] [--out FILE]
#   N        GPUs to use at most; with fewer here, several workers share them over staged MPI: a rehearsal
#   --part   build bytes links tiny decode next kill peers ten-million; may be repeated; default: all but build and
#            ten-million (10,000,000 tokens, with full attention 102 PFLOP: on the largest set). A part takes at most
#            ten minutes
#   --bin    where longreach, comm_worker and links_bench are; default: build/cuda-release, where `build` puts them
#   --out    default: bench/results/gpu-many-N-COMMIT.txt; parts that come later are added
# Exits 1 where bytes differ or something was left behind, 77 without a GPU.
set -uo pipefail
cd "$(dirname "$0")/../.."

usage()
{
    sed -n '4,11p' "$0" >&2
    exit 2
}

n=${1:-}
case $n in '' | *[!0-9]*) usage ;; esac
shift
parts=() bin=build/cuda-release out=
while [ $# -gt 1 ]; do
    case $1 in
    --part) parts+=("$2") ;;
    --bin) bin=$2 ;;
    --out) out=$2 ;;
    *) usage ;;
    esac
    shift 2
done
[ $# -eq 0 ] || usage
[ ${#parts[@]} -gt 0 ] || parts=(bytes links tiny decode next kill peers)
gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
[ "$gpus" -ge 1 ] || { echo "no GPU here" >&2; exit 77; }
commit=${LR_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
out=${out:-bench/results/gpu-many-$n-$commit.txt}
mkdir -p "$(dirname "$out")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} # NVLink multicast stays off
tiny=(--model models/longreach-tiny --quiet --device cuda)
book=(--document data/kjv.txt)
mpi=(mpirun --allow-run-as-root --oversubscribe --bind-to none)
if [ "$n" -le "$gpus" ]; then transport=nccl links=nccl; else transport=mpi links=staged; fi
counts=(1)
for c in 2 4 8; do
    [ "$c" -le "$n" ] && counts+=("$c")
done

# The program of this name, wherever a build puts it.
program()
{
    find "$bin" -type f -name "$1" -perm -u+x 2>/dev/null | head -1
}

fail()
{
    echo "FAILED: $*"
}

# longreach SECONDS WORKERS COMMAND...
longreach()
{
    local limit=$1 w=$2
    shift 2
    timeout "$limit" "$(program longreach)" "$@" --workers "$w" --transport "$([ "$w" = 1 ] && echo auto || echo $transport)"
}

part_build()
{
    cmake --preset cuda-release > "$work/log" && cmake --build --preset cuda-release --target longreach comm_worker links_bench \
        >> "$work/log" 2>&1 || { fail build; tail -5 "$work/log"; }
}

# N token ids that look random and are always the same
ids()
{
    python3 -c '
import random, struct, sys
draw = random.Random(12345)
n = int(sys.argv[1])
sys.stdout.buffer.write(struct.pack("<%di" % n, *(draw.randrange(8192) for _ in range(n))))' "$1" > "$work/ids"
}

# same WHAT: $work/1 is $work/2, $work/4 ..., and not empty
same()
{
    local w
    for w in "${counts[@]}"; do
        [ -s "$work/$w" ] && cmp -s "$work/1" "$work/$w" || fail "$1: $w workers differ"
    done
}

# Lengths around the seams of blocks, segments and waves; in full waves of full attention the last row is shared.
part_bytes()
{
    local length mode w temperature
    for length in 1 127 129 255 257 640 2048 5000; do
        ids $length
        for mode in full sparse; do
            for w in "${counts[@]}"; do
                longreach 120 "$w" logits "${tiny[@]}" --ids "$work/ids" --segment-tokens 128 --attention $mode \
                    --top-k-blocks 2 --experts sharded --out "$work/$w" || fail "logits, $w workers"
            done
            same "logits of $length tokens, $mode"
        done
    done
    for temperature in 0 1; do
        for w in "${counts[@]}"; do
            longreach 120 "$w" run "${tiny[@]}" --document README.md --question 'What is this?' \
                --question 'Who wrote it, and when?' --segment-tokens 256 --temperature $temperature --seed 7 \
                --experts "$([ $temperature = 0 ] && echo replicated || echo sharded)" --json | grep -v summary > "$work/$w"
        done
        same "text at temperature $temperature"
    done
    echo "logits at 8 lengths, full and sparse, greedy and sampled text, from ${counts[*]} workers over $transport"
}

part_links()
{
    local w
    for w in "${counts[@]}"; do
        [ "$w" = 1 ] && continue
        timeout 200 "${mpi[@]}" -n "$w" "$(program comm_worker)" --cuda --links $links all || fail "collectives of $w workers"
        timeout 200 "${mpi[@]}" -n "$w" "$(program links_bench)" $links || fail "links_bench of $w workers"
    done
}

# The numbers of a line of `longreach bench`, and what they are to those of one worker, kept in $work/one.
compare()
{
    python3 -c '
import json, os, sys
lines = [json.loads(line) for line in sys.stdin if line.startswith("{")]
if not lines:
    sys.exit("FAILED: no measurement")
m = lines[-1]
if m["workers"] == 1:
    json.dump(m, open(sys.argv[1], "w"))
one = json.load(open(sys.argv[1])) if os.path.exists(sys.argv[1]) else m
speedup = one["prefill_seconds"] / m["prefill_seconds"]
waits = [100 * m[k] / m["prefill_seconds"] for k in ("least_wait_seconds", "most_wait_seconds")]
print("%d workers, %s: %.4f s, %.0f tokens/s, %.2fx, efficiency %.3f; waiting %.1f to %.1f %%; "
      "memory %.1f MiB, %.3f of the plan; decode %d side by side: %.1f tokens/s, %.2fx" % (
      m["workers"], m["attention"], m["prefill_seconds"], m["prefill_tokens_per_second"], speedup, speedup / m["workers"],
      waits[0], waits[1], m["taken_bytes"] / 2**20, m["taken_bytes"] / m["planned_bytes"], m["decode_side_by_side"],
      m["decode_tokens_per_second"], m["decode_tokens_per_second"] / one["decode_tokens_per_second"]
      if one["decode_tokens_per_second"] else 0.0))' "$work/one"
}

# measure TOKENS BENCH_ARGUMENTS... : a line for each number of workers and placement; a shorter document warms up
measure()
{
    local w experts tokens=$1
    shift
    rm -f "$work/one"
    for w in "${counts[@]}"; do
        for experts in replicated sharded; do
            [ "$w" = 1 ] && [ $experts = sharded ] && continue
            echo -n "experts $experts, "
            longreach 280 "$w" bench "$@" --quiet --device cuda --experts $experts --tokens "$((tokens / 8)),$tokens" --json |
                compare || fail "$w workers: $*"
        done
    done
}

part_tiny()
{
    local mode
    for mode in full sparse; do
        measure 1000000 --model models/longreach-tiny "${book[@]}" --attention $mode --decode 16
    done
    longreach 200 "${counts[-1]}" needle "${tiny[@]}" "${book[@]}" --tokens 1000000 --needles 32 --seed 1 --attention full |
        tail -n $((2 + counts[-1]))
}

part_decode()
{
    local side
    for side in 1 32; do
        measure 1000000 --model models/longreach-tiny "${book[@]}" --attention sparse --decode 64 --side-by-side $side
    done
}

part_next()
{
    python3 bench/gpu/make_model.py "$work/next" | tail -1
    measure 262144 --model "$work/next" "${book[@]}" --attention full --decode 32
    measure 1000000 --model "$work/next" "${book[@]}" --attention sparse --decode 32
    rm -rf "$work/next"
}

part_kill()
{
    local w begin pid victim code
    for w in "${counts[@]}"; do
        [ "$w" = 1 ] && continue
        longreach 120 "$w" needle "${tiny[@]}" "${book[@]}" --tokens 4000000 --needles 4 --seed 2 --attention full > "$work/log" 2>&1 &
        pid=$!
        sleep $((6 + w))
        victim=$(pgrep -f "longreach needle" | sort -n | tail -1)
        begin=$(date +%s%N)
        kill -9 "$victim"
        wait $pid
        code=$?
        echo "$w workers: exit $code after $((($(date +%s%N) - begin) / 1000000)) ms: $(tail -1 "$work/log")"
        grep -q "is gone" "$work/log" || fail "nobody said who was killed"
        sleep 2
        pgrep -f "longreach needle" > /dev/null && fail "a process is left"
        nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | awk '$1 > 600 { left = 1 } END { exit left }' ||
            fail "GPU memory stays held: $(nvidia-smi --query-gpu=memory.used --format=csv,noheader | tr '\n' ' ')"
    done
}

part_peers()
{
    local w
    for w in "${counts[@]}"; do
        [ "$w" = 1 ] || [ "$w" -gt "$gpus" ] && continue
        OMP_NUM_THREADS=1 timeout 280 python3 -m torch.distributed.run --standalone --nproc-per-node "$w" bench/gpu/many_peers.py 2>&1 |
            grep --line-buffered -v Warning
    done
}

part_ten_million()
{
    local mode
    for mode in sparse full; do
        longreach 590 "${counts[-1]}" needle "${tiny[@]}" "${book[@]}" --tokens 10000000 --needles 32 --seed 1 --attention $mode |
            tail -n $((2 + counts[-1]))
    done
}

everything()
{
    local part
    echo "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sort | uniq -c | head -1); commit $commit; $(date -u +%Y-%m-%d); $transport"
    for part in "${parts[@]}"; do
        echo "== $part"
        [ "$part" = build ] || [ -n "$(program longreach)" ] || { fail "no longreach in $bin: --part build"; return; }
        "part_${part//-/_}"
    done
}
everything 2>&1 | tee -a "$out" | tee "$work/out"
! grep -q '^FAILED' "$work/out"
