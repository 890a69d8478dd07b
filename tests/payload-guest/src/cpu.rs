//! What the guest needs of its processor.

use core::arch::asm;
use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::map;
use crate::stamp::Memory;

/// The machine's memory, of which all addresses are valid to this guest.
#[derive(Clone, Copy, Debug)]
pub struct Ram(());

impl Ram {
    /// All of it.
    ///
    /// # Safety
    /// The caller runs in a guest whose first 4 GiB are mapped one to one and are its own, and accesses only
    /// what its part of the guest may access.
    #[must_use]
    pub const unsafe fn new() -> Self {
        Self(())
    }

    /// A word that vCPUs share.
    #[must_use]
    pub fn shared(&self, index: u64) -> &AtomicU64 {
        let word = with_exposed_provenance_mut((map::SHARED + 8 * index) as usize);
        // SAFETY: inside the page of shared words, aligned, and only ever used as atomics.
        unsafe { AtomicU64::from_ptr(word) }
    }
}

impl Memory for Ram {
    fn load(&self, address: u64) -> u64 {
        let word = with_exposed_provenance_mut::<u64>(address as usize);
        // SAFETY: memory of this guest, by the promise given to `new`; any value is a number.
        unsafe { word.read_volatile() }
    }

    fn store(&mut self, address: u64, word: u64) {
        let place = with_exposed_provenance_mut::<u64>(address as usize);
        // SAFETY: as above.
        unsafe { place.write_volatile(word) }
    }
}

/// The time stamp counter.
#[must_use]
pub fn now() -> u64 {
    // SAFETY: reads a register.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Writes a word to the serial port.
pub fn say(word: u64) {
    for byte in word.to_le_bytes() {
        // SAFETY: the serial port's data register; memory is not involved.
        unsafe { asm!("out dx, al", in("dx") 0x3f8u16, in("al") byte, options(nomem, nostack)) };
    }
}

/// Ends the machine: sleep type 5, sleep enable.
pub fn power_off() -> ! {
    // SAFETY: the sleep control register.
    unsafe { asm!("out dx, al", in("dx") 0x600u16, in("al") 0x34u8, options(nomem, nostack)) };
    halt()
}

/// Does nothing any more.
pub fn halt() -> ! {
    loop {
        // SAFETY: there are no interrupts to wait for, nor any handlers.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Waits until all `vcpus` have come to the barrier `index`, each of which serves once.
pub fn barrier(ram: &Ram, index: u64, vcpus: u64) {
    let count = ram.shared(1 + index);
    count.fetch_add(1, Ordering::AcqRel);
    while count.load(Ordering::Acquire) < vcpus {
        core::hint::spin_loop();
    }
}
