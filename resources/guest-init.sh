#!/bin/busybox sh
# Init of the guests that tests boot. Words on the kernel's command line choose what it does:
#   ebb.mode=poweroff  power off at once (the default)
#   ebb.mode=reboot    reset at once
#   ebb.mode=panic     crash the kernel
#   ebb.mode=shell     an interactive shell on the console; power off when it ends
#   ebb.mode=run       `ebb-guest workload` on the console; power off when it ends
#   ebb.mode=root      switch to the root file system on /dev/vda; ebb.root=ro|rw|overlay (ro), ebb.init=PATH
#                      overlay: what is written goes to the file system on /dev/vdb; ebb-guest is /run/ebb-guest there
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
load_modules() {
    while read -r module parameters; do
        # Word splitting of the parameters is wanted.
        /bin/busybox insmod "$module" $parameters || echo "EBB-GUEST-WARN cannot load $module"
    done
}
load_modules </etc/modules
# Only an arena is soft-reserved.
! /bin/busybox grep -q 'Soft Reserved' /proc/iomem || load_modules </etc/modules.arena
# virtio 1.3, 5: a network device is 1, a socket device 19.
! /bin/busybox grep -qs 0x0001 /sys/bus/virtio/devices/*/device || load_modules </etc/modules.net
! /bin/busybox grep -qs 0x0013 /sys/bus/virtio/devices/*/device || load_modules </etc/modules.vsock
read -r uptime rest </proc/uptime
echo "EBB-GUEST-READY uptime=$uptime"

mode=poweroff root=ro init=/sbin/init
read -r words </proc/cmdline
for word in $words; do
    case $word in
    ebb.mode=*) mode=${word#*=} ;;
    ebb.root=*) root=${word#*=} ;;
    ebb.init=*) init=${word#*=} ;;
    esac
done

case $mode in
reboot) /bin/busybox reboot -f ;;
panic) echo c >/proc/sysrq-trigger ;;
poweroff) /bin/busybox poweroff -f ;;
esac

/bin/busybox --install -s
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM="${TERM:-vt100}"
mkdir -p /dev/pts /dev/shm /sys/kernel/debug
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
cd /root || cd /

case $mode in
shell) setsid cttyhack sh ;;
run) ebb-guest workload; echo "EBB-GUEST-EXIT $?" ;;
root)
    mkdir -p /newroot /lower /upper
    mount_root() {
        [ "$root" = overlay ] || { mount -t ext4 -o "$root" /dev/vda /newroot; return; }
        insmod /modules/overlay.ko &&
            mount -t ext4 -o ro /dev/vda /lower && mount -t ext4 /dev/vdb /upper && mkdir -p /upper/files /upper/work &&
            mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /newroot &&
            mount -t tmpfs -o mode=755 tmpfs /newroot/run && cp /bin/ebb-guest /newroot/run
    }
    if mount_root; then
        # switch_root removes the initramfs; the new root mounts its own.
        umount /dev/pts /dev/shm /sys/kernel/debug
        for folder in proc sys dev; do mount -o move "/$folder" "/newroot/$folder"; done
        exec switch_root /newroot "$init"
    fi
    echo "EBB-GUEST-ERROR cannot mount /dev/vda"
    ;;
*) echo "EBB-GUEST-ERROR unknown ebb.mode=$mode" ;;
esac
poweroff -f
