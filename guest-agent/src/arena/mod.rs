//! The arena from a guest's process: granules are claimed, freed lazily, reused and released.
//!
//! Several processes may share an arena. Each holds a slot in the guest's room, locked by an open file description lock
//! that the kernel releases when the process dies, however it dies; each granule has an owner there. What a dead process
//! owned is free again after the next [`Arena::recover`], which [`Arena::claim`] makes by itself when it finds nothing.
//! Processes that share an arena can read and write each other's granules: they must trust each other.

mod call;
mod memory;
mod slots;
mod span;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ebb_hypercall_abi::arena::{GENERATION, Header, HeaderError, Layout, ROOM_BASE};
use ebb_hypercall_abi::granule::{State, Word};
use ebb_hypercall_abi::shared_word;

use call::Caller;
use memory::Memory;
use slots::{Owner, SLOTS, Slot};

/// Turns that a reuse spins before it makes the call, or sleeps.
const SPINS: u32 = 200;
/// Sleep between two looks at a granule that is being discarded, which takes about a millisecond, where no call can be made.
const NAP: Duration = Duration::from_micros(50);

/// An arena cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such device.
    #[error(
        "{path}: there is no such device; run `ebb-guest setup` as root, in a machine with --arena"
    )]
    Missing {
        /// The device.
        path: PathBuf,
    },
    /// The user may not use it.
    #[error(
        "{path}: permission denied; run `ebb-guest setup --mode 0666` as root, or join the device's group"
    )]
    Permission {
        /// The device.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{path}: {what} failed: {source}")]
    Call {
        /// The device.
        path: PathBuf,
        /// What was done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// It holds no arena that is known here.
    #[error("{path}: {source}")]
    Header {
        /// The device.
        path: PathBuf,
        /// What is wrong with it.
        source: HeaderError,
    },
    /// Every slot is taken.
    #[error("{path}: {SLOTS} processes use it already; end one of them, or add another --arena")]
    Full {
        /// The device.
        path: PathBuf,
    },
}

impl OpenError {
    fn call(path: &Path, what: &'static str) -> impl Fn(io::Error) -> Self {
        let path = path.to_owned();
        move |source| {
            let path = path.clone();
            match source.kind() {
                io::ErrorKind::NotFound => Self::Missing { path },
                io::ErrorKind::PermissionDenied => Self::Permission { path },
                _ => Self::Call { path, what, source },
            }
        }
    }
}

/// The granules of an arena by what they are, as of one look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// All behind the head.
    pub granules: u64,
    /// Owned by a process, living or dead.
    pub owned: u64,
    /// In use by their words.
    pub in_use: u64,
    /// Lazily free, with their content.
    pub lazy: u64,
    /// Being discarded by the monitor.
    pub reclaiming: u64,
    /// Taken by the host.
    pub discarded: u64,
}

/// An arena, mapped, with this process in one of its slots. The slot and all granules are given back on drop.
pub struct Arena {
    path: PathBuf,
    memory: Memory,
    header: Header,
    layout: Layout,
    slot: Slot,
    caller: Caller,
    /// Where the next claim begins to look.
    hint: AtomicUsize,
    /// One thread at a time tidies up after the dead.
    recovering: Mutex<()>,
}

/// Maps the arena at `path` and checks its header.
fn map(path: &Path, file: &File) -> Result<(Memory, Header, Layout), OpenError> {
    let failed = |what| OpenError::call(path, what);
    let size = memory::size(file).map_err(failed("finding out the size"))?;
    let memory = Memory::map(file, size).map_err(failed("mmap"))?;
    let header = Header::from_words(std::array::from_fn(|n| {
        memory.word(n * 8).load(Ordering::Acquire)
    }));
    let layout = header
        .check(size as u64)
        .map_err(|source| OpenError::Header {
            path: path.to_owned(),
            source,
        })?;
    Ok((memory, header, layout))
}

fn open(path: &Path) -> Result<File, OpenError> {
    let file = File::options().read(true).write(true).open(path);
    file.map_err(OpenError::call(path, "open"))
}

