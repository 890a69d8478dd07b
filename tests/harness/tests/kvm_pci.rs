//! Stock guests whose virtio devices are on a PCI bus.

use std::net::Ipv4Addr;

use ebb_harness::Launch;
use ebb_harness::error::Result;
use ebb_harness::network::{Tap, fetch};
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until};

#[test]
fn a_debian_boots_from_its_disk_with_systemd() -> Result<()> {
    let _tap = Tap::create("ebbpci1", Ipv4Addr::new(10, 77, 4, 1), 1500)?;
    let mut monitor = Launch::new()?
        .system_without_service()
        .option("--transport", "pci")
        .option("--net", "tap=ebbpci1")
        .option("--balloon", "reporting=lazy")
        .option("--rng", "on")
        .start()?;
    let up = monitor.console.wait_for("Multi-User System", LONG);
    up.map_err(|error| monitor.explain(error))?;
    let api = monitor.api();
    let reported = until("reports", LONG, || {
        Ok((api.lazy()?.part("reporting")["bytes_total"] > 0).then_some(()))
    });
    reported.map_err(|error| monitor.explain(error))?;
    let asked = monitor.ctl(&["shutdown", "--timeout", "300"])?;
    assert!(asked.status.success(), "{asked:?}");
    assert_eq!(asked.stdout, b"", "it was stopped instead");
    assert_eq!(monitor.wait()?, 32, "{}", monitor.console.tail());
    Ok(())
}

#[test]
fn every_driver_finds_its_device_and_a_vector_for_each_queue() -> Result<()> {
    let tap = Tap::create("ebbpci2", Ipv4Addr::new(10, 77, 5, 1), 1500)?;
    let launch = Launch::new()?;
    let disk = launch.images().root_disk.clone();
    let mut monitor = launch
        .disk(&disk, true)
        .option("--transport", "pci")
        .option("--net", "tap=ebbpci2")
        .option("--balloon", "size=0,statistics=1")
        .option("--rng", "on")
        .cpus(2)
        .start()?;
    let mut guest = monitor.guest()?;
    let devices = guest.must("cat /sys/bus/pci/devices/*/device | tr '\\n' ' '")?;
    assert_eq!(devices.trim(), "0x1237 0x1042 0x1045 0x1041 0x1044");
    let complaints = guest.must("dmesg -r | grep -E '^<[0-3]>' || true")?;
    assert_eq!(complaints, "", "the guest's kernel complains");
    let moved = guest.must("dmesg | grep -E 'BAR .*(assigned|failed|conflict)' || true")?;
    assert_eq!(moved, "", "it has moved what was in its place");
    let vectors = guest.must(
        "grep -c 'PCI-MSIX.*virtio.*\\(req\\|input\\|output\\|inflate\\)' /proc/interrupts",
    )?;
    assert_eq!(vectors.trim(), "5");

    // The disk, the network both ways, random bytes.
    guest.must("mkdir -p /d && mount -t ext4 -o ro /dev/vda /d && test -x /d/bin/sh")?;
    guest.must("ip addr add 10.77.5.2/24 dev eth0 && ip link set dev eth0 up")?;
    guest.must("ping -c 1 -W 60 10.77.5.1")?;
    let port = tap.serve_once(b"from the host".to_vec())?;
    guest.must(&format!(
        "mkdir -p /www && wget -q -O /www/x http://10.77.5.1:{port}/x && httpd -p 80 -h /www"
    ))?;
    assert_eq!(fetch("10.77.5.2", "/x")?, b"from the host");
    let count =
        guest.must("dd if=/dev/hwrng bs=512 count=4 iflag=fullblock 2>/dev/null | wc -c")?;
    assert_eq!(count.trim(), "2048");
    // The balloon, whose size comes by the interrupt for the configuration.
    let api = monitor.api();
    api.set_balloon(64 * MIB)?;
    until("the balloon has its size", LONG, || {
        Ok((api.balloon()?.actual_mib == 64).then_some(()))
    })?;

    // A driver goes and comes back, and so does its function.
    guest.must("cd /sys/bus/pci/drivers/virtio-pci && echo 0000:00:03.0 >unbind && ! ip link show eth0 2>/dev/null && echo 0000:00:03.0 >bind")?;
    guest.must("ip addr add 10.77.5.2/24 dev eth0 && ip link set dev eth0 up")?;
    assert_eq!(fetch("10.77.5.2", "/x")?, b"from the host");
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}
