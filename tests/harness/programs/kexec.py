"""Replaces the running kernel: kexec.py KERNEL INITRAMFS COMMAND-LINE. What `kexec -s -l` and `kexec -e` do."""

import ctypes
import os
import sys

KEXEC_FILE_LOAD = 320
REBOOT = 169
MAGIC = (0xFEE1DEAD, 672274793)
LINUX_REBOOT_CMD_KEXEC = 0x45584543

libc = ctypes.CDLL(None, use_errno=True)


def call(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *arguments) < 0:
        error = ctypes.get_errno()
        sys.exit(f"system call {number}: {os.strerror(error)}")


kernel, initramfs = (os.open(path, os.O_RDONLY) for path in sys.argv[1:3])
words = sys.argv[3].strip().encode()
call(
    KEXEC_FILE_LOAD,
    ctypes.c_int(kernel),
    ctypes.c_int(initramfs),
    ctypes.c_ulong(len(words) + 1),
    ctypes.c_char_p(words),
    ctypes.c_ulong(0),
)
print("loaded", flush=True)
call(REBOOT, *(ctypes.c_long(word) for word in (*MAGIC, LINUX_REBOOT_CMD_KEXEC)), None)
