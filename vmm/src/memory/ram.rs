//! The guest's RAM: owns the mappings, lends them to their users, and releases pages to the host.

mod missing;
mod of_file;
mod served;

use std::io;
use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::available_parallelism;

use ebb_core::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};
use ebb_core::release::{Release, ReleasePages, Released};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::MemoryError;
use super::backing::{self, Backing, file_size};
use super::release::{Extent, HostKernel, OwnProcess, release, retry_while_busy};
use crate::sys::pagemap::PageMap;
use crate::sys::{Mapping, Userfault};
use crate::workers;

pub use missing::{MissingPage, MissingPages};
pub use served::Served;

/// One region of guest memory and its place in this process: what a KVM memory slot needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Addresses in the guest.
    pub gpa: GpaRange,
    /// Address in this process, congruent to the guest's modulo 2 MiB.
    pub host: usize,
    /// Size in bytes of the files behind the region, which end at multiples of that in the guest. `None`: the memory is
    /// private and anonymous.
    pub file: Option<u64>,
}

/// The guest's RAM and its arenas. Owns one mapping per region and unmaps them on drop.
///
/// Others use the memory through [`GuestRam::memory`]: by volatile or atomic accesses, never by references. So a release
/// while they use it changes what they read, and nothing else. The mappings are unmapped only when this value is dropped
/// *and* no clone of that handle is left. Otherwise the pages are discarded and the addresses stay reserved.
#[derive(Debug)]
pub struct GuestRam {
    /// `None` only while dropping.
    memory: Option<Arc<GuestMemoryMmap>>,
    mappings: Vec<Mapping>,
    regions: Vec<RamRegion>,
    /// This many regions, the first ones, are RAM. The others are arenas.
    ram: usize,
    /// Releases work in units of this many bytes.
    unit: u64,
    can_mark_free: bool,
    /// Transparent huge pages are asked for.
    huge_pages: bool,
    process: OwnProcess,
    /// By this a page server gives content.
    faults: Option<Arc<Userfault>>,
}

impl GuestRam {
    /// Maps RAM for every region of `layout`, which is ascending and disjoint.
    ///
    /// # Errors
    /// [`MemoryError`]; nothing stays mapped then.
    pub fn allocate(backing: Backing, layout: &[GpaRange]) -> Result<Self, MemoryError> {
        Self::with_arenas(backing, layout, &[])
    }

