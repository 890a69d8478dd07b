//! The keyboard controller: only its reset function.

use crate::bus::{Action, BusDevice, ExitReason};

/// Offset of the status and command register.
const COMMAND: u64 = 4;
/// Command: pulse the reset line.
const RESET: u8 = 0xfe;

/// A keyboard controller without a keyboard: it reads as idle, and can reset the machine. Linux tries it
/// if its command line contains `reboot=k`.
pub struct I8042;

impl BusDevice for I8042 {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if offset == COMMAND && data == [RESET] {
            Action::Exit(ExitReason::Reset)
        } else {
            Action::Continue
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        for (offset, value, action) in [
            (4, 0xfe, Action::Exit(ExitReason::Reset)),
            (4, 0xad, Action::Continue),
            (0, 0xfe, Action::Continue),
        ] {
            assert_eq!(I8042.write(offset, &[value]), action);
        }
        assert_eq!(I8042.write(4, &[0xfe, 0]), Action::Continue);
    }
}
