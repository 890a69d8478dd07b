//! The memory file: RAM and arenas, one region after the other, with holes where nothing has to be kept, and a last page that says
//! which snapshot it belongs to.

use std::fs::File;
use std::io;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::available_parallelism;

use ebb_core::range::{BLOCK_SIZE, GpaRange, PAGE_SIZE};
use ebb_core::release::ReleasePages;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::difference::{Kept, Layer};
use crate::memory::GuestRam;
use crate::workers;

/// Bytes of the last page's beginning.
const MAGIC: &[u8; 8] = b"EBBPAGES";
/// More runs than this would take many mappings; then the gaps between them are mapped, too.
const MAX_RUNS: usize = 4096;
/// Page servers that were written for Firecracker read 1024 bytes of what they are told, and a run takes up to 120.
const MAX_SERVED: usize = 8;

/// Identifies a snapshot: its two files must have the same.
pub type SnapshotId = [u8; 16];

/// What the state file says of the memory file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMap {
    /// Which snapshot it belongs to.
    pub id: SnapshotId,
    /// Length of the file in bytes.
    pub len: u64,
    /// Bytes that were written.
    pub written: u64,
    /// What it holds.
    pub blocks: Blocks,
    /// The memory files that this one is a difference from, the full one first; none: it is full itself.
    pub below: Vec<Layer>,
    /// What comes from these, ascending. All else is here, or zero.
    pub kept: Vec<Kept>,
}

/// Each block of 2 MiB that has content, by its number in the file, and the CRC-32 of its pages that are not zero.
pub type Blocks = Vec<(u64, u32)>;

/// A block, and where it is in the file.
pub(super) struct Place {
    pub range: GpaRange,
    pub at: u64,
}

pub(super) fn places(ram: &GuestRam) -> Vec<Place> {
    let regions = ram.regions().iter().map(|region| region.gpa);
    let blocks = regions.flat_map(|gpa| {
        let starts = (gpa.start()..gpa.end()).step_by(BLOCK_SIZE as usize);
        starts.filter_map(move |at| GpaRange::new(at, gpa.end().min(at + BLOCK_SIZE)))
    });
    let place = |range: GpaRange| Place {
        range,
        at: ram.file_offset(range.start()),
    };
    blocks.map(place).collect()
}

/// Writes the RAM to `file`, which is empty. What lies in `left_out`, ascending ranges that do not touch, what the host has no
/// page for, and pages of zeros become holes. All vCPUs and devices must rest; reclaim may go on. Several threads write, each
/// up to 2 MiB at a time. They end early once `is_cancelled` is true.
///
/// # Errors
/// The first error of a write, such as `ENOSPC`; `Interrupted` if it was cancelled.
pub fn write(
    file: &File,
    ram: &GuestRam,
    left_out: &[GpaRange],
    id: SnapshotId,
    is_cancelled: impl Fn() -> bool + Sync,
) -> io::Result<MemoryMap> {
    let places = places(ram);
    let (next, written) = (AtomicUsize::new(0), AtomicU64::new(0));
    let blocks = Mutex::new(Vec::new());
    let failed = Mutex::new(None);
    let job = || {
        let mut buffer = vec![0; BLOCK_SIZE as usize];
        while let Some(place) = places.get(next.fetch_add(1, Ordering::Relaxed)) {
            let done = if is_cancelled() {
                Err(io::ErrorKind::Interrupted.into())
            } else {
                write_block(file, ram, left_out, place, &mut buffer)
            };
            match done {
                Ok(None) => {}
                Ok(Some((bytes, crc))) => {
                    written.fetch_add(bytes, Ordering::Relaxed);
                    lock(&blocks).push((place.at / BLOCK_SIZE, crc));
                }
                Err(error) => {
                    lock(&failed).get_or_insert(error);
                    next.store(usize::MAX / 2, Ordering::Relaxed);
                    return;
                }
            }
        }
    };
    let threads = available_parallelism().map_or(1, NonZero::get).min(4);
    let shared = workers::share(threads, "snap", || {}, job);
    if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    if shared.panicked > 0 {
        return Err(io::Error::other("a thread has panicked"));
    }
    let mut blocks = blocks.into_inner().unwrap_or_else(PoisonError::into_inner);
    blocks.sort_unstable();
    let end: u64 = ram.regions().iter().map(|region| region.gpa.len()).sum();
    file.write_all_at(&[&MAGIC[..], &id].concat(), end)?;
    file.set_len(end + PAGE_SIZE)?;
    Ok(MemoryMap {
        id,
        len: end + PAGE_SIZE,
        written: written.into_inner(),
        blocks,
        ..MemoryMap::default()
    })
}

