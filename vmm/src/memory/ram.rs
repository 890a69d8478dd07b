//! The guest's RAM: who owns the mappings, who may use them, and how pages go back to the host.

mod missing;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use ebb_core::range::{BLOCK_SIZE, GpaRange};
use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::MemoryError;
pub use missing::{MissingPage, MissingPages};

use crate::sys::mapping::MAX_PARTS;
use crate::sys::{self, Advice, Mapping, MappingKind};

/// Bytes of a file behind shared memory, unless that makes more than [`MAX_FILES`]. Two workers that free parts of one file
/// wait for each other, see the table in ARCHITECTURE.md.
const FILE: u64 = 256 << 20;

/// Most files behind the guest's RAM, or nearly: each is a mapping, of which a process has 65,530 by default.
const MAX_FILES: u64 = 1 << 12;

/// How often a discard is tried again when the kernel says `EAGAIN`.
const DISCARD_ATTEMPTS: u32 = 8;

/// What the host puts behind the guest's RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// Ask for transparent huge pages.
    pub thp: bool,
    /// Use hugetlb pages of 2 MiB; transparent huge pages play no part then.
    pub hugepages: bool,
    /// Populate it at once.
    pub prefault: bool,
    /// Files without a name (memfd_create(2)), not private anonymous memory.
    pub shared: bool,
}

/// One region of the guest's RAM and where it lies in this process: what a KVM memory slot needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Addresses in the guest.
    pub gpa: GpaRange,
    /// Address in this process, congruent to the guest's modulo 2 MiB.
    pub host: usize,
    /// Bytes of a file behind it, at multiples of that in the guest; `None`: the memory is private and anonymous.
    pub file: Option<u64>,
}

/// The guest's RAM, and its arenas. It owns one mapping per region and unmaps them on drop.
///
/// Others use the memory through [`GuestRam::memory`]: volatile or atomic accesses, never references. So
/// a discard under them changes what they read and nothing else. The mappings themselves are unmapped
/// only when this value is dropped *and* no clone of that handle is left; otherwise the pages are
/// dropped and the address space is kept.
#[derive(Debug)]
pub struct GuestRam {
    /// `None` only while dropping.
    memory: Option<Arc<GuestMemoryMmap>>,
    mappings: Vec<Mapping>,
    regions: Vec<RamRegion>,
    /// So many regions, the first ones, are RAM; arenas follow.
    ram: usize,
    /// Discards work in units of this many bytes.
    unit: u64,
    /// `MADV_FREE` can be had.
    frees_lazily: bool,
    vectored: Vectored,
}

/// What is done with pages that go back to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// They are gone when the call returns (`MADV_DONTNEED`; `MADV_REMOVE` for shared memory).
    Now,
    /// The host takes them when it wants; what is written before stays (`MADV_FREE`). The guest's
    /// translations of them are gone when the call returns.
    Lazily,
}

impl From<Release> for Advice {
    fn from(how: Release) -> Self {
        match how {
            Release::Now => Self::DontNeed,
            Release::Lazily => Self::Free,
        }
    }
}

/// What [`GuestRam::release`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// For each range, how many bytes were released for sure.
    pub bytes: Vec<u64>,
    /// System calls made.
    pub calls: u64,
    /// Parts of ranges that the kernel would not take.
    pub failures: u64,
    /// The first error number among these.
    pub error: Option<i32>,
}

/// The part of a range that lies in one mapping.
struct Part {
    range: usize,
    mapping: usize,
    offset: usize,
    len: usize,
}

/// Whether, and through which descriptor, the kernel takes advice for many parts at once from us.
#[derive(Debug, Default)]
struct Vectored {
    process: OnceLock<Option<OwnedFd>>,
    given_up: AtomicBool,
}

impl Vectored {
    fn process(&self) -> Option<BorrowedFd<'_>> {
        if self.given_up.load(Ordering::Relaxed) {
            return None;
        }
        let process = self.process.get_or_init(|| sys::own_process().ok());
        process.as_ref().map(AsFd::as_fd)
    }

    fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }
}

impl GuestRam {
    /// Maps RAM for every region of `layout`, which is ascending and disjoint.
    ///
    /// # Errors
    /// [`MemoryError`]; nothing stays mapped then.
    pub fn allocate(backing: Backing, layout: &[GpaRange]) -> Result<Self, MemoryError> {
        Self::with_arenas(backing, layout, &[])
    }