    /// As [`GuestRam::allocate`], with memory for `arenas`, which lie above all RAM. Whatever the backing of the RAM,
    /// arenas are private memory of small or transparent huge pages, populated on first touch.
    ///
    /// # Errors
    /// As for [`GuestRam::allocate`].
    pub fn with_arenas(
        backing: Backing,
        ram: &[GpaRange],
        arenas: &[GpaRange],
    ) -> Result<Self, MemoryError> {
        let layout = &[ram, arenas].concat();
        let ordered = layout
            .windows(2)
            .all(|pair| pair[0].end() <= pair[1].start());
        let bad_layout = || MemoryError::Layout {
            layout: layout.clone(),
        };
        if ram.is_empty() || !ordered {
            return Err(bad_layout());
        }
        let of_ram = ram.iter().map(|&gpa| backing::map(backing, gpa));
        let of_arenas = arenas
            .iter()
            .map(|&gpa| backing::map(backing.of_arenas(), gpa));
        let mappings = of_ram.chain(of_arenas).collect::<Result<Vec<_>, _>>()?;
        let memory = backing::view(layout, &mappings).ok_or_else(bad_layout)?;
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
            unit: if backing.hugepages {
                BLOCK_SIZE
            } else {
                PAGE_SIZE
            },
            huge_pages: backing.thp && !backing.hugepages,
            can_mark_free: !backing.hugepages && !backing.shared,
            process: OwnProcess::default(),
            faults: None,
        })
    }

    /// A handle for devices and loaders. Clones may outlive this value: they keep the addresses reserved, not the content.
    ///
    /// # Panics
    /// Never: the handle exists until this value is dropped.
    #[must_use]
    pub fn memory(&self) -> Arc<GuestMemoryMmap> {
        Arc::clone(self.memory.as_ref().expect("only drop takes the handle"))
    }

    /// The memory itself, without a handle of one's own.
    ///
    /// # Panics
    /// Never: it exists until this value is dropped.
    #[must_use]
    pub fn view(&self) -> &GuestMemoryMmap {
        self.memory.as_deref().expect("only drop takes the handle")
    }

    /// The regions, ascending.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Size of all regions in bytes, arenas included.
    #[expect(clippy::len_without_is_empty, reason = "there is at least one region")]
    #[must_use]
    pub fn len(&self) -> u64 {
        self.regions.iter().map(|region| region.gpa.len()).sum()
    }

    /// Returns true if every page of `range` is RAM; arenas are not.
    #[must_use]
    pub fn is_ram(&self, range: GpaRange) -> bool {
        let parts = self.parts(range).filter(|(index, _)| *index < self.ram);
        parts.map(|(_, part)| part.len()).sum::<u64>() == range.len()
    }

    /// Checks that every page of `range` is RAM or in an arena.
    fn check(&self, range: GpaRange) -> Result<(), MemoryError> {
        let mapped: u64 = self.parts(range).map(|(_, part)| part.len()).sum();
        if mapped == range.len() {
            return Ok(());
        }
        Err(MemoryError::NotRam {
            start: range.start(),
            end: range.end(),
        })
    }

    /// Releases the pages behind `range` and returns how many bytes were released: with hugetlb only whole pages of 2 MiB.
    /// See [`ReleasePages::release`] for several ranges.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`] before anything was released; [`MemoryError::Release`] if the kernel refuses, after which
    /// any part may have been released. The kernel refuses [`Release::MarkFree`] of hugetlb pages and shared memory
    /// (`EINVAL`).
    pub fn release_range(&self, range: GpaRange, how: Release) -> Result<u64, MemoryError> {
        self.check(range)?;
        let released = self.release(&[range], how);
        match released.error {
            None => Ok(released.bytes.iter().sum()),
            Some(errno) => Err(MemoryError::Release {
                bytes: range.len(),
                gpa: range.start(),
                source: io::Error::from_raw_os_error(errno),
            }),
        }
    }

    /// Frees what is behind `range` for good, at the machine's end: nobody may use it any more.
    ///
    /// # Errors
    /// As for [`GuestRam::release_range`].
    pub fn free_range(&self, range: GpaRange) -> Result<u64, MemoryError> {
        let of_file = self.mappings.iter().any(Mapping::has_overlay);
        if !of_file {
            return self.release_range(range, Release::Discard);
        }
        self.check(range)?;
        for part in self.parts(range) {
            let Extent { offset, len, .. } = self.extent(0, part);
            let freed = self.mappings[part.0].free(offset, len);
            freed.map_err(|source| MemoryError::Release {
                bytes: range.len(),
                gpa: range.start(),
                source,
            })?;
        }
        Ok(range.len())
    }

    /// Populates all RAM, with as many threads as there are cores, unless `is_cancelled` returns true: it is asked before
    /// every 16 MiB, and told how many bytes are populated. Returns false if it did.
    ///
    /// # Errors
    /// [`MemoryError::Populate`] if the host has too few pages.
    pub fn populate_unless(
        &self,
        is_cancelled: impl Fn(u64) -> bool + Sync,
    ) -> Result<bool, MemoryError> {
        const STEP: u64 = 16 << 20;
        let ram = self.regions.iter().take(self.ram);
        let steps = ram.flat_map(|region| {
            let starts = (region.gpa.start()..region.gpa.end()).step_by(STEP as usize);
            let end = region.gpa.end();
            starts.filter_map(move |start| GpaRange::new(start, end.min(start + STEP)))
        });
        let steps: Vec<GpaRange> = steps.collect();
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let populated = AtomicU64::new(0);
        let first_error = OnceLock::new();
        let cores = available_parallelism().map_or(1, NonZero::get);
        workers::share(
            cores.min(steps.len()),
            "fill",
            || {},
            || {
                while let Some(step) = steps.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if is_cancelled(populated.load(Ordering::Relaxed)) {
                        stop.store(true, Ordering::Relaxed);
                    }
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    if let Err(error) = self.populate(*step) {
                        let _ = first_error.set(error);
                        stop.store(true, Ordering::Relaxed);
                    }
                    populated.fetch_add(step.len(), Ordering::Relaxed);
                }
            },
        );
        match first_error.into_inner() {
            Some(MemoryError::Populate { source, .. }) => Err(MemoryError::Populate {
                bytes: self
                    .regions
                    .iter()
                    .take(self.ram)
                    .map(|it| it.gpa.len())
                    .sum(),
                source,
            }),
            Some(error) => Err(error),
            None => Ok(!stop.into_inner()),
        }
    }

    /// Puts pages behind `range` where there are none; existing content stays.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`]; [`MemoryError::Populate`] if the host has too few pages.
    pub fn populate(&self, range: GpaRange) -> Result<(), MemoryError> {
        self.check(range)?;
        self.parts(range).try_for_each(|part| {
            let Extent {
                mapping,
                offset,
                len,
                ..
            } = self.extent(0, part);
            let error = |source| MemoryError::Populate {
                bytes: len as u64,
                source,
            };
            self.mappings[mapping]
                .populate_part(offset, len)
                .map_err(error)
        })
    }

    /// The regions that `range` meets, each as its index and the common part.
    fn parts(&self, range: GpaRange) -> impl Iterator<Item = (usize, GpaRange)> {
        let first = self
            .regions
            .partition_point(|region| region.gpa.end() <= range.start());
        let regions = self.regions.iter().enumerate().skip(first);
        regions.map_while(move |(index, region)| Some((index, region.gpa.intersection(range)?)))
    }

    /// The extent of a part of range number `range`. Offset and length fit in `usize`: the part lies in a mapping.
    fn extent(&self, range: usize, (mapping, part): (usize, GpaRange)) -> Extent {
        Extent {
            range,
            mapping,
            offset: (part.start() - self.regions[mapping].gpa.start()) as usize,
            len: part.len() as usize,
        }
    }

    fn held_extent(&self, extent: Extent) -> Option<u64> {
        let mapping = &self.mappings[extent.mapping];
        let address = mapping.address() + extent.offset;
        let map = self.process.page_map().filter(|_| !mapping.is_shared());
        if let Some(Ok(held)) = map.map(|map| map.held(address, extent.len)) {
            // What is in a file, or comes from a page server, and was not touched yet is content that the host does not hold.
            let is_told = held > 0 || !mapping.has_source(extent.offset, extent.len);
            return is_told.then_some(held as u64);
        }
        let resident = mapping.resident_part(extent.offset, extent.len).ok()?;
        (resident > 0).then_some(resident as u64)
    }

    /// As `held` of each of `ranges`, by one look at the page tables; `None` unless they lie in one mapping whose page tables tell.
    fn held_at_once(&self, ranges: &[GpaRange]) -> Option<u64> {
        let (first, last) = (ranges.first()?, ranges.last()?);
        let all = GpaRange::new(first.start(), last.end())?;
        let part = self.parts(all).next().filter(|(_, part)| *part == all)?;
        let extent = self.extent(0, part);
        let mapping = &self.mappings[extent.mapping];
        let map = self.process.page_map().filter(|_| !mapping.is_shared())?;
        let address = |at: u64| mapping.address() + extent.offset + (at - all.start()) as usize;
        let parts = ranges
            .iter()
            .map(|it| address(it.start())..address(it.end()));
        map.held_of(&parts.collect::<Vec<_>>())
            .ok()
            .map(|held| held as u64)
    }

    /// The guest addresses of the parts of `extent` that lie in huge pages, ascending.
    fn huge_parts(&self, extent: Extent) -> Vec<GpaRange> {
        let mapping = &self.mappings[extent.mapping];
        let start = self.regions[extent.mapping].gpa.start();
        let huge = |map: &PageMap| map.huge(mapping.address() + extent.offset, extent.len).ok();
        let runs = self.process.page_map().and_then(huge).unwrap_or_default();
        let gpa = |address: usize| start + (address - mapping.address()) as u64;
        let ranges = runs
            .iter()
            .map(|run| GpaRange::new(gpa(run.start), gpa(run.end)));
        ranges.flatten().collect()
    }

    /// `part` rounded inward to whole units.
    fn whole_units(&self, part: GpaRange) -> Option<GpaRange> {
        let start = part.start().checked_next_multiple_of(self.unit)?;
        GpaRange::new(start, part.end() / self.unit * self.unit)
    }

    /// Drops the handle. Returns true if nobody else has one, or a part of one.
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

