//! `ebb-guest stress`: processes that share an arena, check every block they hold, and are killed at random.

use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use ebb_guest_agent::arena::{Arena, Granule};

/// Bytes between two stamps.
const PAGE: usize = 4096;
/// A thread holds at most so many granules.
const MAX_HELD: usize = 6;
/// Exit code of a process that has found a block with something else in it than it should hold.
const CORRUPT: i32 = 3;

/// What is asked for.
struct Plan<'a> {
    device: &'a Path,
    processes: usize,
    threads: usize,
    time: Duration,
}

impl<'a> Plan<'a> {
    fn parse(words: &[&'a str]) -> Option<Self> {
        let &[device, processes, threads, seconds] = words else {
            return None;
        };
        Some(Self {
            device: Path::new(device),
            processes: processes
                .parse()
                .ok()
                .filter(|count| (1..=64).contains(count))?,
            threads: threads
                .parse()
                .ok()
                .filter(|count| (1..=64).contains(count))?,
            time: Duration::from_secs_f64(seconds.parse().ok().filter(|s| (0.0..1e6).contains(s))?),
        })
    }
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 8) as usize % bound
    }
}

/// Runs the processes, kills some, and looks whether a granule was lost.
pub fn main(words: &[&str]) -> ExitCode {
    let Some(plan) = Plan::parse(words) else {
        eprintln!("stress takes a device, processes and threads (1 to 64 each), and seconds");
        return ExitCode::from(2);
    };
    match run(&plan) {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("ebb-guest stress: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(plan: &Plan<'_>) -> Result<String, String> {
    let arena = Arena::open(plan.device).map_err(|error| error.to_string())?;
    let (start, mut random) = (Instant::now(), Random(u64::from(std::process::id()) + 1));
    let left = || plan.time.saturating_sub(start.elapsed());
    let recover = || {
        let recovered = arena.recover();
        recovered.map_err(|error| format!("recover: {error}"))
    };
    let mut children = Vec::new();
    for _ in 0..plan.processes {
        children.push(spawn(plan, left())?);
    }
    let (mut kills, mut recovered, mut tally) = (0, 0, Tally::default());
    while left() > Duration::from_secs(1) {
        std::thread::sleep(Duration::from_millis(100 + random.below(400) as u64));
        let victim = random.below(children.len());
        let killed = children[victim].kill();
        killed.map_err(|error| format!("kill: {error}"))?;
        tally.add(children.swap_remove(victim))?;
        kills += 1;
        if kills % 2 == 0 {
            recovered += recover()?;
        }
        children.push(spawn(plan, left())?);
    }
    for child in children {
        tally.add(child)?;
    }
    recovered += recover()?;
    let counts = arena.counts();
    let (lost, Tally { checks, corrupt }) = (counts.owned, tally);
    let found = format!(
        "kills={kills} recovered={recovered} checks={checks} lost={lost} corrupt={corrupt}"
    );
    if lost > 0 || corrupt > 0 || checks == 0 {
        return Err(format!("{found}: {counts:?}"));
    }
    Ok(format!("stress: {found}"))
}

/// What the processes have found.
#[derive(Default)]
struct Tally {
    /// Blocks that were checked by the processes that were not killed.
    checks: u64,
    /// Processes that have found a corrupt block, which is the last thing they do.
    corrupt: u64,
}

impl Tally {
    /// Waits for the end of a process and adds what it has found.
    fn add(&mut self, child: Child) -> Result<(), String> {
        let output = child.wait_with_output();
        let output = output.map_err(|error| format!("wait: {error}"))?;
        match output.status.code() {
            // Killed.
            None => {}
            Some(CORRUPT) => self.corrupt += 1,
            Some(0) => {
                let text = String::from_utf8_lossy(&output.stdout);
                let checks: u64 = text
                    .trim()
                    .parse()
                    .map_err(|error| format!("{text:?}: {error}"))?;
                self.checks += checks;
            }
            Some(_) => return Err(format!("a process failed: {}", output.status)),
        }
        Ok(())
    }
}

fn spawn(plan: &Plan<'_>, time: Duration) -> Result<Child, String> {
    let program = std::env::current_exe().map_err(|error| format!("current_exe: {error}"))?;
    let child = Command::new(program)
        .arg("stress-worker")
        .arg(plan.device)
        .args([
            "1".to_owned(),
            plan.threads.to_string(),
            time.as_secs_f64().to_string(),
        ])
        .stdout(Stdio::piped())
        .spawn();
    child.map_err(|error| format!("start a process: {error}"))
}

/// One of the processes; prints how many blocks it has checked.
pub fn worker(words: &[&str]) -> ExitCode {
    let Some(plan) = Plan::parse(words) else {
        return ExitCode::from(2);
    };
    let arena = match Arena::open(plan.device) {
        Ok(arena) => arena,
        Err(error) => {
            eprintln!("ebb-guest stress: {error}");
            return ExitCode::FAILURE;
        }
    };
    let end = Instant::now() + plan.time;
    let checks: Option<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..plan.threads)
            .map(|number| {
                let seed = (u64::from(std::process::id()) << 20) + number as u64 + 1;
                let arena = &arena;
                scope.spawn(move || churn(arena, seed, end))
            })
            .collect();
        threads.into_iter().map(|it| it.join().ok()).sum()
    });
    // Nothing when a thread has panicked.
    let Some(checks) = checks else {
        return ExitCode::FAILURE;
    };
    println!("{checks}");
    ExitCode::SUCCESS
}