    /// The same with memory for `arenas`, which lie above all RAM. These are private memory of small or transparent huge
    /// pages, and only where they are touched, whatever the RAM has.
    ///
    /// # Errors
    /// As for [`GuestRam::allocate`].
    pub fn with_arenas(
        backing: Backing,
        ram: &[GpaRange],
        arenas: &[GpaRange],
    ) -> Result<Self, MemoryError> {
        let layout = &[ram, arenas].concat();
        let on_touch = Backing {
            thp: backing.thp || backing.hugepages,
            ..Backing::default()
        };
        let backings = ram.iter().map(|_| backing);
        let backings = backings.chain(arenas.iter().map(|_| on_touch));
        let ordered = layout
            .windows(2)
            .all(|pair| pair[0].end() <= pair[1].start());
        let bad_layout = || MemoryError::Layout {
            layout: layout.to_vec(),
        };
        if ram.is_empty() || !ordered {
            return Err(bad_layout());
        }
        let mappings = layout
            .iter()
            .zip(backings)
            .map(|(&gpa, backing)| map_region(backing, gpa))
            .collect::<Result<Vec<_>, _>>()?;
        let views = layout
            .iter()
            .zip(&mappings)
            .map(|(gpa, mapping)| view(*gpa, mapping));
        let views = views.collect::<Option<Vec<_>>>().ok_or_else(bad_layout)?;
        let memory = GuestMemoryMmap::from_regions(views).map_err(|_| bad_layout())?;
        let regions = layout
            .iter()
            .zip(&mappings)
            .map(|(&gpa, mapping)| RamRegion {
                gpa,
                host: mapping.address(),
                file: mapping.is_shared().then(|| file_size(gpa.len())),
            });
        Ok(Self {
            memory: Some(Arc::new(memory)),
            regions: regions.collect(),
            ram: ram.len(),
            mappings,
            unit: if backing.hugepages { BLOCK_SIZE } else { 1 },
            frees_lazily: !backing.hugepages && !backing.shared,
            vectored: Vectored::default(),
        })
    }

    /// A handle for devices and loaders. Clones may outlive this value; they keep the address space, not
    /// the content.
    ///
    /// # Panics
    /// Never: the handle is there until this value is dropped.
    #[must_use]
    pub fn memory(&self) -> Arc<GuestMemoryMmap> {
        Arc::clone(self.memory.as_ref().expect("only drop takes the handle"))
    }

