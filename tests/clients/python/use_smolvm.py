"""PyPI smolvm: its client of the API, from the start to the end, and of a machine that was saved.

The rest of smolvm wants what is not there in a test: images from the network, SSH in the guest, nftables as root.
"""

import subprocess

from smolvm.api import FirecrackerClient
from smolvm.exceptions import FirecrackerAPIError

from life import FIRECRACKER, FOLDER, KERNEL, check, disk, make_tap, remove_tap, said, wait_until

TAP = "smol0"


def process(name):
    socket, console = FOLDER / f"{name}.sock", FOLDER / f"{name}.console"
    with open(console, "wb") as log:
        command = [FIRECRACKER, "--api-sock", socket]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    client = FirecrackerClient(socket)
    client.wait_for_socket()
    return child, client, console


make_tap(TAP)
child, client, console = process("one")
check(client.get_instance_info()["state"] == "Not started", "the state")
client.set_boot_source(KERNEL)
client.set_machine_config(vcpu_count=1, mem_size_mib=128)
client.add_drive("rootfs", disk("disk"))
client.add_drive("data_drive", disk("data"), is_root_device=False)
client.add_network_interface("eth0", TAP, "02:00:00:00:00:02", rate_limit_mbps=100)
client.add_vsock_device(3, str(FOLDER / "vsock"))
client.start_instance()
wait_until("the guest writes", lambda: said(console) > 0)
check(client.get_instance_info()["state"] == "Running", "the state")
# A start whose answer was lost is asked for again: it looks for Firecracker's words then.
try:
    client.start_instance()
    check(False, "a second start")
except FirecrackerAPIError as error:
    check("not supported after starting the microVM" in str(error), error)
client.pause_vm()
client.create_snapshot(FOLDER / "state", FOLDER / "memory")
client.resume_vm()
child.kill()
child.wait()
(FOLDER / "vsock").unlink()
print("smolvm: saved and killed")

child, client, console = process("two")
override = [{"iface_id": "eth0", "host_dev_name": TAP}]
client.load_snapshot(FOLDER / "state", FOLDER / "memory", resume_vm=True, network_overrides=override)
check(client.get_instance_info()["state"] == "Running", "the state")
wait_until("the guest goes on", lambda: said(console) > 0)
child.terminate()
check(child.wait() == 0, "the exit status")
remove_tap(TAP)
print("smolvm: restored and ended")
