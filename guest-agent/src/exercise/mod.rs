//! `ebb-guest exercise`: takes and frees the guest's memory in every way that a kernel knows, and checks every byte.
//!
//! Its use is to show that the host, whatever it takes from the guest at the same time, takes nothing that is in use: each
//! word has a value that depends on its place, and fresh memory must read zero.

mod anonymous;
mod files;
mod kernel;
mod streams;
mod words;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use words::Wrong;

/// Most things that a thread holds at a time.
const MAX_HELD: usize = 48;
/// Operations of the first thread between two requests to the kernel.
const KERNEL_PERIOD: u64 = 32;
/// Exit code when a word was wrong.
const LOST: u8 = 3;

/// Why a thread stops.
#[derive(Debug)]
pub enum Stop {
    /// A word has another value than was written there.
    Wrong(Wrong),
    /// A system call failed that must not fail.
    Failed(String),
}

impl Stop {
    /// A system call that must not fail.
    fn failed<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Failed(format!("{what}: {error}"))
    }
}

impl From<Wrong> for Stop {
    fn from(wrong: Wrong) -> Self {
        Self::Wrong(wrong)
    }
}

/// Memory, or what takes up the kernel's memory, with known content. Dropping it frees it.
trait Holding {
    /// Bytes that it takes up.
    fn bytes(&self) -> usize;

    /// Reads all of it, and changes it in its own way: its content is known again afterwards.
    fn check(&mut self, random: &mut Random) -> Result<(), Stop>;
}

/// Makes a holding of at most so many bytes. `None`: the kernel has refused it, which it may.
type Take = fn(&mut Random, usize, &Options) -> Result<Option<Box<dyn Holding>>, Stop>;

/// Kinds of holdings, with their names in the report.
const KINDS: [(&str, Take); 7] = [
    ("anonymous", anonymous::take),
    ("huge_pool", anonymous::take_from_pool),
    ("files", files::take),
    ("links", files::take_links),
    ("pipes", streams::take_pipe),
    ("sockets", streams::take_socket),
    ("direct", files::take_direct),
];

/// The kind that is taken only if it is asked for.
const DIRECT: usize = KINDS.len() - 1;

/// The command's arguments.
#[derive(Debug)]
pub struct Options {
    threads: u64,
    operations: u64,
    seconds: u64,
    bytes: usize,
    seed: u64,
    /// Where files are written.
    folders: Vec<PathBuf>,
    /// Ask the kernel to compact and drop memory, and to take blocks of it off line.
    kernel: bool,
    /// Half of all that is taken are files that are read past the page cache.
    direct: bool,
}

const USAGE: &str = "usage: ebb-guest exercise [--threads N] [--operations N] [--seconds N] [--mib N] [--seed N] \
                     [--folder DIR]... [--kernel] [--direct]";

impl Options {
    fn parse(words: &[&str]) -> Option<Self> {
        let mut options = Self {
            threads: 2,
            operations: u64::MAX,
            seconds: 10,
            bytes: 64 << 20,
            seed: 1,
            folders: Vec::new(),
            kernel: false,
            direct: false,
        };
        let mut words = words.iter();
        while let Some(name) = words.next() {
            if *name == "--kernel" {
                options.kernel = true;
                continue;
            }
            if *name == "--direct" {
                options.direct = true;
                continue;
            }
            let value = words.next()?;
            let number = || value.parse::<u64>().ok();
            match *name {
                "--threads" => options.threads = number().filter(|n| (1..=64).contains(n))?,
                "--operations" => options.operations = number()?,
                "--seconds" => options.seconds = number()?,
                "--mib" => options.bytes = crate::size::parse(&format!("{value}M"))?,
                "--seed" => options.seed = number()?,
                "--folder" => options.folders.push(PathBuf::from(value)),
                _ => return None,
            }
        }
        Some(options)
    }
}

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 8) as usize % bound.max(1)
    }

    /// A power of two times `unit`, each as often as the others, at most `most`.
    fn size(&mut self, unit: usize, most: usize) -> usize {
        let steps = (most / unit).max(1).ilog2() as usize + 1;
        unit << self.below(steps)
    }
}

/// What all threads share.
struct Shared<'a> {
    options: &'a Options,
    end: Instant,
    /// A thread has stopped before its time.
    stopped: AtomicBool,
    operations: AtomicU64,
    /// Bytes that were read and compared.
    checked: AtomicU64,
    /// Bytes that may still be taken.
    left: AtomicUsize,
    taken: [AtomicU64; KINDS.len()],
    refused: AtomicU64,
}

impl Shared<'_> {
    fn goes_on(&self) -> bool {
        !self.stopped.load(Ordering::Relaxed)
            && self.operations.load(Ordering::Relaxed) < self.options.operations
            && Instant::now() < self.end
    }

    /// Takes something new, unless all that may be taken is.
    fn take(&self, random: &mut Random) -> Result<Option<Box<dyn Holding>>, Stop> {
        let kind = match random.below(9) {
            _ if self.options.direct && random.below(2) == 0 => DIRECT,
            // Most of all, anonymous memory.
            0..=3 => 0,
            other => other - 3,
        };
        // Other threads may take it first. Then this one takes more than was meant: a little, for it is divided.
        let most = self.left.load(Ordering::Relaxed) / 2;
        let Some(holding) = KINDS[kind].1(random, most, self.options)? else {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Ok(None);
        };
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                Some(left.saturating_sub(holding.bytes()))
            })
            .ok();
        self.taken[kind].fetch_add(1, Ordering::Relaxed);
        Ok(Some(holding))
    }

    fn check(&self, holding: &mut dyn Holding, random: &mut Random) -> Result<(), Stop> {
        holding.check(random)?;
        let bytes = holding.bytes() as u64;
        self.checked.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn give_back(&self, holding: Box<dyn Holding>) {
        self.left.fetch_add(holding.bytes(), Ordering::Relaxed);
    }
}