    /// The regions, ascending.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Size of all regions in bytes, arenas included.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.regions.iter().map(|region| region.gpa.len()).sum()
    }

    /// Always false: there is at least one region.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Whether every page of `range` is RAM, and none is in an arena.
    #[must_use]
    pub fn is_ram(&self, range: GpaRange) -> bool {
        let parts = self.parts(range).filter(|(index, _)| *index < self.ram);
        parts.map(|(_, part)| part.len()).sum::<u64>() == range.len()
    }

    /// Whether every page of `range` is RAM or in an arena.
    fn is_mapped(&self, range: GpaRange) -> bool {
        self.parts(range).map(|(_, part)| part.len()).sum::<u64>() == range.len()
    }

    /// Drops the pages behind `range`, see [`Release::Now`], and returns how many bytes that were asked of
    /// the kernel. The next touch reads zeroes. With hugetlb only whole pages of 2 MiB inside the range
    /// are dropped. A range over several regions is several system calls.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`] before anything has happened; [`MemoryError::Discard`] when the kernel
    /// refuses, after which any part may have been dropped.
    pub fn discard(&self, range: GpaRange) -> Result<u64, MemoryError> {
        self.drop_pages(range, Advice::DontNeed)
    }

    /// Lets the host drop the pages behind `range` when it is short of memory (`MADV_FREE`) and returns how
    /// many bytes that were. A page that is written to afterwards is kept. The second-level tables lose
    /// their entries in the call, so a guest's write faults anew and counts.
    ///
    /// # Errors
    /// As for [`GuestRam::discard`]; `EINVAL` in it for hugetlb pages and shared memory, which know no such thing.
    pub fn mark_free(&self, range: GpaRange) -> Result<u64, MemoryError> {
        self.drop_pages(range, Advice::Free)
    }

    fn drop_pages(&self, range: GpaRange, advice: Advice) -> Result<u64, MemoryError> {
        if !self.is_mapped(range) {
            return Err(MemoryError::NotRam {
                start: range.start(),
                end: range.end(),
            });
        }
        let mut discarded = 0;
        for (index, part) in self.parts(range) {
            let Some(part) = self.whole_units(part) else {
                continue;
            };
            let error = |source| MemoryError::Discard {
                bytes: part.len(),
                gpa: part.start(),
                source,
            };
            let offset = to_usize(part.start() - self.regions[index].gpa.start()).map_err(error)?;
            let len = to_usize(part.len()).map_err(error)?;
            drop_part(&self.mappings[index], (offset, len), advice).map_err(error)?;
            discarded += part.len();
        }
        Ok(discarded)
    }

    /// Whether pages can be left to the host's own schedule: not with hugetlb or files, which have no `MADV_FREE`.
    #[must_use]
    pub const fn can_free_lazily(&self) -> bool {
        self.frees_lazily
    }

    /// Whether the kernel takes many ranges in one call, as far as that is known.
    #[must_use]
    pub fn is_vectored(&self) -> bool {
        self.vectored.process().is_some()
    }

    /// Gives `how` for each of `ranges`, with as few system calls as the kernel allows: one for up to 1024
    /// ranges where it takes `process_madvise` on this process (Linux 6.13), which also spares TLB
    /// flushes, else one a range. A range that fails does not keep the others from being done; one that
    /// is not wholly RAM fails as a whole.
    pub fn release(&self, ranges: &[GpaRange], how: Release) -> Released {
        let mut released = Released {
            bytes: vec![0; ranges.len()],
            ..Released::default()
        };
        let mut parts = Vec::with_capacity(ranges.len());
        for (range, &gpa) in ranges.iter().enumerate() {
            if !self.is_mapped(gpa) {
                released.failures += 1;
                continue;
            }
            let part = |(mapping, part): (usize, GpaRange)| {
                let part = self.whole_units(part)?;
                let offset = part.start() - self.regions[mapping].gpa.start();
                let offset = usize::try_from(offset).ok()?;
                let len = usize::try_from(part.len()).ok()?;
                Some(Part {
                    range,
                    mapping,
                    offset,
                    len,
                })
            };
            parts.extend(self.parts(gpa).filter_map(part));
        }
        let mut left = parts.as_slice();
        while !left.is_empty() {
            left = &left[self.release_some(left, how, &mut released)..];
        }
        released
    }

    /// Releases at least the first of `parts`, or counts its failure; returns how many it dealt with.
    fn release_some(&self, parts: &[Part], how: Release, released: &mut Released) -> usize {
        let first = &parts[0];
        let mapping = &self.mappings[first.mapping];
        let same = |part: &&Part| part.mapping == first.mapping;
        let run = parts.iter().take_while(same).take(MAX_PARTS);
        let run: Vec<_> = run.map(|part| (part.offset, part.len)).collect();
        let mut refused = false;
        if run.len() > 1
            && let Some(process) = self.vectored.process()
        {
            released.calls += 1;
            match mapping.advise_parts(process, &run, how.into()) {
                Ok(bytes) => {
                    let done = whole_parts(&run, bytes);
                    for part in &parts[..done] {
                        released.bytes[part.range] += part.len as u64;
                    }
                    if done > 0 {
                        return done;
                    }
                }
                Err(error) => refused = error.raw_os_error() != Some(libc::EAGAIN),
            }
        }
        released.calls += 1;
        match drop_part(mapping, (first.offset, first.len), how.into()) {
            Ok(()) => {
                released.bytes[first.range] += first.len as u64;
                // What is fine alone and refused in company: this kernel does not take vectors from us.
                if refused {
                    self.vectored.give_up();
                }
            }
            Err(error) => {
                released.failures += 1;
                released.error = released.error.or(error.raw_os_error());
            }
        }
        1
    }

    /// Puts pages behind `range`, where there are none; content that is there stays.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`]; [`MemoryError::Populate`] when the host has too few pages.
    pub fn populate(&self, range: GpaRange) -> Result<(), MemoryError> {
        if !self.is_mapped(range) {
            return Err(MemoryError::NotRam {
                start: range.start(),
                end: range.end(),
            });
        }
        for (index, part) in self.parts(range) {
            let error = |source| MemoryError::Populate {
                bytes: part.len(),
                source,
            };
            let offset = to_usize(part.start() - self.regions[index].gpa.start()).map_err(error)?;
            let len = to_usize(part.len()).map_err(error)?;
            self.mappings[index]
                .populate_part(offset, len)
                .map_err(error)?;
        }
        Ok(())
    }

    /// Locks `range`: the host refuses to drop its pages then.
    #[cfg(test)]
    pub(crate) fn lock(&self, range: GpaRange) {
        self.on_parts(range, Mapping::lock);
    }

    /// Undoes [`GuestRam::lock`].
    #[cfg(test)]
    pub(crate) fn unlock(&self, range: GpaRange) {
        self.on_parts(range, Mapping::unlock);
    }

    /// Makes a hole where `range` is, which nobody may touch afterwards.
    #[cfg(test)]
    pub(crate) fn unmap(&self, range: GpaRange) {
        self.on_parts(range, Mapping::unmap);
    }

    #[cfg(test)]
    fn on_parts(&self, range: GpaRange, action: fn(&Mapping, usize, usize)) {
        for (index, part) in self.parts(range) {
            let offset = part.start() - self.regions[index].gpa.start();
            action(
                &self.mappings[index],
                usize::try_from(offset).unwrap(),
                usize::try_from(part.len()).unwrap(),
            );
        }
    }

    /// How many bytes of it the host holds.
    #[cfg(test)]
    pub(crate) fn resident(&self) -> u64 {
        let resident = |mapping: &Mapping| mapping.resident() as u64;
        self.mappings.iter().map(resident).sum()
    }

    /// The regions that `range` meets, each as its index and the shared part.
    fn parts(&self, range: GpaRange) -> impl Iterator<Item = (usize, GpaRange)> {
        let first = self
            .regions
            .partition_point(|region| region.gpa.end() <= range.start());
        let regions = self.regions.iter().enumerate().skip(first);
        regions.map_while(move |(index, region)| Some((index, region.gpa.intersection(range)?)))
    }

    /// `part` rounded inward to what the kernel can drop.
    fn whole_units(&self, part: GpaRange) -> Option<GpaRange> {
        let start = part.start().checked_next_multiple_of(self.unit)?;
        GpaRange::new(start, part.end() / self.unit * self.unit)
    }

    /// Drops the handle and says whether nobody else has one or a part of one.
    fn release_handle(&mut self) -> bool {
        let Some(mut memory) = self.memory.take().and_then(Arc::into_inner) else {
            return false;
        };
        let mut last = true;
        for region in &self.regions {
            let at = GuestAddress(region.gpa.start());
            let Ok((rest, region)) = memory.remove_region(at, region.gpa.len()) else {
                return false;
            };
            memory = rest;
            let view = Arc::into_inner(region).map(|region| region.get_mmap());
            last &= view.and_then(Arc::into_inner).is_some();
        }
        last
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        if self.release_handle() {
            return;
        }
        tracing::warn!(
            bytes = self.len(),
            "guest memory is still in use somewhere: its pages are freed, its addresses are kept"
        );
        for mapping in self.mappings.drain(..) {
            let _ = drop_part(&mapping, (0, mapping.len()), Advice::DontNeed);
            // The views point into the mapping: it must never be unmapped.
            std::mem::forget(mapping);
        }
    }
}

