//! `ebb-bench snapshot`: how large a snapshot of a guest is and how long it takes, with most of its memory free and with none of
//! it; and how soon a restored guest runs, by the size of its memory.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ebb_harness::error::{Context, Error, Result};
use ebb_harness::free_pages::read_free_lists;
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Guest, Images, Launch, Monitor};
use ebb_hypercall_abi::Operation;
use ebb_payload::{Program, Transport, page};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::BenchError;
use super::results::{Metric, Results};

const GIB: u64 = 1 << 30;
/// Guests that are saved have so much memory.
const RAM: &str = "1G";
/// Of that, the guest's program leaves alone what is below [`page`] 0.
const FILLED: u64 = GIB - 16 * MIB;
/// 70 % of it.
const FREED: u64 = 717 * MIB;
/// A stock guest has this in use besides what its kernel takes, or frees it.
const STOCK: &str = "700M";
/// What guests that are restored have in use.
const USED: u64 = 64 * MIB;
/// A restored guest writes so much before it is saved again.
const CHANGED: u64 = 16 * MIB;
/// Memory of guests that are restored to see how soon they run.
const SIZES: [&str; 3] = ["256M", "1G", "4G"];
const PAGE: u64 = 4096;
/// The guest writes to it, without an end.
const SERIAL: u16 = 0x3f8;

const IN_USE: &str = "all in use";
const FREE: &str = "70 % free";
const STOCK_USED: &str = "stock, 700M in use";
const STOCK_FREE: &str = "stock, 700M freed";
const WHOLE: &str = "restored, all of it";
const DIFFERENCE: &str = "restored, difference";

/// From the request, of a paused machine, until both files have their names.
const TIME: Metric = ("time", "s");
/// What the memory file takes on the disk.
const FILE: Metric = ("file", "bytes");
/// From the start of `ebb restore --resume` until the guest's first byte is read.
const FIRST: Metric = ("first-byte", "ms");

/// Arguments of the benchmark.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Snapshots of each guest
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Restores of each size
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    restores: u32,
    /// Leave out the guest with Debian's kernel
    #[arg(long)]
    no_stock: bool,
}

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// [`BenchError`]: a guest is not saved, for instance.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    let mut results = Results::default();
    save_payloads(arguments.runs, &mut results)?;
    if !arguments.no_stock {
        save_stock(arguments.runs, &mut results)?;
    }
    save_restored(arguments.runs, &mut results)?;
    restore(arguments.restores, &mut results)?;
    let of = |case, metric: Metric| ["ebb", case, metric.0];
    if let Some(bytes) = results.median("ebb", FREE, FILE.0) {
        results.lower("file_gib", bytes / GIB as f64);
    }
    results.divide("speedup", of(IN_USE, TIME), of(FREE, TIME));
    results.divide("stock_speedup", of(STOCK_USED, TIME), of(STOCK_FREE, TIME));
    results.divide("difference_speedup", of(WHOLE, TIME), of(DIFFERENCE, TIME));
    results.divide("difference_file", of(WHOLE, FILE), of(DIFFERENCE, FILE));
    let (small, large) = (of(SIZES[0], FIRST), of(SIZES[2], FIRST));
    results.divide_cost("restore_growth", large, small);
    results.note("the memory file is on a file system in memory; the machine is paused meanwhile");
    results.note("guests that are restored have 64 MiB in use, whatever their size");
    results.report("snapshot").publish()
}

/// A guest that fills memory up to `filled` bytes, frees the last `freed` bytes of that, and talks.
fn talker(filled: u64, freed: u64) -> Program {
    let (all, free) = (filled / PAGE, freed / PAGE);
    let mut guest = Program::kernel();
    guest.fill(page(0), all, 7);
    if free > 0 {
        let at = page(all - free);
        guest.call(Transport::Port, Operation::LazyFree, at, free);
    }
    guest.output_byte(SERIAL, b'x', u64::MAX);
    guest
}

/// Starts a guest of our own, and pauses it once it talks.
fn start(guest: &Program, ram: &str) -> Result<Monitor> {
    let launch = savable()?.memory(&format!("size={ram}"));
    let path = |name: &str| launch.folder().join(name);
    guest.write(&path("kernel")).context("write the guest")?;
    let (kernel, serial) = (path("kernel"), path("serial"));
    let serial_option = format!("file={}", serial.display());
    let monitor = launch.kernel(&kernel).serial(&serial_option).start()?;
    until("the guest talks", LONG, || {
        Ok(fs::metadata(&serial)
            .is_ok_and(|it| it.len() > 0)
            .then_some(()))
    })?;
    set_state(&monitor, "Paused")?;
    Ok(monitor)
}

/// A machine that may be saved to files of its folder.
fn savable() -> Result<Launch> {
    let launch = Launch::new()?;
    let folder = launch.folder().canonicalize().context("the folder")?;
    Ok(launch.option("--allow-paths", &folder.to_string_lossy()))
}

fn set_state(monitor: &Monitor, state: &str) -> Result<()> {
    let state = json!({ "state": state });
    monitor.api().must("PATCH", "/vm", &state).map(drop)
}

/// Saves a paused machine to the files `state` and `memory` of its folder.
fn save(monitor: &Monitor) -> Result<Duration> {
    save_as(monitor, "Full", ["state", "memory"])
}

