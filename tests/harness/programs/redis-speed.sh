#!/bin/bash
# How fast Redis is. `redis-speed.sh start KEYS [COMMAND...]` starts one, below COMMAND, lets redis-benchmark set and get, fills KEYS
# values of 4 KiB, and prints `set=N get=N` in operations a second; `flush` empties it; `end` ends it.
set -e
cd /tmp
cli() { redis-cli -s /tmp/speed.sock "$@"; }

case $1 in
start)
    keys=$2
    shift 2
    "$@" redis-server --port 0 --unixsocket /tmp/speed.sock --save '' >/tmp/speed.log 2>&1 &
    for _ in $(seq 300); do
        [ "$(cli ping 2>/dev/null)" = PONG ] && break
        sleep 0.2
    done
    speed=$(redis-benchmark -s /tmp/speed.sock -q --csv -t set,get -c 8 -n 20000 -d 1024 -r 5000 |
        sed -n 's/^"\([SG]ET\)","\([0-9.]*\)".*/\1=\2/p' | tr 'SETG\n' 'setg ')
    cli eval 'for i = 1, ARGV[1] do redis.call("set", "k" .. i, string.rep("x", 4096)) end' 0 "$keys" >/dev/null
    echo "speed: $speed"
    ;;
flush) cli flushall >/dev/null ;;
end)
    cli shutdown nosave
    while [ -e /tmp/speed.sock ]; do sleep 0.1; done
    # A line of the library's says that the heap was not in the arena.
    ! grep -e ebb-malloc -e ebb-guest /tmp/speed.log
    ;;
esac
