//! `ebb-bench lazy`: what LAZY_FREE and REUSE cost when the memory is reused before anybody wants it.
//!
//! **Flushes**: a guest of one vCPU makes pairs of LAZY_FREE and REUSE and writes to the memory after each; the kernel's
//! counters tell what that has caused. Before each round the same guest makes as many calls that do nothing: what a round
//! of pairs counts above that round is its cost. At the end one range is reclaimed, to show that the counters would have
//! moved. What other monitors do is measured under one vCPU as well: one madvise for each range.
//!
//! **Discards** of ranges that every vCPU has left behind: flushes, as in `ebb-bench reclaim`.
//!
//! **Time**: the same calls, compared with an exit of the same kind that nobody does anything about: the payload runs
//! in turn under Ebb and in a bare loop around KVM_RUN, and takes its own time by its time stamp counter.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ebb_hypercall_abi::{Attributes, Operation, PAGE_SIZE};
use ebb_payload::{FREE_START, PAIR_RANGES, Program, RESULT_SIZE, Step, Transport, page};

use super::counters::Counters;
use super::report::Report;
use super::results::{Metric, Results};
use super::{BenchError, bare, reclaim};
use ebb_harness::error::{Context, Error, Result};
use ebb_harness::wait::LONG;
use ebb_harness::{Launch, Monitor};

/// Pages of each range that is freed and reused.
const PAGES: u64 = 4;
/// Pages that the ranges lie in.
const ALL_PAGES: u64 = PAIR_RANGES * 2 * PAGES;
/// The guest's memory in bytes: more than the ranges need.
const MEMORY: u64 = 128 << 20;
/// What is reclaimed at the end: beyond the ranges.
const CONTROL: u64 = page(ALL_PAGES);
/// Pages of it.
const CONTROL_PAGES: u64 = 64;
/// Where the guest's query block lies, beyond that.
const QUERY: u64 = page(ALL_PAGES + CONTROL_PAGES);

/// Pieces of a round whose time is taken.
const PIECES: u64 = 10;

/// Arguments of the benchmark.
#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// Rounds of each measurement
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Pairs of LAZY_FREE and REUSE in a round
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pairs: u64,
    /// Discards of ranges that every vCPU has left behind, at least
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(64..=1_000_000))]
    discards: u64,
    /// One short round of each: whether it works, not how fast it is
    #[arg(long)]
    quick: bool,
}

impl Arguments {
    /// Those of `--quick`.
    #[must_use]
    pub const fn quick() -> Self {
        Self {
            runs: 1,
            pairs: 500,
            discards: 128,
            quick: true,
        }
    }
}

/// Runs the benchmark, prints the table and writes the report.
///
/// # Errors
/// As for [`measure`]; the report cannot be written.
pub fn run(arguments: &Arguments) -> Result<(), BenchError> {
    measure(arguments)?.publish()
}

/// Runs the benchmark.
///
/// # Errors
/// A guest does not do what it should, or the kernel does not count what it should.
pub fn measure(arguments: &Arguments) -> Result<Report> {
    let arguments = if arguments.quick {
        Arguments::quick()
    } else {
        arguments.clone()
    };
    let transports = transports()?;
    let mut results = Results::default();
    count_flushes(&arguments, &transports, &mut results)?;
    for run in 1..=arguments.runs {
        time_calls(&arguments, &transports, &mut results)?;
        eprintln!("lazy: times, run {run} of {}", arguments.runs);
    }
    compare(&transports, arguments.pairs, &mut results)?;
    reclaim::quiescent(arguments.discards, &mut results)?;
    if !arguments.quick {
        reclaim::one_by_one((1, PAGES * PAGE_SIZE), arguments.runs, &mut results)?;
    }
    Ok(results.report("lazy"))
}

/// How a guest here can call, by name.
fn transports() -> Result<Vec<(&'static str, Transport)>> {
    let instruction = bare::instruction()?.map(|by| ("instruction", by));
    let port = ("port", Transport::Port);
    Ok(instruction.into_iter().chain([port]).collect())
}

const REQUESTS: Metric = ("flush-requests", "");
const FLUSHES: Metric = ("flushes", "");
const CALLS: Metric = ("function-calls", "");
const DISTURBED: Metric = ("disturbed", "");
/// [`DISTURBED`] of a round of pairs, less that of the round of nothing before it.
const ABOVE_IDLE: Metric = ("above-idle", "");
const EXITS: Metric = ("exits", "");
const TIME: Metric = ("time", "us");

