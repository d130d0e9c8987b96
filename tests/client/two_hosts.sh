#!/bin/sh
# Two hosts: two network namespaces joined by a veth pair, mpirun over TCP between them. Prefill and decoding across both
# give the same bytes; with the link cut half way every process of both hosts ends within the deadline, saying why.
. "$(dirname "$0")/lib.sh"

[ "$(id -u)" -eq 0 ] && ip netns add "lr-probe-$$" 2> /dev/null || { echo "skipped: network namespaces need root"; exit 77; }
ip netns del "lr-probe-$$"

a=lra$$ b=lrb$$
cleanup()
{
    for ns in $a $b; do
        ip netns pids $ns 2> /dev/null | xargs -r kill -9 2> /dev/null
        ip netns del $ns 2> /dev/null
        rm -rf "/etc/netns/$ns"
    done
    rm -rf "$work"
}
trap cleanup EXIT
for ns in $a $b; do
    ip netns add $ns
    mkdir -p "/etc/netns/$ns"
    printf '127.0.0.1 localhost\n10.77.0.1 %s\n10.77.0.2 %s\n' $a $b > "/etc/netns/$ns/hosts"
    ip -n $ns link set lo up
done
ip link add veth$a netns $a type veth peer name veth$b netns $b
ip -n $a addr add 10.77.0.1/24 dev veth$a
ip -n $b addr add 10.77.0.2/24 dev veth$b
ip -n $a link set veth$a up
ip -n $b link set veth$b up

# what mpirun takes for ssh: HOST COMMAND...
cat > "$work/agent" <<AGENT
#!/bin/sh
host=\$1
shift
exec ip netns exec "\$host" unshare --uts sh -c "hostname \$host; \$*"
AGENT
chmod +x "$work/agent"

# world WORKERS_A WORKERS_B COMMAND...
world()
{
    hosts="$a:$1,$b:$2" n=$(($1 + $2))
    shift 2
    ip netns exec $a unshare --uts sh -c 'hostname "$0"; exec "$@"' $a mpirun --allow-run-as-root --bind-to none \
        --mca plm_rsh_agent "$work/agent" --mca btl tcp,self,vader --mca btl_tcp_if_include 10.77.0.0/24 \
        --mca oob_tcp_if_include 10.77.0.0/24 --host "$hosts" -np $n "$@"
}

ids 3000 "$work/ids"
for mode in full sparse; do
    set -- logits --model $model --ids "$work/ids" --segment-tokens 256 --attention $mode --top-k-blocks 2 --experts sharded \
        --full-last 9 --quiet
    "$longreach" "$@" --out "$work/one" || fail "one host, $mode"
    for split in "1 1" "2 1" "1 3"; do
        # shellcheck disable=SC2086
        world $split "$longreach" "$@" --out "$work/two" 2> "$work/err" || fail "two hosts, $split, $mode: $(cat "$work/err")"
        cmp -s "$work/one" "$work/two" || fail "two hosts, $split, $mode: other bytes"
    done
done
head -c 9000 $book > "$work/document"
set -- run --model $model --document "$work/document" --question "Who spoke?" --question "And then?" --segment-tokens 256 \
    --json --max-new-tokens 10 --temperature 0.8 --seed 3
"$longreach" "$@" 2> /dev/null | grep -v summary > "$work/one"
world 1 2 "$longreach" "$@" 2> "$work/err" | grep -v summary > "$work/two"
[ "$(wc -l < "$work/one")" -eq 2 ] || fail "two answers: $(cat "$work/one")"
cmp -s "$work/one" "$work/two" || fail "two hosts answer differently: $(cat "$work/err")"

# the link is cut half way
( world 1 2 "$longreach" needle --model $model --document $book --tokens 1500000 --needles 2 --attention sparse \
    --experts sharded --timeout 3 > "$work/out" 2> "$work/err"; echo $? > "$work/code" ) &
i=0
while [ $i -lt 300 ] && ! grep -q 'tokens, 3 workers' "$work/err" 2> /dev/null; do sleep 0.2; i=$((i + 1)); done
sleep 3
ip -n $a link set veth$a down
i=0
while [ $i -lt 200 ] && { [ -n "$(ip netns pids $a)" ] || [ -n "$(ip netns pids $b)" ]; }; do sleep 0.1; i=$((i + 1)); done
[ $i -lt 200 ] || fail "cut: processes are left after 20 s: $(ip netns pids $a) / $(ip netns pids $b)"
echo "all ended $((i / 10)) s after the cut"
wait
[ "$(cat "$work/code")" != 0 ] || fail "cut: exit 0"
grep -qE "^longreach: in wave [0-9]+ of [0-9]+: worker [0-9]+ waited 3.0 s at '.*' without a word from worker" "$work/err" ||
    fail "cut: nobody said why: $(cat "$work/err")"
finish
