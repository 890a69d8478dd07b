//! Memory that its owner reaches by address only: private and anonymous, or files that have no name.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Size in bytes of the pages that the kernel hands out when nothing bigger is asked for.
const SMALL_PAGE: usize = 4096;

/// Size in bytes of a huge page of the kind that [`MappingKind::Huge`] asks for.
pub const HUGE_PAGE: usize = 2 << 20;

/// Most parts in one call (`UIO_MAXIOV`).
pub const MAX_PARTS: usize = 1024;

/// What stands behind a [`Mapping`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappingKind {
    /// Pages on first touch, not reserved beforehand (`MAP_NORESERVE`).
    Small,
    /// hugetlb pages of 2 MiB, reserved by the mapping call, so that a lack of them is an error there
    /// and not a SIGBUS later.
    Huge,
}

/// Advice for a part of a [`Mapping`], see madvise(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Drop the pages; the next touch reads zeroes. `MADV_DONTNEED`, and `MADV_REMOVE` for files, where the former
    /// drops the translations and keeps the pages.
    DontNeed,
    /// Let the kernel drop the pages when it is short of memory; a write to a page cancels that. Private
    /// anonymous memory only.
    Free,
    /// Use transparent huge pages; for files only where the host's `shmem_enabled` says `advise`.
    HugePage,
    /// Use no transparent huge pages.
    NoHugePage,
    /// Leave it out of core dumps.
    DontDump,
    /// Populate it for writing (Linux 5.14).
    PopulateWrite,
}

/// A mapping, readable and writable, unmapped on drop. It never lends references to
/// its bytes, so dropping pages under other users, who can only hold the address, breaks no rule of Rust.
#[derive(Debug)]
pub struct Mapping {
    address: usize,
    len: usize,
    /// Files are behind it, and nobody else has them open.
    shared: bool,
}

