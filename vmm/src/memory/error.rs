//! Errors of guest memory.

use std::io;

use ebb_core::range::GpaRange;

/// Guest memory cannot be mapped, populated, watched or released.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The address space or the overcommit limit is too small.
    #[error(
        "mapping {bytes} bytes of guest memory at {gpa:#x} failed; choose a smaller memory size \
         or raise the address space limit (ulimit -v)"
    )]
    Map {
        /// Size of the region in bytes.
        bytes: u64,
        /// First address of the region in the guest.
        gpa: u64,
        /// Error of mmap(2).
        source: io::Error,
    },
    /// The host has too few hugetlb pages.
    #[error(
        "mapping {bytes} bytes of guest memory in huge pages of 2 MiB failed: {pages} free ones are \
         needed; raise /proc/sys/vm/nr_hugepages or leave hugepages off"
    )]
    HugePages {
        /// Size of the region in bytes.
        bytes: u64,
        /// Number of hugetlb pages in the region.
        pages: u64,
        /// Error of mmap(2).
        source: io::Error,
    },
    /// hugetlb pages need regions whose ends are multiples of 2 MiB.
    #[error("huge pages cannot back {start:#x}..{end:#x}: both ends must be multiples of 2 MiB")]
    HugePageAlignment {
        /// First address of the region.
        start: u64,
        /// First address after it.
        end: u64,
    },
    /// The kernel refused advice for a region.
    #[error("madvise({advice}) on {bytes} bytes of guest memory failed")]
    Advise {
        /// Name of the advice.
        advice: &'static str,
        /// Size of the region in bytes.
        bytes: u64,
        /// Error of madvise(2).
        source: io::Error,
    },
    /// The host has too little memory to populate a range.
    #[error(
        "populating {bytes} bytes of guest memory failed; choose a smaller memory size or leave \
         prefault off"
    )]
    Populate {
        /// Size of the range in bytes.
        bytes: u64,
        /// Error of madvise(2).
        source: io::Error,
    },
    /// A file cannot be put behind a range.
    #[error("mapping {bytes} bytes of a snapshot's memory file failed")]
    File {
        /// Size of the range in bytes.
        bytes: u64,
        /// Error of mmap(2).
        source: io::Error,
    },
    /// Page faults cannot be watched.
    #[error(
        "watching the guest's page faults failed: {source}; they need userfaultfd for faults of the kernel: run as \
         root or with CAP_SYS_PTRACE, or sudo sysctl vm.unprivileged_userfaultfd=1, or give your user /dev/userfaultfd"
    )]
    Watch {
        /// Error of userfaultfd(2) or ioctl_userfaultfd(2).
        source: io::Error,
    },
    /// Regions overlap, are out of order, or there is no region.
    #[error("the layout of guest memory is not a list of disjoint ascending regions: {layout:x?}")]
    Layout {
        /// The regions.
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
    /// The kernel refused to release a range, or a part of it.
    #[error("releasing {bytes} bytes of guest memory at {gpa:#x} failed")]
    Release {
        /// Size of the range in bytes.
        bytes: u64,
        /// First address in the guest.
        gpa: u64,
        /// Error of madvise(2).
        source: io::Error,
    },
}
