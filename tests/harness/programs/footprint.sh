#!/bin/bash
# What a guest does in `cargo xtask bench footprint`, one step each call. `footprint.sh project FILES FUNCTIONS` writes a C project;
# `burst` builds it from nothing; `start` starts Redis,
# and keeps /dev/vdd open; `fill KEYS` has it hold so many values of 4 KiB; `flush` empties it;
# `scan` reads /dev/vdd; `rest` drops what the page cache holds.
# The project lies in FOLDER, /srv/project by default.
set -e
folder=${FOLDER:-/srv/project}
mkdir -p "$folder"
cd "$folder"
functions() {
    awk -v file="$1" -v count="$2" 'BEGIN {
        print "typedef unsigned long u64;"
        for (i = 0; i < count; i++) {
            printf "static u64 work_%d(u64 *a, u64 n) {\n    u64 s = %d;\n    for (u64 i = 0; i < n; i++)\n", i, i
            print "        switch ((a[i] + s) % 7) {"
            for (c = 0; c < 7; c++)
                printf "        case %d: s = s * %d + (a[i] >> %d) ^ (s << %d); a[i] += s %% %d; break;\n", c, 2 * c + 3, c + 1, c + 2, 11 + c + i
            print "        }\n    return s;\n}"
        }
        printf "u64 part_%d(u64 *a, u64 n) {\n    u64 s = 0;\n", file
        for (i = 0; i < count; i++) printf "    s ^= work_%d(a, n);\n", i
        print "    return s;\n}"
    }'
}

case $1 in
project)
    rm -f -- *
    for file in $(seq "$2"); do functions "$file" "$3" >"part_$file.c"; done
    {
        echo '#include <stdio.h>'
        echo 'typedef unsigned long u64;'
        for file in $(seq "$2"); do echo "u64 part_$file(u64 *a, u64 n);"; done
        echo 'static u64 a[1000];'
        echo 'int main(void) { u64 s = 0; for (int i = 0; i < 1000; i++) a[i] = i;'
        for file in $(seq "$2"); do echo "s = s * 31 + part_$file(a, 1000);"; done
        echo 'printf("%lu\n", s); return 0; }'
    } >main.c
    {
        echo "program: main.o$(printf ' part_%d.o' $(seq "$2"))"
        printf '\tgcc -o $@ $^\n%%.o: %%.c\n\tgcc -O2 -g -fdebug-prefix-map=$(CURDIR)=. -c -o $@ $<\n'
    } >Makefile
    ;;
burst)
    rm -f -- *.o program
    make -s -j2
    ./program
    ;;
start)
    systemctl start redis-server
    # The kernel forgets what it has cached of a disk when nobody has it open.
    setsid sleep infinity </dev/vdd >/dev/null 2>&1 &
    ;;
fill)
    redis-cli eval 'for i = 1, ARGV[1] do redis.call("set", "k" .. i, string.rep("v" .. i, 4096 / (#tostring(i) + 1))) end' 0 "$2" >/dev/null
    ;;
flush) redis-cli flushall >/dev/null ;;
scan) cat /dev/vdd >/dev/null ;;
rest)
    redis-cli flushall >/dev/null
    sync
    echo 3 >/proc/sys/vm/drop_caches
    ;;
esac