/// Claims, checks, frees, reuses and releases at random. Returns how many blocks it has checked.
fn churn(arena: &Arena, seed: u64, end: Instant) -> u64 {
    let (mut random, mut checks) = (Random(seed), 0);
    let mut held: Vec<(Granule<'_>, u64)> = Vec::new();
    let mut stamp = seed << 24;
    while Instant::now() < end {
        stamp += 1;
        match random.below(4) {
            0 if held.len() < MAX_HELD => {
                // The arena may be full.
                let Some(mut granule) = arena.claim() else {
                    continue;
                };
                check(granule.bytes(), |found| found == 0);
                write(granule.bytes(), stamp);
                held.push((granule, stamp));
            }
            1 if !held.is_empty() => drop(held.swap_remove(random.below(held.len()))),
            _ if !held.is_empty() => {
                let (mut granule, old) = held.swap_remove(random.below(held.len()));
                check(granule.bytes(), |found| found == old);
                let lazy = granule.lazy_free();
                if random.below(2) == 0 {
                    std::thread::sleep(Duration::from_micros(random.below(2000) as u64));
                }
                let (mut granule, zeroed) = lazy.reuse();
                check(granule.bytes(), |found| {
                    found == 0 || found == old && !zeroed
                });
                write(granule.bytes(), stamp);
                check(granule.bytes(), |found| found == stamp);
                held.push((granule, stamp));
            }
            _ => {}
        }
        checks += 1;
    }
    checks
}

fn write(bytes: &mut [u8], stamp: u64) {
    for page in bytes.chunks_exact_mut(PAGE) {
        page[..8].copy_from_slice(&stamp.to_le_bytes());
    }
}

/// Looks at the stamp of each page. A bad one ends the process at once, before it can be killed.
fn check(bytes: &[u8], good: impl Fn(u64) -> bool) {
    if let Some((page, found)) = first_bad(bytes, good) {
        eprintln!(
            "ebb-guest stress: page {page} of a block holds {found:#x}: it was lost or overwritten"
        );
        std::process::exit(CORRUPT);
    }
}

/// The first page whose stamp is not good: its number and its stamp.
fn first_bad(bytes: &[u8], good: impl Fn(u64) -> bool) -> Option<(usize, u64)> {
    let stamp = |page: &[u8]| {
        page.first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    let stamps = bytes.chunks_exact(PAGE).map(stamp);
    stamps.enumerate().find(|(_, found)| !good(*found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_page_is_found() {
        let mut block = vec![0; 4 * PAGE];
        write(&mut block, 7);
        assert_eq!(first_bad(&block, |found| found == 7), None);
        block[3 * PAGE] = 8;
        assert_eq!(first_bad(&block, |found| found == 7), Some((3, 8)));
    }

    #[test]
    fn what_a_process_says_is_added_up() {
        let mut tally = Tally::default();
        let mut add = |script: &str| {
            let mut shell = Command::new("sh");
            let child = shell.args(["-c", script]).stdout(Stdio::piped()).spawn();
            tally.add(child.unwrap())
        };
        assert!(add("echo 5").is_ok() && add("echo 6").is_ok());
        assert!(add("exit 3").is_ok() && add("kill -9 $$").is_ok());
        assert!(add("exit 1").is_err() && add("echo five").is_err());
        assert_eq!((tally.checks, tally.corrupt), (11, 1));
    }
}
