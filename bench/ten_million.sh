#!/usr/bin/env bash
# Ten million tokens, keys and values in bf16 (one million: bench/needles.sh); and what does not fit, refused.
# usage: bench/ten_million.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/lib.sh
need_build
header bench/ten_million.sh
command=(needle --model $model --document $book --tokens 10000000 --needles 32 --seed 1 --workers 2
    --experts sharded --attention sparse --kv-dtype bf16 --quiet)
echo
echo "\$ longreach ${command[*]}"
TIMEFORMAT="%R s in all, %U s of user and %S s of system time"
time "$longreach" "${command[@]}" | sed -n '/MISSED/p; /found in/,$p'
for kv in f32 bf16; do
    command=(needle --model $model --document $book --tokens 100000000 --needles 32 --workers 2 --kv-dtype $kv --quiet)
    echo
    echo "\$ longreach ${command[*]}"
    begin=$EPOCHREALTIME
    code=0
    "$longreach" "${command[@]}" 2>&1 || code=$?
    echo "exit $code after $(awk "BEGIN { printf \"%.1f\", $EPOCHREALTIME - $begin }") s"
done
