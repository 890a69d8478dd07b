//! Memory mappings that are used by address only: private anonymous memory, or files without a name.

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use ebb_core::release::Release;

use super::overlay::Overlay;
use super::pagemap::PageMap;
use super::userfault::Userfault;

/// Size in bytes of the kernel's smallest page.
const SMALL_PAGE: usize = 4096;

/// Size in bytes of the pages of [`MappingKind::Huge`].
pub const HUGE_PAGE: usize = 2 << 20;

/// Maximum number of parts in one call of [`Mapping::release_parts`] (`UIO_MAXIOV`).
pub const MAX_PARTS: usize = 1024;

/// The pages behind a [`Mapping`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappingKind {
    /// Pages of any size, allocated on first touch and not reserved before (`MAP_NORESERVE`).
    Small,
    /// hugetlb pages of 2 MiB. The mapping call reserves them: if there are too few, it fails, instead of a SIGBUS
    /// later.
    Huge,
}

/// A mapping that is readable and writable, unmapped on drop. It never lends references to its bytes. Its users hold
/// nothing but the address, so releasing pages while they use them breaks no rule of Rust.
#[derive(Debug)]
pub struct Mapping {
    address: usize,
    len: usize,
    /// The mapping is of files, which nobody else has open.
    shared: bool,
    /// Parts have their content from elsewhere, see [`Mapping::map_private`] and [`Mapping::serve`].
    overlay: Option<Overlay>,
}