/// The name of a transport's pairs, and of the calls that do nothing.
fn cases(name: &str) -> [String; 2] {
    [format!("{name}/pairs"), format!("{name}/nothing")]
}

fn nothing(program: &mut Program, by: Transport, times: u64) -> Step {
    let features = Attributes::new(Operation::Features).encode();
    program.repeated_call(by, [0, 1, features], times)
}

fn count_flushes(
    arguments: &Arguments,
    transports: &[(&'static str, Transport)],
    results: &mut Results,
) -> Result<()> {
    let mut program = Program::kernel();
    let warm = program.fill(FREE_START, ALL_PAGES + CONTROL_PAGES, 1);
    let mut steps = Vec::new();
    for _ in 0..arguments.runs {
        for &(name, by) in transports {
            let [pairs, idle] = cases(name);
            let step = nothing(&mut program, by, 2 * arguments.pairs);
            steps.push((idle, true, step));
            let step = program.pairs(by, (FREE_START, PAGES), arguments.pairs);
            steps.push((pairs, false, step));
        }
    }
    program.words(QUERY, &[CONTROL, CONTROL_PAGES]);
    let freed = program.call(Transport::Port, Operation::LazyFree, CONTROL, CONTROL_PAGES);
    // It stays until it is killed, so that the counters can be read.
    program.query_until(QUERY, 8, u64::MAX);
    let mut guest = Payload::start(&program)?;
    guest.wait_for(warm)?;
    let mut last = Counters::read(guest.monitor.pid())?;
    let mut idle = 0.0;
    for (case, is_idle, step) in &steps {
        guest.wait_for(*step)?;
        let now = Counters::read(guest.monitor.pid())?;
        let added = now.since(last);
        last = now;
        let calls = added.calls as f64;
        let requests = added.kvm.remote_tlb_flush_requests as f64;
        results.add(("ebb", case), REQUESTS, requests);
        results.add(("ebb", case), FLUSHES, added.kvm.remote_tlb_flush as f64);
        results.add(("ebb", case), CALLS, calls);
        results.add(("ebb", case), DISTURBED, requests + calls);
        results.add(("ebb", case), EXITS, added.kvm.exits as f64);
        let disturbed = requests + calls;
        if *is_idle {
            idle = disturbed;
        } else {
            results.add(("ebb", case), ABOVE_IDLE, disturbed - idle);
        }
        eprintln!("lazy: {case}: {requests} flush requests, {calls} function calls");
    }
    guest.wait_for(freed)?;
    let rounds = u64::from(arguments.runs) * transports.len() as u64;
    check(&guest, rounds * arguments.pairs + 1)?;
    let before = Counters::read(guest.monitor.pid())?;
    let taken = guest.monitor.ctl(&["reclaim", "64M"])?;
    if !taken.status.success() {
        return Err(Error::new(format!("ebb ctl reclaim: {taken:?}")));
    }
    let added = Counters::read(guest.monitor.pid())?.since(before);
    let requests = added.kvm.remote_tlb_flush_requests as f64;
    results.add(("ebb", "reclaim"), REQUESTS, requests);
    if requests < 1.0 {
        return Err(Error::new(
            "a reclaim of touched memory has flushed nothing: the counters do not count",
        ));
    }
    Ok(())
}

/// Checks that the guest has really freed and reused, by the monitor's own account.
fn check(guest: &Payload, frees: u64) -> Result<()> {
    let lazy = guest.monitor.api().get("/lazy-memory")?;
    let calls = &lazy["hypercalls"]["lazy_free_total"];
    let reclaimed = &lazy["reclaimed_bytes_total"];
    if *calls == frees && *reclaimed == 0 {
        Ok(())
    } else {
        let text = format!("{frees} calls of LAZY_FREE and no reclaim expected: {lazy}");
        Err(Error::new(text))
    }
}

/// One round under Ebb and one in the bare loop, each in many short pieces: what else the host does then
/// falls on both alike.
fn time_calls(
    arguments: &Arguments,
    transports: &[(&'static str, Transport)],
    results: &mut Results,
) -> Result<()> {
    let pairs = (arguments.pairs / 2 / PIECES).max(1);
    let mut program = Program::kernel();
    program.fill(FREE_START, ALL_PAGES, 1);
    let mut times = vec![program.time()];
    for _ in 0..PIECES {
        for &(_, by) in transports {
            nothing(&mut program, by, 2 * pairs);
            times.push(program.time());
            program.pairs(by, (FREE_START, PAGES), pairs);
            times.push(program.time());
        }
    }
    let bare = bare::run(&program, MEMORY)?;
    let mut guest = Payload::start(&program)?;
    guest.wait_for(program.results() - 1)?;
    let ebb = guest.results();
    guest.finish()?;
    let each = 2.0 * pairs as f64 * f64::from(bare.tsc_khz) / 1e3;
    for (system, found) in [("bare", bare.results), ("ebb", ebb)] {
        let ticks: Vec<u64> = times.iter().map(|step| found[*step]).collect();
        let names = transports.iter().map(|(name, _)| *name).cycle();
        for (piece, name) in ticks.windows(3).step_by(2).zip(names) {
            let [pairs, idle] = cases(name);
            let time = |from: usize| (piece[from + 1] - piece[from]) as f64 / each;
            results.add((system, &idle), TIME, time(0));
            results.add((system, &pairs), TIME, time(1));
        }
    }
    Ok(())
}

fn compare(
    transports: &[(&'static str, Transport)],
    pairs: u64,
    results: &mut Results,
) -> Result<()> {
    let missing = "a measurement is missing";
    let per_10k = 10_000.0 / pairs as f64;
    let (mut requests, mut disturbed, mut noise) = (0.0_f64, f64::MIN, 0.0_f64);
    let mut times = Vec::new();
    for (name, _) in transports {
        let [case, idle] = cases(name);
        // Exact: nothing else makes KVM flush.
        let rounds = results.of("ebb", &case, REQUESTS.0);
        requests = rounds.iter().copied().fold(requests, f64::max);
        let above = results.median("ebb", &case, ABOVE_IDLE.0);
        disturbed = disturbed.max(above.context(missing)?);
        let nothing = results.row("ebb", &idle, DISTURBED.0).context(missing)?;
        noise = noise.max(nothing.max - nothing.min);
        let ours = results.median("ebb", &case, TIME.0).context(missing)?;
        let bare = results.median("bare", &idle, TIME.0).context(missing)?;
        times.push((format!("hypercall_us_{name}"), ours / bare));
    }
    results.note(format!(
        "free_flushes_per_10k is the median over rounds of pairs less the round of nothing before; rounds of nothing \
         differ by up to {:.0} for 10,000 calls",
        noise * per_10k
    ));
    results.note("hypercall_us is the slower way to call, compared with an exit of the same kind in a bare KVM loop");
    results.lower("free_flushes_per_10k", disturbed * per_10k);
    results.lower("free_kvm_flush_requests_per_10k", requests * per_10k);
    let slower = times.iter().map(|one| one.1).fold(0.0, f64::max);
    results.lower("hypercall_us", slower);
    for (name, value) in times {
        results.lower(&name, value);
    }
    Ok(())
}

/// A payload under Ebb.
struct Payload {
    monitor: Monitor,
    serial: PathBuf,
}

impl Payload {
    fn start(program: &Program) -> Result<Self> {
        let launch = Launch::new()?;
        let (kernel, serial) = (
            launch.folder().join("payload"),
            launch.folder().join("serial"),
        );
        program.write(&kernel).context(kernel.display())?;
        let launch = launch
            .kernel(&kernel)
            .memory(&format!("size={}M,thp=off", MEMORY >> 20))
            .serial(&format!("file={}", serial.display()));
        let monitor = launch.start()?;
        Ok(Self { monitor, serial })
    }

    fn results(&self) -> Vec<u64> {
        ebb_payload::results(&fs::read(&self.serial).unwrap_or_default())
    }

    /// Waits until the guest has made the step.
    fn wait_for(&mut self, step: Step) -> Result<()> {
        let (size, start) = (((step + 1) * RESULT_SIZE) as u64, Instant::now());
        while fs::metadata(&self.serial).map_or(0, |file| file.len()) < size {
            if start.elapsed() > LONG {
                let error = Error::new(format!("step {step}: not within {LONG:?}"));
                return Err(self.monitor.explain(error));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        match self.monitor.wait()? {
            0 => Ok(()),
            code => {
                let error = Error::new(format!("the payload ended with {code}"));
                Err(self.monitor.explain(error))
            }
        }
    }
}

const _: () = assert!(QUERY + PAGE_SIZE < MEMORY);
