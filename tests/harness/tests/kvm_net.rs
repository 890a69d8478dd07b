//! virtio-net and virtio-rng with the stock drivers, on virtio-mmio; kvm_pci has them on PCI.

use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::process::Command;

use ebb_harness::error::{Context, Result};
use ebb_harness::network::{Tap, fetch};
use ebb_harness::refusal::Bench;
use ebb_harness::size::MIB;
use ebb_harness::taker::Taker;
use ebb_harness::{Guest, Images, Launch};

const BYTES: usize = 8 << 20;

/// So many packets they are without offloads.
const PACKETS: u64 = BYTES as u64 / 3948;

/// `udhcpc` leaves it to a script to set what it was given.
const LEASE: &str = "printf '#!/bin/sh\\n[ \"$1\" != bound ] || ip addr add $ip/$mask dev $interface\\n' >/tmp/lease; \
                     chmod +x /tmp/lease; ip link set dev eth0 up; udhcpc -i eth0 -n -q -t 9 -s /tmp/lease 2>&1";

/// Bytes whose order matters.
fn content(seed: usize) -> Vec<u8> {
    (0..BYTES).map(|at| ((at / 7 + seed) % 253) as u8).collect()
}

/// Their checksum, by the host's own program.
fn sum(path: &str, content: &[u8]) -> Result<String> {
    std::fs::write(path, content).context(path)?;
    let output = Command::new("sha256sum").arg(path).output();
    let output = output.context("sha256sum")?.stdout;
    let text = String::from_utf8_lossy(&output).into_owned();
    Ok(text.split(' ').next().unwrap_or_default().to_owned())
}

/// Much goes both ways, in frames larger than the interface's packets, and arrives as it was.
fn transfers_agree(guest: &mut Guest, tap: &Tap, folder: &str, address: &str) -> Result<()> {
    let host = "10.77.1.1";
    let (down, up) = (content(1), content(2));
    let sent = tap.counter("tx_packets")?;
    let port = tap.serve_once(down.clone())?;
    let fetched = guest.must(&format!("wget -q -O - http://{host}:{port}/x | sha256sum"))?;
    let expected = sum(&format!("{folder}/down"), &down)?;
    assert!(fetched.starts_with(&expected), "{fetched} / {expected}");
    let port = tap.serve_once(up.clone())?;
    guest.must(&format!(
        "mkdir -p /www && wget -q -O /www/x http://{host}:{port}/x"
    ))?;
    // A segment has two packets at least (`tcp_min_tso_segs`).
    let sent = tap.counter("tx_packets")? - sent;
    assert!(sent < 2 * PACKETS * 4 / 5, "{sent} of {PACKETS}, twice");

    guest.must("httpd -p 80 -h /www")?;
    let received = tap.counter("rx_packets")?;
    assert!(fetch(address, "/x")? == up, "what the guest serves");
    let received = tap.counter("rx_packets")? - received;
    assert!(received < PACKETS * 4 / 5, "{received} of {PACKETS}");
    Ok(())
}

fn ping(guest: &mut Guest, options: &str) -> Result<String> {
    guest.must(&format!("ping -c 1 -W 60 {options} 10.77.1.1"))
}

