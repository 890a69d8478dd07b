#!/bin/bash
# PostgreSQL with its heap in an arena: every backend is a fork of the postmaster, which has a heap by then. Four clients at a time
# move money about, each on a connection of its own; the sums of the accounts, tellers, branches and of the history must be the same.
# `postgres.sh TRANSACTIONS` (of each client) prints `sums: equal, N transactions`.
set -e
cd /tmp
bin=/usr/lib/postgresql/15/bin
user="setpriv --reuid=postgres --regid=postgres --clear-groups"
export PGHOST=/tmp PGUSER=postgres PGDATABASE=postgres

fail() {
    cat "$@"
    exit 1
}

mkdir pg
chown postgres pg
$user $bin/initdb -D pg -E UTF8 --locale=C --no-sync >initdb.log 2>&1 || fail initdb.log
/tmp/ebb-guest run -- $user $bin/postgres -D pg -h '' -k /tmp -c fsync=off -c shared_buffers=16MB \
    -c dynamic_shared_memory_type=mmap >postgres.log 2>&1 &
for _ in $(seq 300); do
    psql -c 'select 1' >/dev/null 2>&1 && break
    sleep 0.2
done
{
    $bin/pgbench -q -i -s 1
    # A connection for each transaction: a fork for each.
    $bin/pgbench -n -C -c 4 -t "$1"
} >pgbench.log 2>&1 || fail pgbench.log postgres.log
sums=$(psql -At -c 'select count(distinct sum) from (select sum(abalance) from pgbench_accounts union all
    select sum(tbalance) from pgbench_tellers union all select sum(bbalance) from pgbench_branches union all
    select sum(delta) from pgbench_history) as sums')
transactions=$(psql -At -c 'select count(*) from pgbench_history')
$user $bin/pg_ctl -D pg stop -m fast >/dev/null
wait
! grep ebb-malloc postgres.log
[ "$sums" = 1 ] && echo "sums: equal, $transactions transactions" || fail pgbench.log postgres.log
