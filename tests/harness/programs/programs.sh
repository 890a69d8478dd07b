#!/bin/bash
# Programs of a Debian with systemd that check their own data. `programs.sh PART SIZE` runs one of them: compile, postgresql, redis, apt.
# It says `ok`, with what was checked, or fails with what is wrong.
set -e
here=$(dirname "$0")
bin=/usr/lib/postgresql/15/bin
part=$1
size=$2

# The first argument says what must hold, the others are a command.
must() {
    what=$1
    shift
    "$@" >/tmp/said 2>&1 || { echo "wrong: $what"; tail -n 20 /tmp/said; exit 1; }
}

as_postgres() { setpriv --reuid=postgres --regid=postgres --init-groups "$@"; }

# The same sources are built twice: all objects must be equal, and the program must compute what it computes without optimization.
compile() {
    for folder in a b; do
        FOLDER=/srv/$folder must "sources" bash "$here/footprint.sh" project "$size" 4
        FOLDER=/srv/$folder must "the build" bash "$here/footprint.sh" burst
    done
    objects=0
    for object in /srv/a/*.o; do
        must "$object is the same in both builds" cmp "$object" "/srv/b/${object##*/}"
        objects=$((objects + 1))
    done
    must "a build without optimization" gcc -O0 -o /srv/plain /srv/a/*.c
    [ "$(/srv/plain)" = "$(/srv/a/program)" ] || { echo "wrong: what the program computes"; exit 1; }
    echo "ok objects=$objects"
}

# Clients move money about; the sums must be equal, the indexes must match their tables, and every page its checksum.
postgresql() {
    data=/var/lib/postgresql/checked
    export PGHOST=/tmp PGUSER=postgres PGDATABASE=postgres PGDATA=$data
    rm -rf $data
    must initdb as_postgres $bin/initdb -k -D $data -E UTF8 --locale=C
    must "the server" as_postgres $bin/pg_ctl -w -D $data -l /tmp/postgres.log -o "-h '' -k /tmp -c shared_buffers=32MB" start
    must "pgbench -i" $bin/pgbench -q -i -s 2
    must "pgbench" $bin/pgbench -n -c 4 -j 2 -t "$size"
    sums=$(psql -At -c 'select count(distinct sum) from (select sum(abalance) from pgbench_accounts union all
        select sum(tbalance) from pgbench_tellers union all select sum(bbalance) from pgbench_branches union all
        select sum(delta) from pgbench_history) as sums')
    [ "$sums" = 1 ] || { echo "wrong: the sums"; exit 1; }
    transactions=$(psql -At -c 'select count(*) from pgbench_history')
    [ "$transactions" = $((4 * size)) ] || { echo "wrong: $transactions transactions"; exit 1; }
    must "indexes and tables" $bin/pg_amcheck --all --install-missing --heapallindexed
    must "the end of the server" as_postgres $bin/pg_ctl -w -D $data -m fast stop
    must "the checksums of all pages" as_postgres $bin/pg_checksums --check -D $data
    echo "ok transactions=$transactions"
}

# The digest of all values must stay the same over a save by a forked child, and a reload of what that has written.
redis() {
    cli="redis-cli -s /tmp/checked.sock"
    redis-server --port 0 --unixsocket /tmp/checked.sock --save '' --dir /srv --dbfilename checked.rdb --enable-debug-command local \
        >/tmp/redis.log 2>&1 &
    for _ in $(seq 300); do
        [ "$($cli ping 2>/dev/null)" = PONG ] && break
        sleep 0.2
    done
    fill='for i = 1, ARGV[2] do redis.call("set", "k" .. i, string.rep(ARGV[1] .. i, 4000 / (#tostring(i) + 1))) end'
    wrong='local wrong = 0 for i = 1, ARGV[2] do
        if redis.call("get", "k" .. i) ~= string.rep(ARGV[1] .. i, 4000 / (#tostring(i) + 1)) then wrong = wrong + 1 end end return wrong'
    for letter in a b; do
        $cli eval "$fill" 0 $letter "$size" >/dev/null
        digest=$($cli debug digest)
        $cli bgsave >/dev/null
        while $cli info persistence | grep -q rdb_bgsave_in_progress:1; do sleep 0.1; done
        must "the file that was saved" redis-check-rdb /srv/checked.rdb
        $cli debug reload >/dev/null
        [ "$($cli debug digest)" = "$digest" ] || { echo "wrong: the digest after a reload"; exit 1; }
        [ "$($cli eval "$wrong" 0 $letter "$size")" = 0 ] || { echo "wrong: values"; exit 1; }
        $cli flushall >/dev/null
    done
    $cli shutdown nosave
    wait
    echo "ok values=$((2 * size))"
}

# Packages of a local repository are installed; every file must have the checksum that its package lists.
apt_() {
    rm -rf /srv/repository
    mkdir -p /srv/repository
    cd /srv/repository
    for number in $(seq "$size"); do
        root=/srv/package$number
        mkdir -p "$root/DEBIAN" "$root/opt/checked$number"
        find /usr/lib/x86_64-linux-gnu -maxdepth 1 -name "lib*.so.*" -type f -size -2048k | sort | awk -v n="$number" -v all="$size" 'NR % all == n - 1' \
            | xargs cp -t "$root/opt/checked$number"
        printf 'Package: checked%s\nVersion: 1\nArchitecture: all\nMaintainer: nobody <root@localhost>\nDescription: checked\n' "$number" \
            >"$root/DEBIAN/control"
        (cd "$root" && find opt -type f -exec md5sum {} + >DEBIAN/md5sums)
        must "dpkg-deb" dpkg-deb -Zgzip -z1 -b "$root" "checked$number.deb"
        rm -rf "$root"
        {
            dpkg-deb -f "checked$number.deb"
            echo "Filename: ./checked$number.deb"
            echo "Size: $(stat -c %s "checked$number.deb")"
            echo "SHA256: $(sha256sum "checked$number.deb" | cut -d ' ' -f 1)"
            echo
        } >>Packages
    done
    echo "deb [trusted=yes] file:/srv/repository ./" >/srv/sources.list
    options="-o Dir::Etc::sourcelist=/srv/sources.list -o Dir::Etc::sourceparts=/dev/null -o APT::Sandbox::User=root"
    must "apt-get update" apt-get $options update
    names=$(seq -f 'checked%g' "$size")
    must "apt-get install" apt-get $options install -y $names
    for name in $names; do
        [ -z "$(dpkg --verify "$name")" ] || { echo "wrong: files of $name"; dpkg --verify "$name" | head; exit 1; }
        files=$((files + $(wc -l <"/var/lib/dpkg/info/$name.md5sums")))
    done
    must "apt-get purge" apt-get $options purge -y $names
    must "apt-get check" apt-get $options check
    echo "ok files=$files"
}

case $part in
apt) apt_ ;;
*) $part ;;
esac
