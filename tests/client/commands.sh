#!/bin/sh
# What the commands print when all is well: the documented lines of JSON, the needle's table and picture, ids and back.
. "$(dirname "$0")/lib.sh"

head -c 3000 $book > "$work/document"
printf 'Who?\n\nWhat "is" this?\n' > "$work/questions"

# run --json: the keys, in the order asked, the summary last
"$longreach" run --model $model --document "$work/document" --questions "$work/questions" --question First --workers 2 --json \
    > "$work/out" 2> "$work/err" || fail "run --json: $(cat "$work/err")"
python3 - "$work/out" <<'PY' || fail "run --json: $(cat "$work/out")"
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
answers, summary = lines[:-1], lines[-1]["summary"]
assert [a["question"] for a in answers] == ["First", "Who?", 'What "is" this?']
for a in answers:
    assert list(a) == ["question", "answer", "prompt_tokens", "cached_tokens", "generated_tokens"], a
    assert a["cached_tokens"] == summary["document_tokens"] and a["prompt_tokens"] > a["cached_tokens"]
    assert 1 <= a["generated_tokens"] <= 64
assert any(a["generated_tokens"] == 64 for a in answers)
assert summary["workers"] == 2 and summary["attention"] == "full" and len(summary["peak_rss_bytes"]) == 2
assert summary["prefill_seconds"] > 0 and summary["decode_seconds"] > 0 and min(summary["peak_rss_bytes"]) > 1 << 20
assert len(summary["memory"]) == 2
for use in summary["memory"]:
    assert list(use) == ["planned_bytes", "reserved_bytes", "taken_bytes", "host_planned_bytes", "host_reserved_bytes"], use
    assert abs(use["reserved_bytes"] - use["planned_bytes"]) <= use["planned_bytes"] / 20
    assert 0 < use["taken_bytes"] <= use["reserved_bytes"] and use["host_reserved_bytes"] == 0
PY
grep -q 'full attention (auto: up to 131,072 tokens)' "$work/err" || fail "auto does not say what it chose: $(cat "$work/err")"

# a table and a progress line, from standard input; the answers do not depend on where the experts are
"$longreach" run --model $model --document - --question Who? --workers 2 < "$work/document" > "$work/table" 2> "$work/err" ||
    fail "run: $(cat "$work/err")"
grep -qE "^a session's memory: .* planned, .* reserved, .* taken$" "$work/table" || fail "run does not show its memory: $(cat "$work/table")"
"$longreach" run --model $model --document "$work/document" --question Who? --segment-tokens 128 --kv-dtype bf16 --kv-device-memory 500K \
    > "$work/tiers" 2> "$work/err" || fail "run in two tiers: $(cat "$work/err")"
grep -qx "keys and values: 448.00 KiB in the backend's memory, 768.00 KiB in host memory (6 of 8 segments of a worker)" "$work/err" ||
    fail "run does not say where keys and values are: $(cat "$work/err")"
grep -q '; 768.00 KiB of host memory for keys and values$' "$work/tiers" || fail "run in two tiers: $(cat "$work/tiers")"
"$longreach" inspect $model --tokens 1014 --segment-tokens 128 --kv-dtype bf16 --kv-device-memory 500K > "$work/plan" || fail "inspect"
grep -q '768.00 KiB of keys and values in host memory (6 of 8 segments of each layer)' "$work/plan" || fail "inspect: $(cat "$work/plan")"
grep -q 'tokens read in' "$work/table" || fail "run prints no table: $(cat "$work/table")"
LONGREACH_COLUMNS=100 "$longreach" run --model $model --document "$work/document" --question Who? --segment-tokens 128 --workers 2 \
    2>&1 > /dev/null | tr '\r' '\n' > "$work/bar"
grep -qE 'reading.*of 1,014 tokens.*wave [0-9]+/4.*tokens/s.*ETA' "$work/bar" || fail "no progress bar: $(cat "$work/bar")"
for experts in sharded replicated; do
    "$longreach" run --model $model --document "$work/document" --question Who? --workers 2 --experts $experts --json --quiet |
        grep -v summary > "$work/$experts"
done
cmp -s "$work/sharded" "$work/replicated" || fail "answers depend on where the experts are"

# under the user's own mpirun the same command joins that world: here with a hostfile
echo 'localhost slots=3' > "$work/hosts"
mpirun --allow-run-as-root --bind-to none --hostfile "$work/hosts" -np 3 "$longreach" run --model $model \
    --document "$work/document" --question Who? --json --quiet > "$work/out" 2> "$work/err" || fail "mpirun: $(cat "$work/err")"
[ "$(wc -l < "$work/out")" -eq 2 ] && grep -q '"workers":3' "$work/out" || fail "mpirun: $(cat "$work/out")"
[ "$(head -n 1 "$work/out")" = "$(cat "$work/sharded")" ] || fail "mpirun answers differently"
mpirun --allow-run-as-root --oversubscribe --bind-to none -np 2 "$longreach" run --model $model --document "$work/document" \
    --question Who? --workers 3 > "$work/out" 2> "$work/err" && fail "--workers 3 in a world of 2 was taken"
grep -q -- '--workers 3, but mpirun started 2' "$work/err" || fail "--workers 3 in a world of 2: $(cat "$work/err")"
SLURM_STEP_NUM_TASKS=2 expect 2 "srun started 2 separate processes" \
    "$longreach" run --model $model --document "$work/document" --question Who?

