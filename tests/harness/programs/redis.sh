#!/bin/bash
# Redis with its heap in an arena: filled, overwritten, saved, emptied, refilled. Every value is checked, those of the save by a
# second Redis on normal memory. Prints how many are wrong.
set -e
cd /tmp
keys=${1:-20000}
fill='for i = 1, ARGV[2] do redis.call("set", "k" .. i, string.rep(ARGV[1] .. i, 60)) end return redis.call("dbsize")'
check='local wrong = 0 for i = 1, ARGV[2] do
    if redis.call("get", "k" .. i) ~= string.rep(ARGV[1] .. i, 60) then wrong = wrong + 1 end end return wrong'

# serve NAME COMMAND...: starts a server and waits for it
serve() {
    local name=$1
    shift
    "$@" redis-server --port 0 --unixsocket "/tmp/$name.sock" --save '' --dir /tmp --dbfilename dump.rdb >"/tmp/$name.log" 2>&1 &
    for _ in $(seq 300); do
        [ "$(redis-cli -s "/tmp/$name.sock" ping 2>/dev/null)" = PONG ] && return
        sleep 0.2
    done
    cat "/tmp/$name.log"
    exit 1
}

heap() { redis-cli -s /tmp/heap.sock "$@"; }

serve heap /tmp/ebb-guest run --no-fork --
heap eval "$fill" 0 a "$keys" >/dev/null
heap save >/dev/null
heap eval "$fill" 0 b "$keys" >/dev/null
wrong="heap $(heap eval "$check" 0 b "$keys")"
serve plain env
wrong="$wrong saved $(redis-cli -s /tmp/plain.sock eval "$check" 0 a "$keys")"
redis-cli -s /tmp/plain.sock shutdown nosave
heap flushall >/dev/null
sleep 0.5
heap eval "$fill" 0 c "$keys" >/dev/null
wrong="$wrong refilled $(heap eval "$check" 0 c "$keys")"
heap shutdown nosave
wait
! grep -e ebb-malloc -e ebb-guest /tmp/heap.log
echo "wrong: $wrong"