impl Arena {
    /// Maps the arena of a device, `/dev/daxN.M`, and takes a slot in it.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let file = open(path)?;
        let (memory, header, layout) = map(path, &file)?;
        let arena = |slot| Self {
            path: path.to_owned(),
            memory,
            header,
            layout,
            slot,
            caller: Caller::probe(),
            hint: AtomicUsize::new(0),
            recovering: Mutex::new(()),
        };
        let slot = Slot::take(&file).map_err(OpenError::call(path, "locking a slot"))?;
        let mut arena = arena(slot.ok_or_else(|| OpenError::Full {
            path: path.to_owned(),
        })?);
        // Whoever had the slot before may have died. The lock makes it ours to tidy up.
        arena.release_all_of(arena.slot.index());
        let incarnation = arena
            .slot_word(arena.slot.index())
            .fetch_add(1, Ordering::AcqRel)
            + 1;
        arena.slot.begin(incarnation);
        // From here on the mapping keeps the lock: a program may close all its descriptors, and a child gets none.
        drop(file);
        Ok(arena)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.header.name()
    }

    /// Its size in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.layout.size()
    }

    /// Bytes of a granule.
    #[must_use]
    pub const fn granule_size(&self) -> usize {
        self.layout.granule() as usize
    }

    const fn first(&self) -> usize {
        self.layout.first() as usize
    }

    const fn granules(&self) -> usize {
        self.layout.granules() as usize
    }

    /// The first word of a slot counts its processes.
    fn slot_word(&self, slot: usize) -> &std::sync::atomic::AtomicU64 {
        self.memory
            .word(self.layout.room() as usize + slot * (ROOM_BASE as usize / SLOTS))
    }

    fn owner(&self, granule: usize) -> &std::sync::atomic::AtomicU64 {
        self.memory
            .word((self.layout.room() + ROOM_BASE) as usize + granule * 8)
    }

    fn word(&self, granule: usize) -> &std::sync::atomic::AtomicU64 {
        self.memory.word(self.layout.table() as usize + granule * 8)
    }

    /// The free half of the fast path: one load of the generation, one of the word, one compare-and-swap.
    fn free_word(&self, granule: usize) {
        let generation = self
            .memory
            .word(GENERATION as usize)
            .load(Ordering::Relaxed);
        // It fails only where the granule is free already, or somebody scribbles over the table.
        shared_word::free(self.word(granule), generation);
    }

    /// The other half; the state that it was in.
    fn reuse_word(&self, granule: usize) -> State {
        let mut turns = 0;
        shared_word::reuse(self.word(granule), || {
            turns += 1;
            if turns < SPINS {
                std::hint::spin_loop();
            } else {
                self.wait(granule);
            }
        })
    }

    /// Lets the monitor end what it does with a granule. After a call it is in use; nobody says then which of its pages are zero.
    #[cold]
    fn wait(&self, granule: usize) {
        let size = self.layout.granule();
        if !self
            .caller
            .reuse(self.header.gpa.wrapping_add(granule as u64 * size), size)
        {
            std::thread::sleep(NAP);
        }
    }

    /// Claims a granule that nobody owns: it is zero. `None`: there is none, even after [`Arena::recover`].
    #[must_use]
    pub fn claim(&self) -> Option<Granule<'_>> {
        self.find().or_else(|| {
            let recovered = self.recover().unwrap_or(0);
            (recovered > 0).then(|| self.find()).flatten()
        })
    }

    fn find(&self) -> Option<Granule<'_>> {
        let (first, len) = (self.first(), self.granules() - self.first());
        let start = self.hint.load(Ordering::Relaxed);
        let order = (0..len).map(|offset| first + (start + offset) % len);
        for index in order {
            if !self.own(index) {
                continue;
            }
            self.hint.store(index - first + 1, Ordering::Relaxed);
            let fresh = self.word(index).load(Ordering::Relaxed) == 0;
            let state = self.reuse_word(index);
            let mut granule = Granule { arena: self, index };
            if !fresh && state != State::Discarded {
                granule.bytes().fill(0);
            }
            return Some(granule);
        }
        None
    }

    /// Makes a granule ours that nobody owns; whether it was so.
    fn own(&self, index: usize) -> bool {
        let (owner, me) = (self.owner(index), self.slot.owner().raw());
        let (success, failure) = (Ordering::AcqRel, Ordering::Relaxed);
        owner.load(Ordering::Relaxed) == 0
            && owner.compare_exchange(0, me, success, failure).is_ok()
    }

    /// Frees granule `index`, whose owner is `owner`, for good.
    fn release(&self, index: usize, owner: u64) {
        // The word first: as soon as there is no owner, somebody else may claim it.
        self.free_word(index);
        // It fails only where somebody scribbles over the room.
        let _ = self
            .owner(index)
            .compare_exchange(owner, 0, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Frees all granules of a slot whose lock we hold; how many there were.
    fn release_all_of(&self, slot: usize) -> usize {
        let mut released = 0;
        for index in self.first()..self.granules() {
            let owner = self.owner(index).load(Ordering::Acquire);
            if Owner::from_raw(owner).is_some_and(|owner| owner.slot() == slot) {
                self.release(index, owner);
                released += 1;
            }
        }
        released
    }

    /// Frees what dead processes own; how many granules that were.
    ///
    /// # Errors
    /// The device cannot be opened again.
    pub fn recover(&self) -> io::Result<usize> {
        let _turn = self
            .recovering
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let file = File::options().read(true).write(true).open(&self.path)?;
        let mut owners = [false; SLOTS];
        for index in self.first()..self.granules() {
            let owner = Owner::from_raw(self.owner(index).load(Ordering::Acquire));
            if let Some(there) = owner.and_then(|owner| owners.get_mut(owner.slot())) {
                *there = true;
            }
        }
        owners[self.slot.index()] = false;
        let mut released = 0;
        for slot in (0..SLOTS).filter(|slot| owners[*slot]) {
            // Whoever has died holds no lock.
            if let Some(dead) = Slot::lock(&file, slot)? {
                released += self.release_all_of(dead.index());
                dead.unlock(&file)?;
            }
        }
        Ok(released)
    }

    /// Counts the granules.
    #[must_use]
    pub fn census(&self) -> Census {
        let mut census = Census::default();
        for index in self.first()..self.granules() {
            census.granules += 1;
            census.owned += u64::from(self.owner(index).load(Ordering::Relaxed) != 0);
            let word = Word::from_raw(self.word(index).load(Ordering::Relaxed));
            let count = match word.state() {
                Some(State::Lazy) => &mut census.lazy,
                Some(State::Reclaiming) => &mut census.reclaiming,
                Some(State::Discarded) => &mut census.discarded,
                Some(State::InUse) | None => &mut census.in_use,
            };
            *count += 1;
        }
        census
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // Its granules borrow the arena, so only forgotten ones are left. The lock goes with the mapping.
        self.release_all_of(self.slot.index());
    }
}

/// A granule in use. Nobody else has it. Released on drop: then it is free for every process.
pub struct Granule<'a> {
    arena: &'a Arena,
    index: usize,
}

