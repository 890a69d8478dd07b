#!/bin/sh
# Init of the guests' root disk. Says that it is there, then runs the command line's ebb.run=COMMAND
# (its words separated by commas), or powers off.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM="${TERM:-vt100}"
[ -e /proc/uptime ] || mount -t proc proc /proc
[ -e /sys/kernel ] || mount -t sysfs sys /sys
[ -e /dev/null ] || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
read -r uptime rest </proc/uptime
read -r debian </etc/debian_version
echo "EBB-ROOT-READY debian=$debian uptime=$uptime"
read -r words </proc/cmdline
for word in $words; do
    case $word in
    ebb.run=*)
        # Word splitting is how the command gets its arguments.
        $(echo "${word#*=}" | tr , ' ')
        echo "EBB-ROOT-EXIT $?"
        ;;
    esac
done
sync
busybox mount -o remount,ro / 2>/dev/null
busybox poweroff -f
