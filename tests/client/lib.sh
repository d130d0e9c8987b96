# What the shell tests share. Usage: script.sh PATH_OF_LONGREACH, from the repository's root.
set -u
longreach=$1
model=models/longreach-tiny
book=data/kjv.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
short=${LR_TEST_SHORT:-0} # 1: fewer of what is alike

fail()
{
    echo "FAILED: $*" >&2
    failures=$((failures + 1))
}

finish()
{
    [ "$failures" -eq 0 ] || { echo "$failures failed" >&2; exit 1; }
    echo "all as expected"
}

# expect CODE SENTENCE COMMAND...: the exit code, and one line on standard error that has the sentence
expect()
{
    code=$1 sentence=$2
    shift 2
    "$@" > "$work/out" 2> "$work/err"
    got=$?
    [ "$got" -eq "$code" ] || fail "exit $got instead of $code: $* ($(head -n 3 "$work/err"))"
    grep -qF -- "$sentence" "$work/err" || fail "no '$sentence' from: $* ($(head -n 3 "$work/err"))"
    grep -qE 'ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer' "$work/err" && fail "sanitizer: $*"
    if [ "$code" -eq 1 ]; then
        n=$(grep -c '^longreach: ' "$work/err")
        [ "$n" -eq 1 ] || fail "$n sentences from: $*"
    fi
}

# ids N FILE: N token ids that look random and are always the same
ids()
{
    printf %b "$(awk -v n="$1" 'BEGIN { x = 12345; for (i = 0; i < n; i++) { x = (x * 1103515245 + 12345) % 2147483648;
        v = int(x / 65536) % 8192; printf "\\0%03o\\0%03o\\0000\\0000", v % 256, int(v / 256) } }')" > "$2"
}

# with_device: from here on every command runs on LR_TEST_DEVICE (default cpu); without such a device the test is skipped
with_device()
{
    device=${LR_TEST_DEVICE:-cpu}
    printf '#!/bin/sh\ncommand=$1\nshift\nexec "%s" "$command" --device %s "$@"\n' "$longreach" "$device" > "$work/longreach"
    chmod +x "$work/longreach"
    longreach=$work/longreach
    [ "$device" = cpu ] && return
    ids 1 "$work/probe"
    "$longreach" logits --model $model --quiet --ids "$work/probe" --out "$work/probe.out" 2> "$work/err" && return
    echo "skipped: $(cat "$work/err")"
    exit 77
}