#[test]
fn a_guest_has_a_network_and_random_bytes() -> Result<()> {
    let tap = Tap::create("ebbtest1", Ipv4Addr::new(10, 77, 1, 1), 4000)?;
    let second = Tap::create("ebbtest2", Ipv4Addr::new(10, 77, 2, 1), 1500)?;
    let _addresses = tap.serve_addresses()?;
    let passed = second.open()?;
    let mut monitor = Launch::new()?
        .option("--transport", "mmio")
        .option("--net", "tap=ebbtest1,mac=02:00:00:00:77:01,mtu=4000")
        .option("--net", &format!("fd={}", passed.as_raw_fd()))
        .option("--rng", "on")
        .option("--balloon", "size=0")
        .start()?;
    let mut guest = monitor.guest()?;
    let link = |name: &str| format!("cat /sys/class/net/{name}");
    assert_eq!(guest.must(&link("eth0/address"))?, "02:00:00:00:77:01");
    assert_eq!(guest.must(&link("eth0/mtu"))?, "4000");
    assert_eq!(guest.must(&link("eth1/mtu"))?, "1500");
    let derived = guest.must(&link("eth1/address"))?;
    assert!("26ae".contains(&derived[1..2]), "{derived}");

    guest.must(LEASE)?;
    let shown = guest.must("ip -4 -o addr show dev eth0")?;
    let address = shown
        .split("inet ")
        .nth(1)
        .and_then(|it| it.split('/').next());
    let address = address.context(shown.clone())?.to_owned();
    assert!(address.starts_with("10.77.1.1"), "{shown}");
    ping(&mut guest, "-s 3900")?;
    let folder = monitor.folder().display().to_string();
    // Many of the frames land in memory that was taken a moment ago.
    let taker = Taker::start(monitor.api(), 48 * MIB);
    transfers_agree(&mut guest, &tap, &folder, &address)?;
    taker.end()?;

    guest.must("ip addr add 10.77.2.2/24 dev eth1 && ip link set dev eth1 up")?;
    guest.must("ping -c 1 -W 60 10.77.2.1")?;

    // Down and up, on both sides; then the driver goes and comes back.
    guest.must("ip link set dev eth0 down && ip link set dev eth0 up")?;
    ping(&mut guest, "")?;
    tap.set_up(false)?;
    let (status, _) = guest.shell("ping -c 1 -W 1 10.77.1.1")?;
    assert_ne!(status, "0");
    tap.set_up(true)?;
    ping(&mut guest, "")?;
    guest.must(
        "device=$(basename $(readlink -f /sys/class/net/eth0/device)) && cd /sys/bus/virtio/drivers/virtio_net && \
         echo $device >unbind && ! ip link show eth0 2>/dev/null && echo $device >bind",
    )?;
    guest.must(&format!(
        "ip addr add {address}/24 dev eth0 && ip link set dev eth0 up"
    ))?;
    assert!(fetch(&address, "/x")? == content(2), "after a reset");

    let random = guest.must("cat /sys/class/misc/hw_random/rng_current")?;
    assert!(random.starts_with("virtio_rng"), "{random}");
    let count =
        guest.must("dd if=/dev/hwrng bs=512 count=4 iflag=fullblock 2>/dev/null | wc -c")?;
    assert_eq!(count.trim(), "2048");
    guest.ask("exit")?;
    assert_eq!(monitor.wait()?, 0, "{}", monitor.log());
    Ok(())
}

#[test]
fn taps_that_are_none_are_refused() -> Result<()> {
    let bench = Bench::new()?;
    let kernel = Images::from_environment()?.vmlinuz;
    let kernel = kernel.to_string_lossy();
    let refused = |net: &str, parts: &[&str]| {
        bench.refused(bench.run(&["--kernel", &kernel, "--net", net]), parts)
    };
    refused(
        "tap=ebbnone",
        &["tap ebbnone does not exist", "ip tuntap add dev ebbnone"],
    )?;
    refused("tap=lo", &["lo is a network interface, but no tap"])?;
    refused("fd=999", &["fd=999", "without this descriptor"])?;
    let null = std::fs::File::open("/dev/null").context("/dev/null")?;
    rustix::io::fcntl_setfd(&null, rustix::io::FdFlags::empty()).context("fcntl")?;
    refused(
        &format!("fd={}", null.as_raw_fd()),
        &["is no tap", "IFF_VNET_HDR"],
    )?;
    let tap = Tap::create("ebbtest3", Ipv4Addr::new(10, 77, 3, 1), 1500)?;
    let _taken = tap.open()?;
    refused("tap=ebbtest3", &["tap ebbtest3 is in use"])
}
