//! The free lists of the guest's kernel, as reclaim reads them.

use std::sync::Arc;

use ebb_core::generation::Hold;
use ebb_core::range::GpaRange;

use crate::guest_kernel::{FreeReader, GuestKernel, KnownKernel, Lost, ReadGuest};

/// Where free lists are read.
pub trait FreeLists: Send + Sync {
    /// The lists to read now. `None`: the guest's kernel is not known.
    fn current(&self) -> Option<Arc<dyn KernelLists>>;

    /// Addresses of the RAM that they are about, ascending.
    fn ram(&self) -> &[GpaRange];
}

/// The free lists of one kernel.
pub trait KernelLists: Send + Sync {
    /// Looks for free memory in `within`, see [`GuestKernel::find_free`]. With vCPUs in the guest it gives candidates.
    fn find(&self, within: GpaRange, order: u32, found: &mut Vec<GpaRange>) -> u64;

    /// Returns true if this kernel still runs, and is the one whose lists count.
    fn is_current(&self, _hold: &Hold<'_>) -> bool;

    /// Reads them in this pause.
    fn reader<'a>(&'a self, hold: &'a Hold<'_>) -> Box<dyn ReadLists + 'a>;
}

/// Reads free lists while every vCPU is out of the guest.
pub trait ReadLists {
    /// What `piece` is at this moment.
    fn look(&mut self, piece: GpaRange) -> Look;
}

/// What a piece of memory is while every vCPU is out of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Free: nobody uses its content.
    Free,
    /// Not free, or not as a part of one free block.
    InUse,
    /// The kernel fills free pages with a pattern. Its lists do not count any more.
    Poisoned,
}

/// The free lists of the kernel that is known, in this memory.
pub struct KnownLists {
    known: Arc<KnownKernel>,
    memory: Arc<dyn ReadGuest>,
    ram: Vec<GpaRange>,
}

impl KnownLists {
    /// Reads `memory`, whose RAM is at `ram`.
    #[must_use]
    pub const fn new(
        known: Arc<KnownKernel>,
        memory: Arc<dyn ReadGuest>,
        ram: Vec<GpaRange>,
    ) -> Self {
        Self { known, memory, ram }
    }
}

impl FreeLists for KnownLists {
    fn current(&self) -> Option<Arc<dyn KernelLists>> {
        Some(Arc::new(Current {
            kernel: self.known.current()?,
            known: Arc::clone(&self.known),
            memory: Arc::clone(&self.memory),
        }))
    }

    fn ram(&self) -> &[GpaRange] {
        &self.ram
    }
}

struct Current {
    kernel: Arc<GuestKernel>,
    known: Arc<KnownKernel>,
    memory: Arc<dyn ReadGuest>,
}

impl KernelLists for Current {
    fn find(&self, within: GpaRange, order: u32, found: &mut Vec<GpaRange>) -> u64 {
        self.kernel.find_free(&*self.memory, within, order, found)
    }

    fn is_current(&self, _: &Hold<'_>) -> bool {
        let current = self.known.current();
        if !current.is_some_and(|current| Arc::ptr_eq(&current, &self.kernel)) {
            return false;
        }
        let unchanged = self.kernel.is_unchanged(&*self.memory);
        if !unchanged {
            self.known.forget(Lost::OtherKernel);
        }
        unchanged
    }

    fn reader<'a>(&'a self, _: &'a Hold<'_>) -> Box<dyn ReadLists + 'a> {
        Box::new(Reader {
            of: self,
            free: self.kernel.reader(&*self.memory),
        })
    }
}

struct Reader<'a> {
    of: &'a Current,
    free: FreeReader<'a>,
}