impl ReleasePages for GuestRam {
    /// The kernel has `MADV_FREE` neither for hugetlb pages nor for files.
    fn can_mark_free(&self) -> bool {
        self.can_mark_free
    }

    fn unit(&self) -> u64 {
        self.unit
    }

    /// By the page tables, where the kernel tells (Linux 6.7). Else, and for files, by mincore(2), which does not know of
    /// swap: then "nothing" is no answer.
    fn held(&self, range: GpaRange) -> Option<u64> {
        let parts = self.parts(range).map(|part| self.extent(0, part));
        parts.map(|part| self.held_extent(part)).sum()
    }

    fn held_of(&self, ranges: &[GpaRange]) -> u64 {
        let each = || ranges.iter().filter_map(|range| self.held(*range)).sum();
        self.held_at_once(ranges).unwrap_or_else(each)
    }

    fn in_huge_pages(&self, range: GpaRange) -> Vec<GpaRange> {
        if self.unit == BLOCK_SIZE {
            return vec![range];
        }
        let parts = self.parts(range).map(|part| self.extent(0, part));
        parts.flat_map(|part| self.huge_parts(part)).collect()
    }

    /// As many as there are where the kernel takes process_madvise(2) on this process (Linux 6.13), else one.
    fn max_batch(&self) -> usize {
        if self.process.get().is_some() {
            usize::MAX
        } else {
            1
        }
    }

