#!/usr/bin/env bash
# Builds bench_gemm with its peers (libdnnl-dev, libopenblas-dev) into build/bench and runs it.
# usage: bench/gemm.sh [--rounds N] [--isa auto|v4|v3]
set -euo pipefail

cd "$(dirname "$0")/.."
build_log=$(cmake -S . -B build/bench -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DLR_BENCH_PEERS=ON \
                  -DBUILD_TESTING=OFF 2>&1 && cmake --build build/bench --target bench_gemm 2>&1) ||
    { echo "$build_log"; exit 1; }
grep -h "bench_gemm: no" <<<"$build_log" || true
. bench/lib.sh
header bench/gemm.sh "$@"
exec build/bench/bin/bench_gemm "$@"
