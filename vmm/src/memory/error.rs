//! What can go wrong with guest memory.

use std::io;

use ebb_core::range::GpaRange;

use crate::sys::Advice;

/// Why guest memory could not be had, or not be given back.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The address space or the overcommit limit is too small.
    #[error(
        "mapping {bytes} bytes of guest memory at {gpa:#x} failed; choose a smaller memory size \
         or raise the address space limit (ulimit -v)"
    )]
    Map {
        /// Size of the region.
        bytes: u64,
        /// Where it lies in the guest.
        gpa: u64,
        /// mmap(2)'s error.
        source: io::Error,
    },
    /// The host has too few hugetlb pages.
    #[error(
        "mapping {bytes} bytes of guest memory in huge pages of 2 MiB failed: {pages} free ones are \
         needed; raise /proc/sys/vm/nr_hugepages or leave hugepages off"
    )]
    HugePages {
        /// Size of the region.
        bytes: u64,
        /// How many pages that is.
        pages: u64,
        /// mmap(2)'s error.
        source: io::Error,
    },
    /// hugetlb pages fit only where both ends are multiples of 2 MiB.
    #[error("huge pages cannot back {start:#x}..{end:#x}: both ends must be multiples of 2 MiB")]
    HugePageAlignment {
        /// First address of the region.
        start: u64,
        /// First address after it.
        end: u64,
    },
    /// Advice that the configuration asks for was refused.
    #[error("madvise({advice:?}) on {bytes} bytes of guest memory failed")]
    Advise {
        /// What was asked for.
        advice: Advice,
        /// Size of the region.
        bytes: u64,
        /// madvise(2)'s error.
        source: io::Error,
    },
    /// The host has too little memory for prefault.
    #[error(
        "populating {bytes} bytes of guest memory failed; choose a smaller memory size or leave \
         prefault off"
    )]
    Populate {
        /// Size of the region.
        bytes: u64,
        /// madvise(2)'s error.
        source: io::Error,
    },
    /// Faults cannot be watched.
    #[error(
        "watching the guest's page faults failed: {source}; they need userfaultfd for faults of the kernel: run as \
         root or with CAP_SYS_PTRACE, or sudo sysctl vm.unprivileged_userfaultfd=1, or give your user /dev/userfaultfd"
    )]
    Watch {
        /// userfaultfd(2)'s or ioctl_userfaultfd(2)'s error.
        source: io::Error,
    },
    /// Regions overlap, are out of order, or there is none.
    #[error("the layout of guest memory is not a list of disjoint ascending regions: {layout:x?}")]
    Layout {
        /// What was given.
        layout: Vec<GpaRange>,
    },
    /// A range is not wholly guest memory.
    #[error("{start:#x}..{end:#x} is not guest memory")]
    NotRam {
        /// First address.
        start: u64,
        /// First address after it.
        end: u64,
    },
    /// The kernel would not drop pages.
    #[error("discarding {bytes} bytes of guest memory at {gpa:#x} failed")]
    Discard {
        /// Size of the part that failed.
        bytes: u64,
        /// Where it lies in the guest.
        gpa: u64,
        /// madvise(2)'s error.
        source: io::Error,
    },
}
