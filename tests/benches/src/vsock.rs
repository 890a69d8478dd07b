//! `ebb-bench vsock`: streams between host and guest, and how long a byte takes there and back: Ebb's vsock, which leads to unix
//! sockets, and QEMU's vhost-vsock, which is in the host's kernel.

use std::any::Any;
use std::path::PathBuf;

use ebb_harness::cgroup::Cgroup;
use ebb_harness::error::Result;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Guest, Launch, network};

use super::BenchError;
use super::qemu::{Machine, Qemu};
use super::results::{Metric, Results};
use super::stream::{Arguments, DOWN, EBB, EBB_ON_MMIO, Ebb, PING, PORT, Stream, UP, round};

const CASE: &str = "1 vCPU";
/// QEMU's guest.
const CID: u32 = 78;

/// How the host reaches a guest.
enum Way {
    /// By this socket.
    Unix(PathBuf),
    /// By the host's kernel.
    Kernel,
}

/// A guest whose server answers.
struct System {
    name: &'static str,
    way: Way,
    /// The monitor's.
    pid: u32,
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
            round(of, arguments, &mut results, || connect(&system.way))?;
        }
        systems.rotate_left(1);
        eprintln!("vsock: run {run} of {}", arguments.runs);
    }
    results.note("one stream; QEMU's device is vhost-vsock, which copies in the host's kernel; the other machine is idle meanwhile");
    let of = |system, metric: Metric| [system, CASE, metric.0];
    for (ebb, suffix) in [(EBB.name, ""), (EBB_ON_MMIO.name, "_on_mmio")] {
        let named = |figure: &str| format!("{figure}_vs_vhost{suffix}");
        results.divide_rates(&named("to_guest"), of(ebb, DOWN), of("qemu-vhost", DOWN));
        results.divide_rates(&named("from_guest"), of(ebb, UP), of("qemu-vhost", UP));
        results.divide(&named("latency"), of("qemu-vhost", PING), of(ebb, PING));
    }
    results.report("vsock").publish()
}

fn ebb(kind: &Ebb) -> Result<System> {
    let launch = Launch::new()?.option("--transport", kind.transport);
    let path = launch.folder().join("vsock");
    let option = format!("cid={},path={}", 70 + kind.number, path.display());
    let mut monitor = launch.option("--vsock", &option).start()?;
    let mut guest = monitor.guest()?;
    let way = Way::Unix(path);
    serve(&mut guest, &way)?;
    Ok(System {
        name: kind.name,
        way,
        pid: monitor.pid(),
        _machine: Box::new((monitor, guest)),
    })
}

fn qemu() -> Result<System> {
    let device = format!("vhost-vsock-pci,guest-cid={CID}");
    let machine = Machine {
        memory: "256",
        cpus: 1,
        cmdline: "ebb.mode=run",
        more: &["-device", &device],
    };
    let cgroup = Cgroup::counting("qemu-vsock")?;
    let mut qemu = Qemu::start(&machine, &cgroup)?;
    let mut guest = qemu.guest()?;
    serve(&mut guest, &Way::Kernel)?;
    Ok(System {
        name: "qemu-vhost",
        way: Way::Kernel,
        pid: qemu.pid(),
        _machine: Box::new((qemu, guest, cgroup)),
    })
}

fn serve(guest: &mut Guest, way: &Way) -> Result<()> {
    guest.ask(&format!("talk vsock {PORT}"))?;
    until("the guest answers", LONG, || {
        Ok(connect(way).and_then(Stream::is_answered).ok())
    })
}

fn connect(way: &Way) -> Result<Stream> {
    let Way::Unix(path) = way else {
        return Ok(network::connect_vsock(CID, PORT.into())?.into());
    };
    Ok(network::connect_through(path, PORT.into())?.into())
}