/// Writes what has to be kept of a block. Returns the bytes and their CRC-32; `None` if there is nothing.
fn write_block(
    file: &File,
    ram: &GuestRam,
    left_out: &[GpaRange],
    Place { range, at }: &Place,
    buffer: &mut [u8],
) -> io::Result<Option<(u64, u32)>> {
    if ram.held(*range) == Some(0) {
        return Ok(None);
    }
    let alive = alive(*range, left_out);
    if alive.is_empty() {
        return Ok(None);
    }
    let buffer = &mut buffer[..range.len() as usize];
    buffer.fill(0);
    for part in alive {
        let (from, to) = (part.start() - range.start(), part.end() - range.start());
        let read = ram.view().read_slice(
            &mut buffer[from as usize..to as usize],
            GuestAddress(part.start()),
        );
        read.map_err(io::Error::other)?;
    }
    let (mut bytes, mut crc) = (0, crc32fast::Hasher::new());
    for (offset, run) in runs(buffer) {
        file.write_all_at(run, at + offset as u64)?;
        bytes += run.len() as u64;
        crc.update(run);
    }
    Ok((bytes > 0).then(|| (bytes, crc.finalize())))
}

/// The parts of `range` that are not in `left_out`.
pub(super) fn alive(range: GpaRange, left_out: &[GpaRange]) -> Vec<GpaRange> {
    let first = left_out.partition_point(|it| it.end() <= range.start());
    let (mut at, mut alive) = (range.start(), Vec::new());
    for hole in left_out
        .iter()
        .skip(first)
        .take_while(|it| it.start() < range.end())
    {
        alive.extend(GpaRange::new(at, hole.start().max(at)));
        at = hole.end();
    }
    alive.extend(GpaRange::new(at, range.end().max(at)));
    alive
}

/// The runs of pages that are not zero, with their offsets.
fn runs(buffer: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    const PAGE: usize = PAGE_SIZE as usize;
    let is_zero = |page: &[u8]| {
        let (words, rest) = page.as_chunks::<64>();
        words.iter().all(|chunk| *chunk == [0; 64]) && rest.iter().all(|byte| *byte == 0)
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        let pages = |from: usize| buffer.get(from..).unwrap_or_default().chunks(PAGE);
        at += pages(at).take_while(|page| is_zero(page)).count() * PAGE;
        let len: usize = pages(at)
            .take_while(|page| !is_zero(page))
            .map(<[u8]>::len)
            .sum();
        let run = buffer.get(at..at + len).filter(|run| !run.is_empty())?;
        at += len;
        Some((at - len, run))
    })
}

/// Why a memory file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryFileError {
    /// Another length.
    #[error(
        "is {is} bytes long, but the snapshot's has {due}; it was truncated, or is of another snapshot"
    )]
    Length {
        /// What it is.
        is: u64,
        /// What the state file says.
        due: u64,
    },
    /// Another snapshot's.
    #[error(
        "does not belong to this state file; name the files of one snapshot, of a difference the full one first"
    )]
    Other,
    /// A checksum is wrong.
    #[error("was altered: the checksum of its 2 MiB at {0:#x} is wrong; use an unaltered copy")]
    Altered(u64),
    /// It cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
}

