#!/bin/sh
# Copies the modules and the program that create the arenas' devices into the initramfs.
[ "$1" = prereqs ] && exit 0
. /usr/share/initramfs-tools/hook-functions
manual_add_modules device_dax dax_hmem
copy_exec /usr/local/bin/ebb-guest /bin
