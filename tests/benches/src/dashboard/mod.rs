//! `ebb-bench dashboard`: asks Debian's Prometheus what the dashboard in `resources/metrics` asks, while a guest lives, and draws the
//! panels. A panel without an answer is an error.

mod panels;
mod picture;
mod server;

use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use ebb_harness::error::Result;
use ebb_harness::free_pages::read_free_lists;
use ebb_harness::network::Tap;
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Api, Guest, Launch};

use self::panels::{Panel, panels};
use self::picture::Line;
use self::server::{Prometheus, TARGET};
use super::{BenchError, path};

const TAP: &str = "ebbdash1";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 78, 9, 1);
const GUEST: &str = "10.78.9.2/24";
/// Between two things that happen to the guest: several scrapes.
const REST: Duration = Duration::from_secs(6);

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// How often the guest does what it does
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

/// Lets the guest live, and draws `dashboard.svg`.
///
/// # Errors
/// [`BenchError`]: Prometheus has no answer for a panel, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let panels = panels()?;
    let tap = Tap::create(TAP, HOST, 1500)?;
    let launch = Launch::new()?.memory("size=512M").cpus(2);
    let disk = launch.folder().join("disk");
    let file = std::fs::File::create(&disk).and_then(|file| file.set_len(64 * MIB));
    file.map_err(super::system("make a disk"))?;
    let mut monitor = launch
        .disk(&disk, false)
        .option("--net", &format!("tap={TAP}"))
        .option("--balloon", "size=0,statistics=1")
        .option("--metrics-listen", TARGET)
        .option("--id", "web")
        .start()?;
    let server = Prometheus::start()?;
    let mut guest = monitor.guest()?;
    read_free_lists(&monitor, &mut guest)?;
    guest.must(&format!(
        "ip addr add {GUEST} dev eth0 && ip link set dev eth0 up"
    ))?;
    for round in 0..arguments.rounds {
        live(&monitor.api(), &mut guest, &tap)?;
        eprintln!("dashboard: round {} of {}", round + 1, arguments.rounds);
    }
    let mut drawn = Vec::new();
    for panel in panels {
        let lines = lines(&server, &panel)?;
        println!("{}: {} lines", panel.title, lines.len());
        drawn.push((panel, lines));
    }
    picture::draw(&path("EBB_OUT")?.join("dashboard.svg"), &drawn)
}

/// What the panel's queries are answered with.
fn lines(server: &Prometheus, panel: &Panel) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for query in &panel.queries {
        lines.extend(server.ask(query)?);
    }
    let some = lines.iter().any(|line| !line.points.is_empty());
    let none = || ebb_harness::Error::new(format!("{:?} shows nothing", panel.title));
    some.then_some(lines).ok_or_else(none)
}

/// The guest uses memory and frees it, by its kernel and by the balloon; the host takes it; the guest reads, writes and talks.
fn live(api: &Api, guest: &mut Guest, tap: &Tap) -> Result<()> {
    let rest = || thread::sleep(REST);
    guest.ask("fill 192M")?;
    rest();
    guest.ask("drop")?;
    rest();
    api.reclaim(128 * MIB)?;
    rest();
    guest.must("dd if=/dev/zero of=/dev/vda bs=1M count=24 oflag=direct 2>/dev/null")?;
    guest.must("dd if=/dev/vda of=/dev/null bs=1M count=48 iflag=direct 2>/dev/null")?;
    let port = tap.serve_once(vec![7; 4 << 20])?;
    guest.must(&format!("wget -q -O /dev/null http://{HOST}:{port}/x"))?;
    rest();
    guest.ask("fill 256M")?;
    guest.ask("drop")?;
    for mib in [128, 0] {
        api.set_balloon(mib * MIB)?;
        until("the balloon", LONG, || {
            Ok((api.balloon()?.actual_mib == mib).then_some(()))
        })?;
        rest();
        // The second time what the kernel has free, too.
        api.reclaim(96 * MIB)?;
        rest();
    }
    Ok(())
}