impl Mapping {
    /// Maps `len` bytes of private anonymous memory at an address that is congruent to `congruent_to` modulo 2 MiB, so
    /// that what is one huge page to the guest can be one to the host. Both numbers are multiples of the page size,
    /// of 2 MiB for [`MappingKind::Huge`].
    ///
    /// # Errors
    /// mmap(2)'s; `EINVAL` for sizes that are 0, not aligned, or beyond the address space.
    pub fn new(len: usize, congruent_to: u64, kind: MappingKind) -> io::Result<Self> {
        let mapping = Self::reserve(len, congruent_to, kind)?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, kind.flags());
        map(mapping.address, len, prot, flags | MapFlags::FIXED)?;
        Ok(mapping)
    }

    /// The same of memory that other processes could share: memfds of `file` bytes each, a multiple of 2 MiB. One ends
    /// and the next begins where `congruent_to` plus the offset is a multiple of `file`, so that the files are those
    /// of the guest's address space. They have no name, and stay open as long as they are mapped.
    ///
    /// # Errors
    /// As for [`Mapping::new`], and memfd_create(2)'s.
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

    /// Addresses for a mapping, with nothing behind them.
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
        // From here on the reservation is owned and goes away with `reserved` when a step fails.
        let mut reserved = Self {
            address: base,
            len: reserve,
            shared: false,
        };
        let below = base.next_multiple_of(HUGE_PAGE) - base;
        let head = (below + offset) % HUGE_PAGE;
        reserved.trim(head, len)?;
        Ok(reserved)
    }

    /// Unmaps everything but `len` bytes from `head` on.
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

    /// Whether files are behind it.
    #[must_use]
    pub const fn is_shared(&self) -> bool {
        self.shared
    }

    const fn raw(&self, advice: Advice) -> rustix::mm::Advice {
        match advice {
            Advice::DontNeed => drop_advice(self.shared),
            Advice::Free => rustix::mm::Advice::LinuxFree,
            Advice::HugePage => rustix::mm::Advice::LinuxHugepage,
            Advice::NoHugePage => rustix::mm::Advice::LinuxNoHugepage,
            Advice::DontDump => rustix::mm::Advice::LinuxDontDump,
            Advice::PopulateWrite => rustix::mm::Advice::LinuxPopulateWrite,
        }
    }

    /// Gives `advice` for `len` bytes from `offset` on.
    ///
    /// # Errors
    /// madvise(2)'s; `EINVAL` also for a part that leaves the mapping.
    pub fn advise(&self, offset: usize, len: usize, advice: Advice) -> io::Result<()> {
        self.check(offset, len)?;
        // SAFETY: the part lies in this mapping. No advice of ours unmaps anything; the one that changes
        // content changes bytes that nobody holds references to.
        unsafe { rustix::mm::madvise(pointer(self.address + offset), len, self.raw(advice))? };
        Ok(())
    }

    /// Gives `advice` for several parts, each an offset and a length, in one system call, and returns how
    /// many bytes, in order, were taken care of: what comes after a part that fails is not looked at.
    ///
    /// # Errors
    /// process_madvise(2)'s when not even the first part was taken care of; `EINVAL` also for a part that
    /// leaves the mapping. Kernels before 6.13 refuse with `EINVAL` what changes content.
    pub fn advise_parts(
        &self,
        process: BorrowedFd<'_>,
        parts: &[(usize, usize)],
        advice: Advice,
    ) -> io::Result<usize> {
        let vector = |&(offset, len): &(usize, usize)| {
            self.check(offset, len)?;
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
        // SAFETY: as in `advise`; the descriptor is that of this process or the call fails or concerns
        // addresses of another one, which is memory safe here. The vector lives across the call.
        let done = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                process.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len(),
                self.raw(advice) as libc::c_int,
                0,
            )
        };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
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
    /// madvise(2)'s, for instance `ENOMEM` and `EFAULT` when the host has too few pages.
    pub fn populate(&self) -> io::Result<()> {
        self.populate_part(0, self.len)
    }

    /// Populates `len` bytes from `offset` on for writing; content that is there stays. Kernels before 5.14
    /// have no advice for it: there every page is touched.
    ///
    /// # Errors
    /// madvise(2)'s; `EINVAL` also for a part that leaves the mapping.
    pub fn populate_part(&self, offset: usize, len: usize) -> io::Result<()> {
        match self.advise(offset, len, Advice::PopulateWrite) {
            Err(error)
                if error.raw_os_error() == Some(libc::EINVAL)
                    && offset.checked_add(len).is_some_and(|end| end <= self.len) =>
            {
                let start = self.address + offset;
                for address in (start..start + len).step_by(SMALL_PAGE) {
                    let byte = ptr::with_exposed_provenance_mut::<u8>(address);
                    // SAFETY: the byte lies in this mapping, which is readable and writable; others
                    // reach it by volatile or atomic accesses only, as they hold no references.
                    unsafe { AtomicU8::from_ptr(byte) }.fetch_or(0, Ordering::Relaxed);
                }
                Ok(())
            }
            result => result,
        }
    }

    /// Whether there is a page behind the byte at `offset`, by mincore(2).
    ///
    /// # Errors
    /// mincore(2)'s; `EINVAL` also for an offset outside of the mapping.
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

    /// Locks a part in memory (mlock(2)): advice that drops its pages is refused with `EINVAL` then.
    #[cfg(test)]
    pub(crate) fn lock(&self, offset: usize, len: usize) {
        self.check(offset, len).unwrap();
        // SAFETY: the part lies in this mapping; nothing changes but where its pages may go.
        unsafe { rustix::mm::mlock(pointer(self.address + offset), len).unwrap() };
    }

    /// Undoes [`Mapping::lock`].
    #[cfg(test)]
    pub(crate) fn unlock(&self, offset: usize, len: usize) {
        self.check(offset, len).unwrap();
        // SAFETY: as for `lock`.
        unsafe { rustix::mm::munlock(pointer(self.address + offset), len).unwrap() };
    }

    /// Makes a hole: advice for what is around it is answered with `ENOMEM` then. Nobody may touch it afterwards.
    #[cfg(test)]
    pub(crate) fn unmap(&self, offset: usize, len: usize) {
        self.check(offset, len).unwrap();
        // SAFETY: the part lies in this mapping, and the test that asks for it keeps away from it.
        unsafe { rustix::mm::munmap(pointer(self.address + offset), len).unwrap() };
    }

    /// How many bytes the host holds, by mincore(2).
    #[cfg(test)]
    pub(crate) fn resident(&self) -> usize {
        let mut pages = vec![0u8; self.len / SMALL_PAGE];
        // SAFETY: the vector has one byte for each page of this mapping, and nothing else is written.
        let rc = unsafe { libc::mincore(pointer(self.address), self.len, pages.as_mut_ptr()) };
        assert_eq!(rc, 0, "{}", io::Error::last_os_error());
        pages.iter().filter(|&&page| page & 1 == 1).count() * SMALL_PAGE
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping. Whoever was given the address has promised to be gone.
        let unmapped = unsafe { rustix::mm::munmap(pointer(self.address), self.len) };
        debug_assert_eq!(unmapped, Ok(()), "a mapping that we made can be unmapped");
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

/// The advice that drops pages, of files or of anonymous memory.
pub(super) const fn drop_advice(shared: bool) -> rustix::mm::Advice {
    if shared {
        rustix::mm::Advice::LinuxRemove
    } else {
        rustix::mm::Advice::LinuxDontNeed
    }
}

fn pointer(address: usize) -> *mut c_void {
    ptr::with_exposed_provenance_mut(address)
}

/// Maps private anonymous memory; with `MAP_FIXED` only over a reservation of our own.
fn map(address: usize, len: usize, prot: ProtFlags, flags: MapFlags) -> Result<usize, Errno> {
    let flags = flags | MapFlags::PRIVATE;
    // SAFETY: without MAP_FIXED the kernel picks an unused place; with it the callers in this file name
    // a part of a reservation that they have just made and that nobody else knows.
    let pointer = unsafe { rustix::mm::mmap_anonymous(pointer(address), len, prot, flags)? };
    Ok(pointer.expose_provenance())
}

/// Maps a file of its own over a reservation of ours. The file goes with the mapping.
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
    // SAFETY: the caller has just made the reservation, and nobody else knows it.
    unsafe { rustix::mm::mmap(pointer(address), len, prot, flags, &file, 0)? };
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

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
    fn several_parts_in_one_call_where_the_kernel_has_it() {
        let mapping = Mapping::new(8 << 12, 0, MappingKind::Small).unwrap();
        mapping.populate().unwrap();
        let process = rustix::process::pidfd_open(
            rustix::process::getpid(),
            rustix::process::PidfdFlags::empty(),
        );
        let process = process.unwrap();
        let parts = [(0, 4096), (3 << 12, 2 << 12)];
        match mapping.advise_parts(process.as_fd(), &parts, Advice::DontNeed) {
            Ok(bytes) => {
                assert_eq!((bytes, mapping.resident()), (3 << 12, 5 << 12));
                println!("process_madvise on this process works");
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{error}"),
        }
        let outside = [(0, 4096), (7 << 12, 2 << 12)];
        let result = mapping.advise_parts(process.as_fd(), &outside, Advice::Free);
        assert!(result.is_err() && mapping.resident() >= 5 << 12);
    }

    #[test]
    fn senseless_sizes_and_parts_outside_are_refused() {
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
                mapping.advise(offset, len, Advice::DontNeed).is_err(),
                "{offset} {len}"
            );
        }
    }
}
