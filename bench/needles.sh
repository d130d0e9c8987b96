#!/usr/bin/env bash
# Recall, time and memory of the main job: the Bible at 131,072 tokens in both modes, at 1,000,000 tokens with three seeds.
# usage: bench/needles.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/lib.sh
need_build
header bench/needles.sh
needles() # TOKENS MODE SEED
{
    local command=(needle --model $model --document $book --tokens "$1" --needles 32 --seed "$3" --workers 2
        --experts sharded --attention "$2" --quiet)
    echo
    echo "\$ longreach ${command[*]}"
    "$longreach" "${command[@]}" | sed -n '/MISSED/p; /found in/,$p'
}
needles 131072 full 1
needles 131072 sparse 1
for seed in 1 2 3; do needles 1000000 sparse $seed; done
