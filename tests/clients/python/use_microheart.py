"""PyPI microheart: a machine by a configuration file with --enable-pci, asked for its size, ended by its own stop.

Replaced is what is not there in a test: the download of a binary and a kernel, ip, iptables and a way out, and SSH in the guest.
It knows neither balloons, nor pauses, nor snapshots.
"""

import os
import signal
import subprocess

from microheart import assets, net, vm

from life import FIRECRACKER, FOLDER, KERNEL, check, disk, make_tap, remove_tap, said

os.environ["MICROHEART_HOME"] = str(FOLDER / "home")
assets.firecracker_path = lambda: FIRECRACKER
assets.kernel_path = lambda: KERNEL
net.up = lambda tap, host_ip: make_tap(tap)
net.down = lambda tap, remove_nat=True: remove_tap(tap)


class Machine(vm.MicroVM):
    def ssh(self, command, check=True, timeout=30):
        """The guest has no SSH. It is up when it has written something; its reboot is a SIGTERM here."""
        if command == "reboot":
            os.kill(self.pid(), signal.SIGTERM)
            os.waitpid(self.pid(), 0)
        done = command == "reboot" or said(self.console) > 0
        return subprocess.CompletedProcess(command, 0 if done else 1)


machine = Machine("one", rootfs=disk("disk"), key=disk("key"), mem_mib=128)
check(machine.start(wait=300) is not None, "the start")
check(machine.running(), "it runs")
config = machine.machine_config()
check((config["mem_size_mib"], config["vcpu_count"]) == (128, 1), config)
machine.clean()
check(not machine.running() and machine.rec is None, "it is gone")
print("microheart: started and ended")
