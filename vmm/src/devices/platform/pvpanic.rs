//! pvpanic: the guest's kernel reports its panic (QEMU, `docs/specs/pvpanic.rst`).

use crate::bus::{Action, BusDevice, ExitReason};
use crate::faults::GuestFaults;

/// The guest panicked.
const PANICKED: u8 = 1 << 0;
/// The guest panicked and now runs its crash kernel, which ends the machine by itself.
const CRASH_LOADED: u8 = 1 << 1;

/// One port: a read returns the supported events, a write reports one.
pub struct PvPanic(GuestFaults);

impl Default for PvPanic {
    fn default() -> Self {
        Self(GuestFaults::new("pvpanic"))
    }
}

impl BusDevice for PvPanic {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Action {
        match data {
            [event] if event & PANICKED != 0 => Action::Exit(ExitReason::Panic),
            [event] if event & CRASH_LOADED != 0 => {
                // A guest may say so again and again.
                self.0
                    .report("the guest's kernel panicked; its crash kernel runs now");
                Action::Continue
            }
            _ => Action::Continue,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_ends_the_machine_but_a_crash_kernel_goes_on() {
        let mut device = PvPanic::default();
        assert_eq!(device.write(0, &[1]), Action::Exit(ExitReason::Panic));
        assert_eq!(device.write(0, &[2]), Action::Continue);
        assert_eq!(device.write(0, &[0x80]), Action::Continue);
        let mut events = [0];
        device.read(0, &mut events);
        assert_eq!(events, [3]);
    }
}
