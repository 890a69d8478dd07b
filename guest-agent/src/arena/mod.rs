//! How processes of a guest use an arena: they claim, free, reuse and release granules.
//!
//! Several processes can share an arena. Each locks a slot by an open file description lock, which the kernel releases
//! when the process dies. An owner word for each granule names the slot of its owner. Slots and owner words lie in the
//! part of the arena's head that the monitor leaves to the guest (the room, see `hypercall-abi/src/arena.rs`).
//! [`Arena::recover`] releases what dead processes own; a claim calls it when no granule is free.
//!
//! Processes that share an arena can read and write each other's granules, so they must trust each other.

mod by_index;
mod error;
mod granule;
mod hypercall;
mod mapping;
mod slots;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ebb_hypercall_abi::arena::{GENERATION, Header, Layout, ROOM_BASE};
use ebb_hypercall_abi::granule::{State, Word};
use ebb_hypercall_abi::shared_word;

pub use error::OpenError;
pub use granule::{Granule, LazyGranule};
use hypercall::{Answer, ReuseHypercall};
use mapping::Mapping;
use slots::{Owner, SLOTS, Slot};

/// Environment variable: id of the process that never forks, as whoever started it says. Only such a process gets a heap in an
/// arena, and those that it starts do not.
pub const NO_FORK: &str = "EBB_NO_FORK";
/// Where the kernel lists dax devices.
const DAX_DEVICES: &str = "/sys/bus/dax/devices";
/// How often a reuse spins on a granule that is being discarded before it makes the hypercall, or sleeps.
const REUSE_SPINS: u32 = 200;
/// Sleep before a reuse looks again, if the hypercall is not available. A discard takes about a millisecond.
const POLL_INTERVAL: Duration = Duration::from_micros(50);
/// Bytes from one slot's words to the next.
const SLOT_SIZE: usize = ROOM_BASE as usize / SLOTS;

/// The paths of all dax devices, `/dev/daxN.M`, sorted.
#[must_use]
pub fn devices() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(DAX_DEVICES).into_iter().flatten();
    let mut paths: Vec<_> = entries
        .flatten()
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .collect();
    paths.sort();
    paths
}

/// How many granules of an arena are in which state, counted while they change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GranuleCounts {
    /// All but those of the head.
    pub granules: u64,
    /// Owned by a process, alive or dead.
    pub owned: u64,
    /// In use.
    pub in_use: u64,
    /// Lazily free, with their content.
    pub lazy: u64,
    /// Being discarded by the monitor.
    pub reclaiming: u64,
    /// Taken by the host.
    pub discarded: u64,
}

/// A mapped arena in which this process holds a slot. Dropping it releases the slot and all granules.
pub struct Arena {
    path: PathBuf,
    mapping: Mapping,
    header: Header,
    layout: Layout,
    slot: Slot,
    hypercall: ReuseHypercall,
    /// Where the next search begins, counted from the first granule behind the head.
    search_from: AtomicUsize,
    /// Held during [`Arena::recover`].
    recovering: Mutex<()>,
}

/// Maps the arena at `path` and checks its header.
fn map(path: &Path, file: &File) -> Result<(Mapping, Header, Layout), OpenError> {
    let failed = |what| OpenError::from_io(path, what);
    let size = mapping::size(file).map_err(failed("reading the size"))?;
    let mapping = Mapping::new(file, size).map_err(failed("mmap"))?;
    let header = Header::from_words(std::array::from_fn(|n| {
        mapping.word(n * 8).load(Ordering::Acquire)
    }));
    let layout = header
        .check(size as u64)
        .map_err(|source| OpenError::Header {
            path: path.to_owned(),
            source,
        })?;
    Ok((mapping, header, layout))
}