impl MemoryMap {
    /// Checks length and last page of the memory file number `index`; with `all`, every checksum, which reads all of it.
    ///
    /// # Errors
    /// [`MemoryFileError`].
    pub fn check(&self, index: usize, file: &File, all: bool) -> Result<(), MemoryFileError> {
        let (id, blocks) = match self.below.get(index) {
            Some(layer) => (&layer.id, &layer.blocks),
            None if index == self.below.len() => (&self.id, &self.blocks),
            None => return Err(MemoryFileError::Other),
        };
        let is = file.metadata()?.len();
        if is != self.len || is < PAGE_SIZE {
            return Err(MemoryFileError::Length { is, due: self.len });
        }
        let mut last = [0; MAGIC.len() + 16];
        file.read_exact_at(&mut last, self.len - PAGE_SIZE)?;
        if last[..] != [&MAGIC[..], id].concat() {
            return Err(MemoryFileError::Other);
        }
        let mut buffer = vec![0; BLOCK_SIZE as usize];
        for &(block, crc) in blocks.iter().filter(|_| all) {
            let at = block.saturating_mul(BLOCK_SIZE);
            let end = (self.len - PAGE_SIZE).saturating_sub(at).min(BLOCK_SIZE);
            let part = &mut buffer[..end as usize];
            file.read_exact_at(part, at)?;
            let mut hasher = crc32fast::Hasher::new();
            runs(part).for_each(|(_, run)| hasher.update(run));
            if hasher.finalize() != crc {
                return Err(MemoryFileError::Altered(at));
            }
        }
        Ok(())
    }

    /// The runs of RAM, at `ram`, that have content in the file: whole blocks, neighbours together, and not too many.
    pub(super) fn runs(&self, ram: &[GpaRange]) -> Vec<GpaRange> {
        self.few_runs(ram, MAX_RUNS)
    }

    /// The runs of RAM, at `ram`, that a page server is asked for: as few as it can be told of, so with some holes of the file.
    #[must_use]
    pub fn served(&self, ram: &[GpaRange]) -> Vec<GpaRange> {
        self.few_runs(ram, MAX_SERVED)
    }

    /// At most `most` runs, or one for each region.
    fn few_runs(&self, ram: &[GpaRange], most: usize) -> Vec<GpaRange> {
        let mut gap = 0;
        loop {
            let runs = self.runs_over(ram, gap);
            if runs.len() <= most.max(ram.len()) {
                return runs;
            }
            gap = gap * 2 + 1;
        }
    }

    /// The same, where gaps of up to `gap` blocks are mapped, too.
    fn runs_over(&self, ram: &[GpaRange], gap: u64) -> Vec<GpaRange> {
        let mut runs: Vec<GpaRange> = Vec::new();
        let mut below = 0;
        for region in ram {
            let of_region = self.blocks.iter().filter_map(|&(block, _)| {
                let at = block.checked_mul(BLOCK_SIZE)?.checked_sub(below)?;
                let start = region.start().checked_add(at)?;
                let end = start.checked_add(BLOCK_SIZE)?.min(region.end());
                GpaRange::new(start, end)
            });
            let first = runs.len();
            for block in of_region {
                match runs.get_mut(first..).and_then(<[_]>::last_mut) {
                    Some(last)
                        if block.start() - last.end().min(block.start()) <= gap * BLOCK_SIZE =>
                    {
                        let end = last.end().max(block.end());
                        *last = GpaRange::new(last.start(), end).unwrap_or(*last);
                    }
                    _ => runs.push(block),
                }
            }
            below += region.len();
        }
        runs
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;

    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange::new(start, end).unwrap()
    }

    fn ram() -> GuestRam {
        let layout = [range(0, 6 * MIB), range(16 * MIB, 21 * MIB)];
        GuestRam::allocate(Backing::default(), &layout).unwrap()
    }

    fn fill(ram: &GuestRam, gpa: u64, byte: u8) {
        let page = [byte; PAGE_SIZE as usize];
        ram.view().write_slice(&page, GuestAddress(gpa)).unwrap();
    }

    fn read(ram: &GuestRam, gpa: u64) -> u8 {
        ram.view().read_obj(GuestAddress(gpa)).unwrap()
    }