impl<'a> Granule<'a> {
    /// Its memory.
    pub fn bytes(&mut self) -> &mut [u8] {
        let size = self.arena.granule_size();
        // The owner's word says that it is ours, and this value is the only one that has it.
        self.arena.memory.bytes(self.index * size, size)
    }

    /// Frees it: from now on the host may take its memory. No call, no system call, no fault.
    #[must_use = "when this is dropped the granule goes back to all processes"]
    pub fn lazy_free(self) -> LazyGranule<'a> {
        let (arena, index) = (self.arena, self.index);
        std::mem::forget(self);
        arena.free_word(index);
        LazyGranule { arena, index }
    }
}

impl Drop for Granule<'_> {
    fn drop(&mut self) {
        self.arena
            .release(self.index, self.arena.slot.owner().raw());
    }
}

/// A granule that is lazily free but still ours. Released on drop.
pub struct LazyGranule<'a> {
    arena: &'a Arena,
    index: usize,
}

impl<'a> LazyGranule<'a> {
    /// Takes it back; waits while the monitor discards it, about a millisecond. Each page holds what it held, or zeroes:
    /// the second is true of all of them when the answer's second half is.
    #[must_use]
    pub fn reuse(self) -> (Granule<'a>, bool) {
        let (arena, index) = (self.arena, self.index);
        std::mem::forget(self);
        let state = arena.reuse_word(index);
        (Granule { arena, index }, state == State::Discarded)
    }
}

impl Drop for LazyGranule<'_> {
    fn drop(&mut self) {
        self.arena
            .release(self.index, self.arena.slot.owner().raw());
    }
}

#[cfg(test)]
mod tests;
