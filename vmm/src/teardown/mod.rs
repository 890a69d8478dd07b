//! Teardown: the guest's memory is freed by several workers at once.
//!
//! `plan` cuts it into batches, `execute` frees them. After "mm: support parallel free of memory" (Aaron
//! Lu, 2017): freeing is bound by one CPU, and disjoint parts of an address space can be freed in parallel.

pub mod execute;
pub mod plan;

pub use execute::{Report, execute};
pub use plan::{Pages, Plan, Region, Tuning, plan};
