//! Differences: what a snapshot of a restored machine need not hold, because the memory files that the machine was restored from
//! have it.
//!
//! A restored machine's memory is a private mapping of these files, so what was written since then, by the guest or by a device, is
//! what the process has pages of its own for. A page comes from a file below if it is still mapped from there and its content is not
//! dead, or was dead then, too. All else is in the difference: as data, or as a hole, which reads zero.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use ebb_core::range::{GpaRange, PAGE_SIZE};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::memory::{self, Blocks, MemoryMap, SnapshotId};
use crate::guest_memory::merge;
use crate::memory::{Backing, GuestRam};

/// Most files below a difference: a machine keeps them all open.
pub const MAX_LAYERS: usize = 16;

/// Most parts that come from files below. Each takes up to two of the 65530 mappings that a process may have.
pub(super) const MAX_KEPT: usize = 6000;

/// A memory file below a difference.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Which snapshot it is of.
    pub id: SnapshotId,
    /// What it holds.
    pub blocks: Blocks,
}

/// A part of the memory that comes from a file below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The file's number among those below.
    pub layer: usize,
    /// First page, by its number in the file.
    pub first: u64,
    /// How many pages.
    pub pages: u64,
}

impl Kept {
    const fn end(&self) -> u64 {
        self.first.saturating_add(self.pages)
    }

    /// What of it lies from `first` to `end`.
    fn within(&self, first: u64, end: u64) -> Option<Self> {
        let (first, end) = (self.first.max(first), self.end().min(end));
        let pages = end.checked_sub(first).filter(|pages| *pages > 0)?;
        let layer = self.layer;
        Some(Self {
            layer,
            first,
            pages,
        })
    }
}

/// What a restored machine is saved as.
pub struct Difference<'a> {
    base: &'a MemoryMap,
    files: &'a [Arc<File>],
    most: usize,
}

impl<'a> Difference<'a> {
    /// From the snapshot `base`, whose memory `files` the machine was restored from.
    #[must_use]
    pub const fn new(base: &'a MemoryMap, files: &'a [Arc<File>]) -> Self {
        let most = MAX_KEPT;
        Self { base, files, most }
    }

    /// Writes to `file` what is new in the RAM. As [`memory::write`].
    ///
    /// # Errors
    /// As for [`memory::write`]; also if the kernel does not say what was written.
    pub fn write(
        &self,
        file: &File,
        ram: &GuestRam,
        dead: &[GpaRange],
        id: SnapshotId,
        is_cancelled: impl Fn() -> bool + Sync,
    ) -> io::Result<MemoryMap> {
        let kept = self.kept(ram, dead)?;
        let regions: Vec<GpaRange> = ram.regions().iter().map(|region| region.gpa).collect();
        let mut left_out = dead.to_vec();
        left_out.extend(kept.iter().flat_map(|it| ranges(it, &regions)));
        merge(&mut left_out);
        let mut below = self.base.below.clone();
        below.push(Layer {
            id: self.base.id,
            blocks: self.base.blocks.clone(),
        });
        let own = memory::write(file, ram, &left_out, id, is_cancelled)?;
        Ok(MemoryMap { below, kept, ..own })
    }

    /// What can come from the files below.
    fn kept(&self, ram: &GuestRam, dead: &[GpaRange]) -> io::Result<Vec<Kept>> {
        let mut keeper = Keeper::new(self.most);
        let mut keep = |start, end, is_dead: bool| {
            let (first, pages) = (
                ram.file_offset(start) / PAGE_SIZE,
                (end - start) / PAGE_SIZE,
            );
            for part in sources(self.base, first, first + pages) {
                if !is_dead || self.is_hole(&part) {
                    keeper.add(part);
                }
            }
        };
        for place in memory::places(ram) {
            for unwritten in ram.unwritten(place.range)? {
                let mut at = unwritten.start();
                for alive in memory::alive(unwritten, dead) {
                    keep(at, alive.start(), true);
                    keep(alive.start(), alive.end(), false);
                    at = alive.end();
                }
                keep(at, unwritten.end(), true);
            }
        }
        Ok(keeper.finish())
    }

    /// Returns true if the file has nothing there. What was dead already in the snapshot below would else divide what is alive into
    /// many parts.
    fn is_hole(&self, part: &Kept) -> bool {
        let Some(file) = self.files.get(part.layer) else {
            return false;
        };
        match rustix::fs::seek(file, SeekFrom::Data(part.first * PAGE_SIZE)) {
            Ok(data) => data >= part.end() * PAGE_SIZE,
            // There is none until the end.
            Err(error) => error == Errno::NXIO,
        }
    }
}

