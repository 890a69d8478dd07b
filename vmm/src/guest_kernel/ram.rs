//! Reads the guest's RAM.

use std::sync::atomic::Ordering;

use ebb_core::range::GpaRange;
use vm_memory::{Bytes, GuestAddress};

use super::ReadGuest;
use crate::memory::GuestRam;

impl ReadGuest for GuestRam {
    fn load(&self, gpa: u64) -> Option<u64> {
        let end = gpa.checked_add(8)?;
        let page = GpaRange::new(gpa & !0xfff, end.next_multiple_of(0x1000))?;
        if gpa % 8 != 0 || !self.is_ram(page) {
            return None;
        }
        let word = self
            .view()
            .load::<u64>(GuestAddress(gpa), Ordering::Relaxed);
        word.ok().map(u64::from_le)
    }
}
