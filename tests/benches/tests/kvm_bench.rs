//! The benchmarks of lazy memory, in short: that they run, and what of their results is no matter of time.

use std::sync::{Mutex, PoisonError};

use ebb_benches::report::Report;
use ebb_benches::{lazy, reclaim};
use ebb_harness::Result;

/// Both make machines in this process, and the kernel's counters are told apart by process.
static TURN: Mutex<()> = Mutex::new(());

fn ratio(report: &Report, name: &str) -> f64 {
    let found = report.ratio(name);
    found.unwrap_or_else(|| panic!("{name} is missing"))
}

/// The rows of a metric, of all cases whose name contains `case`, as smallest and largest value.
fn values<'a>(report: &'a Report, case: &'a str, metric: &'a str) -> Vec<(f64, f64)> {
    let rows = report.rows.iter();
    let rows = rows.filter(|row| row.case.contains(case) && row.metric == metric);
    rows.map(|row| (row.min, row.max)).collect()
}

#[test]
fn pairs_and_discards_of_quiescent_ranges_flush_nothing_and_a_reclaim_does() -> Result<()> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let report = lazy::measure(&lazy::Arguments::quick())?;
    let pairs = values(&report, "/pairs", "flush-requests");
    assert!(
        pairs.len() == 2 && pairs.iter().all(|&(_, max)| max == 0.0),
        "{pairs:?}"
    );
    assert!(ratio(&report, "free_kvm_flush_requests_per_10k") == 0.0);
    let exits = values(&report, "/pairs", "exits");
    // The guest does not wait for the counters to be read: a few of its calls fall into another's window.
    assert!(
        exits.iter().all(|&(min, _)| min >= 2.0 * 500.0 * 0.9),
        "{exits:?}"
    );
    let reclaim = values(&report, "reclaim", "flush-requests");
    assert!(reclaim.iter().all(|&(min, _)| min >= 1.0), "{reclaim:?}");
    assert!(ratio(&report, "hypercall_us") > 0.0);
    let quiescent = values(&report, "quiescent", "flush-requests");
    assert_eq!(quiescent, [(0.0, 0.0)]);
    assert!(ratio(&report, "discard_flushes_per_10k") == 0.0);
    Ok(())
}

#[test]
fn slices_interrupt_once() -> Result<()> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let report = reclaim::measure(&reclaim::Arguments::quick())?;
    // 64 ranges in one slice: each of the 3 vCPUs is brought out once.
    for step in [
        "slice-512/invalidate",
        "slice-512/discard",
        "slice-512/direct",
    ] {
        let kicks = values(&report, step, "kicks");
        assert!(
            kicks.len() == 1 && kicks[0].1 * 64.0 <= 3.5,
            "{step}: {kicks:?}"
        );
    }
    Ok(())
}
