//! The reset vector.
//!
//! On a hardware-reduced ACPI machine without EFI, Linux reboots neither by the ACPI reset register nor
//! by the keyboard controller: it switches to real mode and jumps to the BIOS (Linux,
//! `arch/x86/platform/efi/quirks.c`, `efi_reboot_required`; `arch/x86/kernel/reboot.c`). There is no BIOS,
//! so the vector contains the few instructions that write the reset register.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{acpi, layout};

/// Writes the reset vector.
///
/// # Errors
/// Guest memory is too small.
pub fn write(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_slice(&code(), GuestAddress(layout::RESET_VECTOR))
}

/// `mov dx, port; mov al, value; out dx, al; hlt`, for 16-bit mode.
const fn code() -> [u8; 7] {
    let [low, high] = (layout::RESET_PORT as u16).to_le_bytes();
    [0xba, low, high, 0xb0, acpi::RESET_VALUE, 0xee, 0xf4]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vector_fits_below_one_mib() {
        assert!(layout::RESET_VECTOR + code().len() as u64 <= layout::HIGH_RAM_START);
        assert_eq!(code(), [0xba, 0x02, 0x06, 0xb0, 1, 0xee, 0xf4]);
    }
}