    /// A range that is not wholly guest memory counts as one failure. With hugetlb only whole pages of 2 MiB inside a
    /// range are released.
    fn release(&self, ranges: &[GpaRange], how: Release) -> Released {
        let mut extents = Vec::with_capacity(ranges.len());
        let mut outside = 0;
        for (index, &range) in ranges.iter().enumerate() {
            if self.check(range).is_err() {
                outside += 1;
                continue;
            }
            let whole = |(mapping, part)| Some((mapping, self.whole_units(part)?));
            let parts = self.parts(range).filter_map(whole);
            extents.extend(parts.map(|part| self.extent(index, part)));
        }
        let kernel = HostKernel {
            mappings: &self.mappings,
            process: &self.process,
            how,
        };
        let mut released = release(&kernel, &extents, ranges.len());
        released.failures += outside;
        if let Some(error) = released.error {
            let error = io::Error::from_raw_os_error(error);
            tracing::debug!(%error, failures = released.failures, "ranges are not released");
        }
        released
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        if self.release_handle() {
            return;
        }
        tracing::warn!(
            bytes = self.len(),
            "guest memory is still in use: its pages are freed, its addresses stay reserved"
        );
        for mapping in self.mappings.drain(..) {
            let discard = || mapping.free(0, mapping.len());
            if let Err(error) = retry_while_busy(discard) {
                tracing::warn!(%error, bytes = mapping.len(), "guest memory could not be freed");
            }
            // The views point into the mapping: it must never be unmapped.
            std::mem::forget(mapping);
        }
    }
}

#[cfg(test)]
impl GuestRam {
    /// Locks `range`: the host then refuses to release it.
    pub(crate) fn lock(&self, range: GpaRange) {
        self.on_parts(range, Mapping::lock);
    }

    /// Undoes [`GuestRam::lock`].
    pub(crate) fn unlock(&self, range: GpaRange) {
        self.on_parts(range, Mapping::unlock);
    }

    /// Makes a hole at `range`, which nobody may touch afterwards.
    pub(crate) fn unmap(&self, range: GpaRange) {
        self.on_parts(range, Mapping::unmap);
    }

    fn on_parts(&self, range: GpaRange, action: fn(&Mapping, usize, usize)) {
        for part in self.parts(range) {
            let extent = self.extent(0, part);
            let mapping = &self.mappings[extent.mapping];
            action(mapping, extent.offset, extent.len);
        }
    }

    /// Number of bytes that the host holds.
    pub(crate) fn resident(&self) -> u64 {
        let resident = |mapping: &Mapping| mapping.resident() as u64;
        self.mappings.iter().map(resident).sum()
    }
}

#[cfg(test)]
mod tests;