fn map_region(backing: Backing, gpa: GpaRange) -> Result<Mapping, MemoryError> {
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
    let mapping = to_usize(bytes).and_then(|len| {
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
    if backing.prefault {
        let error = |source| MemoryError::Populate { bytes, source };
        mapping.populate().map_err(error)?;
    }
    Ok(mapping)
}

/// Bytes of a file behind a region of so many bytes.
fn file_size(bytes: u64) -> u64 {
    (bytes / MAX_FILES)
        .checked_next_power_of_two()
        .map_or(FILE, |size| size.max(FILE))
}

/// Gives the advice that holds for a whole region. A kernel without transparent huge pages answers
/// `EINVAL` to both kinds of advice about them: then there are none, which is not an error.
fn advise(backing: Backing, mapping: &Mapping) -> Result<(), MemoryError> {
    let huge = match (backing.hugepages, backing.thp) {
        (true, _) => None,
        (false, true) => Some(Advice::HugePage),
        (false, false) => Some(Advice::NoHugePage),
    };
    for advice in huge.into_iter().chain([Advice::DontDump]) {
        match mapping.advise(0, mapping.len(), advice) {
            Err(error)
                if advice == Advice::DontDump || error.raw_os_error() != Some(libc::EINVAL) =>
            {
                return Err(MemoryError::Advise {
                    advice,
                    bytes: mapping.len() as u64,
                    source: error,
                });
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// A view of `mapping` for the users of guest memory, or `None` when the region would wrap.
fn view(gpa: GpaRange, mapping: &Mapping) -> Option<GuestRegionMmap> {
    let address = std::ptr::with_exposed_provenance_mut(mapping.address());
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let kind = if mapping.is_shared() {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
    };
    let flags = kind | libc::MAP_NORESERVE;
    // SAFETY: the mapping has this address and length. It stays mapped for as long as the view or any
    // clone of it lives: `GuestRam` owns both and unmaps only after it has proved that it held the last one.
    let region = unsafe { MmapRegion::build_raw(address, mapping.len(), prot, flags) };
    GuestRegionMmap::new(region.ok()?, GuestAddress(gpa.start()))
}

/// How many of `parts` lie wholly in the first `bytes` bytes of all.
fn whole_parts(parts: &[(usize, usize)], bytes: usize) -> usize {
    let ends = parts.iter().scan(0usize, |end, &(_, len)| {
        *end = end.saturating_add(len);
        Some(*end)
    });
    ends.take_while(|&end| end <= bytes).count()
}

/// Drops pages, again when the kernel says that it could not just now.
fn drop_part(mapping: &Mapping, (offset, len): (usize, usize), advice: Advice) -> io::Result<()> {
    let mut result = mapping.advise(offset, len, advice);
    for _ in 1..DISCARD_ATTEMPTS {
        match &result {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
            _ => break,
        }
        result = mapping.advise(offset, len, advice);
    }
    result
}

fn to_usize(bytes: u64) -> io::Result<usize> {
    usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
mod tests;
