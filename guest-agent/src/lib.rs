//! Library for programs that run inside an Ebb guest.
//!
//! An [`arena`] is guest memory that a program frees and reuses by changing words in a shared table, without a system
//! call or a hypercall.

pub mod arena;
pub mod memory;
