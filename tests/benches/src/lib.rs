//! Benchmarks that `cargo xtask bench` runs where KVM is. One benchmark, one file.

pub mod api;
pub mod arena;
mod bare;
pub mod blk;
pub mod boot;
mod counters;
pub mod dashboard;
pub mod filters;
pub mod footprint;
pub mod free_pages;
mod guest;
mod host;
pub mod inflate;
pub mod integrity;
pub mod lazy;
pub mod malloc;
pub mod net;
mod overhead;
mod plot;
pub mod pods;
mod process;
mod qemu;
pub mod reclaim;
pub mod report;
pub mod reporting;
mod results;
mod rig;
pub mod scale;
pub mod snapshot;
mod start;
pub mod stream;
pub mod teardown;
pub mod vsock;

use std::path::PathBuf;

pub use guest::Guest;

/// A benchmark cannot be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A variable that xtask sets is missing.
    #[error("{0} is not set; start benchmarks with `cargo xtask bench`")]
    Variable(&'static str),
    /// A system call or a file failed.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: String,
        /// The error.
        source: std::io::Error,
    },
    /// The harness says so.
    #[error(transparent)]
    Harness(#[from] ebb_harness::Error),
    /// A system under test did not do what it should.
    #[error("{system} ({case}): {reason}; the end of its output:\n{output}")]
    Failed {
        /// The system.
        system: &'static str,
        /// The case.
        case: &'static str,
        /// What went wrong.
        reason: String,
        /// The last lines it wrote.
        output: String,
    },
}

/// Says what was being done when an error of the system came up.
fn system<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> BenchError {
    let what = what.into();
    move |source| BenchError::System {
        what,
        source: source.into(),
    }
}

/// A path that xtask hands over.
fn path(name: &'static str) -> Result<PathBuf, BenchError> {
    std::env::var_os(name)
        .map(PathBuf::from)
        .ok_or(BenchError::Variable(name))
}