    #[test]
    fn what_is_written_comes_back_and_dead_and_zero_pages_take_no_space() {
        let saved = ram();
        for (gpa, byte) in [
            (0, 1),
            (0x3000, 2),
            (0x4000, 3),
            (4 * MIB, 4),
            (20 * MIB, 5),
        ] {
            fill(&saved, gpa, byte);
        }
        fill(&saved, 0x8000, 0);
        let file = tempfile::tempfile().unwrap();
        let dead = [range(0x4000, 0x5000), range(4 * MIB, 6 * MIB)];
        let map = write(&file, &saved, &dead, [7; 16], || false).unwrap();
        assert_eq!(
            (map.written, map.len),
            (3 * PAGE_SIZE, 11 * MIB + PAGE_SIZE)
        );
        let blocks: Vec<u64> = map.blocks.iter().map(|it| it.0).collect();
        assert_eq!(blocks, [0, 5], "of 2 MiB, by their place in the file");
        map.check(0, &file, true).unwrap();
        let regions: Vec<GpaRange> = saved.regions().iter().map(|it| it.gpa).collect();
        let runs = map.runs(&regions);
        assert_eq!(runs, [range(0, 2 * MIB), range(20 * MIB, 21 * MIB)]);

        let mut restored = ram();
        restored
            .map_file(std::os::fd::AsFd::as_fd(&file), &runs)
            .unwrap();
        // What nobody has touched yet is not the host's, but it is content all the same.
        let second = tempfile::tempfile().unwrap();
        let again = write(&second, &restored, &[], [7; 16], || false).unwrap();
        assert_eq!(again, map);
        let bytes = [0, 0x3000, 0x4000, 4 * MIB, 20 * MIB].map(|gpa| read(&restored, gpa));
        assert_eq!(bytes, [1, 2, 0, 0, 5]);
        // What is discarded reads zero, and what is written stays here.
        fill(&restored, 0, 9);
        let discard = ebb_core::release::Release::Discard;
        restored
            .release_range(range(0x3000, 0x4000), discard)
            .unwrap();
        assert_eq!([0, 0x3000].map(|gpa| read(&restored, gpa)), [9, 0]);
        map.check(0, &file, true).unwrap();
    }

    #[test]
    fn files_that_do_not_fit_are_refused() {
        let saved = ram();
        fill(&saved, 0, 1);
        let file = tempfile::tempfile().unwrap();
        let map = write(&file, &saved, &[], [7; 16], || false).unwrap();
        let other = MemoryMap {
            id: [8; 16],
            ..map.clone()
        };
        let error = other.check(0, &file, false).unwrap_err();
        assert!(matches!(error, MemoryFileError::Other));
        file.write_all_at(&[2], 5).unwrap();
        map.check(0, &file, false).unwrap();
        let error = map.check(0, &file, true).unwrap_err();
        assert!(matches!(error, MemoryFileError::Altered(0)));
        file.set_len(5 * MIB).unwrap();
        let error = map.check(0, &file, false).unwrap_err();
        assert!(matches!(error, MemoryFileError::Length { .. }));
    }

    #[test]
    fn a_cancelled_and_a_refused_write_are_errors() {
        let saved = ram();
        fill(&saved, 0, 1);
        let file = tempfile::tempfile().unwrap();
        let error = write(&file, &saved, &[], [7; 16], || true).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
        let full = File::options().write(true).open("/dev/full").unwrap();
        let error = write(&full, &saved, &[], [7; 16], || false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn runs_are_not_too_many() {
        let ram = [range(0, 64 << 30)];
        let every = |step: usize| (0..32768).step_by(step).map(|it| (it, 0)).collect();
        let runs = |step| {
            let map = MemoryMap {
                blocks: every(step),
                ..MemoryMap::default()
            };
            map.runs(&ram).len()
        };
        assert_eq!([1, 2, 8, 1024].map(runs), [1, 1, 4096, 32]);
        let map = MemoryMap {
            blocks: every(8192),
            ..MemoryMap::default()
        };
        assert_eq!(map.served(&ram).len(), 4, "its holes are left out");
        let map = MemoryMap {
            blocks: every(2048),
            ..MemoryMap::default()
        };
        assert_eq!(map.served(&ram), [range(0, (15 * 2048 + 1) << 21)]);
        // A region has at least one.
        let regions: Vec<_> = (0..16).map(|it| range(it << 32, (it + 1) << 32)).collect();
        assert_eq!(map.served(&regions).len(), 16);
    }
}
