#!/usr/bin/env bash
# Fuzzes every parser with libFuzzer under AddressSanitizer and UBSan, one after the other.
# usage: tests/fuzz/run.sh [SECONDS]     (a target; default 300)
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-300}
# nothing that is fuzzed calls a kernel, and clang takes minutes to instrument each of them
mkdir -p build/fuzz
printf 'src:*/kernels/cpu/*\n' >build/fuzz/ignore.txt
ignore=$PWD/build/fuzz/ignore.txt
flags="-fsanitize-ignorelist=$ignore -fsanitize-coverage-ignorelist=$ignore"
flags+=" -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
cmake -S . -B build/fuzz -G Ninja -DCMAKE_C_COMPILER=clang -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_C_FLAGS="$flags" -DCMAKE_EXE_LINKER_FLAGS="-fsanitize=address,undefined" >/dev/null
cmake --build build/fuzz --target fuzz_safetensors fuzz_config fuzz_tokenizer fuzz_tokenize
seeds=build/fuzz/seeds
tests/fuzz/seeds.sh "$seeds"
for target in safetensors config tokenizer tokenize; do
    mkdir -p "build/fuzz/found/$target"
    echo "fuzz_$target for $seconds s"
    if ! "build/fuzz/tests/fuzz_$target" -max_total_time="$seconds" -rss_limit_mb=4096 -timeout=20 -print_final_stats=1 \
        -artifact_prefix="build/fuzz/found/$target-" "build/fuzz/found/$target" "$seeds/$target" >"build/fuzz/$target.log" 2>&1; then
        tail -n 40 "build/fuzz/$target.log"
        echo "fuzz_$target failed"
        exit 1
    fi
    grep -E 'number_of_executed_units|peak_rss' "build/fuzz/$target.log"
    if compgen -G "build/fuzz/found/$target-*" >/dev/null; then echo "fuzz_$target found something"; exit 1; fi
done
echo "nothing found"
