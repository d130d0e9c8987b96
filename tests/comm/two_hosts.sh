#!/usr/bin/env bash
# Runs an MPI program over two hosts: network namespaces with names of their own, joined by a cable.
#
#   host one: mpirun, workers 0..N-1 <--- veth 10.77.0.1/10.77.0.2 ---> host two: orted, workers N..2N-1
#
# usage: two_hosts.sh [--workers-per-host N] [--cut-after SECONDS [--gone-within SECONDS] [--why REGEX]]
#                     -- PROGRAM ARGUMENTS...
#
# The exit code is that of mpirun. With --cut-after the cable is pulled while the program runs; then the
# exit code is 0 where every process of both hosts ended within --gone-within seconds (20), mpirun's exit
# code was not 0, and a worker of each host wrote a line that matches --why to its standard error.
# Standard error is kept by each host for itself, since nothing crosses the cable any more, and shown at
# the end. 77 where this machine lets nobody make namespaces.
set -u

n_workers=1 cut_after='' gone_within=20 why='without a word from worker [0-9]+ \(host|is gone'
while [ $# -gt 0 ]; do
    case $1 in
        --workers-per-host) n_workers=$2; shift 2 ;;
        --cut-after) cut_after=$2; shift 2 ;;
        --gone-within) gone_within=$2; shift 2 ;;
        --why) why=$2; shift 2 ;;
        --) shift; break ;;
        *) echo "two_hosts: unknown option $1" >&2; exit 2 ;;
    esac
done
[ $# -gt 0 ] || { echo "usage: two_hosts.sh [OPTIONS] -- PROGRAM ARGUMENTS..." >&2; exit 2; }

one=lr$$one two=lr$$two # hosts and namespaces; mpirun's own files are named after the host
net=10.77.0.0/24
work=$(mktemp -d)
made=''

skip()
{
    echo "two_hosts: skipped: $*" >&2
    exit 77
}

pids_of()
{
    ip netns pids "$1" 2> /dev/null
}

clean_up()
{
    for host in $made; do
        pids=$(pids_of "$host")
        [ -z "$pids" ] || kill -KILL $pids 2> /dev/null
        ip netns delete "$host" 2> /dev/null
        rm -rf "/etc/netns/$host"
    done
    rmdir /etc/netns 2> /dev/null
    rm -rf "$work" "/tmp/ompi.$one.$(id -u)" "/tmp/ompi.$two.$(id -u)"
}
trap clean_up EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

command -v ip > /dev/null || skip "there is no ip(8)"
[ "$(id -u)" -eq 0 ] || skip "only root can make network namespaces"
unshare --uts true 2> /dev/null || skip "no name spaces for host names here"

make_host()
{
    ip netns add "$1" 2> /dev/null || skip "no network namespaces here"
    made="$made $1"
    mkdir -p "/etc/netns/$1"
    printf '127.0.0.1 localhost\n10.77.0.1 %s\n10.77.0.2 %s\n' "$one" "$two" > "/etc/netns/$1/hosts"
    ip -n "$1" link set lo up
}

make_host "$one"
make_host "$two"
ip -n "$one" link add cable type veth peer name cable netns "$two" 2> /dev/null || skip "no veth pairs here"
ip -n "$one" address add 10.77.0.1/24 dev cable
ip -n "$two" address add 10.77.0.2/24 dev cable
ip -n "$one" link set cable up
ip -n "$two" link set cable up

# What ssh is to others: agent HOST COMMAND..., and the first host's way in as well.
cat > "$work/agent" << 'AGENT'
#!/usr/bin/env bash
host=$1
shift
exec ip netns exec "$host" unshare --uts bash -c "hostname $host; $*"
AGENT
cat > "$work/worker" << 'WORKER'
#!/usr/bin/env bash
exec "$@" 2> "${0%/*}/stderr.$(hostname).$OMPI_COMM_WORLD_RANK"
WORKER
chmod +x "$work/agent" "$work/worker"

ip netns exec "$one" unshare --uts bash -c 'hostname "$0"; exec "$@"' "$one" \
    mpirun --allow-run-as-root --oversubscribe --bind-to none \
    --mca plm_rsh_agent "$work/agent" --mca btl tcp,self --mca pml ob1 \
    --mca btl_tcp_if_include "$net" --mca oob_tcp_if_include "$net" \
    -host "$one:$n_workers,$two:$n_workers" -n $((2 * n_workers)) \
    "$work/worker" "$@" 2> "$work/stderr.mpirun" < /dev/null &
mpirun=$!

show_errors()
{
    for file in "$work"/stderr.*; do
        [ -s "$file" ] && sed "s/^/[${file##*/stderr.}] /" "$file" >&2
    done
}

if [ -z "$cut_after" ]; then
    wait "$mpirun"
    code=$?
    show_errors
    exit "$code"
fi

# ---- the cable is pulled ----

failures=0
fail()
{
    echo "two_hosts: FAILED: $*" >&2
    failures=$((failures + 1))
}

now_ms()
{
    date +%s%3N
}

sleep "$cut_after"
for host in "$one" "$two"; do
    ls "$work/stderr.$host".* > /dev/null 2>&1 || fail "no worker had started on $host when the cable was pulled"
done
kill -0 "$mpirun" 2> /dev/null || fail "the program had ended before the cable was pulled"
ip -n "$one" link set cable down
cut_ms=$(now_ms)

gone=''
while [ $(($(now_ms) - cut_ms)) -lt $((gone_within * 1000)) ]; do
    for host in "$one" "$two"; do
        case $gone in *"$host"*) continue ;; esac
        if [ -z "$(pids_of "$host")" ]; then
            gone="$gone $host"
            echo "two_hosts: nothing is left on $host $(($(now_ms) - cut_ms)) ms after the cut"
        fi
    done
    case $gone in *"$one"*"$two"* | *"$two"*"$one"*) break ;; esac
    sleep 0.1
done
for host in "$one" "$two"; do
    pids=$(pids_of "$host" | tr '\n' ' ')
    [ -z "$pids" ] || fail "left on $host after $gone_within s: $(ps -o pid=,args= -p $pids | tr '\n' ';')"
    grep -qE -- "$why" "$work/stderr.$host".* 2> /dev/null || fail "no worker of $host said why"
done
if kill -0 "$mpirun" 2> /dev/null; then
    kill -KILL "$mpirun"
else
    wait "$mpirun"
    code=$?
    echo "two_hosts: exit code of mpirun: $code"
    [ "$code" -ne 0 ] || fail "mpirun ended with exit code 0"
fi
show_errors
[ "$failures" -eq 0 ]
