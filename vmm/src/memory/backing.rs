//! Maps the host memory behind the regions of guest memory.

use std::io;

use ebb_core::range::{BLOCK_SIZE, GpaRange};
use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::MemoryError;
use crate::sys::{Mapping, MappingKind};

/// Size in bytes of a file behind shared memory, unless that makes more than [`MAX_FILES`]. Two workers that free parts
/// of one file wait for each other: ARCHITECTURE.md has the measurement.
pub(super) const FILE: u64 = 256 << 20;

/// Maximum number of files behind a region, if its size is a power of two. Each is a mapping, of which a process has
/// 65,530 by default.
pub(super) const MAX_FILES: u64 = 1 << 12;

/// The kind of host memory behind the guest's RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// Use transparent huge pages.
    pub thp: bool,
    /// Use hugetlb pages of 2 MiB. `thp` has no effect then.
    pub hugepages: bool,
    /// Use files without a name (memfd_create(2)) instead of private anonymous memory.
    pub shared: bool,
}

impl Backing {
    /// The backing of arenas next to RAM of this backing: private memory of small or transparent huge pages.
    pub(super) fn of_arenas(self) -> Self {
        Self {
            thp: self.thp || self.hugepages,
            ..Self::default()
        }
    }
}

/// Maps a region.
pub(super) fn map(backing: Backing, gpa: GpaRange) -> Result<Mapping, MemoryError> {
    let bytes = gpa.len();
    let aligned = gpa.start().is_multiple_of(BLOCK_SIZE) && gpa.end().is_multiple_of(BLOCK_SIZE);
    if backing.hugepages && !aligned {
        return Err(MemoryError::HugePageAlignment {
            start: gpa.start(),
            end: gpa.end(),
        });
    }
    let kind = if backing.hugepages {
        MappingKind::Huge
    } else {
        MappingKind::Small
    };
    let len = usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory.into());
    let mapping = len.and_then(|len| {
        if backing.shared {
            Mapping::shared(len, gpa.start(), kind, file_size(bytes))
        } else {
            Mapping::new(len, gpa.start(), kind)
        }
    });
    let mapping = mapping.map_err(|source| match kind {
        MappingKind::Huge => MemoryError::HugePages {
            bytes,
            pages: bytes / BLOCK_SIZE,
            source,
        },
        MappingKind::Small => MemoryError::Map {
            bytes,
            gpa: gpa.start(),
            source,
        },
    })?;
    advise(backing, &mapping)?;
    Ok(mapping)
}

/// Size in bytes of the files behind a region of `bytes` bytes: a power of two, so that batches of the teardown end
/// where files end.
pub(super) fn file_size(bytes: u64) -> u64 {
    (bytes / MAX_FILES)
        .checked_next_power_of_two()
        .map_or(FILE, |size| size.max(FILE))
}

/// Gives the advice that holds for a whole region.
fn advise(backing: Backing, mapping: &Mapping) -> Result<(), MemoryError> {
    let error = |advice| {
        move |source| MemoryError::Advise {
            advice,
            bytes: mapping.len() as u64,
            source,
        }
    };
    if !backing.hugepages {
        let advice = if backing.thp {
            "MADV_HUGEPAGE"
        } else {
            "MADV_NOHUGEPAGE"
        };
        match mapping.set_transparent_huge_pages(backing.thp) {
            // The kernel has no transparent huge pages: that is as good as `thp=off`.
            Err(source) if source.raw_os_error() == Some(libc::EINVAL) => {}
            result => result.map_err(error(advice))?,
        }
    }
    mapping.exclude_from_dumps().map_err(error("MADV_DONTDUMP"))
}

/// Makes the view of all regions that devices and loaders use. `None` if a region would wrap or regions overlap.
pub(super) fn view(regions: &[GpaRange], mappings: &[Mapping]) -> Option<GuestMemoryMmap> {
    let regions = regions.iter().zip(mappings);
    let views = regions.map(|(gpa, mapping)| view_of(*gpa, mapping));
    GuestMemoryMmap::from_regions(views.collect::<Option<Vec<_>>>()?).ok()
}

fn view_of(gpa: GpaRange, mapping: &Mapping) -> Option<GuestRegionMmap> {
    let address = std::ptr::with_exposed_provenance_mut(mapping.address());
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let kind = if mapping.is_shared() {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
    };
    let flags = kind | libc::MAP_NORESERVE;
    // SAFETY: the mapping has this address and length. It stays mapped as long as the view or any clone of it lives:
    // `GuestRam` owns both, and unmaps only after it has made sure that it held the last clone.
    let region = unsafe { MmapRegion::build_raw(address, mapping.len(), prot, flags) };
    GuestRegionMmap::new(region.ok()?, GuestAddress(gpa.start()))
}
