//! The slots of an arena: each process that uses it holds the lock of one, which the kernel releases when it dies.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Number of slots, and so of processes that can use an arena at the same time.
pub const SLOTS: usize = 1024;

/// Owner of a granule: a slot, and the incarnation of the slot's process. The word 0 means no owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner(u64);

impl Owner {
    const SLOT_BITS: u32 = 16;

    const fn new(slot: usize, incarnation: u64) -> Self {
        Self(incarnation << Self::SLOT_BITS | (slot as u64 + 1))
    }

    /// The word that stands in memory.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The owner that a word in memory names.
    pub const fn from_raw(raw: u64) -> Option<Self> {
        let slot = raw & ((1 << Self::SLOT_BITS) - 1);
        if slot == 0 { None } else { Some(Self(raw)) }
    }

    /// Index of the slot.
    pub const fn slot(self) -> usize {
        (self.0 & ((1 << Self::SLOT_BITS) - 1)) as usize - 1
    }
}

/// A slot that this process has locked, by an open file description lock.
#[derive(Debug)]
pub struct Slot {
    index: usize,
    owner: Owner,
}

impl Slot {
    /// Locks slot `index` through `file`. Returns `None` if another process holds it.
    pub fn lock(file: &File, index: usize) -> io::Result<Option<Self>> {
        match set_lock(file, index, libc::F_WRLCK) {
            Ok(()) => Ok(Some(Self {
                index,
                owner: Owner::new(index, 0),
            })),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Locks the first free slot. Returns `None` if all are held.
    pub fn lock_any(file: &File) -> io::Result<Option<Self>> {
        for index in 0..SLOTS {
            if let Some(slot) = Self::lock(file, index)? {
                return Ok(Some(slot));
            }
        }
        Ok(None)
    }

    /// Sets the incarnation, which tells this process from earlier ones in the slot.
    pub const fn set_incarnation(&mut self, incarnation: u64) {
        self.owner = Owner::new(self.index, incarnation);
    }

    /// Index of the slot.
    pub const fn index(&self) -> usize {
        self.index
    }

    /// The owner of this process's granules.
    pub const fn owner(&self) -> Owner {
        self.owner
    }

    /// Unlocks the slot.
    pub fn unlock(self, file: &File) -> io::Result<()> {
        set_lock(file, self.index, libc::F_UNLCK)
    }
}

/// Locks or unlocks the byte that stands for slot `index`: fcntl(2), "open file description locks".
fn set_lock(file: &File, index: usize, kind: libc::c_int) -> io::Result<()> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: index as libc::off_t,
        l_len: 1,
        // Must be 0 for this kind of lock.
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the structure lives across the call.
    let done = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
