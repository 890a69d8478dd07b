//! Runs small programs of threads under loom, over `ebb-core` and `ebb-hypercall-abi` as they are.
//!
//! loom tries all interleavings of a program in which threads are preempted at most as often as the model says, and
//! all values that its loads may return then. A mistake that shows only with more preemptions is not found.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p ebb-models --target-dir target/loom`; `cargo xtask test`
//! does that.
#![cfg(loom)]

use std::panic::{AssertUnwindSafe, catch_unwind};

fn explore(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// Explores `model` with at most `preemptions` preemptions in each run: it must hold as the code is, and must
/// fail with each of the fault points `faults` armed, one at a time.
///
/// # Panics
/// When the model fails without a fault, or holds with one.
pub fn check(preemptions: usize, model: fn(), faults: &[&'static str]) {
    explore(preemptions, model);
    for &fault in faults {
        ebb_core::arm(Some(fault));
        must_fail(preemptions, fault, model);
        ebb_core::arm(None);
    }
}

/// Explores `model`, which must fail because of `mistake`.
///
/// # Panics
/// When it holds.
pub fn must_fail(preemptions: usize, mistake: &str, model: impl Fn() + Send + Sync + 'static) {
    let result = catch_unwind(AssertUnwindSafe(|| explore(preemptions, model)));
    let Err(panic) = result else {
        panic!("{mistake:?} is not noticed");
    };
    let message = panic.downcast_ref::<String>().map(String::as_str);
    let message = message.or_else(|| panic.downcast_ref::<&str>().copied());
    println!("{mistake:?} is caught: {}", message.unwrap_or("a panic"));
}
