//! A machine whose API is asked by many clients that send a byte at a time.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ebb_harness::error::{Context, Result};
use ebb_harness::size::MIB;
use ebb_harness::slow_clients::SlowClients;
use ebb_harness::{Guest, Images, Launch, Monitor};
use rustix::process::Signal;

use super::Arguments;
use crate::overhead::resident;
use crate::results::{Metric, Results};

/// The guest's memory.
const RAM_MIB: u64 = 256;
/// Time between two looks at the monitor.
const PERIOD: Duration = Duration::from_millis(500);

const ALONE: &str = "nobody asks";
const CROWD: &str = "slow clients";
/// Passes of the guest's program over its memory.
const PASSES: Metric = ("passes", "");
const MEMORY: Metric = ("memory", "bytes");
const STOP: Metric = ("stop", "ms");
const ANSWER: Metric = ("answer", "s");

/// Measures a machine alone, and one with the clients.
pub(super) fn measure(arguments: &Arguments, results: &mut Results) -> Result<()> {
    for (case, clients) in [(ALONE, 0), (CROWD, arguments.clients as usize)] {
        run(case, clients, arguments.seconds, results)?;
    }
    let of = |case, metric: Metric| ["ebb", case, metric.0];
    results.divide_rates("crowd_progress", of(CROWD, PASSES), of(ALONE, PASSES));
    let most_of = |case, metric: Metric| {
        let samples = results.of("ebb", case, metric.0);
        samples.iter().copied().fold(0.0, f64::max)
    };
    let most = |metric| most_of(CROWD, metric);
    let before = results.of("ebb", CROWD, MEMORY.0).first().copied();
    let growth = most(MEMORY) - before.context("no look at the memory")?;
    let (stop, answer) = (most(STOP), most(ANSWER));
    let alone = most_of(ALONE, ANSWER);
    results.lower("crowd_growth_bytes", growth);
    results.lower("crowd_stop_ms", stop);
    results.lower("crowd_answer_s", answer);
    results.lower("crowd_answer_alone_s", alone);
    results.note("memory: of the monitor, without its guest's; the first sample is that before the clients came");
    results.note("answer: from the start of `ebb ctl status` to its end; the longest counts");
    results.note("the clients take processors' time from the guest: they run on the same ones");
    Ok(())
}

fn run(case: &str, clients: usize, seconds: u64, results: &mut Results) -> Result<()> {
    let launch = Launch::new()?.memory(&format!("size={RAM_MIB}M"));
    let mut monitor = launch.start()?;
    let mut guest = monitor.guest()?;
    let sum = guest.checksum("keep 16M")?;
    // The memory that it takes in each pass is there from now on.
    guest.ask("churn 64M 0")?;
    results.add(("ebb", case), MEMORY, memory(&monitor)?);
    let slow = SlowClients::start(&monitor.socket(), clients)?;
    guest.send(&format!("churn 64M {seconds}"))?;
    thread::scope(|scope| {
        let asked = scope.spawn(|| answers(&monitor, seconds));
        let end = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < end {
            thread::sleep(PERIOD);
            results.add(("ebb", case), MEMORY, memory(&monitor)?);
            let descriptors = fs::read_dir(proc(&monitor, "fd")).context("descriptors")?;
            results.add(
                ("ebb", case),
                ("descriptors", ""),
                descriptors.count() as f64,
            );
        }
        let times = asked
            .join()
            .ok()
            .context("the polite client has panicked")?;
        for time in times? {
            results.add(("ebb", case), ANSWER, time);
        }
        Ok::<_, ebb_harness::Error>(())
    })?;
    results.add(("ebb", case), PASSES, passes(&mut guest)?);
    assert_eq!(guest.checksum("verify")?, sum);
    let (connected, cut_off) = (slow.connected(), slow.cut_off());
    results.add(("ebb", case), ("connected", ""), connected as f64);
    results.add(("ebb", case), ("cut off", ""), cut_off as f64);
    let start = Instant::now();
    monitor.signal(Signal::TERM)?;
    let status = monitor.wait()?;
    results.add(("ebb", case), STOP, start.elapsed().as_secs_f64() * 1e3);
    assert_eq!(status, 0, "{}", monitor.log());
    slow.end();
    Ok(())
}

/// Seconds that `ebb ctl status` takes, again and again: unlike a thread of this process, it is another client than the slow ones.
fn answers(monitor: &Monitor, seconds: u64) -> Result<Vec<f64>> {
    let ebb = Images::from_environment()?.ebb;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut times = Vec::new();
    while Instant::now() < end {
        let mut command = Command::new(&ebb);
        command.args(["ctl", "--api-socket"]).arg(monitor.socket());
        command.args(["status", "--json"]).stdout(Stdio::null());
        let start = Instant::now();
        let status = command.status().context("ebb ctl")?;
        times.push(start.elapsed().as_secs_f64());
        assert!(status.success(), "ebb ctl: {status}");
        thread::sleep(PERIOD);
    }
    Ok(times)
}

/// The answer to the `churn` that was sent.
fn passes(guest: &mut Guest) -> Result<f64> {
    let limit = Duration::from_secs(60);
    let line = guest.console.wait_for("EBB-GUEST-OK churn pages", limit)?;
    let passes = line
        .split(' ')
        .find_map(|word| word.strip_prefix("passes="));
    passes.and_then(|it| it.parse().ok()).context(line)
}

fn proc(monitor: &Monitor, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/{name}", monitor.pid()))
}

/// Resident bytes of the monitor besides its guest's memory.
fn memory(monitor: &Monitor) -> Result<f64> {
    let smaps = fs::read_to_string(proc(monitor, "smaps")).context("smaps")?;
    let resident = resident(&smaps, RAM_MIB * MIB).context("no guest memory")?;
    Ok(resident.rest as f64)
}
