//! Harness of the tests that cross crates: a running monitor, its guest, its API, and what the host's
//! kernel says of them. Benchmarks and the demo use it too.

pub mod api;
pub mod cgroup;
pub mod console;
pub mod debian;
pub mod error;
pub mod free_pages;
pub mod guest;
pub mod host;
pub mod idle;
pub mod images;
pub mod integrity;
pub mod launch;
pub mod monitor;
pub mod payload_vm;
pub mod refusal;
pub mod size;
pub mod strace;
pub mod terminal;
pub mod wait;

pub use api::Api;
pub use error::{Error, Result};
pub use guest::Guest;
pub use images::Images;
pub use launch::Launch;
pub use monitor::Monitor;
