//! Ebb: a virtual machine monitor on KVM whose guests hand memory back lazily.
//!
//! What its threads share is in `ebb-core`. Each module may use only what ARCHITECTURE.md allows it.

/// Tells whoever listens at `--event-monitor` that something has happened, with fields as those of tracing's macros. It allocates, so it
/// is not for what vCPUs do often.
macro_rules! event {
    ($name:literal $(, $($fields:tt)*)?) => {
        tracing::info!(target: "ebb::event", event = $name $(, $($fields)*)?)
    };
}

pub mod api;
pub mod arch;
pub mod arena;
pub mod boot;
pub mod bus;
pub mod config;
pub mod control;
pub mod devices;
pub mod doctor;
pub mod exit;
pub mod faults;
pub mod guardian;
pub mod guest_kernel;
pub mod guest_memory;
pub mod hypercall;
pub mod irq;
pub mod jail;
pub mod kvm;
pub mod memory;
pub mod output;
pub mod reclaim;
pub mod snapshot;
pub mod strict;
pub mod sys;
pub mod teardown;
pub mod vcpu;
pub mod vm;
pub mod workers;