# needle: every fact of a short document, both modes, two seeds; the picture, and its path
for mode in full sparse; do
    for seed in 1 2; do
        "$longreach" needle --model $model --document $book --tokens 4400 --needles 24 --seed $seed --workers 2 --experts sharded \
            --attention $mode --svg "$work/needle.svg" > "$work/out" 2> "$work/err" || fail "needle: $(cat "$work/err")"
        grep -qE "^24 of 24 found in 4,8[0-9]{2} tokens, $mode attention, density [01]\.[0-9]+$" "$work/out" ||
            fail "needle, $mode, seed $seed: $(grep -E 'MISSED|found in' "$work/out")"
    done
done
grep -qx "picture: $work/needle.svg" "$work/out" || fail "needle does not say where its picture is"
grep -qE "^worker 1: .* at most, [0-9.]+ % of the experts' rows$" "$work/out" || fail "needle does not show the workers' loads"
python3 -c 'import sys, xml.etree.ElementTree as tree; tree.parse(sys.argv[1])' "$work/needle.svg" || fail "the picture is no XML"
[ "$(grep -c '<circle' "$work/needle.svg")" -ge 24 ] || fail "the picture does not have 24 facts"
"$longreach" needle --model $model --document "$work/document" --tokens 5000 --needles 3 --seed 3 --json --quiet \
    --prompts "$work/prompts" > "$work/out" || fail "needle --json"
[ "$(grep -c '"found":true' "$work/out")" -eq 3 ] || fail "needle in a repeated document: $(cat "$work/out")"

# its prompts: what was planted, asked and counted, so that others can answer them too
python3 - "$work/prompts" "$work/out" "$work/planted" <<'PY' || fail "needle --prompts"
import json, sys
prompts = json.load(open(sys.argv[1], encoding="utf-8"))
lines = [json.loads(line) for line in open(sys.argv[2], encoding="utf-8")]
assert list(prompts) == ["document", "tokens", "questions"], list(prompts)
assert prompts["tokens"] == lines[-1]["summary"]["document_tokens"]
assert len(prompts["questions"]) == len(lines) - 1 == 3
for asked, line in zip(prompts["questions"], lines):
    assert list(asked) == ["prompt", "expected", "depth"], asked
    assert (asked["expected"], asked["depth"]) == (line["expected"], line["depth"])
    assert f"The {line['fact']} is {line['expected']}.\n" in prompts["document"], line
    assert asked["prompt"] == f"\nQuestion: What is the {line['fact']}?\nAnswer: ", asked
open(sys.argv[3], "w", encoding="utf-8", newline="").write(prompts["document"])
PY
n_tokens=$("$longreach" tokenize --model $model "$work/planted" | wc -w)
grep -q "\"tokens\":$n_tokens," "$work/prompts" || fail "--prompts: the document has $n_tokens tokens"

# text to ids, and back to the exact bytes
printf 'A <|endoftext|> and \360\237\230\200\r\n\ttabs,  spaces 1234567\n' > "$work/text"
"$longreach" tokenize --model $model "$work/text" > "$work/ids" && [ "$(wc -l < "$work/ids")" -eq 1 ] || fail "tokenize"
"$longreach" tokenize --model $model --decode "$work/ids" | cmp -s - "$work/text" || fail "tokenize --decode"
"$longreach" tokenize --model $model - --parse-special < "$work/text" > "$work/special" || fail "tokenize --parse-special"
[ "$(wc -w < "$work/special")" -lt "$(wc -w < "$work/ids")" ] || fail "--parse-special made no special token"

# logits: the sizes that were asked for
ids 10 "$work/ids10"
"$longreach" logits --model $model --ids "$work/ids10" --out "$work/all" --quiet || fail "logits"
[ "$(wc -c < "$work/all")" -eq $((10 * 8192 * 4)) ] || fail "logits wrote $(wc -c < "$work/all") bytes"
"$longreach" logits --model $model --ids "$work/ids10" --out "$work/some" --positions 0,9 --quiet || fail "logits --positions"
{ head -c 32768 "$work/all"; tail -c 32768 "$work/all"; } | cmp -s - "$work/some" || fail "logits --positions"
cp -r $model "$work/no-tokenizer" && rm "$work/no-tokenizer/tokenizer.json"
"$longreach" logits --model "$work/no-tokenizer" --ids "$work/ids10" --out "$work/other" --quiet && cmp -s "$work/all" "$work/other" ||
    fail "logits needs a tokenizer"

# what a model is, and what a document would need; tokens a second
"$longreach" inspect $model --tokens 10000000 --workers 2 --kv-dtype bf16 > "$work/out" || fail "inspect"
for words in 'layers        8:' 'parameters    18,398,128' 'recurrent state' '1.00 KiB a token (bf16)' '10,000,000 tokens on 2 workers' \
    'keys, values 4.77 GiB' 'together'; do
    grep -qF "$words" "$work/out" || fail "inspect has no '$words'"
done
"$longreach" bench --model $model --document $book --tokens 300,600 --decode 4 --side-by-side 3 --workers 2 --json > "$work/out" ||
    fail "bench"
[ "$(grep -c '"prefill_tokens_per_second":[0-9.]*,"decode_side_by_side":3,"decode_tokens_per_second":[1-9]' "$work/out")" -eq 2 ] ||
    fail "bench: $(cat "$work/out")"
finish
