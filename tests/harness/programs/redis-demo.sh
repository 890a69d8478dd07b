#!/bin/bash
# A Redis for the demo. `redis-demo.sh start [COMMAND...]` starts one, below COMMAND; `flush` empties it; `end` ends it.
set -e
cd /tmp
cli() { redis-cli -s /tmp/demo.sock "$@"; }

case $1 in
start)
    shift
    "$@" redis-server --port 0 --unixsocket /tmp/demo.sock --save '' >/tmp/demo.log 2>&1 &
    for _ in $(seq 300); do
        [ "$(cli ping 2>/dev/null)" = PONG ] && exit
        sleep 0.2
    done
    cat /tmp/demo.log
    exit 1
    ;;
flush) cli flushall >/dev/null ;;
end)
    cli shutdown nosave
    while [ -e /tmp/demo.sock ]; do sleep 0.1; done
    # A line of the library's says that the heap was not in the arena.
    ! grep -e ebb-malloc -e ebb-guest /tmp/demo.log
    ;;
esac