/// One thread: takes, checks and frees in any order; at the end it checks all that is left.
fn work(shared: &Shared<'_>, number: u64, kernel: &mut kernel::Requests) -> Result<(), Stop> {
    let mut random = Random(words::mix(shared.options.seed ^ number << 32) | 1);
    let mut held: Vec<Box<dyn Holding>> = Vec::new();
    let mut turn = 0_u64;
    while shared.goes_on() {
        turn += 1;
        shared.operations.fetch_add(1, Ordering::Relaxed);
        if shared.options.kernel && number == 0 && turn.is_multiple_of(KERNEL_PERIOD) {
            kernel.make_one(&mut random)?;
            continue;
        }
        let full = held.len() == MAX_HELD || shared.left.load(Ordering::Relaxed) < 64 << 10;
        match random.below(8) {
            0..=3 if !full => held.extend(shared.take(&mut random)?),
            4 | 5 if !held.is_empty() => {
                let at = random.below(held.len());
                shared.check(&mut *held[at], &mut random)?;
            }
            _ if !held.is_empty() => {
                let mut holding = held.swap_remove(random.below(held.len()));
                shared.check(&mut *holding, &mut random)?;
                shared.give_back(holding);
            }
            _ => {}
        }
    }
    for mut holding in held {
        shared.check(&mut *holding, &mut random)?;
        shared.give_back(holding);
    }
    Ok(())
}

/// Runs all threads. The report, and what went wrong.
fn run(options: &Options) -> (String, Vec<Stop>) {
    let shared = Shared {
        options,
        end: Instant::now() + Duration::from_secs(options.seconds),
        stopped: AtomicBool::new(false),
        operations: AtomicU64::new(0),
        checked: AtomicU64::new(0),
        left: AtomicUsize::new(options.bytes),
        taken: Default::default(),
        refused: AtomicU64::new(0),
    };
    let mut kernel = kernel::Requests::default();
    let stops: Vec<Stop> = std::thread::scope(|scope| {
        let shared = &shared;
        let run = move |number, kernel: &mut kernel::Requests| {
            let stop = work(shared, number, kernel).err();
            if stop.is_some() {
                shared.stopped.store(true, Ordering::Relaxed);
            }
            stop
        };
        let others: Vec<_> = (1..options.threads)
            .map(|number| scope.spawn(move || run(number, &mut kernel::Requests::default())))
            .collect();
        let first = run(0, &mut kernel);
        let others = others
            .into_iter()
            .map(|thread| thread.join().expect("a thread"));
        others.chain([first]).flatten().collect()
    });
    let lost: u64 = stops.iter().map(words_lost).sum();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let mut report = format!(
        "exercise: operations={} checked_mib={} lost={lost} refused={}",
        count(&shared.operations),
        count(&shared.checked) >> 20,
        count(&shared.refused),
    );
    for ((name, _), taken) in KINDS.iter().zip(&shared.taken) {
        report += &format!(" {name}={}", count(taken));
    }
    (format!("{report} {kernel}"), stops)
}

fn words_lost(stop: &Stop) -> u64 {
    match stop {
        Stop::Wrong(wrong) => wrong.words,
        Stop::Failed(_) => 0,
    }
}

/// Runs the subcommand.
pub fn main(words: &[&str]) -> ExitCode {
    let Some(options) = Options::parse(words) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let (report, stops) = run(&options);
    println!("{report}");
    for stop in &stops {
        match stop {
            Stop::Wrong(wrong) => println!("ebb-guest exercise: {wrong}"),
            Stop::Failed(message) => println!("ebb-guest exercise: {message}"),
        }
    }
    if stops.iter().any(|stop| words_lost(stop) > 0) {
        return ExitCode::from(LOST);
    }
    if stops.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_kinds_are_taken_and_nothing_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let words = [
            "--threads",
            "2",
            "--operations",
            "600",
            "--seconds",
            "600",
            "--mib",
            "16",
            "--folder",
            path,
        ];
        let (report, stops) = run(&Options::parse(&words).unwrap());
        assert!(stops.is_empty(), "{stops:?}");
        assert!(report.contains(" lost=0 "), "{report}");
        for name in ["anonymous", "files", "links", "pipes", "sockets"] {
            assert!(!report.contains(&format!(" {name}=0")), "{report}");
        }
    }

    #[test]
    fn options_that_make_no_sense_are_refused() {
        for words in [
            &["--threads", "0"][..],
            &["--threads"],
            &["--what", "1"],
            &["5"],
        ] {
            assert!(Options::parse(words).is_none(), "{words:?}");
        }
    }
}
