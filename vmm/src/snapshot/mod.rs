//! Snapshots: what a paused machine is, in two files. `docs/snapshot.md` describes them.
//!
//! `format` is the state file's container, `memory` the memory file, `difference` what
//! that of a restored machine may leave to the files below it, `state` what the sections hold, `files` how both appear
//! under their names or not at all, `page_server` what a process has to be told that gives the memory's content.

mod difference;
mod files;
mod format;
mod memory;
mod page_server;
mod state;

pub use difference::{Difference, Kept, Layer, MAX_LAYERS, flatten};
pub use files::{FileError, create, open};
pub use format::{FormatError, Reader, VERSION, Writer};
pub use memory::{MemoryFileError, MemoryMap, SnapshotId, write};
pub use page_server::PageServer;
pub use state::{CpuMismatch, DiskFile, Host, State, check_cpu};