impl ReadLists for Reader<'_> {
    fn look(&mut self, piece: GpaRange) -> Look {
        if !self.free.is_free(piece) {
            return Look::InUse;
        }
        if self.of.kernel.poisons(&*self.of.memory, piece) {
            self.of.known.forget(Lost::Poisoned);
            return Look::Poisoned;
        }
        Look::Free
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, MutexGuard};
    use std::time::Duration;

    use ebb_core::generation::{Gate, VmGeneration};

    use super::*;
    use crate::guest_kernel::NoteSource;
    use crate::guest_kernel::tests::machine::{Machine, pages};

    struct Guest(Mutex<Machine>);

    impl Guest {
        fn machine(&self) -> MutexGuard<'_, Machine> {
            self.0.lock().unwrap()
        }
    }

    impl ReadGuest for Guest {
        fn load(&self, gpa: u64) -> Option<u64> {
            self.machine().memory.load(gpa)
        }
    }

    /// A guest whose note was accepted, and which has the pages from 512 on free.
    fn guest() -> (Arc<Guest>, Arc<KnownKernel>, KnownLists) {
        let guest = Arc::new(Guest(Mutex::new(Machine::stock())));
        guest.machine().free(512, 9);
        let known = Arc::new(KnownKernel::new());
        let memory = Arc::clone(&guest) as _;
        let lists = KnownLists::new(Arc::clone(&known), memory, vec![pages(0, 1024)]);
        assert!(lists.current().is_none(), "no note yet");
        known.clock_set(0, true);
        let note = guest.machine().note();
        known.offer(&*guest, note, NoteSource::FwCfg).unwrap();
        (guest, known, lists)
    }

    fn with_gate_closed<T>(action: impl FnOnce(&Hold<'_>) -> T) -> T {
        let gate = Gate::without_vcpus(Arc::new(VmGeneration::default()));
        action(&gate.hold(Duration::from_secs(60)).unwrap())
    }

    #[test]
    fn what_is_free_is_found_and_read_again() {
        let (guest, _, lists) = guest();
        let (kernel, mut found) = (lists.current().unwrap(), Vec::new());
        kernel.find(pages(0, 1024), 9, &mut found);
        assert_eq!(found, [pages(512, 512)]);
        let look = || with_gate_closed(|hold| kernel.reader(hold).look(pages(512, 512)));
        assert_eq!(look(), Look::Free);
        guest.machine().allocate(512);
        assert_eq!(look(), Look::InUse);
    }

    #[test]
    fn only_the_lists_of_the_last_note_count() {
        let (guest, known, lists) = guest();
        let current = |kernel: &dyn KernelLists| with_gate_closed(|hold| kernel.is_current(hold));
        let old = lists.current().unwrap();
        assert!(current(&*old));
        let note = guest.machine().note();
        known.offer(&*guest, note, NoteSource::FwCfg).unwrap();
        assert!(!current(&*old), "the same kernel may have started anew");
        let new = lists.current().unwrap();
        assert!(current(&*new));
        known.forget(Lost::DeviceReset);
        assert!(!current(&*new) && lists.current().is_none());
    }

    #[test]
    fn another_kernel_and_poison_end_it() {
        let (guest, known, lists) = guest();
        let release = guest.machine().image("init_uts_ns") + 136;
        guest.machine().memory.set(release, 0);
        let kernel = lists.current().unwrap();
        assert!(!with_gate_closed(|hold| kernel.is_current(hold)));
        let why_not = |known: &KnownKernel| known.status().why_not.unwrap();
        assert_eq!(why_not(&known), Lost::OtherKernel.to_string());

        let (guest, known, lists) = self::guest();
        for gpa in [0x20_0000, 0x20_0ff8, 0x3f_f000, 0x3f_fff8] {
            guest.machine().memory.set(gpa, 0xaaaa_aaaa_aaaa_aaaa);
        }
        let kernel = lists.current().unwrap();
        let look = with_gate_closed(|hold| kernel.reader(hold).look(pages(512, 512)));
        assert_eq!(look, Look::Poisoned);
        assert_eq!(why_not(&known), Lost::Poisoned.to_string());
    }
}
