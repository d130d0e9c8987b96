#!/usr/bin/env bash
# Installs, builds and runs all tests.
# usage: tests/run.sh [--asan | --tsan]     (default: the optimised build)
set -euo pipefail
cd "$(dirname "$0")/.."
preset=cpu-release
case "${1:-}" in
    "") ;;
    --asan) preset=cpu-asan ;;
    --tsan) preset=cpu-tsan ;;
    *) echo "usage: tests/run.sh [--asan | --tsan]" >&2; exit 2 ;;
esac
./deploy/install-deps.sh
cmake --preset "$preset" >/dev/null
cmake --build --preset "$preset"
exec ctest --test-dir "build/$preset" --output-on-failure -j2
