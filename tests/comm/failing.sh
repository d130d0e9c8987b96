#!/bin/sh
# How a world ends when worker 1 fails: soon, with an exit code and a sentence, and nothing left behind.
# usage: failing.sh COMM_WORKER WORKERS FAILURE [OPTION...]     (FAILURE and OPTION: see comm_worker.c)
set -u
worker=$1 n_workers=$2 failure=$3
shift 3
work=$(mktemp -d) # its name is an argument of every worker: that is how they are found
trap 'rm -rf "$work"' EXIT
failures=0

fail()
{
    echo "FAILED: $failure with $n_workers workers: $1" >&2
    failures=$((failures + 1))
}

# The wrapper notes the job's number, which names its shared memory; timeout is what a hang runs into.
began=$(date +%s)
timeout -k 5 60 mpirun --allow-run-as-root --oversubscribe --bind-to none -n "$n_workers" \
    sh -c 'echo "$OMPI_MCA_ess_base_jobid" > "$0/job"; exec "$@"' "$work" "$worker" "$@" "$failure" "$work" \
    > "$work/out" 2> "$work/err" < /dev/null
code=$?

# said RANK SENTENCE: what this worker was told has the sentence
said()
{
    grep -qF -- "$2" "$work/worker.$1" 2> /dev/null ||
        fail "worker $1 was not told '$2' but: $(cat "$work/worker.$1" 2>&1)"
}

# all_said SENTENCE: the same for all but worker 1
all_said()
{
    rank=0
    while [ "$rank" -lt "$n_workers" ]; do
        [ "$rank" -eq 1 ] || said "$rank" "$1"
        rank=$((rank + 1))
    done
}

heard()
{
    grep -qE -- "$1" "$work/err" || fail "no '$1' on standard error"
}

exits_with()
{
    [ "$code" -eq "$1" ] || fail "exit $code instead of $1"
}

case $failure in
    diverge-*)
        exits_with 3
        all_said "[workers out of step]"
        all_said "'layer 7 experts'"
        all_said "worker 1 is at step"
        said 1 "[workers out of step]"
        said 1 "worker 1 is at step"
        ;;
    late | late-gather | late-payload | stopped)
        exits_with 4
        all_said "[deadline exceeded]"
        all_said "'layer 7 experts'"
        all_said "' without a word from worker 1 (host "
        ;;
    given-up)
        exits_with 6
        all_said "[cancelled] the links were given up"
        ;;
    die)
        [ "$code" -ne 0 ] && [ "$code" -ne 124 ] || fail "exit $code"
        heard "worker 1 \(host [^ ]+, process [0-9]+\).* (is|are) gone"
        ;;
    unclosed)
        # mpirun 4.1 itself may crash or hang when it is told to end while workers end too; then it is killed
        [ "$code" -eq 1 ] || [ "$code" -eq 137 ] || [ "$code" -eq 139 ] || fail "exit $code"
        [ $(($(date +%s) - began)) -lt 40 ] || fail "the world ended only when the test gave up"
        heard "^longreach: the workers did not all come to an end within the deadline"
        ;;
    absent)
        exits_with 1
        heard "^longreach: MPI did not start within the deadline"
        ;;
    *) fail "unknown" ;;
esac
case $failure in
    diverge-label | diverge-trail) all_said "'layer 8 experts'" ;;
    diverge-kind) all_said "barrier 'layer 7 experts'" && all_said "sum 'layer 7 experts'" ;;
    diverge-skip) all_said "'layer 8 experts'" ;;
    diverge-small) all_said "sends 101" ;;
    diverge-seam) all_said "sends 441" ;;
    diverge-large) all_said "sends 3145728" ;;
    diverge-started) all_said "sends 100000" ;;
esac
grep -qE 'Segmentation fault|ERROR: AddressSanitizer|runtime error:|WARNING: ThreadSanitizer' "$work/err" &&
    fail "a worker crashed"

# Watchers (comm/ending.h) may outlive mpirun for a moment.
tries=0
while left=$(pgrep -f -- "$work") && [ "$tries" -lt 100 ]; do
    tries=$((tries + 1))
    sleep 0.1
done
if [ -n "$left" ]; then
    fail "left behind: $(pgrep -af -- "$work")"
    kill -KILL $left
fi

# Shared memory of Open MPI is named after the host, the user and the job.
job=$(printf '%x' "$(cat "$work/job")")
for path in /dev/shm/*"$job"* /tmp/*"$job"*; do
    [ -e "$path" ] || continue
    if [ "$code" -lt 128 ]; then fail "left behind: $path"; else rm -rf "$path"; fi # a dead mpirun removes nothing
done

[ "$failures" -eq 0 ] || { cat "$work/err" >&2; exit 1; }
