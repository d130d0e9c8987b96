#!/usr/bin/env bash
# Installs, builds, and runs the main job: a cluster of two workers reads the King James Bible, a million tokens of it, with
# 32 facts planted at random depths, and is asked for every one of them.
# usage: deploy/quickstart.sh [TOKENS]     (default 1000000)
set -euo pipefail
cd "$(dirname "$0")/.."
tokens=${1:-1000000}
./deploy/install-deps.sh
cmake --preset cpu-release >/dev/null
cmake --build --preset cpu-release --target longreach
mkdir -p build/quickstart
exec build/cpu-release/bin/longreach needle --model models/longreach-tiny --document data/kjv.txt \
    --tokens "$tokens" --needles 32 --seed 1 --workers 2 --experts sharded --attention sparse \
    --svg "$PWD/build/quickstart/needle.svg"
