"""What the clients in Python share. Each is a program: FOLDER FIRECRACKER KERNEL."""

import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER, FIRECRACKER, KERNEL = map(Path, sys.argv[1:4])

# A guest on an emulated processor may take this long for anything.
PATIENCE_S = 300


def check(right, what):
    """Ends the program with this if it is not right."""
    if not right:
        sys.exit(f"not as it should be: {what}")


def disk(name):
    """A new disk of 1 MiB."""
    path = FOLDER / name
    path.write_bytes(b"d" * (1 << 20))
    return path


def wait_until(what, is_so):
    """Looks again and again."""
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        check(time.monotonic() < end, f"in vain: {what}")
        time.sleep(0.02)


def make_tap(name):
    """What these clients do as root with ip, iptables and nftables: the test's host has no network to lead guests to."""
    subprocess.run(["busybox", "tunctl", "-t", name], check=True, stdout=subprocess.DEVNULL)


def remove_tap(name):
    subprocess.run(["busybox", "tunctl", "-d", name], check=True, stdout=subprocess.DEVNULL)


def said(path):
    """What a guest has written to its console."""
    return path.stat().st_size if os.path.exists(path) else 0
