//! `ebb-guest stress`: shares an arena among processes that check their granules and are killed at random.

use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use ebb_guest_agent::arena::{Arena, Granule};
use ebb_guest_agent::memory::PAGE_SIZE;

/// Maximum number of granules that a thread holds.
const MAX_HELD: usize = 6;
/// Exit code of a process that has found a granule with wrong content.
const CORRUPT: i32 = 3;

/// The command's arguments.
struct Options<'a> {
    device: &'a Path,
    processes: usize,
    threads: usize,
    time: Duration,
}

impl<'a> Options<'a> {
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

/// Runs the processes, kills some, and checks that no granule is lost.
pub fn main(words: &[&str]) -> ExitCode {
    let Some(options) = Options::parse(words) else {
        eprintln!(
            "usage: ebb-guest stress DEVICE PROCESSES THREADS SECONDS, with 1 to 64 PROCESSES and THREADS"
        );
        return ExitCode::from(2);
    };
    match run(&options) {
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

fn run(options: &Options<'_>) -> Result<String, String> {
    let arena = Arena::open(options.device).map_err(|error| error.to_string())?;
    let (start, mut random) = (Instant::now(), Random(u64::from(std::process::id()) + 1));
    let left = || options.time.saturating_sub(start.elapsed());
    let recover = || {
        let recovered = arena.recover();
        recovered.map_err(|error| format!("recover: {error}"))
    };
    let mut children = Vec::new();
    for _ in 0..options.processes {
        children.push(spawn(options, left())?);
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
        children.push(spawn(options, left())?);
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

/// Sums over the processes.
#[derive(Default)]
struct Tally {
    /// Checks of granules in the processes that were not killed.
    checks: u64,
    /// Processes that have found wrong content, which ends them.
    corrupt: u64,
}

impl Tally {
    /// Waits for the end of a process and adds its result.
    fn add(&mut self, child: Child) -> Result<(), String> {
        let output = child.wait_with_output();
        let output = output.map_err(|error| format!("wait: {error}"))?;
        match output.status.code() {
            None => {} // Killed.
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

fn spawn(options: &Options<'_>, time: Duration) -> Result<Child, String> {
    let program = std::env::current_exe().map_err(|error| format!("current_exe: {error}"))?;
    let child = Command::new(program)
        .arg("stress-worker")
        .arg(options.device)
        .args([
            "1".to_owned(),
            options.threads.to_string(),
            time.as_secs_f64().to_string(),
        ])
        .stdout(Stdio::piped())
        .spawn();
    child.map_err(|error| format!("start a process: {error}"))
}

/// One of the processes. Prints its number of checks.
pub fn worker(words: &[&str]) -> ExitCode {
    let Some(options) = Options::parse(words) else {
        return ExitCode::from(2);
    };
    let arena = match Arena::open(options.device) {
        Ok(arena) => arena,
        Err(error) => {
            eprintln!("ebb-guest stress: {error}");
            return ExitCode::FAILURE;
        }
    };
    let end = Instant::now() + options.time;
    let checks: Option<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..options.threads)
            .map(|number| {
                let seed = (u64::from(std::process::id()) << 20) + number as u64 + 1;
                let arena = &arena;
                scope.spawn(move || use_granules(arena, seed, end))
            })
            .collect();
        threads.into_iter().map(|it| it.join().ok()).sum()
    });
    // `None` if a thread has panicked.
    let Some(checks) = checks else {
        return ExitCode::FAILURE;
    };
    println!("{checks}");
    ExitCode::SUCCESS
}

/// Claims, checks, frees, reuses and releases granules at random. Returns the number of checks.
fn use_granules(arena: &Arena, seed: u64, end: Instant) -> u64 {
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
    for page in bytes.chunks_exact_mut(PAGE_SIZE) {
        page[..8].copy_from_slice(&stamp.to_le_bytes());
    }
}

/// Checks the stamp of each page. A wrong one ends the process at once, before it can be killed.
fn check(bytes: &[u8], good: impl Fn(u64) -> bool) {
    if let Some((page, found)) = first_wrong(bytes, good) {
        eprintln!(
            "ebb-guest stress: page {page} of a granule holds {found:#x}: it was lost or overwritten"
        );
        std::process::exit(CORRUPT);
    }
}

/// Number and stamp of the first page with a wrong stamp.
fn first_wrong(bytes: &[u8], good: impl Fn(u64) -> bool) -> Option<(usize, u64)> {
    let stamp = |page: &[u8]| {
        page.first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    let stamps = bytes.chunks_exact(PAGE_SIZE).map(stamp);
    stamps.enumerate().find(|(_, found)| !good(*found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_page_is_found() {
        let mut granule = vec![0; 4 * PAGE_SIZE];
        write(&mut granule, 7);
        assert_eq!(first_wrong(&granule, |found| found == 7), None);
        granule[3 * PAGE_SIZE] = 8;
        assert_eq!(first_wrong(&granule, |found| found == 7), Some((3, 8)));
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
