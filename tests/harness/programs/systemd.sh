#!/bin/sh
# Boots a Debian's systemd in the namespaces that this runs in, with the files of the package `ebb`. All mounts go with them.
# IMAGE: the Debian; FOLDER: for what is written; PACKAGE: resources/package; EBB, KERNEL, INITRAMFS: files.
set -e
image=$1 folder=$2 package=$3 ebb=$4 kernel=$5 initramfs=$6
root=$folder/root
mount --make-rprivate /
mkdir "$folder/debian" "$folder/upper" "$folder/work" "$root"
mount -o loop,ro,noload "$image" "$folder/debian"
mount -t overlay -o "lowerdir=$folder/debian,upperdir=$folder/upper,workdir=$folder/work" overlay "$root"

install -m 755 "$ebb" "$root/usr/bin/ebb"
install -m 644 "$package/ebb@.service" "$root/usr/lib/systemd/system/"
install -D -m 644 "$package/ebb-teardown.conf" "$root/usr/share/ebb/ebb-teardown.conf"
chroot "$root" sh -e -s configure <"$package/ebb/postinst"
install -m 644 "$kernel" "$root/boot/guest-kernel"
install -m 644 "$initramfs" "$root/boot/guest-initramfs"
mkdir "$root/etc/ebb"
cat >"$root/etc/ebb/web.toml" <<END
kernel = "/boot/guest-kernel"
initramfs = "/boot/guest-initramfs"
cmdline = "console=ttyS0 quiet loglevel=3 panic=-1 pci=off ebb.mode=run"
memory = { size = "256M" }
END

mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty kvm; do cp -a "/dev/$device" "$root/dev/"; done
mkdir "$root/dev/net" "$root/dev/shm" "$root/dev/pts"
cp -a /dev/net/tun "$root/dev/net/"
# As udev makes it.
chroot "$root" sh -c 'chgrp kvm /dev/kvm && chmod 660 /dev/kvm'
: >"$root/dev/console"
ln -s /proc/self/fd "$root/dev/fd"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
cd "$root"
mkdir old
pivot_root . old
umount -l /old
# By this variable systemd knows that the devices are somebody else's.
exec env -i container=ebb-test PATH=/usr/sbin:/usr/bin:/sbin:/bin /sbin/init
