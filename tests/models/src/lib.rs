//! Runs small programs of threads under loom, over `ebb-core` and `hypercall-abi` as they are.
//!
//! loom tries the interleavings of a program that switch threads against their will at most as often as the
//! model says (its *preemption bound*), and the values that a relaxed load may return. A mistake that takes more
//! switches than the bound is not found.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p ebb-models --target-dir target/loom`; `cargo xtask test`
//! does that.
#![cfg(loom)]

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Explores `model` with at most `preemptions` preemptions in each run: it must hold as the code is, and must
/// fail with each of `faults` armed, one at a time.
///
/// # Panics
/// When the model fails without a fault, or holds with one.
pub fn check(preemptions: usize, model: fn(), faults: &[&'static str]) {
    let explore = || {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(preemptions);
        builder.check(model);
    };
    explore();
    for &fault in faults {
        ebb_core::arm(Some(fault));
        let result = catch_unwind(AssertUnwindSafe(explore));
        ebb_core::arm(None);
        let Err(panic) = result else {
            panic!("{fault:?} is not noticed");
        };
        let message = panic.downcast_ref::<String>().map(String::as_str);
        let message = message.or_else(|| panic.downcast_ref::<&str>().copied());
        println!("{fault:?} is caught: {}", message.unwrap_or("a panic"));
    }
}