impl Mapping {
    /// Maps `len` bytes of private anonymous memory at an address that is congruent to `congruent_to` modulo 2 MiB:
    /// then a huge page of the guest can be a huge page of the host. Both numbers must be multiples of the page size
    /// (of 2 MiB for [`MappingKind::Huge`]).
    ///
    /// # Errors
    /// Those of mmap(2); `EINVAL` for sizes that are 0, not aligned, or larger than the address space.
    pub fn new(len: usize, congruent_to: u64, kind: MappingKind) -> io::Result<Self> {
        let mapping = Self::reserve(len, congruent_to, kind)?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, kind.flags());
        map(mapping.address, len, prot, flags | MapFlags::FIXED)?;
        Ok(mapping)
    }

    /// As [`Mapping::new`], but of memory that other processes could share: memfds of `file` bytes each, a multiple of
    /// 2 MiB. One file ends and the next begins where `congruent_to` plus the offset is a multiple of `file`, so the
    /// files divide the guest's address space at multiples of their size. They have no name and exist as long as they
    /// are mapped.
    ///
    /// # Errors
    /// As for [`Mapping::new`], and those of memfd_create(2).
    pub fn shared(len: usize, congruent_to: u64, kind: MappingKind, file: u64) -> io::Result<Self> {
        if file == 0 || !file.is_multiple_of(HUGE_PAGE as u64) {
            return Err(Errno::INVAL.into());
        }
        let mut mapping = Self::reserve(len, congruent_to, kind)?;
        mapping.shared = true;
        let mut offset = 0;
        while offset < len {
            let in_file = congruent_to.wrapping_add(offset as u64) % file;
            let to_border = usize::try_from(file - in_file).unwrap_or(usize::MAX);
            let part = to_border.min(len - offset);
            map_file(mapping.address + offset, part, kind)?;
            offset += part;
        }
        Ok(mapping)
    }

    /// Reserves addresses for a mapping, without memory behind them.
    fn reserve(len: usize, congruent_to: u64, kind: MappingKind) -> io::Result<Self> {
        let align = match kind {
            MappingKind::Small => SMALL_PAGE,
            MappingKind::Huge => HUGE_PAGE,
        };
        let offset = usize::try_from(congruent_to % HUGE_PAGE as u64).map_err(|_| Errno::INVAL)?;
        let reserve = len.checked_add(HUGE_PAGE).ok_or(Errno::INVAL)?;
        if len == 0 || !len.is_multiple_of(align) || !offset.is_multiple_of(align) {
            return Err(Errno::INVAL.into());
        }
        let base = map(0, reserve, ProtFlags::empty(), MapFlags::NORESERVE)?;
        // `reserved` owns the reservation and unmaps it if a step fails.
        let mut reserved = Self {
            address: base,
            len: reserve,
            shared: false,
            overlay: None,
        };
        let below = base.next_multiple_of(HUGE_PAGE) - base;
        let head = (below + offset) % HUGE_PAGE;
        reserved.trim(head, len)?;
        Ok(reserved)
    }

    /// Unmaps everything except `len` bytes from `head` on.
    fn trim(&mut self, head: usize, len: usize) -> io::Result<()> {
        let end = self.address + self.len;
        if head > 0 {
            // SAFETY: the first `head` bytes belong to this mapping and nobody knows their address yet.
            unsafe { rustix::mm::munmap(pointer(self.address), head)? };
            self.address += head;
            self.len -= head;
        }
        let tail = self.address + len;
        if tail < end {
            // SAFETY: so do the bytes from `tail` to the mapping's end.
            unsafe { rustix::mm::munmap(pointer(tail), end - tail)? };
            self.len = len;
        }
        Ok(())
    }

    /// Address of the first byte in this process.
    #[must_use]
    pub const fn address(&self) -> usize {
        self.address
    }

    /// Length in bytes; never 0.
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Returns true if the mapping is of files.
    #[must_use]
    pub const fn is_shared(&self) -> bool {
        self.shared
    }

    /// Releases the pages behind `len` bytes from `offset` on (madvise(2)).
    ///
    /// # Errors
    /// Those of madvise(2), for instance `EINVAL` for locked pages and for [`Release::MarkFree`] of files or hugetlb
    /// pages; `EINVAL` also for a part that leaves the mapping.
    pub fn release(&self, offset: usize, len: usize, how: Release) -> io::Result<()> {
        match (how, &self.overlay) {
            (Release::Discard, Some(overlay)) if overlay.meets(offset, len) => {
                self.replace(offset, len, overlay)
            }
            _ => self.advise(offset, len, release_advice(how, self.shared)),
        }
    }

    /// Returns true if parts of it are private mappings of a file, or come from a page server.
    #[must_use]
    pub const fn has_overlay(&self) -> bool {
        self.overlay.is_some()
    }

    /// Returns true if a page that this part meets is a private mapping of a file, or comes from a page server.
    #[must_use]
    pub fn has_source(&self, offset: usize, len: usize) -> bool {
        let overlay = self.overlay.as_ref();
        overlay.is_some_and(|overlay| overlay.meets(offset, len))
    }

    /// Frees the pages of a part that nobody will use any more. What is read there all the same is undefined.
    ///
    /// # Errors
    /// As for [`Mapping::release`].
    pub fn free(&self, offset: usize, len: usize) -> io::Result<()> {
        let advice = release_advice(Release::Discard, self.shared);
        self.advise(offset, len, advice)
    }

    /// Puts the content of `file` from `at` on behind `len` bytes from `offset` on: pages are read when they are touched, and
    /// what is written stays here. All three are multiples of the page size. The
    /// file must keep its content and its length as long as the mapping exists: where it is shorter, an access ends the
    /// process. `huge_pages` says what holds for parts that are released later. The mapping must be private and of small pages.
    ///
    /// # Errors
    /// Those of mmap(2); `EINVAL` also for a part that leaves the mapping.
    pub fn map_private(
        &mut self,
        (offset, len): (usize, usize),
        file: BorrowedFd<'_>,
        at: u64,
        huge_pages: bool,
    ) -> io::Result<()> {
        self.check(offset, len)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: the part lies in this mapping, to whose bytes nobody holds references.
        unsafe { rustix::mm::mmap(pointer(self.address + offset), len, prot, flags, file, at)? };
        self.advise(offset, len, Advice::LinuxDontDump)?;
        let whole = self.len;
        let overlay = self
            .overlay
            .get_or_insert_with(|| Overlay::new(whole, huge_pages));
        overlay.set(offset, len, true);
        Ok(())
    }

    /// Leaves the content of `len` bytes from `offset` on, which nobody has touched, to whoever serves `faults`: who touches a
    /// page waits until it is there. Both are multiples of the page size. `huge_pages` as for [`Mapping::map_private`]. The
    /// mapping must be private and of small pages.
    ///
    /// # Errors
    /// Those of ioctl_userfaultfd(2); `EINVAL` also for a part that leaves the mapping.
    pub fn serve(
        &mut self,
        (offset, len): (usize, usize),
        faults: &Arc<Userfault>,
        huge_pages: bool,
    ) -> io::Result<()> {
        faults.watch_part(self, offset, len)?;
        let whole = self.len;
        let overlay = self
            .overlay
            .get_or_insert_with(|| Overlay::new(whole, huge_pages));
        overlay.faults = Some(Arc::clone(faults));
        overlay.set(offset, len, true);
        Ok(())
    }

    /// The runs of a part whose content still is the file's, as offsets: private mappings of a file that nobody has written to,
    /// by `pages`. Offset and length are multiples of the page size.
    ///
    /// # Errors
    /// As for [`PageMap::is_private`].
    pub fn unwritten(
        &self,
        pages: &PageMap,
        offset: usize,
        len: usize,
    ) -> io::Result<Vec<Range<usize>>> {
        self.check(offset, len)?;
        match &self.overlay {
            Some(overlay) if overlay.meets(offset, len) => {
                let is_private = pages.is_private(self.address + offset, len)?;
                let is_written = |page| is_private.get(page).copied().unwrap_or(true);
                Ok(overlay.runs(offset, len, is_written))
            }
            _ => Ok(Vec::new()),
        }
    }

    /// Releases a part that meets the file: `MADV_DONTNEED` would bring back the file's content, or have the page server asked
    /// again. New anonymous memory takes its place, which reads zero.
    fn replace(&self, offset: usize, len: usize, overlay: &Overlay) -> io::Result<()> {
        self.check(offset, len)?;
        overlay.cut(offset, len)?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::NORESERVE);
        map(self.address + offset, len, prot, flags | MapFlags::FIXED)?;
        overlay.set(offset, len, false);
        if let Some(faults) = &overlay.faults {
            // The server cannot give anything any more to those that wait for a page here.
            faults.wake_part(self, offset, len)?;
        }
        let advice = if overlay.huge_pages {
            Advice::LinuxHugepage
        } else {
            Advice::LinuxNoHugepage
        };
        // Refused by kernels without huge pages.
        let _ = self.advise(offset, len, advice);
        self.advise(offset, len, Advice::LinuxDontDump)
    }

    /// Releases several parts, each an offset and a length, in one system call (process_madvise(2)). Returns how many
    /// bytes were released, in the order of the parts: the call ends at the first part that fails.
    ///
    /// # Errors
    /// Those of process_madvise(2) if the first part fails; `EINVAL` also for a part that leaves the mapping. Kernels
    /// before 6.13 answer `EINVAL` to every release.
    pub fn release_parts(
        &self,
        process: BorrowedFd<'_>,
        parts: &[(usize, usize)],
        how: Release,
    ) -> io::Result<usize> {
        let vector = |&(offset, len): &(usize, usize)| {
            self.check(offset, len)?;
            if self
                .overlay
                .as_ref()
                .is_some_and(|it| it.meets(offset, len))
            {
                return Err(Errno::INVAL.into());
            }
            Ok(libc::iovec {
                iov_base: pointer(self.address + offset),
                iov_len: len,
            })
        };
        let vectors = parts
            .iter()
            .take(MAX_PARTS)
            .map(vector)
            .collect::<io::Result<Vec<_>>>()?;
        // SAFETY: as in `advise`. If the descriptor is of another process, the addresses are that process's, and the
        // memory of this one is not touched. The vector lives until the call returns.
        let done = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                process.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len(),
                release_advice(how, self.shared) as libc::c_int,
                0,
            )
        };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }

    /// Turns transparent huge pages on or off for the whole mapping. For files they are used only if the host's
    /// `shmem_enabled` is `advise`.
    ///
    /// # Errors
    /// Those of madvise(2); `EINVAL` where the kernel has no transparent huge pages.
    pub fn set_transparent_huge_pages(&self, on: bool) -> io::Result<()> {
        let advice = if on {
            Advice::LinuxHugepage
        } else {
            Advice::LinuxNoHugepage
        };
        self.advise(0, self.len, advice)
    }

    /// Leaves the whole mapping out of core dumps.
    ///
    /// # Errors
    /// Those of madvise(2).
    pub fn exclude_from_dumps(&self) -> io::Result<()> {
        self.advise(0, self.len, Advice::LinuxDontDump)
    }

    fn advise(&self, offset: usize, len: usize, advice: Advice) -> io::Result<()> {
        self.check(offset, len)?;
        // SAFETY: the part lies in this mapping. None of the advice used in this file unmaps anything, and what changes
        // content changes bytes to which nobody holds references.
        unsafe { rustix::mm::madvise(pointer(self.address + offset), len, advice)? };
        Ok(())
    }

    fn check(&self, offset: usize, len: usize) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(Errno::INVAL.into()),
        }
    }

    /// Populates the whole mapping for writing, see [`Mapping::populate_part`].
    ///
    /// # Errors
    /// Those of madvise(2), for instance `ENOMEM` and `EFAULT` if the host has too few pages.
    pub fn populate(&self) -> io::Result<()> {
        self.populate_part(0, self.len)
    }

    /// Populates `len` bytes from `offset` on for writing; existing content stays. Kernels before 5.14 have no advice
    /// for that: there every page is touched.
    ///
    /// # Errors
    /// Those of madvise(2); `EINVAL` also for a part that leaves the mapping.
    pub fn populate_part(&self, offset: usize, len: usize) -> io::Result<()> {
        match self.advise(offset, len, Advice::LinuxPopulateWrite) {
            Err(error)
                if error.raw_os_error() == Some(libc::EINVAL)
                    && offset.checked_add(len).is_some_and(|end| end <= self.len) =>
            {
                let start = self.address + offset;
                for address in (start..start + len).step_by(SMALL_PAGE) {
                    let byte = ptr::with_exposed_provenance_mut::<u8>(address);
                    // SAFETY: the byte lies in this mapping, which is readable and writable. Others hold no
                    // references to it: they use volatile or atomic accesses.
                    unsafe { AtomicU8::from_ptr(byte) }.fetch_or(0, Ordering::Relaxed);
                }
                Ok(())
            }
            result => result,
        }
    }

    /// Returns true if there is a page behind the byte at `offset` (mincore(2)).
    ///
    /// # Errors
    /// Those of mincore(2); `EINVAL` also for an offset outside of the mapping.
    pub fn is_present(&self, offset: usize) -> io::Result<bool> {
        self.check(offset, 1)?;
        let page = pointer(self.address + offset / SMALL_PAGE * SMALL_PAGE);
        let mut present = 0u8;
        // SAFETY: the page lies in this mapping, and one page's answer is one byte.
        match unsafe { libc::mincore(page, SMALL_PAGE, &raw mut present) } {
            0 => Ok(present & 1 == 1),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Number of resident bytes among `len` bytes from `offset` on (mincore(2)). Both are multiples of the page size.
    ///
    /// # Errors
    /// Those of mincore(2); `EINVAL` also for a part that leaves the mapping.
    pub fn resident_part(&self, offset: usize, len: usize) -> io::Result<usize> {
        self.check(offset, len)?;
        let mut pages = [0u8; HUGE_PAGE / SMALL_PAGE];
        let (mut at, mut resident) = (offset, 0);
        while at < offset + len {
            let part = (offset + len - at).min(HUGE_PAGE);
            let address = pointer(self.address + at);
            // SAFETY: the part lies in this mapping, and the array has a byte for each of its pages, which is what the
            // kernel writes.
            if unsafe { libc::mincore(address, part, pages.as_mut_ptr()) } != 0 {
                return Err(io::Error::last_os_error());
            }
            let seen = pages.iter().take(part.div_ceil(SMALL_PAGE));
            resident += seen.filter(|&&page| page & 1 == 1).count() * SMALL_PAGE;
            at += part;
        }
        Ok(resident)
    }

    /// Locks a part in memory (mlock(2)): the kernel then answers `EINVAL` to a release of it.
    #[cfg(test)]
    pub(crate) fn lock(&self, offset: usize, len: usize) {
        self.check(offset, len).unwrap();
        // SAFETY: the part lies in this mapping, and its content stays.
        unsafe { rustix::mm::mlock(pointer(self.address + offset), len).unwrap() };
    }

    /// Undoes [`Mapping::lock`].
    #[cfg(test)]
    pub(crate) fn unlock(&self, offset: usize, len: usize) {
        self.check(offset, len).unwrap();
        // SAFETY: as for `lock`.
        unsafe { rustix::mm::munlock(pointer(self.address + offset), len).unwrap() };
    }

    /// Makes a hole: the kernel then answers `ENOMEM` to a release that spans it. Nobody may touch it afterwards.
    #[cfg(test)]
    pub(crate) fn unmap(&self, offset: usize, len: usize) {
        self.check(offset, len).unwrap();
        // SAFETY: the part lies in this mapping, and the test that asks for this does not touch it.
        unsafe { rustix::mm::munmap(pointer(self.address + offset), len).unwrap() };
    }

    /// Number of resident bytes (mincore(2)).
    #[cfg(test)]
    pub(crate) fn resident(&self) -> usize {
        self.resident_part(0, self.len).unwrap()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping. Everyone who was given the address has promised not to use it any more.
        let unmapped = unsafe { rustix::mm::munmap(pointer(self.address), self.len) };
        debug_assert_eq!(unmapped, Ok(()), "munmap of a whole mapping");
    }
}

impl MappingKind {
    const fn flags(self) -> MapFlags {
        match self {
            Self::Small => MapFlags::NORESERVE,
            Self::Huge => MapFlags::HUGETLB.union(MapFlags::HUGE_2MB),
        }
    }
}

/// The advice that discards pages of files or of anonymous memory: for files `MADV_DONTNEED` would drop the
/// translations and keep the pages.
pub(crate) const fn drop_advice(shared: bool) -> Advice {
    if shared {
        Advice::LinuxRemove
    } else {
        Advice::LinuxDontNeed
    }
}

const fn release_advice(how: Release, shared: bool) -> Advice {
    match how {
        Release::Discard => drop_advice(shared),
        Release::MarkFree => Advice::LinuxFree,
    }
}

fn pointer(address: usize) -> *mut c_void {
    ptr::with_exposed_provenance_mut(address)
}

/// Maps private anonymous memory. With `MAP_FIXED`, `address` must lie in a reservation of the caller.
fn map(address: usize, len: usize, prot: ProtFlags, flags: MapFlags) -> Result<usize, Errno> {
    let flags = flags | MapFlags::PRIVATE;
    // SAFETY: without MAP_FIXED the kernel picks an unused place; with it the callers in this file name a part of a
    // reservation that they have just made, whose address nobody else has.
    let pointer = unsafe { rustix::mm::mmap_anonymous(pointer(address), len, prot, flags)? };
    Ok(pointer.expose_provenance())
}

/// Maps a new file over a reservation of the caller. The file is deleted with the mapping.
fn map_file(address: usize, len: usize, kind: MappingKind) -> io::Result<()> {
    let (of_file, of_map) = match kind {
        MappingKind::Small => (MemfdFlags::empty(), MapFlags::NORESERVE),
        MappingKind::Huge => (
            MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            MapFlags::empty(),
        ),
    };
    let file: OwnedFd = rustix::fs::memfd_create("ebb-guest", of_file | MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, len as u64)?;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = of_map | MapFlags::SHARED | MapFlags::FIXED;
    // SAFETY: the caller has just made the reservation, and nobody else has its address.
    unsafe { rustix::mm::mmap(pointer(address), len, prot, flags, &file, 0)? };
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::overlay::MAX_CUTS;

    #[test]
    fn the_address_is_congruent_and_the_length_exact() {
        for (len, at) in [
            (4096, 0),
            (3 << 20, 0x1000),
            (8 << 20, 0x10_0000),
            (2 << 20, 5 << 21),
        ] {
            let mapping = Mapping::new(len, at, MappingKind::Small).unwrap();
            assert_eq!(mapping.len(), len);
            let want = usize::try_from(at).unwrap() % HUGE_PAGE;
            assert_eq!(mapping.address() % HUGE_PAGE, want, "{len:#x} {at:#x}");
            mapping.populate().unwrap();
        }
    }

    #[test]
    fn what_is_released_of_a_file_reads_zero_and_not_the_file() {
        const BLOCK: usize = HUGE_PAGE;
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &vec![7; 3 * BLOCK]).unwrap();
        let mut mapping = Mapping::new(4 * BLOCK, 0, MappingKind::Small).unwrap();
        mapping
            .map_private((BLOCK, 3 * BLOCK), file.as_fd(), 0, false)
            .unwrap();
        let byte = |at: usize| {
            let byte = ptr::with_exposed_provenance_mut::<u8>(mapping.address() + at);
            // SAFETY: it lies in the mapping.
            unsafe { AtomicU8::from_ptr(byte) }
        };
        let read = |at: usize| byte(at).load(Ordering::Relaxed);
        assert_eq!([0, BLOCK, 4 * BLOCK - 1].map(read), [0, 7, 7]);
        byte(BLOCK).store(9, Ordering::Relaxed);
        let release = |offset, len| mapping.release(offset, len, Release::Discard).unwrap();
        // A page of one block, and a whole block with the page before it.
        release(BLOCK + SMALL_PAGE, SMALL_PAGE);
        release(3 * BLOCK - SMALL_PAGE, BLOCK + SMALL_PAGE);
        let at = [BLOCK, BLOCK + SMALL_PAGE, BLOCK + 2 * SMALL_PAGE];
        assert_eq!(at.map(read), [9, 0, 7]);
        let at = [3 * BLOCK - 2 * SMALL_PAGE, 3 * BLOCK - 1, 4 * BLOCK - 1];
        assert_eq!(at.map(read), [7, 0, 0]);
        byte(4 * BLOCK - 1).store(5, Ordering::Relaxed);
        release(3 * BLOCK, BLOCK);
        assert_eq!(read(4 * BLOCK - 1), 0);
        // A guest that frees single pages here and there does not use up the mappings of the process.
        let cut = |at: usize| mapping.release(at, SMALL_PAGE, Release::Discard);
        cut(2 * BLOCK - SMALL_PAGE).unwrap();
        let overlay = mapping.overlay.as_ref().unwrap();
        overlay.cuts.store(MAX_CUTS, Ordering::Relaxed);
        let error = cut(BLOCK + 4 * SMALL_PAGE).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        // What is cut out already is released as any other memory.
        byte(2 * BLOCK - 1).store(5, Ordering::Relaxed);
        cut(2 * BLOCK - SMALL_PAGE).unwrap();
        assert_eq!(read(2 * BLOCK - 1), 0);
        mapping.free(0, 4 * BLOCK).unwrap();
        assert_eq!(read(BLOCK), 7, "the file's");
        byte(BLOCK).store(9, Ordering::Relaxed);
        let process = rustix::process::pidfd_open(
            rustix::process::getpid(),
            rustix::process::PidfdFlags::empty(),
        );
        let parts = [(BLOCK, SMALL_PAGE), (0, SMALL_PAGE)];
        let done = mapping.release_parts(process.unwrap().as_fd(), &parts, Release::Discard);
        assert!(done.is_err() && read(BLOCK) == 9);
        assert!(file.metadata().unwrap().len() == 3 * BLOCK as u64);
    }

    #[test]
    fn several_parts_in_one_call_where_the_kernel_has_it() {
        let mapping = Mapping::new(8 << 12, 0, MappingKind::Small).unwrap();
        mapping.populate().unwrap();
        let process = rustix::process::pidfd_open(
            rustix::process::getpid(),
            rustix::process::PidfdFlags::empty(),
        );
        let process = process.unwrap();
        let parts = [(0, 4096), (3 << 12, 2 << 12)];
        match mapping.release_parts(process.as_fd(), &parts, Release::Discard) {
            Ok(bytes) => {
                assert_eq!((bytes, mapping.resident()), (3 << 12, 5 << 12));
                println!("process_madvise on this process works");
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{error}"),
        }
        let outside = [(0, 4096), (7 << 12, 2 << 12)];
        let result = mapping.release_parts(process.as_fd(), &outside, Release::MarkFree);
        assert!(result.is_err() && mapping.resident() >= 5 << 12);
    }

    #[test]
    fn invalid_sizes_and_parts_outside_are_refused() {
        for (len, at) in [
            (0, 0),
            (1, 0),
            (4096, 1),
            (usize::MAX, 0),
            (usize::MAX - 4095, 0),
        ] {
            assert!(
                Mapping::new(len, at, MappingKind::Small).is_err(),
                "{len:#x} {at:#x}"
            );
        }
        assert!(Mapping::new(4096, 0, MappingKind::Huge).is_err());
        let mapping = Mapping::new(8192, 0, MappingKind::Small).unwrap();
        for (offset, len) in [(4096, 8192), (12288, 0), (usize::MAX, 2)] {
            assert!(
                mapping.release(offset, len, Release::Discard).is_err(),
                "{offset} {len}"
            );
        }
    }
}
