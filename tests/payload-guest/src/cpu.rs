//! The processor, the serial port and memory access.

use core::arch::asm;
use core::ptr::with_exposed_provenance_mut;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::map;
use crate::records::WordMemory;

/// The machine's memory. All addresses are valid.
#[derive(Clone, Copy, Debug)]
pub struct Ram(());

impl Ram {
    /// Grants access to the memory.
    ///
    /// # Safety
    /// The caller runs in a guest that owns its first 4 GiB and has them identity-mapped, and accesses only the memory of its
    /// own vCPU.
    #[must_use]
    pub const unsafe fn new() -> Self {
        Self(())
    }

    /// A word that the vCPUs share.
    #[must_use]
    pub fn shared(&self, index: u64) -> &AtomicU64 {
        let word = with_exposed_provenance_mut((map::SHARED + 8 * index) as usize);
        // SAFETY: inside the page of shared words, aligned, and only ever used as atomics.
        unsafe { AtomicU64::from_ptr(word) }
    }
}

impl WordMemory for Ram {
    fn load(&self, address: u64) -> u64 {
        let word = with_exposed_provenance_mut::<u64>(address as usize);
        // SAFETY: memory of this guest, as promised to `new`, and every value is valid.
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
pub fn send(word: u64) {
    for byte in word.to_le_bytes() {
        // SAFETY: the serial port's data register. Touches no memory.
        unsafe { asm!("out dx, al", in("dx") 0x3f8u16, in("al") byte, options(nomem, nostack)) };
    }
}

/// Powers off: sleep type 5, sleep enable.
pub fn power_off() -> ! {
    // SAFETY: the sleep control register. Touches no memory.
    unsafe { asm!("out dx, al", in("dx") 0x600u16, in("al") 0x34u8, options(nomem, nostack)) };
    halt()
}

/// Halts forever.
pub fn halt() -> ! {
    loop {
        // SAFETY: touches no memory.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Waits until all `vcpus` have reached the barrier `index`. Each index can be used once.
pub fn barrier(ram: &Ram, index: u64, vcpus: u64) {
    let count = ram.shared(1 + index);
    count.fetch_add(1, Ordering::AcqRel);
    while count.load(Ordering::Acquire) < vcpus {
        core::hint::spin_loop();
    }
}
