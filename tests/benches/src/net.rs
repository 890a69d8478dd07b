//! `ebb-bench net`: TCP between host and guest over a tap, and how long a byte takes there and back: Ebb's interface and QEMU's
//! virtio-net, both without vhost.

use std::any::Any;
use std::net::{Ipv4Addr, TcpStream};

use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::{Context, Result};
use ebb_harness::network::Tap;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Guest, Launch};

use super::BenchError;
use super::qemu::{Machine, Qemu};
use super::results::{Metric, Results};
use super::stream::{Arguments, DOWN, PING, PORT, Stream, UP, round};

const CASE: &str = "1 vCPU";

/// A guest whose server answers at an address.
struct System {
    name: &'static str,
    address: Ipv4Addr,
    _tap: Tap,
    /// Monitor and guest.
    _machine: Box<dyn Any>,
}

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: a guest does not boot, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let mut systems = [ebb()?, qemu()?];
    let mut results = Results::default();
    for run in 1..=arguments.runs {
        for system in &systems {
            let of = (system.name, CASE);
            round(of, arguments, &mut results, || connect(system.address))?;
        }
        systems.rotate_left(1);
        eprintln!("net: run {run} of {}", arguments.runs);
    }
    results
        .note("one TCP connection over a tap without vhost; the other machine is idle meanwhile");
    let of = |system, metric: Metric| [system, CASE, metric.0];
    results.divide_rates("tcp_to_guest_vs_qemu", of("ebb", DOWN), of("qemu", DOWN));
    results.divide_rates("tcp_from_guest_vs_qemu", of("ebb", UP), of("qemu", UP));
    let directions = ["tcp_to_guest_vs_qemu", "tcp_from_guest_vs_qemu"];
    results.smallest("tcp_vs_qemu", &directions);
    results.divide("latency_vs_qemu", of("qemu", PING), of("ebb", PING));
    results.report("net").publish()
}

fn ebb() -> Result<System> {
    let (tap, address) = tap("ebbbench1", 1)?;
    let mut monitor = Launch::new()?.option("--net", "tap=ebbbench1").start()?;
    let mut guest = monitor.guest()?;
    serve(&mut guest, address)?;
    Ok(System {
        name: "ebb",
        address,
        _tap: tap,
        _machine: Box::new((monitor, guest)),
    })
}

fn qemu() -> Result<System> {
    let (tap, address) = tap("ebbbench2", 2)?;
    let backend = "tap,id=net,ifname=ebbbench2,script=no,downscript=no,vhost=off";
    let machine = Machine {
        memory: "256",
        cpus: 1,
        cmdline: "ebb.mode=run",
        more: &[
            "-netdev",
            backend,
            "-device",
            "virtio-net-pci,netdev=net,romfile=",
        ],
    };
    let cgroup = Cgroup::counting("qemu-net")?;
    let mut qemu = Qemu::start(&machine, &cgroup)?;
    let mut guest = qemu.guest()?;
    serve(&mut guest, address)?;
    Ok(System {
        name: "qemu",
        address,
        _tap: tap,
        _machine: Box::new((qemu, guest, cgroup)),
    })
}

/// A tap, and the guest's address there.
fn tap(name: &str, network: u8) -> Result<(Tap, Ipv4Addr)> {
    let tap = Tap::create(name, Ipv4Addr::new(10, 78, network, 1), 1500)?;
    Ok((tap, Ipv4Addr::new(10, 78, network, 2)))
}

/// Gives the guest its address, and has it serve.
fn serve(guest: &mut Guest, address: Ipv4Addr) -> Result<()> {
    guest.must(&format!(
        "ip addr add {address}/24 dev eth0 && ip link set dev eth0 up"
    ))?;
    guest.ask(&format!("talk {PORT}"))?;
    until("the guest answers", LONG, || {
        Ok(connect(address).and_then(Stream::is_answered).ok())
    })
    .map(drop)
}

fn connect(address: Ipv4Addr) -> Result<Stream> {
    let what = "connect to the guest";
    let stream = TcpStream::connect((address, PORT)).context(what)?;
    stream.set_nodelay(true).context(what)?;
    Ok(stream.into())
}
