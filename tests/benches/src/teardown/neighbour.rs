//! What a neighbour on the same processors feels of a teardown and of a reclaim: how late its requests are answered.

use std::hint::black_box;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ebb_harness::api::Api;
use ebb_harness::error::Context;
use ebb_harness::idle::Place;
use ebb_harness::wait::{LONG, until_often};
use ebb_hypercall_abi::Operation;
use ebb_payload::{FREE_START, Program, Transport};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::ending::End;
use super::machines::Subject;
use super::{Arguments, GIB, Results};
use crate::{BenchError, system};

/// Time from one request to the next.
const PERIOD: Duration = Duration::from_millis(1);

/// What a request works on, in words of 8 bytes: about 50 µs of work.
const WORDS: usize = 1 << 14;

/// How long the neighbour is watched when nothing else happens.
const QUIET: Duration = Duration::from_millis(300);

const STOP: &str = "neighbour of a stop";
const RECLAIM: &str = "neighbour of a reclaim";

/// When a request was due, and how many milliseconds later it was answered.
type Answer = (Instant, f64);

/// Measures, and adds what follows.
pub(super) fn measure(results: &mut Results, arguments: &Arguments) -> Result<(), BenchError> {
    let (place, gib) = (Place::new()?, arguments.gib);
    let mut subjects = vec![Subject::Ebb, Subject::Alone];
    subjects.extend((!arguments.no_qemu).then_some(Subject::Qemu));
    for run in 1..=arguments.runs {
        let (start, answers) = beside(|| {
            let start = Instant::now();
            thread::sleep(QUIET);
            Ok(start)
        })?;
        record(
            results,
            ("none", "neighbour alone"),
            answers,
            &(start..start + QUIET),
        );
        for subject in &subjects {
            let end = || subject.end(&place, (gib, false), End::Stop);
            let (times, answers) = beside(end)?;
            let of = (subject.name(), STOP);
            times.record(results, of);
            record(results, of, answers, &times.span());
        }
        let (span, answers) = beside(|| reclaim(gib))?;
        record(results, ("ebb", RECLAIM), answers, &span);
        subjects.rotate_left(1);
        eprintln!("teardown: neighbour, run {run} of {}", arguments.runs);
    }
    results.divide(
        "neighbour_stop_vs_qemu",
        ["qemu", STOP, "p99"],
        ["ebb", STOP, "p99"],
    );
    for (name, case) in [
        ("neighbour_stop_ms", STOP),
        ("neighbour_reclaim_ms", RECLAIM),
    ] {
        if let Some(ms) = results.median("ebb", case, "p99") {
            results.lower(name, ms);
        }
    }
    Ok(())
}

/// Runs `action` beside a neighbour with a thread on each processor that this process may use. What the action returns,
/// and all answers.
fn beside<T>(
    action: impl FnOnce() -> Result<T, BenchError>,
) -> Result<(T, Vec<Answer>), BenchError> {
    let allowed = sched_getaffinity(None).map_err(system("sched_getaffinity"))?;
    let processors = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let start = |processor| {
            let is_over = &is_over;
            scope.spawn(move || requests(processor, is_over))
        };
        let threads: Vec<_> = processors.map(start).collect();
        let done = action();
        is_over.store(true, Ordering::Relaxed);
        let answers = threads.into_iter().filter_map(|it| it.join().ok());
        let answers = answers.flatten().collect();
        Ok((done?, answers))
    })
}

/// Answers requests on one processor until it is told to stop. A request that comes while another is answered waits for
/// it: so a thread that cannot run is late for all of them.
fn requests(processor: usize, is_over: &AtomicBool) -> Vec<Answer> {
    let mut own = CpuSet::new();
    own.set(processor);
    // Where that is not allowed it runs anywhere.
    let _ = sched_setaffinity(None, &own);
    let (mut memory, mut answers) = (vec![1u64; WORDS], Vec::new());
    let mut due = Instant::now();
    while !is_over.load(Ordering::Relaxed) {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        for word in &mut memory {
            *word = black_box(word.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        answers.push((due, due.elapsed().as_secs_f64() * 1e3));
        due += PERIOD;
    }
    answers
}

/// Adds the latencies of the requests that were due in `span`.
fn record(results: &mut Results, of: (&str, &str), answers: Vec<Answer>, span: &Range<Instant>) {
    let within = answers
        .into_iter()
        .filter(|answer| span.contains(&answer.0));
    let mut latencies: Vec<f64> = within.map(|answer| answer.1).collect();
    latencies.sort_by(f64::total_cmp);
    let at = latencies.len() * 99 / 100;
    if let (Some(p99), Some(max)) = (latencies.get(at), latencies.last()) {
        results.add(of, ("p99", "ms"), *p99);
        results.add(of, ("max", "ms"), *max);
    }
}

/// When up to 2 GiB of a machine's memory, which its guest has freed lazily, were returned to the host.
fn reclaim(gib: u64) -> Result<Range<Instant>, BenchError> {
    let bytes = gib.min(2) * GIB - FREE_START;
    let mut program = Program::kernel();
    program.call(
        Transport::Port,
        Operation::LazyFree,
        FREE_START,
        bytes / 4096,
    );
    program.halt();
    let place = Place::new()?;
    let kernel = place.path("kernel");
    program.write(&kernel).context("write the payload")?;
    let memory = format!("size={gib}G,thp=off,prefault=on");
    let mut idle = place.running(&memory, "on")?;
    let api = Api::new(&place.path("api"));
    until_often("the guest has freed its memory", LONG, || {
        let lazy = api.lazy().ok().filter(|lazy| lazy["lazy_bytes"] == bytes);
        Ok(lazy.map(drop))
    })?;
    let start = Instant::now();
    api.reclaim(bytes)?;
    let span = start..Instant::now();
    idle.signal(End::Stop.signal());
    idle.wait()?;
    place.vanished(LONG)?;
    Ok(span)
}
