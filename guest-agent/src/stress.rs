//! `ebb-guest stress`: processes that share an arena, check every block they hold, and are killed at random.

use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use ebb_guest_agent::arena::{Arena, Granule};

/// Bytes between two stamps.
const PAGE: usize = 4096;
/// Most granules that a thread holds.
const HELD: usize = 6;

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
    let mut children = Vec::new();
    for _ in 0..plan.processes {
        children.push(spawn(plan, left())?);
    }
    let (mut kills, mut recovered) = (0, 0);
    while left() > Duration::from_secs(1) {
        std::thread::sleep(Duration::from_millis(100 + random.below(400) as u64));
        let victim = random.below(children.len());
        children[victim]
            .kill()
            .map_err(|error| format!("kill: {error}"))?;
        let status = children[victim]
            .wait()
            .map_err(|error| format!("wait: {error}"))?;
        if status.code().is_some() {
            return Err(format!("a process ended by itself: {status}"));
        }
        kills += 1;
        if kills % 2 == 0 {
            recovered += arena
                .recover()
                .map_err(|error| format!("recover: {error}"))?;
        }
        children[victim] = spawn(plan, left())?;
    }
    let mut checks = 0;
    for child in children {
        let output = child
            .wait_with_output()
            .map_err(|error| format!("wait: {error}"))?;
        if !output.status.success() {
            return Err(format!("a process failed: {}", output.status));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        checks += text
            .trim()
            .parse::<u64>()
            .map_err(|error| format!("{text:?}: {error}"))?;
    }
    recovered += arena
        .recover()
        .map_err(|error| format!("recover: {error}"))?;
    let counts = arena.counts();
    let lost = counts.owned;
    if lost > 0 || checks == 0 {
        return Err(format!(
            "{lost} granules are lost, {checks} blocks were checked: {counts:?}"
        ));
    }
    Ok(format!(
        "stress: kills={kills} recovered={recovered} checks={checks} lost={lost} corrupt=0"
    ))
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
    let checks: Result<u64, String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..plan.threads)
            .map(|number| {
                let seed = (u64::from(std::process::id()) << 20) + number as u64 + 1;
                let arena = &arena;
                scope.spawn(move || churn(arena, seed, end))
            })
            .collect();
        let results = threads.into_iter().map(|thread| {
            let result = thread.join();
            result.unwrap_or_else(|_| Err("a thread panicked".to_owned()))
        });
        results.sum()
    });
    match checks {
        Ok(checks) => {
            println!("{checks}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("ebb-guest stress: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Claims, checks, frees, reuses and releases at random.
fn churn(arena: &Arena, seed: u64, end: Instant) -> Result<u64, String> {
    let (mut random, mut checks) = (Random(seed), 0);
    let mut held: Vec<(Granule<'_>, u64)> = Vec::new();
    let mut stamp = seed << 24;
    while Instant::now() < end {
        stamp += 1;
        match random.below(4) {
            0 if held.len() < HELD => {
                // Full is no mistake.
                let Some(mut granule) = arena.claim() else {
                    continue;
                };
                check(granule.bytes(), |found| found == 0)?;
                write(granule.bytes(), stamp);
                held.push((granule, stamp));
            }
            1 if !held.is_empty() => drop(held.swap_remove(random.below(held.len()))),
            _ if !held.is_empty() => {
                let (mut granule, old) = held.swap_remove(random.below(held.len()));
                check(granule.bytes(), |found| found == old)?;
                let lazy = granule.lazy_free();
                if random.below(2) == 0 {
                    std::thread::sleep(Duration::from_micros(random.below(2000) as u64));
                }
                let (mut granule, zeroed) = lazy.reuse();
                check(granule.bytes(), |found| {
                    found == 0 || found == old && !zeroed
                })?;
                write(granule.bytes(), stamp);
                check(granule.bytes(), |found| found == stamp)?;
                held.push((granule, stamp));
            }
            _ => {}
        }
        checks += 1;
    }
    Ok(checks)
}

fn write(bytes: &mut [u8], stamp: u64) {
    for page in bytes.chunks_exact_mut(PAGE) {
        page[..8].copy_from_slice(&stamp.to_le_bytes());
    }
}

/// Looks at the stamp of each page.
fn check(bytes: &[u8], good: impl Fn(u64) -> bool) -> Result<(), String> {
    for (number, page) in bytes.chunks_exact(PAGE).enumerate() {
        let found = page
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes));
        if !good(found) {
            return Err(format!(
                "page {number} of a block holds {found:#x}: it was lost or overwritten"
            ));
        }
    }
    Ok(())
}
