#!/bin/bash
# Redis with its heap in an arena: a save by a forked child while everything is overwritten, FLUSHALL, refill. Every value
# is checked, those of the save by a second Redis on normal memory. Prints how many are wrong.
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

serve heap /tmp/ebb-guest run --
heap eval "$fill" 0 a "$keys" >/dev/null
heap bgsave >/dev/null
heap eval "$fill" 0 b "$keys" >/dev/null
while heap info persistence | grep -q rdb_bgsave_in_progress:1; do sleep 0.1; done
heap info persistence | grep -q rdb_last_bgsave_status:ok || { cat /tmp/heap.log; exit 1; }
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
! grep ebb-malloc /tmp/heap.log
echo "wrong: $wrong"
