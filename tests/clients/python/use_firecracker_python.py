"""PyPI firecracker-python: a machine from its start to its end, paused, resumed, saved.

Replaced is what is not there in a test: the public address of the host, docker, /var/lib, nftables and a way out. A snapshot
cannot be loaded by it: it asks for InstanceStart after that, which Firecracker refuses, too.
"""

import os
import tempfile
from pathlib import Path

import docker
from firecracker import microvm, network, process
from firecracker.config import MicroVMConfig
from firecracker.exceptions import VMMError

from life import FIRECRACKER, KERNEL, check, disk, make_tap, remove_tap, said, wait_until

# It finds no socket whose path has capitals; this folder's has none.
scratch = tempfile.TemporaryDirectory(prefix="ebb-")
FOLDER = Path(scratch.name)

names = list(MicroVMConfig.__dataclass_fields__)
defaults = dict(zip(names, MicroVMConfig.__init__.__defaults__))
defaults.update(data_path=str(FOLDER / "data"), binary_path=str(FIRECRACKER), snapshot_path=str(FOLDER / "snapshots"))
MicroVMConfig.__init__.__defaults__ = tuple(defaults[name] for name in names)
docker.from_env = lambda: None
microvm.get_public_ip = lambda: "192.0.2.1"
network.NetworkManager.get_interface_name = lambda self: "eth0"
network.NetworkManager.setup = lambda self, tap_name, iface_name, gateway_ip: make_tap(tap_name)
network.NetworkManager.cleanup = lambda self, tap_name: remove_tap(tap_name)

start = process.ProcessManager.start


def start_and_wait(self, id, args):
    """It waits 3 s for the API, which an emulated processor may need."""
    pid = start(self, id, args)
    wait_until("the API", lambda: os.path.exists(args[args.index("--api-sock") + 1]))
    return pid


process.ProcessManager.start = start_and_wait


def machine():
    return microvm.MicroVM(kernel_file=str(KERNEL), base_rootfs=str(disk("rootfs")), memory=128, vsock_enabled=True)


vm = machine()
created = vm.create()
check(created.endswith("created"), created)
folder = FOLDER / "data" / vm._microvm_id
wait_until("the guest writes", lambda: said(folder / "firecracker.log") > 0)
check(len(microvm.MicroVM.list()) == 1, "the list")
check(vm.config()["machine-config"]["mem_size_mib"] == 128, "the configuration")
check(vm.pause().endswith("paused successfully"), "pause")
check(vm.resume().endswith("resumed successfully"), "resume")
vm.snapshot(action="create")
memory, state = (str(FOLDER / "snapshots" / vm._microvm_id / name) for name in ("memory", "snapshot"))
deleted = vm.delete()
check(deleted.endswith("is deleted") and not folder.exists(), deleted)
print("firecracker-python: saved and deleted")

other = machine()
try:
    other.create(snapshot=True, memory_path=memory, snapshot_path=state)
    check(False, "it can load a snapshot now: say so")
except VMMError as error:
    print(f"firecracker-python: {error}")
# It leaves the process behind.
other._vmm.cleanup(other._microvm_id)
