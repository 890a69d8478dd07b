//! Reads the guest's RAM.

use std::sync::atomic::Ordering;

use ebb_core::range::{GpaRange, PAGE_SIZE};
use vm_memory::{Bytes, GuestAddress};

use super::ReadGuest;
use crate::memory::GuestRam;

impl ReadGuest for GuestRam {
    fn load(&self, gpa: u64) -> Option<u64> {
        let page = gpa - gpa % PAGE_SIZE;
        let page = GpaRange::new(page, page.checked_add(PAGE_SIZE)?)?;
        if !gpa.is_multiple_of(8) || !self.is_ram(page) {
            return None;
        }
        let word = self
            .view()
            .load::<u64>(GuestAddress(gpa), Ordering::Relaxed);
        word.ok().map(u64::from_le)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;

    #[test]
    fn only_aligned_words_of_ram_are_loaded() {
        let range = |start, end| GpaRange::new(start, end).unwrap();
        let ram = [range(0, 2 << 20), range(4 << 20, 6 << 20)];
        let arena = [range(8 << 20, 10 << 20)];
        let ram = GuestRam::with_arenas(Backing::default(), &ram, &arena).unwrap();
        let view = ram.view();
        view.write_obj(7u64, GuestAddress(4 << 20)).unwrap();
        assert_eq!(ram.load(4 << 20), Some(7));
        assert_eq!(ram.load((2 << 20) - 8), Some(0));
        for gpa in [
            (4 << 20) + 4,
            2 << 20,
            6 << 20,
            8 << 20,
            u64::MAX - 7,
            u64::MAX,
        ] {
            assert_eq!(ram.load(gpa), None, "{gpa:#x}");
        }
    }
}
