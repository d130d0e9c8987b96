#!/usr/bin/env bash
# Builds, checks and races the CUDA backend on this machine in one call; one results file with GPU, driver and commit.
# usage: bench/gpu/run.sh [--build DIR] [--longreach PATH] [--steps tests,client,sanitizer,bench,needles] [--races NAMES] [RESULTS_FILE]
#   --build DIR       takes DIR/tests/cuda/test_* and DIR/bin/*_bench_* as they are (a build of the preset cuda-release);
#                     without it everything but longreach is compiled here into build/gpu by nvcc and gcc alone
#   --longreach PATH  for the steps client (the same bytes and texts from several workers, and accuracy) and needles; default
#                     DIR/bin/longreach
#   --races NAMES     what the step bench races: attention,elementwise,experts,recurrence,sample (default: all)
#   sanitizer         memcheck, racecheck and synccheck of every test, with LR_TEST_SHORT=1, side by side; SECONDS_EACH (300)
#   needles           32 facts in 1,000,000 tokens with full attention, found by longreach and, from the same prompts, by
#                     transformers on PyTorch: at most one fact less
# Exits 1 where a test failed or a sanitizer found something. The reports are in DIR/sanitizer.
set -uo pipefail
cd "$(dirname "$0")/../.."

build='' longreach='' steps=tests,client,sanitizer,bench,needles races=attention,elementwise,experts,recurrence,sample results=''
while [ $# -gt 0 ]; do
    case $1 in
    --build) build=$2; shift 2 ;;
    --longreach) longreach=$2; shift 2 ;;
    --steps) steps=$2; shift 2 ;;
    --races) races=$2; shift 2 ;;
    -*) sed -n 2,12p "$0" >&2; exit 2 ;;
    *) results=$1; shift ;;
    esac
done
commit=${LR_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | head -1)
[ -n "$gpu" ] || { echo "no GPU here" >&2; exit 77; }
results=${results:-bench/results/gpu-$(echo "${gpu%%,*}" | tr ' ' '-')-$commit.txt}
mkdir -p "$(dirname "$results")"
export PATH=$PATH:/usr/local/cuda/bin LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}:/usr/local/cuda/lib64

# The architecture of a .cu file: this machine's, but for the kernels of sm_90 alone (kernels/CMakeLists.txt lists them).
hopper=$(sed -n 's/^set(LR_CUDA_HOPPER \(.*\))$/\1/p' kernels/CMakeLists.txt)
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
architecture()
{
    local number=$capability
    [[ $number != 90 && " $hopper " != *" cuda/$(basename "$1") "* ]] || number=90a
    echo "arch=compute_$number,code=sm_$number"
}

missing=()

# as many compilers at once as there are cores
free_core()
{
    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
}