/// Saves a paused machine to files of its folder, where they are not yet. How long that took.
fn save_as(monitor: &Monitor, kind: &str, names: [&str; 2]) -> Result<Duration> {
    let folder = monitor.folder().canonicalize().context("the folder")?;
    let [state, memory] = names.map(|name| folder.join(name));
    for path in [&state, &memory] {
        // It is not there the first time.
        let _ = fs::remove_file(path);
    }
    let body = json!({ "snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory });
    let start = Instant::now();
    monitor.api().must("PUT", "/snapshot/create", &body)?;
    Ok(start.elapsed())
}

/// Saves it and adds what came of it.
fn add(monitor: &Monitor, case: &str, results: &mut Results) -> Result<()> {
    let time = save(monitor)?;
    add_file(monitor, case, time, "memory", results)
}

/// Adds the time of a snapshot, and what its memory file takes.
fn add_file(
    monitor: &Monitor,
    case: &str,
    time: Duration,
    memory: &str,
    results: &mut Results,
) -> Result<()> {
    let file = monitor.folder().join(memory);
    let file = fs::metadata(&file).context(file.display())?;
    results.add(("ebb", case), TIME, time.as_secs_f64());
    results.add(("ebb", case), FILE, (file.blocks() * 512) as f64);
    Ok(())
}

fn save_payloads(runs: u32, results: &mut Results) -> Result<()> {
    let mut guests = [
        (IN_USE, start(&talker(FILLED, 0), RAM)?),
        (FREE, start(&talker(FILLED, FREED), RAM)?),
    ];
    for run in 1..=runs {
        for (case, monitor) in &guests {
            add(monitor, case, results)?;
        }
        guests.rotate_left(1);
        eprintln!("snapshot: run {run} of {runs}");
    }
    Ok(())
}

/// A restored guest writes a little, and is saved in full and as a difference.
fn save_restored(runs: u32, results: &mut Results) -> Result<()> {
    /// Bytes that it writes to its serial port meanwhile, so that it is saved before it changes anything.
    const TALK: u64 = 60_000;
    let mut guest = Program::kernel();
    guest.fill(page(0), FILLED / PAGE, 7);
    guest.output_byte(SERIAL, b'x', TALK);
    guest.fill(page(0), CHANGED / PAGE, 5);
    guest.output_byte(SERIAL, b'z', u64::MAX);
    let mut monitor = start(&guest, RAM)?;
    save(&monitor)?;
    let serial = monitor.folder().join("restored");
    let option = format!("file={}", serial.display());
    monitor.kill_and_restore(&["--resume", "--serial", &option])?;
    until("the guest has changed its memory", LONG, || {
        Ok(fs::read(&serial)
            .is_ok_and(|it| it.contains(&b'z'))
            .then_some(()))
    })?;
    set_state(&monitor, "Paused")?;
    for run in 1..=runs {
        for (case, kind, names) in [
            (WHOLE, "Full", ["state1", "memory1"]),
            (DIFFERENCE, "Diff", ["state2", "memory2"]),
        ] {
            let time = save_as(&monitor, kind, names)?;
            add_file(&monitor, case, time, names[1], results)?;
        }
        eprintln!("snapshot: difference, run {run} of {runs}");
    }
    Ok(())
}

/// The same for a guest whose kernel has lists of what is free.
fn save_stock(runs: u32, results: &mut Results) -> Result<()> {
    let mut monitor = savable()?.memory(&format!("size={RAM}")).start()?;
    let mut guest = monitor.guest()?;
    read_free_lists(&monitor, &mut guest)?;
    for run in 1..=runs {
        for (case, request) in [
            (STOCK_USED, format!("fill {STOCK}")),
            (STOCK_FREE, "drop".to_owned()),
        ] {
            save_after(&monitor, &mut guest, &request, case, results)?;
        }
        eprintln!("snapshot: stock, run {run} of {runs}");
    }
    Ok(())
}

fn save_after(
    monitor: &Monitor,
    guest: &mut Guest,
    request: &str,
    case: &str,
    results: &mut Results,
) -> Result<()> {
    guest.ask(request)?;
    set_state(monitor, "Paused")?;
    add(monitor, case, results)?;
    set_state(monitor, "Resumed")
}

/// Restores machines of several sizes in turn.
fn restore(restores: u32, results: &mut Results) -> Result<()> {
    let guest = talker(USED, 0);
    let mut saved = Vec::new();
    for ram in SIZES {
        let monitor = start(&guest, ram)?;
        save(&monitor)?;
        saved.push((ram, monitor));
    }
    for run in 0..=restores {
        for (ram, monitor) in &saved {
            let time = first_byte(monitor.folder())?;
            // The first time it fills the caches.
            if run > 0 {
                results.add(("ebb", ram), FIRST, time.as_secs_f64() * 1e3);
            }
        }
        saved.rotate_left(1);
    }
    Ok(())
}

/// A restored monitor, asked to end when dropped.
struct Restored(Child);

impl Drop for Restored {
    fn drop(&mut self) {
        // Nobody reads any more what the guest says.
        drop(self.0.stdout.take());
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

/// Restores what is saved in `folder`, and waits for the guest's first byte.
fn first_byte(folder: &Path) -> Result<Duration> {
    let mut command = Command::new(Images::from_environment()?.ebb);
    command.args(["restore", "--resume", "--serial", "tty", "--state"]);
    command.arg(folder.join("state"));
    command.arg("--memory").arg(folder.join("memory"));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let start = Instant::now();
    let mut restored = Restored(command.spawn().context("ebb restore")?);
    let output = restored.0.stdout.as_mut().context("no output")?;
    let mut byte = [0];
    output
        .read_exact(&mut byte)
        .context("the guest's first byte")?;
    let time = start.elapsed();
    if byte == *b"x" {
        return Ok(time);
    }
    Err(Error::new(format!("the guest says {byte:?}")))
}
