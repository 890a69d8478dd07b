//! In which order KVM's machine and its memory go: its second-level tables are released by one CPU, and as long as they are
//! there each madvise asks KVM first.

use std::thread;
use std::time::Instant;

use super::{Results, SECONDS, engine};
use crate::BenchError;
use crate::rig::{FIRST, Ranges, Rig};
use ebb_harness::error::Result;

const MEMORY: u64 = 1 << 30;
const WORKERS: usize = 2;

/// An order, by its name in the report.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// By one thread, as at the exit of a process.
    Exit,
    FreeThenClose,
    CloseThenFree,
    Together,
}

impl Order {
    const ALL: [Self; 4] = [
        Self::Exit,
        Self::FreeThenClose,
        Self::CloseThenFree,
        Self::Together,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Exit => "1w, close",
            Self::FreeThenClose => "2w, close",
            Self::CloseThenFree => "close, 2w",
            Self::Together => "close + 2w",
        }
    }
}

/// Measures, and adds what follows.
pub(super) fn measure(results: &mut Results, runs: u32) -> std::result::Result<(), BenchError> {
    let mut orders = Order::ALL;
    for run in 1..=runs {
        orders.rotate_left(1);
        for order in orders {
            let (total, close) = end(order)?;
            results.add(("ebb", order.name()), SECONDS, total);
            if order == Order::CloseThenFree {
                results.add(("kvm", "close"), SECONDS, close);
            }
        }
        let time = engine::shared(engine::touched(MEMORY, false)?, WORKERS);
        results.add(("ebb", "no KVM, 2w"), SECONDS, time);
        eprintln!("teardown: orders, run {run} of {runs}");
    }
    for order in Order::ALL {
        results.divide_cost(
            &format!("order {}", order.name()),
            ["ebb", order.name(), "time"],
            ["ebb", "no KVM, 2w", "time"],
        );
    }
    Ok(())
}

/// Seconds until memory and tables of a machine are free, and those of the tables' release.
fn end(order: Order) -> Result<(f64, f64)> {
    let ranges = Ranges {
        size: 4096,
        stride: 4096,
        count: (MEMORY - FIRST) / 4096,
    };
    let rig = Rig::start(1, ranges, false)?;
    rig.touch()?;
    let (machine, ram) = rig.end();
    let start = Instant::now();
    let close = || {
        let start = Instant::now();
        drop(machine);
        start.elapsed().as_secs_f64()
    };
    let closed = match order {
        Order::Exit | Order::FreeThenClose => {
            let workers = if order == Order::Exit { 1 } else { WORKERS };
            engine::free(&ram, workers);
            close()
        }
        Order::CloseThenFree => {
            let closed = close();
            engine::free(&ram, WORKERS);
            closed
        }
        Order::Together => thread::scope(|scope| {
            let closing = scope.spawn(close);
            engine::free(&ram, WORKERS);
            closing.join().unwrap_or(f64::NAN)
        }),
    };
    drop(ram);
    Ok((start.elapsed().as_secs_f64(), closed))
}
