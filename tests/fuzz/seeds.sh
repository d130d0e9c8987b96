#!/usr/bin/env bash
# Collects what the fuzz targets start from: the oracle's fixtures, the files of each target in a folder of its own.
# usage: tests/fuzz/seeds.sh DIRECTORY
set -euo pipefail
seeds=$(realpath -m "${1:?usage: seeds.sh DIRECTORY}")
cd "$(dirname "$0")/../oracle"
rm -rf "$seeds"
mkdir -p "$seeds"/{safetensors,config,tokenizer,tokenize}
for model in models/*/; do
    name=$(basename "$model")
    cp "$model/config.json" "$seeds/config/$name.json"
    for file in "$model"/*.safetensors; do cp "$file" "$seeds/safetensors/$name-$(basename "$file")"; done
done
for tokenizer in tokenizer/*/; do cp "$tokenizer/tokenizer.json" "$seeds/tokenizer/$(basename "$tokenizer").json"; done
for case in tokenizer/case_*.txt; do
    i=$(basename "${case//[!0-9]/}")
    # the first byte: how the text is read, see fuzz_tokenize.c
    { printf "\\x$(printf %x $((10#$i % 8)))"; cat "$case"; } >"$seeds/tokenize/$(basename "$case")"
done
