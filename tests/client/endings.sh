#!/bin/sh
# Ends that nobody planned: one sentence with the rank and the wave, the exit code, and nothing left behind.
. "$(dirname "$0")/lib.sh"

mark=$$-endings
head -c 2000000 $book > "$work/document-$mark"
set -- needle --model $model --document "$work/document-$mark" --tokens 4000000 --needles 2 --attention sparse

worker() # the process of rank $1
{
    for p in $(pgrep -f "document-$mark"); do
        tr '\0' '\n' < "/proc/$p/environ" 2> /dev/null | grep -qx "OMPI_COMM_WORLD_RANK=$1" && echo "$p" && return
    done
}

# Waits until the workers have begun to read.
begun()
{
    i=0
    while [ $i -lt 300 ] && ! grep -q 'tokens, .* worker' "$work/err"; do sleep 0.2; i=$((i + 1)); done
    sleep 2
}

# Waits at most 10 s for the end; the code goes to $code.
ended()
{
    i=0
    while [ $i -lt 100 ] && kill -0 "$1" 2> /dev/null && ! grep -q . "$work/code" 2> /dev/null; do sleep 0.1; i=$((i + 1)); done
    [ -s "$work/code" ] || fail "$2: not ended after 10 s"
    wait "$1"
    code=$(cat "$work/code")
    sleep 0.3
    left=$(pgrep -f "document-$mark")
    [ -z "$left" ] || fail "$2: processes are left: $left"
    new=$(ls /dev/shm | grep -vxF "$shm_before" | grep -E 'vader|longreach|ompi')
    [ -z "$new" ] || fail "$2: shared memory is left: $new"
    sentences=$(grep -c '^longreach: ' "$work/err")
    [ "$sentences" -eq 1 ] || fail "$2: $sentences sentences: $(cat "$work/err")"
}

shm_before=$(ls /dev/shm; echo .)
start() # in the background, with its exit code in a file
{
    rm -f "$work/code"
    : > "$work/err"
    ( trap '' INT; "$@" > "$work/out" 2> "$work/err"; echo $? > "$work/code" ) &
    shell=$!
    begun
}

for workers in 2 3; do
    for rank in 0 1; do
        start "$longreach" "$@" --workers $workers
        kill -KILL "$(worker $rank)"
        ended $shell "SIGKILL of worker $rank of $workers"
        [ "$code" = 1 ] || fail "SIGKILL of worker $rank of $workers: exit $code"
        grep -qE "^longreach: worker $rank \(.*\) is gone in wave [0-9]+ of [0-9]+$" "$work/err" ||
            fail "SIGKILL of worker $rank of $workers: $(cat "$work/err")"
    done
done

for workers in 1 2; do # the shell above ignores SIGINT, and its children inherit that
    start "$longreach" "$@" --workers $workers
    for p in $(pgrep -f "longreach needle.*document-$mark"); do
        tr '\0' '\n' < "/proc/$p/environ" | grep -q '^OMPI_COMM_WORLD_RANK=' || [ "$(cat "/proc/$p/comm")" != longreach ] ||
            kill -INT "$p"
    done
    ended $shell "SIGINT with $workers workers"
    [ "$code" = 130 ] || fail "SIGINT with $workers workers: exit $code"
    grep -qE '^longreach: interrupted in wave [0-9]+ of [0-9]+$' "$work/err" || fail "SIGINT: $(cat "$work/err")"
done

start mpirun --allow-run-as-root --oversubscribe --bind-to none -np 2 "$longreach" "$@"
kill -KILL "$(worker 1)"
ended $shell "SIGKILL under mpirun"
[ "$code" -ne 0 ] || fail "SIGKILL under mpirun: exit $code"
sentence=$(grep -nE '^longreach: worker 1 .* is gone in wave' "$work/err" | cut -d: -f1)
banner=$(grep -n 'mpirun noticed that process rank 1' "$work/err" | cut -d: -f1)
[ -n "$sentence" ] && [ -n "$banner" ] && [ "$sentence" -lt "$banner" ] || fail "SIGKILL under mpirun: $(cat "$work/err")"
finish
