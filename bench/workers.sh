#!/usr/bin/env bash
# Two workers of one thread against one worker of two, the same document: experts replicated, and sharded.
# usage: bench/workers.sh [TOKENS] [ROUNDS]
set -euo pipefail
cd "$(dirname "$0")/.."
. bench/lib.sh
need_build
header bench/workers.sh "$@"
tokens=${1:-65536}
rounds=${2:-3}
seconds() { "$longreach" bench --model $model --document $book --tokens "$tokens" --decode 0 --attention sparse --json "$@" | field prefill_seconds; }
echo "$tokens tokens, sparse; seconds"
echo "round   1 x 2 threads   2 x 1, replicated   2 x 1, sharded"
rows=$(for round in $(seq "$rounds"); do
    one=$(seconds --workers 1 --threads 2)
    replicated=$(seconds --workers 2 --threads 1 --experts replicated)
    sharded=$(seconds --workers 2 --threads 1 --experts sharded)
    awk "BEGIN { printf \"%5d %15.2f %19.2f %16.2f   ratios %.3f %.3f\n\", $round, $one, $replicated, $sharded,
        $replicated / $one, $sharded / $one }"
done)
echo "$rows"
median() { awk "{ print \$$1 }" <<<"$rows" | sort -n | sed -n "$(((rounds + 1) / 2))p"; }
echo "median ratio to one worker: replicated $(median 6), sharded $(median 7)"