/// Writes to `file` a full memory file of what `map` says of `files`, which have it in parts.
///
/// # Errors
/// If a file cannot be mapped, and as for [`memory::write`].
pub fn flatten(
    map: &MemoryMap,
    files: &[Arc<File>],
    file: &File,
    id: SnapshotId,
) -> io::Result<MemoryMap> {
    let whole = GpaRange::new(0, map.len.saturating_sub(PAGE_SIZE));
    let whole = [whole.ok_or(io::ErrorKind::InvalidData)?];
    let mut ram = GuestRam::allocate(Backing::default(), &whole).map_err(io::Error::other)?;
    for (index, range) in map.parts(&whole) {
        let from = files.get(index).ok_or(io::ErrorKind::InvalidData)?;
        ram.map_file(from.as_fd(), &[range])
            .map_err(io::Error::other)?;
    }
    memory::write(file, &ram, &[], id, || false)
}

/// Which files the pages from `first` to `end` came from when a machine was restored from `base`.
fn sources(base: &MemoryMap, first: u64, end: u64) -> impl Iterator<Item = Kept> {
    let (layer, mut at) = (base.below.len(), first);
    let mut below = base.kept.iter().skip_while(move |it| it.end() <= first);
    let mut next = below.next();
    std::iter::from_fn(move || {
        while at < end {
            let until = next.map_or(end, |it| it.first.clamp(at, end));
            let own = Kept {
                layer,
                first: at,
                pages: until - at,
            };
            if until > at {
                at = until;
                return Some(own);
            }
            let part = next.and_then(|it| it.within(at, end));
            next = below.next();
            at = part.map_or(at, |it| it.end());
            if part.is_some() {
                return part;
            }
        }
        None
    })
}

/// The ranges of RAM at `regions` that a part is.
pub(super) fn ranges(part: &Kept, regions: &[GpaRange]) -> impl Iterator<Item = GpaRange> {
    let bytes = [part.first, part.end()].map(|page| page.saturating_mul(PAGE_SIZE));
    let mut below = 0;
    regions.iter().filter_map(move |region| {
        let (from, to) = (below, below + region.len());
        below = to;
        let [start, end] = bytes.map(|at| region.start() + (at.clamp(from, to) - from));
        GpaRange::new(start, end)
    })
}

/// Collects ascending parts, and not too many: then those are left out, or made smaller, that are the least.
struct Keeper {
    kept: Vec<Kept>,
    most: usize,
    /// Parts begin and end at multiples of so many pages, once there were too many.
    grain: u64,
}

impl Keeper {
    const fn new(most: usize) -> Self {
        Self {
            kept: Vec::new(),
            most,
            grain: 1,
        }
    }

    fn add(&mut self, part: Kept) {
        match self.kept.last_mut() {
            Some(last) if last.layer == part.layer && last.end() == part.first => {
                last.pages += part.pages;
            }
            _ => self.kept.push(part),
        }
        if self.kept.len() > self.most.saturating_mul(2) {
            self.coarsen();
        }
    }

    fn finish(mut self) -> Vec<Kept> {
        self.coarsen();
        self.kept
    }

    fn coarsen(&mut self) {
        while self.kept.len() > self.most {
            let grain = self.grain;
            let shrunk = self.kept.iter().filter_map(|it| {
                let first = it.first.next_multiple_of(grain);
                it.within(first, it.end() / grain * grain)
            });
            self.kept = shrunk.collect();
            if self.kept.len() > self.most {
                self.grain *= 2;
            }
        }
    }
}

impl MemoryMap {
    /// How many memory files there are: those below, and this snapshot's own as the last.
    #[must_use]
    pub const fn files(&self) -> usize {
        self.below.len() + 1
    }

    /// Returns true if what it says of files below can be.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let is_in = |it: &Kept| {
            let end = it.end().checked_mul(PAGE_SIZE);
            it.layer < self.below.len() && it.pages > 0 && end.is_some_and(|end| end < self.len)
        };
        let are_ascending = |pair: &[Kept]| pair[0].end() <= pair[1].first;
        self.below.len() <= MAX_LAYERS
            && self.kept.len() <= MAX_KEPT
            && self.kept.iter().all(is_in)
            && self.kept.windows(2).all(are_ascending)
    }

    /// What the RAM at `regions` is mapped from: the file's number, and where. In this order: a later part covers an earlier one.
    #[must_use]
    pub fn parts(&self, regions: &[GpaRange]) -> Vec<(usize, GpaRange)> {
        let own = self.runs(regions).into_iter();
        let own = own.map(|range| (self.below.len(), range));
        let kept = self.kept.iter().take(MAX_KEPT);
        let kept = kept.flat_map(|it| ranges(it, regions).map(|range| (it.layer, range)));
        own.chain(kept).collect()
    }
}

#[cfg(test)]
mod tests;
