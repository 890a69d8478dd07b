//! Pieces of memory that a file is read into or written from.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;

use super::Action;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Bytes of the memory that zeroes are written from.
const ZEROES: usize = 64 << 10;

/// Memory at an address that suits direct I/O.
#[repr(align(4096))]
struct Zeroes([u8; ZEROES]);

static ZERO: Zeroes = Zeroes([0; ZEROES]);

/// The address is not guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outside;

/// Pieces of guest memory, or zeroes. Guest memory stays mapped for as long as it is named here.
#[derive(Default)]
pub struct Pieces {
    vectors: Vec<libc::iovec>,
    bytes: usize,
    memory: Option<Arc<GuestMemoryMmap>>,
}

// SAFETY: the pointers lead to guest memory, which `memory` keeps mapped and to which there are no references, or to a static
// that is only read. Neither belongs to a thread.
unsafe impl Send for Pieces {}

impl Pieces {
    /// Begins anew with pieces of `memory`; the room for them is kept.
    pub fn begin(&mut self, memory: &Arc<GuestMemoryMmap>) {
        self.clear();
        self.memory = Some(Arc::clone(memory));
    }

    /// Forgets all pieces, and the memory.
    pub fn clear(&mut self) {
        self.vectors.clear();
        self.bytes = 0;
        self.memory = None;
    }

    /// Adds guest memory.
    ///
    /// # Errors
    /// [`Outside`], also without [`begin`](Self::begin).
    pub fn push(&mut self, addr: u64, len: usize) -> Result<(), Outside> {
        let memory = self.memory.as_deref().ok_or(Outside)?;
        for slice in memory.get_slices(GuestAddress(addr), len) {
            let slice = slice.map_err(|_| Outside)?;
            self.vectors.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
        self.bytes += len;
        Ok(())
    }

    /// Becomes `bytes` zeroes, to be written only; at most 16 MiB of them.
    pub fn become_zeroes(&mut self, bytes: usize) {
        self.clear();
        self.bytes = bytes.min(ZEROES * 256);
        let mut left = self.bytes;
        while left > 0 {
            let len = left.min(ZEROES);
            self.vectors.push(libc::iovec {
                iov_base: ptr::from_ref(&ZERO.0).cast_mut().cast(),
                iov_len: len,
            });
            left -= len;
        }
    }

    /// Number of bytes in all pieces.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns true if every piece begins at a multiple of `address` bytes and is a multiple of `len` bytes long. Both are
    /// powers of two.
    #[must_use]
    pub fn is_aligned(&self, address: usize, len: usize) -> bool {
        let odd = |it: &libc::iovec| {
            it.iov_base.addr() & (address - 1) != 0 || it.iov_len & (len - 1) != 0
        };
        !self.vectors.iter().any(odd)
    }

    /// Returns true if there is nothing that must not be written.
    fn is_guest_memory(&self) -> bool {
        self.memory.is_some() || self.vectors.is_empty()
    }

    /// For the kernel: address and number of the list for `action`. It holds until the pieces change.
    pub(super) fn list(&self, action: Action) -> (*const libc::iovec, u32) {
        let count = match action {
            Action::Read if !self.is_guest_memory() => 0,
            // At most 1024: the kernel refuses more.
            _ => self.vectors.len() as u32,
        };
        (self.vectors.as_ptr(), count)
    }

    /// Reads from `at` on; what preadv2(2) returns with `flags`.
    ///
    /// # Errors
    /// preadv2(2)'s. Nothing is read over zeroes.
    pub(super) fn read(&self, file: &File, at: u64, flags: i32) -> io::Result<usize> {
        let (list, count) = self.list(Action::Read);
        let count = count.cast_signed();
        // SAFETY: the list is as long as it is said to be. Each piece is guest memory that stays mapped until this returns,
        // and to which there are no references.
        let moved =
            unsafe { libc::preadv2(file.as_raw_fd(), list, count, at.cast_signed(), flags) };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// Writes from `at` on; what pwritev(2) returns.
    ///
    /// # Errors
    /// pwritev(2)'s.
    pub(super) fn write(&self, file: &File, at: u64) -> io::Result<usize> {
        let (list, count) = self.list(Action::Write);
        let count = count.cast_signed();
        // SAFETY: as for `read`; the kernel reads the pieces only.
        let moved = unsafe { libc::pwritev(file.as_raw_fd(), list, count, at.cast_signed()) };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }
}
