//! Power off and reset by ACPI (ACPI 6.5, 4.8.3.7 sleep control, 4.8.3.6 reset register).

use crate::bus::{Action, BusDevice, ExitReason};

/// Sleep type and sleep enable bits of the sleep control register.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Sleep control at offset 0, sleep status at 1, reset at 2.
pub struct Power {
    /// The sleep type for power off.
    pub off: u8,
    /// The value that resets the machine.
    pub reset: u8,
}

impl BusDevice for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        match (offset, data) {
            (0, [value]) if value & SLEEP_ENABLE != 0 => {
                if value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == self.off {
                    Action::Exit(ExitReason::Stop)
                } else {
                    Action::Continue
                }
            }
            (2, [value]) if *value == self.reset => Action::Exit(ExitReason::Reset),
            _ => Action::Continue,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn off_and_reset_need_their_exact_values() {
        let mut power = Power { off: 5, reset: 1 };
        for (offset, value, action) in [
            (0, 5 << 2 | 1 << 5, Action::Exit(ExitReason::Stop)),
            (0, 5 << 2, Action::Continue),
            (0, 4 << 2 | 1 << 5, Action::Continue),
            (1, 5 << 2 | 1 << 5, Action::Continue),
            (2, 1, Action::Exit(ExitReason::Reset)),
            (2, 0, Action::Continue),
        ] {
            assert_eq!(power.write(offset, &[value]), action, "{offset} {value:#x}");
        }
    }
}
