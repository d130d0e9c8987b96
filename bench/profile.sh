#!/usr/bin/env bash
# Where the time goes: perf over one worker of two threads that reads a document, and over decoding.
# usage: bench/profile.sh      needs perf (linux-perf)
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/lib.sh
need_build
header bench/profile.sh
data=$(mktemp)
trap 'rm -f "$data"' EXIT
profile() # TITLE BENCH_OPTIONS...
{
    echo
    echo "$1: longreach bench ${*:2}"
    perf record -q -o "$data" -F 499 -- "$longreach" bench --model $model --document $book --threads 2 "${@:2}" | tail -n 1
    perf report -i "$data" --stdio --no-children -F overhead,dso,symbol --percent-limit 0.7 2>/dev/null | grep -E '^ +[0-9]' || true
}
profile "prefill, sparse" --tokens 65536 --attention sparse --decode 0
profile "prefill, full" --tokens 32768 --attention full --decode 0
profile "decoding 32 side by side" --tokens 65536 --attention sparse --decode 300 --side-by-side 32
profile "decoding one" --tokens 2048 --attention full --decode 6000
