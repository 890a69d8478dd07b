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
use super::stream::{Arguments, DOWN, EBB, EBB_ON_MMIO, Ebb, PING, PORT, Stream, UP, round};

const CASE: &str = "1 vCPU";

/// A guest whose server answers at an address.
struct System {
    name: &'static str,
    address: Ipv4Addr,
    /// The monitor's.
    pid: u32,
    _tap: Tap,
    /// Monitor and guest.
    _machine: Box<dyn Any>,
}

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: a guest does not boot, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let mut systems = [ebb(&EBB)?, ebb(&EBB_ON_MMIO)?, qemu()?];
    let mut results = Results::default();
    for run in 1..=arguments.runs {
        for system in &systems {
            let of = (system.name, CASE, system.pid);
            round(of, arguments, &mut results, || connect(system.address))?;
        }
        systems.rotate_left(1);
        eprintln!("net: run {run} of {}", arguments.runs);
    }
    results
        .note("one TCP connection over a tap without vhost; the other machine is idle meanwhile");
    let of = |system, metric: Metric| [system, CASE, metric.0];
    for (ebb, suffix) in [(EBB.name, ""), (EBB_ON_MMIO.name, "_on_mmio")] {
        let named = |figure: &str| format!("{figure}_vs_qemu{suffix}");
        let directions = [named("tcp_to_guest"), named("tcp_from_guest")];
        results.divide_rates(&directions[0], of(ebb, DOWN), of("qemu", DOWN));
        results.divide_rates(&directions[1], of(ebb, UP), of("qemu", UP));
        results.smallest(&named("tcp"), &directions.each_ref().map(String::as_str));
        results.divide(&named("latency"), of("qemu", PING), of(ebb, PING));
    }
    results.report("net").publish()
}

fn ebb(kind: &Ebb) -> Result<System> {
    let name = format!("ebbbench{}", kind.number);
    let (tap, address) = tap(&name, kind.number)?;
    let launch = Launch::new()?.option("--transport", kind.transport);
    let mut monitor = launch.option("--net", &format!("tap={name}")).start()?;
    let mut guest = monitor.guest()?;
    serve(&mut guest, address)?;
    Ok(System {
        name: kind.name,
        address,
        pid: monitor.pid(),
        _tap: tap,
        _machine: Box::new((monitor, guest)),
    })
}

fn qemu() -> Result<System> {
    let (tap, address) = tap("ebbbench9", 9)?;
    let backend = "tap,id=net,ifname=ebbbench9,script=no,downscript=no,vhost=off";
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
        pid: qemu.pid(),
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