# A program that does not build is in `missing`; the others go on. What touches activations is compiled for both types.
compile()
{
    build=build/gpu
    local objects=$build/objects c=(-std=gnu17 -D_GNU_SOURCE -O2 -I. -ffp-contract=off -fno-math-errno)
    local cuda=(-std=c++17 -O3 -lineinfo -I.)
    local file name type define
    mkdir -p "$objects" $build/tests/cuda $build/bin
    rm -f "$objects"/* $build/tests/cuda/* $build/bin/*_bench_*
    for type in bf16 f16; do
        define=-DLR_CUDA_${type^^}
        for file in kernels/cuda/*.cu; do
            free_core
            nvcc "${cuda[@]}" -gencode "$(architecture "$file")" "$define" -c "$file" -o "$objects/$(basename "$file" .cu)_$type.o" &
        done
        gcc "${c[@]}" "$define" -c kernels/cuda/table.c -o "$objects/table_$type.o" &
    done
    gcc "${c[@]}" -O3 -DLR_ISA_SUFFIX=c -DLR_SIMD_C -c kernels/cpu/sample.c -o "$objects/sample_c.o" &
    for file in base/*.c kernels/ref_*.c kernels/cpu/rope.c kernels/cuda/open.c; do
        free_core
        gcc "${c[@]}" -c "$file" -o "$objects/$(basename "$file").o" &
    done
    wait
    for file in attention_packet backend memory sample tma; do # these know no activations
        rm -f "$objects/${file}_f16.o"
    done
    ar rcs "$objects/liblr.a" "$objects"/*.o
    local link=("$objects/liblr.a" -lm)
    for type in bf16 f16; do
        define=-DLR_CUDA_${type^^}
        for file in tests/kernels/cuda/test_*.c; do
            free_core
            name=$(basename "$file" .c)_$type
            { gcc "${c[@]}" "$define" -c "$file" -o "$objects/$name.o" &&
                nvcc "${cuda[@]}" "$objects/$name.o" -o "$build/tests/cuda/$name" "${link[@]}"; } &
        done
        for file in tests/kernels/cuda/test_*.cu; do
            free_core
            nvcc "${cuda[@]}" -gencode "$(architecture "$file")" "$define" "$file" -o "$build/tests/cuda/$(basename "$file" .cu)_$type" "${link[@]}" &
        done
        for file in bench/gpu/*_bench.cu; do
            free_core
            nvcc "${cuda[@]}" -gencode "$(architecture "$file")" "$define" "$file" -o "$build/bin/$(basename "$file" .cu)_$type" "${link[@]}" &
        done
    done
    wait
    for type in bf16 f16; do
        for file in tests/kernels/cuda/test_*.c* bench/gpu/*_bench.cu; do
            name=$(basename "${file%.*}")_$type
            [ -x "$build/tests/cuda/$name" ] || [ -x "$build/bin/$name" ] || missing+=("$name")
        done
    done
}

# run SECONDS TITLE COMMAND...: the command's output, and a word where it failed
run()
{
    local seconds=$1 title=$2
    shift 2
    echo "== $title"
    timeout "$seconds" "$@" 2>&1
    local status=$?
    [ $status -eq 0 ] || [ $status -eq 77 ] || echo "FAILED ($status): $title"
}

# unknown_races LOG: how many of racecheck's reports are not the one that docs/testing.md explains: attention's note of a
# stage, read by a whole warp of which one lane gives the stage back, and written again by the producer
unknown_races()
{
    awk '/Race reported between/ { n += unknown; unknown = 0; inside = 1 }
        inside && !/Race reported between|^=========     and / { inside = 0 }
        inside && !/load_shared\(|ring_writer<.*>::put\(/ { unknown = 1 }
        END { print n + unknown }' "$1"
}
export -f unknown_races

# sanitize LOG_FOLDER TOOL KERNELS PROGRAM: one report and, last, a line for the summary
sanitize()
{
    local title log options=() begin=$SECONDS status
    title="$2 $(basename "$4") $3"
    log="$1/${title// /.}.log"
    [ "$2" = racecheck ] && options=(--racecheck-report analysis --racecheck-num-workers 2)
    # errors that calls return are not the sanitizer's business: one test asks for too much memory on purpose
    LR_CUDA_KERNELS=$3 LR_TEST_SHORT=1 timeout -k 5 "${SECONDS_EACH:-300}" compute-sanitizer --tool "$2" "${options[@]}" \
        --report-api-errors no --max-connections 100 --launch-timeout 60 --error-exitcode 9 "$4" > "$log" 2>&1
    status=$?
    if [ "$2" = racecheck ] && [ $status -eq 9 ] && [ "$(unknown_races "$log")" -eq 0 ]; then
        status=0 title+=" (explained)"
    fi
    echo "$title: exit $status, $((SECONDS - begin)) s, $(grep SUMMARY "$log" | tail -1)" >> "$log"
}
export -f sanitize

sanitize_all()
{
    local logs=$build/sanitizer tool kernels program log
    rm -rf "$logs"
    mkdir -p "$logs"
    for tool in racecheck memcheck synccheck; do
        for kernels in auto mma; do
            for program in "$build"/tests/cuda/test_*; do
                # racecheck does not come through clusters of thread blocks (docs/testing.md)
                [ $tool-$kernels = racecheck-auto ] && [[ $program == */test_sample_* ]] && continue
                printf '%s %s %s %s\n' "$logs" $tool $kernels "$program"
            done
        done
    done | xargs -P "$(nproc)" -L 1 bash -c 'sanitize "$0" "$1" "$2" "$3"'
    for log in "$logs"/*.log; do
        tail -1 "$log"
        tail -1 "$log" | grep -q ': exit 0,' && continue
        grep -E '^=========|WRONG|FAIL' "$log" | head -40
        echo "FAILED: $(basename "$log" .log)"
    done
}

test_client()
{
    local script
    for script in same_bytes same_text accuracy; do
        LR_TEST_DEVICE=cuda LR_TEST_SHORT=1 run 600 $script.sh sh tests/client/$script.sh "$longreach"
    done
}

needles()
{
    local files=$build/bench/needles
    mkdir -p "$build/bench"
    run 300 "needle, 1,000,000 tokens, full attention" "$longreach" needle --model models/longreach-tiny --document data/kjv.txt \
        --tokens 1000000 --needles 32 --seed 1 --attention full --device cuda --prompts "$files.json" --json --quiet |
        tee "$files.txt"
    run 300 needles_peer.py python3 bench/gpu/needles_peer.py "$files.json" --ours "$files.txt"
}

everything()
{
    echo "GPU $gpu; commit $commit; $(nvcc --version 2>/dev/null | tail -1); $(date -u +%Y-%m-%d)"
    local program race
    for program in "${missing[@]}"; do echo "FAILED: $program does not build"; done
    if [[ $steps == *tests* ]]; then
        for program in "$build"/tests/cuda/test_*; do
            run 60 "$(basename "$program")" "$program"
            run 60 "$(basename "$program"), portable kernels" env LR_CUDA_KERNELS=mma "$program"
        done
    fi
    if [[ $steps == *client* ]]; then
        if [ -x "$longreach" ]; then test_client; else echo "no longreach: the step client is left out"; fi
    fi
    if [[ $steps == *sanitizer* ]]; then
        sanitize_all
    fi
    if [[ $steps == *bench* ]]; then
        mkdir -p "$build/bench"
        for race in ${races//,/ }; do
            for program in "$build"/bin/"$race"_bench_*; do
                run 60 "$(basename "$program")" "$program" | tee "$build/bench/$(basename "$program").txt"
            done
            [ -f "bench/gpu/${race}_peers.py" ] || continue # ours in bf16, as peers compute
            run 300 "${race}_peers.py" python3 "bench/gpu/${race}_peers.py" "$build/bench/${race}_bench_bf16.txt"
        done
    fi
    if [[ $steps == *needles* ]]; then
        if [ -x "$longreach" ]; then needles; else echo "no longreach: the step needles is left out"; fi
    fi
}

[ -n "$build" ] || compile
longreach=${longreach:-$build/bin/longreach}
everything 2>&1 | tee "$results"
n_failed=$(grep -c '^FAILED' "$results")
echo "$n_failed programs failed" | tee -a "$results"
[ "$n_failed" -eq 0 ]
