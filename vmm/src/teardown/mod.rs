//! Teardown: the guest's memory is freed by several workers at once.
//!
//! `plan` divides it into batches. `reaper` frees them after the monitor's end, and `execute` does so before it, where there is
//! no reaper or so little memory that it does not matter. `machine` chooses. After "mm: support parallel free of memory"
//! (Aaron Lu, 2017): one CPU limits how fast memory can be freed, and disjoint parts of an address space can be freed in
//! parallel.

mod execute;
mod machine;
mod plan;
mod queue;
mod reaper;

pub use execute::{Report, execute};
pub use machine::{Teardown, TeardownTuning, TuneError};
pub use plan::{MAX_WORKERS, PageSize, Plan, Region, plan};
pub use reaper::{Job, Reaper, Socket, StatusPage};
