//! Harness of the tests that cross crates: a running monitor, its guest, its API, and what the host's
//! kernel says of them. Benchmarks and the demo use it too.

pub mod api;
pub mod cgroup;
pub mod console;
pub mod container;
pub mod containerd;
pub mod debian;
pub mod error;
pub mod firecracker;
pub mod free_pages;
pub mod guest;
pub mod host;
pub mod idle;
pub mod images;
pub mod inject;
pub mod integrity;
pub mod jail;
pub mod launch;
pub mod libraries;
pub mod monitor;
pub mod namespace;
pub mod network;
pub mod page_server;
pub mod payload_vm;
pub mod programs;
pub mod prometheus;
pub mod refusal;
pub mod restart;
pub mod schema;
pub mod service;
pub mod size;
pub mod slow_clients;
pub mod small;
pub mod strace;
pub mod taker;
pub mod terminal;
pub mod thin_pool;
pub mod wait;

use std::io::Write;

pub use api::Api;
pub use error::{Error, Result};
pub use guest::Guest;
pub use images::Images;
pub use launch::Launch;
pub use monitor::Monitor;

/// Tells a figure of the running test to `cargo xtask test`, which adds it to those of the same `name` in its summary.
pub fn figure(name: &str, value: u64) {
    // Not by a macro: the test harness keeps to itself what these print when a test passes.
    let _ = std::io::stdout().write_all(format!("\nFIGURE {name} {value}\n").as_bytes());
}
