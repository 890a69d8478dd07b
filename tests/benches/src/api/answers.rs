//! Time of an answer, by a new connection for each request, while nothing is taken from a machine and while an order takes all that
//! its guest has freed.

use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use ebb_harness::api::Api;
use ebb_harness::error::{Context, Error, Result};
use ebb_harness::size::MIB;
use ebb_harness::wait::{LONG, until};
use ebb_harness::{Launch, Monitor};
use ebb_hypercall_abi::Operation;
use ebb_payload::{Program, Transport, batch, page};

use crate::results::{Metric, Results};

/// What is asked for, and what its figure is called.
const REQUESTS: [(&str, &str); 2] = [
    ("/vm/config", "vm_config_p99_ms"),
    ("/lazy-memory", "lazy_memory_p99_ms"),
];
/// Time between two requests.
const PAUSE: Duration = Duration::from_millis(2);
/// Rounds of requests while nothing is taken.
const ROUNDS: usize = 500;

/// Pages that the guest frees: every other one.
const FREED: u64 = 1 << 17;
/// Of these, as many in one call as a batch block of four pages holds.
const IN_A_CALL: u64 = 1000;
const BLOCK_PAGES: u64 = 4;
/// The first of the pages; the blocks are below.
const FIRST: u64 = 1 << 10;
const RAM_MIB: u64 = 2048;
const PAGE: u64 = 4096;
/// The guest writes to it, without an end.
const SERIAL: u16 = 0x3f8;

const IDLE: &str = "idle";
const RECLAIM: &str = "reclaim";
const MEDIAN: Metric = ("median", "ms");
const P99: Metric = ("p99", "ms");
const MAX: Metric = ("max", "ms");

/// Times of answers, in ms, of each request.
type Times = [Vec<f64>; REQUESTS.len()];

/// Measures both cases with so many machines.
pub(super) fn measure(runs: u32, results: &mut Results) -> Result<()> {
    let (mut idle, mut busy) = (Times::default(), Times::default());
    for _ in 0..runs {
        let monitor = start()?;
        let api = monitor.api();
        for _ in 0..ROUNDS {
            ask(&api, &mut idle)?;
        }
        let taken = thread::scope(|scope| {
            let order = scope.spawn(|| api.reclaim(RAM_MIB * MIB));
            while !order.is_finished() {
                ask(&api, &mut busy)?;
            }
            joined(order)
        })?;
        let seconds = taken.duration_us as f64 / 1e6;
        let rate = taken.reclaimed_bytes as f64 / MIB as f64 / seconds;
        results.add(("ebb", RECLAIM), ("time", "s"), seconds);
        results.add(("ebb", RECLAIM), ("rate", "MiB/s"), rate);
    }
    add(IDLE, idle, results)?;
    add(RECLAIM, busy, results)?;
    for (path, figure) in REQUESTS {
        let case = format!("GET {path}, {RECLAIM}");
        let p99 = results.median("ebb", &case, P99.0).context("no requests")?;
        results.lower(figure, p99);
    }
    results.note(format!(
        "{RECLAIM}: one order takes {FREED} pages, each of them a fragment, from a guest that does not stand still"
    ));
    Ok(())
}

fn joined<T>(thread: ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    let panicked = |_| Err(Error::new("the order has panicked"));
    thread.join().unwrap_or_else(panicked)
}

/// A machine with 4 KiB pages, all of them there, whose guest has freed [`FREED`] of them.
fn start() -> Result<Monitor> {
    let launch = Launch::new()?.memory(&format!("size={RAM_MIB}M,thp=off,prefault=on"));
    let path = |name: &str| launch.folder().join(name);
    guest().write(&path("kernel")).context("write the guest")?;
    let (kernel, serial) = (path("kernel"), format!("file={}", path("serial").display()));
    let monitor = launch.kernel(&kernel).serial(&serial).start()?;
    until("the guest has freed its memory", LONG, || {
        // There is no answer before it is built.
        let state = monitor.api().lazy();
        Ok(state
            .is_ok_and(|it| it["freed_bytes_total"] == FREED * PAGE)
            .then_some(()))
    })?;
    Ok(monitor)
}

fn guest() -> Program {
    let mut guest = Program::kernel();
    let freed: Vec<(u64, u64)> = (0..FREED).map(|it| (page(FIRST + 2 * it), 1)).collect();
    for (at, ranges) in (0..)
        .step_by(BLOCK_PAGES as usize)
        .zip(freed.chunks(IN_A_CALL as usize))
    {
        guest.words(page(at), &batch(ranges));
        guest.call(
            Transport::Port,
            Operation::LazyFreeBatch,
            page(at),
            BLOCK_PAGES,
        );
    }
    guest.output_byte(SERIAL, b'x', u64::MAX);
    guest
}

/// Makes each request once.
fn ask(api: &Api, times: &mut Times) -> Result<()> {
    for ((path, _), times) in REQUESTS.iter().zip(times) {
        let start = Instant::now();
        api.get(path)?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
        thread::sleep(PAUSE);
    }
    Ok(())
}

fn add(case: &str, times: Times, results: &mut Results) -> Result<()> {
    for ((path, _), mut times) in REQUESTS.iter().zip(times) {
        times.sort_by(f64::total_cmp);
        let at = |share: usize| {
            times.get((times.len() * share / 100).min(times.len().saturating_sub(1)))
        };
        let case = format!("GET {path}, {case}");
        for (metric, share) in [(MEDIAN, 50), (P99, 99), (MAX, 100)] {
            let time = at(share).context("no requests")?;
            results.add(("ebb", &case), metric, *time);
        }
        results.add(("ebb", &case), ("requests", ""), times.len() as f64);
    }
    Ok(())
}