fn open_device(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

impl Arena {
    /// Maps the arena of the device `path`, `/dev/daxN.M`, and takes a slot in it.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let file = open_device(path).map_err(OpenError::from_io(path, "open"))?;
        let (mapping, header, layout) = map(path, &file)?;
        let slot = Slot::lock_any(&file).map_err(OpenError::from_io(path, "locking a slot"))?;
        let mut arena = Self {
            path: path.to_owned(),
            mapping,
            header,
            layout,
            slot: slot.ok_or_else(|| OpenError::Full {
                path: path.to_owned(),
            })?,
            hypercall: ReuseHypercall::probe(),
            search_from: AtomicUsize::new(0),
            recovering: Mutex::new(()),
        };
        let index = arena.slot.index();
        // The slot's last process may have died and left granules. We hold the lock, so we may release them.
        arena.release_slot(index);
        let incarnations = arena.incarnations(index);
        let incarnation = incarnations.fetch_add(1, Ordering::AcqRel) + 1;
        arena.slot.set_incarnation(incarnation);
        // The mapping keeps the open file description, and so the lock. A descriptor could be closed by the program or
        // inherited by its children.
        drop(file);
        Ok(arena)
    }

    /// Name of the arena.
    #[must_use]
    pub fn name(&self) -> &str {
        self.header.name()
    }

    /// Size in bytes.
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

    /// How many processes have held the slot: its first word.
    fn incarnations(&self, slot: usize) -> &AtomicU64 {
        self.mapping
            .word(self.layout.room() as usize + slot * SLOT_SIZE)
    }

    fn owner_word(&self, granule: usize) -> &AtomicU64 {
        self.mapping
            .word((self.layout.room() + ROOM_BASE) as usize + granule * 8)
    }

    fn state_word(&self, granule: usize) -> &AtomicU64 {
        self.mapping
            .word(self.layout.table() as usize + granule * 8)
    }

    /// In use to lazy. No effect if the granule is not in use.
    fn mark_lazy(&self, granule: usize) {
        let generation = self.mapping.word(GENERATION as usize);
        let generation = generation.load(Ordering::Relaxed);
        shared_word::free(self.state_word(granule), generation);
    }

    /// Any state to in use. Returns the state before.
    fn mark_in_use(&self, granule: usize) -> State {
        let mut spins = 0;
        shared_word::reuse(self.state_word(granule), || {
            if spins < REUSE_SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                self.wait_for_discard(granule);
            }
        })
    }

    /// Waits while the monitor discards a granule. After a hypercall it is in use, and which of its pages are zero is unknown.
    #[cold]
    fn wait_for_discard(&self, granule: usize) {
        let size = self.layout.granule();
        let gpa = self.header.gpa.wrapping_add(granule as u64 * size);
        match self.hypercall.call(gpa, size) {
            Answer::Done => {}
            Answer::NotAllowed => std::thread::sleep(POLL_INTERVAL),
            Answer::Filtered => std::hint::spin_loop(),
        }
    }

    /// Claims a granule that no process owns. It is zero. `None` if none is free, even after [`Arena::recover`].
    #[must_use]
    pub fn claim(&self) -> Option<Granule<'_>> {
        let index = self.claim_run(1)?;
        let zero = self.reuse_granule(index);
        let mut granule = Granule { arena: self, index };
        if !zero {
            granule.bytes().fill(0);
        }
        Some(granule)
    }

    /// Becomes the owner of a granule. Returns false if it has one.
    fn try_own(&self, index: usize) -> bool {
        let (owner, me) = (self.owner_word(index), self.slot.owner().raw());
        let (success, failure) = (Ordering::AcqRel, Ordering::Relaxed);
        owner.load(Ordering::Relaxed) == 0
            && owner.compare_exchange(0, me, success, failure).is_ok()
    }

    fn clear_owner(&self, index: usize, owner: u64) {
        // Fails only if another process writes to words that are not its own.
        let _ =
            self.owner_word(index)
                .compare_exchange(owner, 0, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Frees granule `index` and clears its owner.
    fn release(&self, index: usize, owner: u64) {
        // In this order: another process may claim the granule as soon as it has no owner.
        self.mark_lazy(index);
        self.clear_owner(index, owner);
    }

    fn release_own(&self, index: usize) {
        self.release(index, self.slot.owner().raw());
    }

    /// Releases all granules of a slot that we have locked. Returns their number.
    fn release_slot(&self, slot: usize) -> usize {
        let mut released = 0;
        for index in self.indices() {
            let owner = self.owner_word(index).load(Ordering::Acquire);
            if Owner::from_raw(owner).is_some_and(|owner| owner.slot() == slot) {
                self.release(index, owner);
                released += 1;
            }
        }
        released
    }

    /// Releases the granules of dead processes. Returns their number.
    ///
    /// # Errors
    /// The device cannot be opened again.
    pub fn recover(&self) -> io::Result<usize> {
        let _guard = self
            .recovering
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let file = open_device(&self.path)?;
        let mut owners = [false; SLOTS];
        for index in self.indices() {
            let owner = Owner::from_raw(self.owner_word(index).load(Ordering::Acquire));
            if let Some(owns) = owner.and_then(|owner| owners.get_mut(owner.slot())) {
                *owns = true;
            }
        }
        owners[self.slot.index()] = false;
        let mut released = 0;
        for slot in (0..SLOTS).filter(|slot| owners[*slot]) {
            // A living owner holds the lock.
            if let Some(dead) = Slot::lock(&file, slot)? {
                released += self.release_slot(dead.index());
                dead.unlock(&file)?;
            }
        }
        Ok(released)
    }

    /// Counts the granules by state.
    #[must_use]
    pub fn counts(&self) -> GranuleCounts {
        let mut counts = GranuleCounts::default();
        for index in self.indices() {
            counts.granules += 1;
            counts.owned += u64::from(self.owner_word(index).load(Ordering::Relaxed) != 0);
            let word = Word::from_raw(self.state_word(index).load(Ordering::Relaxed));
            *match word.state() {
                Some(State::Lazy) => &mut counts.lazy,
                Some(State::Reclaiming) => &mut counts.reclaiming,
                Some(State::Discarded) => &mut counts.discarded,
                Some(State::InUse) | None => &mut counts.in_use,
            } += 1;
        }
        counts
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // Granules borrow the arena, so only forgotten ones are left. The mapping's end releases the lock.
        self.release_slot(self.slot.index());
    }
}

#[cfg(test)]
mod tests;
